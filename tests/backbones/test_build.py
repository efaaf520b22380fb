"""Networks by name and pipeline folders: what goes in comes out, what does not fit is named."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import (
    ConsistencyModelPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from robustdiff.backbones.model import PRETRAINED, Model, load_model
from robustdiff.backbones.unet2d import UNetSection
from robustdiff.data import ArrayDataset, load_dataset, to_unit
from robustdiff.errors import InputError
from robustdiff.objectives.preconditioning import DiffusionDenoiser, Preconditioned, karras_sigmas
from robustdiff.process import PREDICTIONS, DiffusionProcess
from robustdiff.recipe import Recipe, load_recipe
from robustdiff.training.build import build_model
from robustdiff.training.run import train

SMALL = {"name": "unet", "channels": [8, 16], "groups": 4, "layers": 1}


def recipe(**fields) -> Recipe:
    return Recipe.model_validate({"data": "digits", "model": SMALL, **fields})


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits")


@pytest.mark.parametrize("variance", ["fixed", "learned_range"])
def test_a_unet_takes_the_images_and_gives_what_is_predicted(variance):
    unet = (
        UNetSection(**SMALL, attention=(False, True), class_cond=True)
        .build((3, 8, 8), 10, variance == "learned_range")
        .network
    )
    out = unet(torch.zeros(2, 3, 8, 8), torch.tensor([0, 5]), class_labels=torch.tensor([1, 2])).sample
    assert out.shape == (2, 3 if variance == "fixed" else 6, 8, 8)


@pytest.mark.parametrize(("shape", "word"), [((1, 9, 9), "data.size"), ((1, 8, 16), "8×16")])
def test_images_that_a_unet_cannot_halve_are_named(shape, word):
    with pytest.raises(InputError, match=word):
        UNetSection(**SMALL).build(shape, None, False)


def test_labels_that_are_missing_are_named():
    with pytest.raises(InputError, match="class_cond"):
        UNetSection(**SMALL, class_cond=True).build((1, 8, 8), None, False)


@pytest.mark.parametrize(
    ("process", "objective"),
    [
        ("cosine", {"prediction": "epsilon"}),
        ("linear", {"prediction": "v_prediction"}),
        ({"name": "linear", "T": 100}, {"prediction": "epsilon"}),
        ("cosine", {"prediction": "sample"}),
        ("flow", {"prediction": "flow"}),
        ("cosine", {"variance": "learned_range"}),
    ],
)
def test_a_folder_remembers_process_and_objective(tmp_path, digits, process, objective):
    built = build_model(recipe(process=process, objective=objective), digits)
    Model.of(built.model.network, built.model.scheduler).save(tmp_path)
    loaded = load_model(tmp_path)
    for name, value in built.model.network.state_dict().items():
        assert torch.equal(loaded.network.state_dict()[name], value)
    torch.testing.assert_close(loaded.process.alphas, built.process.alphas, rtol=1e-3, atol=1e-6)
    read = loaded.kind.objective()
    assert (read.prediction, read.variance) == (built.objective.prediction, built.objective.variance)
    assert DDPMPipeline.from_pretrained(tmp_path)(num_inference_steps=1, output_type="np").images.shape == (1, 8, 8, 1)
    fields = {"model": {"name": "pretrained", "path": str(tmp_path)}}
    tuned = build_model(recipe(**fields), digits)
    assert tuned.objective.prediction == built.objective.prediction
    torch.testing.assert_close(tuned.process.sigmas, built.process.sigmas, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("objective", "pipeline"),
    [
        ({"name": "edm", "levels": 50, "sigma_data": 0.7}, DDPMPipeline),
        ({"name": "consistency", "scales": 12, "sigma_max": 50.0}, ConsistencyModelPipeline),
    ],
)
def test_a_folder_remembers_the_levels(tmp_path, digits, objective, pipeline):
    built = build_model(recipe(objective=objective), digits)
    Model.of(built.model.network, built.model.scheduler).save(tmp_path)
    assert type(pipeline.from_pretrained(tmp_path).scheduler) is type(built.model.scheduler)
    loaded = load_model(tmp_path)
    read = loaded.kind.objective()
    assert {name: getattr(read, name) for name in objective} == objective
    levels = karras_sigmas(objective.get("levels") or objective["scales"], 0.002, objective.get("sigma_max", 80.0))
    torch.testing.assert_close(built.process.sigmas, levels)
    process = loaded.process
    torch.testing.assert_close(process.sigmas / process.alphas, levels)
    x, index = torch.randn(3, 1, 8, 8), torch.tensor([2, 5, 11])
    sigma = levels[index].float()
    # As the sampler calls it: over the times of its process.
    x_t = x * process.alphas[index].float()[:, None, None, None]
    with torch.no_grad():
        got = loaded(x_t, process.times[index])
        start = 0.0 if objective["name"] == "edm" else 0.002
        expected = Preconditioned(built.model.network, read.sigma_data, start)(x, sigma)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert read.prediction == "sample"


def test_every_kind_but_flows_and_consistency_models_is_a_denoiser(digits):
    x, sigma = torch.randn(2, 1, 8, 8), torch.tensor([0.5, 5.0])
    for prediction in ("epsilon", "v_prediction", "sample"):
        built = build_model(recipe(objective={"prediction": prediction}), digits)
        denoise = built.model.denoiser()
        assert isinstance(denoise, DiffusionDenoiser)
        assert denoise.prediction == prediction
        assert denoise(x, sigma).shape == x.shape
    built = build_model(recipe(objective="edm"), digits)
    with torch.no_grad():
        own = Preconditioned(built.model.network)(x, sigma)
        assert torch.equal(built.model.denoiser()(x, sigma), own)
    for fields in ({"process": "flow", "objective": {"prediction": "flow"}}, {"objective": {"name": "consistency"}}):
        built = build_model(recipe(**fields), digits)
        with pytest.raises(InputError, match="cannot be a teacher"):
            built.model.denoiser()


def test_the_shipped_checkpoint_is_small_and_loads():
    loaded = load_model("fashion-16")
    assert sum(p.numel() for p in loaded.network.parameters()) <= 2_000_000
    assert loaded.prediction == "epsilon"
    assert len(loaded.process) == 1000


def test_the_shipped_denoiser_is_of_its_recipe():
    lines = (PRETRAINED / "fashion-16-edm" / "metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line) for line in lines]
    settings = load_recipe("fashion-16-edm")
    assert metrics[-1]["step"] == settings.steps
    # The peak of a cosine after a warm-up.
    assert 0.95 * settings.lr <= max(line["lr"] for line in metrics) <= settings.lr


def test_the_shipped_denoiser_denoises_as_the_checkpoint_that_it_came_from():
    images, _ = load_dataset("fashion-16").__getitems__(list(range(64)))[:2]
    x0 = to_unit(images)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    errors = {}
    for name in ("fashion-16", "fashion-16-edm"):
        denoise = load_model(name).denoiser()
        with torch.no_grad():
            errors[name] = torch.stack(
                [(denoise(x0 + s * noise, torch.full((64,), s)) - x0).square().mean() for s in (0.1, 0.5, 2.0, 10.0)]
            )
    # Not quite as well at small σ, after a short fine-tuning.
    assert (errors["fashion-16-edm"] < 1.3 * errors["fashion-16"]).all(), errors


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"process": "flow"}, ["flow", "prediction"]),
        ({"objective": {"prediction": "flow"}}, ["flow"]),
        ({"process": "pretrained"}, ["process=pretrained"]),
        ({"model": {"name": "pretrained", "path": "fashion-16"}}, ["16×16", "data.size=16"]),
        ({"model": {"name": "pretrained", "path": "/no/such"}}, ["/no/such", "fashion-16"]),
    ],
)
def test_what_does_not_fit_is_named(digits, fields, words):
    with pytest.raises(InputError) as error:
        build_model(recipe(**fields), digits)
    for word in words:
        assert word in str(error.value)


def test_channels_that_do_not_fit_are_named():
    with pytest.raises(InputError, match=r"data\.channels=1"):
        build_model(load_recipe("fashion-16-at"), load_dataset("fashion-16", channels=3))


@pytest.mark.parametrize(
    ("known", "labels", "message"),
    [
        (3, [0, 3], "knows 3 classes and the data has 4"),
        (3, None, "needs class labels, and this data has none"),
        (3, [0, 2], None),
        (3, [0, 1], None),
        (None, [0, 3], None),
        (None, None, None),
    ],
)
def test_classes_that_a_checkpoint_does_not_know_are_named(tmp_path, known, labels, message):
    unet = UNetSection(**SMALL, class_cond=known is not None).build((1, 8, 8), known, False).network
    Model.of(unet, DDPMScheduler()).save(tmp_path)
    images = np.zeros((2, 8, 8, 1), np.uint8)
    data = ArrayDataset("data", images, None if labels is None else np.array(labels))
    tuned = recipe(model={"name": "pretrained", "path": str(tmp_path)})
    if message is None:
        assert build_model(tuned, data).model.network.config.num_class_embeds == known
        return
    with pytest.raises(InputError, match=message) as error:
        build_model(tuned, data)
    assert str(tmp_path) in str(error.value)


def test_an_unfinished_run_is_told_from_nothing(tmp_path):
    (tmp_path / "recipe.yaml").write_text("")
    with pytest.raises(InputError, match="--resume"):
        load_model(tmp_path)


@pytest.mark.parametrize("damage", ["index", "null", "config", "class", "truncated", "missing", "width"])
def test_a_damaged_folder_is_named(tmp_path, digits, damage):
    built = build_model(recipe(), digits)
    Model.of(built.model.network, built.model.scheduler).save(tmp_path)
    if damage == "index":
        (tmp_path / "model_index.json").write_text("{")
    elif damage == "null":
        (tmp_path / "model_index.json").write_text('{"unet": null}')
    elif damage == "config":
        (tmp_path / "unet" / "config.json").write_text("{")
    elif damage in ("truncated", "missing"):
        weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
        if damage == "missing":
            weights.unlink()
        else:
            weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "width":
        config = json.loads((tmp_path / "unet" / "config.json").read_text())
        (tmp_path / "unet" / "config.json").write_text(json.dumps({**config, "block_out_channels": [8, 32]}))
    else:
        index = json.loads((tmp_path / "model_index.json").read_text())
        index["unet"] = ["diffusers", "UNet2DConditionModel"]
        (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=tmp_path.name) as error:
        load_model(tmp_path)
    assert "\n" not in str(error.value)


# -- fine-tuning a checkpoint from elsewhere -----------------------------------------------------------------


def checkpoint(folder, scheduler, out_channels=1, classes=None):
    """A pipeline folder of a small network, as diffusers saves it."""
    torch.manual_seed(0)
    unet = UNetSection(**SMALL).build((1, 8, 8), None, out_channels == 2).network
    if classes is not None:
        unet = type(unet).from_config({**unet.config, "num_class_embeds": classes})
    DDPMPipeline(unet, scheduler).save_pretrained(folder)
    return {"name": "pretrained", "path": str(folder)}


@pytest.mark.parametrize("kind", [DDPMScheduler, DDIMScheduler, EulerDiscreteScheduler])
def test_what_is_trained_is_what_is_saved(tmp_path, digits, kind):
    """An ε checkpoint that is trained to predict v is a v checkpoint, and keeps the rest of its scheduler."""
    model = checkpoint(tmp_path / "given", kind(timestep_spacing="trailing", beta_end=0.015))
    built = build_model(recipe(model=model, objective={"prediction": "v_prediction"}), digits)
    Model.of(built.model.network, built.model.scheduler).save(tmp_path / "saved")
    loaded = load_model(tmp_path / "saved")
    assert type(loaded.scheduler) is kind
    assert loaded.prediction == built.objective.prediction == "v_prediction"
    assert loaded.scheduler.config.timestep_spacing == "trailing"
    torch.testing.assert_close(loaded.process.alphas, Model.of(loaded.network, kind(beta_end=0.015)).process.alphas)
    assert DDPMPipeline.from_pretrained(tmp_path / "saved").scheduler.config.prediction_type == "v_prediction"


def test_the_trained_parameterisation_has_the_smaller_error(tmp_path, digits):
    """Read as v, the network denoises; read as ε, as the checkpoint's scheduler had it, it does not."""
    model = checkpoint(tmp_path / "given", DDPMScheduler())
    run = recipe(
        model=model,
        objective={"prediction": "v_prediction"},
        adversary="none",
        output=str(tmp_path / "run"),
        steps=60,
        batch_size=32,
        lr=5e-3,
        threads=1,
    )
    train(run, cpu=True)
    loaded = load_model(tmp_path / "run")
    process, x0 = loaded.process, to_unit(digits.__getitems__(range(128))[0])
    generator = torch.Generator().manual_seed(0)
    t = torch.randint(1000, (128,), generator=generator)
    x_t = process.diffuse(x0, t, torch.randn(x0.shape, generator=generator))
    with torch.no_grad():
        output = loaded.network(x_t, t).sample
    errors = {p: (process.split(p, x_t, t, output)[0].clamp(-1, 1) - x0).square().mean() for p in PREDICTIONS}
    assert loaded.prediction == "v_prediction"
    assert errors["v_prediction"] < 0.8 * errors["epsilon"]


