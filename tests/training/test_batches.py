"""Batches: the same however images are loaded, from any batch to the last, and on whatever stream they are prepared."""

from __future__ import annotations

import gc
import weakref
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from robustdiff.data import ArrayDataset
from robustdiff.data.latents import LatentDataset
from robustdiff.errors import InputError
from robustdiff.training.batches import Batches
from robustdiff.training.build import build_model
from robustdiff.training.run import train
from robustdiff.training.stream import BatchIndices
from robustdiff.training.trainer import Trainer


def trainer_of(recipe, dataset=None) -> Trainer:
    dataset = dataset or recipe.data.load()
    built = build_model(recipe, dataset)
    data = LatentDataset(dataset, built.model.codec, recipe.data.flip) if recipe.caches_latents else dataset
    if data is not dataset:
        data.fill()
    return Trainer(recipe, Accelerator(cpu=True), data, built)


def drawn(trainer, start=0):
    """All tensors of the batches from one on to the last, by batch and microbatch."""
    trainer.batch = start
    return [[tensors(draw) for draw in draws] for draws in trainer.batches()]


def tensors(draw):
    values = {**vars(draw), **draw.condition}
    return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}


def same(one, other):
    assert len(one) == len(other) > 0
    for draws, others in zip(one, other, strict=True):
        for first, second in zip(draws, others, strict=True):
            assert first.keys() == second.keys()
            assert all(torch.equal(value, second[name]) for name, value in first.items())


VAE = {"name": "vae", "path": "fashion-16-vae", "cache": True}
STORED = {
    "pixels": {"data": {"name": "digits", "flip": True}},
    "classes": {"model": {"class_cond": True, "condition_dropout": 0.5}, "accumulate": 2},
    "latents": {"data": {"name": "digits", "size": 16, "flip": True}, "codec": VAE},
}


@pytest.mark.parametrize("case", STORED)
def test_selected_images_are_those_that_are_loaded(tiny, monkeypatch, case):
    trainer = trainer_of(tiny(steps=4, **STORED[case]))
    kind = type(trainer.dataset)
    own = kind.resident
    monkeypatch.setattr(kind, "resident", lambda self, device, room: own(self, device, 2**31))
    selected = drawn(trainer)
    monkeypatch.setattr(kind, "resident", lambda self, device, room: None)
    same(selected, drawn(trainer))


@pytest.mark.parametrize("adversary", ["none", {"name": "free", "steps": 3}])
def test_batches_end_with_the_run_and_are_the_same_from_any_on(tiny, adversary):
    trainer = trainer_of(tiny(steps=7, adversary=adversary))
    whole = drawn(trainer)
    assert len(whole) == (7 if adversary == "none" else 3)  # the last may be left before its last pass
    same(drawn(trainer, 1), whole[1:])


class Broken(ArrayDataset):
    """Digits that are loaded, of which one cannot be decoded."""

    broken: Any = None

    def resident(self, device, room):
        return None

    def __getitems__(self, indices):
        if self.broken in indices:
            raise InputError("a.png: cannot be decoded")
        return super().__getitems__(indices)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_fails_of_the_images_of_its_own_batches_when_it_comes_to_them(tiny, workers):
    recipe = tiny(steps=3, data={"workers": workers})
    dataset = recipe.data.load()
    dataset.__class__ = Broken
    order = BatchIndices(len(dataset), recipe.batch_size, recipe.seed)
    trainer = trainer_of(recipe, dataset)
    dataset.broken = order.batch(3)[0]  # the batch behind the last
    assert sum(1 for _ in trainer.updates()) == 3
    trainer, dataset.broken = trainer_of(recipe, dataset), order.batch(2)[0]
    updates = trainer.updates()
    next(updates), next(updates)
    with pytest.raises(InputError, match="cannot be decoded"):
        next(updates)


# -- the stream ---------------------------------------------------------------------------------------------------


