"""FID, KID, precision and recall against independent computations; the bootstrap against a simulation."""

import itertools
import warnings
from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from robustdiff.evaluation.features import Classifier, ClassifierExtractor, load_extractor
from robustdiff.evaluation.fidelity import (
    Fidelity,
    Moments,
    Reference,
    Reservoir,
    bootstrap_frechet,
    check_finite,
    frechet_distance,
    interval,
    kernel_distance,
    load_reference,
    precision_recall,
    reference_statistics,
)
from sklearn.metrics.pairwise import polynomial_kernel

from robustdiff.data import ArrayDataset, load_dataset
from robustdiff.errors import InputError, RunError


def gaussian(seed, n, dim, rank=None):
    """(n, dim) with a mean and a covariance of its own; of the given rank."""
    generator = np.random.default_rng(seed)
    mix = generator.normal(size=(rank or dim, dim)) / dim**0.5
    return generator.normal(size=(n, rank or dim)) @ mix + generator.normal(size=dim)


def moments_of(features, blocks=50):
    moments = Moments(features.shape[1], blocks)
    moments.update(features, 0)
    return moments


# ------------------------------------------------------------------------------------------------ moments


@given(
    n=st.integers(2, 60),
    blocks=st.integers(1, 9),
    cuts=st.lists(st.integers(0, 60), max_size=6),
    processes=st.integers(1, 3),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_moments_of_any_division_are_those_of_one_pass(n, blocks, cuts, processes, seed):
    features = np.random.default_rng(seed).normal(3, 1, (n, 4))
    whole = moments_of(features, blocks)
    edges = sorted({0, n, *(min(c, n) for c in cuts)})
    parts = [Moments(4, blocks) for _ in range(processes)]
    for turn, (start, stop) in enumerate(itertools.pairwise(edges)):
        parts[turn % processes].update(features[start:stop], start)
    merged = Moments.from_state(parts[-1].state())
    for part in parts[:-1]:
        merged.merge(part)
    assert np.array_equal(merged.count, whole.count)
    for key, value in merged.state().items():
        assert np.allclose(value, whole.state()[key], rtol=1e-12, atol=1e-12)
    assert np.allclose(merged.mean, features.mean(axis=0))
    assert np.allclose(merged.cov, np.cov(features, rowvar=False), atol=1e-10)


def test_states_sum():
    features = gaussian(0, 40, 3)
    a, b = Moments(3, 4), Moments(3, 4)
    a.update(features[:15], 0)
    b.update(features[15:], 15)
    total = Moments.from_state({key: a.state()[key] + b.state()[key] for key in a.state()})
    assert np.allclose(total.cov, np.cov(features, rowvar=False))


@pytest.mark.parametrize("blocks", [1, 7, 50])
def test_blocks_are_balanced(blocks):
    moments = moments_of(np.zeros((blocks * 6, 1)), blocks)
    assert moments.count.tolist() == [6] * blocks


@pytest.mark.parametrize("classes", [10, 50, 100])
def test_labels_that_go_round_meet_all_blocks(classes):
    """If block k were the images i ≡ k (mod 50), it would hold labels i mod 10 of one class only."""
    n = 10_000
    labels = np.eye(classes)[np.arange(n) % classes]
    shares = moments_of(labels).total / (n / 50 / classes)  # 1 where a class has its share of a block
    assert abs(shares - 1).mean() < 0.55
    assert (shares == 0).mean() < 0.2


def test_merge_refuses_other_shapes():
    with pytest.raises(ValueError, match="cannot merge"):
        Moments(3, 4).merge(Moments(3, 5))


def test_too_few_images():
    moments = Moments(3, 4)
    with pytest.raises(InputError, match="mean of nothing"):
        _ = moments.mean
    moments.update(np.zeros((1, 3)), 0)
    with pytest.raises(InputError, match="covariance needs 2"):
        _ = moments.cov
    with pytest.raises(InputError, match="1 non-empty blocks"):
        bootstrap_frechet(moments, moments_of(gaussian(0, 9, 3)))


def test_moments_file(tmp_path):
    moments = moments_of(gaussian(0, 30, 3), 5)
    moments.save(tmp_path / "m.npz")
    loaded = Moments.load(tmp_path / "m.npz")
    assert all(np.array_equal(loaded.state()[key], value) for key, value in moments.state().items())
    assert [path.name for path in tmp_path.iterdir()] == ["m.npz"]
    with pytest.raises(InputError, match="no such file"):
        Moments.load(tmp_path / "nothing.npz")
    data = (tmp_path / "m.npz").read_bytes()
    for bad in (b"", b"hello", data[: len(data) // 2]):
        (tmp_path / "m.npz").write_bytes(bad)
        with pytest.raises(InputError, match=r"m\.npz: not a readable \.npz"):
            Moments.load(tmp_path / "m.npz")
    np.savez(tmp_path / "m.npz", count=np.zeros(2), total=np.zeros((3, 4)), outer=np.zeros((3, 4, 4)))
    with pytest.raises(InputError, match="not a file of moments"):
        Moments.load(tmp_path / "m.npz")


# ------------------------------------------------------------------------------------------------ FID


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


# ------------------------------------------------------------------------------------------------ bootstrap


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


def test_empty_blocks_do_not_matter():
    x, y = moments_of(gaussian(1, 20, 3), 50), moments_of(gaussian(2, 90, 3))
    found = bootstrap_frechet(x, y, 100)
    assert found.shape == (100,)
    assert np.isfinite(found).all()


def test_interval_is_centred_at_the_estimate():
    replicates = np.random.default_rng(0).normal(7, 2, 20_000)
    low, high = interval(3.0, replicates, 0.9)
    assert low == pytest.approx(3 - 1.645 * 2, abs=0.1)
    assert high == pytest.approx(3 + 1.645 * 2, abs=0.1)


def test_intervals_cover():
    """Of 200 experiments, about 95 % of the intervals hold the mean of the estimates, E FID at this n."""
    dim, n, experiments = 4, 500, 200
    generator = np.random.default_rng(0)
    reference = moments_of(generator.normal(size=(20_000, dim)))
    scale = np.array([1.2, 1.0, 0.8, 1.0])
    estimates, intervals = [], []
    for seed in range(experiments):
        a = moments_of(generator.normal(size=(n, dim)) * scale + 0.2)
        estimates.append(frechet_distance(a.mean, a.cov, reference.mean, reference.cov))
        intervals.append(interval(estimates[-1], bootstrap_frechet(a, reference, 200, seed)))
    truth = np.mean(estimates)
    coverage = np.mean([low <= truth <= high for low, high in intervals])
    assert 0.88 <= coverage <= 0.99


def test_common_noise_makes_the_interval_of_a_difference_narrower():
    generator = np.random.default_rng(0)
    noise, other = generator.normal(size=(2, 2000, 4))
    reference = moments_of(generator.normal(size=(5000, 4)))

    def width(a, b):
        difference = bootstrap_frechet(a, reference) - bootstrap_frechet(b, reference)
        low, high = interval(0.0, difference)
        return high - low

    a = moments_of(1.30 * noise)
    assert width(a, moments_of(1.25 * noise)) < 0.5 * width(a, moments_of(1.25 * other))


# ------------------------------------------------------------------------------------------------ reservoir


@given(n=st.integers(0, 120), limit=st.integers(1, 50), cuts=st.lists(st.integers(0, 120), max_size=6))
@settings(max_examples=60, deadline=None)
def test_reservoir_of_any_division_is_that_of_one_pass(n, limit, cuts):
    features = np.arange(n, dtype=np.float32)[:, None]
    whole = Reservoir(1, limit)
    whole.update(features, 0)
    parts = [Reservoir(1, limit), Reservoir(1, limit)]
    edges = sorted({0, n, *(min(c, n) for c in cuts)})
    for turn, (start, stop) in enumerate(itertools.pairwise(edges)):
        parts[turn % 2].update(features[start:stop], start)
    parts[0].merge(parts[1])
    assert np.array_equal(parts[0].features, whole.features)
    assert len(whole.features) == min(n, limit) == len(np.unique(whole.features))


def test_reservoir_is_uniform_and_so_are_its_prefixes():
    reservoir = Reservoir(1, 5000)
    for start in range(0, 50_000, 500):
        reservoir.update(np.arange(start, start + 500)[:, None], start)
    for prefix in (reservoir.features, reservoir.features[:1000]):
        histogram, _ = np.histogram(prefix, bins=10, range=(0, 50_000))
        assert (abs(histogram - len(prefix) / 10) < 5 * (len(prefix) / 10) ** 0.5).all()


def test_an_index_given_twice_is_noticed():
    reservoir = Reservoir(1, 100)
    reservoir.update(np.zeros((10, 1)), 0)
    reservoir.update(np.zeros((10, 1)), 9)
    with pytest.raises(ValueError, match="came twice"):
        _ = reservoir.features


# ------------------------------------------------------------------------------------------------ KID


def sklearn_mmd(x, y):
    """Unbiased MMD² with scikit-learn's kernel."""
    m, kernel = len(x), {"degree": 3, "gamma": 1 / x.shape[1], "coef0": 1}
    xx, yy, xy = (polynomial_kernel(a, b, **kernel) for a, b in ((x, x), (y, y), (x, y)))
    off = ~np.eye(m, dtype=bool)
    return (xx[off].sum() + yy[off].sum()) / (m * (m - 1)) - 2 * xy.mean()


def test_kid_equals_an_independent_computation():
    x, y = gaussian(1, 250, 8), gaussian(2, 233, 8)
    groups = [sklearn_mmd(x[i : i + 20], y[i : i + 20]) for i in range(0, 220, 20)]
    estimate, error = kernel_distance(x, y, block=20)
    assert estimate == pytest.approx(np.mean(groups), rel=1e-10)
    assert error == pytest.approx(np.std(groups, ddof=1) / len(groups) ** 0.5, rel=1e-10)


def test_kid_by_loops():
    x, y = gaussian(1, 4, 2), gaussian(2, 4, 2)

    def k(a, b):
        return (float(a @ b) / 2 + 1) ** 3

    values = []
    for s in (0, 2):
        a, b, c, d = x[s], x[s + 1], y[s], y[s + 1]
        values.append(k(a, b) + k(c, d) - (k(a, c) + k(a, d) + k(b, c) + k(b, d)) / 2)
    assert kernel_distance(x, y)[0] == pytest.approx(np.mean(values))


def test_kid_is_unbiased_and_its_error_is_honest():
    generator = np.random.default_rng(0)
    estimates, errors = zip(
        *(kernel_distance(*generator.normal(size=(2, 400, 3)), block=40) for _ in range(200)), strict=True
    )
    assert abs(np.mean(estimates)) < 4 * np.std(estimates) / 200**0.5
    assert np.mean(np.square(errors)) == pytest.approx(np.var(estimates), rel=0.35)


def test_kid_of_too_few():
    with pytest.raises(InputError, match="4 or more"):
        kernel_distance(np.zeros((3, 2)), np.zeros((9, 2)))


# ------------------------------------------------------------------------------------------------ manifolds


def brute_force(generated, real, k):
    def covered(points, centres):
        hits = 0
        radii = [sorted(np.linalg.norm(c - o) for o in centres)[k] for c in centres]
        for p in points:
            hits += any(np.linalg.norm(p - c) <= r for c, r in zip(centres, radii, strict=True))
        return hits / len(points)

    return covered(generated, real), covered(real, generated)


@pytest.mark.parametrize(("n", "m", "k", "chunk"), [(40, 50, 3, 7), (30, 30, 1, 1000), (60, 20, 5, 60)])
def test_precision_recall_equals_brute_force(n, m, k, chunk):
    points = np.random.default_rng(0).normal(size=(n + m, 3))
    x, y = points[:n], points[n:] + 0.5
    found = precision_recall(x, y, k, chunk)
    assert found == pytest.approx(brute_force(x, y, k))
    assert 0 < found[0] < 1
    assert 0 < found[1] < 1


def test_precision_and_recall_of_a_collapsed_and_of_a_foreign_set():
    real = gaussian(0, 300, 4)
    collapsed = real[:1] + 1e-3 * np.random.default_rng(0).normal(size=(300, 4))
    precision, recall = precision_recall(collapsed, real)
    assert precision == 1
    assert recall < 0.05
    assert precision_recall(real + 1e3, real) == (0, 0)
    assert precision_recall(real, real) == (1, 1)


def test_precision_of_too_few():
    with pytest.raises(InputError, match="more than 3"):
        precision_recall(np.zeros((3, 2)), np.zeros((9, 2)))


# ------------------------------------------------------------------------------------------------ reference


@pytest.fixture(scope="module")
def extractor():
    return load_extractor("digits")


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits")


@pytest.fixture(scope="module")
def reference(digits, extractor, tmp_path_factory):
    return reference_statistics(digits, extractor, tmp_path_factory.mktemp("cache"))


def test_reference_statistics(digits, extractor, reference):
    images, _ = digits.__getitems__(range(len(digits)))
    features = extractor(images).numpy().astype(np.float64)
    assert reference.n == len(digits)
    assert np.allclose(reference.mean, features.mean(axis=0), atol=1e-6)
    assert np.allclose(reference.cov, np.cov(features, rowvar=False), atol=1e-6)
    assert reference.features.shape == features.shape
    assert np.allclose(np.sort(reference.features, axis=0), np.sort(features, axis=0), atol=1e-5)


class Counting(ClassifierExtractor):
    calls = 0

    def forward(self, images):
        self.calls += 1
        return super().forward(images)


@pytest.fixture
def small():
    """A tiny dataset and an extractor for it that counts its calls."""
    images = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 1), dtype=np.uint8)
    torch.manual_seed(0)
    return images, Counting("small", Classifier(1, 8, [4], 3, 2))


def test_reference_is_cached_by_content(small, tmp_path):
    images, extractor = small
    first = reference_statistics(ArrayDataset("a", images), extractor, tmp_path)
    assert extractor.calls == 1
    again = reference_statistics(ArrayDataset("another name", images.copy()), extractor, tmp_path)
    assert extractor.calls == 1
    assert np.array_equal(first.cov, again.cov)
    assert np.array_equal(first.features, again.features)
    changed = images.copy()
    changed[-1, -1, -1] ^= 1
    reference_statistics(ArrayDataset("a", changed), extractor, tmp_path)
    assert extractor.calls == 2
    torch.manual_seed(1)
    other = Counting("small", Classifier(1, 8, [4], 3, 2))
    reference_statistics(ArrayDataset("a", images), other, tmp_path)
    assert other.calls == 1
    assert len(list(tmp_path.iterdir())) == 3


def test_default_cache_folder(small, tmp_path, monkeypatch):
    images, extractor = small
    monkeypatch.setenv("ROBUSTDIFF_CACHE", str(tmp_path / "x/y"))
    reference_statistics(ArrayDataset("a", images), extractor)
    assert len(list((tmp_path / "x/y").glob("reference-*.npz"))) == 1
    monkeypatch.delenv("ROBUSTDIFF_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    reference_statistics(ArrayDataset("a", images), extractor)
    assert len(list((tmp_path / "home/.cache/robustdiff").glob("reference-*.npz"))) == 1


def corrupted(data):
    yield b""
    yield b"hello"
    yield data[: len(data) // 2]
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 0xFF
    yield bytes(flipped)


def test_a_corrupt_cache_entry_is_computed_again(small, tmp_path):
    images, extractor = small
    dataset = ArrayDataset("a", images)
    first = reference_statistics(dataset, extractor, tmp_path)
    (path,) = tmp_path.iterdir()
    data = path.read_bytes()
    for bad in corrupted(data):
        path.write_bytes(bad)
        with pytest.warns(UserWarning, match="computed again"):
            again = reference_statistics(dataset, extractor, tmp_path)
        assert np.array_equal(first.cov, again.cov)
        assert path.read_bytes() == data  # and repaired
    Moments(3, 1).save(path)  # a good file, of something else
    with pytest.warns(UserWarning, match="computed again"):
        reference_statistics(dataset, extractor, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reference_statistics(dataset, extractor, tmp_path)


def test_a_cache_folder_that_cannot_be_written(small, tmp_path):
    images, extractor = small
    (tmp_path / "file").write_text("not a folder")
    with pytest.warns(UserWarning, match="not cached"):
        reference = reference_statistics(ArrayDataset("a", images), extractor, tmp_path / "file")
    assert reference.n == 30


# ------------------------------------------------------------------------------------------------ all of it


@pytest.fixture(scope="module")
def noisy(digits):
    """Digits with noise of two strengths."""
    images, _ = digits.__getitems__(range(600))
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return [(images + scale * noise).round().clamp(0, 255).to(torch.uint8) for scale in (8, 60)]


def fidelity_of(images, extractor, reference):
    fidelity = Fidelity(extractor, reference)
    for start in range(0, len(images), 128):
        fidelity.update(images[start : start + 128], start)
    return fidelity


def test_result(extractor, reference, noisy):
    fidelity = fidelity_of(noisy[0], extractor, reference)
    result = fidelity.result()
    features = extractor(noisy[0]).numpy().astype(np.float64)
    assert result["fid"] == pytest.approx(scipy_frechet(features, reference.features.astype(float)), rel=1e-5)
    low, high = result["fid_ci"]
    assert low < result["fid"] < high
    replicates = bootstrap_frechet(fidelity.moments, reference)
    assert result["fid_ci"] == interval(result["fid"], replicates)
    assert result["n"] == 600
    assert 0 <= result["precision"] <= 1
    assert 0 <= result["recall"] <= 1
    assert result == fidelity.result()
    assert result == fidelity.result(replicates)
    assert fidelity.result(replicates[:50])["fid_ci"] == interval(result["fid"], replicates[:50])


def test_worse_images_get_worse_numbers(extractor, reference, noisy):
    better, worse = (fidelity_of(images, extractor, reference).result() for images in noisy)
    assert better["fid_ci"][1] < worse["fid_ci"][0]
    assert better["kid"] + 2 * better["kid_se"] < worse["kid"] - 2 * worse["kid_se"]
    assert better["precision"] > worse["precision"]


def test_processes_together_are_one(extractor, reference, noisy):
    whole = fidelity_of(noisy[0], extractor, reference).result()
    parts = [Fidelity(extractor, reference) for _ in range(3)]
    for turn, start in enumerate(range(0, 600, 50)):
        parts[turn % 3].update(noisy[0][start : start + 50], start)
    parts[0].merge(parts[1])
    parts[0].merge_state(parts[2].state())
    merged = parts[0].result()
    assert merged.keys() == whole.keys()
    for key, value in whole.items():
        assert merged[key] == pytest.approx(value, rel=1e-4, abs=1e-6)


def test_fidelity_refuses(extractor, reference):
    with pytest.raises(ValueError, match="another extractor"):
        Fidelity(extractor, replace(reference, fingerprint="0" * 64))
    fidelity = Fidelity(extractor, reference)
    with pytest.raises(InputError, match="fidelity of 0 images"):
        fidelity.result()
    with pytest.raises(InputError, match="extractor digits"):
        fidelity.update(torch.zeros(2, 1, 9, 9, dtype=torch.uint8), 0)


def test_features_that_are_not_finite_stop_the_run(small, tmp_path):
    images, extractor = small
    with torch.no_grad():
        extractor.classifier.embed.bias[0] = float("nan")
    with pytest.raises(RunError, match="extractor small: features that are not finite"):
        reference_statistics(ArrayDataset("a", images), extractor, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_metric_that_is_not_finite_is_named(value):
    check_finite("x", {"fid": 1.0, "kid": None})
    with pytest.raises(RunError, match=f"x: kid is {value}"):
        check_finite("x", {"fid": 1.0, "kid": value})


def test_too_few_real_images_are_refused_at_once(small, tmp_path):
    images, extractor = small
    with pytest.raises(InputError, match="a: 3 real images; give 4 or more"):
        reference_statistics(ArrayDataset("a", images[:3]), extractor, tmp_path)
    assert extractor.calls == 0


def test_without_features_there_is_fid_alone(extractor, reference, noisy):
    known = fidelity_of(noisy[0], extractor, reference).result()
    alone = fidelity_of(noisy[0], extractor, Reference(reference.mean, reference.cov, extractor.fingerprint)).result()
    assert alone == {**known, "kid": None, "kid_se": None, "precision": None, "recall": None}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_precomputed_statistics_are_read(extractor, reference, tmp_path, dtype):
    np.savez(tmp_path / "r.npz", mu=reference.mean.astype(dtype), sigma=reference.cov.astype(dtype))
    found = load_reference(tmp_path / "r.npz", extractor)
    assert np.allclose(found.mean, reference.mean, rtol=1e-6)
    assert np.allclose(found.cov, reference.cov, rtol=1e-5, atol=1e-6)
    assert (found.features, found.n, found.fingerprint) == (None, None, extractor.fingerprint)
