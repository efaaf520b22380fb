"""LoRAs on base weights of 8 or 4 bits: what a run holds, resuming, its model on the whole weights, and refusals."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file

from robustdiff.backbones.model import load_model
from robustdiff.recipe import Recipe
from robustdiff.training.build import build_model
from robustdiff.training.run import train
from robustdiff.training.trainer import Trainer

pytest.importorskip("peft")
pytest.importorskip("transformers")

needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
NF4 = pytest.param("nf4", marks=needs_bitsandbytes)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    lines = []
    for i in range(4):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (8, 8, 3), np.uint8)).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": "a red shoe" if i % 2 else "blue"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory, make_sd_pipeline: Any, make_flux_pipeline: Any) -> Any:
    folder = tmp_path_factory.mktemp("bases")
    return {
        "flux": make_flux_pipeline(folder / "flux", attention_head_dim=32, axes_dims_rope=(8, 12, 12)),
        "sd": make_sd_pipeline(folder / "sd", block_out_channels=(64, 64), attention_head_dim=32),
    }


@pytest.fixture
def recipe(bases: Any, photos: Path, tmp_path: Path) -> Any:
    """recipe(output, kind, quantize, field=…): a LoRA of a base of a kind."""

    def make(output: str, kind: str, quantize: str | None, **fields: Any) -> Recipe:
        model = {"name": "pretrained", "path": str(bases[kind]), "lora": {"rank": 2, "alpha": 8}, "quantize": quantize}
        values = {
            "data": {"name": "imagefolder", "root": str(photos), "size": 8, "channels": 3},
            "model": model,
            "adversary": {"name": "free", "step_size": 0.5},
            "output": str(tmp_path / output),
            "steps": 3,
            "batch_size": 4,
            "lr": 0.05,
            "ema": 0.5,
            "checkpoint_every": 3,
            "threads": 1,
        }
        return Recipe.model_validate({**values, **fields})

    return make


def trainer_of(recipe: Recipe) -> Trainer:
    dataset = recipe.data.load()
    accelerator = Accelerator(cpu=True, mixed_precision="no" if recipe.precision == "fp32" else recipe.precision)
    return Trainer(recipe, accelerator, dataset, build_model(recipe, dataset))


def tensors(run: str) -> dict[str, torch.Tensor]:
    files = [*max((Path(run) / "checkpoints").glob("step-*")).glob("*.safetensors"), *Path(run, "model").glob("*.saf*")]
    return {f"{file.name}/{name}": value for file in files for name, value in load_file(file).items()}


@pytest.mark.parametrize(("kind", "quantize"), [("sd", "int8"), pytest.param("flux", "nf4", marks=NF4.marks)])
def test_delta_moves_as_on_the_whole_weights_and_the_base_stays(recipe: Any, kind: str, quantize: str) -> None:
    """The perturbation of the first ascent points as that of the base in float32, to the accuracy of the weights."""
    deltas = {}
    for held in (None, quantize):
        trainer = trainer_of(recipe("run", kind, held))
        frozen = {n: p.clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}
        (draw,) = next(trainer.batches())
        delta = torch.zeros_like(draw.x_t, requires_grad=True)
        trainer.objective(trainer.call, draw, delta)["loss"].mean().backward()
        deltas[held] = delta.grad
        sizes = [float(size) for _, size, _ in trainer.updates()]
        assert sizes[0] == 0
        assert min(sizes[1:]) > 0.05
        own = dict(trainer.model.named_parameters())
        assert all(torch.equal(own[name], value) for name, value in frozen.items())
    alike = torch.nn.functional.cosine_similarity(deltas[None].flatten(1), deltas[quantize].flatten(1))
    assert alike.min() > (0.999 if quantize == "int8" else 0.9)
    assert not torch.equal(deltas[None], deltas[quantize])


@pytest.mark.parametrize(
    ("quantize", "fields"),
    [("int8", {"precision": "bf16", "accumulate": 2}), pytest.param("nf4", {"precision": "bf16"}, marks=NF4.marks)],
)
def test_resuming_is_bit_for_bit_the_run_in_one_go(recipe: Any, quantize: str, fields: dict[str, Any]) -> None:
    whole, cut = (recipe(name, "flux", quantize, **fields, steps=6) for name in ("whole", "cut"))
    train(whole, cpu=True)
    train(cut.model_copy(update={"steps": 3}), cpu=True)
    train(cut, cpu=True, resume=True)
    first, second = tensors(whole.output), tensors(cut.output)
    assert first.keys() == second.keys()
    assert not [name for name in first if not torch.equal(first[name], second[name])]
    held = [name for name in first if name.startswith(("model.", "ema.", "pytorch_lora_weights."))]
    assert held
    assert all(".lora_" in name for name in held)
    record = json.loads(Path(whole.output, "model", "adapter.json").read_text())
    assert record["fingerprint"] == load_model(whole.model.source).fingerprint()


@pytest.mark.parametrize(("kind", "quantize"), [("flux", "int8"), pytest.param("sd", "nf4", marks=NF4.marks)])
def test_the_model_of_a_run_is_the_adapter_on_the_whole_weights(
    recipe: Any, robustdiff: Any, tmp_path: Path, kind: str, quantize: str
) -> None:
    run = recipe("run", kind, quantize)
    train(run, cpu=True)
    model, plain = load_model(run.output), load_model(run.model.source)
    assert {parameter.dtype for parameter in model.network.parameters()} == {torch.float32}
    x = torch.randn(2, *model.shape, generator=torch.Generator().manual_seed(0))
    condition = model.condition.batch(None, ["a red shoe", "blue"], None)

    def output(network: Any) -> torch.Tensor:
        with torch.no_grad():
            out = model.backbone.bind(network.eval())(x, torch.tensor([100.0, 500.0]), **condition)
        return out if isinstance(out, torch.Tensor) else out.sample

    ours = output(model.network)
    assert (ours - output(plain.network)).abs().max() > 1e-3
    part = model.backbone.part
    pipe: Any = diffusers.DiffusionPipeline.from_pretrained(run.model.source)
    pipe.load_lora_weights(Path(run.output, "model"))
    assert torch.equal(output(getattr(pipe, part)), ours)
    done = robustdiff("convert", run.output, tmp_path / "merged", "--to", "pipeline")
    assert done.code == 0, done.err
    merged = getattr(diffusers.DiffusionPipeline.from_pretrained(tmp_path / "merged"), part)
    torch.testing.assert_close(output(merged), ours, rtol=1e-5, atol=1e-5)
    if part == "unet":
        done = robustdiff("convert", run.output, tmp_path / "kohya.safetensors", "--to", "kohya")
        assert done.code == 0, done.err
        pipe = diffusers.DiffusionPipeline.from_pretrained(run.model.source)
        pipe.load_lora_weights(tmp_path / "kohya.safetensors")
        assert torch.equal(output(pipe.unet), ours)
    done = robustdiff("sample", run.output, "--prompt", "a red shoe", "--num", 1, "--steps", 1, "--cpu",
                      "--output", tmp_path / "s.npz")  # fmt: skip
    assert done.code == 0, done.err


@needs_bitsandbytes
def test_a_latent_consistency_adapter_has_the_quantised_base_as_its_teacher(recipe: Any) -> None:
    trainer = trainer_of(recipe("run", "sd", "nf4", objective={"name": "latent-consistency", "solver_steps": 10}))
    losses = [float(loss["loss"]) for loss, _, _ in trainer.updates()]
    assert all(np.isfinite(losses))
    assert any(value.any() for name, value in trainer.tensors()["model"].items() if "lora_B" in name)


def test_what_is_refused(recipe: Any, robustdiff: Any, bases: Any, photos: Path, tmp_path: Path) -> None:
    def settings(**changes: Any) -> list[str]:
        values = {"data.name": "imagefolder", "data.root": photos, "data.size": 8, "data.channels": 3, "steps": 3}
        values |= {"model.path": bases["sd"], "output": tmp_path / "new", **changes}
        return ["train", "sd15-at-lora", "--cpu", *(w for n, v in values.items() for w in ("--set", f"{n}={v}"))]

    for changes, words in (
        ({"model.lora": "null", "model.quantize": "int8"}, "model.quantize: only frozen weights are quantised"),
        ({"model.quantize": "int4"}, "model.quantize"),
    ):
        done = robustdiff(*settings(**changes))
        assert (done.code, done.err.count("\n")) == (2, 1), done.err
        assert words in done.err
        assert not (tmp_path / "new").exists()
    run = recipe("run", "sd", "int8")
    train(run, cpu=True)
    (tmp_path / "other.yaml").write_text(recipe("run", "sd", None, steps=6).to_yaml())
    done = robustdiff("train", tmp_path / "other.yaml", "--resume", "--cpu")
    assert done.code == 2
    assert "was trained with another model" in done.err
