"""guided-diffusion's UNet in diffusers: outputs against an independent forward, files, and refusals.

`adm_forward` computes an ADM straight from its state dict, written from the architecture's description
(Dhariwal & Nichol 2021). It knows nothing of diffusers, so it is what the conversion is held against for the
flags that the golden files do not cover.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import logging
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.unets.unet_2d import UNet2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from robustdiff.backbones.adm import (
    PRESETS,
    AdmFlags,
    AdmUNet2DModel,
    build_adm,
    load_adm,
    save_adm,
)
from robustdiff.backbones.adm.flags import parse_flags
from robustdiff.errors import InputError

State = dict[str, Tensor]


# An ADM, straight from its state dict -----------------------------------------------------------------------


def adm_forward(state: State, flags: AdmFlags, x: Tensor, t: Tensor, y: Tensor | None, train: bool) -> Tensor:
    """The network of `flags` with the weights of `state` at x (B, C, H, W), times t (B,), labels y (B,)."""

    def affine(name: str, h: Tensor, **options: Any) -> Tensor:
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        if weight.ndim == 2:
            return F.linear(h, weight, bias)
        if weight.ndim == 3:
            return F.conv1d(h, weight, bias)
        return F.conv2d(h, weight, bias, padding=weight.shape[-1] // 2, **options)

    def norm(name: str, h: Tensor) -> Tensor:
        return F.group_norm(h, 32, state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-5)

    def resized(h: Tensor, mode: str) -> Tensor:
        if mode == "up":
            return h.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        return h.unfold(2, 2, 2).unfold(3, 2, 2).mean((-2, -1)) if mode == "down" else h

    def residual(name: str, h: Tensor, mode: str = "same") -> Tensor:
        out = resized(F.silu(norm(f"{name}.in_layers.0", h)), mode)
        out = affine(f"{name}.in_layers.2", out)
        modulation = affine(f"{name}.emb_layers.1", F.silu(emb))[:, :, None, None]
        if flags.use_scale_shift_norm:
            scale, shift = modulation.chunk(2, dim=1)
            out = norm(f"{name}.out_layers.0", out) * (1 + scale) + shift
        else:
            out = norm(f"{name}.out_layers.0", out + modulation)
        out = affine(f"{name}.out_layers.3", F.dropout(F.silu(out), flags.dropout, training=train))
        h = resized(h, mode)
        return (affine(f"{name}.skip_connection", h) if f"{name}.skip_connection.weight" in state else h) + out

    def attention(name: str, h: Tensor, num_heads: int) -> Tensor:
        b, c, *side = h.shape
        heads = num_heads if flags.num_head_channels == -1 else c // flags.num_head_channels
        tokens = h.flatten(2)
        qkv = F.conv1d(norm(f"{name}.norm", tokens), state[f"{name}.qkv.weight"].flatten(2), state[f"{name}.qkv.bias"])
        if flags.use_new_attention_order:
            q, k, v = qkv.reshape(b, 3, heads, c // heads, -1).unbind(1)
        else:
            q, k, v = qkv.reshape(b, heads, 3, c // heads, -1).unbind(2)
        weights = torch.einsum("bhct,bhcs->bhts", q, k).div(math.sqrt(c // heads)).softmax(-1)
        out = torch.einsum("bhts,bhcs->bhct", weights, v).reshape(b, c, -1)
        out = F.conv1d(out, state[f"{name}.proj_out.weight"].flatten(2), state[f"{name}.proj_out.bias"])
        return h + out.reshape(b, c, *side)

    def resample(name: str, convolution: str, h: Tensor, mode: str) -> Tensor:
        if flags.resblock_updown:
            return residual(name, h, mode)
        if not flags.conv_resample:
            return resized(h, mode)
        if mode == "down":
            return affine(f"{name}.{convolution}", h, stride=2)
        return affine(f"{name}.{convolution}", resized(h, "up"))

    half = flags.num_channels // 2
    angles = t.float()[:, None] * torch.exp(-math.log(10000) * torch.arange(half) / half)
    emb = affine("time_embed.2", F.silu(affine("time_embed.0", torch.cat([angles.cos(), angles.sin()], 1))))
    if y is not None:
        emb = emb + state["label_emb.weight"][y]

    per_level, depth = flags.num_res_blocks + 1, len(flags.multipliers)
    h = affine("input_blocks.0.0", x)
    skips = [h]
    for block in range(1, depth * per_level):
        if block % per_level == 0:
            h = resample(f"input_blocks.{block}.0", "op", h, "down")
        else:
            h = residual(f"input_blocks.{block}.0", h)
            if f"input_blocks.{block}.1.qkv.weight" in state:
                h = attention(f"input_blocks.{block}.1", h, flags.num_heads)
        skips.append(h)
    h = residual("middle_block.0", h)
    h = attention("middle_block.1", h, flags.num_heads)
    h = residual("middle_block.2", h)
    for block in range(depth * per_level):
        h = residual(f"output_blocks.{block}.0", torch.cat([h, skips.pop()], 1))
        place = 1
        if f"output_blocks.{block}.1.qkv.weight" in state:
            up_heads = flags.num_heads if flags.num_heads_upsample == -1 else flags.num_heads_upsample
            h, place = attention(f"output_blocks.{block}.1", h, up_heads), 2
        if block % per_level == per_level - 1 and block < depth * per_level - 1:
            h = resample(f"output_blocks.{block}.{place}", "conv", h, "up")
    assert not skips
    return affine("out.2", F.silu(norm("out.0", h)))


# What the tests share ---------------------------------------------------------------------------------------

TINY = AdmFlags(
    image_size=8,
    num_channels=32,
    num_res_blocks=1,
    channel_mult="1,2",
    attention_resolutions="8,4",
    num_head_channels=16,
    resblock_updown=True,
    use_new_attention_order=True,
    dropout=0.3,
)


def matrix() -> Iterator[Any]:
    heads: dict[str, dict[str, Any]] = {"width": {}, "number": {"num_head_channels": -1, "num_heads": 2}}
    for resblock, shift, new, (by, spec) in itertools.product(
        (True, False), (True, False), (True, False), heads.items()
    ):
        flags = replace(
            TINY,
            resblock_updown=resblock,
            use_scale_shift_norm=shift,
            use_new_attention_order=new,
            learn_sigma=resblock,
            class_cond=shift,
            num_classes=7 if shift else None,
            **spec,
        )
        words = [
            "resblock" if resblock else "conv",
            "scale-shift" if shift else "additive",
            "new" if new else "legacy",
            by,
        ]
        yield pytest.param(flags, id="-".join(words))


OTHERS = {
    "heads-upsample": replace(
        TINY, num_head_channels=-1, num_heads=2, num_heads_upsample=4, use_new_attention_order=False
    ),
    "first-level-narrow": replace(TINY, num_channels=64, channel_mult="0.5,1", use_new_attention_order=False),
    "first-level-wide": replace(TINY, channel_mult="2,1,1", attention_resolutions="4"),
    "no-parameters-in-resampling": replace(TINY, resblock_updown=False, conv_resample=False),
    "attention-only-in-the-middle": replace(TINY, attention_resolutions="1", num_res_blocks=2),
    "one-level": replace(TINY, num_channels=64, channel_mult="1", num_res_blocks=2),
    "three-levels": replace(TINY, channel_mult="1,1,2", attention_resolutions="4", num_res_blocks=2),
}
EVERY = [*matrix(), *(pytest.param(flags, id=name) for name, flags in OTHERS.items())]
# What a plain UNet2DModel cannot express; with "number" in the matrix, whose two attention widths differ.
SUBCLASSED = ("heads-upsample", "first-level-narrow", "first-level-wide", "no-parameters-in-resampling")


def random_adm(flags: AdmFlags, path: Path) -> State:
    """A checkpoint of random weights, none of them zero or one, at `path`."""
    torch.manual_seed(0)
    unet = build_adm(flags)
    for name, parameter in unet.named_parameters():
        torch.nn.init.normal_(parameter, mean=0.5 if "norm" in name else 0.0, std=0.1)
    save_adm(unet, path)
    state: State = torch.load(path, weights_only=True)
    return state


def load(path: Path, flags: AdmFlags, **changes: Any) -> UNet2DModel:
    return load_adm(path, **{**asdict(flags), **changes})


def inputs(flags: AdmFlags) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, flags.image_size, flags.image_size, generator=generator)
    return x, torch.tensor([3, 977]), torch.tensor([6, 0]) if flags.class_cond else None


def outputs(unet: UNet2DModel, flags: AdmFlags) -> Tensor:
    x, t, y = inputs(flags)
    with torch.no_grad():
        out: Tensor = unet(x, t, class_labels=y).sample
    return out


def assert_close(a: Tensor, b: Tensor) -> None:
    assert a.shape == b.shape
    assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def assert_same_file(path: Path, expected: State) -> None:
    state = torch.load(path, weights_only=True)
    assert list(state) == list(expected)
    for name, tensor in expected.items():
        assert (state[name].dtype, state[name].shape) == (tensor.dtype, tensor.shape)
        assert state[name].numpy().tobytes() == tensor.numpy().tobytes()


# The conversion ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", EVERY)
def test_outputs_equal_adm_and_file_comes_back(flags: AdmFlags, tmp_path: Path) -> None:
    state = random_adm(flags, tmp_path / "adm.pt")
    unet = load(tmp_path / "adm.pt", flags)
    assert not unet.training
    assert_close(outputs(unet, flags), adm_forward(state, flags, *inputs(flags), train=False))

    save_adm(unet, tmp_path / "back.pt")
    assert_same_file(tmp_path / "back.pt", state)


@pytest.mark.parametrize("flags", EVERY)
def test_round_trip_through_diffusers_folder(flags: AdmFlags, tmp_path: Path) -> None:
    state = random_adm(flags, tmp_path / "adm.pt")
    unet = load(tmp_path / "adm.pt", flags)
    unet.save_pretrained(tmp_path / "unet")
    again = type(unet).from_pretrained(tmp_path / "unet")
    assert torch.equal(outputs(again, flags), outputs(unet, flags))

    save_adm(again, tmp_path / "back.pt")
    assert_same_file(tmp_path / "back.pt", state)
    # A tensor that dragged a larger storage along would show here.
    assert (tmp_path / "back.pt").stat().st_size < 1.2 * (tmp_path / "adm.pt").stat().st_size


@pytest.mark.parametrize("flags", EVERY)
def test_plain_unet_whenever_possible(flags: AdmFlags, request: pytest.FixtureRequest) -> None:
    name = request.node.callspec.id
    subclassed = name in SUBCLASSED or name.endswith("-number")
    assert type(build_adm(flags)) is (AdmUNet2DModel if subclassed else UNet2DModel)


def test_heads_by_number_are_plain_when_the_width_is_one(tmp_path: Path) -> None:
    flags = replace(TINY, num_head_channels=-1, num_heads=2, attention_resolutions="4")
    state = random_adm(flags, tmp_path / "adm.pt")
    unet = load(tmp_path / "adm.pt", flags)
    assert type(unet) is UNet2DModel
    assert_close(outputs(unet, flags), adm_forward(state, flags, *inputs(flags), train=False))


@pytest.mark.parametrize("name", ["plain", "heads-upsample"])
def test_pipeline_round_trip(name: str, tmp_path: Path) -> None:
    flags = TINY if name == "plain" else OTHERS[name]
    state = random_adm(flags, tmp_path / "adm.pt")
    unet = load(tmp_path / "adm.pt", flags)
    pipeline_class: Any = diffusers.DDPMPipeline
    scheduler_class: Any = diffusers.DDPMScheduler
    pipeline_class(unet, scheduler_class()).save_pretrained(tmp_path / "pipeline")
    pipeline = pipeline_class.from_pretrained(tmp_path / "pipeline")
    assert type(pipeline.unet) is (UNet2DModel if name == "plain" else AdmUNet2DModel)
    assert torch.equal(outputs(pipeline.unet, flags), outputs(unet, flags))
    save_adm(pipeline.unet, tmp_path / "back.pt")
    assert_same_file(tmp_path / "back.pt", state)


def test_subclass_does_not_pass_for_plain(tmp_path: Path) -> None:
    flags = OTHERS["heads-upsample"]
    random_adm(flags, tmp_path / "adm.pt")
    load(tmp_path / "adm.pt", flags).save_pretrained(tmp_path / "unet")
    # With the wrong heads it would run and be wrong; it must not load.
    with pytest.raises(TypeError):
        UNet2DModel.from_pretrained(tmp_path / "unet")


def test_folders_load_without_warnings(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    try:
        for flags in (TINY, OTHERS["heads-upsample"]):
            random_adm(flags, tmp_path / "adm.pt")
            unet = load(tmp_path / "adm.pt", flags)
            unet.save_pretrained(tmp_path / "unet")
            type(unet).from_pretrained(tmp_path / "unet")
    finally:
        logger.removeHandler(caplog.handler)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_copy_by_config_keeps_the_network(tmp_path: Path) -> None:
    # What diffusers' EMAModel does.
    flags = OTHERS["heads-upsample"]
    state = random_adm(flags, tmp_path / "adm.pt")
    unet = load(tmp_path / "adm.pt", flags)
    twin: Any = AdmUNet2DModel.from_config(unet.config)
    twin.load_state_dict(unet.state_dict())
    assert torch.equal(outputs(twin.eval(), flags), outputs(unet, flags))
    save_adm(copy.deepcopy(twin), tmp_path / "back.pt")
    assert_same_file(tmp_path / "back.pt", state)


def test_training_applies_dropout_where_adm_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[float, torch.Size]] = []

    def dropout(h: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        """Dropout whose mask depends on the call's number alone, not on the tensor's layout in memory."""
        if not training or p == 0:
            return h
        generator = torch.Generator().manual_seed(len(calls))
        calls.append((p, h.shape))
        return h * (torch.rand(h.shape, generator=generator) >= p) / (1 - p)

    state = random_adm(TINY, tmp_path / "adm.pt")
    unet = load(tmp_path / "adm.pt", TINY)
    undisturbed = outputs(unet, TINY)
    monkeypatch.setattr(F, "dropout", dropout)
    out = outputs(unet.train(), TINY)
    ours = calls.copy()
    calls.clear()
    expected = adm_forward(state, TINY, *inputs(TINY), train=True)
    assert ours == calls
    assert {p for p, _ in ours} == {TINY.dropout}
    assert_close(out, expected)
    assert not torch.equal(out, undisturbed)


def test_gradients_flow_to_input_and_every_weight(tmp_path: Path) -> None:
    random_adm(TINY, tmp_path / "adm.pt")
    unet = load(tmp_path / "adm.pt", TINY)
    x, t, _ = inputs(TINY)
    unet(x.requires_grad_(), t).sample.square().sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    assert all(parameter.grad is not None for parameter in unet.parameters())


def test_attention_order_is_invisible_in_shapes_and_matters(tmp_path: Path) -> None:
    random_adm(TINY, tmp_path / "adm.pt")
    new = outputs(load(tmp_path / "adm.pt", TINY), TINY)
    legacy = outputs(load(tmp_path / "adm.pt", TINY, use_new_attention_order=False), TINY)
    assert (new - legacy).abs().max() > 1e-3 * new.abs().max()


def test_consistency_models_have_two_dimensional_qkv(tmp_path: Path) -> None:
    state = random_adm(TINY, tmp_path / "adm.pt")
    for name in state:
        if name.endswith(("qkv.weight", "proj_out.weight")):
            state[name] = state[name][..., None]
    torch.save(state, tmp_path / "cm.pt")
    unet = load(tmp_path / "cm.pt", TINY)
    assert_close(outputs(unet, TINY), adm_forward(state, TINY, *inputs(TINY), train=False))
    unet.save_pretrained(tmp_path / "unet")
    save_adm(UNet2DModel.from_pretrained(tmp_path / "unet"), tmp_path / "back.pt")
    assert_same_file(tmp_path / "back.pt", state)


@pytest.mark.parametrize("which", ["all", "convolutions"])
@pytest.mark.parametrize("new_order", [True, False])
def test_half_precision_files(which: str, new_order: bool, tmp_path: Path) -> None:
    flags = replace(TINY, use_new_attention_order=new_order)
    state = random_adm(flags, tmp_path / "adm.pt")
    for name, tensor in state.items():
        # guided-diffusion's convert_to_fp16 narrows the convolutions of all blocks and nothing else.
        convolution = re.match(r".*_blocks?\..*(in_layers\.2|out_layers\.3|skip_connection|qkv|proj_out|0\.0)\.", name)
        if which == "all" or convolution:
            state[name] = tensor.half()
    torch.save(state, tmp_path / "half.pt")
    unet = load(tmp_path / "half.pt", flags)
    assert {parameter.dtype for parameter in unet.parameters()} == {torch.float32}
    widened = {name: tensor.float() for name, tensor in state.items()}
    assert_close(outputs(unet, flags), adm_forward(widened, flags, *inputs(flags), train=False))

    unet.save_pretrained(tmp_path / "unet")
    for name, model in (("a", unet), ("b", UNet2DModel.from_pretrained(tmp_path / "unet"))):
        save_adm(model, tmp_path / f"{name}.pt")
        assert_same_file(tmp_path / f"{name}.pt", state)


def test_cast_parameters_are_written_as_they_are(tmp_path: Path) -> None:
    state = random_adm(TINY, tmp_path / "adm.pt")
    unet: Any = load(tmp_path / "adm.pt", TINY)
    save_adm(unet.half(), tmp_path / "half.pt")
    assert_same_file(tmp_path / "half.pt", {name: tensor.half() for name, tensor in state.items()})


def test_number_of_channels_and_classes_are_those_of_the_file(tmp_path: Path) -> None:
    flags = replace(TINY, class_cond=True, num_classes=10, learn_sigma=True)
    save_adm(build_adm(flags, in_channels=1), tmp_path / "adm.pt")
    unet = load(tmp_path / "adm.pt", flags, num_classes=None)
    config = unet.config
    assert (config["in_channels"], config["out_channels"], config["num_class_embeds"]) == (1, 2, 10)


def test_files_in_another_order_are_read(tmp_path: Path) -> None:
    state = random_adm(TINY, tmp_path / "adm.pt")
    torch.save(dict(reversed(state.items())), tmp_path / "reversed.pt")
    save_adm(load(tmp_path / "reversed.pt", TINY), tmp_path / "back.pt")
    assert_same_file(tmp_path / "back.pt", state)


def test_build_starts_at_zero() -> None:
    assert build_adm(TINY).training
    assert outputs(build_adm(TINY), TINY).abs().max() == 0


# What cannot be converted -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "differs", "says"),
    [
        (
            {"learn_sigma": True},
            "out.2.weight is (3, 32, 3, 3) in the file, expected (6, 32, 3, 3)",
            "learn_sigma=False",
        ),
        (
            {"class_cond": True},
            "label_emb.weight is missing in the file, expected (1000, 128)",
            "class_cond=False",
        ),
        (
            {"class_cond": True, "num_classes": 7},
            "label_emb.weight is missing in the file, expected (7, 128)",
            "class_cond=False",
        ),
        (
            {"num_channels": 64},
            "time_embed.0.weight is (128, 32) in the file, expected (256, 64)",
            "num_channels=32",
        ),
        (
            {"use_scale_shift_norm": False},
            "input_blocks.1.0.emb_layers.1.weight is (64, 128) in the file, expected (32, 128)",
            "use_scale_shift_norm=True",
        ),
        (
            {"resblock_updown": False},
            "input_blocks.2.0.op.weight is missing in the file, expected (32, 32, 3, 3)",
            "resblock_updown=True",
        ),
        (
            {"attention_resolutions": "8"},
            "input_blocks.3.1.norm.weight is (64,) in the file, expected no such tensor",
            "attention_resolutions='8,4'",
        ),
        (
            {"attention_resolutions": "4"},
            "input_blocks.1.1.norm.weight is (32,) in the file, expected no such tensor",
            "attention_resolutions='8,4'",
        ),
        (
            {"num_res_blocks": 2},
            "input_blocks.2.1.norm.weight is missing in the file, expected (32,)",
            "num_res_blocks=1",
        ),
        (
            {"channel_mult": "1,2,2"},
            "input_blocks.4.0.in_layers.0.weight is missing in the file, expected (64,)",
            "channel_mult='1,2'",
        ),
        (
            {"channel_mult": "1"},
            "input_blocks.2.0.in_layers.0.weight is (32,) in the file, expected no such tensor",
            "channel_mult='1,2'",
        ),
        (
            {"channel_mult": "1,3"},
            "input_blocks.3.0.in_layers.2.weight is (64, 32, 3, 3) in the file, expected (96, 32, 3, 3)",
            "channel_mult='1,2'",
        ),
    ],
)
def test_wrong_flag_is_named(changes: dict[str, Any], differs: str, says: str, tmp_path: Path) -> None:
    random_adm(TINY, tmp_path / "adm.pt")
    with pytest.raises(InputError) as caught:
        load(tmp_path / "adm.pt", TINY, **changes)
    flag = says.split("=")[0]
    assert str(caught.value) == (
        f"{tmp_path / 'adm.pt'} does not fit its flags: {differs}; "
        f"most likely the flag {flag} is wrong: the file's shapes say {says}"
    )


@pytest.mark.parametrize(
    ("flags", "changes", "says"),
    [
        (replace(TINY, class_cond=True), {"class_cond": False}, "class_cond=True"),
        (replace(TINY, class_cond=True), {"num_classes": 10}, "num_classes=1000"),
        (replace(TINY, resblock_updown=False), {"resblock_updown": True}, "resblock_updown=False"),
        (
            replace(TINY, attention_resolutions="1"),
            {"attention_resolutions": "4"},
            "attention_resolutions=''",
        ),
        (OTHERS["no-parameters-in-resampling"], {"conv_resample": True}, "conv_resample=False"),
        (
            replace(TINY, image_size=32, channel_mult="", attention_resolutions="16,8"),
            {"image_size": 64},
            "image_size=32",
        ),
        (TINY, {"num_res_blocks": 2, "resblock_updown": False}, "resblock_updown=True, num_res_blocks=1"),
    ],
)
def test_wrong_flag_is_named_for_other_files(
    flags: AdmFlags, changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    random_adm(flags, tmp_path / "adm.pt")
    with pytest.raises(InputError, match=rf"shapes say {re.escape(says)}$"):
        load(tmp_path / "adm.pt", flags, **changes)


def test_damaged_file_blames_no_flag(tmp_path: Path) -> None:
    state = random_adm(TINY, tmp_path / "adm.pt")
    del state["out.0.bias"]
    torch.save(state, tmp_path / "adm.pt")
    with pytest.raises(InputError, match=r"out\.0\.bias is missing in the file, expected \(32,\); no flag"):
        load(tmp_path / "adm.pt", TINY)


def test_files_that_are_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        load_adm(tmp_path / "absent.pt")
    with pytest.raises(InputError, match="no such file"):
        load_adm(tmp_path)
    for content in (b"", b"not a checkpoint", bytes(range(256)) * 8, b"PK\x03\x04 broken zip"):
        (tmp_path / "file.pt").write_bytes(content)
        with pytest.raises(InputError, match=r"^[^\n]*is not a checkpoint that PyTorch can read: [^\n]*$"):
            load_adm(tmp_path / "file.pt")
    for value, message in (
        ([1, 2], "holds a list, not a dict of weights"),
        ({"state": {}, "step": 3}, "holds no dict of weights by name, but state, step"),
        ({"weight": torch.arange(3)}, "weight is int64"),
        ({}, "but an empty dict"),
        (torch.zeros(3), "holds a Tensor"),
        ({"weight": torch.zeros(3)}, "is not a guided-diffusion UNet checkpoint"),
    ):
        torch.save(value, tmp_path / "file.pt")
        with pytest.raises(InputError, match=message):
            load_adm(tmp_path / "file.pt")


def test_pickles_are_not_executed(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    with pytest.raises(InputError, match="is not a checkpoint that PyTorch can read"):
        load_adm(tmp_path / "module.pt")


def test_other_networks_of_guided_diffusion_are_refused(tmp_path: Path) -> None:
    state = random_adm(replace(TINY, learn_sigma=True), tmp_path / "adm.pt")
    state["input_blocks.0.0.weight"] = state["input_blocks.0.0.weight"].repeat(1, 2, 1, 1)
    torch.save(state, tmp_path / "upsampler.pt")
    with pytest.raises(InputError, match="super-resolution"):
        load(tmp_path / "upsampler.pt", TINY)
    classifier = {name: tensor for name, tensor in state.items() if not name.startswith("out")}
    torch.save(classifier, tmp_path / "classifier.pt")
    with pytest.raises(InputError, match=r"no image UNet's out\.2\.weight"):
        load(tmp_path / "classifier.pt", TINY)


def small_unet(**changes: Any) -> UNet2DModel:
    arguments: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (32, 64),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
    }
    unet: UNet2DModel = UNet2DModel(**{**arguments, **changes})
    return unet


def test_any_unet_of_adm_structure_can_be_saved(tmp_path: Path) -> None:
    flags = AdmFlags(
        image_size=8,
        num_channels=32,
        num_res_blocks=1,
        channel_mult="1,2",
        attention_resolutions="4",
        num_head_channels=8,
        use_scale_shift_norm=False,
        use_new_attention_order=True,
    )
    unet = small_unet().eval()
    save_adm(unet, tmp_path / "adm.pt")
    state = torch.load(tmp_path / "adm.pt", weights_only=True)
    assert_close(outputs(unet, flags), adm_forward(state, flags, *inputs(flags), train=False))
    assert_close(outputs(load(tmp_path / "adm.pt", flags), flags), outputs(unet, flags))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"flip_sin_to_cos": False}, "flip_sin_to_cos is False"),
        ({"freq_shift": 1}, "freq_shift is 1"),
        ({"norm_num_groups": 16}, "norm_num_groups is 16"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type is 'fourier'"),
        ({"mid_block_type": None}, "mid_block_type is None"),
        ({"resnet_time_scale_shift": "scale_shift"}, "lacks 'mid_block.attentions.0.group_norm.weight'"),
        (
            {"up_block_types": ("UpBlock2D", "UpBlock2D")},
            "lacks 'up_blocks.0.attentions.0.group_norm.weight'",
        ),
        ({"up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D")}, "has a tensor up_blocks.1.attentions.0"),
        (
            {"up_block_types": ("ResnetUpsampleBlock2D", "UpBlock2D")},
            "changes the resolution in several ways",
        ),
        ({"time_embedding_dim": 64}, "time_embedding.linear_1.weight is (64, 32)"),
    ],
)
def test_unets_without_counterpart(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"^ADM has no counterpart of this UNet: .*{re.escape(message)}"):
        save_adm(small_unet(**changes), tmp_path / "adm.pt")
    assert not (tmp_path / "adm.pt").exists()


def test_save_needs_a_unet_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="got a Linear"):
        save_adm(torch.nn.Linear(2, 2), tmp_path / "adm.pt")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="does not exist"):
        save_adm(small_unet(), tmp_path / "absent" / "adm.pt")


# Flags ------------------------------------------------------------------------------------------------------

# From the READMEs of guided-diffusion and ADM-IP and the launch script of consistency_models.
PUBLISHED = {
    "imagenet64-adm": """
        MODEL_FLAGS="--attention_resolutions 32,16,8 --class_cond True --diffusion_steps 1000
        --dropout 0.1 --image_size 64 --learn_sigma True --noise_schedule cosine --num_channels 192
        --num_head_channels 64 --num_res_blocks 3 --resblock_updown True
        --use_new_attention_order True --use_fp16 True --use_scale_shift_norm True"
        """,
    "imagenet128-adm": """
        --attention_resolutions 32,16,8 --class_cond True --diffusion_steps 1000 --image_size 128
        --learn_sigma True --noise_schedule linear --num_channels 256 --num_heads 4
        --num_res_blocks 2 --resblock_updown True --use_fp16 True --use_scale_shift_norm True
        """,
    "imagenet256-adm": """
        --attention_resolutions 32,16,8 --class_cond True --diffusion_steps 1000 --image_size 256
        --learn_sigma True --noise_schedule linear --num_channels 256 --num_head_channels 64
        --num_res_blocks 2 --resblock_updown True --use_fp16 True --use_scale_shift_norm True
        """,
    "imagenet256-adm-uncond": """
        --attention_resolutions 32,16,8 --class_cond False --diffusion_steps 1000 --image_size 256
        --learn_sigma True --noise_schedule linear --num_channels 256 --num_head_channels 64
        --num_res_blocks 2 --resblock_updown True --use_fp16 True --use_scale_shift_norm True
        """,
    "imagenet512-adm": """
        --attention_resolutions 32,16,8 --class_cond True --diffusion_steps 1000 --image_size 512
        --learn_sigma True --noise_schedule linear --num_channels 256 --num_head_channels 64
        --num_res_blocks 2 --resblock_updown True --use_fp16 False --use_scale_shift_norm True
        """,
    "lsun256-adm": """
        --attention_resolutions 32,16,8 --class_cond False --diffusion_steps 1000 --dropout 0.1
        --image_size 256 --learn_sigma True --noise_schedule linear --num_channels 256
        --num_head_channels 64 --num_res_blocks 2 --resblock_updown True --use_fp16 True
        --use_scale_shift_norm True
        """,
    "cifar10-adm": r"""
        mpiexec -n 2 python scripts/image_train.py --input_pertub 0.15 --data_dir PATH_TO_DATASET \
        --image_size 32 --use_fp16 True --num_channels 128 --num_head_channels 32 --num_res_blocks 3 \
        --attention_resolutions 16,8 --resblock_updown True --use_new_attention_order True \
        --learn_sigma True --dropout 0.3 --diffusion_steps 1000 --noise_schedule cosine \
        --use_scale_shift_norm True --rescale_learned_sigmas True \
        --schedule_sampler loss-second-moment --lr 1e-4 --batch_size 64
        """,
    # The network as distillation begins with it; the EDM model itself was trained with --dropout 0.1.
    "imagenet64-edm": """
        --attention_resolutions 32,16,8 --class_cond True --use_scale_shift_norm True --dropout 0.0
        --image_size 64 --lr 0.000008 --num_channels 192 --num_head_channels 64 --num_res_blocks 3
        --resblock_updown True --schedule_sampler uniform --use_fp16 True --weight_decay 0.0 --weight_schedule uniform
        """,
    "imagenet64-cm": """
        mpiexec -n 8 python image_sample.py --batch_size 256
        --training_mode consistency_distillation --sampler onestep --model_path /path/to/checkpoint
        --attention_resolutions 32,16,8 --class_cond True --use_scale_shift_norm True --dropout 0.0
        --image_size 64 --num_channels 192 --num_head_channels 64 --num_res_blocks 3
        --num_samples 500 --resblock_updown True --use_fp16 True --weight_schedule uniform
        """,
    "lsun256-cm": """
        --attention_resolutions 32,16,8 --class_cond False --use_scale_shift_norm False
        --dropout 0.0 --image_size 256 --num_channels 256 --num_head_channels 64 --num_res_blocks 2
        --num_samples 100 --resblock_updown True --use_fp16 True --weight_schedule uniform
        """,
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_the_published_flags(name: str) -> None:
    assert parse_flags(PUBLISHED[name]) == PRESETS[name]


@pytest.mark.parametrize(
    ("name", "millions"),
    # Tables of Dhariwal & Nichol 2021.
    [("imagenet64-adm", 296), ("imagenet128-adm", 422), ("imagenet256-adm", 554), ("imagenet512-adm", 559)],
)
def test_presets_have_the_published_size(name: str, millions: int) -> None:
    with torch.device("meta"):
        unet = build_adm(PRESETS[name])
    assert round(sum(parameter.numel() for parameter in unet.parameters()) / 1e6) == millions


def test_load_defaults_are_cifar10(tmp_path: Path) -> None:
    parameters = inspect.signature(load_adm).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items() if name != "path"}
    assert AdmFlags(**defaults) == PRESETS["cifar10-adm"]
    assert set(defaults) == set(asdict(PRESETS["cifar10-adm"]))


@given(
    st.builds(
        replace,
        st.just(TINY),
        num_res_blocks=st.integers(1, 5),
        channel_mult=st.sampled_from(["1,2", "1,2,2,2", "2,4"]),
        dropout=st.floats(0, 0.9),
        learn_sigma=st.booleans(),
        class_cond=st.booleans(),
        num_heads_upsample=st.sampled_from([-1, 2]),
    ),
    st.booleans(),
)
@settings(max_examples=50, deadline=None)
def test_parse_inverts_writing(flags: AdmFlags, equals: bool) -> None:
    given_flags = {name: value for name, value in asdict(flags).items() if value is not None}
    assert parse_flags(" ".join(f"--{n}{'=' if equals else ' '}{v}" for n, v in given_flags.items())) == flags


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no flags in ''"),
        ("image_size 64", "no flags in"),
        ("--image_sise 64", "unknown flag --image_sise"),
        ("--large_size 256 --small_size 64", "unknown flag --large_size"),
        ("--image_size", "--image_size has no value"),
        ("--class_cond --image_size 64", "--class_cond has no value"),
        ("--image_size 64 $SAMPLE_FLAGS", "expected a flag, got '$SAMPLE_FLAGS'"),
        ("--image_size big", "--image_size must be of type int, got 'big'"),
        ("--class_cond maybe", "--class_cond must be of type bool, got 'maybe'"),
        ("--dropout x", "--dropout must be of type float, got 'x'"),
        ("--image_size '64", "cannot read the flags"),
        ("--image_size 48", "channel_mult must be given for image_size=48"),
    ],
)
def test_unreadable_flags(text: str, message: str) -> None:
    with pytest.raises(InputError, match=rf"^{re.escape(message)}[^\n]*$"):
        parse_flags(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": "32"}, "image_size must be of type int"),
        ({"num_heads": True}, "num_heads must be of type int"),
        ({"learn_sigma": 1}, "learn_sigma must be of type bool"),
        ({"channel_mult": (1, 2)}, "channel_mult must be of type str"),
        ({"channel_mult": "1,x"}, "channel_mult must be numbers separated by commas"),
        ({"channel_mult": "1,inf"}, "channel_mult must be positive"),
        ({"channel_mult": "0.1,1"}, "make a level 3 wide"),
        ({"num_channels": 40}, "num_channels=40"),
        ({"attention_resolutions": "8;4"}, "attention_resolutions must be numbers"),
        ({"attention_resolutions": "8,0"}, "attention_resolutions must be positive"),
        ({"num_res_blocks": 0}, "num_res_blocks must be at least 1"),
        ({"num_head_channels": 0}, "num_head_channels must be at least 1, or -1"),
        ({"num_head_channels": 24}, "num_head_channels=24 does not divide the width 32"),
        ({"num_head_channels": -1, "num_heads": 3}, "num_heads=3 does not divide the width 32"),
        (
            {"num_head_channels": -1, "num_heads_upsample": 3},
            "num_heads_upsample=3 does not divide the width 32",
        ),
        ({"dropout": 1.0}, "dropout must be in [0, 1)"),
        ({"num_classes": 10}, "num_classes=10 needs class_cond=True"),
        ({"num_classes": 0, "class_cond": True}, "num_classes must be at least 1"),
    ],
)
def test_impossible_flags(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        replace(TINY, **changes)
