"""Runs of LoRAs: what trains, what checkpoints and the run's model hold, resuming, processes, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from safetensors.torch import load_file

from robustdiff.backbones.lora import adapter_of
from robustdiff.backbones.model import Model, load_model
from robustdiff.data import load_dataset
from robustdiff.errors import InputError
from robustdiff.training.build import build_model
from robustdiff.training.run import train
from robustdiff.training.trainer import Trainer

pytest.importorskip("peft")


@pytest.fixture
def base(make_unet, tmp_path):
    Model.of(make_unet(), DDPMScheduler()).save(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def lora(tiny, base):
    """lora(name, {"rank": 2, …}, field=…): the recipe of a LoRA of the base."""

    def recipe(output="run", settings=None, **fields):
        given = {"rank": 2, "alpha": 6, **(settings or {})}
        model = {"name": "pretrained", "path": str(base), "lora": given}
        return tiny(output, **{"lr": 1e-2, "adversary": "free", "checkpoint_every": 3, "model": model, **fields})

    return recipe


def trainer_of(recipe):
    dataset = load_dataset("digits")
    accelerator = Accelerator(cpu=True, mixed_precision="no" if recipe.precision == "fp32" else recipe.precision)
    return Trainer(recipe, accelerator, dataset, build_model(recipe, dataset))


def held(recipe):
    """All tensors that a finished run has, by file and name."""
    folder = Path(recipe.output)
    files = [
        *max((folder / "checkpoints").glob("step-*")).glob("[meot]*.safetensors"),
        *folder.glob("model/*.safetensors"),
    ]
    return {f"{file.name}/{name}": value for file in files for name, value in load_file(file).items()}


def output(model):
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        return model(x, torch.tensor([3, 500])).sample


def assert_close(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def assert_same(first, second):
    """Assert equality up to the last bits, in which some CPUs differ where a weight has no gradient."""
    torch.testing.assert_close(first, second, rtol=0, atol=1e-6)


def test_a_run_holds_the_adapter_alone_and_its_model_is_the_base_with_it(lora, base):
    recipe = lora(ema=0.5)
    result = train(recipe, cpu=True)
    folder = Path(recipe.output)
    weights = 4 * 2 * (8 + 8)  # four projections of eight channels, with the rank 2
    assert result["parameters"] == weights
    checkpoint = max((folder / "checkpoints").glob("step-*"))
    names = {
        f"mid_block.attentions.0.{k}.lora_{m}.default.weight"
        for k in ("to_q", "to_k", "to_v", "to_out.0")
        for m in "AB"
    }
    for part, moments in (("model", [""]), ("ema", [""]), ("optimizer", ["/step", "/exp_avg", "/exp_avg_sq"])):
        assert load_file(checkpoint / f"{part}.safetensors").keys() == {n + m for n in names for m in moments}
    assert {p.name for p in (folder / "model").iterdir()} == {
        "adapter.json", "pytorch_lora_weights.safetensors", "scheduler",
    }  # fmt: skip
    exported, average = (
        load_file(folder / "model/pytorch_lora_weights.safetensors"),
        load_file(checkpoint / "ema.safetensors"),
    )
    assert all(torch.equal(exported[f"unet.{n.replace('.default', '')}"], average[n]) for n in names)
    model, plain = load_model(folder), load_model(base)
    assert (output(model) - output(plain)).abs().max() > 1e-3
    with model.base():
        assert_same(output(model), output(plain))


def test_the_first_update_starts_at_the_base_and_delta_moves(lora, base):
    trainer = trainer_of(lora())
    before = output(load_model(base))
    assert_same(output(trainer.built.model), before)
    frozen = {n: p.clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}
    sizes = [float(size) for _, size, _ in trainer.updates()]
    assert sizes[0] == 0
    assert min(sizes[1:3]) > 0.05
    assert all(p.grad is None for p in trainer.model.parameters())
    assert all(torch.equal(dict(trainer.model.named_parameters())[n], p) for n, p in frozen.items())
    with trainer.built.model.base():
        assert_same(output(trainer.built.model), before)


@pytest.mark.parametrize(
    "fields",
    [
        {"clip": 0.1, "ema": 0},
        {"settings": {"dropout": 0.3}, "precision": "bf16", "accumulate": 2},
        {"objective": {"name": "consistency", "schedule": "fixed", "scales": 8}, "adversary": "none"},
    ],
    ids=["clip", "dropout-bf16-accumulate", "consistency"],
)
def test_resuming_is_bit_for_bit_the_run_in_one_go(lora, fields):
    whole, cut = lora("whole", steps=9, **fields), lora("cut", steps=9, **fields)
    train(whole, cpu=True)
    train(cut.model_copy(update={"steps": 6}), cpu=True)
    train(cut, cpu=True, resume=True)
    first, second = held(whole), held(cut)
    assert first.keys() == second.keys()
    assert not [name for name in first if not torch.equal(first[name], second[name])]


def test_a_target_network_shares_the_base_and_follows_the_adapter(lora):
    recipe = lora(objective={"name": "consistency"}, adversary="none", steps=3)
    trainer = trainer_of(recipe)
    student, target = dict(trainer.model.named_parameters()), dict(trainer.target.named_parameters())
    for name, parameter in student.items():
        assert (target[name] is parameter) == (not parameter.requires_grad)
    assert trainer.tensors()["target"].keys() == adapter_of(student).keys()
    list(trainer.updates())
    assert any(target[name].any() for name in target if "lora_B" in name)


def test_with_low_precision_the_base_is_held_in_it(lora):
    trainer = trainer_of(lora(precision="bf16"))
    network = trainer.model
    for i, (name, parameter) in enumerate(network.named_parameters()):
        layer = network.get_submodule(name.rpartition(".")[0])
        held = i > 0 and "lora_" not in name and isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)
        assert parameter.dtype == (torch.bfloat16 if held else torch.float32), name
    list(trainer.updates())
    assert all(value.dtype == torch.float32 for value in trainer.tensors()["model"].values())


def test_microbatches_train_to_the_same_adapter(lora):
    one, parts = lora("one", batch_size=16), lora("parts", batch_size=16, accumulate=2)
    train(one, cpu=True)
    train(parts, cpu=True)
    assert_close(held(one), held(parts))


def test_resuming_on_other_weights_of_the_base_is_refused(lora, base, make_unet):
    recipe = lora(steps=3)
    train(recipe, cpu=True)
    other = make_unet()
    next(other.parameters()).data[0] += 1e-3
    Model.of(other, DDPMScheduler()).save(base)
    with pytest.raises(InputError, match=r"other weights than .*base has now: restore them"):
        train(recipe.model_copy(update={"steps": 6}), cpu=True, resume=True)


def test_a_run_is_trained_whole_from_a_lora_and_no_lora_on_top(lora, tiny):
    recipe = lora(steps=3)
    train(recipe, cpu=True)
    whole = tiny("whole", model={"name": "pretrained", "path": recipe.output}, lr=1e-9, steps=1, ema=0)
    assert train(whole, cpu=True)["parameters"] > 1000
    torch.testing.assert_close(output(load_model(whole.output)), output(load_model(recipe.output)), rtol=0, atol=1e-5)
    more = {"name": "pretrained", "path": recipe.output, "lora": {}}
    with pytest.raises(InputError, match=r"is a LoRA already.*convert .* FOLDER --to pipeline"):
        train(tiny("more", model=more), cpu=True)


def test_commands_take_the_run_of_a_lora(robustdiff, base, tmp_path):
    settings = [
        f"model={{name: pretrained, path: {base}}}",
        "model.lora.rank=2",
        "steps=3",
        "batch_size=8",
        "threads=1",
    ]
    overrides = [argument for one in settings for argument in ("--set", one)]
    run = tmp_path / "run"
    done = robustdiff("train", "digits", *overrides, "--set", f"output={run}", "--cpu")
    assert (done.code, done.err) == (0, ""), done.err
    assert robustdiff("train", "digits", *overrides, "--set", f"output={run}", "--cpu", "--resume").code == 0
    done = robustdiff("sample", run, "--num", 2, "--steps", 2, "--output", tmp_path / "s.npz", "--cpu")
    assert done.code == 0, done.err
    done = robustdiff("train", "digits", "--set", "model.lora.rank=2", "--set", f"output={tmp_path / 'new'}", "--cpu")
    assert done.code == 2
    assert "model.lora: a LoRA adapts a pretrained model" in done.err
    done = robustdiff("train", "digits", *overrides, "--set", "model.lora.targets=[nowhere]", "--cpu",
                      "--set", f"output={tmp_path / 'new'}")  # fmt: skip
    assert done.code == 2
    assert "no module nowhere" in done.err
    assert done.err.count("\n") == 1
    for setting, word in (("lora=4", "model.lora.rank=16"), ("lora.targets=to_q", "a list"), ("lora.rank=0", "rank")):
        done = robustdiff("train", "digits", *overrides, "--set", f"model.{setting}", "--cpu")
        assert done.code == 2
        assert word in done.err
    done = robustdiff("evaluate", run, "--metrics", "brightness", "--num", 8, "--steps", 2, "--cpu")
    assert done.code == 0, done.err
