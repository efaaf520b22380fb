"""The loop: resuming, microbatches, processes, adversaries, failures, and what a run leaves behind."""

import json
import math
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DDPMPipeline, FlowMatchEulerDiscreteScheduler
from PIL import Image
from safetensors.torch import load_file

from robustdiff.backbones.model import load_model
from robustdiff.data import load_dataset
from robustdiff.errors import InputError, RunError
from robustdiff.files import MARKER, held
from robustdiff.perturbation import ADVERSARIES, Adversary, AdversaryConfig
from robustdiff.training import run
from robustdiff.training.build import build_model
from robustdiff.training.metrics_log import MetricsLog
from robustdiff.training.run import own_state_of_accelerate, train
from robustdiff.training.trainer import Trainer


def lines(recipe):
    return [json.loads(line) for line in (Path(recipe.output) / "metrics.jsonl").read_text().splitlines()]


def learned(recipe):
    """Metrics without what differs from run to run."""
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines(recipe)]


def trainer_of(recipe):
    dataset = load_dataset("digits")
    torch.manual_seed(recipe.seed)
    return Trainer(recipe, Accelerator(cpu=True), dataset, build_model(recipe, dataset))


def assert_close(first, second, tolerance=1e-5):
    """Equal up to rounding, except for the biases of the attention's keys.

    The softmax does not see those: their gradients are rounding errors, which AdamW scales up to steps like others.
    """
    compared = [name for name in first if name.startswith("model/") and not name.endswith("to_k.bias")]
    assert len(compared) > 50
    for name in compared:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


class Crash(Exception):
    """As a kill: the run ends where it is."""


@pytest.fixture
def crash_at(watch):
    """crash_at(step): a progress that ends a run at a step."""

    def make(step):
        def crash(done):
            if done >= step:
                raise Crash

        return watch(crash)

    return make


# -- resuming -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"adversary": "none"},
        {"adversary": {"name": "free", "radius": {"eta": 0.1, "sampler_steps": 20}, "ramp": 8}},
        {"adversary": "pgd"},
        {"adversary": "random"},
        {"adversary": "free", "model": {"dropout": 0.3}, "accumulate": 2},
        {"adversary": "random", "model": {"dropout": 0.3}, "data": {"name": "digits", "flip": True, "workers": 1}},
        {"adversary": "free", "precision": "bf16", "clip": 0.5, "lr_schedule": "cosine", "warmup": 4},
        {"adversary": "pgd", "precision": "bf16", "accumulate": 2, "ema": 0},
        {
            "adversary": "free",
            "objective": {"timesteps": "loss-second-moment", "input_perturbation": 0.1},
            "process": {"name": "cosine", "T": 2},
        },
    ],
    ids=lambda fields: "-".join(str(v if isinstance(v, str) else k) for k, v in fields.items()),
)
def test_resuming_is_bit_for_bit_the_run_in_one_go(tiny, outcome, fields, crash_at):
    # 4 is not a multiple of the three passes, and the last batch ends after one of them.
    fields = {"steps": 10, "checkpoint_every": 4, **fields}
    whole, cut = tiny("whole", **fields), tiny("cut", **fields)
    train(whole, cpu=True)
    with pytest.raises(Crash):
        train(cut, cpu=True, progress=crash_at(7))
    assert list((Path(cut.output) / "checkpoints").iterdir())
    train(cut, cpu=True, resume=True)
    first, second = outcome(whole), outcome(cut)
    assert first.keys() == second.keys()
    assert not [name for name in first if not torch.equal(first[name], second[name])]
    assert learned(whole) == learned(cut)


@pytest.mark.parametrize("every", [3, 1000])
def test_more_steps_extend_a_finished_run(tiny, outcome, watch, every):
    """The last batch of the shorter run ends after one of three passes, and is made again."""
    short = tiny("cut", steps=7, adversary="free", checkpoint_every=every)
    whole = tiny("whole", steps=12, adversary="free")
    train(short, cpu=True)
    longer = short.model_copy(update={"steps": 12})
    seen = []
    progress = watch(lambda step: seen.append((step, (Path(short.output) / "result.json").exists())))
    assert train(longer, cpu=True, resume=True, progress=progress)["steps"] == 12
    assert seen == [(6, False), (9, False), (12, False)]
    train(whole, cpu=True)
    first, second = outcome(whole), outcome(longer)
    assert not [name for name in first if not torch.equal(first[name], second[name])]


