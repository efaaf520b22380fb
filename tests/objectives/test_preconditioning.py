"""Preconditioning: the boundary, the published coefficients, and Gaussian data, whose denoiser is known."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from diffusers import CMStochasticIterativeScheduler, EDMEulerScheduler
from hypothesis import given
from hypothesis import strategies as st

from robustdiff import DiffusionProcess, sample
from robustdiff.objectives.preconditioning import (
    DiffusionDenoiser,
    OverTimes,
    Preconditioned,
    karras_process,
    karras_sigmas,
)

STD = 0.6


def gaussian(x, sigma):
    """D(x, σ) = E[x_0 | x] where x_0 ~ N(0, STD² I)."""
    s = sigma.reshape(-1, *(1,) * (x.ndim - 1))
    return STD**2 / (STD**2 + s**2) * x


def points(n=5, dtype=torch.float64):
    return torch.randn(n, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=dtype)


# -- levels ---------------------------------------------------------------------------------------------------


@given(st.integers(2, 200), st.floats(1e-3, 0.1), st.floats(1.0, 200.0), st.floats(1.0, 10.0))
def test_levels_are_uniform_in_their_root(N, low, high, rho):
    sigmas = karras_sigmas(N, low, high, rho)
    assert sigmas.shape == (N,)
    assert (sigmas[0].item(), sigmas[-1].item()) == (low, high)
    roots = sigmas.numpy() ** (1 / rho)
    np.testing.assert_allclose(roots, np.linspace(roots[0], roots[-1], N), rtol=1e-9)


def test_levels_are_diffusers_own():
    scheduler = CMStochasticIterativeScheduler(num_train_timesteps=40)
    np.testing.assert_allclose(karras_sigmas(40).flip(0), scheduler.sigmas, rtol=1e-12)


@pytest.mark.parametrize("arguments", [(1,), (5, 0.0), (5, 2.0, 1.0), (5, 0.1, 1.0, 0.0)])
def test_levels_that_do_not_ascend_are_refused(arguments):
    with pytest.raises(ValueError, match="sigma_min"):
        karras_sigmas(*arguments)


def test_the_process_gives_the_network_the_level_itself():
    process = karras_process(karras_sigmas(7))
    assert (process.alphas == 1).all()
    assert torch.equal(process.times, process.sigmas)


# -- networks as denoisers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_boundary_is_the_identity_exactly(dtype):
    x = points(dtype=dtype)
    f = Preconditioned(lambda x, t: 1e6 * torch.ones_like(x), sigma_min=0.002)
    sigma = karras_sigmas(18)[torch.zeros(5, dtype=torch.long)].to(dtype)
    assert torch.equal(f(x, sigma), x)


def test_the_network_is_called_with_scaled_points_at_250_ln_sigma():
    seen = []

    def network(x, t, class_labels):
        seen.append((x, t, class_labels))
        return torch.zeros_like(x)

    x, sigma, labels = points(3), torch.tensor([0.002, 1.0, 80.0], dtype=torch.float64), torch.tensor([1, 2, 3])
    Preconditioned(network, sigma_data=0.7)(x, sigma, class_labels=labels)
    ((scaled, t, given_labels),) = seen
    torch.testing.assert_close(scaled, x / torch.sqrt(sigma**2 + 0.49)[:, None, None, None])
    torch.testing.assert_close(t, 250 * sigma.log())
    assert given_labels is labels


def test_coefficients_are_diffusers_own():
    x, output = points(4), points(4).flip(0)
    sigma = torch.tensor([0.002, 0.3, 5.0, 80.0], dtype=torch.float64)
    s = sigma[:, None, None, None]
    cm, edm = CMStochasticIterativeScheduler(sigma_data=0.7), EDMEulerScheduler(sigma_data=0.7)
    c_skip, c_out = cm.get_scalings_for_boundary_condition(s)
    consistency = Preconditioned(lambda x, t: output, 0.7, 0.002)(x, sigma)
    torch.testing.assert_close(consistency, c_skip * x + c_out * output)
    denoised = Preconditioned(lambda x, t: output, 0.7)(x, sigma)
    torch.testing.assert_close(denoised, edm.precondition_outputs(x, output, s))


def test_times_and_levels_of_bfloat16_points_are_not_rounded():
    seen, levels = [], []
    sigmas = karras_sigmas(40)
    x = points(40, torch.bfloat16)

    def network(x, t):
        seen.append(t)
        return x

    def denoise(x, sigma):
        levels.append(sigma)
        return x

    process = DiffusionProcess.cosine(1000)
    outputs = [
        Preconditioned(network)(x, sigmas.float()),
        DiffusionDenoiser(network, process)(x, sigmas.float()),
        OverTimes(denoise)(x, sigmas),
    ]
    assert [o.dtype for o in outputs] == [torch.bfloat16] * 3
    assert all(s.dtype == torch.float32 for s in (*seen, *levels))
    torch.testing.assert_close(seen[0].double(), 250 * sigmas.log(), rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(
        seen[1].double(), DiffusionDenoiser(network, process).times(sigmas), rtol=1e-5, atol=1e-3
    )
    torch.testing.assert_close(levels[0].double(), sigmas, rtol=1e-6, atol=0)


def test_channels_of_a_variance_are_left_out():
    x, sigma = points(2), torch.ones(2, dtype=torch.float64)
    alone = Preconditioned(lambda x, t: x)(x, sigma)
    both = Preconditioned(lambda x, t: torch.cat([x, 9 * x], 1))(x, sigma)
    assert torch.equal(alone, both)


# -- discrete times and levels --------------------------------------------------------------------------------


def diffusion_network(process, prediction):
    """The best network for N(0, STD² I), at fractional times by its own interpolation of the table."""
    ratios = np.log((process.sigmas / process.alphas).numpy())

    def network(x, t):
        s = torch.from_numpy(np.exp(np.interp(t.double().numpy(), np.arange(len(ratios)), ratios)))
        s = s[:, None, None, None]
        alpha, sigma = (1 + s**2) ** -0.5, s * (1 + s**2) ** -0.5
        total = alpha**2 * STD**2 + sigma**2
        x0, noise = alpha * STD**2 * x / total, sigma * x / total
        return {"epsilon": noise, "sample": x0, "v_prediction": alpha * noise - sigma * x0}[prediction]

    return network


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_diffusion_model_is_a_denoiser_at_every_level_of_its_table(schedule, prediction):
    process = getattr(DiffusionProcess, schedule)(1000)
    denoise = DiffusionDenoiser(diffusion_network(process, prediction), process, prediction)
    x, sigma = 3 * points(5), torch.tensor([0.02, 0.11, 1.0, 13.0, 79.0], dtype=torch.float64)
    torch.testing.assert_close(denoise(x, sigma), gaussian(x, sigma), rtol=1e-6, atol=1e-9)


def test_times_are_exact_at_the_table_between_them_and_clamped_outside():
    process = DiffusionProcess.cosine(1000)
    denoise = DiffusionDenoiser(lambda x, t: x, process)
    levels = process.sigmas / process.alphas
    torch.testing.assert_close(denoise.times(levels), torch.arange(1000.0, dtype=torch.float64))
    middle = (levels[700] * levels[701]).sqrt()
    assert denoise.times(middle[None]).item() == pytest.approx(700.5)
    assert denoise.times(torch.tensor([1e-9, 1e9])).tolist() == [0, 999]


def test_flow_matching_is_no_denoiser_over_levels():
    with pytest.raises(ValueError, match="variance-preserving"):
        DiffusionDenoiser(lambda x, t: x, DiffusionProcess.flow(10))


def test_over_times_is_the_denoiser_at_the_level_of_the_time():
    sigmas = karras_sigmas(20)
    network, process = OverTimes(gaussian), OverTimes.process(sigmas)
    assert process.variance_preserving
    x = points()
    for sigma in (process.times[[0, 3, 12, 18, 19]], torch.tensor([0.001, 0.3, 1.0, 40.0, 100.0]).double()):
        alpha, level = process.levels(sigma, x)
        torch.testing.assert_close(level / alpha, sigma[:, None, None, None])
        torch.testing.assert_close(network(alpha * x, process.times_at(sigma, x)), gaussian(x, sigma))


def test_a_denoiser_is_sampled_at_levels_between_those_of_the_table():
    """Euler's method by hand, over levels of the caller's own."""
    process, z = OverTimes.process(karras_sigmas(3)), points()
    levels = torch.tensor([0.01, 0.5, 7.0, 60.0]).double()
    x = z * (1 + levels[-1] ** 2).sqrt()
    for sigma, after in itertools.pairwise([*levels.flip(0).tolist(), 0.0]):
        x = x + (after - sigma) * (x - gaussian(x, torch.full((5,), sigma))) / sigma
    settings = {"latents": z, "clip": False, "prediction": "sample"}
    out = sample(OverTimes(gaussian), process, "ddim", 3, spacing=lambda S, T: levels, **settings)
    torch.testing.assert_close(out, x, rtol=1e-6, atol=1e-9)
    # Its own points are of the levels at which the network is called, also where the table is coarse.
    seen = []
    sample(OverTimes(gaussian), process, "dpm++", 3, on_evaluation=seen.append, **settings)
    for e in seen:
        alpha, sigma = e.process.levels(e.index, e.x_t)
        torch.testing.assert_close((sigma / alpha).flatten(), e.process.times_at(e.index, e.x_t))


def test_ddim_over_times_is_euler_over_levels():
    sigmas, steps = karras_sigmas(100), 8
    times = [i * 100 // steps for i in range(steps)][::-1]
    z = points()
    x = z * (1 + sigmas[times[0]] ** 2).sqrt()
    for t, after in zip(times, [*times[1:], None], strict=True):
        x0 = gaussian(x, sigmas[t].expand(5))
        x = x0 if after is None else x + (sigmas[after] - sigmas[t]) * (x - x0) / sigmas[t]
    network, process = OverTimes(gaussian), OverTimes.process(sigmas)
    out = sample(network, process, "ddim", steps, latents=z, clip=False, prediction="sample")
    torch.testing.assert_close(out, x, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("sampler", "steps", "tolerance"), [("ddim", 500, 0.02), ("dpm++", 60, 0.005)])
def test_a_denoiser_is_sampled_by_the_samplers_of_diffusion_models(sampler, steps, tolerance):
    sigmas = karras_sigmas(1000)
    network, process = OverTimes(gaussian), OverTimes.process(sigmas)
    z = points().float()
    out = sample(network, process, sampler, steps, latents=z, clip=False, prediction="sample")
    # The flow of a Gaussian is a scaling, from the standard deviation 1 of the start to STD.
    torch.testing.assert_close(out, STD * z, rtol=tolerance, atol=0)
