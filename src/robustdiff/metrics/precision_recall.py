"""Improved precision and recall (Kynkäänniemi et al., NeurIPS 2019, arXiv 1904.06991).

The manifold of a set is the union of balls around its features; the radius of a ball is the distance to the k-th
nearest neighbour of its centre. Precision is the fraction of generated features in the manifold of the real ones, and
recall the fraction of real features in the manifold of the generated ones.
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
    """Return ‖x_i − y_j‖², (m, n), of points (m, D) and (n, D)."""
    squares = (x * x).sum(axis=1)[:, None] + (y * y).sum(axis=1)[None] - 2 * (x @ y.T)
    return np.asarray(np.maximum(squares, 0))


def _squared_radii(points: Array, k: int, chunk: int) -> Array:
    """Return the squared distance of each point to its k-th nearest neighbour, the point itself not counted."""
    parts = [points[i : i + chunk] for i in range(0, len(points), chunk)]
    return np.concatenate([np.partition(_squared_distances(p, points), k, axis=1)[:, k] for p in parts])


def precision_recall(
    generated: NDArray[Any], reference: NDArray[Any], k: int = 3, chunk: int = 1000
) -> tuple[float, float]:
    """Return improved precision and recall, each in [0, 1].

    Arguments:
        generated: The features of generated images, (n, D).
        reference: The features of real images, (n', D). Precision and recall depend on n and n', so compare only
            results with the same numbers.
        k: The number of the nearest neighbour that gives the radius, the point itself not counted.
        chunk: The number of rows of the distance matrix in memory at a time.

    Raises:
        InputError: If a set has k features or fewer.
    """
    if min(len(generated), len(reference)) <= k:
        raise InputError(f"precision of {len(generated)} and {len(reference)} images: give more than {k} of each")
    x, y = np.asarray(generated, np.float64), np.asarray(reference, np.float64)
    centre = y.mean(axis=0)  # leaves distances unchanged, and makes ‖x‖² + ‖y‖² − 2x·y more accurate
    x, y = x - centre, y - centre
    radii_x, radii_y = (_squared_radii(points, k, chunk) for points in (x, y))
    inside_y = np.zeros(len(x), np.bool_)  # x_i is in a ball of y
    inside_x = np.zeros(len(y), np.bool_)  # y_j is in a ball of x
    for start in range(0, len(x), chunk):
        rows = slice(start, start + chunk)
        squares = _squared_distances(x[rows], y)
        inside_y[rows] = (squares <= radii_y).any(axis=1)
        inside_x |= (squares <= radii_x[rows, None]).any(axis=0)
    return float(inside_y.mean()), float(inside_x.mean())


@METRICS.register("precision-recall")
class PrecisionRecall(SampledMetric):
    """Precision and recall with k = 3."""

    numbers = (Number("precision", "precision", ".3f", "higher"), Number("recall", "recall", ".3f", "higher"))

    def result(self) -> dict[str, float | None]:
        precision, recall = precision_recall(*self.samples())
        return {"precision": precision, "recall": recall}