def test_the_largest_seed_trains(tiny):
    assert train(tiny(steps=1, seed=2**63 - 1), cpu=True)["steps"] == 1


def test_a_finished_run_without_a_checkpoint_starts_again_and_says_so(tiny, caplog):
    short = tiny(steps=2, adversary="free")
    train(short, cpu=True)
    assert train(short.model_copy(update={"steps": 3}), cpu=True, resume=True)["steps"] == 3
    assert "no checkpoint: it starts again" in caplog.text


def test_a_finished_run_is_left_as_it_is(tiny):
    recipe = tiny(steps=2)
    result = train(recipe, cpu=True)
    model = Path(recipe.output) / "model/unet/diffusion_pytorch_model.safetensors"
    written = model.stat().st_mtime_ns
    assert train(recipe, cpu=True, resume=True) == result
    assert model.stat().st_mtime_ns == written
    said = (Path(recipe.output) / "recipe.yaml").read_text()
    watched = tiny(steps=2, watch={"num": 4})
    with pytest.raises(InputError, match=r"finished and was not watched.*robustdiff evaluate"):
        train(watched, cpu=True, resume=True)
    assert (Path(recipe.output) / "recipe.yaml").read_text() == said


def photos(folder, n=8, seed=0, labels=("cat", "dog")):
    for k in range(n):
        pixels = np.random.default_rng(seed + k).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        path = folder / labels[k % len(labels)] / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return {"name": "imagefolder", "root": str(folder)}


def test_a_run_remembers_its_data(tiny, tmp_path):
    data = photos(tmp_path / "photos")
    train(tiny(steps=2, data=data), cpu=True)
    written = json.loads((tmp_path / "run/data.json").read_text())
    dataset = load_dataset(**data)
    assert (written["images"], written["classes"], written["fingerprint"]) == (8, 2, dataset.fingerprint())
    assert train(tiny(steps=3, data=data), cpu=True, resume=True)["steps"] == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: photos(p, 10), r"\(number of images 8 → 10\)"),
        (lambda p: photos(p, 8, seed=1), r"\(contents\)"),
        (lambda p: (p / "cat/0.png").rename(p / "dog/0.png"), r"\(labels\)"),
        (lambda p: ((p / "owl").mkdir(), (p / "cat/0.png").rename(p / "owl/0.png")), r"\(number of classes 2 → 3\)"),
    ],
)
def test_resuming_on_other_data_is_refused(tiny, tmp_path, change, message):
    recipe = tiny(steps=2, data=photos(tmp_path / "photos"))
    train(recipe, cpu=True)
    before = (tmp_path / "run/data.json").read_bytes()
    change(tmp_path / "photos")
    with pytest.raises(InputError, match=f"was trained with other data {message}: restore the data, start") as caught:
        train(recipe, cpu=True, resume=True)
    assert f"model.path={tmp_path / 'run'}" in str(caught.value)
    assert (tmp_path / "run/data.json").read_bytes() == before


def test_before_the_first_checkpoint_the_data_may_change(tiny, tmp_path, crash_at):
    recipe = tiny(steps=4, data=photos(tmp_path / "photos"))
    with pytest.raises(Crash):
        train(recipe, cpu=True, progress=crash_at(1))
    (tmp_path / "photos/cat/0.png").unlink()  # as one is told to do with a damaged picture
    assert train(recipe, cpu=True, resume=True)["images"] == 7


def test_a_run_from_before_fingerprints_gets_one(tiny, tmp_path):
    recipe = tiny(steps=2)
    train(recipe, cpu=True)
    (tmp_path / "run/data.json").unlink()
    train(recipe.model_copy(update={"steps": 3}), cpu=True, resume=True)
    assert json.loads((tmp_path / "run/data.json").read_text())["images"] == 1797
    (tmp_path / "run/data.json").write_text("{")
    with pytest.raises(InputError, match=r"data\.json is damaged.*: restore it, or remove it"):
        train(recipe, cpu=True, resume=True)


