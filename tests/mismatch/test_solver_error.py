"""The local error against Gaussian data, where each solver's step and the trajectory are known scalings."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from robustdiff.backbones.model import load_model
from robustdiff.data import DataConfig
from robustdiff.errors import InputError
from robustdiff.mismatch.solver_error import (
    LocalError,
    fitted_order,
    integrate,
    measure_solver_error,
    measure_teacher,
)
from robustdiff.objectives.preconditioning import karras_sigmas
from robustdiff.report.solver_error import solver_error_figure, solver_error_table

STD = 0.6


def gaussian(x, sigma, **condition):
    s = sigma.reshape(-1, *(1,) * (x.ndim - 1))
    return STD**2 / (STD**2 + s**2) * x


def images(n=40):
    return STD * torch.randn(n, 1, 6, 6, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def factors(solver, upper, lower):
    """By what a step, and the flow, scale x; written out."""

    def rate(s):
        return s / (STD**2 + s**2)

    exact = math.sqrt((STD**2 + lower**2) / (STD**2 + upper**2))
    end = 1 + (lower - upper) * rate(upper)
    if solver == "euler":
        return end, exact
    return 1 + (lower - upper) / 2 * (rate(upper) + rate(lower) * end), exact


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_the_error_is_that_of_the_scaling(solver):
    x0 = images()
    errors = measure_solver_error(gaussian, x0, [12], [solver], points=5, substeps=60, batch_size=16)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)).double()
    sigmas = karras_sigmas(12)
    assert [e.n for e in errors] == [0, 2, 5, 8, 10]
    for e in errors:
        assert (e.lower, e.upper) == (sigmas[e.n].item(), sigmas[e.n + 1].item())
        step, exact = factors(solver, e.upper, e.lower)
        x = x0 + e.upper * noise
        sizes = (x.square().mean((1, 2, 3)).sqrt() * abs(step - exact)).numpy()
        assert e.rms == pytest.approx(np.sqrt(np.mean(sizes**2)), rel=1e-3)
        assert e.quantiles == pytest.approx(tuple(np.quantile(sizes, [0.05, 0.5, 0.95])), rel=1e-3)
        assert e.reference < 1e-3 * e.rms


@pytest.mark.parametrize(("solver", "order"), [("euler", 2), ("heun", 3)])
def test_the_error_falls_with_the_order_of_the_method(solver, order):
    errors = measure_solver_error(gaussian, images(8), [160, 320, 640], [solver], points=6, substeps=16)
    assert fitted_order(errors) == pytest.approx(order, abs=0.15)


def test_the_reference_halves_its_steps_and_finds_its_own_error():
    x = 3 * images(4)
    exact = math.sqrt((STD**2 + 1.0) / (STD**2 + 9.0)) * x
    coarse, fine = (integrate(gaussian, x, 3.0, 1.0, steps) for steps in (8, 16))
    assert (coarse - exact).norm() / (fine - exact).norm() == pytest.approx(4, rel=0.1)
    (e,) = measure_solver_error(
        gaussian, images(4), [2], ["heun"], points=2, substeps=8, sigma_min=1.0, sigma_max=3.0
    )  # fmt: skip
    noise = torch.randn(4, 1, 6, 6, generator=torch.Generator().manual_seed(0)).double()
    x = images(4) + 3.0 * noise
    own = integrate(gaussian, x, 3.0, 1.0, 8) - integrate(gaussian, x, 3.0, 1.0, 16)
    assert e.reference == pytest.approx(own.square().mean().sqrt().item(), rel=1e-6)


def test_batches_change_nothing_and_all_solvers_share_images_and_noise():
    one = measure_solver_error(gaussian, images(10), [6], ["euler", "heun"], points=3, batch_size=10)
    other = measure_solver_error(gaussian, images(10), [6], ["heun"], points=3, batch_size=3)
    for a, b in zip([e for e in one if e.solver == "heun"], other, strict=True):
        assert a.rms == pytest.approx(b.rms, rel=1e-9)
        assert a.quantiles == pytest.approx(b.quantiles, rel=1e-9)


def test_labels_reach_the_teacher_with_their_images():
    seen = []

    def denoise(x, sigma, class_labels):
        seen.append(class_labels)
        assert len(class_labels) == len(x)
        return gaussian(x, sigma)

    labels = torch.arange(10)
    measure_solver_error(
        denoise, images(10), [2], ["euler"], points=1, substeps=2, batch_size=4, condition={"class_labels": labels}
    )
    assert {tuple(s.tolist()) for s in seen} == {(0, 1, 2, 3), (4, 5, 6, 7), (8, 9)}


def test_differences_become_float64_on_the_cpu_only():
    """Not every device has float64."""
    order = []

    class Recorded(torch.Tensor):
        def cpu(self):
            order.append("cpu")
            return super().cpu()

        def double(self):
            order.append("double")
            return super().double()

    x = images(3).float().as_subclass(Recorded)
    measure_solver_error(lambda x, sigma: gaussian(x, sigma).as_subclass(Recorded), x, [2], ["euler"], substeps=2)
    assert order == ["cpu", "double"] * 2


def error(N, rms, reference=0.0, position=0.5):
    return LocalError("heun", N, 1, position, 2.0, 1.0, rms, (rms, rms, rms), reference)


def test_the_order_is_fitted_to_what_is_above_the_reference():
    falling = [error(N, 7.0 * N**-3.0, position=p) for N in (10, 20, 40) for p in (0.1, 0.9)]
    assert fitted_order(falling) == pytest.approx(3)
    floor = [error(80, 1e-4, 1e-4, p) for p in (0.1, 0.9)]
    assert fitted_order([*falling, *floor]) == pytest.approx(3)
    assert fitted_order([*falling, *(replace(e, reference=0.0) for e in floor)]) < 2.9
    assert fitted_order(floor) is None
    assert fitted_order(falling[:2]) is None, "one N has no order"


def test_the_levels_are_those_of_the_teacher(tmp_path):
    model = load_model("fashion-16-edm")
    model.scheduler.register_to_config(sigma_max=20.0)
    model.save(tmp_path / "edm")
    source, cpu = DataConfig(name="fashion-16"), torch.device("cpu")
    result = measure_teacher(str(tmp_path / "edm"), source, cpu, [3], ["heun"], 2, substeps=2)
    assert max(e.upper for e in result.errors) == 20
    with pytest.raises(InputError, match=r"has levels up to 20 and is asked up to 80: lower sigma_max"):
        measure_teacher(str(tmp_path / "edm"), source, cpu, [3], ["heun"], 2, substeps=2, sigma_max=80.0)


def test_table_and_figure():
    errors = measure_solver_error(gaussian, images(4), [6, 12], ["euler", "heun"], points=4, substeps=4)
    table = solver_error_table(errors)
    assert table.row_count == 4
    assert "euler N^-" in str(table.caption)
    # The positions 0, 1/3, 2/3 and 1, which are the pairs 0, 1, 3, 4 of five and 0, 3, 7, 10 of eleven.
    pairs = [(0, 0), (1, 3), (3, 7), (4, 10)]
    levels = [(karras_sigmas(6)[a] * karras_sigmas(12)[b]).sqrt().item() for a, b in pairs]
    headers = ["", *(f"σ ≈ {level:.2g}" for level in levels), "reference"]
    assert [str(column.header) for column in table.columns] == headers
    figure = solver_error_figure(errors, "title")
    assert [axis.get_title().split(":")[0] for axis in figure.axes] == ["euler", "heun"]
    assert len(figure.axes[0].get_lines()) == 4
