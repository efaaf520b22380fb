"""Many images as one picture. (One image to a size is tested by way of the datasets.)"""

from __future__ import annotations

import torch

from robustdiff.data.pixels import tile


def test_tiles_are_the_images_in_order():
    images = torch.arange(5, dtype=torch.uint8).reshape(5, 1, 1, 1).expand(5, 1, 2, 2) * 10
    tiled = tile(images, columns=3)
    assert tiled.shape == (2 * 4, 3 * 4, 1)
    centres = tiled[1::4, 1::4, 0]
    assert centres.tolist() == [[0, 10, 20], [30, 40, 255]]
