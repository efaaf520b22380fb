"""Runs of latent consistency distillation: what trains, which networks there are, what is saved and sampled."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from robustdiff import load_model, sample
from robustdiff.errors import InputError
from robustdiff.evaluation.generate import Generator
from robustdiff.objectives.latent_consistency import embed_guidance
from robustdiff.training.build import build_model
from robustdiff.training.run import train
from robustdiff.training.trainer import Trainer

pytest.importorskip("transformers")
PROMPTS = ["A red shoe", "blue"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory, make_sd_pipeline):
    folder = tmp_path_factory.mktemp("pipelines")
    return {kind: make_sd_pipeline(folder / kind, kind) for kind in ("sd", "xl", "lcm")}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    rng, lines = np.random.default_rng(0), []
    for i in range(6):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": PROMPTS[i % 2]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def distilled(tiny, saved, images):
    """distilled(kind="sd", lora=None, objective={…}, field=…): the recipe of a distillation."""

    def recipe(kind="sd", lora=None, objective=None, **fields):
        model = {"name": "pretrained", "path": str(saved[kind]), "lora": lora}
        return tiny(
            model=model,
            data={"name": "imagefolder", "root": str(images), "size": 8, "channels": 3},
            objective={"name": "latent-consistency", **(objective or {})},
            **{"adversary": {"name": "free", "steps": 3}, "batch_size": 4, "clip": 1.0, **fields},
        )

    return recipe


def trainer_of(recipe) -> Trainer:
    dataset = recipe.data.load()
    precision = "no" if recipe.precision == "fp32" else recipe.precision
    return Trainer(recipe, Accelerator(cpu=True, mixed_precision=precision), dataset, build_model(recipe, dataset))


def pipeline_of(folder: Path) -> Any:
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def same_images(monkeypatch, model, pipeline, steps=3, **settings):
    """Compare the images of a model with those of a pipeline, from the same noise."""
    latents, *noise = torch.randn(steps + 1, 2, *model.shape, generator=torch.Generator().manual_seed(0))
    given = iter(noise)
    monkeypatch.setattr("diffusers.schedulers.scheduling_lcm.randn_tensor", lambda *_, **__: next(given))
    scale = settings.get("guidance_scale", 8.5)
    wanted = pipeline(PROMPTS, num_inference_steps=steps, latents=latents, output_type="np", **settings).images
    ours = sample(
        model,
        model.process,
        model.samplers[0],
        steps,
        latents=latents,
        step_noise=torch.stack(noise),
        condition=model.condition.batch(None, PROMPTS, None),
        guidance=scale,
    )
    ours = (model.codec.decode(ours) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    np.testing.assert_allclose(ours.numpy(), wanted, rtol=0, atol=1e-4)
    return ours


def test_a_run_of_all_weights(distilled, monkeypatch, saved, caplog):
    recipe = distilled(objective={"guidance_embedding": 16, "solver_steps": 20, "guidance": [1.0, 3.0]}, steps=3)
    result = train(recipe, cpu=True)
    assert result["delta_norm"] > 0
    folder = Path(recipe.output)
    index = json.loads((folder / "model/model_index.json").read_text())
    assert index["_class_name"] == "LatentConsistencyModelPipeline"
    assert index["scheduler"] == ["diffusers", "LCMScheduler"]
    model = load_model(folder)
    assert (model.kind.name, model.samplers[0], model.backbone.guidance_embedding) == ("lcm", "lcm", 16)
    assert model.sampling["solver_steps"] == 20
    pipeline = pipeline_of(folder / "model")
    guided = same_images(monkeypatch, model, pipeline, guidance_scale=4.0)
    middle = same_images(monkeypatch, model, pipeline, guidance_scale=3.0)
    assert not torch.equal(middle, guided)
    assert "outside of the range" not in caplog.text
    same_images(monkeypatch, model, pipeline)
    same_images(monkeypatch, model, pipeline)
    assert caplog.text.count("guidance 8.5 is outside of the range that the network was trained at, 2 to 4") == 1
    x, t, condition = torch.randn(2, *model.shape), torch.tensor([3, 700]), model.condition.batch(None, PROMPTS, None)
    with torch.no_grad():
        by_default = model(x, t, **condition).sample
        assert torch.equal(by_default, model(x, t, **condition, **model.embed_guidance(3.0, x)).sample)


def test_a_run_continues_bit_for_bit(distilled, tmp_path):
    fields = {"adversary": {"name": "free", "steps": 2}, "accumulate": 2, "precision": "bf16"}
    recipe = distilled(objective={"perturb": "student"}, steps=4, **fields)
    whole = trainer_of(recipe)
    updates = whole.updates()
    for _ in range(2):
        next(updates)
    whole.save(tmp_path)
    again = trainer_of(recipe)
    again.load(next(tmp_path.glob("step-*")))
    for one, other in zip(updates, again.updates(), strict=True):
        assert torch.equal(one[0]["loss"], other[0]["loss"])
    expected, found = whole.tensors(), again.tensors()
    assert {"model", "target", "ema"} < expected.keys()
    for part, tensors in expected.items():
        assert all(torch.equal(value, found[part][name]) for name, value in tensors.items())


def test_the_networks_of_a_run_of_all_weights(distilled):
    trainer = trainer_of(distilled(objective={"guidance_embedding": 16}))
    student, target = trainer.built.model.network, trainer.target
    assert student.config.time_cond_proj_dim == 16
    assert all(p.requires_grad for p in student.parameters())
    assert not any(p.requires_grad for p in target.parameters())
    draw = next(trainer.batches())[0]
    assert draw.w.min() >= 3
    assert draw.w_embedding.shape == (4, 16)
    with torch.no_grad():  # the weights of the embedding are zero at first
        assert torch.equal(
            trainer.call(draw.x_next, draw.upper, **draw.condition, timestep_cond=draw.w_embedding).sample,
            trainer.objective.teacher(draw.x_next, draw.upper, **draw.condition).sample,
        )
    before = [p.clone() for p in target.parameters()]
    next(trainer.updates())
    for old, now, own in zip(before, target.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(now, 0.95 * old + 0.05 * own)


LORA = {"rank": 2, "targets": ["to_q", "conv1", "time_emb_proj"]}


def test_a_lora_has_one_network_in_memory(distilled, saved):
    pytest.importorskip("peft")
    trainer = trainer_of(distilled("xl", LORA, {"guidance": [3.0, 15.0]}))
    student = trainer.built.model.network
    assert trainer.target is None
    assert {id(p) for p in trainer.objective.target.parameters()} == {id(p) for p in student.parameters()}
    for _ in zip(range(3), trainer.updates(), strict=False):
        pass
    base = load_model(saved["xl"])
    draw = next(trainer.batches())[0]
    assert draw.w_embedding is None
    with torch.no_grad():
        expected = base(draw.x_next, draw.upper, **draw.condition).sample
        assert torch.equal(trainer.objective.teacher(draw.x_next, draw.upper, **draw.condition).sample, expected)
        now = trainer.call(draw.x_next, draw.upper, **draw.condition).sample
    assert student.training
    assert (now - expected).abs().max() > 1e-5


@pytest.mark.parametrize("kind", ["sd", "xl"])
def test_a_run_of_a_lora(distilled, monkeypatch, kind, saved):
    pytest.importorskip("peft")
    recipe = distilled(kind, LORA, lr=1e-2, ema=0, steps=3)
    result = train(recipe, cpu=True)
    assert result["delta_norm"] > 0
    folder = Path(recipe.output)
    model = load_model(folder)
    assert (model.kind.name, model.samplers[0], model.backbone.guidance_embedding) == ("lcm", "lcm", None)
    pipeline = pipeline_of(saved[kind])
    pipeline.scheduler = diffusers.LCMScheduler.from_config(pipeline.scheduler.config)
    pipeline.load_lora_weights(folder / "model")
    same_images(monkeypatch, model, pipeline, guidance_scale=1.0)


def test_a_latent_consistency_model_is_distilled_further(distilled, saved):
    with pytest.raises(InputError, match=r"teacher .*must be a diffusion model.*objective.teacher"):
        trainer_of(distilled("lcm"))
    trainer = trainer_of(distilled("lcm", objective={"teacher": str(saved["sd"])}))
    assert trainer.built.model.network.config.time_cond_proj_dim == 8
    next(trainer.updates())


def test_an_embedding_of_guidance_is_one_evaluation(saved):
    model = load_model(saved["lcm"])
    seen: list[Any] = []
    arguments: dict[str, Any] = {"latents": torch.zeros(2, *model.shape), "sampler": "lcm", "steps": 2}
    arguments |= {"condition": model.condition.batch(None, PROMPTS, None), "on_evaluation": seen.append}
    sample(model, model.process, guidance=3.0, **arguments)
    assert len(seen) == 2
    expected = embed_guidance(torch.tensor([2.0, 2.0]), 8)
    torch.testing.assert_close(seen[0].denoiser.condition["timestep_cond"], expected)
    arguments["condition"] = {**arguments["condition"], "timestep_cond": torch.zeros(2, 8)}
    sample(model, model.process, **arguments)
    assert torch.equal(seen[-1].denoiser.condition["timestep_cond"], torch.zeros(2, 8))
    with pytest.raises(InputError, match="the scale of guidance already, as timestep_cond"):
        sample(model, model.process, guidance=3.0, **arguments)
    with pytest.raises(InputError, match="at least 0"):
        sample(model, model.process, guidance=-1.0, **{**arguments, "condition": {}})


def test_a_lora_of_a_network_that_embeds_the_scale_has_the_scales_of_its_own_training(distilled, saved):
    """Compare the output without a scale to that in the middle of the range."""
    recipe = distilled("lcm", lora=LORA, objective={"guidance": [1.0, 2.0], "teacher": str(saved["sd"])}, steps=2)
    train(recipe, cpu=True)
    model, base = load_model(recipe.output), load_model(saved["lcm"])
    assert model.adapter is not None
    assert model.backbone.guidance_range == (2.0, 3.0)
    assert base.backbone.guidance_range is None
    x, t = torch.randn(2, *model.shape), torch.tensor([3, 700])
    condition = model.condition.batch(None, PROMPTS, None)
    with torch.no_grad():
        default, middle, other = (
            model(x, t, **condition, **given).sample
            for given in ({}, model.embed_guidance(2.5, x), model.embed_guidance(8.5, x))
        )
    assert torch.equal(default, middle)
    assert not torch.equal(default, other)


def test_the_command_samples_with_guidance(saved, robustdiff, tmp_path):
    pixels = []
    for scale in ("1", None):
        path = tmp_path / f"{scale}.npz"
        own = () if scale is None else ("--guidance", scale)
        outcome = robustdiff("sample", saved["lcm"], "--num", 2, "--prompt", "blue", *own, "--output", path)
        assert outcome.code == 0, outcome.err
        with np.load(path) as file:
            pixels.append(file["arr_0"])
    assert not np.array_equal(*pixels)
    assert Generator.of(load_model(saved["lcm"]), prompts=("blue",)).steps == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora": LORA, "objective": {"guidance_embedding": 8}}, "objective.guidance_embedding is for the training of"),
        ({"lora": LORA, "objective": {"decay": 0.5}}, "objective.decay is for the training of all weights"),
        ({"objective": {"solver_steps": 2000}}, "solver_steps must be between 1 and the 1000 times"),
        ({"objective": {"prediction": "v_prediction"}}, "is not the teacher's, epsilon: leave it out"),
        ({"kind": "lcm", "objective": {"guidance_embedding": 16}}, "of 8 numbers, and 16 are asked for"),
        ({"kind": "lcm", "objective": {"name": "denoising"}}, "would undo it"),
    ],
)
def test_what_is_refused(distilled, settings, message):
    with pytest.raises(InputError, match=message):
        trainer_of(distilled(**settings))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("beta_end", 0.03, "other noise levels than the student"),
        ("prediction_type", "v_prediction", "the student's parameterisation, epsilon"),
    ],
)
def test_other_teachers_are_refused(distilled, saved, tmp_path, field, value, message):
    other = shutil.copytree(saved["sd"], tmp_path / "other")
    path = other / "scheduler/scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(InputError, match=message):
        trainer_of(distilled(objective={"teacher": str(other)}))


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("model: unet\nobjective: latent-consistency\n", "set model.name=pretrained and model.path"),
        ("model: {name: pretrained, path: fashion-16-edm}\nobjective: latent-consistency\n", "model over noise levels"),
        ("model: {name: pretrained, path: fashion-16}\nobjective: latent-consistency\n", "an empty condition"),
        (
            "model: {name: pretrained, path: fashion-16}\nobjective: {name: latent-consistency, guidance: [0, 0]}\n",
            "takes no embedding of the guidance scale",
        ),
        ("objective: {name: latent-consistency, guidance: [5, 3]}\n", "must be a range"),
        ("process: cosine\nobjective: latent-consistency\n", "takes the process of its teacher: leave process out"),
        ("objective: {name: latent-consistency, metric: l2, huber_c: 0.1}\n", "huber_c has a meaning only with"),
    ],
)
def test_recipes_that_are_refused(robustdiff, tmp_path, recipe, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"data: fashion-16\nsteps: 2\n{recipe}")
    outcome = robustdiff("train", path, "--set", f"output={tmp_path / 'run'}")
    assert outcome.code == 2
    assert message in outcome.err.replace("\n", " ")
