r"""The noise of sampled images: a function of the seed, the image's number and the draw, the same on every device.

Random numbers come from Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011), which
has no state: it maps a counter of four 32-bit words under a key of two to four random words. Each of 10 rounds is

    (c0, c1, c2, c3) ← (hi(m1 c2) ⊕ c1 ⊕ k0, lo(m1 c2), hi(m0 c0) ⊕ c3 ⊕ k1, lo(m0 c0)),

with hi and lo the words of a product of 64 bits; between rounds, k0 and k1 are increased by constants. Words are held
in int64, whose products wrap to the same 64 bits on every device. The counter of element e of draw k of image i, and
the key, are

    c0 = ⌊e/4⌋,  c1 = k,  c2 = i mod 2³²,  c3 = ⌊i/2³²⌋ + 2¹⁶ · stream;      k0 = seed mod 2³²,  k1 = ⌊seed/2³²⌋.

Words (w, v) become two standard normal numbers by Box and Muller's transform:

    u = (w + 1)/2³² ∈ (0, 1],      (√(−2 ln u) cos(2πv/2³²), √(−2 ln u) sin(2πv/2³²)),

from (c0, c1) the elements 4⌊e/4⌋ and the next, from (c2, c3) the other two. All of it is in float32, the type of the
result, which also devices without float64 have: u keeps its 24 leading bits, so that small u are exact and numbers
reach ±6.66, as 32 bits allow. Logarithms, sines and cosines are those of the device, and agree to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from robustdiff.errors import InputError, printable

__all__ = ["NOISE", "ImageNoise", "check_noise", "philox"]

NOISE = "philox"
"""The name of this noise in files of images and numbers. That of robustdiff 0.2.0 and before was other, without a
name, and so was the order of prompts that are captions of a dataset."""

_STREAM = 2  # that of images: other uses of the same seed would have others
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_INCREMENTS = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
_WORD = 2**32 - 1

_TOGETHER = 2**22
"""The most numbers that are drawn ahead, which take 20 bytes each while they are computed."""
_CACHED = 2**17
"""The same on a CPU, where more do not stay in its cache."""


def philox(even: Tensor, odd: Tensor, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Compute Philox4x32-10 of counters, in place.

    Args:
        even: The words (c0, c2) of the counters, with shape (2, *), in [0, 2³²), int64, contiguous.
        odd: The words (c1, c3), likewise.
        key: The words (k0, k1) of the key.

    Returns:
        The words (c0, c2) and (c1, c3) of the results, in the memory of the arguments.
    """
    products = torch.empty_like(even)
    k0, k1 = key
    for _ in range(_ROUNDS):
        torch.mul(even[1], _MULTIPLIERS[1], out=products[0])
        torch.mul(even[0], _MULTIPLIERS[0], out=products[1])
        torch.bitwise_right_shift(products, 32, out=even)
        even.bitwise_xor_(odd).bitwise_and_(_WORD)  # the shift copies the sign
        even[0].bitwise_xor_(k0)
        even[1].bitwise_xor_(k1)
        torch.bitwise_and(products, _WORD, out=odd)
        k0, k1 = (k0 + _INCREMENTS[0]) & _WORD, (k1 + _INCREMENTS[1]) & _WORD
    return even, odd


class ImageNoise:
    """The noise (C, H, W) of each of some images, drawn one after the other.

    Args:
        seed: The seed, in [0, 2⁶⁴).
        indices: The numbers of the images, in [0, 2⁴⁸), in steps of one.
        shape: The shape (C, H, W).
        device: The device, where the noise is computed.
        ahead: The number of draws that are expected after the first. They are computed together as far as memory allows
            it, which takes few operations of the device for all of them.

    Raises:
        ValueError: If the seed or a number is out of range.
    """

    def __init__(self, seed: int, indices: range, shape: tuple[int, ...], device: torch.device, ahead: int = 0) -> None:
        if not 0 <= seed < 2**64:
            raise ValueError(f"the seed of images is in [0, 2**64); got {seed}")
        if not (indices.start >= 0 and indices.stop <= 2**48 and indices.step == 1):
            raise ValueError(f"the numbers of images are consecutive and in [0, 2**48); got {indices}")
        self.seed, self.indices, self.shape, self.device, self.ahead = seed, indices, shape, device, ahead
        self._size = math.prod(shape)
        self._drawn = 0  # the number of draws that are computed
        self._waiting: list[Tensor] = []  # those of them that are not handed out, the last first

    def draw(self) -> Tensor:
        """Return the next noise of each image, with shape (B, C, H, W), float32."""
        if not self._waiting:
            most = _CACHED if self.device.type == "cpu" else _TOGETHER
            room = max(1, most // max(1, self._size * len(self.indices)))
            together = min(max(1, self.ahead + 1 - self._drawn), room) if self._drawn else 1
            self._waiting = list(self._normal(range(self._drawn, self._drawn + together)).unbind()[::-1])
            self._drawn += together
        return self._waiting.pop()

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            yield self.draw()

    def _normal(self, draws: range) -> Tensor:
        """Return some draws of all images, with shape (K, B, C, H, W)."""
        images, quads = len(self.indices), -(-self._size // 4)
        even = torch.empty((2, len(draws), images, quads), dtype=torch.int64, device=self.device)
        odd = torch.empty_like(even)
        numbers = torch.arange(self.indices.start, self.indices.stop, device=self.device)[:, None]
        even[0] = torch.arange(quads, device=self.device)
        even[1] = numbers & _WORD
        odd[0] = torch.arange(draws.start, draws.stop, device=self.device)[:, None, None]
        odd[1] = (numbers >> 32) | (_STREAM << 16)
        even, odd = philox(even, odd, (self.seed & _WORD, self.seed >> 32))
        radius = even.add_(1).to(torch.float32).mul_(2.0**-32).log_().mul_(-2).sqrt_()
        angle = odd.to(torch.float32).mul_(2 * math.pi / 2**32)
        normal = torch.empty((len(draws), images, quads, 2, 2), device=self.device)
        cosines, sines = normal.permute(4, 3, 0, 1, 2)
        torch.mul(radius, angle.cos(), out=cosines)
        torch.mul(radius, angle.sin_(), out=sines)
        return normal.view(len(draws), images, 4 * quads)[..., : self._size].reshape(len(draws), images, *self.shape)


def check_noise(
    path: Path, noise: str | None, remedy: str = "choose another --output, or go on with {version}"
) -> None:
    """Check that images, of which a file says the noise, can be compared with images that are sampled now.

    Raises:
        InputError: If they have another noise.
    """
    if noise != NOISE:
        version = "robustdiff 0.2.0" if noise is None else f"the version that has the noise {printable(noise)}"
        raise InputError(
            f"{printable(path)} is of images with other noise than those that this version samples: "
            f"{remedy.format(version=version)}"
        )
