r"""FID after the images are shifted to the brightness of the real ones.

FID at few steps follows the mean grey value of the images closely. This number tells how much of FID is left without
that: each value x of image i, in {0, …, 255}, becomes

    clip(x + ⌊s + u_i⌋, 0, 255),     u_i = frac(iφ) with the golden ratio φ,

and the FID of the features of these images is computed. The shift s is a real number. Since the u_i are uniform in
[0, 1) over any run of images, the mean shift is s although pixels are whole numbers. If no value is clipped, s is the
difference between the two mean grey values; in general it is where

    M(s) = (1 − p) m(⌊s⌋) + p m(⌊s⌋ + 1),     p = s − ⌊s⌋,     m(k) = mean of clip(x + k, 0, 255),

equals the mean grey value of the real images. m follows from the histogram of the values.

s is known only after the last image, so each process keeps its images until then, and all of them at the end, N·C·H·W
bytes for N images. Their features are extracted a second time. Bootstrap replicates have the same s.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from robustdiff.errors import InputError
from robustdiff.metrics.bootstrap import GOLDEN, Array
from robustdiff.metrics.fid import FID
from robustdiff.metrics.metric import METRICS, Batch, Metric, Need, Number

__all__ = ["ShiftedFID", "shift_images", "shift_to"]

LEVELS = 256


def shift_to(brightness: float, histogram: Tensor) -> float:
    """Return the shift s at which images have a mean grey value, in [−255, 255].

    Args:
        brightness: The wanted mean grey value, in [0, 255].
        histogram: The number of values of each level, int64 (256,).
    """
    shifts = torch.arange(1 - LEVELS, LEVELS)
    shifted = (torch.arange(LEVELS) + shifts[:, None]).clamp(0, LEVELS - 1)
    means = (shifted.double() @ histogram.double() / histogram.sum()).numpy()
    return float(np.interp(brightness, means, shifts.numpy()))  # the means rise from 0 to 255


def shift_images(images: Tensor, start: int, shift: float) -> Tensor:
    """Return images whose values are shifted by a real number on average, uint8 (B, C, H, W).

    Args:
        images: uint8 (B, C, H, W).
        start: The index i of the first image.
        shift: The mean shift s.
    """
    dither = np.arange(start, start + len(images)) * GOLDEN % 1
    whole = torch.from_numpy(np.floor(shift + dither).astype(np.int16)).to(images.device)
    return (images.to(torch.int16) + whole[:, None, None, None]).clamp(0, LEVELS - 1).to(torch.uint8)


@METRICS.register("fid-shifted")
class ShiftedFID(Metric):
    """FID of the images at the brightness of the real ones, with replicates."""

    numbers = (Number("fid_shifted", "FID at the real brightness", ".2f", "lower", log=True),)
    needs: ClassVar[Need] = "reference features"

    def reset(self) -> None:
        self._images: list[tuple[int, Tensor]] = []  # of each batch: the index of the first image, and the images
        self._fid: FID | None = None

    def update(self, batch: Batch) -> None:
        self._images.append((batch.start, batch.images.cpu()))
        self._fid = None

    def state(self) -> Any:
        return self._images

    def merge_state(self, state: Any) -> None:
        self._images += state
        self._fid = None

    def _shifted(self) -> FID:
        """Return the FID of the shifted images."""
        if self._fid is None:
            if not self._images:
                raise InputError("no images: the mean of nothing is not defined; update first")
            assert self.real.brightness is not None
            histogram = torch.zeros(LEVELS, dtype=torch.int64)
            for _, images in self._images:
                histogram += torch.bincount(images.flatten(), minlength=LEVELS)
            shift = shift_to(self.real.brightness, histogram)
            self._fid = FID(self.real)
            for start, images in self._images:
                self._fid.update(Batch(shift_images(images, start, shift), start, extractor=self.extractor))
        return self._fid

    def result(self) -> dict[str, float | None]:
        return {"fid_shifted": self._shifted().distance()}

    def replicates(self) -> dict[str, Array]:
        return {"fid_shifted": self._shifted().replicates()["fid"]}

    @property
    def blocks(self) -> int:
        return self._shifted().blocks
