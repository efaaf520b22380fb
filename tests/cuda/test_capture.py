"""Passes that are recorded as a CUDA graph and replayed train as those that are not.

On the CPU the same copies are made, and the function is called on them.
"""

from __future__ import annotations

import gc
import json
import logging
import weakref
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from robustdiff.graphs import Recorder
from robustdiff.perturbation.free import FreeAdversary, FreeConfig
from robustdiff.recipe import load_recipe
from robustdiff.training.run import train
from robustdiff.training.trainer import Trainer
from robustdiff.training.watch import Watch

ARMS = {
    "free": ["adversary.name=free", "adversary.radius=1.0", "adversary.ramp=5"],
    "random": ["adversary.name=random", "adversary.radius={eta: 0.1}"],
    "pgd": ["adversary.name=pgd"],
    "none": ["adversary.name=none"],
    "accumulated": ["accumulate=2", "clip=1", "lr_schedule=cosine", "warmup=3"],
    "second-moment": ["objective.timesteps=loss-second-moment", "process.T=2", "sampler.steps=2"],
}


def lines(recipe):
    """The metrics of a run but its speed."""
    kept = []
    for line in (Path(recipe.output) / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        del values["images_per_second"]
        kept.append(values)
    return kept


def close(first, second):
    """Whether two runs learned the same, up to the rounding of learning rates to float32."""
    for name in first | second:
        if "to_k.bias" not in name:  # its gradient is 0 but for rounding, which Adam makes steps of
            assert torch.allclose(first[name], second[name], rtol=1e-3, atol=1e-5), name


@pytest.fixture
def eager_and_recorded(device, recipe, learned):
    """Train a recipe without recording and with it, check that both learn the same, and return the two recipes."""

    def trained(shipped, *settings):
        runs = [
            recipe(shipped, name, *settings, f"capture={capture}")
            for name, capture in (("eager", "false"), ("recorded", "true"))
        ]
        for run in runs:
            train(run, cpu=device == "cpu")
        close(*map(learned, runs))
        return runs

    return trained


@pytest.mark.parametrize("arm", ARMS)
def test_recorded_passes_train_as_others(exact, eager_and_recorded, arm):
    runs = eager_and_recorded("digits", "steps=14", "log_every=3", "model.dropout=0", *ARMS[arm])
    for eager, recorded in zip(*map(lines, runs), strict=True):
        assert recorded == pytest.approx(eager, rel=1e-4)


@pytest.mark.parametrize("schedule", ["fixed", "growing"])
def test_consistency_training_is_recorded_while_its_levels_stay(exact, eager_and_recorded, caplog, schedule):
    growing = ["objective.start_scales=3", "objective.schedule=growing", "adversary.radius=1.0"]
    with caplog.at_level(logging.WARNING):
        eager_and_recorded("fashion-16-consistency", "steps=9", *(growing if schedule == "growing" else []))
    said = [record.getMessage() for record in caplog.records if "not recorded" in record.getMessage()]
    assert said == (
        []
        if schedule == "fixed"
        else ["the passes over a batch are not recorded as a CUDA graph, since the number of levels changes in the run"]
    )


def test_consistency_training_with_dropout_falls_back(device, exact, eager_and_recorded, caplog):
    """The target drops out what the student does, which a replay cannot repeat."""
    settings = (
        "process=null",
        "objective=consistency",
        "model.dropout=0.3",
        "adversary=free",
        "sampler=multistep",
        "sampler.steps=2",
    )
    with caplog.at_level(logging.WARNING):
        eager_and_recorded("digits", "steps=6", *settings)
    said = [record.getMessage() for record in caplog.records if "cannot be recorded" in record.getMessage()]
    assert [line.rpartition(": ")[2] for line in said] == (
        [] if device == "cpu" else ["the target drops out what the student does"]
    )


def test_dropout_is_fresh_in_every_replay(device, recipe, learned):
    """The same batch again and again: a replayed mask would repeat the loss of a network that does not learn."""
    run = recipe("digits", "run", "steps=8", "adversary=none", "model.dropout=0.5", "lr=1e-30", "capture=true")
    train(run, cpu=device == "cpu")
    losses = [line["loss"] for line in lines(run)]
    assert len(set(losses)) == len(losses)


def test_a_resumed_run_is_the_same(device, exact, recipe, learned, train_cut):
    whole, cut = (recipe("digits", name, "steps=12", "capture=true", "model.dropout=0.1") for name in ("whole", "cut"))
    train(whole, cpu=device == "cpu")
    train_cut(cut)
    first, second = map(learned, (whole, cut))
    assert all(torch.equal(first[name], second[name]) for name in first | second)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (["model.gradient_checkpointing=true"], "gradient checkpointing reads the states of generators"),
        (["precision=fp16"], "the loss is scaled in fp16"),
    ],
)
def test_what_cannot_be_recorded_says_why(device, recipe, caplog, settings, why):
    if device == "cpu" and "precision=fp16" in settings:
        pytest.skip("fp16 is refused on a CPU")
    with caplog.at_level(logging.WARNING):
        assert train(recipe("digits", "run", *settings, "capture=true"), cpu=device == "cpu")
    assert f"since {why}" in caplog.text


def test_by_default_passes_are_recorded_on_a_gpu_alone(device, recipe, monkeypatch):
    made = []
    monkeypatch.setattr("robustdiff.training.trainer.Recorder", lambda *given: made.append(given) or Recorder(*given))
    train(recipe("digits", "run"), cpu=device == "cpu")
    assert len(made) == (device == "cuda")
    assert load_recipe("digits").capture == "auto"


