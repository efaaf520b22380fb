"""Consistency models and denoisers over levels in the training loop: resuming, common random numbers, the target."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline, EDMEulerScheduler

from robustdiff.backbones.model import Model, load_model
from robustdiff.data import ArrayDataset, load_dataset
from robustdiff.errors import InputError
from robustdiff.evaluation.generate import Generator
from robustdiff.objectives.consistency import (
    DISTANCES,
    ConsistencyConfig,
    DoublingScales,
    FixedScales,
    GrowingScales,
    euler_step,
)
from robustdiff.objectives.edm import EdmConfig
from robustdiff.objectives.preconditioning import DiffusionDenoiser, Preconditioned, karras_sigmas
from robustdiff.training.build import build_model
from robustdiff.training.run import train
from robustdiff.training.trainer import Trainer

CD = {"name": "consistency", "metric": "l2", "decay": 0.8, "scales": 10}


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """A diffusion model and a denoiser of a few updates."""
    from robustdiff.recipe import Recipe

    folder = tmp_path_factory.mktemp("teachers")
    common = {
        "data": "digits", "model": {"channels": [8, 16], "groups": 4, "layers": 1}, "steps": 3, "batch_size": 8,
        "lr": 1e-3, "threads": 1, "ema": 0,
    }  # fmt: skip
    train(Recipe.model_validate({**common, "output": str(folder / "diffusion")}), cpu=True)
    train(Recipe.model_validate({**common, "output": str(folder / "edm"), "objective": "edm"}), cpu=True)
    return {"diffusion": str(folder / "diffusion"), "edm": str(folder / "edm")}


def trainer_of(recipe, dataset=None):
    dataset = dataset or load_dataset("digits")
    torch.manual_seed(recipe.seed)
    accelerator = Accelerator(cpu=True, mixed_precision="no" if recipe.precision == "fp32" else recipe.precision)
    return Trainer(recipe, accelerator, dataset, build_model(recipe, dataset))


def lines(recipe):
    return [json.loads(line) for line in (Path(recipe.output) / "metrics.jsonl").read_text().splitlines()]


class Crash(Exception):
    """As a kill: the run ends where it is."""


@pytest.mark.parametrize(
    "fields",
    [
        {"objective": {**CD, "teacher": "diffusion"}, "adversary": "free", "model": {"dropout": 0.3}},
        {"objective": {**CD, "teacher": "edm", "perturb": "student"}, "adversary": "pgd", "precision": "bf16"},
        {
            "objective": {**CD, "schedule": "growing", "start_scales": 2, "times": "log-normal", "decay": 0.9},
            "adversary": "none",
            "accumulate": 2,
        },
        {"objective": {"name": "edm"}, "adversary": "free"},
    ],
    ids=["distillation", "bf16, student", "growing", "edm"],
)
def test_resuming_is_bit_for_bit_the_run_in_one_go(tiny, outcome, teachers, fields, watch):
    objective = dict(fields["objective"])
    if "teacher" in objective:
        objective["teacher"] = teachers[objective["teacher"]]
    fields = {"steps": 10, "checkpoint_every": 4, **fields, "objective": objective}
    whole, cut = tiny("whole", **fields), tiny("cut", **fields)
    train(whole, cpu=True)

    def crash(step):
        if step >= 7:
            raise Crash

    with pytest.raises(Crash):
        train(cut, cpu=True, progress=watch(crash))
    train(cut, cpu=True, resume=True)
    first, second = outcome(whole), outcome(cut)
    assert (objective["name"] == "consistency") == any(name.startswith("target now/") for name in first)
    assert first.keys() == second.keys()
    assert not [name for name in first if not torch.equal(first[name], second[name])]
    assert [line["loss"] for line in lines(whole)] == [line["loss"] for line in lines(cut)]


def test_the_target_follows_the_student_through_every_pass(tiny, teachers):
    trainer = trainer_of(tiny(steps=100, adversary="free", objective={**CD, "teacher": teachers["diffusion"]}))
    target = trainer.objective.target
    expected = [p.clone() for p in target.parameters()]
    assert all(torch.equal(p, q) for p, q in zip(expected, trainer.model.parameters(), strict=True))
    assert target.training, "its dropout is the student's"
    assert trainer.model.training
    for k, _ in enumerate(trainer.updates()):
        expected = [0.8 * e + 0.2 * p.detach() for e, p in zip(expected, trainer.model.parameters(), strict=True)]
        for e, p in zip(expected, target.parameters(), strict=True):
            torch.testing.assert_close(p, e)
        if k == 4:
            break
    assert not any(torch.equal(p, q) for p, q in zip(target.parameters(), trainer.model.parameters(), strict=True))


@pytest.mark.parametrize("objective", ["consistency", "edm"])
def test_all_adversaries_see_the_same_images_levels_and_noise(tiny, teachers, objective):
    fields = {**CD, "teacher": teachers["edm"]} if objective == "consistency" else {"name": "edm"}
    batches = {}
    for adversary in ("none", "free", "pgd", "random"):
        trainer = trainer_of(tiny(steps=100, adversary=adversary, objective=fields))
        starts = []
        draw = trainer.objective.draw

        def recorded(*arguments, draw=draw, starts=starts, **named):
            starts.append(draw(*arguments, **named))
            return starts[-1]

        trainer.objective.draw = recorded
        for _ in trainer.updates():
            if trainer.batch == 3:
                break
        batches[adversary] = starts[:3]
    plain = batches.pop("none")
    assert not torch.equal(plain[0].x_t, plain[1].x_t)
    for others in batches.values():
        for a, b in zip(plain, others, strict=True):
            assert torch.equal(a.x_t, b.x_t)
            assert torch.equal(a.t, b.t)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_student_target_and_teacher_have_one_precision(tiny, teachers, precision):
    trainer = trainer_of(tiny(steps=1, precision=precision, objective={**CD, "teacher": teachers["edm"]}))
    x, sigma = torch.zeros(2, 1, 8, 8), torch.ones(2)
    types = []
    networks = {
        "student": trainer.built.model.network, "target": trainer.accelerator.unwrap_model(trainer.objective.target),
    }  # fmt: skip
    for network in networks.values():
        network.conv_in.register_forward_hook(lambda module, inputs, output: types.append(output.dtype))
    next(iter(trainer.updates()))
    assert types == [torch.bfloat16 if precision == "bf16" else torch.float32] * 2
    with torch.no_grad():
        denoised = trainer.objective.teacher(x + 1, sigma)
        whole = load_model(teachers["edm"]).denoiser()
        exact = whole(x + 1, sigma)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            assert torch.equal(denoised, whole(x + 1, sigma)), "weights in bfloat16 are those that autocast makes"
    assert denoised.dtype == torch.float32
    assert torch.equal(denoised, exact) == (precision == "fp32")
    torch.testing.assert_close(denoised, exact, atol=0.05, rtol=0.05)


def test_a_consistency_run_is_a_consistency_pipeline(tiny, teachers):
    recipe = tiny(
        steps=3, adversary="free", model={"name": "pretrained", "path": teachers["edm"]},
        objective={**CD, "teacher": teachers["edm"], "sigma_max": 40.0, "sigma_data": 0.7},
    )  # fmt: skip
    result = train(recipe, cpu=True)
    assert result["backward_passes"] == 3
    pipeline = ConsistencyModelPipeline.from_pretrained(Path(recipe.output) / "model", local_files_only=True)
    assert isinstance(pipeline.scheduler, CMStochasticIterativeScheduler)
    config = pipeline.scheduler.config
    assert (config.num_train_timesteps, config.sigma_max, config.sigma_data, config.sigma_min) == (10, 40.0, 0.7, 0.002)
    assert {"distance", "loss", "delta_norm"} <= set(lines(recipe)[-1])
    assert lines(recipe)[-1]["delta_norm"] > 0
    (_, images), *_ = Generator.load(recipe.output).images(range(2))
    assert images.shape == (2, 1, 8, 8)


def test_the_number_of_levels_at_the_end_is_the_pipelines(tiny):
    recipe = tiny(steps=4, objective={"name": "consistency", "schedule": "doubling", "start_scales": 2, "scales": 8})
    train(recipe, cpu=True)
    assert load_model(recipe.output).scheduler.config.num_train_timesteps == 9


def test_a_denoiser_starts_from_a_diffusion_model_and_a_consistency_model_from_it_exactly(tiny, teachers):
    fine = {"ema": 0, "steps": 1, "lr": 1e-12}
    edm = tiny("edm", model={"name": "pretrained", "path": teachers["diffusion"]}, objective="edm", **fine)
    train(edm, cpu=True)
    loaded = load_model(edm.output)
    unet, scheduler = loaded.network, loaded.scheduler
    assert isinstance(scheduler, EDMEulerScheduler)
    torch.testing.assert_close(unet.state_dict(), load_model(teachers["diffusion"]).network.state_dict())
    cm = tiny("cm", model={"name": "pretrained", "path": edm.output}, objective={**CD, "teacher": edm.output}, **fine)
    trainer = trainer_of(cm)
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.5, 3.0, 50.0])
    # Not at the smallest levels, where the boundary condition is not the denoiser's.
    with torch.no_grad():
        f = Generator.of(Model.of(trainer.built.model.network.eval(), trainer.built.model.scheduler)).model(x, sigma)
        D = trainer.objective.teacher(x, sigma)
    torch.testing.assert_close(f, D, rtol=0.02, atol=0.02)


def test_the_loss_of_both_falls(tiny, teachers):
    for name, objective in {"edm": {"name": "edm"}, "cd": {**CD, "teacher": teachers["edm"]}}.items():
        recipe = tiny(name, steps=45, batch_size=32, lr=4e-3, log_every=9, adversary="free", objective=objective)
        train(recipe, cpu=True)
        losses = [line["loss"] for line in lines(recipe)]
        assert losses[-1] < 0.8 * losses[0], name


# Fields that are not the defaults (CD is among those of consistency), what is read of the objective, and what it is.
CONSISTENCY = [
    (
        {"teacher": "diffusion", "solver": "euler"},
        lambda o: (type(o.teacher), o.solver),
        (DiffusionDenoiser, euler_step),
    ),
    ({"teacher": "edm"}, lambda o: type(o.teacher), Preconditioned),
    ({"metric": "l1"}, lambda o: o.distance, DISTANCES["l1"]()),
    ({"perturb": "student"}, lambda o: o.perturb, "student"),
    ({"weighting": "inverse-gap"}, lambda o: o.weighting, "inverse-gap"),
    ({}, lambda o: o.times, None),
    ({"times": "log-normal", "mean": -0.5, "std": 1.5}, lambda o: o.times, (-0.5, 1.5)),
    ({"scales": 25, "decay": 0.6}, lambda o: o.schedule, FixedScales(25, 0.6)),
    ({"schedule": "growing", "start_scales": 3}, lambda o: o.schedule, GrowingScales(3, 10, 0.8, 7)),
    ({"schedule": "doubling", "start_scales": 3}, lambda o: o.schedule, DoublingScales(3, 10, 0.8, 7)),
    (
        {"sigma_min": 0.01, "sigma_max": 40.0, "rho": 5.0, "sigma_data": 0.7},
        lambda o: (o.process.sigmas.tolist(), o.sigma_min, o.sigma_max, o.rho, o.sigma_data),
        (karras_sigmas(10, 0.01, 40.0, 5.0).tolist(), 0.01, 40.0, 5.0, 0.7),
    ),
]
EDM = [
    ({"teacher": "edm", "teacher_below": 3.0}, lambda o: (type(o.teacher), o.teacher_below), (Preconditioned, 3.0)),
    (
        {"mean": -0.5, "std": 0.8},
        lambda o: (o.timesteps.mean, o.timesteps.std),
        (-0.5, 0.8),
    ),
    (
        {"levels": 50, "sigma_min": 0.01, "sigma_max": 40.0, "rho": 5.0, "sigma_data": 0.7},
        lambda o: (o.process.sigmas.tolist(), o.sigma_data),
        (karras_sigmas(50, 0.01, 40.0, 5.0).tolist(), 0.7),
    ),
]


@pytest.mark.parametrize(
    ("fields", "read", "expected"),
    [({**CD, **fields}, *rest) for fields, *rest in CONSISTENCY]
    + [({"name": "edm", **fields}, *rest) for fields, *rest in EDM],
    ids=lambda value: ",".join(k for k in value if k not in CD) if isinstance(value, dict) else "",
)
def test_every_field_of_the_recipe_reaches_the_objective(tiny, teachers, fields, read, expected):
    if "teacher" in fields:
        fields = {**fields, "teacher": teachers[fields["teacher"]]}
    assert read(trainer_of(tiny(steps=7, objective=fields)).objective) == expected


@pytest.mark.parametrize(("config", "cases"), [(ConsistencyConfig, CONSISTENCY), (EdmConfig, EDM)])
def test_no_field_is_left_out_of_that_test(config, cases):
    assert {"name"}.union(*(fields for fields, *_ in cases)) == set(config.model_fields)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"objective": {**CD, "times": "log-normal", "mean": 100.0, "std": 0.1}}, ["0.002", "80", "mean", "std"]),
        ({"objective": {**CD, "teacher": "/no/such"}}, ["/no/such"]),
        ({"objective": {**CD, "teacher": "fashion-16"}}, ["fashion-16", "16×16"]),
        ({"objective": CD, "process": "cosine"}, ["objective=consistency", "process"]),
        ({"objective": "edm", "process": "linear"}, ["objective=edm", "process"]),
        ({"objective": "edm", "adversary": {"name": "free", "radius": {"eta": 0.1, "sampler_steps": 5}}},
         ["sampler_steps", "eta"]),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(tiny, fields, words):
    with pytest.raises(InputError) as error:
        trainer_of(tiny(**fields))
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_a_consistency_model_is_no_teacher_and_needs_an_objective(tiny, teachers):
    cm = tiny("cm", steps=1, objective=CD)
    train(cm, cpu=True)
    with pytest.raises(InputError, match="a consistency model cannot be a teacher"):
        trainer_of(tiny("next", objective={**CD, "teacher": cm.output}))
    with pytest.raises(InputError, match="give the recipe its objective"):
        trainer_of(tiny("next", model={"name": "pretrained", "path": cm.output}))
    trainer_of(tiny("next", model={"name": "pretrained", "path": cm.output}, objective=CD))


def test_flow_matching_is_no_teacher(tiny):
    flow = tiny("flow", steps=1, process="flow", objective={"prediction": "flow"})
    train(flow, cpu=True)
    with pytest.raises(InputError, match="a flow-matching model cannot be a teacher"):
        trainer_of(tiny("next", objective={**CD, "teacher": flow.output}))


def test_classes_of_teacher_and_student_must_agree(tiny, teachers):
    with pytest.raises(InputError, match="the same classes"):
        trainer_of(tiny(model={"class_cond": True}, objective={**CD, "teacher": teachers["edm"]}))


def test_a_teacher_of_classes_needs_labels(tiny):
    classes = tiny("classes", steps=1, model={"class_cond": True})
    train(classes, cpu=True)
    images, _ = load_dataset("digits").__getitems__(list(range(20)))[:2]
    bare = ArrayDataset("bare", images.permute(0, 2, 3, 1).numpy())
    with pytest.raises(InputError, match="classes needs class labels, and this data has none"):
        trainer_of(tiny("next", objective={**CD, "teacher": classes.output}), bare)


def test_a_teacher_is_asked_at_its_own_levels_only(tiny, teachers):
    teacher = teachers["edm"]  # up to 80
    for objective, bound in (
        ({**CD, "teacher": teacher, "sigma_max": 100.0}, "sigma_max"),
        ({"name": "edm", "teacher": teacher, "sigma_max": 120.0, "teacher_below": 100.0}, "teacher_below"),
        # The levels of training are not truncated at sigma_max.
        ({"name": "edm", "teacher": teacher, "sigma_max": 70.0, "teacher_below": 100.0}, "teacher_below"),
    ):
        with pytest.raises(InputError) as error:
            trainer_of(tiny(objective=objective))
        for word in (teacher, "up to 80", "up to 100", f"lower {bound}"):
            assert word in str(error.value)
    trainer_of(tiny(objective={"name": "edm", "teacher": teacher, "sigma_max": 120.0}))


def test_a_learned_variance_has_no_place_in_it(tiny):
    learned = tiny("learned", steps=1, objective={"variance": "learned_range"})
    train(learned, cpu=True)
    with pytest.raises(InputError, match="learned variance"):
        trainer_of(tiny("next", model={"name": "pretrained", "path": learned.output}, objective="edm"))
    trainer_of(tiny("cd", objective={**CD, "teacher": learned.output}))
