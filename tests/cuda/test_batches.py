"""Batches are prepared without waiting, and beside the passes over others, which changes nothing."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from accelerate import Accelerator

from robustdiff.data import ArrayDataset
from robustdiff.training.batches import Batches
from robustdiff.training.build import build_model
from robustdiff.training.run import train
from robustdiff.training.trainer import Trainer

CASES = {
    "pixels": ("digits", ["data.flip=true"]),
    "classes": ("digits", ["model.class_cond=true", "model.condition_dropout=0.5", "accumulate=2"]),
    "second moment": ("digits", ["objective.timesteps=loss-second-moment"]),
    "teacher": ("fashion-16-consistency", []),
}


@pytest.fixture
def trainer_of(device, recipe, monkeypatch):
    """trainer_of(case, resident): a trainer of twelve batches, with images on the device or loaded."""

    def make(case, resident=True):
        name, settings = CASES[case]
        if not resident:
            monkeypatch.setattr(ArrayDataset, "resident", lambda *_: None)
        made = recipe(name, "run", *settings, "steps=12", "adversary=none")
        dataset = made.data.load()
        torch.manual_seed(0)
        return Trainer(made, Accelerator(cpu=device == "cpu"), dataset, build_model(made, dataset))

    return make


def copies(draws):
    """Copies of all tensors of a batch, made by the stream of the passes."""
    values = [value for draw in draws for value in (*vars(draw).values(), *draw.condition.values())]
    return [value.clone() for value in values if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize("resident", [True, False], ids=["resident", "loaded"])
@pytest.mark.parametrize("case", CASES)
def test_no_batch_waits(device, trainer_of, case, resident):
    batches = trainer_of(case, resident).batches()
    found = [copies(next(batches)) for _ in range(2)]  # the tables go to the device once
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        found += [copies(draws) for draws in islice(batches, 3)]
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert len(found) == 5
    assert all(value.device.type == device for tensors in found for value in tensors)


@pytest.mark.parametrize("resident", [True, False], ids=["resident", "loaded"])
@pytest.mark.parametrize("case", CASES)
def test_a_batch_is_whole_as_long_as_the_passes_over_it_take(device, exact, trainer_of, monkeypatch, case, resident):
    trainer = trainer_of(case, resident)
    found = []
    for draws in trainer.batches():
        if device == "cuda":
            torch.cuda._sleep(20_000_000)  # as passes that end long after the next batch is asked for
        found.append(copies(draws))
    monkeypatch.setattr(Batches, "own_stream", False)
    expected = [copies(draws) for draws in trainer.batches()]
    assert len(found) == len(expected) == 12
    for one, other in zip(found, expected, strict=True):
        assert all(map(torch.equal, one, other))


@pytest.mark.parametrize("case", ["pixels", "teacher"])
def test_a_stream_for_batches_changes_nothing(device, exact, recipe, learned, monkeypatch, case):
    name, settings = CASES[case]
    two, one = (recipe(name, output, *settings) for output in ("two", "one"))
    train(two, cpu=device == "cpu")
    monkeypatch.setattr(Batches, "own_stream", False)
    train(one, cpu=device == "cpu")
    first, second = learned(two), learned(one)
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[key]) for key, value in first.items())