def test_the_number_of_workers_may_change(tiny):
    recipe = tiny(steps=2, data={"workers": 1})
    train(recipe, cpu=True)
    assert train(tiny(steps=3, data={"workers": 0}), cpu=True, resume=True)["steps"] == 3


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_picture_is_the_same_line_with_workers(robustdiff, tmp_path, workers):
    photos(tmp_path / "photos")
    path = tmp_path / "photos/dog/1.png"
    path.write_bytes(path.read_bytes()[:-60])
    assignments = ["data.name=imagefolder", f"data.root={tmp_path / 'photos'}", f"data.workers={workers}"]
    assignments += [f"output={tmp_path / 'run'}", "steps=4", "batch_size=8", "model.channels=[8,16]", "model.groups=4"]
    outcome = robustdiff("train", "digits", "--cpu", *(x for a in assignments for x in ("--set", a)))
    assert outcome.code == 2
    assert f"robustdiff: {path}: cannot be decoded" in outcome.err.splitlines()[-1]
    assert "Traceback" not in outcome.err


def test_an_existing_run_is_not_overwritten(tiny):
    recipe = tiny(steps=2)
    train(recipe, cpu=True)
    before = learned(recipe)
    with pytest.raises(InputError, match="already holds a run: go on with --resume"):
        train(recipe, cpu=True)
    assert learned(recipe) == before


@pytest.mark.parametrize(
    ("name", "value"), [("lr", 2e-3), ("batch_size", 16), ("adversary", "free"), ("seed", 1), ("precision", "bf16")]
)
def test_resuming_with_another_recipe_names_the_field(tiny, name, value):
    train(tiny(steps=1), cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)  # as in another process
    with pytest.raises(InputError, match=f"trained with another {name}"):
        train(tiny(steps=1, **{name: value}), cpu=True, resume=True)


def test_what_changes_nothing_may_change_on_resuming(tiny):
    train(tiny(steps=2), cpu=True)
    changed = tiny(steps=4, checkpoint_every=1, keep=1, log_every=2, sampler="es", threads=1)
    assert train(changed, cpu=True, resume=True)["steps"] == 4


def test_a_cosine_schedule_cannot_be_extended(tiny):
    train(tiny(steps=2, lr_schedule="cosine"), cpu=True)
    with pytest.raises(InputError, match="another steps"):
        train(tiny(steps=4, lr_schedule="cosine"), cpu=True, resume=True)


@pytest.mark.parametrize("schedule", ["growing", "doubling"])
def test_a_schedule_of_levels_cannot_be_extended(tiny, schedule):
    """Its numbers of levels are of so many steps: they would have been others."""
    objective = {"name": "consistency", "schedule": schedule, "start_scales": 2, "scales": 8}
    train(tiny(steps=2, objective=objective), cpu=True)
    with pytest.raises(InputError, match="another steps"):
        train(tiny(steps=4, objective=objective), cpu=True, resume=True)


def test_a_fixed_number_of_levels_can_be_extended(tiny):
    objective = {"name": "consistency", "scales": 8}
    train(tiny(steps=2, objective=objective), cpu=True)
    assert train(tiny(steps=4, objective=objective), cpu=True, resume=True)["steps"] == 4


# -- microbatches and processes -------------------------------------------------------------------------------


@pytest.mark.parametrize("adversary", ["none", "free", "pgd"])
def test_microbatches_train_to_the_same_parameters(tiny, outcome, adversary):
    fields = {"adversary": {"name": adversary, "step_size": 0.5}, "clip": 1.0}
    one, two = tiny("one", **fields), tiny("two", accumulate=2, **fields)
    train(one, cpu=True)
    train(two, cpu=True)
    assert_close(outcome(one), outcome(two))
    for first, second in zip(lines(one), lines(two), strict=True):
        assert first["loss"] == pytest.approx(second["loss"], rel=1e-4)
        assert first["delta_norm"] == pytest.approx(second["delta_norm"], rel=1e-4)


