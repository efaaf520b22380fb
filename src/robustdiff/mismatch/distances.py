r"""Distances between samples of two distributions, each with a 95 % interval.

Let x_1 … x_n be drawn from p and y_1 … y_n from q, in d dimensions.

**Sliced Wasserstein** (Bonneel et al., J. Math. Imaging and Vision 51, 2015). Along a direction θ the optimal coupling
of two samples pairs the i-th smallest values, hence

    SW₂² = mean over θ of mean over i of ( (θ·x)_(i) − (θ·y)_(i) )²,       θ uniform on the unit sphere.

Since E(θ·v)² = ‖v‖²/d, SW₂ is a displacement per dimension in the units of x: SW₂ ≤ W₂/√d. Balls of radius η√d around
the points of q can contain p only if SW₂ ≤ η.

**Energy distance** (Székely & Rizzo, J. Statistical Planning and Inference 143, 2013), in units of x:

    E = 2 E‖x − y‖ − E‖x − x'‖ − E‖y − y'‖,

which is zero only if p = q. The estimate is unbiased (the pairs x, x' exclude i = j), and so may be negative.

**Kullback–Leibler divergence** by nearest neighbours (Wang, Kulkarni & Verdú, IEEE Trans. Information Theory 55, 2009;
Pérez-Cruz, ISIT 2008), in nats. With ρ_i the distance of y_i to its k-th neighbour among the other y, and ν_i to its
k-th neighbour among the x,

    KL(q‖p) ≈ d/n Σ_i log(ν_i/ρ_i) + log(n/(n − 1)).

The estimate is consistent but converges slowly, the more so for large d: it assumes that the two densities are constant
over balls whose radius is n^(−1/d) of the spread. The interval does not include this bias, which can have either sign.
If p is narrower than q, neighbours of a point in the tails of q are found on one side only, and the estimate is too
low: for Gaussians, k = 2, n = 2000 and p narrower by a fifth in each of 4 dimensions, its mean is 0.04 instead of 0.23.
In more than about four dimensions the estimate is a score
rather than a divergence: reduce the dimension first. A larger k lowers the variance and increases the bias. KL is
invariant under invertible maps and the estimate is not: scale the coordinates of q to unit variance first.

**Intervals.** The images are divided into K blocks. A replicate is the statistic of the images of K/2 blocks drawn
without replacement, the same for x and y. For a mean, the variance of such half-samples is exactly that of the mean of
all images (the delete-half jackknife; Shao & Wu, Annals of Statistics 17, 1989). No image is in a half-sample twice,
whereas the ties of a bootstrap would set nearest-neighbour distances to zero. The interval is value ± t_{K−1}·(standard
deviation of the replicates). It describes the variation over other sets of n images: a bias that depends on n (of SW₂,
Fréchet and KL) affects the value and is not in the interval. The floor of a statistic is its value between two samples
of q of the same n.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from scipy.spatial import KDTree

from robustdiff.errors import InputError
from robustdiff.metrics.bootstrap import Array
from robustdiff.metrics.fid import frechet_distance

__all__ = [
    "IMAGE_BLOCKS",
    "Estimate",
    "Subsets",
    "energy_distance",
    "estimate",
    "frechet",
    "half_samples",
    "image_block_of",
    "kl_divergence",
    "random_directions",
    "sliced_wasserstein",
]

Subsets = NDArray[np.bool_]

IMAGE_BLOCKS = 20


@dataclass(frozen=True)
class Estimate:
    """A statistic with its 95 % interval.

    Attributes:
        value: The statistic of all images.
        low: The lower end of the interval.
        high: The upper end of the interval.
        floor: The statistic between two samples of q of the same size; None if it is zero in expectation.
    """

    value: float
    low: float
    high: float
    floor: float | None = None


def half_samples(replicates: int = 40, seed: int = 0) -> Subsets:
    """Return masks of blocks, with shape (1 + replicates, K): all blocks first, then random halves of them."""
    generator = np.random.default_rng(seed)
    halves = [generator.permutation(IMAGE_BLOCKS) < IMAGE_BLOCKS // 2 for _ in range(replicates)]
    return np.stack([np.ones(IMAGE_BLOCKS, np.bool_), *halves])


def image_block_of(indices: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the block of each image: its number modulo K. The images must be in random order."""
    return indices % IMAGE_BLOCKS


def estimate(values: NDArray[Any], floor: float | None = None) -> Estimate:
    """Return the estimate from the statistic of all images, values[0], and of half-samples, values[1:]."""
    value = float(values[0])
    half = float(stats.t.ppf(0.975, IMAGE_BLOCKS - 1) * np.std(values[1:], ddof=1))
    return Estimate(value, value - half, value + half, floor)


