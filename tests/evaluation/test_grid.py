"""The grid: its cells are what sampling and measuring by hand give, its differences are paired."""

from __future__ import annotations

import math
import pickle
import threading
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from accelerate import Accelerator

from robustdiff.data import ArrayDataset, load_dataset
from robustdiff.errors import InputError, RunError
from robustdiff.evaluation import grid as grid_module
from robustdiff.evaluation.generate import Generator
from robustdiff.evaluation.grid import Grid, differences, evaluate_cell, evaluate_grid, evaluate_images
from robustdiff.metrics import fid as fid_module
from robustdiff.metrics.bootstrap import interval
from robustdiff.metrics.extractors.extractor import load_extractor
from robustdiff.metrics.metric import Measured, MetricCollection, check_finite
from robustdiff.metrics.reference import reference_statistics
from robustdiff.metrics.reservoir import fixed_order

NUM = 60


@pytest.fixture(scope="module")
def extractor():
    return load_extractor("digits")


@pytest.fixture(scope="module")
def metrics(extractor, tmp_path_factory) -> MetricCollection:
    reference = reference_statistics(load_dataset("digits"), extractor, tmp_path_factory.mktemp("cache"))
    return MetricCollection(None, extractor, reference)


class Told:
    """A progress that keeps what it is told."""

    def __init__(self) -> None:
        self.parts: list[tuple[str, float]] = []
        self.amounts: list[tuple[float, str]] = []

    def begin(self, description: str, total: float) -> None:
        self.parts.append((description, total))

    def advance(self, amount: float, note: str = "") -> None:
        self.amounts.append((amount, note))


@pytest.fixture(scope="module")
def generators(digits_run) -> dict[str, Generator]:
    one = Generator.load(digits_run, seed=3, batch_size=25)
    other = Generator.load(digits_run, seed=3, batch_size=25)
    with torch.no_grad():
        for parameter in other.model.network.parameters():
            parameter.mul_(0.9)
    return {"one": one, "other": other}


@pytest.fixture(scope="module")
def grid(generators, metrics) -> Grid:
    return evaluate_grid(generators, ["ddim", "iddpm"], [2, 4], NUM, metrics, Accelerator(cpu=True), keep=9)


def features_of(extractor, dataset_images: torch.Tensor) -> np.ndarray:
    return extractor(dataset_images).double().numpy()


def test_it_has_every_cell_and_every_pair(grid):
    cells = [(c.checkpoint, c.sampler, c.steps, c.n) for c in grid.cells]
    assert sorted(cells) == sorted((c, s, k, NUM) for c in ("one", "other") for s in ("ddim", "iddpm") for k in (2, 4))
    assert [(d.checkpoint, d.baseline) for d in grid.differences] == [("other", "one")] * 4


def test_a_cell_is_scipys_fid_of_the_images(grid, generators, extractor):
    """Sampled again by hand, with the covariance by numpy and the root by scipy."""
    images = torch.cat([i for _, i in replace(generators["one"], sampler="iddpm", steps=4).images(range(NUM))])
    made = features_of(extractor, images)
    dataset = load_dataset("digits")
    real = features_of(extractor, dataset.__getitems__(range(len(dataset)))[0])
    a, b = np.cov(made, rowvar=False), np.cov(real, rowvar=False)
    root = scipy.linalg.sqrtm(a @ b).real
    fid = ((made.mean(0) - real.mean(0)) ** 2).sum() + np.trace(a + b - 2 * root)
    cell = next(c for c in grid.cells if (c.checkpoint, c.sampler, c.steps) == ("one", "iddpm", 4))
    # The images are fewer than the features: scipy's root of a singular matrix is good to some five digits.
    assert cell.values["fid"] == pytest.approx(fid, rel=1e-4)


def test_differences_are_of_the_cells_and_narrower_than_independent_ones(grid):
    fid = {(c.checkpoint, c.sampler, c.steps): c for c in grid.cells}
    for d in grid.differences:
        one, other = fid["one", d.sampler, d.steps], fid["other", d.sampler, d.steps]
        assert d.number == "fid"
        assert d.value == pytest.approx(other.values["fid"] - one.values["fid"])
        assert d.relative == pytest.approx(other.values["fid"] / one.values["fid"] - 1)
        assert d.interval[0] < d.value < d.interval[1]
        assert d.relative_interval is not None
        assert -1 < d.relative_interval[0] < d.relative < d.relative_interval[1]
        assert d.record()["relative_ci"] == list(d.relative_interval)


def test_a_checkpoint_does_not_differ_from_itself(generators, metrics):
    twice = {"a": generators["one"], "b": generators["one"]}
    (found,) = evaluate_grid(twice, ["iddpm"], [2], 20, metrics, Accelerator(cpu=True)).differences
    assert found.value == 0
    assert found.interval == (0, 0)
    assert found.relative_interval == (0, 0)


