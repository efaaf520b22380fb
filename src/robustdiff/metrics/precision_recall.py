"""Improved precision and recall (Kynkäänniemi et al., NeurIPS 2019, arXiv 1904.06991).

The manifold of a set is the union of balls around its features, each as wide as the distance to its k-th nearest
neighbour. Precision is the fraction of generated features in the manifold of the real ones, recall the reverse.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustdiff.errors import InputError
from robustdiff.metrics.bootstrap import Array
from robustdiff.metrics.metric import METRICS, Number
from robustdiff.metrics.sampled import SampledMetric

__all__ = ["PrecisionRecall", "precision_recall"]


def _squared_distances(x: Array, y: Array) -> Array:
    """Return ‖x_i − y_j‖² of (m, D) and (n, D): (m, n)."""
    squares = (x * x).sum(axis=1)[:, None] + (y * y).sum(axis=1)[None] - 2 * (x @ y.T)
    return np.asarray(np.maximum(squares, 0))


def _squared_radii(points: Array, k: int, chunk: int) -> Array:
    """Return the squared distance of each to its k-th neighbour; the nearest of all is the point itself."""
    parts = [points[i : i + chunk] for i in range(0, len(points), chunk)]
    return np.concatenate([np.partition(_squared_distances(p, points), k, axis=1)[:, k] for p in parts])


def precision_recall(
    generated: NDArray[Any], reference: NDArray[Any], k: int = 3, chunk: int = 1000
) -> tuple[float, float]:
    """Return improved precision and recall, each in [0, 1].

    Arguments:
        generated: (n, D).
        reference: (n', D). The two numbers depend on n and n': compare only results at the same ones.
        k: Which nearest neighbour sets the radius of a ball, the point itself not counted.
        chunk: Rows of the distance matrix in memory at a time.

    Raises:
        InputError: A set of k features or fewer.
    """
    if min(len(generated), len(reference)) <= k:
        raise InputError(f"precision of {len(generated)} and {len(reference)} images: give more than {k} of each")
    x, y = np.asarray(generated, np.float64), np.asarray(reference, np.float64)
    centre = y.mean(axis=0)  # distances do not change, but ‖x‖² + ‖y‖² − 2x·y then cancels less
    x, y = x - centre, y - centre
    radii_x, radii_y = (_squared_radii(points, k, chunk) for points in (x, y))
    inside_y = np.zeros(len(x), np.bool_)  # is x_i in some ball of y
    inside_x = np.zeros(len(y), np.bool_)  # is y_j in some ball of x
    for start in range(0, len(x), chunk):
        rows = slice(start, start + chunk)
        squares = _squared_distances(x[rows], y)
        inside_y[rows] = (squares <= radii_y).any(axis=1)
        inside_x |= (squares <= radii_x[rows, None]).any(axis=0)
    return float(inside_y.mean()), float(inside_x.mean())


@METRICS.register("precision-recall")
class PrecisionRecall(SampledMetric):
    """Precision and recall with three neighbours."""

    numbers = (Number("precision", "precision", ".3f", "higher"), Number("recall", "recall", ".3f", "higher"))

    def result(self) -> dict[str, float | None]:
        precision, recall = precision_recall(*self.samples())
        return {"precision": precision, "recall": recall}