def _given(x: NDArray[Any], y: NDArray[Any], subsets: Subsets | None) -> tuple[Array, Array, Subsets]:
    """Return the samples in double precision and the subsets; by default one subset with all samples."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if x.shape != y.shape or x.ndim != 2 or len(x) < 4:
        raise InputError(f"samples of shapes {x.shape} and {y.shape}: give as many of each, 4 or more, as (n, d)")
    return x, y, np.ones((1, len(x)), np.bool_) if subsets is None else subsets


def random_directions(d: int, number: int = 128, seed: int = 0) -> Array:
    """Draw directions uniformly on the unit sphere, with shape (number, d)."""
    gaussian = np.random.default_rng(seed).standard_normal((number, d))
    return np.asarray(gaussian / np.linalg.norm(gaussian, axis=1, keepdims=True))


def sliced_wasserstein(x: NDArray[Any], y: NDArray[Any], directions: Array, subsets: Subsets | None = None) -> Array:
    """Return SW₂ along given directions, in units of x per dimension; for p = q its mean is above zero (the floor).

    Args:
        x: Samples of p, with shape (n, d).
        y: Samples of q, with shape (n, d).
        directions: Unit vectors, with shape (L, d).
        subsets: Masks of the images in each of S evaluations, with shape (S, n). Default: one with all images.

    Returns:
        The distance for each subset, with shape (S,).

    Raises:
        InputError: If the samples differ in shape, or are fewer than 4.
    """
    x, y, subsets = _given(x, y, subsets)
    sides = []
    for points in (x, y):
        along = directions @ points.T
        order = along.argsort(axis=1)
        sides.append((np.take_along_axis(along, order, axis=1), order))
    result = np.empty(len(subsets))
    for i, subset in enumerate(subsets):
        # Sorted points stay sorted when some of them are left out.
        a, b = (along[subset[order]].reshape(len(directions), -1) for along, order in sides)
        result[i] = np.sqrt(((a - b) ** 2).mean())
    return result


def energy_distance(x: NDArray[Any], y: NDArray[Any], subsets: Subsets | None = None) -> Array:
    """Return the unbiased estimate of the energy distance, in units of x, with shape (S,).

    Arguments and errors are those of :func:`sliced_wasserstein`, without the directions. The memory is n² numbers.
    """
    x, y, subsets = _given(x, y, subsets)
    centre = y.mean(0)  # leaves distances unchanged, and makes ‖x‖² + ‖y‖² − 2x·y more accurate
    x, y = x - centre, y - centre
    chosen = subsets.astype(np.float64)
    m = chosen.sum(1)

    def total(a: Array, b: Array) -> Array:
        return np.asarray(((chosen @ _distances(a, b)) * chosen).sum(1))

    return np.asarray(2 * total(x, y) / m**2 - (total(x, x) + total(y, y)) / (m * (m - 1)))


def _distances(a: Array, b: Array) -> Array:
    """Return the Euclidean distances of points (m, d) and (n, d), by one product of matrices, with shape (m, n)."""
    squares = (a * a).sum(1)[:, None] + (b * b).sum(1) - 2 * (a @ b.T)
    if a is b:
        np.fill_diagonal(squares, 0)  # which rounding would leave above it
    return np.asarray(np.sqrt(np.maximum(squares, 0, out=squares)))


def frechet(x: NDArray[Any], y: NDArray[Any], subsets: Subsets | None = None) -> Array:
    """Return the squared Fréchet distance of Gaussians with the samples' moments, in squared units of x, (S,).

    It depends on means and covariances alone. Its bias is positive, about d²/n times the variance of a dimension.
    Arguments and errors are those of :func:`sliced_wasserstein`, without the directions.
    """
    x, y, subsets = _given(x, y, subsets)
    result = np.empty(len(subsets))
    for i, subset in enumerate(subsets):
        a, b = x[subset], y[subset]
        covariances = [np.atleast_2d(np.cov(points, rowvar=False)) for points in (a, b)]
        result[i] = frechet_distance(a.mean(0), covariances[0], b.mean(0), covariances[1])
    return result


def kl_divergence(x: NDArray[Any], y: NDArray[Any], k: int = 2, subsets: Subsets | None = None) -> Array:
    """Return KL(q‖p) by k nearest neighbours, in nats, with shape (S,). The module's documentation states the bias.

    Further arguments and errors are those of :func:`sliced_wasserstein`.

    Args:
        k: The rank of the neighbour, ≥ 1. A larger k lowers the variance and increases the bias.

    Raises:
        InputError: If a subset has k points or fewer, or more than k points coincide.
    """
    x, y, subsets = _given(x, y, subsets)
    d = x.shape[1]
    result = np.empty(len(subsets))
    for i, subset in enumerate(subsets):
        a, b = x[subset], y[subset]
        n = len(b)
        if n <= k:
            raise InputError(f"{n} points have no neighbour number {k}: give more samples, or a smaller k")
        rho = KDTree(b).query(b, [k + 1])[0][:, 0]  # the nearest of all is the point itself
        nu = KDTree(a).query(b, [k])[0][:, 0]
        if not rho.all() or not nu.all():
            raise InputError(f"more than {k} points coincide: nearest neighbours need samples of a density")
        result[i] = d * np.log(nu / rho).mean() + np.log(n / (n - 1))
    return result
