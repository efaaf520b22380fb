"""Statistics of the real images: right, cached by content, and read from files of others."""

import warnings

import numpy as np
import pytest
import torch

from robustdiff.data import ArrayDataset
from robustdiff.errors import InputError, RunError
from robustdiff.metrics.extractors.classifier import Classifier, ClassifierExtractor
from robustdiff.metrics.moments import Moments
from robustdiff.metrics.reference import load_reference, reference_statistics


def test_reference_statistics(digits, extractor, reference):
    images, _ = digits.__getitems__(range(len(digits)))[:2]
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


class Photos(ArrayDataset):
    """Count how often images are decoded, which have a fingerprint all the same."""

    decoded = 0

    def __getitems__(self, indices):
        self.decoded += len(indices)
        return super().__getitems__(indices)


class Told:
    def __init__(self):
        self.parts, self.done = [], 0

    def begin(self, description, total):
        self.parts.append((description, total))

    def advance(self, amount, note=""):
        self.done += amount


def test_images_are_decoded_once_and_not_at_all_from_the_cache(small, tmp_path):
    images, extractor = small
    dataset, told = Photos("a", images), Told()
    first = reference_statistics(dataset, extractor, tmp_path, progress=told)
    assert dataset.decoded == 30
    assert (told.parts, told.done) == ([("statistics of a", 30)], 30)
    again = reference_statistics(dataset, extractor, tmp_path, progress=told)
    assert (dataset.decoded, len(told.parts)) == (30, 1)
    assert again.brightness == first.brightness == pytest.approx(images.mean())
    workers = reference_statistics(dataset, extractor, tmp_path / "workers", workers=1)
    assert np.array_equal(workers.features, first.features)


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
    np.savez(path, **Moments(3, 1).state())  # a good file, of something else
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


def test_features_that_are_not_finite_stop_the_run(small, tmp_path):
    images, extractor = small
    with torch.no_grad():
        extractor.classifier.embed.bias[0] = float("nan")
    with pytest.raises(RunError, match="extractor small: features that are not finite"):
        reference_statistics(ArrayDataset("a", images), extractor, tmp_path)
    assert not list(tmp_path.iterdir())


def test_too_few_real_images_are_refused_at_once(small, tmp_path):
    images, extractor = small
    with pytest.raises(InputError, match="a: 3 real images; give 4 or more"):
        reference_statistics(ArrayDataset("a", images[:3]), extractor, tmp_path)
    assert extractor.calls == 0


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_precomputed_statistics_are_read(extractor, reference, tmp_path, dtype):
    np.savez(tmp_path / "r.npz", mu=reference.mean.astype(dtype), sigma=reference.cov.astype(dtype))
    found = load_reference(tmp_path / "r.npz", extractor)
    assert np.allclose(found.mean, reference.mean, rtol=1e-6)
    assert np.allclose(found.cov, reference.cov, rtol=1e-5, atol=1e-6)
    assert (found.features, found.n, found.fingerprint) == (None, None, extractor.fingerprint)
