"""Cropping, resizing and conversion of images, and their arrangement in a grid.

The crop is the largest one of an aspect ratio, by default the centred square. Images are resized by Pillow's bicubic
filter, which widens its kernel to prevent aliasing when it shrinks an image. OpenCV, and torch by default, do not, and
aliasing alone changes FID by whole points (Parmar, Zhang and Zhu, "On Aliased Resizing and Surprising Subtleties in GAN
Evaluation", CVPR 2022, arXiv 2104.11222).
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from robustdiff.errors import InputError

__all__ = ["Position", "crop_box", "fit_array", "mirror_geometry", "resize_image", "tile"]

# Images that are held in memory may be resized to so many bytes, or to so many times those that they have.
_MOST_BYTES, _MOST_GROWTH = 2**31, 200

Position = tuple[float, float]
"""The place of a crop, from the top and from the left, each in [0, 1) of the room that there is."""


def crop_box(
    size: tuple[int, int], target: tuple[int, int], position: Position | None = None
) -> tuple[int, int, int, int]:
    """Return the largest crop of an image that has the aspect ratio of the result.

    Args:
        size: The height and width of the image.
        target: The height and width of the result.
        position: The place of the crop; None is the centre.

    Returns:
        The top, the left, the height and the width of the crop in pixels of the image.
    """
    (height, width), (h, w) = size, target
    if width * h > height * w:
        crop = height, max(1, min(width, round(height * w / h)))
    else:
        crop = max(1, min(height, round(width * h / w))), width
    room = height - crop[0], width - crop[1]
    if position is None:
        return room[0] // 2, room[1] // 2, *crop
    return int(position[0] * (room[0] + 1)), int(position[1] * (room[1] + 1)), *crop


def mirror_geometry(geometry: Tensor, target: tuple[int, int], flipped: Tensor) -> Tensor:
    """Return the geometry of a batch in which some images are mirrored after they were cropped.

    Args:
        geometry: The heights and widths of the images, and the tops and lefts of the crops in the resized images, int64
            (B, 4).
        target: The height and width of the crops.
        flipped: The mask (B,) of the mirrored images.
    """
    height, width, top, left = geometry.unbind(1)
    h, w = target
    resized = (width * h / height).round().long().clamp(min=w)
    return torch.stack([height, width, top, torch.where(flipped, (resized - w - left).clamp(min=0), left)], dim=1)


def resize_image(image: Image.Image, height: int, width: int, channels: int) -> NDArray[np.uint8]:
    """Resize one image, of mode L or RGB, and convert its channels, to uint8 (height, width, channels)."""
    mode = "L" if channels == 1 else "RGB"
    if image.mode != mode:
        image = image.convert(mode)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image, dtype=np.uint8).reshape(image.height, image.width, channels)


def fit_array(images: NDArray[np.uint8], size: int | None, channels: int | None) -> NDArray[np.uint8]:
    """Crop all images of an array to centred squares, resize and convert them; returns the array if it fits already.

    Args:
        images: The images, uint8 (N, H, W, C), with C = 1 or 3.
        size: The side of the result in pixels; None keeps the height and width.
        channels: The number of channels, 1 or 3; None keeps it.

    Returns:
        uint8 (N, size, size, channels).

    Raises:
        InputError: If the result is far larger than the array, as a size in somebody else's recipe may ask for.
    """
    height, width, depth = images.shape[1:]
    channels = depth if channels is None else channels
    if channels == depth and (size is None or size == height == width):
        return images
    needed = 0 if size is None else len(images) * size**2 * channels
    if needed > max(_MOST_BYTES, _MOST_GROWTH * images.nbytes):
        raise InputError(
            f"size={size}: {len(images)} images of {height}×{width} pixels would take {needed / 2**30:.0f} GiB of "
            "memory; give a smaller size"
        )
    if size is None and channels == 3:  # from grey to colour; without a size, images are not cropped
        return np.repeat(images, 3, axis=3)
    if size is None:
        return np.stack([np.asarray(Image.fromarray(image).convert("L"))[..., None] for image in images])
    top, left, side, _ = crop_box((height, width), (1, 1))
    images = images[:, top : top + side, left : left + side]
    images = images[..., 0] if depth == 1 else images
    return np.stack([resize_image(Image.fromarray(image), size, size, channels) for image in images])


def tile(images: Tensor, columns: int, scale: int = 1) -> NDArray[np.uint8]:
    """Return a grid (rows·H·scale, columns·W·scale, C) of images uint8 (n, C, H, W), with white lines between them."""
    pixels = images.permute(0, 2, 3, 1).numpy().repeat(scale, 1).repeat(scale, 2)
    pixels = np.pad(pixels, ((0, -len(pixels) % columns), (1, 1), (1, 1), (0, 0)), constant_values=255)
    n, height, width, channels = pixels.shape
    rows = pixels.reshape(n // columns, columns, height, width, channels).swapaxes(1, 2)
    return np.ascontiguousarray(rows.reshape(n // columns * height, columns * width, channels))
