"""One image to the size and the channels that were asked for, and many as one picture.

The crop is the largest centred square; the resize is Pillow's bicubic, which widens its kernel when it
shrinks an image, i.e. filters before it subsamples. Resizers that do not (OpenCV's, and torch's by default)
alias, and aliasing alone moves FID by whole points (Parmar, Zhang and Zhu, "On Aliased Resizing and
Surprising Subtleties in GAN Evaluation", CVPR 2022, arXiv 2104.11222).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

__all__ = ["crop_square", "fit_array", "fit_image", "tile"]


def crop_square(image: Image.Image) -> Image.Image:
    """Return the largest centred square of an image; the image itself if it is one."""
    side = min(image.size)
    if image.size == (side, side):
        return image
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def fit_image(image: Image.Image, size: int | None, channels: int) -> NDArray[np.uint8]:
    """Crop one image to the centred square, resize and convert it.

    Args:
        image: An image of mode L or RGB.
        size: Side of the result in pixels; None keeps the side of the centred square.
        channels: 1 (luma) or 3 (RGB).

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
    """Fit all images of an array, as `fit_image` does; nothing is copied, cropped or converted when it fits already.

    Args:
        images: uint8 (N, H, W, C), C = 1 or 3.
        size: Side in pixels, None to keep height and width.
        channels: 1, 3 or None to keep.

    Returns:
        uint8 (N, size, size, channels).
    """
    height, width, depth = images.shape[1:]
    channels = depth if channels is None else channels
    if channels == depth and (size is None or size == height == width):
        return images
    if size is None and channels == 3:  # grey to colour; a change of channels alone does not crop
        return np.repeat(images, 3, axis=3)
    if size is None:
        return np.stack([np.asarray(Image.fromarray(image).convert("L"))[..., None] for image in images])
    return np.stack([fit_image(Image.fromarray(i[..., 0] if depth == 1 else i), size, channels) for i in images])


def tile(images: Tensor, columns: int, scale: int = 1) -> NDArray[np.uint8]:
    """Return images uint8 (n, C, H, W) as one, (rows·H·scale, columns·W·scale, C), with white lines between them."""
    pixels = images.permute(0, 2, 3, 1).numpy().repeat(scale, 1).repeat(scale, 2)
    pixels = np.pad(pixels, ((0, -len(pixels) % columns), (1, 1), (1, 1), (0, 0)), constant_values=255)
    n, height, width, channels = pixels.shape
    rows = pixels.reshape(n // columns, columns, height, width, channels).swapaxes(1, 2)
    return np.ascontiguousarray(rows.reshape(n // columns * height, columns * width, channels))