def batches_of(trainer, device):
    accelerator: Any = SimpleNamespace(device=torch.device(device), process_index=0, num_processes=1)
    parts = trainer.dataset, trainer.built, trainer.objective, trainer.buckets, trainer.sizes, trainer.adversary.passes
    return Batches(trainer.recipe, accelerator, *parts, trainer.batch)


CONSISTENCY = {"name": "consistency", "scales": 4}
DEPENDENT = {"name": "denoising", "timesteps": "loss-second-moment"}


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        ({"name": "denoising"}, True),
        (CONSISTENCY, True),
        (DEPENDENT, False),
        ({**CONSISTENCY, "schedule": "growing", "start_scales": 2}, False),
        ({**CONSISTENCY, "schedule": "doubling", "start_scales": 2}, False),
    ],
)
def test_a_gpu_prepares_batches_beside_the_passes_unless_they_depend_on_them(tiny, objective, expected):
    trainer = trainer_of(tiny(objective=objective))
    assert batches_of(trainer, "cuda").own_stream == expected
    assert not batches_of(trainer, "cpu").own_stream


def test_the_network_that_is_trained_is_not_called_beside_its_passes(tiny, tmp_path, make_sd_pipeline):
    pytest.importorskip("peft")
    pipeline, images = make_sd_pipeline(tmp_path / "sd", "sd"), tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (8, 8)).save(images / "0.png")
    (images / "0.txt").write_text("black")
    for lora, expected in ((None, True), ({"rank": 2}, False)):
        recipe = tiny(
            model={"name": "pretrained", "path": str(pipeline), "lora": lora},
            data={"name": "imagefolder", "root": str(images), "size": 8, "channels": 3},
            objective={"name": "latent-consistency"},
        )
        assert batches_of(trainer_of(recipe), "cuda").own_stream == expected


class Queue:
    """Streams and events that write down what they are told."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def __getattr__(self, call):
        return lambda other: self.log.append(f"{self.name}.{call}({other.name})")


def test_the_streams_wait_for_each_other_and_a_batch_is_kept_for_the_next_ones(tiny, monkeypatch):
    log: list[str] = []
    passes = Queue("passes", log)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: passes)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Queue("batches", log))
    monkeypatch.setattr(torch.cuda, "Event", lambda: Queue("event", log))

    @contextmanager
    def stream(chosen):
        log.append(f"on {chosen.name}")
        yield
        log.append("off")

    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(Batches, "own_stream", True)
    trainer = trainer_of(tiny(steps=4))
    draw, alive, seen = trainer.objective.draw, [], []

    def watched(*arguments, **more):
        gc.collect()
        seen.append([made() is not None for made in alive])
        made = draw(*arguments, **more)
        alive.append(weakref.ref(made))
        return made

    trainer.objective.draw = watched
    expected = ["batches.wait_event(event)", "on batches", "off", "passes.wait_stream(batches)", "event.record(passes)"]
    began = ["event.record(passes)"]
    for draws in trainer.batches():
        del draws
        assert log == began + expected
        began, log[:] = [], []
    # Of two batches before, the passes over the last may not have been made.
    assert seen == [[], [True], [False, True], [False, False, True]]


def test_on_one_stream_or_two_a_run_learns_the_same(tiny, outcome, monkeypatch):
    """On a CPU without streams: the order of what the host does is the same."""
    whole = tiny("one", adversary="free", objective=CONSISTENCY)
    train(whole, cpu=True)
    for name in ("current_stream", "Stream"):
        monkeypatch.setattr(torch.cuda, name, lambda device: Queue("", []))
    monkeypatch.setattr(torch.cuda, "Event", lambda: Queue("", []))
    monkeypatch.setattr(torch.cuda, "stream", contextmanager(lambda stream: iter([None])))
    monkeypatch.setattr(Batches, "own_stream", True)
    two = tiny("two", adversary="free", objective=CONSISTENCY)
    train(two, cpu=True)
    found, wanted = outcome(two), outcome(whole)
    assert all(torch.equal(value, found[name]) for name, value in wanted.items())
