r"""Fidelity: how far the law of the generated images is from that of the data, and how sure we are.

Let f = φ(image) ∈ R^D be features, P their law over generated images, Q over real ones.

**FID**, the squared Fréchet (2-Wasserstein) distance between the Gaussians with the moments of P and Q
(Heusel et al., NeurIPS 2017, arXiv 1706.08500):

    FID = ‖μ₁ − μ₂‖² + tr C₁ + tr C₂ − 2 tr (C₁C₂)^½

C₁C₂ is not symmetric, but it has the eigenvalues of C₂^½ C₁ C₂^½, which is: so the last trace is the sum of
the square roots of the eigenvalues of a symmetric positive semi-definite matrix. No matrix root of a
non-symmetric matrix, no complex numbers, and singular covariances are nothing special.

**Its uncertainty.** Images fall into K groups, the blocks, and for each block we keep n_k, s_k = Σf and
S_k = Σff^⊤. These are independent and alike, so they can be resampled: draw w ~ Multinomial(K, 1/K) and
recompute FID from Σ w_k n_k, Σ w_k s_k, Σ w_k S_k. That is the bootstrap (Efron, Annals of Statistics 7,
1979) at a cost in memory that does not grow with the number of images. FID is biased upwards by the noise in
its moments, and a resample has that noise twice, hence the replicates are centred at the estimate: if F* are
the replicates, the interval is the quantiles of F* − mean F* + F. It covers the expectation of FID at this
number of images, the reference being given. Two generated sets are compared with the same w for both: if
image i of both started from the same noise, the interval of the difference is the narrower for it.

**KID**, the squared maximum mean discrepancy with k(x, y) = (x·y/D + 1)³, without bias (Bińkowski et al.,
ICLR 2018, arXiv 1801.01401). With m features x of P and m features y of Q

    KID_m = 1/(m(m−1)) Σ_{i≠j} [k(x_i, x_j) + k(y_i, y_j)] − 2/m² Σ_{i,j} k(x_i, y_j)

and as the estimate the mean over disjoint groups of m features: the groups are independent, so their spread
gives the standard error (the B-test of Zaremba, Gretton and Blaschko, NeurIPS 2013, arXiv 1307.1954).

**Precision and recall** (Kynkäänniemi et al., NeurIPS 2019, arXiv 1904.06991): the manifold of a set is the
union of balls around its features, each as wide as the distance to its k-th nearest neighbour. Precision is
the fraction of generated features in the manifold of the real ones, recall the reverse.
"""

from __future__ import annotations

import hashlib
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from robustdiff.data.archive import list_npz, read_npz
from robustdiff.data.dataset import ImageDataset
from robustdiff.errors import InputError, RunError
from robustdiff.evaluation.features import FeatureExtractor
from robustdiff.files import atomic_write, cache_folder

__all__ = [
    "Fidelity",
    "Moments",
    "Reference",
    "Reservoir",
    "bootstrap_frechet",
    "check_finite",
    "frechet_distance",
    "interval",
    "kernel_distance",
    "load_reference",
    "precision_recall",
    "reference_statistics",
]

Array = NDArray[np.float64]

LIMIT = 10_000  # features kept for KID and for precision and recall, whose cost is the square of it
GOLDEN = (5**0.5 - 1) / 2
REPLICATES = 200  # of the bootstrap
FEWEST = 4  # images of which KID has a standard error


class Gaussian(Protocol):
    """What the Fréchet distance needs of a set: `Moments` and `Reference` have it."""

    @property
    def mean(self) -> Array:
        """(D,)."""

    @property
    def cov(self) -> Array:
        """(D, D)."""


# ------------------------------------------------------------------------------------------------ moments