def test_a_finished_run_says_so_and_is_not_made_shorter(tiny, caplog):
    recipe = tiny(steps=4, lr_schedule="constant")
    train(recipe, cpu=True)
    before = Path(recipe.output, "result.json").read_bytes()
    with pytest.raises(InputError, match=r"has 4 updates already, and steps=2: give as many or more to resume it"):
        train(recipe.model_copy(update={"steps": 2}), cpu=True, resume=True)
    assert Path(recipe.output, "result.json").read_bytes() == before
    train(recipe, cpu=True, resume=True)
    assert f"{recipe.output} was finished already" in caplog.messages


def test_the_sampler_of_a_recipe_suits_its_model(tiny):
    with pytest.raises(InputError, match=r"sampler\.name=ddim does not suit the model: give euler"):
        train(tiny(process="flow", sampler="ddim", objective={"prediction": "flow"}), cpu=True)


@pytest.mark.parametrize("steps", ["abc", "", 5000])
def test_the_steps_of_a_recipe_suit_its_sampler(tiny, steps):
    with pytest.raises(InputError, match=r"sampler\.steps: steps "):
        train(tiny(sampler={"steps": steps}), cpu=True)


def test_a_run_is_resumed_with_other_microbatches(tiny, outcome):
    """Resume a run that had too little memory with more and smaller microbatches."""
    whole = tiny("whole")
    train(whole, cpu=True)
    part = tiny("part", steps=3)
    train(part, cpu=True)
    train(part.model_copy(update={"steps": 6, "accumulate": 2}), cpu=True, resume=True)
    assert_close(outcome(whole), outcome(part))


def test_a_batch_that_cannot_be_shared_out(tiny):
    class Three:
        num_processes = 3

    recipe = tiny(batch_size=8)
    dataset = load_dataset("digits")
    with pytest.raises(InputError, match="not a multiple of 3 processes × accumulate 1"):
        Trainer(recipe, Three(), dataset, build_model(recipe, dataset))


# -- adversaries in the loop ----------------------------------------------------------------------------------


class Counter:
    """Record the calls of the network and the optimiser of a trainer."""

    def __init__(self, trainer):
        self.inputs, self.times, self.backwards, self.updates = [], [], 0, 0
        self.parameters_have_gradients = []
        unet = trainer.built.model.network
        unet.register_forward_pre_hook(self.forward)
        unet.conv_out.register_full_backward_hook(self.backward)
        self.weight = unet.conv_in.weight
        trainer.optimizer.optimizer.register_step_post_hook(self.update)

    def forward(self, unet, arguments):
        self.inputs.append(arguments[0].detach().clone())
        self.times.append(arguments[1].clone())
        self.parameters_have_gradients.append(self.weight.grad is not None)

    def backward(self, *_):
        self.backwards += 1

    def update(self, *_):
        self.updates += 1


def run_batches(recipe, n):
    """Train on n batches, and what was counted in each of them."""
    trainer = trainer_of(recipe)
    counter = Counter(trainer)
    done = 0
    for *_, last in trainer.updates():
        done += last
        if done == n:
            return trainer, counter
    raise AssertionError("too few updates")


@pytest.mark.parametrize(
    ("adversary", "forwards", "backwards", "updates"),
    [("none", 1, 1, 1), ("free", 3, 3, 3), ("pgd", 4, 4, 1), ("random", 3, 3, 3)],
)
def test_what_one_batch_costs(tiny, adversary, forwards, backwards, updates):
    trainer, counter = run_batches(tiny(steps=100, adversary={"name": adversary, "steps": 3}), 4)
    assert len(counter.inputs) == 4 * forwards
    assert counter.backwards == 4 * backwards
    assert counter.updates == trainer.step == 4 * updates
    assert trainer.batch == 4
    # Not even PGD's own passes leave gradients on the parameters.
    assert not any(counter.parameters_have_gradients)


