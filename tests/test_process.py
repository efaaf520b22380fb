"""The forward process: a perturbation is a change of noise; tables against diffusers and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from robustdiff.process import PREDICTIONS, DiffusionProcess

PROCESSES = {
    "cosine": DiffusionProcess.cosine(1000),
    "linear": DiffusionProcess.linear(1000),
    "flow": DiffusionProcess.flow(100),
}


def gaussian(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", PROCESSES)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), fraction=st.floats(0, 0.999))
def test_moving_the_point_is_changing_the_noise(name, seed, fraction):
    process = PROCESSES[name]
    t = torch.full((3,), int(fraction * len(process)))
    x0, noise, delta = (gaussian(seed + i, 3, 2, 4) for i in range(3))
    moved = process.diffuse(x0, t, noise) + delta
    torch.testing.assert_close(process.diffuse(x0, t, process.absorb(noise, t, delta)), moved, rtol=1e-9, atol=1e-9)


def test_delta_is_detached():
    process = PROCESSES["cosine"]
    delta = torch.ones(1, 2, requires_grad=True)
    assert not process.absorb(torch.zeros(1, 2), torch.tensor([5]), delta).requires_grad


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_target_is_split_back_into_image_and_noise(name, prediction):
    process = PROCESSES[name]
    t = torch.tensor([0, len(process) // 2, int((process.alphas > 0).nonzero().max())])
    x0, noise = gaussian(0, 3, 5), gaussian(1, 3, 5)
    x_t = process.diffuse(x0, t, noise)
    split = process.split(prediction, x_t, t, process.target(prediction, x0, t, noise))
    torch.testing.assert_close(split[0], x0, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(split[1], noise, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("prediction", ["sample", "v_prediction", "flow"])
def test_a_target_is_split_even_where_no_signal_is_left(prediction):
    process, t = PROCESSES["flow"], torch.tensor([99, 99])
    assert process.alphas[99] == 0
    x0, noise = gaussian(0, 2, 5), gaussian(1, 2, 5)
    split = process.split(prediction, process.diffuse(x0, t, noise), t, process.target(prediction, x0, t, noise))
    torch.testing.assert_close(split, (x0, noise), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "schedule"), [("cosine", "squaredcos_cap_v2"), ("linear", "linear")]
)  # fmt: skip
def test_tables_are_those_of_diffusers(name, schedule):
    scheduler = DDPMScheduler(1000, beta_schedule=schedule)
    mine, theirs = PROCESSES[name], DiffusionProcess.from_scheduler(scheduler)
    # theirs are products of a thousand float32 numbers
    torch.testing.assert_close(mine.alphas, theirs.alphas, rtol=2e-4, atol=1e-6)
    torch.testing.assert_close(mine.sigmas, theirs.sigmas, rtol=2e-4, atol=1e-6)
    x0, noise, t = torch.randn(4, 3), torch.randn(4, 3), torch.tensor([0, 10, 500, 999])
    torch.testing.assert_close(mine.diffuse(x0, t, noise), scheduler.add_noise(x0, noise, t), rtol=1e-3, atol=1e-4)
    velocity = scheduler.get_velocity(x0, noise, t)
    torch.testing.assert_close(mine.target("v_prediction", x0, t, noise), velocity, rtol=1e-3, atol=1e-4)


def test_any_scheduler_with_alphas_cumprod_is_a_process():
    scheduler = DDIMScheduler(50, trained_betas=np.linspace(0.01, 0.2, 50).tolist())
    process = DiffusionProcess.from_scheduler(scheduler)
    assert len(process) == 50
    np.testing.assert_allclose(process.betas, np.linspace(0.01, 0.2, 50), rtol=1e-4)
    with pytest.raises(ValueError, match="alphas_cumprod"):
        DiffusionProcess.from_scheduler(FlowMatchEulerDiscreteScheduler())


@pytest.mark.parametrize("T", [100, 250, 4000])
def test_linear_betas_are_scaled_to_the_number_of_times(T):
    expected = np.linspace(0.1 / T, 20 / T, T)
    np.testing.assert_allclose(DiffusionProcess.linear(T).betas, expected, rtol=1e-8)


def test_flow_is_a_straight_line():
    process = DiffusionProcess.flow(4)
    assert process.alphas.tolist() == [0.75, 0.5, 0.25, 0.0]
    assert process.sigmas.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert process.times.tolist() == [250, 500, 750, 1000]
    assert not process.variance_preserving


def test_the_posterior_is_gaussian_conditioning():
    """q(x_{t−1} | x_t, x_0) from the joint covariance of (x_{t−1}, x_t) given x_0, for two neighbouring times."""
    process = PROCESSES["linear"]
    a, betas = np.cumprod(1 - process.betas.numpy()), process.betas.numpy()
    for time in (1, 2, 400, 999):
        s = time - 1
        cov = np.array([[1 - a[s], math.sqrt(1 - betas[time]) * (1 - a[s])], [0, 1 - a[time]]])
        gain = cov[0, 1] / cov[1, 1]
        x0, x_t = 0.7, -0.4
        mean = math.sqrt(a[s]) * x0 + gain * (x_t - math.sqrt(a[time]) * x0)
        variance = cov[0, 0] - gain * cov[0, 1]
        got = process.posterior_mean(
            *(torch.tensor([[v]], dtype=torch.float64) for v in (x0, x_t)), torch.tensor([time])
        )
        assert got.item() == pytest.approx(mean, rel=1e-9)
        assert process.posterior_variance[time].item() == pytest.approx(variance, rel=1e-9)
        low, high = process.log_variance_range
        assert low[time].item() == pytest.approx(math.log(variance))
        assert high[time].item() == pytest.approx(math.log(betas[time]))
    assert process.posterior_variance[0] == 0
    assert process.log_variance_range[0][0] == process.log_variance_range[0][1]


def test_the_posterior_is_bayes_rule_on_a_grid():
    """q(x_{t−1} | x_t, x_0) ∝ q(x_t | x_{t−1}) q(x_{t−1} | x_0), both densities written out and summed."""
    betas = np.linspace(0.05, 0.6, 8)
    process = DiffusionProcess.from_betas(torch.from_numpy(betas))
    grid, x0, x_t = np.linspace(-12, 12, 20_001), 0.7, -0.4
    for time in range(1, 8):
        share = np.prod(1 - betas[:time])
        log_density = -((grid - math.sqrt(share) * x0) ** 2) / (2 * (1 - share))
        log_density -= (x_t - math.sqrt(1 - betas[time]) * grid) ** 2 / (2 * betas[time])
        density = np.exp(log_density - log_density.max())
        density /= density.sum()
        mean = (density * grid).sum()
        x = [torch.tensor([[value]], dtype=torch.float64) for value in (x0, x_t)]
        assert process.posterior_mean(*x, torch.tensor([time])).item() == pytest.approx(mean, abs=1e-9)
        variance = (density * (grid - mean) ** 2).sum()
        assert process.posterior_variance[time].item() == pytest.approx(variance, rel=1e-9)


def test_at_time_zero_the_posterior_is_the_image():
    x0, x_t = gaussian(0, 1, 4), gaussian(1, 1, 4)
    torch.testing.assert_close(PROCESSES["cosine"].posterior_mean(x0, x_t, torch.tensor([0])), x0)


def test_a_process_of_one_time_has_one_variance():
    low, high = DiffusionProcess.from_betas(torch.tensor([0.3])).log_variance_range
    assert low.item() == high.item() == pytest.approx(math.log(0.3))


@settings(max_examples=25, deadline=None)
@given(indices=st.lists(st.integers(0, 999), min_size=1, max_size=20, unique=True).map(sorted))
def test_a_respaced_process_has_the_same_levels(indices):
    process = PROCESSES["cosine"].respace(torch.tensor(indices))
    torch.testing.assert_close(torch.cumprod(1 - process.betas, 0), PROCESSES["cosine"].alphas_cumprod[indices])
    assert process.times.tolist() == indices


def test_respacing_twice_keeps_what_the_network_is_told():
    process = PROCESSES["flow"].respace(torch.arange(9, 100, 10)).respace(torch.tensor([0, 4, 9]))
    assert process.times.tolist() == pytest.approx([100, 500, 1000])
    assert process.sigmas.tolist() == pytest.approx([0.1, 0.5, 1])


@pytest.mark.parametrize(
    ("alphas", "sigmas"),
    [
        ([], []),
        ([1.0], [0.5, 0.5]),
        ([[1.0]], [[0.5]]),
        ([math.nan], [1.0]),
        ([1.0], [0.0]),
        ([-1.0], [1.0]),
        ([1.0], [math.inf]),
    ],
)
def test_bad_tables_are_refused(alphas, sigmas):
    with pytest.raises(ValueError, match="alpha"):
        DiffusionProcess(torch.tensor(alphas), torch.tensor(sigmas))


def test_an_unknown_prediction_is_named():
    x, t = torch.zeros(1, 1), torch.zeros(1, dtype=torch.long)
    for method in (PROCESSES["cosine"].target, PROCESSES["cosine"].split):
        with pytest.raises(ValueError, match="score"):
            method("score", x, t, x)