@dataclass
class Pair:
    a: torch.Tensor
    b: dict[str, torch.Tensor | float]


def test_a_recorder_returns_what_its_function_does_for_every_shape(device):
    calls = []

    def function(pair, factor):
        calls.append(pair.a.shape)
        return {"sum": pair.a + pair.b["x"] * pair.b["y"], "more": [factor * pair.a.sum()]}

    recorder = Recorder(function, torch.device(device), "a sum")
    generator = torch.Generator().manual_seed(0)
    for number in range(4):
        for n in (2, 3):
            a, x = (torch.randn(n, generator=generator) for _ in range(2))
            found = recorder(Pair(a.to(device), {"x": x.to(device), "y": 3.0}), 2)
            assert torch.allclose(found["sum"].cpu(), a + 3 * x)
            assert torch.allclose(found["more"][0].cpu(), 2 * a.sum())
        if number > 1 and device == "cuda":
            assert len(calls) == 4  # once as it is and once recorded, for each shape
    other = recorder(Pair(torch.ones(2, device=device), {"x": torch.ones(2, device=device), "y": 4.0}), 2)
    assert other["sum"].tolist() == [5, 5]  # another number is another recording


def test_arguments_on_the_cpu_are_copied_to_the_device(device):
    recorder = Recorder(lambda x, factor: x * factor, torch.device(device), "a product")
    for value in (1.0, 2.0, 3.0):
        assert recorder(torch.ones(3, device=device), torch.tensor(value)).tolist() == [value] * 3


def test_what_fails_while_it_is_recorded_runs_without(gpu, caplog):
    """Random numbers and gradients go on as well, which a recording that was broken off could leave in disorder."""
    weight = torch.ones(3, device=gpu, requires_grad=True)

    def function(x):
        weight.grad = None  # as a training pass begins: a recording leaves one that was not computed
        noise = torch.randn_like(x)
        (weight * x).sum().backward()
        return x * float(x.sum()) + 0 * noise  # the host waits

    recorder = Recorder(function, torch.device(gpu), "a sum")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert recorder(torch.ones(3, device=gpu)).tolist() == [3, 3, 3]
            assert weight.grad.tolist() == [1, 1, 1]
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert caplog.text.count("a sum runs without a CUDA graph, since it cannot be recorded") == 1
    assert torch.randn(3, device=gpu).isfinite().all()
    assert torch.nn.functional.dropout(torch.ones(3, device=gpu)).isfinite().all()


def test_released_recordings_are_made_again(device):
    calls = []

    def double(x):
        calls.append(len(x))
        return 2 * x

    recorder = Recorder(double, torch.device(device), "a product")
    for value in (1.0, 2.0, 3.0):
        assert recorder(torch.full((3,), value, device=device)).tolist() == [2 * value] * 3
    before = len(calls)
    recorder.release()
    assert recorder(torch.full((3,), 4.0, device=device)).tolist() == [8] * 3
    assert len(calls) == before + 1


def test_a_trainer_is_freed_with_its_last_name(device, recipe, monkeypatch):
    """A cycle of references would keep the weights on a GPU beside those of the next run."""
    freed, init = [], Trainer.__init__

    def watched(self, *given):
        init(self, *given)
        weakref.finalize(self, freed.append, True)

    monkeypatch.setattr(Trainer, "__init__", watched)
    run = recipe("digits", "run", "steps=6", "capture=true")
    gc.collect()
    gc.disable()
    try:
        train(run, cpu=device == "cpu")
        assert freed == [True]
    finally:
        gc.enable()


def test_recordings_are_released_for_a_measurement_and_an_incomplete_batch(device, recipe, monkeypatch):
    events = []
    monkeypatch.setattr(Trainer, "release", lambda self: events.append(("release", self.step)))
    monkeypatch.setattr(Watch, "_sampling", lambda self, average: events.append(("measure", self.trainer.step)))
    watch = ["watch.metric=fid", "watch.features=digits", "watch.every=6", "watch.num=50", "watch.steps=[1]"]
    run = recipe("digits", "run", "adversary.name=free", "adversary.steps=3", "steps=8", "capture=true", *watch)
    with pytest.raises(TypeError):  # the measurement itself is not made
        train(run, cpu=device == "cpu")
    assert events == [("release", 6), ("measure", 6)]
    events.clear()
    train(recipe("digits", "other", "adversary.steps=3", "steps=8", "capture=true"), cpu=device == "cpu")
    assert events == [("release", 6)]


class Counting(FreeAdversary):
    """An adversary with a state in Python, which replays would not change."""

    batches = 0

    def perturb(self, points, loss):
        self.batches += 1
        yield from super().perturb(points, loss)


def test_what_does_not_say_that_it_may_be_recorded_is_not(device, recipe, monkeypatch, caplog):
    made = []
    monkeypatch.setattr(FreeConfig, "build", lambda self, process: made.append(Counting(3, 0.1)) or made[-1])
    run = recipe("digits", "run", "adversary.name=free", "adversary.steps=3", "steps=9", "capture=true")
    with caplog.at_level(logging.WARNING):
        train(run, cpu=device == "cpu")
    assert "since Counting does not declare that it may be (recordable = True in its class)" in caplog.text
    assert made[-1].batches == 3