@pytest.mark.parametrize(
    ("scheduler", "out_channels", "fields", "words"),
    [
        (DDPMScheduler(), 1, {"objective": {"prediction": "flow"}}, "is a diffusion model.*process=flow"),
        (FlowMatchEulerDiscreteScheduler(), 1, {"objective": {"prediction": "epsilon"}}, "of flow matching.*cosine"),
        (DDPMScheduler(), 1, {"objective": {"variance": "learned_range"}}, "objective.variance=learned_range"),
        (
            DDPMScheduler(variance_type="learned_range"),
            2,
            {"objective": {"variance": "fixed"}},
            "objective.variance=fixed",
        ),
        (DDPMScheduler(), 1, {"process": "cosine", "objective": {"variance": "learned_range"}}, "objective.variance"),
        (
            DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction"),
            1,
            {"objective": {"prediction": "epsilon"}},
            "zero terminal SNR",
        ),
        (EDMEulerScheduler(), 1, {}, "ln σ/4"),
        (EDMEulerScheduler(), 1, {"objective": {"name": "consistency"}}, "ln σ/4"),
    ],
)
def test_an_objective_that_the_checkpoint_cannot_have_is_one_line(
    tmp_path, digits, scheduler, out_channels, fields, words
):
    model = checkpoint(tmp_path / "given", scheduler, out_channels)
    with pytest.raises(InputError, match=words) as error:
        build_model(recipe(model=model, **fields), digits)
    assert "\n" not in str(error.value)


