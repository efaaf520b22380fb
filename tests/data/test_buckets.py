"""Aspect-ratio buckets."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from robustdiff.data.buckets import bucket_sizes, nearest_bucket


def test_the_buckets_of_512_pixels_are_those_of_sd_scripts() -> None:
    wide = [(256, 832), (256, 896), (256, 960), (256, 1024), (320, 704), (320, 768), (384, 640), (448, 576)]
    assert bucket_sizes(512, 64) == sorted([*wide, (512, 512), *((w, h) for h, w in wide)])


@given(st.integers(1, 40), st.sampled_from([1, 8, 64]))
def test_sizes_fit_into_the_area_and_are_multiples(multiple: int, step: int) -> None:
    size = multiple * step
    buckets = bucket_sizes(size, step)
    assert (size, size) in buckets
    for height, width in buckets:
        assert height % step == width % step == 0
        assert height * width <= size**2
        assert size / 2 <= min(height, width) <= max(height, width) <= 2 * size
        assert (width, height) in buckets


def test_an_image_is_in_the_bucket_of_the_nearest_ratio() -> None:
    buckets = bucket_sizes(512, 64)
    sizes = torch.tensor([(100, 100), (3000, 4000), (1000, 10), (10, 1000), (333, 222)])
    found = [buckets[k] for k in nearest_bucket(sizes, buckets)]
    assert found == [(512, 512), (448, 576), (1024, 256), (256, 1024), (640, 384)]
