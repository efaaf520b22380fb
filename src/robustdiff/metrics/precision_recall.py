"""Improved precision and recall (Kynkäänniemi et al., NeurIPS 2019, arXiv 1904.06991).

The manifold of a set is the union of balls around its features; the radius of a ball is the distance to the k-th
nearest neighbour of its centre. Precision is the fraction of generated features in the manifold of the real ones, and
recall the fraction of real features in the manifold of the generated ones.
"""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from robustdiff.errors import InputError
from robustdiff.metrics.metric import METRICS, Number
from robustdiff.metrics.sampled import SampledMetric

__all__ = ["PrecisionRecall", "precision_recall"]


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Return ‖x_i − y_j‖², (m, n), of points (m, D) and (n, D)."""
    squares = (x * x).sum(1)[:, None] + (y * y).sum(1)
    return squares.addmm_(x, y.T, alpha=-2).clamp_(min=0)


def _squared_radii(points: Tensor, k: int, chunk: int) -> Tensor:
    """Return the squared distance of each point to its k-th nearest neighbour, the point itself not counted."""
    return torch.cat([_squared_distances(part, points).kthvalue(k + 1).values for part in points.split(chunk)])


def precision_recall(
    generated: NDArray[Any],
    reference: NDArray[Any],
    k: int = 3,
    chunk: int = 1000,
    device: torch.device | str = "cpu",
) -> tuple[float, float]:
    """Return improved precision and recall, each in [0, 1].

    Args:
        generated: The features of generated images, (n, D).
        reference: The features of real images, (n', D). Precision and recall depend on n and n', so compare only
            results with the same numbers.
        k: The number of the nearest neighbour that gives the radius, the point itself not counted.
        chunk: The number of rows of the distance matrix in memory at a time.
        device: The device that computes the distances, in float64.

    Raises:
        InputError: If a set has k features or fewer.
    """
    if min(len(generated), len(reference)) <= k:
        raise InputError(f"precision of {len(generated)} and {len(reference)} images: give more than {k} of each")
    x, y = (torch.as_tensor(features).to(device, torch.float64) for features in (generated, reference))
    centre = y.mean(0)  # leaves distances unchanged, and makes ‖x‖² + ‖y‖² − 2x·y more accurate
    x, y = x - centre, y - centre
    radii_x, radii_y = (_squared_radii(points, k, chunk) for points in (x, y))
    inside_y = []  # whether x_i is in a ball of y
    inside_x = torch.zeros(len(y), dtype=torch.bool, device=device)  # whether y_j is in a ball of x
    for part, radii in zip(x.split(chunk), radii_x.split(chunk), strict=True):
        squares = _squared_distances(part, y)
        inside_y.append((squares <= radii_y).any(1))
        inside_x |= (squares <= radii[:, None]).any(0)
    return float(torch.cat(inside_y).double().mean()), float(inside_x.double().mean())


@METRICS.register("precision-recall")
class PrecisionRecall(SampledMetric):
    """Precision and recall with k = 3."""

    numbers = (Number("precision", "precision", ".3f", "higher"), Number("recall", "recall", ".3f", "higher"))

    def result(self) -> dict[str, float | None]:
        on_gpu = torch.device(self.device).type == "cuda"  # other devices may not have float64
        precision, recall = precision_recall(*self.samples(), device=self.device if on_gpu else "cpu")
        return {"precision": precision, "recall": recall}