def test_a_flow_checkpoint_keeps_its_shift(tmp_path, digits):
    model = checkpoint(tmp_path / "given", FlowMatchEulerDiscreteScheduler(shift=3.0))
    built = build_model(recipe(model=model), digits)
    torch.testing.assert_close(built.process.sigmas, DiffusionProcess.flow(shift=3.0).sigmas)
    assert built.model.scheduler.config.shift == 3.0
    own = build_model(recipe(process={"name": "flow", "shift": 3.0}, objective={"prediction": "flow"}), digits)
    torch.testing.assert_close(own.model.process.sigmas, built.process.sigmas)


def test_zero_terminal_snr_trains(tmp_path, digits):
    scheduler = DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing")
    model = checkpoint(tmp_path / "given", scheduler)
    run = recipe(
        model=model, adversary="free", output=str(tmp_path / "run"), steps=6, batch_size=64, threads=1, log_every=1
    )
    assert np.isfinite(train(run, cpu=True)["loss"])
    assert load_model(tmp_path / "run").scheduler.config.rescale_betas_zero_snr


def test_a_null_class_is_noted_where_the_data_tells(tmp_path, digits):
    model = checkpoint(tmp_path / "given", DDPMScheduler(), classes=11)
    built = build_model(recipe(model={**model, "condition_dropout": 0.1}), digits)
    assert built.model.network.config["_null_class"]
    Model.of(built.model.network, built.model.scheduler).save(tmp_path / "saved")
    assert load_model(tmp_path / "saved").network.config["_null_class"]
    with pytest.raises(InputError, match="null class after the 10 classes"):
        build_model(
            recipe(model={**checkpoint(tmp_path / "ten", DDPMScheduler(), classes=10), "condition_dropout": 0.1}),
            digits,
        )
