"""Every recipe that ships its data trains, is saved, resumed and exported; in every precision and memory format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from robustdiff.distributed import make_accelerator
from robustdiff.errors import InputError
from robustdiff.evaluation.generate import Generator
from robustdiff.training import run as module
from robustdiff.training.run import train

RECIPES = {
    "digits": ["adversary.radius=1.0"],
    "fashion-16": [],
    "fashion-16-at": ["adversary.radius=1.0"],
    "fashion-16-edm": [],
    "fashion-16-consistency": ["adversary.radius=1.0"],
    "fashion-16-dit": ["codec.cache=false", "adversary=free", "adversary.radius={eta: 0.1}"],
}
SECOND_MOMENT = ["objective.timesteps=loss-second-moment", "process.name=cosine", "process.T=2", "sampler.steps=2"]


def different(first, second):
    assert first.keys() == second.keys()
    return [name for name, value in first.items() if not torch.equal(value, second[name])]


def losses(recipe):
    return [json.loads(line)["loss"] for line in (Path(recipe.output) / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains_and_resumes_bit_for_bit(device, exact, recipe, train_cut, learned, name):
    whole, cut = (recipe(name, output, *RECIPES[name]) for output in ("whole", "cut"))
    assert train(whole, cpu=device == "cpu")["device"] == device
    train_cut(cut)
    assert different(learned(whole), learned(cut)) == []
    assert losses(whole) == losses(cut)


@pytest.mark.parametrize(
    "overrides",
    [
        ["channels_last=true"],
        ["channels_last=true", "objective.variance=learned_range", *SECOND_MOMENT],
        ["channels_last=false", "model.dropout=0.3", "accumulate=2", "adversary=pgd"],
        [
            "channels_last=true",
            "objective.name=consistency",
            "sampler=multistep",
            "sampler.steps=2",
            "model.dropout=0.3",
            "clip=1.0",
        ],
    ],
    ids=["channels last", "second moment", "pgd", "consistency"],
)
def test_a_memory_format_is_resumed_bit_for_bit(device, exact, recipe, train_cut, learned, overrides):
    if "objective.name=consistency" in overrides:
        overrides = ["process=null", *overrides]
    whole, cut = (recipe("digits", output, *overrides) for output in ("whole", "cut"))
    train(whole, cpu=device == "cpu")
    train_cut(cut)
    assert different(learned(whole), learned(cut)) == []


@pytest.mark.parametrize("quantize", ["int8", "nf4"])
def test_a_lora_of_quantised_weights_is_resumed_bit_for_bit(device, exact, recipe, train_cut, learned, quantize):
    pytest.importorskip("peft")
    if quantize == "nf4":
        pytest.importorskip("bitsandbytes")
    model = ["model={name: pretrained, path: fashion-16}", "model.lora.rank=2", f"model.quantize={quantize}"]
    whole, cut = (recipe("fashion-16", output, *model, "precision=bf16") for output in ("whole", "cut"))
    train(whole, cpu=device == "cpu")
    train_cut(cut)
    assert different(learned(whole), learned(cut)) == []


def close(first, second):
    """Equal up to rounding, but for the biases in front of a softmax, whose gradients are rounding."""
    for name, value in first.items():
        if name.startswith("model/") and not name.endswith("to_k.bias"):
            assert (value - second[name]).abs().mean() < 1e-4, name


def test_memory_formats_and_compiled_networks_train_alike_and_resume_each_other(
    device, exact, eager, recipe, train_cut, learned
):
    settings = {
        "plain": ["channels_last=false"],
        "last": ["channels_last=true"],
        "compiled": ["channels_last=false", "compile=true"],
    }
    small = ["model.channels=[8]", "steps=4", "checkpoint_every=2", "adversary.steps=2"]
    runs = {name: recipe("digits", name, *small, *settings[name]) for name in ("plain", "last")}
    for run in runs.values():
        train(run, cpu=device == "cpu")
    for first, after in (("plain", "last"), ("last", "plain"), ("compiled", "last"), ("plain", "compiled")):
        runs[first + after] = cut = recipe("digits", first + after, *small, *settings[first])
        train_cut(cut, recipe("digits", first + after, *small, *settings[after]))
    for run in runs.values():
        close(learned(run), learned(runs["plain"]))
        assert losses(run) == pytest.approx(losses(runs["plain"]), rel=1e-3)


def test_the_fingerprint_is_of_the_numbers_alone(device, eager):
    generator = Generator.load("fashion-16")
    expected = generator.model.fingerprint()
    unet = generator.model.network.to(device, memory_format=torch.channels_last)
    assert not unet.conv_in.weight.is_contiguous() or unet.conv_in.in_channels == 1
    assert generator.model.fingerprint() == expected
    unet.compile()
    assert generator.model.fingerprint() == expected
    unet.to(torch.bfloat16)
    assert generator.model.fingerprint() != expected


MIXED = {
    "bf16": ["precision=bf16"],
    "fp16": ["precision=fp16"],
    "fp16 clipped": ["precision=fp16", "clip=1.0", "channels_last=false"],
}


@pytest.mark.parametrize("name", ["digits", "fashion-16-consistency"])
@pytest.mark.parametrize("mixed", MIXED)
def test_mixed_precision_trains_close_to_float32(device, eager, recipe, train_cut, name, mixed):
    if device == "cpu" and "fp16" in mixed:
        pytest.skip("accelerate has no fp16 on a CPU")
    full, run = recipe(name, "full"), recipe(name, "mixed", *MIXED[mixed])
    train(full, cpu=device == "cpu")
    train_cut(run)
    # The first updates in fp16 may be left out, until the scale has fallen: those losses are of other weights.
    first = 1 if "fp16" in mixed else 0
    assert losses(run)[first:] == pytest.approx(losses(full)[first:], rel=0.5 if "fp16" in mixed else 0.2)


def test_a_compiled_consistency_model_trains_in_mixed_precision(device, eager, recipe):
    settings = ["process=null", "objective.name=consistency", "model.channels=[8]", "steps=2", "adversary.steps=2"]
    settings += ["sampler=multistep", "sampler.steps=2"]
    full, run = (recipe("digits", output, *settings) for output in ("full", "compiled"))
    train(full, cpu=device == "cpu")
    run = run.model_copy(update={"precision": "bf16", "compile": True, "channels_last": True})
    train(run, cpu=device == "cpu")
    assert losses(run) == pytest.approx(losses(full), rel=0.1)


def test_fp16_on_a_cpu_is_refused(recipe):
    with pytest.raises(InputError, match="precision=fp16 is not for a CPU: set precision=bf16, fp32 or auto"):
        train(recipe("digits", "run", "precision=fp16"), cpu=True)


@pytest.fixture
def scaled(device, monkeypatch):
    """scaled(scale): trainings scale their losses, starting with this scale."""

    def start(scale):
        def accelerator(cpu, **settings):
            made = make_accelerator(cpu, **settings)
            made.scaler = torch.amp.GradScaler(device, init_scale=scale)
            return made

        monkeypatch.setattr(module, "make_accelerator", accelerator)

    return start


SCALED = {
    "digits": ["clip=null", "objective.timesteps=loss-second-moment"],
    "pgd": ["clip=null", "adversary=pgd"],
    "fashion-16-consistency": ["objective.decay=0"],
}


@pytest.mark.parametrize("name", SCALED)
def test_a_loss_scale_changes_nothing(device, exact, recipe, train_cut, learned, scaled, name):
    """Powers of two are exact, δ's direction does not depend on them, and the optimiser takes them away."""
    shipped = "digits" if name == "pgd" else name
    plain, run = (recipe(shipped, output, "ema=0", *SCALED[name]) for output in ("plain", "scaled"))
    train(plain, cpu=device == "cpu")
    scaled(2.0**10)
    train_cut(run)
    assert different(learned(plain), learned(run)) == []
    assert losses(plain) == losses(run)


