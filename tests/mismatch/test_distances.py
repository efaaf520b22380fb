"""The distances against closed forms of Gaussians, brute force, and the calibration of their intervals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats
from scipy.spatial.distance import cdist, pdist
from scipy.special import gammaln

from robustdiff.errors import InputError
from robustdiff.mismatch.distances import (
    IMAGE_BLOCKS,
    Estimate,
    energy_distance,
    estimate,
    frechet,
    half_samples,
    image_block_of,
    kl_divergence,
    random_directions,
    sliced_wasserstein,
)

N = 2000
BY_NAME = {
    "sliced": lambda x, y, s=None: sliced_wasserstein(x, y, random_directions(x.shape[1]), s),
    "energy": lambda x, y, s=None: energy_distance(x, y, s),
    "frechet": lambda x, y, s=None: frechet(x, y, s),
    "kl": lambda x, y, s=None: kl_divergence(x, y, subsets=s),
}


def mean_norm(d: int, variance: float, shift: float) -> float:
    """E‖z‖ of z ~ N(m, variance·I) with ‖m‖ = shift, by quadrature of the noncentral χ² density."""
    law = stats.ncx2(d, shift**2 / variance)
    return integrate.quad(lambda r: np.sqrt(r * variance) * law.pdf(r), 0, law.ppf(1 - 1e-13), limit=500)[0]


def central_norm(d: int, variance: float) -> float:
    return float(np.sqrt(2 * variance) * np.exp(gammaln((d + 1) / 2) - gammaln(d / 2)))


def truth(name: str, d: int, scale: float, shift: float, directions: np.ndarray) -> float:
    """Of p = N(shift·e_1, scale² I) and q = N(0, I)."""
    if name == "sliced":
        return float(np.sqrt(((shift * directions[:, 0]) ** 2 + (1 - scale) ** 2).mean()))
    if name == "energy":
        within = central_norm(d, 2 * scale**2) + central_norm(d, 2.0)
        return 2 * mean_norm(d, 1 + scale**2, shift) - within
    if name == "frechet":
        return shift**2 + d * (1 - scale) ** 2
    return 0.5 * (d / scale**2 + shift**2 / scale**2 - d + 2 * d * np.log(scale))


@pytest.mark.parametrize(
    ("name", "d", "scale", "shift"),
    [(n, *c) for n in ("sliced", "energy", "frechet") for c in ((2, 1.5, 1.0), (5, 1.3, 0.7), (16, 0.8, 2.0))]
    + [("kl", 1, 1.4, 0.8), ("kl", 2, 1.5, 1.0), ("kl", 4, 1.0, 1.0)],
)
def test_between_two_gaussians_the_truth_is_in_the_interval(name, d, scale, shift):
    generator = np.random.default_rng(d)
    x, y = scale * generator.standard_normal((N, d)), generator.standard_normal((N, d))
    x[:, 0] += shift
    subsets = half_samples()[:, image_block_of(np.arange(N))]
    result = estimate(BY_NAME[name](x, y, subsets))
    expected = truth(name, d, scale, shift, random_directions(d))
    assert result.low < expected < result.high
    assert result.high - result.low < 0.75 * expected


@pytest.mark.parametrize("name", BY_NAME)
def test_the_interval_is_as_wide_as_repetition_says(name):
    """Half-samples of one set spread as independent sets of its size do, and their interval covers the expectation."""
    n, repetitions, results = 200, 80, []
    generator = np.random.default_rng(1)
    subsets = half_samples()[:, image_block_of(np.arange(n))]
    for _ in range(repetitions):
        x, y = 0.8 + 1.3 * generator.standard_normal((n, 2)), generator.standard_normal((n, 2))
        results.append(estimate(BY_NAME[name](x, y, subsets)))
    values = np.array([r.value for r in results])
    widths = np.array([r.high - r.low for r in results])
    assert 0.8 < widths.mean() / (2 * stats.t.ppf(0.975, IMAGE_BLOCKS - 1) * values.std(ddof=1)) < 1.25
    covered = np.mean([r.low < values.mean() < r.high for r in results])
    assert covered >= 0.88


def test_half_samples_of_a_mean_have_the_variance_of_the_mean():
    """Exactly: over all halves of K blocks the variance is s²/K."""
    blocks = np.random.default_rng(0).standard_normal(IMAGE_BLOCKS)
    halves = half_samples(20_000)
    assert halves[0].all()
    assert (halves[1:].sum(1) == IMAGE_BLOCKS // 2).all()
    means = halves[1:] @ blocks / (IMAGE_BLOCKS // 2)
    assert means.var() == pytest.approx(blocks.var(ddof=1) / IMAGE_BLOCKS, rel=0.03)


def test_an_estimate_is_the_value_and_students_interval():
    spread = np.array([3.0, 1.0, 2.0, 6.0])
    half = stats.t(IMAGE_BLOCKS - 1).ppf(0.975) * spread.std(ddof=1)
    assert estimate(np.array([5.0, *spread]), floor=0.5) == Estimate(
        5.0, pytest.approx(5 - half), pytest.approx(5 + half), 0.5
    )


def test_sliced_wasserstein_of_one_dimension_is_that_of_scipy_and_of_brute_force():
    generator = np.random.default_rng(0)
    x, y = generator.standard_normal((40, 3)), generator.exponential(size=(40, 3))
    directions = random_directions(3, 7)
    squares = []
    for theta in directions:
        a, b = np.sort(x @ theta), np.sort(y @ theta)
        assert np.abs(a - b).mean() == pytest.approx(stats.wasserstein_distance(x @ theta, y @ theta))  # the coupling
        squares.append(((a - b) ** 2).mean())
    assert sliced_wasserstein(x, y, directions)[0] == pytest.approx(np.sqrt(np.mean(squares)), rel=1e-12)
    subset = generator.permutation(40) < 20
    alone = sliced_wasserstein(x[subset], y[subset], directions)
    assert sliced_wasserstein(x, y, directions, subset[None]) == pytest.approx(alone, rel=1e-12)


@pytest.mark.parametrize("name", ["energy", "frechet", "kl"])
def test_a_subset_counts_as_if_it_were_alone(name):
    generator = np.random.default_rng(3)
    x, y = generator.standard_normal((60, 4)), 1.5 * generator.standard_normal((60, 4))
    subsets = np.stack([generator.permutation(60) < 30 for _ in range(3)])
    alone = [BY_NAME[name](x[s], y[s])[0] for s in subsets]
    assert BY_NAME[name](x, y, subsets) == pytest.approx(alone, rel=1e-10)


def test_the_energy_distance_is_the_mean_over_pairs():
    generator = np.random.default_rng(4)
    x, y = generator.standard_normal((9, 2)), generator.standard_normal((9, 2)) + 1
    norm = np.linalg.norm
    between = np.mean([norm(a - b) for a in x for b in y])
    within = [np.mean([norm(p[i] - p[j]) for i in range(9) for j in range(9) if i != j]) for p in (x, y)]
    assert energy_distance(x, y)[0] == pytest.approx(2 * between - sum(within), rel=1e-12)


def test_the_energy_distance_is_scipys_far_from_the_origin():
    generator = np.random.default_rng(6)
    x, y = generator.standard_normal((2, 40, 500)) + 100
    y[:5] = x[:5] + 1e-3  # nearby points are not lost in the products
    subsets = generator.random((3, 40)) < 0.7
    expected = []
    for subset in subsets:
        a, b = x[subset], y[subset]
        expected.append(2 * cdist(a, b).mean() - pdist(a).mean() - pdist(b).mean())
    assert energy_distance(x, y, subsets) == pytest.approx(expected, rel=1e-9)


def test_the_energy_distance_of_one_law_is_zero_on_average():
    generator = np.random.default_rng(5)
    values = [energy_distance(*generator.standard_normal((2, 20, 3)))[0] for _ in range(400)]
    assert abs(np.mean(values)) < 3 * np.std(values) / 20


def test_kl_is_the_formula_over_sorted_distances():
    generator = np.random.default_rng(6)
    x, y = generator.standard_normal((30, 3)), generator.standard_normal((30, 3))
    for k in (1, 4):
        logs = []
        for i, point in enumerate(y):
            rho = np.sort(np.linalg.norm(np.delete(y, i, 0) - point, axis=1))[k - 1]
            nu = np.sort(np.linalg.norm(x - point, axis=1))[k - 1]
            logs.append(np.log(nu / rho))
        assert kl_divergence(x, y, k)[0] == pytest.approx(3 * np.mean(logs) + np.log(30 / 29), rel=1e-12)


def test_kl_is_of_q_from_p_and_not_the_reverse():
    generator = np.random.default_rng(7)
    narrow, wide = generator.standard_normal((N, 1)), 3 * generator.standard_normal((N, 1))
    expected = [np.log(3) + (1 / 9 - 1) / 2, -np.log(3) + (9 - 1) / 2]
    assert kl_divergence(wide, narrow)[0] == pytest.approx(expected[0], abs=0.1)
    assert 1 < kl_divergence(narrow, wide)[0] < expected[1]


@pytest.mark.parametrize(
    ("d", "scale", "shift", "true", "found"),
    [(8, 0.8, 0.0, 0.465, -0.14), (4, 0.8, 0.0, 0.232, 0.04), (4, 1.2, 0.0, 0.118, 0.16), (4, 1.0, 0.7, 0.245, 0.24)],
)
def test_kl_is_biased_as_it_is_said_to_be(d, scale, shift, true, found):
    generator = np.random.default_rng(10)
    x, y = scale * generator.standard_normal((N, d)), generator.standard_normal((N, d))
    x[:, 0] += shift
    assert truth("kl", d, scale, shift, random_directions(d)) == pytest.approx(true, abs=1e-3)
    assert kl_divergence(x, y)[0] == pytest.approx(found, abs=0.09)  # three standard deviations


@settings(max_examples=25, deadline=None)
@given(n=st.integers(8, 40), d=st.integers(1, 6), seed=st.integers(0, 2**20))
def test_moving_both_moves_nothing_and_scaling_scales(n, d, seed):
    generator = np.random.default_rng(seed)
    x, y = generator.standard_normal((n, d)), generator.standard_normal((n, d))
    for name, power in (("sliced", 1), ("energy", 1), ("frechet", 2), ("kl", 0)):
        distance = BY_NAME[name]
        value = distance(x, y)[0]
        assert distance(3 * x + 2, 3 * y + 2)[0] == pytest.approx(3**power * value, rel=1e-6, abs=1e-6)
    assert sliced_wasserstein(x, x, random_directions(d))[0] == 0


def test_directions_are_uniform_unit_vectors():
    directions = random_directions(3, 20_000)
    assert np.linalg.norm(directions, axis=1) == pytest.approx(np.ones(20_000))
    assert directions.T @ directions / 20_000 == pytest.approx(np.eye(3) / 3, abs=0.01)


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize(("a", "b"), [((9, 2), (8, 2)), ((9, 2), (9, 3)), ((3, 2), (3, 2)), ((9,), (9,))])
def test_samples_of_other_shapes_are_refused(name, a, b):
    with pytest.raises(InputError, match=r"shapes .*4 or more"):
        BY_NAME[name](np.zeros(a), np.zeros(b)) if len(a) > 1 else energy_distance(np.zeros(a), np.zeros(b))


def test_neighbours_that_are_not_there_or_coincide_are_refused():
    generator = np.random.default_rng(8)
    with pytest.raises(InputError, match="smaller k"):
        kl_divergence(*generator.standard_normal((2, 5, 1)), k=5)
    with pytest.raises(InputError, match="coincide"):
        kl_divergence(generator.standard_normal((20, 2)), np.ones((20, 2)))
