"""Many images as one picture. (One image to a size is tested by way of the datasets.)"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from robustdiff.data.pixels import crop_box, fit_array, mirror_geometry, tile
from robustdiff.errors import InputError


def test_tiles_are_the_images_in_order():
    images = torch.arange(5, dtype=torch.uint8).reshape(5, 1, 1, 1).expand(5, 1, 2, 2) * 10
    tiled = tile(images, columns=3)
    assert tiled.shape == (2 * 4, 3 * 4, 1)
    centres = tiled[1::4, 1::4, 0]
    assert centres.tolist() == [[0, 10, 20], [30, 40, 255]]


# -- crops -----------------------------------------------------------------------------------------------------


@given(st.tuples(st.integers(1, 60), st.integers(1, 60)), st.tuples(st.integers(1, 20), st.integers(1, 20)))
def test_a_crop_is_the_largest_of_its_ratio_and_lies_in_the_image(size, target):
    for position in (None, (0.0, 0.0), (0.5, 0.25), (1 - 2**-53, 1 - 2**-53)):
        top, left, height, width = crop_box(size, target, position)
        assert 0 <= top <= top + height <= size[0]
        assert 0 <= left <= left + width <= size[1]
        # Exactly: the whole width and the height of the ratio, or the whole height and its width.
        exact = min(size[0], size[1] * target[0] / target[1]), min(size[1], size[0] * target[1] / target[0])
        assert abs(height - max(1, exact[0])) <= 0.5
        assert abs(width - max(1, exact[1])) <= 0.5
        assert height == size[0] or width == size[1]


def test_an_image_is_fitted_by_its_centred_square():
    for width, height in ((7, 10), (10, 7), (9, 6), (5, 5)):
        pixels = torch.arange(width * height, dtype=torch.uint8).reshape(height, width)
        side = min(width, height)
        top, left = (height - side) // 2, (width - side) // 2
        fitted = fit_array(pixels.numpy()[None, ..., None], side, 1)
        assert fitted[0, ..., 0].tolist() == pixels[top : top + side, left : left + side].tolist()


def test_a_size_that_memory_has_no_room_for_is_refused():
    images = np.zeros((2000, 8, 8, 1), np.uint8)
    with pytest.raises(InputError, match=r"size=16384: 2000 images of 8×8 pixels would take 500 GiB"):
        fit_array(images, 16_384, None)


def test_places_are_drawn_equally_often():
    tops = [crop_box((10, 7), (4, 4), (k / 400, 0.9))[0] for k in range(400)]
    assert [tops.count(top) for top in range(4)] == [100] * 4
    assert {crop_box((10, 7), (4, 4), (k / 400, 0.9))[1:] for k in range(400)} == {(0, 7, 7)}


def test_a_crop_that_is_mirrored_is_the_crop_of_the_mirrored_image():
    # Of an image of 20×50 resized to 10×25, crops of 10×10 from the left 3 and, mirrored, from 25 − 10 − 3.
    geometry = torch.tensor([[20, 50, 0, 3], [20, 50, 0, 3], [50, 20, 4, 0], [20, 20, 0, 0]])
    flipped = torch.tensor([True, False, True, True])
    mirrored = mirror_geometry(geometry, (10, 10), flipped)
    assert mirrored.tolist() == [[20, 50, 0, 12], [20, 50, 0, 3], [50, 20, 4, 0], [20, 20, 0, 0]]
