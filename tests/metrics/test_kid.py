"""KID against independent computations."""

import numpy as np
import pytest
import torch
from sklearn.metrics.pairwise import polynomial_kernel

from robustdiff.data import ArrayDataset
from robustdiff.errors import InputError
from robustdiff.evaluation.prompts import prompts_of
from robustdiff.metrics.extractors.extractor import FeatureExtractor
from robustdiff.metrics.kid import kernel_distance
from robustdiff.metrics.metric import MetricCollection
from robustdiff.metrics.reference import reference_statistics


def gaussian(seed, n, dim):
    """(n, dim) with a mean and a covariance of its own."""
    generator = np.random.default_rng(seed)
    mix = generator.normal(size=(dim, dim)) / dim**0.5
    return generator.normal(size=(n, dim)) @ mix + generator.normal(size=dim)


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


def test_small_sets_have_ten_groups():
    x, y = gaussian(1, 40, 8), gaussian(2, 45, 8)
    groups = [sklearn_mmd(x[i : i + 4], y[i : i + 4]) for i in range(0, 40, 4)]
    assert kernel_distance(x, y)[0] == pytest.approx(np.mean(groups), rel=1e-10)


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


class Pixels(FeatureExtractor):
    name, dim, fingerprint = "pixels", 16, "0" * 64

    def forward(self, images):
        return images.flatten(1) / 64.0 - 2


def test_kid_is_unbiased_where_images_are_made_for_the_captions_of_the_real_ones(tmp_path):
    """Measure images that are nearly the real ones whose captions they have: both sets have one distribution."""
    random, estimates, paired = np.random.default_rng(0), [], []
    for _ in range(40):
        images = random.integers(2, 254, (60, 4, 4, 1), np.uint8)
        real = ArrayDataset("real", images, captions=[[f"the {i}"] for i in range(60)])
        near = torch.from_numpy(images + random.integers(-2, 3, images.shape).astype(np.uint8)).permute(0, 3, 1, 2)
        prompts = prompts_of(real)
        made = torch.stack([near[int(text.removeprefix("the "))] for text in prompts.texts])
        reference = reference_statistics(real, Pixels(), tmp_path)
        metrics = MetricCollection(["kid"], Pixels(), reference)
        metrics.update(made, 0)
        estimates.append(metrics.result("made").values["kid"])
        features = (Pixels().extract(near), Pixels().extract(real.__getitems__(range(60)).images))
        paired.append(kernel_distance(*features)[0])
    error = np.std(estimates) / 40**0.5
    assert abs(np.mean(estimates)) < 3 * error
    assert np.mean(paired) < -20 * error, "groups of the same images would not do"


def test_kid_of_too_few():
    with pytest.raises(InputError, match="4 or more"):
        kernel_distance(np.zeros((3, 2)), np.zeros((9, 2)))