def test_all_adversaries_see_the_same_images_times_and_noise(tiny):
    first_of_batch = {}
    for adversary, forwards in {"none": 1, "free": 3, "pgd": 4, "random": 3}.items():
        _, counter = run_batches(tiny(steps=100, adversary=adversary, model={"dropout": 0.1}), 3)
        first_of_batch[adversary] = (counter.inputs[::forwards], counter.times[::forwards])
    x_t, t = first_of_batch.pop("none")
    assert not torch.equal(x_t[0], x_t[1])
    for others, other_times in first_of_batch.values():
        assert all(torch.equal(a, b) for a, b in zip(x_t, others, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(t, other_times, strict=True))


def test_the_last_pass_asks_for_no_gradient_of_delta(tiny):
    trainer = trainer_of(tiny(adversary={"name": "free", "steps": 3}, steps=6))
    objective, required = trainer.objective, []

    def watched(model, draw, delta):
        required.append(delta.requires_grad)
        return objective(model, draw, delta)

    trainer.objective = watched
    watched.timesteps, watched.more_noise, watched.draw = objective.timesteps, objective.more_noise, objective.draw
    watched.after_update = objective.after_update
    list(trainer.updates())
    assert required == [True, True, False] * 2


def test_an_update_clips_the_gradient_and_counts_the_radius_over_all_microbatches(tiny):
    adversary = {"name": "random", "steps": 1, "radius": 1.0}
    trainer = trainer_of(tiny(steps=1, clip=1e-3, accumulate=2, adversary=adversary))
    list(trainer.updates())
    gradients = [state["exp_avg"] / 0.1 for state in trainer.optimizer.optimizer.state.values()]  # 1 − β₁
    assert math.sqrt(sum(g.square().sum().item() for g in gradients)) == pytest.approx(1e-3, rel=1e-3)
    assert trainer.at_radius.tolist() == [0, 8]


def test_the_distribution_of_times_is_given_the_unweighted_losses_of_first_passes(tiny, monkeypatch):
    objective = {"timesteps": "loss-second-moment"}
    trainer = trainer_of(tiny(adversary="free", process={"name": "cosine", "T": 2}, objective=objective))
    timesteps, given = trainer.objective.timesteps, []
    timesteps.update(torch.arange(2).repeat(10), torch.arange(20.0))  # the times now have weights
    monkeypatch.setattr(timesteps, "update", lambda t, losses: given.append(losses.mean().item()))
    first = [losses for losses, *_ in trainer.updates()][::3]
    assert given == pytest.approx([losses["mse"].item() for losses in first])
    assert all(abs(losses["loss"] / losses["mse"] - 1) > 1e-3 for losses in first)


def test_free_passes_move_the_same_batch_by_the_step_size(tiny):
    _, counter = run_batches(tiny(steps=100, adversary={"name": "free", "step_size": 0.5}), 1)
    x_t, first, second = counter.inputs
    torch.testing.assert_close((first - x_t).flatten(1).norm(dim=1), torch.full((8,), 0.5), rtol=1e-4, atol=0)
    assert (second - x_t).flatten(1).norm(dim=1).max() <= 1 + 1e-4
    assert (second - first).flatten(1).norm(dim=1).min() > 0.4


# -- failures -------------------------------------------------------------------------------------------------


def everything_saved(recipe):
    for path in Path(recipe.output).rglob("*.safetensors"):
        yield from load_file(path).values()


def test_a_loss_that_is_not_finite_ends_the_run_and_is_not_saved(tiny):
    recipe = tiny(lr=1e30, steps=20, checkpoint_every=1)
    with pytest.raises(RunError, match=r"the loss is (nan|inf) at update \d+: lower lr"):
        train(recipe, cpu=True)
    assert all(value.isfinite().all() for value in everything_saved(recipe))
    assert not (Path(recipe.output) / "model").exists()


def test_a_parameter_that_the_last_update_broke_is_not_saved(tiny):
    recipe = tiny(lr=1e39, steps=1)  # the loss of the only update is finite still
    with pytest.raises(RunError, match="a parameter is not finite after update 1"):
        train(recipe, cpu=True)
    assert not list((Path(recipe.output) / "checkpoints").iterdir())
    assert not (Path(recipe.output) / "model").exists()


def test_a_moment_of_the_optimiser_that_is_not_finite_is_not_saved(tiny, tmp_path):
    trainer = trainer_of(tiny())
    next(iter(trainer.optimizer.optimizer.state.values()))["exp_avg"].fill_(math.inf)
    with pytest.raises(RunError, match="a moment of the optimiser is not finite after update 0"):
        trainer.save(tmp_path)
    assert not list(tmp_path.glob("step-*"))


# -- what a run leaves behind ---------------------------------------------------------------------------------


def test_a_run_has_a_precision_of_its_own():
    """The state that accelerate shares between its accelerators is where this package takes it to be."""
    own = Accelerator(cpu=True, mixed_precision="bf16")
    with pytest.raises(ValueError, match="mixed_precision"):
        Accelerator(cpu=True, mixed_precision="no")
    with own_state_of_accelerate():
        assert Accelerator(cpu=True, mixed_precision="no").mixed_precision == "no"
    assert (own.mixed_precision, Accelerator(cpu=True).mixed_precision) == ("bf16", "bf16")


def test_the_accelerator_of_the_caller_keeps_its_precision(tiny):
    own = Accelerator(cpu=True, mixed_precision="bf16")
    train(tiny(steps=2), cpu=True)
    assert own.mixed_precision == "bf16"
    assert Accelerator(cpu=True).mixed_precision == "bf16"


def test_a_run_trains_and_leaves_the_loop_of_the_caller_as_it_was_in_the_middle_of_an_accumulation(tiny, outcome):
    alone, within = tiny("alone", steps=2), tiny("within", steps=2)
    train(alone, cpu=True)
    own, network = Accelerator(cpu=True, gradient_accumulation_steps=4), torch.nn.Linear(1, 1)
    with own.accumulate(own.prepare(network)):
        assert not own.sync_gradients
        train(within, cpu=True)
        assert not own.sync_gradients
    assert own.gradient_accumulation_steps == 4
    assert_close(outcome(alone), outcome(within))


def test_metrics_and_result(tiny, watch):
    recipe = tiny(steps=12, adversary={"name": "free", "step_size": 0.5}, log_every=6, warmup=4)
    steps = []
    result = train(recipe, cpu=True, progress=watch(steps.append))
    written = lines(recipe)
    assert [line["step"] for line in written] == steps == [6, 12]
    for line in written:
        assert line["loss"] == line["mse"] > 0
        assert 0.5 < line["delta_norm"] <= 1 + 1e-4
        assert line["lr"] == recipe.lr
        assert line["epoch"] == pytest.approx(line["step"] / 3 * 8 / 1797)
        assert line["skipped"] == 0
        assert line["images_per_second"] > 0
    assert result == json.loads((Path(recipe.output) / "result.json").read_text())
    expected = {"steps": 12, "batches": 4, "backward_passes": 12, "images": 1797, "data": "digits"}
    assert {name: result[name] for name in expected} == expected
    assert result["loss"] == written[-1]["loss"]


def test_skipped_ascents_are_counted_over_all_processes(tiny, tmp_path, monkeypatch):
    recipe = tiny(adversary="free", steps=6)
    trainer = trainer_of(recipe)
    updates = trainer.updates()
    metrics = MetricsLog(trainer, tmp_path / "metrics.jsonl")
    for _ in range(3):
        metrics.add(*next(updates))
    trainer.adversary.skipped = 3
    with monkeypatch.context() as patch:  # of another process, which counts 4
        patch.setattr(Accelerator, "reduce", lambda self, own, reduction: own + 4 * (reduction == "sum"))
        metrics.flush()
        trainer.save(tmp_path)
        assert run._result(trainer, metrics)["skipped"] == 7
    assert metrics.line["skipped"] == 7
    for main in (True, False):
        resumed = trainer_of(recipe)
        monkeypatch.setattr(Accelerator, "is_main_process", main)
        resumed.load(tmp_path / "step-00000003")
        assert resumed.adversary.skipped == (7 if main else 0)


def test_backward_passes_of_pgd_are_counted_whole(tiny):
    assert train(tiny(steps=2, adversary={"name": "pgd", "steps": 2}), cpu=True)["backward_passes"] == 6


@pytest.fixture
def halves(monkeypatch):
    """The adversary "halves" of recipes, which yields δ = 0 as often as told and says its passes."""

    class Halves(Adversary):
        def __init__(self, passes, yields):
            super().__init__(steps=passes)
            self.yields = yields

        def __call__(self, x_t, t=None, *, loss=None, training_step=None):
            for _ in range(self.yields):
                yield torch.zeros_like(x_t)

    class HalvesConfig(AdversaryConfig):
        name: Literal["halves"] = "halves"
        steps: int = 3  # as in the section of FreeAdversary, which is of no account here
        passes: int = 1
        yields: int = 1

        def build(self, process):
            return Halves(self.passes, self.yields)

    monkeypatch.setitem(ADVERSARIES._entries, "halves", HalvesConfig)


@pytest.mark.parametrize("capture", [False, True])
@pytest.mark.usefixtures("halves")
def test_the_adversary_alone_says_how_often_it_passes_over_a_batch(tiny, capture):
    adversary = {"name": "halves", "passes": 2, "yields": 2}
    result = train(tiny(steps=6, adversary=adversary, capture=capture), cpu=True)
    assert (result["steps"], result["batches"], result["backward_passes"]) == (6, 3, 6)


@pytest.mark.parametrize("capture", [False, True])
@pytest.mark.parametrize(("passes", "yields", "number"), [(3, 1, "1"), (2, 0, "0"), (1, 2, "more than 1")])
@pytest.mark.usefixtures("halves")
def test_an_adversary_that_contradicts_itself_fails_the_run(tiny, passes, yields, number, capture):
    recipe = tiny(steps=6, adversary={"name": "halves", "passes": passes, "yields": yields}, capture=capture)
    with pytest.raises(RunError, match=f"Halves yields {number} perturbations.*Halves.passes is {passes}"):
        train(recipe, cpu=True)
    assert not (Path(recipe.output) / "result.json").exists()


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed_is_refused(tiny, monkeypatch, tracker):
    monkeypatch.setattr(run, f"is_{tracker}_available", lambda: False)
    recipe = tiny(trackers=[tracker])
    with pytest.raises(InputError, match=f"trackers: {tracker} is not installed: pip install {tracker}"):
        train(recipe, cpu=True)
    assert not Path(recipe.output).exists()


def test_tensorboard_gets_the_metrics(tiny):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = tiny(steps=3, trackers=["tensorboard"])
    train(recipe, cpu=True)
    (events,) = [
        path.parent for path in Path(recipe.output).rglob("events.out.tfevents*") if path.parent.name == "robustdiff"
    ]
    scalars = EventAccumulator(str(events)).Reload().Scalars("loss")
    assert [s.step for s in scalars] == [1, 2, 3]
    assert [s.value for s in scalars] == pytest.approx([line["loss"] for line in lines(recipe)])


def test_the_export_is_the_moving_average_as_a_diffusers_pipeline(tiny):
    recipe = tiny(steps=5, ema=0.5)
    train(recipe, cpu=True)
    unet = load_model(recipe.output).network
    averages = load_file(Path(recipe.output) / "checkpoints/step-00000005/ema.safetensors")
    now = load_file(Path(recipe.output) / "checkpoints/step-00000005/model.safetensors")
    for name, parameter in unet.named_parameters():
        assert torch.equal(parameter, averages[name]), name
    assert not torch.equal(unet.conv_in.weight, now["conv_in.weight"])

    pipeline = DDPMPipeline.from_pretrained(Path(recipe.output) / "model", local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(batch_size=2, num_inference_steps=3, output_type="np").images
    assert images.shape == (2, 8, 8, 1)
    assert math.isfinite(images.sum())


def test_a_run_without_average_exports_its_parameters(tiny):
    recipe = tiny(steps=3, ema=0)
    train(recipe, cpu=True)
    now = load_file(Path(recipe.output) / "checkpoints/step-00000003/model.safetensors")
    exported = load_file(Path(recipe.output) / "model/unet/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(value, exported[name]) for name, value in now.items())


def test_a_run_is_fine_tuned_from_a_run(tiny):
    base = tiny("base", steps=3)
    train(base, cpu=True)
    tuned = tiny(
        "tuned",
        model={"name": "pretrained", "path": base.output},
        steps=1,
        lr=1e-12,
        ema=0,
    )
    train(tuned, cpu=True)
    torch.testing.assert_close(
        load_model(tuned.output).network.state_dict(), load_model(base.output).network.state_dict()
    )


# -- what can be trained --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"process": "flow", "objective": {"prediction": "flow"}},
        {"objective": {"prediction": "v_prediction"}},
        {"objective": {"prediction": "sample"}, "process": {"name": "linear", "T": 100}},
        {"objective": {"variance": "learned_range", "vb_scale": 0.01}},
        {"model": {"class_cond": True}, "data": {"name": "digits", "flip": True}},
    ],
    ids=["flow", "v", "sample", "learned variance", "classes and flips"],
)
def test_the_loss_falls_and_the_pipeline_knows_what_it_predicts(tiny, fields):
    recipe = tiny(steps=60, batch_size=32, lr=3e-3, adversary="free", log_every=12, **fields)
    train(recipe, cpu=True)
    losses = [line["mse"] for line in lines(recipe)]
    assert losses[-1] < 0.8 * losses[0]
    loaded = load_model(recipe.output)
    unet, scheduler = loaded.network, loaded.scheduler
    objective = recipe.objective
    if objective is not None and objective.prediction == "flow":
        assert isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
    elif objective is not None:
        assert scheduler.config.prediction_type == objective.prediction
        assert unet.config.out_channels == (2 if objective.variance == "learned_range" else 1)
    assert unet.config.num_class_embeds == (10 if recipe.model.class_cond else None)


def test_flips_mirror_about_half_of_the_images(tiny):
    fields = [{"batch_size": 1024, "data": {"name": "digits", "flip": flip}} for flip in (False, True)]
    plain, flipped = (trainer_of(tiny(**own)) for own in fields)
    (x,), (y,) = next(plain.batches()), next(flipped.batches())
    same = (x.x0 == y.x0).flatten(1).all(1)
    mirrored = (x.x0.flip(-1) == y.x0).flatten(1).all(1)
    assert (same | mirrored).all()
    assert 512 - 48 < mirrored.sum() < 512 + 48  # three standard deviations
    assert torch.equal(x.noise, y.noise)
    assert torch.equal(x.t, y.t)


def test_compiled_training_is_the_same_training_and_can_be_resumed(tiny, outcome, monkeypatch, crash_at):
    # All of torch.compile but the generation of C++, which takes half a minute here.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    fields = {"adversary": "free", "steps": 6, "checkpoint_every": 3}
    plain, compiled = tiny("plain", **fields), tiny("compiled", compile=True, **fields)
    train(plain, cpu=True)
    with pytest.raises(Crash):
        train(compiled, cpu=True, progress=crash_at(6))
    train(compiled, cpu=True, resume=True)
    assert_close(outcome(plain), outcome(compiled))


# -- the learning rate ----------------------------------------------------------------------------------------


def test_the_learning_rate_warms_up_linearly_and_stays(tiny):
    trainer = trainer_of(tiny(lr=1e-3, warmup=4, steps=10))
    rates = []
    for trainer.step in range(6):
        rates.append(trainer.learning_rate())
    assert rates == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3, 1e-3])


def test_the_learning_rate_falls_along_half_a_cosine_to_zero(tiny):
    recipe = tiny(lr=1e-3, warmup=2, lr_schedule="cosine", steps=8)
    train(recipe, cpu=True)
    expected = [1e-3 * min(1, (k + 1) / 2) * (1 + math.cos(math.pi * k / 8)) / 2 for k in range(8)]
    assert [line["lr"] for line in lines(recipe)] == pytest.approx(expected)
    assert expected[-1] < 0.04e-3


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_of_another_process_is_left_alone(tiny, resume):
    recipe = tiny(steps=1)
    folder = Path(recipe.output)
    unfinished = [folder / f".model.{'0' * 12}.tmp", folder / "checkpoints" / f".step-00000001.{'0' * 12}.tmp"]
    with held(folder / MARKER):
        for part in unfinished:
            part.mkdir(parents=True)
        with pytest.raises(InputError, match=r"another process trains in .*run: wait until it ends"):
            train(recipe, resume=resume, cpu=True)
        assert all(part.exists() for part in unfinished)
