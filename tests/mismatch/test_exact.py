"""Known densities: closed forms against quadrature, autograd and draws; followed densities against the samplers."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch.distributions import MultivariateNormal, kl_divergence

from robustdiff import DenoisingObjective, DiffusionProcess, sample
from robustdiff.errors import InputError
from robustdiff.metrics.fid import frechet_distance
from robustdiff.mismatch.exact import (
    Density,
    ExactModel,
    GaussianMixture,
    ShiftedModel,
    Step,
    affine_map,
    change_of_variables,
    gaussian_kl,
    push_gaussian,
    sampler_steps,
    step_divergence,
)

PROCESS = DiffusionProcess.linear(1000)
THREE = GaussianMixture(
    torch.tensor([0.3, 0.5, 0.2]), torch.tensor([[-1.0], [0.2], [1.4]]), torch.tensor([0.04, 0.01, 0.09])
)
EXACT = ExactModel(THREE, PROCESS)


def gaussian(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_mixture(seed: int, K: int, d: int) -> GaussianMixture:
    """With full covariances of condition numbers in the tens."""
    weights = gaussian(seed, K).exp()
    factors = gaussian(seed + 1, K, d, d) / math.sqrt(d)
    covariances = factors @ factors.mT + 0.05 * torch.eye(d)
    return GaussianMixture(weights / weights.sum(), gaussian(seed + 2, K, d), (covariances + covariances.mT) / 2)


def one_gaussian(covariance: torch.Tensor, mean: torch.Tensor | None = None) -> GaussianMixture:
    mean = torch.zeros(len(covariance)) if mean is None else mean
    return GaussianMixture(torch.ones(1), mean[None], covariance[None])


def standard_normal(d: int, size: int, reach: float = 8.0) -> Density:
    return Density.on_lattice(
        lambda x: -0.5 * (x.square() + math.log(2 * math.pi)).sum(1), [-reach] * d, [reach] * d, size
    )


# -- the mixture ---------------------------------------------------------------------------------------------


def test_the_density_at_t_is_that_of_scipy():
    q = random_mixture(0, 3, 4)
    alpha, sigma = 0.7, 0.6
    x = gaussian(9, 50, 4)
    covariances = torch.einsum("kid,kd,kjd->kij", q.axes, q.variances, q.axes)
    expected = sum(
        float(w) * stats.multivariate_normal(alpha * m.numpy(), alpha**2 * S.numpy() + sigma**2 * np.eye(4)).pdf(x)
        for w, m, S in zip(q.weights, q.means, covariances, strict=True)
    )
    np.testing.assert_allclose(q.at(alpha, sigma).log_prob(x).exp().numpy(), expected, rtol=1e-10)


def test_eigenvectors_give_the_covariances_back():
    covariance = torch.tensor([[2.0, 0.3], [0.3, 0.5]], dtype=torch.float64)
    q = one_gaussian(covariance, torch.tensor([1.0, -2.0]))
    torch.testing.assert_close(q.covariance, covariance, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(q.mean, torch.tensor([1.0, -2.0]).double())


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), K=st.integers(1, 4), d=st.integers(1, 6), isotropic=st.booleans())
def test_the_score_is_the_gradient_of_the_log_density(seed, K, d, isotropic):
    q = random_mixture(seed, K, d)
    if isotropic:
        q = GaussianMixture(q.weights, q.means, q.variances[:, 0])
    q = q.at(0.8, 0.5)
    x = gaussian(seed + 7, 5, d).requires_grad_()
    (gradient,) = torch.autograd.grad(q.log_prob(x).sum(), x)
    torch.testing.assert_close(q.score(x.detach()), gradient, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("d", [1, 512])
def test_isotropic_components_are_full_ones(d):
    x, weights, means = gaussian(0, 6, d), torch.tensor([0.4, 0.6]), gaussian(1, 2, d)
    short = GaussianMixture(weights, means, torch.tensor([0.5, 2.0])).at(0.6, 0.8)
    full = GaussianMixture(weights, means, torch.tensor([0.5, 2.0])[:, None, None] * torch.eye(d)).at(0.6, 0.8)
    torch.testing.assert_close(short.log_prob(x), full.log_prob(x), rtol=1e-11, atol=1e-9)
    torch.testing.assert_close(short.score(x), full.score(x), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(short.covariance, full.covariance, rtol=1e-10, atol=1e-10)


def test_draws_have_the_moments_and_the_distribution_function():
    q = random_mixture(3, 3, 3)
    x = q.sample(200_000, torch.Generator().manual_seed(0))
    deviation = q.covariance.diagonal().sqrt()
    assert ((x.mean(0) - q.mean).abs() < 4 * deviation / math.sqrt(len(x))).all()
    # The standard error of a (co)variance of a light-tailed law is near σᵢσⱼ√(2/n); mixtures can have somewhat more.
    assert ((torch.cov(x.mT) - q.covariance).abs() < 6 * torch.outer(deviation, deviation) * (2 / len(x)) ** 0.5).all()
    draws = THREE.sample(20_000, torch.Generator().manual_seed(1))[:, 0].numpy()
    assert stats.kstest(draws, lambda x: THREE.cdf(torch.from_numpy(x)).numpy()).pvalue > 0.01


def test_the_posterior_is_that_of_bayes_rule_by_quadrature():
    z = torch.linspace(-6, 6, 20_001, dtype=torch.float64)
    a, b = 0.6, 0.7
    for y in (-1.3, 0.0, 2.1):
        joint = THREE.log_prob(z[:, None]).exp() * torch.exp(-((y - a * z) ** 2) / (2 * b**2))
        mean = (z * joint).sum() / joint.sum()
        variance = ((z - mean) ** 2 * joint).sum() / joint.sum()
        posterior = THREE.posterior(torch.tensor([[y]], dtype=torch.float64), a, b)
        assert float(posterior.mean) == pytest.approx(float(mean), rel=1e-9, abs=1e-10)
        assert float(posterior.total_variance) == pytest.approx(float(variance), rel=1e-9)


def test_the_posterior_in_two_dimensions_is_that_of_bayes_rule_by_quadrature():
    q = random_mixture(5, 2, 2)
    axis = torch.linspace(-9, 9, 301, dtype=torch.float64)
    z = torch.cartesian_prod(axis, axis)
    y, a, b = torch.tensor([[0.4, -0.9]], dtype=torch.float64), 0.8, 0.6
    joint = (q.log_prob(z) - (y - a * z).square().sum(1) / (2 * b**2)).softmax(0)
    mean = joint @ z
    posterior = q.posterior(y, a, b)
    torch.testing.assert_close(posterior.mean[0], mean, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(posterior.total_variance[0], joint @ (z - mean).square().sum(1), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    ("weights", "means", "covariances", "complaint"),
    [
        ([0.5, 0.6], [[0.0], [1.0]], [1.0, 1.0], "sum to 1"),
        ([1.5, -0.5], [[0.0], [1.0]], [1.0, 1.0], "positive"),
        ([1.0], [[math.inf]], [1.0], "finite"),
        ([1.0], [[0.0], [1.0]], [1.0], "weights"),
        ([1.0], [[0.0, 1.0]], [1.0, 1.0], "covariances"),
        ([1.0], [[0.0, 1.0]], [[[1.0, 0.5], [0.0, 1.0]]], "symmetric"),
        ([1.0], [[0.0, 1.0]], [[[1.0, 2.0], [2.0, 1.0]]], "semi-definite"),
        ([1.0], [[0.0]], [-1.0], "semi-definite"),
    ],
)
def test_what_is_no_mixture_is_refused(weights, means, covariances, complaint):
    with pytest.raises(InputError, match=complaint):
        GaussianMixture(torch.tensor(weights), torch.tensor(means), torch.tensor(covariances))


# -- models --------------------------------------------------------------------------------------------------


def test_the_exact_model_is_the_mean_noise_given_the_point():
    t = 300
    alpha, sigma = float(PROCESS.alphas[t]), float(PROCESS.sigmas[t])
    x0 = torch.linspace(-5, 5, 20_001, dtype=torch.float64)
    for x_t in (-1.5, 0.1, 0.9):
        noise = (x_t - alpha * x0) / sigma
        weight = (THREE.log_prob(x0[:, None]) - noise**2 / 2).softmax(0)
        value = EXACT(torch.tensor([[x_t]], dtype=torch.float64), torch.tensor([t]))
        assert float(value) == pytest.approx(float(weight @ noise), rel=1e-9)


def test_the_exact_model_is_tweedies_formula():
    q = random_mixture(2, 3, 5)
    x, t = gaussian(0, 8, 5), 420
    alpha, sigma = float(PROCESS.alphas[t]), float(PROCESS.sigmas[t])
    expected = (x - alpha * q.posterior(x, alpha, sigma).mean) / sigma
    torch.testing.assert_close(ExactModel(q, PROCESS)(x, torch.full((8,), t)), expected, rtol=1e-9, atol=1e-9)


@settings(max_examples=20, deadline=None)
@given(batch=st.integers(1, 5), channels=st.integers(1, 3), size=st.integers(1, 3), double=st.booleans())
def test_the_exact_model_takes_images_with_their_own_times(batch, channels, size, double):
    model = ExactModel(random_mixture(1, 2, channels * size * size), PROCESS)
    x = gaussian(0, batch, channels, size, size).to(torch.float64 if double else torch.float32)
    t = torch.arange(batch) % 2 * 500 + 100
    value = model(x, t)
    assert (value.shape, value.dtype) == (x.shape, x.dtype)
    alone = torch.cat([model(x[i : i + 1], t[i : i + 1]) for i in range(batch)])
    torch.testing.assert_close(value, alone)


def test_no_model_has_a_lower_denoising_loss():
    objective = DenoisingObjective(PROCESS)
    draw = objective.draw(THREE.sample(20_000, torch.Generator().manual_seed(0)), t=torch.full((20_000,), 250),
                          generator=torch.Generator().manual_seed(1))  # fmt: skip
    loss = float(objective(EXACT, draw)["loss"].mean())
    for scale, offset in ((0.02, 0.0), (-0.02, 0.0), (0.0, 0.02), (0.0, -0.02)):
        assert float(objective(ShiftedModel(EXACT, scale, offset), draw)["loss"].mean()) > loss
    # The least loss is E Var(ε | x_t) = (α/σ)² E Var(x_0 | x_t).
    alpha, sigma = float(PROCESS.alphas[250]), float(PROCESS.sigmas[250])
    least = (alpha / sigma) ** 2 * THREE.posterior(draw.x_t, alpha, sigma).total_variance
    spread = float((objective(EXACT, draw)["loss"] - least).std()) / math.sqrt(len(least))
    assert abs(loss - float(least.mean())) < 3 * spread


def test_the_error_of_a_shifted_model_has_its_relative_size():
    model = ShiftedModel(EXACT, scale=-0.07)
    x, t = gaussian(0, 100, 1), torch.full((100,), 600)
    error, noise = model(x, t) - EXACT(x, t), EXACT(x, t)
    assert float(error.norm() / noise.norm()) == pytest.approx(0.07, rel=1e-12)
    torch.testing.assert_close(ShiftedModel(EXACT, offset=torch.tensor([0.3]))(x, t), noise + 0.3)


# -- steps ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["ddim", "iddpm"])
@pytest.mark.parametrize("steps", [1, 7])
def test_the_steps_are_those_of_the_sampler(sampler, steps):
    q = random_mixture(4, 2, 3)
    model = ShiftedModel(ExactModel(q, PROCESS), 0.1, 0.05)
    x, noises = gaussian(0, 6, 3), gaussian(1, steps, 6, 3)
    expected = sample(model, PROCESS, sampler, steps, latents=x, step_noise=noises, clip=False)
    for step, noise in zip(sampler_steps(PROCESS, sampler, steps), noises, strict=True):
        x = step.mean(model, x) + math.sqrt(step.variance) * noise
    assert step.after == (1.0, 0.0)
    torch.testing.assert_close(x, expected, rtol=2e-4, atol=2e-4)  # diffusers' tables are float32


def test_the_mean_of_an_ancestral_step_of_the_exact_model_is_the_conditional_mean():
    q = random_mixture(6, 3, 2)
    for step in sampler_steps(PROCESS, "iddpm", 6)[:-1]:
        x = gaussian(0, 10, 2)
        expected = q.at(*step.after).posterior(x, *step.transition).mean
        torch.testing.assert_close(step.mean(ExactModel(q, PROCESS), x), expected, rtol=1e-8, atol=1e-8)


def test_the_variance_of_an_ancestral_step_is_what_is_unknown_of_a_single_point():
    point = GaussianMixture(torch.ones(1), torch.tensor([[0.3]]), torch.zeros(1))
    for step in sampler_steps(PROCESS, "iddpm", 6)[:-1]:
        posterior = point.at(*step.after).posterior(torch.zeros(1, 1).double(), *step.transition)
        assert step.variance == pytest.approx(float(posterior.total_variance), rel=1e-8)


def test_steps_of_another_form_are_refused():
    with pytest.raises(InputError, match="'dpm\\+\\+'"):
        sampler_steps(PROCESS, "dpm++", 5)
    with pytest.raises(InputError, match="variance-preserving"):
        sampler_steps(DiffusionProcess.flow(10), "ddim", 5)
    with pytest.raises(InputError, match="between 1 and 1000"):
        sampler_steps(PROCESS, "ddim", 0)


# -- Gaussians -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [1, 3, 40])
def test_the_divergence_of_gaussians_is_that_of_torch(d):
    p, q = random_mixture(d, 1, d), random_mixture(d + 50, 1, d)
    expected = kl_divergence(MultivariateNormal(p.mean, p.covariance), MultivariateNormal(q.mean, q.covariance))
    assert gaussian_kl(p.mean, p.covariance, q.mean, q.covariance) == pytest.approx(float(expected), rel=1e-9)


def test_a_small_divergence_keeps_its_digits():
    one, zero = torch.eye(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    assert gaussian_kl(zero, one, zero + 1e-7, one) == pytest.approx(5e-15, rel=1e-6)
    # ½(v − 1 − log v) = (v − 1)²/4 to leading order
    assert gaussian_kl(zero, one * (1 + 1e-5), zero, one) == pytest.approx(2.5e-11, rel=2e-5)


def test_the_affine_map_of_an_affine_model():
    matrix, offset = gaussian(0, 4, 4), gaussian(1, 4)
    found = affine_map(lambda x, t: x @ matrix.mT + offset, 3.0, 4)
    torch.testing.assert_close(found, (matrix, offset))
    with pytest.raises(ValueError, match="not affine"):
        affine_map(EXACT, 300.0, 1)


@pytest.mark.parametrize("sampler", ["ddim", "iddpm"])
def test_a_gaussian_through_the_sampler_has_the_moments_of_its_samples(sampler):
    q = random_mixture(8, 1, 3)
    model = ShiftedModel(ExactModel(q, PROCESS), 0.05, 0.1)
    mean, cov = torch.zeros(3).double(), torch.eye(3).double()
    for step in sampler_steps(PROCESS, sampler, 6):
        mean, cov = push_gaussian(step, model, mean, cov)
    n = 100_000
    x = sample(model, PROCESS, sampler, 6, latents=gaussian(0, n, 3), clip=False,
               generator=torch.Generator().manual_seed(3))  # fmt: skip
    deviation = cov.diagonal().sqrt()
    assert ((x.mean(0) - mean).abs() < 4 * deviation / math.sqrt(n)).all()
    assert ((torch.cov(x.mT) - cov).abs() < 4 * torch.outer(deviation, deviation) * math.sqrt(2 / n)).all()


# -- densities -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sampler", "d", "size"), [("ddim", 1, 4001), ("iddpm", 1, 1001), ("ddim", 2, 301)])
def test_a_followed_density_of_a_gaussian_is_the_closed_form(sampler, d, size):
    q = one_gaussian(torch.tensor([[0.6, 0.2], [0.2, 0.4]]).double()[:d, :d], torch.tensor([0.3, -0.2])[:d].double())
    model = ShiftedModel(ExactModel(q, PROCESS), 0.04, 0.1)
    p, mean, cov = standard_normal(d, size, 14.0), torch.zeros(d).double(), torch.eye(d).double()
    for step in sampler_steps(PROCESS, sampler, 5)[:3]:
        q_s = q.at(*step.after)
        p = p.push(step, model, cover=q_s)
        mean, cov = push_gaussian(step, model, mean, cov)
        assert p.mass == pytest.approx(1, abs=1e-9)
        expected = MultivariateNormal(mean, cov).log_prob(p.points)
        near = expected > expected.max() - 15
        torch.testing.assert_close(p.log_density[near], expected[near], rtol=0, atol=1e-6)
        assert p.kl_from(q_s) == pytest.approx(gaussian_kl(q_s.mean, q_s.covariance, mean, cov), rel=1e-5, abs=1e-9)
        if d == 1:
            w2 = math.sqrt(frechet_distance(mean.numpy(), cov.numpy(), q_s.mean.numpy(), q_s.covariance.numpy()))
            assert p.w2(q_s) == pytest.approx(w2, rel=1e-3)
            # Optimal transport of Gaussians is affine.
            slope = math.sqrt(float(q_s.covariance / cov))
            expected_shift = (slope - 1) * (p.points - mean)[:, 0] + (q_s.mean - mean)
            torch.testing.assert_close(p.displacement(q_s)[near], expected_shift[near], rtol=0, atol=2e-3)


def test_a_step_with_noise_in_two_dimensions():
    q = random_mixture(12, 1, 2)
    model = ExactModel(q, PROCESS)
    step = Step(time=400.0, of_x=0.9, of_noise=-0.3, variance=0.15, before=(0.5, math.sqrt(0.75)), after=(0.8, 0.6))
    p = standard_normal(2, 81, 7.0).push(step, model)
    mean, cov = push_gaussian(step, model, torch.zeros(2).double(), torch.eye(2).double())
    assert p.mass == pytest.approx(1, abs=1e-5)
    other = one_gaussian(torch.tensor([[0.8, 0.1], [0.1, 0.6]]).double(), torch.tensor([0.2, -0.1]).double())
    expected = gaussian_kl(other.mean, other.covariance, mean, cov)
    assert p.kl_from(other) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("sampler", ["ddim", "iddpm"])
def test_a_followed_density_is_that_of_the_samples(sampler):
    p = standard_normal(1, 1501)
    for step in sampler_steps(PROCESS, sampler, 8):
        p = p.push(step, EXACT)
    assert p.mass == pytest.approx(1, abs=1e-8)
    x = sample(EXACT, PROCESS, sampler, 8, latents=gaussian(5, 20_000, 1), clip=False,
               generator=torch.Generator().manual_seed(6))  # fmt: skip
    upper = p.points[:, 0].numpy()
    cdf = np.cumsum(p.masses.numpy()) - 0.5 * p.masses.numpy()
    assert stats.kstest(x[:, 0].numpy(), lambda v: np.interp(v, upper, cdf)).pvalue > 0.01
    # And it is not that of the data, which eight steps do not reach.
    assert stats.kstest(x[:, 0].numpy(), lambda v: THREE.cdf(torch.from_numpy(v)).numpy()).pvalue < 1e-6


def test_the_exact_model_with_many_steps_samples_the_data():
    divergences = []
    for steps in (25, 50, 100):
        p = standard_normal(1, 10_001, 14.0)
        for step in sampler_steps(PROCESS, "ddim", steps):
            p = p.push(step, EXACT)
        # q(x_0), but for the last, of variance σ_0².
        divergences.append(p.kl_from(THREE))
    assert divergences[-1] < 6e-3
    assert all(later < 0.5 * earlier for earlier, later in pairwise(divergences))
    x = sample(EXACT, PROCESS, "dpm++", 50, latents=gaussian(7, 4000, 1), clip=False)
    assert stats.kstest(x[:, 0].numpy(), lambda v: THREE.cdf(torch.from_numpy(v)).numpy()).pvalue > 0.01


def test_the_distances_of_a_density_from_itself_are_zero():
    q = THREE.at(0.6, 0.8)
    p = Density.on_lattice(q.log_prob, [-9.0], [9.0], 2001)
    assert p.kl_from(q) == pytest.approx(0, abs=1e-14)
    assert p.w2(q) < 1e-3


def test_w2_of_mixtures_is_the_distance_of_quantile_functions():
    other = GaussianMixture(torch.tensor([0.7, 0.3]), torch.tensor([[-0.5], [2.0]]), torch.tensor([0.2, 0.1]))
    p = Density.on_lattice(other.log_prob, [-5.0], [6.0], 4001)
    levels = (np.arange(200_000) + 0.5) / 200_000
    x = np.linspace(-6, 7, 200_001)
    quantiles = [np.interp(levels, q.cdf(torch.from_numpy(x)).numpy(), x) for q in (other, THREE)]
    assert p.w2(THREE) == pytest.approx(math.sqrt(np.mean((quantiles[0] - quantiles[1]) ** 2)), rel=1e-3)


def test_change_of_variables_in_sixteen_dimensions():
    q = random_mixture(13, 1, 16)
    model = ShiftedModel(ExactModel(q, PROCESS), 0.02)
    x, mean, cov = gaussian(0, 5, 16), torch.zeros(16).double(), torch.eye(16).double()
    log_p = MultivariateNormal(mean, cov).log_prob(x)
    for step in sampler_steps(PROCESS, "ddim", 4):
        x, determinants = change_of_variables(step, model, x)
        log_p = log_p - determinants.log()
        mean, cov = push_gaussian(step, model, mean, cov)
    torch.testing.assert_close(log_p, MultivariateNormal(mean, cov).log_prob(x), rtol=1e-6, atol=1e-6)


def test_what_a_lattice_cannot_hold_is_said():
    ddim, ancestral = (sampler_steps(PROCESS, name, 20) for name in ("ddim", "iddpm"))
    start = standard_normal(1, 201)
    with pytest.raises(ValueError, match="not increasing"):
        start.push(ddim[0], lambda x, t: 5 * torch.sin(3 * x))
    with pytest.raises(ValueError, match="larger than 201"):
        start.push(ancestral[-2], EXACT)
    with pytest.raises(ValueError, match="no change of variables"):
        change_of_variables(ancestral[0], EXACT, torch.zeros(1, 1).double())
    with pytest.raises(ValueError, match="one dimension"):
        standard_normal(2, 5).w2(random_mixture(0, 1, 2))
    with pytest.raises(ValueError, match="of q and not 1"):
        start.kl_from(GaussianMixture(torch.ones(1), torch.tensor([[6.0]]), torch.ones(1)))
    with pytest.raises(InputError, match="1 or 2 dimensions"):
        standard_normal(3, 5)


def test_a_tail_that_the_lattice_does_not_hold_is_no_divergence():
    # The means of a narrow lattice end at 1.5; what p has beyond comes from where there is no lattice.
    step = Step(time=500.0, of_x=0.5, of_noise=0.0, variance=0.01, before=(0.6, 0.8), after=(0.8, 0.6))
    q = one_gaussian(torch.eye(1).double())

    def divergence(reach: float) -> float:
        p = standard_normal(1, 2001, reach).push(step, lambda x, t: x, cover=q)
        return p.kl_from(q)

    with pytest.raises(ValueError, match="where p is unknown"):
        divergence(3.0)
    one, zero = torch.eye(1).double(), torch.zeros(1).double()
    assert divergence(14.0) == pytest.approx(gaussian_kl(zero, one, zero, 0.26 * one), rel=1e-6)


# -- Proposition 2 -------------------------------------------------------------------------------------------


def test_the_divergence_of_a_step_is_the_double_integral():
    step = sampler_steps(PROCESS, "iddpm", 10)[5]
    model = ShiftedModel(EXACT, 0.1, -0.05)
    q_t, q_s = THREE.at(*step.before), THREE.at(*step.after)
    a, b = step.transition
    x = torch.linspace(-7, 7, 1201, dtype=torch.float64)[:, None]
    h = float(x[1] - x[0])
    log_forward = -0.5 * ((x.mT - a * x) / b) ** 2 - math.log(b * math.sqrt(2 * math.pi))  # [s, t]
    log_joint = q_s.log_prob(x)[:, None] + log_forward
    log_conditional = log_joint - q_t.log_prob(x)
    mean = step.mean(model, x)[:, 0]
    log_p = -0.5 * (x - mean) ** 2 / step.variance - 0.5 * math.log(2 * math.pi * step.variance)
    expected = float((log_joint.exp() * (log_conditional - log_p)).sum()) * h * h
    assert step_divergence(THREE, step, model) == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("d", [1, 2])
def test_both_forms_of_the_divergence_of_a_step_agree(d):
    q = random_mixture(20, 1, d)
    covariance = q.covariance[None].expand(2, d, d)
    twice = GaussianMixture(torch.tensor([0.3, 0.7]), q.means.expand(2, d), covariance)
    model = ShiftedModel(ExactModel(q, PROCESS), 0.1, 0.2)
    for step in sampler_steps(PROCESS, "iddpm", 5)[:-1]:
        closed = step_divergence(q, step, model)
        assert step_divergence(twice, step, model, size=201 if d == 2 else 2001) == pytest.approx(closed, rel=1e-6)


def test_the_divergence_grows_by_no_more_than_that_of_the_steps():
    p, bound = standard_normal(1, 1501, 14.0), None
    model = ShiftedModel(EXACT, 0.1, 0.1)
    for step in sampler_steps(PROCESS, "iddpm", 10)[:-2]:
        bound = p.kl_from(THREE.at(*step.before)) if bound is None else bound
        bound += step_divergence(THREE, step, model)
        p = p.push(step, model, cover=THREE.at(*step.after))
        assert 0 < p.kl_from(THREE.at(*step.after)) <= bound


def test_a_divergence_that_is_infinite_or_has_no_form_is_refused():
    with pytest.raises(ValueError, match="infinite"):
        step_divergence(THREE, sampler_steps(PROCESS, "ddim", 5)[0], EXACT)
    q = random_mixture(0, 2, 3)
    with pytest.raises(InputError, match="1 or 2 dimensions"):
        step_divergence(q, sampler_steps(PROCESS, "iddpm", 5)[0], ExactModel(q, PROCESS))
