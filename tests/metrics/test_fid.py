"""FID against independent computations; the bootstrap against a simulation."""

from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from robustdiff.errors import InputError
from robustdiff.metrics import fid as module
from robustdiff.metrics.bootstrap import interval
from robustdiff.metrics.fid import FID, bootstrap_frechet, frechet_distance
from robustdiff.metrics.moments import Moments
from robustdiff.metrics.reference import Reference


def gaussian(seed, n, dim):
    """(n, dim) with a mean and a covariance of its own."""
    generator = np.random.default_rng(seed)
    mix = generator.normal(size=(dim, dim)) / dim**0.5
    return generator.normal(size=(n, dim)) @ mix + generator.normal(size=dim)


def moments_of(features, blocks=50):
    moments = Moments(features.shape[1], blocks)
    moments.update(features, 0)
    return moments


def scipy_frechet(x, y):
    """The formula of the original FID code."""
    c1, c2 = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(c1 @ c2)
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(c1) + np.trace(c2) - 2 * np.trace(root).real


@pytest.mark.parametrize("dim", [2, 16, 64])
def test_frechet_equals_the_matrix_root(dim):
    x, y = gaussian(1, 500, dim), gaussian(2, 400, dim)
    a, b = moments_of(x), moments_of(y)
    assert frechet_distance(a.mean, a.cov, b.mean, b.cov) == pytest.approx(scipy_frechet(x, y), rel=1e-6)


def test_frechet_of_singular_covariances():
    """In the span of the data the covariances are regular, and the distance is the same there."""
    generator = np.random.default_rng(0)
    basis = np.linalg.qr(generator.normal(size=(20, 20)))[0][:, :6]
    x, y = gaussian(1, 300, 6), gaussian(2, 300, 6)
    a, b = moments_of(x @ basis.T), moments_of(y @ basis.T)
    assert np.linalg.matrix_rank(a.cov) == 6
    assert frechet_distance(a.mean, a.cov, b.mean, b.cov) == pytest.approx(scipy_frechet(x, y), rel=1e-6)


def test_frechet_of_diagonal_covariances_is_that_of_their_deviations():
    s1, s2 = np.array([1.0, 0.0, 3.0]), np.array([0.5, 2.0, 0.0])
    m1, m2 = np.array([0.0, 1.0, 2.0]), np.array([1.0, 1.0, 0.0])
    expected = ((m1 - m2) ** 2).sum() + ((s1 - s2) ** 2).sum()
    assert frechet_distance(m1, np.diag(s1**2), m2, np.diag(s2**2)) == pytest.approx(expected, rel=1e-12)


@given(seed=st.integers(0, 999), dim=st.integers(1, 12), n=st.integers(2, 40))
@settings(max_examples=60, deadline=None)
def test_frechet_is_symmetric_and_zero_for_equals(seed, dim, n):
    a, b = moments_of(gaussian(seed, n, dim)), moments_of(gaussian(seed + 1, n, dim))
    scale = np.trace(a.cov) + np.trace(b.cov)
    assert frechet_distance(a.mean, a.cov, a.mean, a.cov) == pytest.approx(0, abs=1e-6 * scale)
    ab = frechet_distance(a.mean, a.cov, b.mean, b.cov)
    assert ab == pytest.approx(frechet_distance(b.mean, b.cov, a.mean, a.cov), rel=1e-6, abs=1e-6 * scale)
    assert ab >= 0


def test_frechet_refuses_other_shapes():
    with pytest.raises(ValueError, match="means"):
        frechet_distance(np.zeros(2), np.eye(2), np.zeros(3), np.eye(3))


def test_a_replicate_is_the_fid_of_the_repeated_blocks():
    x, y = gaussian(1, 60, 5), gaussian(2, 90, 5)
    blocks, replicates, seed = 6, 4, 3
    found = bootstrap_frechet(moments_of(x, blocks), moments_of(y), replicates, seed)
    block = np.empty(len(x), int)  # which block each image went to, found out one image at a time
    for i in range(len(x)):
        one = Moments(5, blocks)
        one.update(x[i : i + 1], i)
        block[i] = one.count.argmax()
    weights = np.random.default_rng(seed).multinomial(blocks, [1 / blocks] * blocks, size=replicates)
    for w, value in zip(weights, found, strict=True):
        assert value == pytest.approx(scipy_frechet(np.repeat(x, w[block], axis=0), y), rel=1e-6)


