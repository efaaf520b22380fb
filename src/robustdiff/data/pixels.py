"""Cropping, resizing and conversion of images, and their arrangement in a grid.

The crop is the largest centred square. Images are resized by Pillow's bicubic filter, which widens its kernel to
prevent aliasing when it shrinks an image. OpenCV, and torch by default, do not, and aliasing alone changes FID by whole
points (Parmar, Zhang and Zhu, "On Aliased Resizing and Surprising Subtleties in GAN Evaluation", CVPR 2022,
arXiv 2104.11222).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

__all__ = ["crop_square", "fit_array", "fit_image", "tile"]


def crop_square(image: Image.Image) -> Image.Image:
    """Return the largest centred square of an image; the image itself if it is square."""
    side = min(image.size)
    if image.size == (side, side):
        return image
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def fit_image(image: Image.Image, size: int | None, channels: int) -> NDArray[np.uint8]:
    """Crop one image to the centred square, resize it and convert its channels.

    Args:
        image: An image of mode L or RGB.
        size: The side of the result in pixels; None keeps the side of the centred square.
        channels: The number of channels: 1 (luma) or 3 (RGB).

    Returns:
        uint8 (size, size, channels).
    """
    image, mode = crop_square(image), "L" if channels == 1 else "RGB"
    if image.mode != mode:
        image = image.convert(mode)
    if size is not None and size != image.width:
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(image, dtype=np.uint8).reshape(image.height, image.width, channels)


def fit_array(images: NDArray[np.uint8], size: int | None, channels: int | None) -> NDArray[np.uint8]:
    """Apply `fit_image` to all images of an array; returns the array itself if it fits already.

    Args:
        images: The images, uint8 (N, H, W, C), with C = 1 or 3.
        size: The side of the result in pixels; None keeps the height and width.
        channels: The number of channels, 1 or 3; None keeps it.

    Returns:
        uint8 (N, size, size, channels).
    """
    height, width, depth = images.shape[1:]
    channels = depth if channels is None else channels
    if channels == depth and (size is None or size == height == width):
        return images
    if size is None and channels == 3:  # from grey to colour; without a size, images are not cropped
        return np.repeat(images, 3, axis=3)
    if size is None:
        return np.stack([np.asarray(Image.fromarray(image).convert("L"))[..., None] for image in images])
    return np.stack([fit_image(Image.fromarray(i[..., 0] if depth == 1 else i), size, channels) for i in images])


def tile(images: Tensor, columns: int, scale: int = 1) -> NDArray[np.uint8]:
    """Return a grid (rows·H·scale, columns·W·scale, C) of images uint8 (n, C, H, W), with white lines between them."""
    pixels = images.permute(0, 2, 3, 1).numpy().repeat(scale, 1).repeat(scale, 2)
    pixels = np.pad(pixels, ((0, -len(pixels) % columns), (1, 1), (1, 1), (0, 0)), constant_values=255)
    n, height, width, channels = pixels.shape
    rows = pixels.reshape(n // columns, columns, height, width, channels).swapaxes(1, 2)
    return np.ascontiguousarray(rows.reshape(n // columns * height, columns * width, channels))
