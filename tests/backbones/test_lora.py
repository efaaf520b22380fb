"""LoRA: what it computes, which layers it adapts, its files as diffusers and others read them, and what is refused."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, StableDiffusionPipeline
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from robustdiff.backbones.lora import (
    RECORD,
    WEIGHTS,
    Adapter,
    LoraSection,
    adapter_of,
    inject,
    read_weights_into,
    save_adapter,
    save_kohya,
)
from robustdiff.backbones.model import Model, load_model
from robustdiff.errors import InputError
from robustdiff.objectives.denoising import DenoisingObjective
from robustdiff.perturbation import FreeAdversary

pytest.importorskip("peft")

LORA = LoraSection(rank=2, alpha=6.0)


def draw_adapter(network: nn.Module, seed: int = 1) -> None:
    """Set B, which is zero before training, to random numbers."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in adapter_of(network.state_dict()).items():
            if ".lora_B." in name:
                value.normal_(generator=generator)


@pytest.fixture
def base(make_unet: Any, tmp_path: Path) -> Path:
    Model.of(make_unet(), DDPMScheduler(variance_type="fixed_large")).save(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapted(base: Path, tmp_path: Path) -> Path:
    """The folder of an adapter that changes the outputs."""
    model = load_model(base)
    model.add_lora(LORA, seed=0)
    draw_adapter(model.network)
    (tmp_path / "adapted").mkdir()
    model.save(tmp_path / "adapted")
    return tmp_path / "adapted"


def output(model: Any) -> Tensor:
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        result: Tensor = model(x, torch.tensor([3, 500])).sample
    return result


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(InputError) as error:
        load_model(folder)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value), str(error.value)


def edit(folder: Path, **fields: Any) -> None:
    path = folder / RECORD
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


# -- what it computes -----------------------------------------------------------------------------------------


def assert_same(first, second):
    """Assert equality up to the last bits, in which some CPUs differ where a weight has no gradient."""
    torch.testing.assert_close(first, second, rtol=0, atol=1e-6)


def test_a_new_adapter_changes_nothing_and_depends_on_the_seed_alone(base):
    states = []
    for before, seed in ((1, 0), (2, 0), (3, 5)):
        model = load_model(base)
        torch.manual_seed(before)
        model.add_lora(LORA, seed)
        assert torch.equal(torch.randn(3), torch.randn(3, generator=torch.Generator().manual_seed(before)))
        assert_same(output(model), output(load_model(base)))
        states.append(adapter_of(model.network.state_dict()))
    first, same, other = states
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_the_update_of_a_weight_is_alpha_over_rank_b_a(adapted, base):
    network, state = load_model(base).network, load_file(adapted / WEIGHTS)
    for layer in ("to_q", "to_k", "to_v", "to_out.0"):
        name = f"mid_block.attentions.0.{layer}"
        update = state[f"unet.{name}.lora_B.weight"] @ state[f"unet.{name}.lora_A.weight"]
        network.get_submodule(name).weight.data += 6.0 / 2 * update
    assert len(state) == 8
    torch.testing.assert_close(output(load_model(adapted)), output(network), rtol=0, atol=1e-5)