def test_a_difference_to_a_fid_of_0_has_no_ratio(grid):
    cell = grid.cells[0]
    (found,) = differences(cell, replace(cell, values={"fid": 0.0}))
    assert (found.value, found.relative, found.relative_interval) == (cell.values["fid"], None, None)
    assert found.text() == f"+{found.value:.2f} (" + found.text().split("(")[1], "the difference in place of the ratio"


def test_a_number_of_one_of_two_cells_has_no_difference(grid):
    cell = grid.cells[0]
    assert len(differences(cell, cell)) == 1
    assert differences(cell, replace(cell, replicates={})) == []
    assert differences(cell, replace(cell, values={"kid": 0.0})) == []


def test_the_record_of_a_cell(grid):
    cell = grid.cells[0]
    record = cell.record()
    assert list(record) == [
        "checkpoint", "sampler", "steps", "n", "fid", "fid_ci", "fid_corrected", "fid_mean_term", "kid", "kid_se",
        "precision", "recall", "brightness", "blocks", "seconds",
    ]  # fmt: skip
    assert (record["fid"], tuple(record["fid_ci"])) == (cell.values["fid"], cell.intervals["fid"])


def test_images_that_are_there_are_measured_as_those_of_a_generator(grid, generators, metrics):
    images = torch.cat([i for _, i in replace(generators["one"], sampler="ddim", steps=2).images(range(NUM))])
    order = np.argsort(fixed_order(NUM))  # so that they are measured in the order of the generator
    dataset = ArrayDataset("images", images[order].permute(0, 2, 3, 1).numpy())
    told = Told()
    cell = evaluate_images("images", dataset, NUM, metrics, Accelerator(cpu=True), batch_size=25, progress=told)
    assert told.parts == [("images", NUM)]
    assert [amount for amount, _ in told.amounts] == [25, 25, 10]
    same = next(c for c in grid.cells if (c.checkpoint, c.sampler, c.steps) == ("one", "ddim", 2))
    assert (cell.checkpoint, cell.sampler, cell.steps, cell.n) == ("images", "file", None, NUM)
    assert dict(cell.values) == pytest.approx(dict(same.values), rel=1e-4)
    assert cell.intervals["fid"] == pytest.approx(same.intervals["fid"], rel=1e-4)


def test_fewer_images_than_there_are_are_a_sample_of_all_with_their_own_labels_and_captions():
    labels = np.repeat(np.arange(4), 50)  # as the subfolders of a folder
    pixels = np.broadcast_to(labels[:, None, None, None].astype(np.uint8), (200, 2, 2, 1))
    dataset = ArrayDataset("images", pixels, labels)
    batches: list[Any] = []
    recorded = SimpleNamespace(
        reset=lambda: None,
        update=lambda *batch: batches.append(batch),
        result=lambda what: Measured({}, {}, {}, {}),
    )
    texts = [f"caption of {label}" for label in labels]
    evaluate_images("images", dataset, 60, recorded, Accelerator(cpu=True), batch_size=25, captions=texts)
    assert [start for _, start, *_ in batches] == [0, 25, 50]
    classes = torch.cat([classes for *_, classes, _ in batches])
    assert len(classes) == 60
    assert min(torch.bincount(classes, minlength=4)) > 5
    for images, _, own, captions in batches:
        assert images[:, 0, 0, 0].tolist() == own.tolist()
        assert captions == [f"caption of {label}" for label in own.tolist()]


def test_it_keeps_the_first_images(grid, generators):
    first = torch.cat([i for _, i in replace(generators["other"], sampler="ddim", steps=2).images(range(25))])[:9]
    assert torch.equal(grid.samples["other", "ddim", 2], first)


def test_replicates_are_computed_once_for_the_interval_and_the_differences(generators, metrics, monkeypatch):
    computed, bootstrap = [], fid_module.bootstrap_frechet

    def counted(*arguments, **more):
        computed.append(bootstrap(*arguments, **more))
        return computed[-1]

    monkeypatch.setattr(fid_module, "bootstrap_frechet", counted)
    generator = replace(generators["one"], steps=2)
    cell, images = evaluate_cell("one", generator, 20, metrics, Accelerator(cpu=True), keep=20)
    assert len(computed) == 1
    assert np.array_equal(computed[0], cell.replicates["fid"])
    assert cell.intervals["fid"] == interval(cell.values["fid"], cell.replicates["fid"], cell.blocks["fid"], log=True)
    assert cell.values["brightness"] == pytest.approx(images.double().mean().item())