def test_a_watched_run_is_bit_for_bit_the_same_run(device, exact, recipe, learned):
    own = ["steps=6", "ema=0.5", "adversary.radius=1.0"]
    plain = recipe("fashion-16-at", "plain", *own)
    watched = recipe("fashion-16-at", "watched", *own, "watch={steps: [2], num: 40, every: 3}")
    train(plain, cpu=device == "cpu")
    assert train(watched, cpu=device == "cpu")["best"]["seed"] == 1
    assert different(learned(plain), learned(watched)) == []
    assert losses(plain) == losses(watched)


def test_updates_whose_gradient_overflows_move_nothing_and_are_counted(device, recipe, train_cut, scaled):
    scaled(2.0**127)
    run = recipe("fashion-16-consistency", "run", "checkpoint_every=1", "keep=20", "steps=12", "adversary.steps=1")
    train_cut(run)
    folder = Path(run.output)
    skipped = [json.loads(line)["skipped_updates"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert skipped[0] == 1  # no gradient is below 1 / 2¹²⁷ of the largest float
    assert skipped[-1] < 12
    assert json.loads((folder / "result.json").read_text())["skipped_updates"] == skipped[-1]
    before = None
    for step, count in enumerate(skipped, start=1):
        checkpoint = folder / f"checkpoints/step-{step:08d}"
        now = {part: load_file(checkpoint / f"{part}.safetensors") for part in ("model", "target", "ema", "optimizer")}
        if before is not None:
            for name, tensors in now.items():
                moved = any(not torch.equal(value, before[1][name][key]) for key, value in tensors.items())
                assert moved == (count == before[0]), (step, name)
        before = count, now