def test_only_the_adapter_has_gradients_and_delta_has_one_through_the_frozen_weights(base):
    model = load_model(base)
    model.add_lora(LORA, seed=0)
    draw_adapter(model.network)
    network = model.network.double()
    objective = DenoisingObjective(model.process, "sample")  # whose target does not depend on δ
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(2, 1, 8, 8, generator=generator, dtype=torch.float64)
    draw = objective.draw(x0, t=torch.tensor([10, 600]), generator=generator)
    deltas = []
    for delta in FreeAdversary(steps=3, step_size=0.5)(draw.x_t):
        objective(network, draw, delta)["loss"].mean().backward()
        deltas.append((delta.detach().clone(), None if delta.grad is None else delta.grad.clone()))
    assert not deltas[0][0].any()
    assert all(delta.flatten(1).norm(dim=1).min() > 0.1 for delta, _ in deltas[1:])
    assert {name for name, p in network.named_parameters() if p.grad is not None} == set(
        adapter_of(network.state_dict())
    )
    for delta, gradient in deltas[:2]:
        direction = torch.randn(delta.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            high, low = (objective(network, draw, delta + h * direction)["loss"].mean() for h in (1e-5, -1e-5))
        assert float((gradient * direction).sum()) == pytest.approx(float(high - low) / 2e-5, rel=1e-5)


def test_the_base_is_there_within_a_block(adapted, base):
    model = load_model(adapted)
    names = {name for name, p in model.network.named_parameters() if p.requires_grad}
    frozen = next(p for name, p in model.network.named_parameters() if "lora_A" in name)
    frozen.requires_grad_(False)
    before, plain = output(model), output(load_model(base))
    assert not torch.equal(before, plain)
    with model.base():
        assert_same(output(model), plain)
    assert torch.equal(output(model), before)
    assert not frozen.requires_grad
    assert sum(p.requires_grad for p in model.network.parameters()) == len(names) - 1
    with load_model(base).base():
        pass


def test_merged_weights_give_the_same_outputs_as_a_network_without_an_adapter(adapted, tmp_path):
    model = load_model(adapted)
    before = output(model)
    model.merge()
    model.save(tmp_path / "merged")
    assert model.adapter is None
    assert all(p.requires_grad for p in model.network.parameters())
    torch.testing.assert_close(output(model), before, rtol=0, atol=1e-5)
    theirs = DDPMPipeline.from_pretrained(tmp_path / "merged").unet
    assert torch.equal(output(theirs), output(model))


# -- which layers ---------------------------------------------------------------------------------------------


def test_targets_are_ends_of_names(make_unet):
    network = make_unet()
    lora = inject(network, LoraSection(rank=1, targets=("conv1", "to_out.0")), "model", seed=0)
    assert lora.targets == ("conv1", "to_out.0")
    layers = {name.split(".lora_")[0] for name in adapter_of(network.state_dict())}
    assert layers == {name for name, _ in make_unet().named_modules() if name.endswith((".conv1", ".to_out.0"))}


@pytest.mark.parametrize(
    ("changes", "targets", "words"),
    [
        ({}, ("to_q", "to_z"), ("no module to_z", "to_q, to_k, to_v")),
        ({}, ("o_q",), ("no module o_q",)),
        ({}, ("attentions.0",), ("attentions.0", "is a Attention", "linear layers")),
        ({}, ("group_norm",), ("group_norm", "is a GroupNorm")),
        ({"add_attention": False}, None, ("no projections of attention", "model.lora.targets", "conv1")),
        ({}, ("bad\nname",), ("control characters",)),
    ],
)
def test_targets_that_are_no_layers_are_refused(make_unet, changes, targets, words):
    with pytest.raises(ValueError, match=words[0]) as error:
        inject(make_unet(**changes), LoraSection(targets=targets), "model", seed=0)
    for word in words:
        assert word in str(error.value)


def test_without_peft_the_remedy_is_said(make_unet, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match="a LoRA needs peft: install the extra lora"):
        inject(make_unet(), LORA, "model", seed=0)


# -- files ----------------------------------------------------------------------------------------------------


def test_a_saved_adapter_is_loaded_on_its_base(adapted, base):
    model = load_model(adapted)
    again = load_model(base)
    again.add_lora(LORA, seed=3)
    draw_adapter(again.network)
    own = adapter_of(model.network.state_dict())
    assert model.scheduler.config.variance_type == "fixed_large"
    assert not model.network.training
    assert model.adapter.lora.alpha == 6.0
    assert {p.name for p in adapted.iterdir()} == {RECORD, WEIGHTS, "scheduler"}
    assert all(torch.equal(own[k], v) for k, v in adapter_of(again.network.state_dict()).items() if "lora_B" in k)


def test_an_adapter_of_other_weights_or_of_none_is_refused(adapted, base, tmp_path, make_unet):
    shutil.move(base, tmp_path / "moved")
    refused(adapted, str(base), "not there", RECORD)
    edit(adapted, base=str(tmp_path / "moved"))
    load_model(adapted)
    other = make_unet()
    next(other.parameters()).data[0] += 1e-3
    Model.of(other, DDPMScheduler()).save(tmp_path / "moved")
    refused(adapted, "other weights", "moved", RECORD)
    edit(adapted, base=str(adapted))
    refused(adapted, "a LoRA itself", RECORD)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"fingerprint": "0"}, "fingerprint"),
        ({"lora": {"rank": 10**9}}, "lora.rank"),
        ({"lora": {"rank": 2, "targets": ["nowhere"]}}, "nowhere"),
        ({"lora": {"rank": 3, "alpha": 6, "targets": ["to_q", "to_k", "to_v", "to_out.0"]}}, "shape"),
        ({"lora": {"rank": 2, "targets": ["to_q"]}}, "has besides"),
        ({"scheduler": "os.system"}, "scheduler"),
        ({"more": 1}, "more"),
        ({"size": [8]}, "size"),
    ],
)
def test_a_record_that_is_not_of_the_weights_is_refused(adapted, fields, word):
    edit(adapted, **fields)
    refused(adapted, word)


def test_weights_that_are_not_finite_or_missing_are_refused(adapted):
    state = load_file(adapted / WEIGHTS)
    name = sorted(state)[0]
    save_file({**state, name: state[name] * float("nan")}, adapted / WEIGHTS)
    refused(adapted, "not finite")
    save_file({k: v for k, v in state.items() if k != name}, adapted / WEIGHTS)
    refused(adapted, "lacks", name)
    (adapted / WEIGHTS).unlink()
    refused(adapted, "no such file")