def test_replicates_do_not_depend_on_how_many_are_computed_at_a_time(monkeypatch):
    x, y = moments_of(gaussian(1, 60, 5)), moments_of(gaussian(2, 90, 5))
    whole = bootstrap_frechet(x, y, 5)
    assert len(set(whole)) == 5
    for elements in (1, 50):  # one replicate at a time, and two
        monkeypatch.setattr(module, "_CHUNK", elements)
        np.testing.assert_allclose(bootstrap_frechet(x, y, 5), whole, rtol=1e-9)


@pytest.mark.parametrize("merged", [False, True])
def test_replicates_are_of_all_images_after_a_result_too(merged):
    x = gaussian(1, 60, 3)
    metric, fresh, part = (FID(Reference(np.zeros(3), np.eye(3), "")) for _ in range(3))
    metric.moments.update(x[:30], 0)
    metric.result()
    if merged:
        part.update(SimpleNamespace(features=x[30:], start=30))
        metric.merge_state(part.state())
    else:
        metric.update(SimpleNamespace(features=x[30:], start=30))
    fresh.update(SimpleNamespace(features=x, start=0))
    assert metric.result() == pytest.approx(fresh.result(), rel=1e-9)


@pytest.mark.parametrize(("dim", "blocks"), [(512, 50), (513, 20)])
def test_many_features_have_fewer_blocks(dim, blocks):
    assert len(FID(Reference(np.zeros(dim), np.eye(dim), "")).moments.count) == blocks


def test_empty_blocks_do_not_matter():
    x, y = moments_of(gaussian(1, 20, 3), 50), moments_of(gaussian(2, 90, 3))
    found = bootstrap_frechet(x, y, 100)
    assert found.shape == (100,)
    assert np.isfinite(found).all()


def test_intervals_cover():
    """Check that about 95 % of the intervals of 200 experiments hold the mean of the estimates, E FID at this n."""
    dim, n, experiments = 4, 500, 200
    generator = np.random.default_rng(0)
    reference = moments_of(generator.normal(size=(20_000, dim)))
    scale = np.array([1.2, 1.0, 0.8, 1.0])
    estimates, intervals = [], []
    for seed in range(experiments):
        a = moments_of(generator.normal(size=(n, dim)) * scale + 0.2)
        estimates.append(frechet_distance(a.mean, a.cov, reference.mean, reference.cov))
        intervals.append(interval(estimates[-1], bootstrap_frechet(a, reference, 200, seed), 50, log=True))
    truth = np.mean(estimates)
    coverage = np.mean([low <= truth <= high for low, high in intervals])
    assert 0.9 <= coverage <= 0.99


def test_the_corrected_fid_has_little_bias():
    """Over 100 sets of 200 images, against the FID of the distributions themselves."""
    dim, n = 8, 200
    generator = np.random.default_rng(0)
    reference = Reference(np.zeros(dim), np.eye(dim), "")
    truth = 8 * 0.1**2 + 8 * (1.2 - 1) ** 2
    found = []
    for _ in range(100):
        metric = FID(reference)
        metric.moments.update(generator.normal(size=(n, dim)) * 1.2 + 0.1, 0)
        result = metric.result()
        found.append([result["fid"], result["fid_corrected"]])
    plain, corrected = np.mean(found, axis=0) - truth
    assert plain > 0.1
    assert abs(corrected) < 0.15 * plain


def test_common_noise_makes_the_interval_of_a_difference_narrower():
    generator = np.random.default_rng(0)
    noise, other = generator.normal(size=(2, 2000, 4))
    reference = moments_of(generator.normal(size=(5000, 4)))

    def width(a, b):
        difference = bootstrap_frechet(a, reference) - bootstrap_frechet(b, reference)
        low, high = interval(0.0, difference, 50)
        return high - low

    a = moments_of(1.30 * noise)
    assert width(a, moments_of(1.25 * noise)) < 0.5 * width(a, moments_of(1.25 * other))


def test_an_interval_needs_two_blocks():
    with pytest.raises(InputError, match="1 non-empty blocks"):
        bootstrap_frechet(moments_of(np.zeros((1, 3)), 4), moments_of(gaussian(0, 9, 3)))
