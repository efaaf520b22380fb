r"""Exposure bias of a sampler (Ning et al., "Elucidating the Exposure Bias in Diffusion Models", ICLR 2024, arXiv
2308.15321): the standard deviation of its states compared with that of training points.

Let std be the standard deviation over images, averaged over the elements of x. With training points x_t ~ q(x_t) and
states x̂_t ~ p_θ(x_t) of the sampler,

    δ_t = ( std(x̂_t) − std(x_t) )².

Errors of the network's predictions increase std(x̂_t) step by step, which in turn increases the norm of the predictions.
The second measure of Ning et al. therefore compares ‖ε̂(x̂_t, t)‖₂ in sampling with ‖ε̂(x_t, t)‖₂ in training.

As published (their section 3.3 and algorithm 3, and their code) δ_t subtracts the mean given x_0 first,

    δ_t' = ( std(x̂_t − α_t x_0) − σ_t )²,         where x̂_T = α_T x_0 + σ_T ε,

so that the second term is known to be σ_t. But x̂_t does not keep the x_0 that it started from. As α_T → 0, x̂_t and x_0
become independent, and

    var(x̂_t − α_t x_0) = var(x̂_t) + α_t² var(x_0),     whereas in training      σ_t² = var(x_t) − α_t² var(x_0).

The difference of these variances contains 2 α_t² var(x_0), which is no error of the network. δ_t' is thus large even
for a perfect sampler, and grows as t falls. As long as std(x̂_t − α_t x_0) exceeds σ_t, states with too small a standard
deviation score better than correct ones. δ_t does not contain that term, and is zero exactly if the standard deviations
agree. Both are reported: use δ_t to judge a sampler, and δ_t' to compare with published numbers.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from robustdiff.metrics.bootstrap import Array
from robustdiff.mismatch.distances import IMAGE_BLOCKS, Subsets, image_block_of

__all__ = ["BlockMoments"]


class BlockMoments:
    """The running mean and variance of each element over images, for each of K blocks of images.

    Args:
        d: The number of elements of an image. The memory is 16·K·d bytes.
    """

    def __init__(self, d: int) -> None:
        self._count = np.zeros(IMAGE_BLOCKS)
        self._total = np.zeros((IMAGE_BLOCKS, d))
        self._squares = np.zeros((IMAGE_BLOCKS, d))

    def update(self, values: Tensor, indices: range) -> None:
        """Add a batch of images (B, *) with the given numbers, which determine their blocks."""
        flat = values.flatten(1).cpu().double().numpy()  # not every device has float64
        blocks: NDArray[np.bool_] = image_block_of(np.asarray(indices)) == np.arange(IMAGE_BLOCKS)[:, None]
        self._count += blocks.sum(1)
        self._total += blocks @ flat
        self._squares += blocks @ flat**2

    def mean(self, subsets: Subsets) -> Array:
        """Return the mean over images and elements, with shape (S,), for subsets (S, K) of the blocks."""
        return np.asarray((subsets @ self._total).mean(1) / (subsets @ self._count))

    def std(self, subsets: Subsets) -> Array:
        """Return the standard deviation over images, averaged over elements, (S,), for subsets (S, K) of the blocks."""
        n = (subsets @ self._count)[:, None]
        mean = subsets @ self._total / n
        variance = (subsets @ self._squares / n - mean**2) * n / (n - 1)
        return np.asarray(np.sqrt(np.maximum(variance, 0)).mean(1))