def test_the_size_and_the_null_class_of_a_training_are_kept(tmp_path, make_unet):
    network = make_unet(num_class_embeds=4, sample_size=None)
    Model.of(network, DDPMScheduler()).save(tmp_path / "base")
    model = load_model(tmp_path / "base")
    model.check_shape((1, 8, 16))
    model.backbone.note_classes(3)
    model.add_lora(LORA, seed=0)
    (tmp_path / "adapted").mkdir()
    model.save(tmp_path / "adapted")
    loaded = load_model(tmp_path / "adapted")
    assert loaded.shape == (1, 8, 16)
    assert loaded.condition.droppable
    assert loaded.condition.classes == 3


# -- the files of the original --------------------------------------------------------------------------------


@pytest.fixture
def lcm(golden: Path, tmp_path: Path) -> SimpleNamespace:
    """The teacher of the golden data, the adapter in it by our path, and the calls of the script."""
    folder = golden / "lcm"
    config = json.loads((folder / "config.json").read_text())["lora"]
    state = load_file(folder / "lora" / "adapter_model.safetensors")
    path = tmp_path / "given.safetensors"
    save_file({name.replace("base_model.model.", "unet."): value for name, value in state.items()}, path)
    given = LoraSection(rank=config["rank"], alpha=config["alpha"], targets=tuple(config["target_modules"]))
    network = UNet2DConditionModel.from_pretrained(folder / "teacher")
    lora = inject(network, given, "teacher")
    read_weights_into(network, "unet", path)
    inputs, expected = np.load(folder / "lcd.npz"), np.load(folder / "lora.npz")

    def call(unet: Any) -> Tensor:
        x, t, text = (inputs[n] for n in ("N50_noisy_latents", "N50_start_timesteps", "prompt_embeds"))
        with torch.no_grad():
            result: Tensor = unet(
                torch.from_numpy(x), torch.from_numpy(t), encoder_hidden_states=torch.from_numpy(text)
            ).sample
        return result

    adapter = Adapter(base="teacher", fingerprint="0" * 64, lora=lora, scheduler="DDPMScheduler")
    return SimpleNamespace(
        folder=folder, network=network.eval(), adapter=adapter, call=call, output=expected["student_output"]
    )


def pipeline_of(folder: Path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=None,
        text_encoder=None,
        tokenizer=None,
        unet=UNet2DConditionModel.from_pretrained(folder / "teacher").eval(),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def test_the_student_of_the_original_has_its_outputs(lcm):
    np.testing.assert_allclose(lcm.call(lcm.network), lcm.output, atol=1e-5 * abs(lcm.output).max(), rtol=0)


def test_diffusers_loads_what_is_saved_with_alpha(lcm, tmp_path):
    save_adapter(tmp_path, lcm.adapter, "unet", adapter_of(lcm.network.state_dict()))
    pipe = pipeline_of(lcm.folder)
    pipe.load_lora_weights(tmp_path)
    assert torch.equal(lcm.call(pipe.unet), lcm.call(lcm.network))
    with safe_open(tmp_path / WEIGHTS, "pt") as file:
        assert json.loads(file.metadata()["lora_adapter_metadata"])["unet.lora_alpha"] == 8


def test_kohyas_format_is_the_originals(lcm, tmp_path):
    path = tmp_path / "kohya.safetensors"
    save_kohya(path, lcm.adapter, adapter_of(lcm.network.state_dict()))
    ours, theirs = load_file(path), load_file(lcm.folder / "lora" / "kohya.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    pipe = pipeline_of(lcm.folder)
    pipe.load_lora_weights(path)
    assert torch.equal(lcm.call(pipe.unet), lcm.call(lcm.network))


def test_a_run_of_a_lora_is_converted(robustdiff, adapted, base, tmp_path):
    done = robustdiff("convert", adapted, tmp_path / "whole", "--to", "pipeline")
    assert (done.code, done.err) == (0, "")
    torch.testing.assert_close(output(load_model(tmp_path / "whole")), output(load_model(adapted)), rtol=0, atol=1e-5)
    assert isinstance(DDPMPipeline.from_pretrained(tmp_path / "whole").unet, UNet2DModel)
    assert robustdiff("convert", adapted, tmp_path / "new" / "k.safetensors", "--to", "kohya").code == 0
    assert len(load_file(tmp_path / "new" / "k.safetensors")) == 12
    for arguments, word in (
        ((adapted, tmp_path / "k.pt", "--to", "kohya"), ".safetensors"),
        ((adapted, tmp_path / "whole", "--to", "pipeline"), "exists already"),
        ((base, tmp_path / "k.safetensors", "--to", "kohya"), "is no LoRA"),
        ((adapted, tmp_path / "x", "--to", "kohya", "--image_size", "8"), "no flags"),
        ((adapted, tmp_path / "x", "--to", "other"), "--to"),
    ):
        done = robustdiff("convert", *arguments)
        assert done.code == 2
        assert word in done.err
        assert done.err.count("\n") == 1
