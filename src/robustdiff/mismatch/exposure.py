r"""Exposure bias as Ning et al. measure it ("Elucidating the Exposure Bias in Diffusion Models", ICLR 2024, arXiv
2308.15321), by comparing the spread of the sampler's states with that of the points the network was trained on.

Let std be the standard deviation over images, averaged over the elements of x. Training has x_t ~ q(x_t), the sampler
makes x̂_t ~ p_θ(x_t), and

    δ_t = ( std(x̂_t) − std(x_t) )².

Errors of the network's predictions widen x̂_t step by step; a wider x̂_t in turn makes longer predictions, so that their
second measure is ‖ε̂(x̂_t, t)‖₂ in sampling against ‖ε̂(x_t, t)‖₂ in training.

As published (their section 3.3 and algorithm 3, and their code) δ_t subtracts the mean given x_0 first,

    δ_t' = ( std(x̂_t − α_t x_0) − σ_t )²,         where x̂_T = α_T x_0 + σ_T ε,

so that the training side is σ_t without sampling. But x̂_t forgets the x_0 it was started from. As α_T → 0 the two are
independent, and

    var(x̂_t − α_t x_0) = var(x̂_t) + α_t² var(x_0)      where training has      σ_t² = var(x_t) − α_t² var(x_0):

δ_t' holds 2 α_t² var(x_0) that no error of the network has put there. It is large also for a perfect sampler and grows
as t falls; and while the left side is above σ_t, a path that is too narrow rates better than one that is right. δ_t is
without that term: zero exactly when the spreads agree. Both are measured: judge by δ_t, and compare with published
numbers by δ_t'.

Only sums are kept, by block of images (:mod:`robustdiff.mismatch.distances`): memory does not grow with their number.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from robustdiff.mismatch.distances import BLOCKS, Array, Subsets, block_of

__all__ = ["BlockMoments"]


class BlockMoments:
    """A streaming mean and variance of each element over images, by blocks.

    Arguments:
        d: The number of elements. Memory is 16·K·d bytes.
    """

    def __init__(self, d: int) -> None:
        self._count = np.zeros(BLOCKS)
        self._total = np.zeros((BLOCKS, d))
        self._squares = np.zeros((BLOCKS, d))

    def update(self, values: Tensor, indices: range) -> None:
        """Add the images (B, *) with the given numbers."""
        flat = values.flatten(1).double().cpu().numpy()
        blocks: NDArray[np.bool_] = block_of(np.asarray(indices)) == np.arange(BLOCKS)[:, None]
        self._count += blocks.sum(1)
        self._total += blocks @ flat
        self._squares += blocks @ flat**2

    def mean(self, subsets: Subsets) -> Array:
        """Return the mean over images and elements, for subsets of the blocks (S, K): (S,)."""
        return np.asarray((subsets @ self._total).mean(1) / (subsets @ self._count))

    def std(self, subsets: Subsets) -> Array:
        """Return the standard deviation over images, averaged over elements, for subsets of blocks (S, K): (S,)."""
        n = (subsets @ self._count)[:, None]
        mean = subsets @ self._total / n
        variance = (subsets @ self._squares / n - mean**2) * n / (n - 1)
        return np.asarray(np.sqrt(np.maximum(variance, 0)).mean(1))