@pytest.mark.parametrize(
    ("samplers", "steps", "word"), [(["ddim", "plms"], [2], "plms"), (["ddim"], [2, 5000], "5000")]
)
def test_it_checks_before_it_works(generators, metrics, samplers, steps, word):
    told = Told()
    with pytest.raises(InputError, match=word):
        evaluate_grid(generators, samplers, steps, 8, metrics, Accelerator(cpu=True), progress=told)
    assert not told.parts


def test_progress_is_in_network_evaluations_and_names_the_cell(generators, metrics):
    told = Told()
    evaluate_grid(generators, ["ddim"], [1, 3], 30, metrics, Accelerator(cpu=True), progress=told)
    assert told.parts == [("network evaluations", 2 * (1 + 3) * 30)]
    assert told.amounts[:2] == [(25, "one · ddim 1"), (5, "one · ddim 1")]
    assert told.amounts[-1] == (15, "other · ddim 3")
    assert sum(amount for amount, _ in told.amounts) == told.parts[0][1]


@pytest.mark.parametrize("fails", [False, True])
def test_processes_share_the_images_and_each_has_the_numbers_of_all(grid, generators, metrics, monkeypatch, fails):
    """Two processes, one after the other: the first gets the images of the second, which is sent the numbers."""
    generator = replace(generators["one"], sampler="ddim", steps=2)
    states: list[bytes] = []
    numbers: list[bytes] = []

    def of_others(state: object, process: SimpleNamespace) -> Iterator[object]:
        if process.is_main_process:
            yield from map(pickle.loads, states)
        states.append(pickle.dumps(state))

    def from_main(value: object) -> object:
        numbers.append(pickle.dumps(value))
        return pickle.loads(numbers[-1])

    monkeypatch.setattr(grid_module, "of_others", of_others)
    monkeypatch.setattr(grid_module, "from_main", from_main)
    processes = [
        SimpleNamespace(process_index=rank, num_processes=2, device=torch.device("cpu"), is_main_process=rank == 0)
        for rank in (0, 1)
    ]
    told = Told()
    with pytest.raises(AssertionError):  # there is no main process that computed the numbers yet
        evaluate_cell("one", generator, NUM, metrics, processes[1], 9, told)
    assert sum(amount for amount, _ in told.amounts) == NUM
    if fails:
        monkeypatch.setattr(metrics, "result", lambda what: check_finite(what, {"fid": math.nan}))
        with pytest.raises(RunError, match=r"one, ddim 2: fid is nan"):
            evaluate_cell("one", generator, NUM, metrics, processes[0], 9)
        assert isinstance(pickle.loads(numbers[-1]), RunError)  # which the others raise as well
        return
    cell, images = evaluate_cell("one", generator, NUM, metrics, processes[0], 9)
    assert len(images) == 9
    same = next(c for c in grid.cells if (c.checkpoint, c.sampler, c.steps) == ("one", "ddim", 2))
    assert dict(cell.values) == pytest.approx(dict(same.values), rel=1e-4)
    assert cell.n == NUM
    monkeypatch.setattr(grid_module, "from_main", lambda _: pickle.loads(numbers[-1]))
    other, images = evaluate_cell("one", generator, NUM, metrics, processes[1], 9)
    assert other.values == cell.values
    assert len(images) == 0


def test_calls_beside_are_made_in_their_order_in_one_other_thread():
    made, threads, first = [], set(), threading.Event()

    def work(number: int) -> None:
        if number == 0:
            assert first.wait(60), "the first call returns before it is made"
        threads.add(threading.get_ident())
        made.append(number)

    with grid_module._beside(work, None) as call:
        call(0)
        first.set()
        for number in range(1, 5):
            call(number)
            assert made[:number] == list(range(number)), "those before are made"
    assert made == [0, 1, 2, 3, 4]
    assert len(threads) == 1
    assert threading.get_ident() not in threads


@pytest.mark.parametrize("wrong", [0, 2])
def test_an_error_beside_is_raised(wrong):
    def work(number: int) -> None:
        made.append(number)
        if number == wrong:
            raise InputError("these images are wrong")

    made: list[int] = []
    with pytest.raises(InputError, match="these images are wrong"), grid_module._beside(work, None) as call:  # noqa: PT012
        for number in range(3):
            call(number)
    assert made == list(range(wrong + 1)), "nothing is measured after it"


def test_a_cell_measured_beside_the_sampling_is_the_same(generators, metrics, monkeypatch):
    generator = replace(generators["one"], sampler="ddim", steps=2)
    cell, images = evaluate_cell("one", generator, NUM, metrics, Accelerator(cpu=True))
    on_gpu = SimpleNamespace(device=SimpleNamespace(type="cuda"), process_index=0, num_processes=1)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    other, again = evaluate_cell("one", generator, NUM, metrics, on_gpu)
    assert torch.equal(images, again)
    assert replace(cell, seconds=0.0) == replace(other, seconds=0.0)
    assert np.array_equal(cell.replicates["fid"], other.replicates["fid"])
