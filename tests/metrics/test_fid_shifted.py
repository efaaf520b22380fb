"""FID at the real brightness: the shift, and that it takes away what a shift of all images adds."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robustdiff.errors import InputError
from robustdiff.metrics.fid_shifted import shift_images, shift_to
from robustdiff.metrics.metric import MetricCollection
from robustdiff.metrics.reference import Reference, reference_statistics

NAMES = ["fid", "fid-shifted", "brightness"]


def measured(metrics, images, batch_size=64):
    metrics.reset()
    for start in range(0, len(images), batch_size):
        metrics.update(images[start : start + batch_size], start)
    return metrics.result("x")


@given(seed=st.integers(0, 999), wanted=st.floats(0, 255), low=st.integers(0, 255), width=st.integers(1, 256))
@settings(max_examples=50, deadline=None)
def test_the_shifted_images_have_the_brightness(seed, wanted, low, width):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(low, min(low + width, 256), (500, 1, 4, 4), generator=generator, dtype=torch.uint8)
    shift = shift_to(wanted, torch.bincount(images.flatten(), minlength=256))
    shifted = shift_images(images, 0, shift)
    assert shifted.double().mean().item() == pytest.approx(wanted, abs=0.1)
    assert shifted.dtype == torch.uint8


def test_without_clipping_the_shift_is_the_difference():
    images = torch.randint(50, 200, (300, 3, 4, 4), dtype=torch.uint8)
    histogram = torch.bincount(images.flatten(), minlength=256)
    mean = images.double().mean().item()
    assert shift_to(mean + 3.3, histogram) == pytest.approx(3.3, abs=1e-9)
    assert shift_to(mean, histogram) == pytest.approx(0, abs=1e-9)
    assert torch.equal(shift_images(images, 17, 0.0), images)
    moved = shift_images(images, 0, -2.25).int() - images.int()
    assert set(moved.unique().tolist()) == {-3, -2}
    assert moved.double().mean().item() == pytest.approx(-2.25, abs=0.01)


def test_it_is_the_fid_of_the_shifted_images(extractor, reference, digits):
    images = digits.__getitems__(range(400))[0]
    shift = shift_to(reference.brightness, torch.bincount(images.flatten(), minlength=256))
    own = measured(MetricCollection(["fid-shifted"], extractor, reference), images)
    other = measured(MetricCollection(["fid"], extractor, reference), shift_images(images, 0, shift))
    assert own.values["fid_shifted"] == pytest.approx(other.values["fid"], rel=1e-6)
    assert own.replicates["fid_shifted"] == pytest.approx(other.replicates["fid"], rel=1e-6)
    assert own.intervals["fid_shifted"] == pytest.approx(other.intervals["fid"], rel=1e-6)


def test_images_that_are_too_bright_differ_in_the_mean_term(extractor, reference, digits):
    images = digits.__getitems__(range(800))[0]
    metrics = MetricCollection(NAMES, extractor, reference)
    plain, bright = (measured(metrics, (images.int() + s).clamp(max=255).byte()).values for s in (0, 25))
    assert bright["fid_mean_term"] > 0.5 * bright["fid"] > 2 * plain["fid"]
    assert bright["fid_shifted"] < 0.3 * bright["fid"]
    assert plain["fid_shifted"] == pytest.approx(plain["fid"], rel=0.1)


def test_processes_together_are_one(extractor, reference, digits):
    images = digits.__getitems__(range(300))[0] // 2
    whole = measured(MetricCollection(["fid-shifted"], extractor, reference), images)
    parts = [MetricCollection(["fid-shifted"], extractor, reference) for _ in range(3)]  # the third has no images
    for turn, start in enumerate(range(0, 300, 50)):
        parts[turn % 2].update(images[start : start + 50], start)
    states = [part.state() for part in parts]
    for part in parts:
        part.reset()
        for state in states:
            part.merge_state(state)
        merged = part.result("x")
        assert merged.values["fid_shifted"] == pytest.approx(whole.values["fid_shifted"], rel=1e-6)
        assert np.allclose(merged.replicates["fid_shifted"], whole.replicates["fid_shifted"])


def test_the_real_brightness_is_known_from_the_images_alone(extractor, reference, digits, tmp_path):
    pixels = digits.__getitems__(range(len(digits)))[0]
    fresh, cached = (reference_statistics(digits, extractor, tmp_path) for _ in range(2))
    assert fresh.brightness == cached.brightness == pytest.approx(pixels.double().mean().item(), rel=1e-12)
    moments = Reference(reference.mean, reference.cov, extractor.fingerprint)
    with pytest.raises(InputError, match="fid-shifted needs of real images more than the mean and covariance"):
        MetricCollection(["fid-shifted"], extractor, moments)
    with pytest.raises(InputError, match="no images"):
        MetricCollection(["fid-shifted"], extractor, reference).result("x")
