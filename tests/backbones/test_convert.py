"""Conversion through the command line: what comes back is bit for bit what went in."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from diffusers import ConsistencyModelPipeline, DDPMPipeline
from safetensors.torch import save_file

from robustdiff.backbones.adm import AdmFlags, build_adm, load_adm, save_adm
from robustdiff.backbones.adm.convert import read_flags
from robustdiff.backbones.model import load_model
from robustdiff.errors import InputError
from robustdiff.objectives.preconditioning import Preconditioned
from robustdiff.process import DiffusionProcess

FLAGS = {
    "image_size": 16,
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": "1,2",
    "attention_resolutions": "8",
    "num_head_channels": 32,
    "resblock_updown": True,
    "learn_sigma": True,
}
TEXT = " ".join(f"--{name} {value}" for name, value in FLAGS.items())


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    unet = build_adm(AdmFlags(**FLAGS))
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    save_adm(unet, tmp_path / "model.pt")
    return tmp_path / "model.pt"


def assert_same_file(a: Path, b: Path) -> None:
    one, other = torch.load(a, weights_only=True), torch.load(b, weights_only=True)
    assert list(one) == list(other)
    for name, value in one.items():
        assert value.dtype == other[name].dtype
        assert torch.equal(value, other[name])


@pytest.mark.parametrize("given", ["words", "pasted"])
def test_there_and_back(robustdiff, checkpoint, tmp_path, given):
    text = f"{TEXT} --noise_schedule cosine --diffusion_steps 1000"
    flags = text.split() if given == "words" else ["--flags", f'MODEL_FLAGS="{text}"']
    outcome = robustdiff("convert", checkpoint, tmp_path / "pipeline", *flags)
    assert outcome.code == 0, outcome.err
    assert DDPMPipeline.from_pretrained(tmp_path / "pipeline").unet.config.sample_size == 16
    loaded = load_model(tmp_path / "pipeline")
    assert loaded.kind.objective().variance == "learned_range"
    torch.testing.assert_close(loaded.process.alphas, DiffusionProcess.cosine().alphas, rtol=1e-3, atol=1e-6)
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([3, 800])
    with torch.no_grad():
        assert torch.equal(loaded.network(x, t).sample, load_adm(checkpoint, **asdict(AdmFlags(**FLAGS)))(x, t).sample)
    assert robustdiff("convert", tmp_path / "pipeline", tmp_path / "back.pt").code == 0
    assert_same_file(checkpoint, tmp_path / "back.pt")


def test_a_converted_checkpoint_can_be_sampled(robustdiff, checkpoint, tmp_path):
    assert robustdiff("convert", checkpoint, tmp_path / "p", *TEXT.split()).code == 0
    for sampler in ("iddpm", "es", "time-shift", "dpm++"):
        arguments = ["--num", 2, "--steps", 3, "--sampler", sampler, "--output", tmp_path / f"{sampler}.npz"]
        outcome = robustdiff("sample", tmp_path / "p", *arguments)
        assert outcome.code == 0, outcome.err


def test_a_consistency_model_becomes_its_own_pipeline(robustdiff, tmp_path):
    flags = {**FLAGS, "learn_sigma": False, "use_new_attention_order": True}
    torch.manual_seed(0)
    save_adm(build_adm(AdmFlags(**flags)), tmp_path / "cm.pt")
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    words += ["--training_mode", "consistency_distillation"]
    outcome = robustdiff("convert", tmp_path / "cm.pt", tmp_path / "cm", *words)
    assert outcome.code == 0, outcome.err
    pipeline = ConsistencyModelPipeline.from_pretrained(tmp_path / "cm")
    assert pipeline(num_inference_steps=1, output_type="np").images.shape == (1, 16, 16, 3)


def test_a_denoiser_over_levels_becomes_a_teacher(robustdiff, tmp_path):
    flags = {**FLAGS, "learn_sigma": False, "use_new_attention_order": True}
    torch.manual_seed(0)
    save_adm(build_adm(AdmFlags(**flags)), tmp_path / "edm.pt")
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    outcome = robustdiff("convert", tmp_path / "edm.pt", tmp_path / "edm", *words, "--training_mode", "edm")
    assert outcome.code == 0, outcome.err
    loaded = load_model(tmp_path / "edm")
    assert isinstance(loaded.denoiser(), Preconditioned)
    assert loaded.kind.objective().name == "edm"
    outcome = robustdiff("convert", tmp_path / "edm", tmp_path / "back.pt")
    assert outcome.code == 0, outcome.err
    assert_same_file(tmp_path / "edm.pt", tmp_path / "back.pt")


WRAPPED = {
    "module": lambda state: {f"module.{name}": value for name, value in state.items()},
    "compiled": lambda state: {f"_orig_mod.{name}": value for name, value in state.items()},
    "both": lambda state: {f"module._orig_mod.{name}": value for name, value in state.items()},
    "lightning": lambda state: {"state_dict": {f"model.{name}": value for name, value in state.items()}, "epoch": 3},
    "ema": lambda state: {"model": {name: value + 1 for name, value in state.items()}, "ema": state, "opt": {}},
    "half": lambda state: {name: value.half() for name, value in state.items()},
}


@pytest.mark.parametrize("wrap", WRAPPED)
def test_checkpoints_of_training_scripts_are_opened(robustdiff, checkpoint, tmp_path, caplog, wrap):
    state = torch.load(checkpoint, weights_only=True)
    torch.save(WRAPPED[wrap](state), tmp_path / "wrapped.pt")
    outcome = robustdiff("convert", tmp_path / "wrapped.pt", tmp_path / "pipeline", *TEXT.split())
    assert outcome.code == 0, outcome.err
    assert [m.endswith("holds model and ema: read ema, the moving average") for m in caplog.messages] == (
        [True] if wrap == "ema" else []
    )
    assert robustdiff("convert", tmp_path / "pipeline", tmp_path / "back.pt").code == 0
    if wrap == "half":
        torch.save(WRAPPED["half"](state), checkpoint)
    assert_same_file(checkpoint, tmp_path / "back.pt")


def test_safetensors_are_converted(robustdiff, checkpoint, tmp_path):
    save_file(torch.load(checkpoint, weights_only=True), tmp_path / "model.safetensors")
    assert robustdiff("convert", tmp_path / "model.safetensors", tmp_path / "pipeline", *TEXT.split()).code == 0
    assert robustdiff("convert", tmp_path / "pipeline", tmp_path / "back.pt").code == 0
    assert_same_file(checkpoint, tmp_path / "back.pt")


class Evil:
    def __reduce__(self):
        return os.system, ("touch ran",)


@pytest.mark.parametrize("damage", ["optimiser", "module", "code", "nan", "integer", "half", "empty", "list", "shadow"])
def test_what_is_no_checkpoint_is_one_line_and_leaves_nothing(robustdiff, checkpoint, tmp_path, monkeypatch, damage):
    monkeypatch.chdir(tmp_path)
    state = torch.load(checkpoint, weights_only=True)
    whole = checkpoint.read_bytes()
    layer = torch.nn.Linear(2, 2)
    held = {
        "optimiser": torch.optim.AdamW(layer.parameters()).state_dict(),
        "module": layer,
        "code": {"a": Evil()},
        "nan": {**state, "out.2.weight": state["out.2.weight"] * torch.nan},
        "integer": {**state, "num_batches": torch.tensor(3)},
        "list": list(state.values()),
        "shadow": {"model": state, "ema": {"shadow_params": list(state.values())}},
    }
    if damage in held:
        torch.save(held[damage], checkpoint)
    else:
        checkpoint.write_bytes({"half": whole[: len(whole) // 2], "empty": b""}[damage])
    outcome = robustdiff("convert", checkpoint, "out", *TEXT.split())
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    assert "model.pt" in outcome.err
    assert "weights_only" not in outcome.err
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt"]


@pytest.mark.parametrize("recorded", [3, {"dtypes": {"*": "save"}}, {"dtypes": []}, {"qkv_dims": "1"}])
def test_a_damaged_record_of_the_way_back_is_named(robustdiff, checkpoint, tmp_path, recorded):
    assert robustdiff("convert", checkpoint, tmp_path / "p", *TEXT.split()).code == 0
    config = tmp_path / "p" / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "_adm": recorded}))
    outcome = robustdiff("convert", tmp_path / "p", tmp_path / "back.pt")
    assert outcome.code == 2
    assert "_adm" in outcome.err
    assert not (tmp_path / "back.pt").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["--preset"]),
        (["--preset", "cifar10"], ["cifar10", "cifar10-adm"]),
        (["--preset", "cifar10-adm", "--image_size", "64"], ["either"]),
        (["--imagesize", "64"], ["--imagesize"]),
        (TEXT.replace("--learn_sigma True", "").split(), ["out.2", "learn_sigma"]),
        ([*TEXT.split(), "--noise_schedule", "sigmoid"], ["sigmoid"]),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(robustdiff, checkpoint, tmp_path, arguments, words):
    outcome = robustdiff("convert", checkpoint, tmp_path / "out", *arguments)
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    for word in words:
        assert word in outcome.err
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt"]


def test_nothing_is_overwritten(robustdiff, checkpoint, tmp_path):
    outcome = robustdiff("convert", checkpoint, checkpoint, *TEXT.split())
    assert outcome.code == 2
    assert "exists" in outcome.err
    assert "does not exist" in robustdiff("convert", tmp_path / "no.pt", tmp_path / "o", "--preset", "cifar10-adm").err


@pytest.mark.parametrize(
    ("preset", "schedule"),
    [
        ("cifar10-adm", "cosine"),
        ("imagenet64-adm", "cosine"),
        ("imagenet256-adm", "linear"),
        ("imagenet64-cm", "consistency"),
        ("imagenet64-edm", "edm"),
    ],
)
def test_presets_know_their_schedule(preset, schedule):
    assert read_flags(preset, "")[1] == schedule


@pytest.mark.parametrize(
    ("flags", "schedule"),
    [
        ("--noise_schedule=cosine", "cosine"),
        ("--noise_schedule  cosine", "cosine"),
        ("--noise_schedule 'cosine'", "cosine"),
        ("--noise_schedule linear", "linear"),
        ("", "linear"),
        ("--training_mode  edm --weight_schedule karras", "edm"),
        ("--training_mode=consistency_distillation", "consistency"),
    ],
)
def test_flags_say_the_schedule(flags, schedule):
    assert read_flags(None, f"{TEXT} {flags}")[1] == schedule


def test_flags_and_preset_exclude_each_other():
    with pytest.raises(InputError, match="either"):
        read_flags("cifar10-adm", TEXT)
