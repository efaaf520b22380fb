"""The grid: its cells are what sampling and measuring by hand give, its differences are paired."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import torch
from accelerate import Accelerator
from robustdiff.evaluation.features import load_extractor
from robustdiff.evaluation.fidelity import interval, reference_statistics

from robustdiff.data import ArrayDataset, load_dataset
from robustdiff.errors import InputError
from robustdiff.evaluation import fidelity
from robustdiff.evaluation.generate import Generator
from robustdiff.evaluation.grid import Grid, difference, evaluate_cell, evaluate_grid, evaluate_images

NUM = 60


@pytest.fixture(scope="module")
def extractor():
    return load_extractor("digits")


@pytest.fixture(scope="module")
def generators(digits_run) -> dict[str, Generator]:
    one = Generator.load(digits_run, seed=3, batch_size=25)
    other = Generator.load(digits_run, seed=3, batch_size=25)
    with torch.no_grad():
        for parameter in other.unet.parameters():
            parameter.mul_(0.9)
    return {"one": one, "other": other}


@pytest.fixture(scope="module")
def grid(generators, extractor, tmp_path_factory) -> Grid:
    reference = reference_statistics(load_dataset("digits"), extractor, tmp_path_factory.mktemp("cache"))
    return evaluate_grid(
        generators, ["ddim", "iddpm"], [2, 4], NUM, extractor, reference, Accelerator(cpu=True), keep=9
    )


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
    assert cell.fid == pytest.approx(fid, rel=1e-4)


def test_differences_are_of_the_cells_and_narrower_than_independent_ones(grid):
    fid = {(c.checkpoint, c.sampler, c.steps): c for c in grid.cells}
    for d in grid.differences:
        one, other = fid["one", d.sampler, d.steps], fid["other", d.sampler, d.steps]
        assert d.fid == pytest.approx(other.fid - one.fid)
        assert d.relative == pytest.approx(other.fid / one.fid - 1)
        assert d.fid_ci[0] < d.fid < d.fid_ci[1]


def test_a_checkpoint_does_not_differ_from_itself(generators, extractor, tmp_path):
    reference = reference_statistics(load_dataset("digits"), extractor, tmp_path)
    twice = {"a": generators["one"], "b": generators["one"]}
    (found,) = evaluate_grid(twice, ["iddpm"], [2], 20, extractor, reference, Accelerator(cpu=True)).differences
    assert found.fid == 0
    assert found.fid_ci == (0, 0)


def test_a_difference_to_a_fid_of_0_has_no_ratio(grid):
    cell, replicates = grid.cells[0], np.array([1.0, 2.0])
    found = difference(cell, replicates, replace(cell, fid=0.0), replicates)
    assert (found.fid, found.relative) == (cell.fid, None)


def test_images_that_are_there_are_measured_as_those_of_a_generator(grid, generators, extractor, tmp_path):
    images = torch.cat([i for _, i in replace(generators["one"], sampler="ddim", steps=2).images(range(NUM))])
    dataset = ArrayDataset("images", images.permute(0, 2, 3, 1).numpy())
    reference = reference_statistics(load_dataset("digits"), extractor, tmp_path)
    counts: list[int] = []
    cell = evaluate_images(
        "images", dataset, NUM, extractor, reference, Accelerator(cpu=True), batch_size=25, on_images=counts.append
    )
    assert counts == [25, 25, 10]
    same = next(c for c in grid.cells if (c.checkpoint, c.sampler, c.steps) == ("one", "ddim", 2))
    assert (cell.checkpoint, cell.sampler, cell.steps, cell.n) == ("images", "file", None, NUM)
    for metric in ("fid", "fid_ci", "kid", "kid_se", "precision", "recall", "brightness"):
        assert getattr(cell, metric) == pytest.approx(getattr(same, metric), rel=1e-4), metric


def test_it_keeps_the_first_images(grid, generators):
    first = torch.cat([i for _, i in replace(generators["other"], sampler="ddim", steps=2).images(range(25))])[:9]
    assert torch.equal(grid.samples["other", "ddim", 2], first)


def test_replicates_are_computed_once_for_the_interval_and_the_differences(
    generators, extractor, tmp_path, monkeypatch
):
    reference = reference_statistics(load_dataset("digits"), extractor, tmp_path)
    distances, frechet = [], fidelity._frechet

    def counted(mean, *arguments):
        distances.append(len(mean))
        return frechet(mean, *arguments)

    monkeypatch.setattr(fidelity, "_frechet", counted)
    generator = replace(generators["one"], steps=2)
    cell, replicates, images = evaluate_cell("one", generator, 20, extractor, reference, Accelerator(cpu=True), keep=20)
    assert sum(distances) == 1 + len(replicates)
    assert cell.fid_ci == interval(cell.fid, replicates)
    assert cell.brightness == pytest.approx(images.double().mean().item())


@pytest.mark.parametrize(
    ("samplers", "steps", "word"), [(["ddim", "plms"], [2], "plms"), (["ddim"], [2, 5000], "5000")]
)
def test_it_checks_before_it_works(generators, extractor, tmp_path, samplers, steps, word):
    reference = reference_statistics(load_dataset("digits"), extractor, tmp_path)
    worked = []
    with pytest.raises(InputError, match=word):
        evaluate_grid(
            generators, samplers, steps, 8, extractor, reference, Accelerator(cpu=True),
            on_images=lambda n, cell: worked.append(n),
        )  # fmt: skip
    assert not worked