class Moments:
    """Streaming first and second moments, by blocks.

    Image i belongs to a block that depends on i and K alone, so that the sums are the same however the images
    are divided among batches and processes. Round r = ⌊i/K⌋ goes through the K blocks once, starting at block
    ⌊K·frac(rφ)⌋, φ the golden ratio. Without the shift block k would hold the images i ≡ k (mod K), and if
    labels go round too, as i mod 10 does, each block would hold one class, and blocks would not be alike.

    Args:
        dim: D, the number of features.
        blocks: K, the number of blocks. Memory is 8·K·D² bytes.

    Attributes:
        count: n_k, int64 (K,).
        total: s_k, float64 (K, D).
        outer: S_k, float64 (K, D, D).
    """

    def __init__(self, dim: int, blocks: int = 50) -> None:
        self.count = np.zeros(blocks, np.int64)
        self.total = np.zeros((blocks, dim))
        self.outer = np.zeros((blocks, dim, dim))

    @property
    def dim(self) -> int:
        return self.total.shape[1]

    @property
    def blocks(self) -> int:
        return len(self.count)

    @property
    def n(self) -> int:
        """Number of images."""
        return int(self.count.sum())

    def update(self, features: NDArray[Any], start_index: int) -> None:
        """Add a batch.

        Args:
            features: (B, D), of the images start_index … start_index + B − 1.
            start_index: Index of the first among all images of all processes, ≥ 0.
        """
        features = np.asarray(features, np.float64)
        index = start_index + np.arange(len(features))
        block = (index + (self.blocks * (index // self.blocks * GOLDEN % 1)).astype(np.int64)) % self.blocks
        for k in np.unique(block):
            rows = features[block == k]
            self.count[k] += len(rows)
            self.total[k] += rows.sum(axis=0)
            self.outer[k] += rows.T @ rows

    def merge(self, other: Moments) -> None:
        """Add the images of another one, of the same D and K.

        Raises:
            ValueError: D or K differ.
        """
        if other.outer.shape != self.outer.shape:
            raise ValueError(f"cannot merge moments (K, D, D) = {other.outer.shape} into {self.outer.shape}")
        self.count += other.count
        self.total += other.total
        self.outer += other.outer

    @property
    def mean(self) -> Array:
        """μ, (D,)."""
        if self.n == 0:
            raise InputError("no images: the mean of nothing is not defined; update first")
        return np.asarray(self.total.sum(axis=0) / self.n)

    @property
    def cov(self) -> Array:
        """C, (D, D), divided by n − 1 as numpy.cov does and the original FID."""
        if self.n < 2:
            raise InputError(f"{self.n} images: the covariance needs 2 or more; generate more images")
        mean = self.mean
        return np.asarray((self.outer.sum(axis=0) - self.n * np.outer(mean, mean)) / (self.n - 1))

    def state(self) -> dict[str, NDArray[Any]]:
        """The three arrays, by their attributes' names. States of disjoint sets of images can be summed."""
        return {"count": self.count, "total": self.total, "outer": self.outer}

    @classmethod
    def from_state(cls, state: Mapping[str, NDArray[Any]]) -> Moments:
        """The inverse of `state`.

        Raises:
            ValueError: The shapes do not belong together.
        """
        count, total, outer = (np.array(state[key]) for key in ("count", "total", "outer"))
        if total.ndim != 2 or count.shape != total.shape[:1] or outer.shape != (*total.shape, total.shape[1]):
            raise ValueError(f"moments of shapes {count.shape}, {total.shape}, {outer.shape}")
        moments = cls(total.shape[1], len(count))
        moments.count[:], moments.total[:], moments.outer[:] = count, total, outer
        return moments

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an `.npz` file, whole or not at all."""
        with atomic_write(path) as file:
            np.savez(file, **self.state())  # type: ignore[arg-type]  # numpy types the keywords as options

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Moments:
        """Read what `save` wrote.

        Raises:
            InputError: No such file, or not such a file.
        """
        try:
            return cls.from_state(read_npz(path, ("count", "total", "outer")))
        except InputError:
            raise
        except (KeyError, ValueError) as error:
            raise InputError(f"{path}: not a file of moments ({error}); give one that Moments.save wrote") from error


# ------------------------------------------------------------------------------------------------ FID


def _root(cov: Array) -> Array:
    """C^½ of a symmetric positive semi-definite (D, D). Eigenvalues that rounding made negative are zero."""
    values, vectors = np.linalg.eigh(cov)
    return np.asarray((vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T)


def _frechet(mean1: Array, cov1: Array, mean2: Array, cov2: Array, root2: Array) -> Array:
    """FID of each of R Gaussians, (R, D) and (R, D, D), from one; `root2` is C₂^½. Returns (R,)."""
    values = np.linalg.eigvalsh(root2 @ cov1 @ root2)
    overlap = np.sqrt(np.maximum(values, 0)).sum(axis=-1)
    traces = np.trace(cov1, axis1=-2, axis2=-1) + np.trace(cov2)
    return np.asarray(((mean1 - mean2) ** 2).sum(axis=-1) + traces - 2 * overlap)


def frechet_distance(mean1: Array, cov1: Array, mean2: Array, cov2: Array) -> float:
    """The squared Fréchet distance of two Gaussians.

    Args:
        mean1: μ₁, (D,).
        cov1: C₁, (D, D), symmetric positive semi-definite, singular or not.
        mean2: μ₂, (D,).
        cov2: C₂, (D, D).

    Returns:
        The distance, ≥ 0: what rounding takes below zero is zero.

    Raises:
        ValueError: The shapes do not belong together.
    """
    mean1, cov1, mean2, cov2 = (np.asarray(a, np.float64) for a in (mean1, cov1, mean2, cov2))
    if not mean1.shape == mean2.shape or not cov1.shape == cov2.shape == (*mean1.shape, *mean1.shape):
        raise ValueError(f"means {mean1.shape}, {mean2.shape} and covariances {cov1.shape}, {cov2.shape}")
    distance = _frechet(mean1[None], cov1[None], mean2, cov2, _root(cov2))
    return max(float(distance[0]), 0.0)


def bootstrap_frechet(moments: Moments, reference: Gaussian, replicates: int = REPLICATES, seed: int = 0) -> Array:
    """Bootstrap replicates of the FID, the reference held fixed.

    The weights depend on the seed and the number of non-empty blocks alone. So two sets of equally many
    images get the same weights, and the difference of their replicates is a replicate of the difference.

    Args:
        moments: Of the generated images. With fewer images than blocks a block is an image.
        reference: Of the real ones.
        replicates: R. Each takes one eigendecomposition: with 64 features 200 take a fraction of a second, with
            Inception's 2048 seconds each.
        seed: Of the weights.

    Returns:
        (R,), not centred: give them to `interval`.

    Raises:
        InputError: Fewer than two non-empty blocks.
    """
    filled = moments.count > 0
    blocks = int(filled.sum())
    if blocks < 2:
        raise InputError(f"{blocks} non-empty blocks: an interval needs 2 or more; generate more images")
    count, total, outer = moments.count[filled], moments.total[filled], moments.outer[filled]
    weights = np.random.default_rng(seed).multinomial(blocks, np.full(blocks, 1 / blocks), size=replicates)
    mean2, cov2 = reference.mean, reference.cov
    root2 = _root(cov2)
    dim = moments.dim
    result = np.empty(replicates)
    chunk = max(1, 2**25 // dim**2)  # replicates at a time: a quarter of a gigabyte of covariances
    for start in range(0, replicates, chunk):
        w = weights[start : start + chunk].astype(np.float64)
        n = (w @ count)[:, None]
        mean = w @ total / n
        cov = (w @ outer.reshape(blocks, -1)).reshape(-1, dim, dim)
        cov -= n[..., None] * mean[:, :, None] * mean[:, None, :]
        cov /= n[..., None] - 1
        result[start : start + chunk] = _frechet(mean, cov, mean2, cov2, root2)
    return result


def interval(estimate: float, replicates: Array, level: float = 0.95) -> tuple[float, float]:
    """Bootstrap interval, the replicates recentred at the estimate.

    For the difference of two generated sets a and b: `interval(fid_a - fid_b, replicates_a - replicates_b)`.

    Args:
        estimate: The statistic.
        replicates: (R,), its bootstrap replicates.
        level: Nominal coverage, in (0, 1).

    Returns:
        Lower and upper end.
    """
    tail = (1 - level) / 2
    low, high = np.quantile(replicates - np.mean(replicates) + estimate, [tail, 1 - tail])
    return float(low), float(high)


# ------------------------------------------------------------------------------------------------ samples


def _priority(index: NDArray[np.int64]) -> NDArray[np.uint64]:
    """A pseudo-random uint64 for each image index: the output of SplitMix64 (Steele et al., 2014)."""
    z = index.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


class Reservoir:
    """A uniform sample of at most `limit` features of a stream, the same however the stream is divided.

    Each image index has a pseudo-random priority; those with the smallest are kept. The sample of a union is
    therefore found in the union of the samples. Features come out in the order of priority, so that any
    prefix is itself a uniform sample, also when the images were ordered by class.

    Args:
        dim: D, the number of features.
        limit: The most to keep.
    """

    def __init__(self, dim: int, limit: int = LIMIT) -> None:
        self.limit = limit
        self._index = np.empty(0, np.int64)
        self._features = np.empty((0, dim), np.float32)
        self._pending: list[tuple[NDArray[np.int64], NDArray[np.float32]]] = []

    def update(self, features: NDArray[Any], start_index: int) -> None:
        """Offer the features (B, D) of images start_index … start_index + B − 1."""
        self._add(start_index + np.arange(len(features), dtype=np.int64), np.asarray(features, np.float32))

    def merge(self, other: Reservoir) -> None:
        """Offer all features of another one."""
        self.merge_state(other.state())

    def _add(self, index: NDArray[np.int64], features: NDArray[np.float32]) -> None:
        if len(self._index) == self.limit:  # most of a long stream comes too late for a place
            early = _priority(index) <= _priority(self._index[-1:])
            index, features = index[early], features[early]
        self._pending.append((index, features))
        # Not at each batch, since it copies all that is kept.
        if sum(len(index) for index, _ in self._pending) >= self.limit:
            self._select()

    def _select(self) -> None:
        index = np.concatenate([self._index, *(index for index, _ in self._pending)])
        features = np.concatenate([self._features, *(features for _, features in self._pending)])
        order = np.argsort(_priority(index), kind="stable")[: self.limit]
        if len(np.unique(index[order])) < len(order):
            raise ValueError("the same image index came twice; give each batch and each process its own")
        self._index, self._features, self._pending = index[order], features[order], []

    @property
    def features(self) -> NDArray[np.float32]:
        """(n, D), n ≤ limit, in the order of priority."""
        return self.state()["features"]

    def state(self) -> dict[str, NDArray[Any]]:
        """Arrays to send to another process: `index` (n,) and `features` (n, D).

        Raises:
            ValueError: An index came twice.
        """
        self._select()
        return {"index": self._index, "features": self._features}

    def merge_state(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Offer what `state` of another one returned."""
        self._add(state["index"], state["features"])


# ------------------------------------------------------------------------------------------------ KID


def _kernel(x: Array, y: Array) -> Array:
    """(x·y/D + 1)³ for all pairs of (m, D) and (n, D): (m, n)."""
    return np.asarray((x @ y.T / x.shape[1] + 1) ** 3)


def kernel_distance(generated: NDArray[Any], reference: NDArray[Any], block: int = 1000) -> tuple[float, float]:
    """KID, by disjoint groups.

    Groups are of m = `block` features of each set, or fewer, so that there are at least ten of them to tell
    the spread from; what does not fill a group is not used.

    Args:
        generated: (n, D), in random order.
        reference: (n', D), in random order.
        block: The most features of each set in one group.

    Returns:
        The estimate, which may be negative since it is unbiased, and its standard error. Where the sets are
        alike the estimate is skewed: the error is its scale, and no t-test.

    Raises:
        InputError: Fewer than 4 features in a set.
    """
    n = min(len(generated), len(reference))
    if n < 4:
        raise InputError(f"KID of {len(generated)} and {len(reference)} images: give 4 or more of each")
    m = min(block, max(2, n // 10))
    estimates = []
    for start in range(0, n - m + 1, m):
        x = np.asarray(generated[start : start + m], np.float64)
        y = np.asarray(reference[start : start + m], np.float64)
        xx, yy = _kernel(x, x), _kernel(y, y)
        within = xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)
        estimates.append(within / (m * (m - 1)) - 2 * _kernel(x, y).mean())
    return float(np.mean(estimates)), float(np.std(estimates, ddof=1) / len(estimates) ** 0.5)


# ------------------------------------------------------------------------------------------------ manifolds


def _squared_distances(x: Array, y: Array) -> Array:
    """‖x_i − y_j‖² of (m, D) and (n, D): (m, n)."""
    squares = (x * x).sum(axis=1)[:, None] + (y * y).sum(axis=1)[None] - 2 * (x @ y.T)
    return np.asarray(np.maximum(squares, 0))


def precision_recall(
    generated: NDArray[Any], reference: NDArray[Any], k: int = 3, chunk: int = 1000
) -> tuple[float, float]:
    """Improved precision and recall.

    Args:
        generated: (n, D).
        reference: (n', D). The two numbers depend on n and n': compare only results at the same ones.
        k: Which nearest neighbour sets the radius of a ball, the point itself not counted.
        chunk: Rows of the distance matrix in memory at a time.

    Returns:
        Precision and recall, each in [0, 1].

    Raises:
        InputError: A set of k features or fewer.
    """
    if min(len(generated), len(reference)) <= k:
        raise InputError(f"precision of {len(generated)} and {len(reference)} images: give more than {k} of each")
    x, y = np.asarray(generated, np.float64), np.asarray(reference, np.float64)
    centre = y.mean(axis=0)  # distances do not change, but ‖x‖² + ‖y‖² − 2x·y then cancels less
    x, y = x - centre, y - centre

    def radii(points: Array) -> Array:
        """Squared distance of each to its k-th neighbour; the nearest of all is the point itself."""
        parts = [points[i : i + chunk] for i in range(0, len(points), chunk)]
        return np.concatenate([np.partition(_squared_distances(p, points), k, axis=1)[:, k] for p in parts])

    radii_x, radii_y = radii(x), radii(y)
    inside_y = np.zeros(len(x), np.bool_)  # is x_i in some ball of y
    inside_x = np.zeros(len(y), np.bool_)  # is y_j in some ball of x
    for start in range(0, len(x), chunk):
        rows = slice(start, start + chunk)
        squares = _squared_distances(x[rows], y)
        inside_y[rows] = (squares <= radii_y).any(axis=1)
        inside_x |= (squares <= radii_x[rows, None]).any(axis=0)
    return float(inside_y.mean()), float(inside_x.mean())


# ------------------------------------------------------------------------------------------------ reference


@dataclass(frozen=True, eq=False)
class Reference:
    """The statistics of real images that generated ones are compared with.

    Attributes:
        mean: μ of their features, (D,).
        cov: C of their features, (D, D).
        fingerprint: That of the extractor.
        features: A uniform sample of the features in random order, float32 (n, D), n ≤ 10,000; None where only μ and C
            are known, which is enough for FID, and not for KID, precision and recall.
        n: Number of images; None where it is not known.
    """

    mean: Array
    cov: Array
    fingerprint: str
    features: NDArray[np.float32] | None = None
    n: int | None = None

    @classmethod
    def of(cls, moments: Moments, features: NDArray[np.float32], fingerprint: str) -> Reference:
        """Return the reference of moments and a sample of the features they are of."""
        return cls(moments.mean, moments.cov, fingerprint, features, moments.n)


def load_reference(path: str | os.PathLike[str], extractor: FeatureExtractor) -> Reference:
    """Load precomputed statistics, as pytorch-fid and guided-diffusion write them.

    Args:
        path: An `.npz` file with `mu`, (D,), and `sigma`, (D, D). Other arrays are not read.
        extractor: The features that the statistics are of. The file does not say which they are: this is checked by
            their number alone.

    Returns:
        The reference, without a sample of features and a number of images.

    Raises:
        InputError: No such file, statistics that are missing or are no mean and covariance of as many features.
    """
    arrays = read_npz(path, ("mu", "sigma"))
    if missing := [name for name in ("mu", "sigma") if name not in arrays]:
        if "arr_0" in list_npz(path):
            raise InputError(f"{path}: images (arr_0) and no statistics of them; give it as --data npz --root {path}")
        raise InputError(
            f"{path}: no array {' and no '.join(missing)}; give statistics that pytorch-fid or guided-diffusion wrote"
        )
    for name, shape in (("mu", (extractor.dim,)), ("sigma", (extractor.dim, extractor.dim))):
        array = arrays[name]
        if array.shape != shape:
            raise InputError(
                f"{path}: {name} has shape {array.shape} and {extractor.name} has {extractor.dim} features; "
                "give the features that the statistics were made with"
            )
        if array.dtype.kind != "f" or not np.isfinite(array).all():
            raise InputError(f"{path}: {name} ({array.dtype}) does not hold finite real numbers; make the file again")
    mean, cov = arrays["mu"].astype(np.float64), arrays["sigma"].astype(np.float64)
    scale = np.abs(cov).max()
    if np.abs(cov - cov.T).max() > 1e-4 * scale or np.linalg.eigvalsh(cov + cov.T).min() < -1e-4 * scale:
        raise InputError(f"{path}: sigma is not a covariance (symmetric, no negative eigenvalues); make the file again")
    return Reference(mean, (cov + cov.T) / 2, extractor.fingerprint)


def check_finite(what: str, values: Mapping[str, float | None]) -> None:
    """Check that no metric is infinite or undefined.

    Args:
        what: What the metrics are of, for the message.
        values: By name; None is a metric that is left out.

    Raises:
        RunError: One is not finite.
    """
    for name, value in values.items():
        if value is not None and not math.isfinite(value):
            raise RunError(f"{what}: {name} is {value}; look at the images and at the weights of the features")


def _extract(extractor: FeatureExtractor, images: Tensor) -> NDArray[np.float32]:
    """Features (B, D) of images uint8 (B, C, H, W)."""
    features: NDArray[np.float32] = extractor(images).cpu().numpy()
    # A distance to NaN is not below any radius: precision and recall would be numbers.
    if not np.isfinite(features).all():
        raise RunError(f"extractor {extractor.name}: features that are not finite; check its weights")
    return features


def _dataset_hash(dataset: ImageDataset, batch_size: int) -> str:
    """sha256 of the number of images, their shape and all their pixels in order."""
    digest = hashlib.sha256(f"{len(dataset)} {tuple(dataset.shape)}\n".encode())
    for start in range(0, len(dataset), batch_size):
        images, _ = dataset.__getitems__(range(start, min(start + batch_size, len(dataset))))
        digest.update(images.contiguous().numpy().tobytes())
    return digest.hexdigest()


def reference_statistics(
    dataset: ImageDataset,
    extractor: FeatureExtractor,
    cache_dir: str | os.PathLike[str] | None = None,
    batch_size: int = 256,
) -> Reference:
    """Statistics of a dataset under an extractor, computed once.

    They are kept on disk under a name made of the pixels and of the extractor's weights, so that a changed
    image or another extractor is another entry, and a copied or renamed dataset is not. An entry that cannot
    be read is computed again, with a warning; if the folder cannot be written a warning says so and nothing
    else changes.

    Args:
        dataset: The real images.
        extractor: φ.
        cache_dir: The folder; by default :func:`robustdiff.files.cache_folder`.
        batch_size: Images at a time.

    Returns:
        The statistics.

    Raises:
        InputError: Fewer than 4 images, or images of a size that the extractor does not take.
        RunError: Features that are not finite.
    """
    if len(dataset) < FEWEST:
        raise InputError(f"{dataset.name}: {len(dataset)} real images; give {FEWEST} or more, better thousands")
    content = _dataset_hash(dataset, batch_size)
    key = hashlib.sha256(f"{content} {extractor.fingerprint}".encode()).hexdigest()
    path = Path(cache_folder() if cache_dir is None else cache_dir) / f"reference-{key}.npz"
    if path.exists():
        try:
            return _read_reference(path, dataset, extractor)
        except (KeyError, ValueError) as error:
            warnings.warn(f"unusable cache entry, computed again: {error}", stacklevel=2)
    moments = Moments(extractor.dim, blocks=1)
    reservoir = Reservoir(extractor.dim)
    for start in range(0, len(dataset), batch_size):
        images, _ = dataset.__getitems__(range(start, min(start + batch_size, len(dataset))))
        features = _extract(extractor, images)
        moments.update(features, start)
        reservoir.update(features, start)
    reference = Reference.of(moments, reservoir.features, extractor.fingerprint)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            np.savez(file, **moments.state(), features=reservoir.features)  # type: ignore[arg-type]
    except OSError as error:
        warnings.warn(f"statistics not cached: {error}", stacklevel=2)
    return reference


def _read_reference(path: Path, dataset: ImageDataset, extractor: FeatureExtractor) -> Reference:
    arrays = read_npz(path, ("count", "total", "outer", "features"))
    moments, features = Moments.from_state(arrays), arrays["features"]
    sampled = min(len(dataset), LIMIT)
    if moments.n != len(dataset) or moments.dim != extractor.dim or features.shape != (sampled, extractor.dim):
        raise ValueError(f"{moments.n} images, {moments.dim} features, sample of shape {features.shape}")
    return Reference.of(moments, features.astype(np.float32), extractor.fingerprint)


# ------------------------------------------------------------------------------------------------ all of it


class Fidelity:
    """FID, KID, precision and recall of generated images that arrive in batches, in constant memory.

    KID, precision and recall use a uniform sample of at most `limit` images, FID uses all. With several
    processes each updates its own with its own indices; then one merges the states of the others. The result
    is that of one process up to rounding.

    Args:
        extractor: φ.
        reference: Of the real images, under the same extractor.
        blocks: K of `Moments`; by default 50, or 20 above 512 features, where blocks are large.
        limit: The most features of either set in KID, precision and recall.

    Attributes:
        moments: The `Moments` of the images so far.

    Raises:
        ValueError: The reference is of another extractor.
    """

    def __init__(
        self,
        extractor: FeatureExtractor,
        reference: Reference,
        blocks: int | None = None,
        limit: int = LIMIT,
    ) -> None:
        if reference.fingerprint != extractor.fingerprint:
            raise ValueError(f"the reference was computed with another extractor than {extractor.name}")
        self.extractor = extractor
        self.reference = reference
        self.moments = Moments(extractor.dim, blocks or (50 if extractor.dim <= 512 else 20))
        self._reservoir = Reservoir(extractor.dim, limit)

    def update(self, images: Tensor, start_index: int) -> None:
        """Add a batch.

        Args:
            images: uint8 (B, C, H, W), the images start_index … start_index + B − 1.
            start_index: Index of the first among all images of all processes.

        Raises:
            InputError: Images that the extractor does not take.
            RunError: Features that are not finite.
        """
        features = _extract(self.extractor, images)
        self._reservoir.update(features, start_index)
        self.moments.update(features, start_index)

    def merge(self, other: Fidelity) -> None:
        """Add the images of another one, of disjoint indices and the same extractor and blocks."""
        self.merge_state(other.state())

    def state(self) -> dict[str, NDArray[Any]]:
        """Plain arrays, to be sent to another process and merged there with `merge_state`."""
        return {**self.moments.state(), **self._reservoir.state()}

    def merge_state(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Add the images of which another one's `state` was taken."""
        moments = Moments.from_state(state)
        self._reservoir.merge_state(state)
        self.moments.merge(moments)

    def fid(self) -> float:
        """Return the Fréchet distance of the images so far, ≥ 0.

        Raises:
            InputError: Fewer than 2 images.
        """
        return frechet_distance(self.moments.mean, self.moments.cov, self.reference.mean, self.reference.cov)

    def result(self, replicates: Array | None = None, level: float = 0.95) -> dict[str, Any]:
        """The numbers.

        Args:
            replicates: (R,), what `bootstrap_frechet` gives for these moments, where it is known already; by
                default it is computed.
            level: Of the interval.

        Returns:
            `fid`, `fid_ci` (low, high), `kid`, `kid_se`, `precision`, `recall`, `n` (the number of images). KID, its
            error, precision and recall are None where the reference has no features.

        Raises:
            InputError: Fewer than 4 images.
            ValueError: An image index was given twice.
        """
        if self.moments.n < FEWEST:
            raise InputError(
                f"fidelity of {self.moments.n} images: give {FEWEST} or more, or thousands to learn something"
            )
        fid = self.fid()
        if replicates is None:
            replicates = bootstrap_frechet(self.moments, self.reference)
        kid, kid_se, precision, recall = self._by_features()
        return {
            "fid": fid,
            "fid_ci": interval(fid, replicates, level),
            "kid": kid,
            "kid_se": kid_se,
            "precision": precision,
            "recall": recall,
            "n": self.moments.n,
        }

    def _by_features(self) -> tuple[float, float, float, float] | tuple[None, None, None, None]:
        """KID with its standard error, precision and recall."""
        if self.reference.features is None:
            return None, None, None, None
        generated = self._reservoir.features
        real = self.reference.features[: len(generated)]  # as many of each: precision and recall depend on it
        return *kernel_distance(generated, real), *precision_recall(generated, real)
