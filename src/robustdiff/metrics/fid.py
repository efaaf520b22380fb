r"""The Fréchet inception distance (Heusel et al., NeurIPS 2017, arXiv 1706.08500), with bootstrap replicates.

FID is the squared Fréchet (2-Wasserstein) distance between two Gaussians with the mean and covariance of the features
of generated and of real images:

    FID = ‖μ₁ − μ₂‖² + tr C₁ + tr C₂ − 2 tr (C₁C₂)^½

The first term, the mean term, is large where all images are wrong in the same way, such as too bright.

C₁C₂ has the same eigenvalues as the symmetric positive semi-definite matrix C₂^½ C₁ C₂^½, so the last trace is the sum
of the square roots of the eigenvalues of that matrix, also where it is singular.

FID is biased upwards, by about 1/n of n images. Bootstrap replicates F* are biased as much again, so that
2 FID − mean F* is nearly unbiased.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch

from robustdiff.errors import InputError
from robustdiff.metrics.bootstrap import BLOCKS, REPLICATES, Array, block_weights, corrected
from robustdiff.metrics.metric import METRICS, Batch, Metric, Need, Number
from robustdiff.metrics.moments import Moments
from robustdiff.metrics.reference import Reference

__all__ = ["FID", "bootstrap_frechet", "frechet_distance"]

_CHUNK = 2**25
"""The number of elements of covariances that are computed at a time, a quarter of a gigabyte."""


def _root(cov: Array) -> Array:
    """Return C^½ of a symmetric positive semi-definite C, (D, D). Eigenvalues made negative by rounding become zero."""
    values, vectors = np.linalg.eigh(cov)
    return np.asarray((vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T)


def frechet_distance(mean1: Array, cov1: Array, mean2: Array, cov2: Array) -> float:
    """Return the squared Fréchet distance between two Gaussians with means (D,) and covariances (D, D).

    A value made negative by rounding becomes zero.

    Raises:
        ValueError: If the shapes do not fit together.
    """
    mean1, cov1, mean2, cov2 = (np.asarray(a, np.float64) for a in (mean1, cov1, mean2, cov2))
    if not mean1.shape == mean2.shape or not cov1.shape == cov2.shape == (*mean1.shape, *mean1.shape):
        raise ValueError(f"means {mean1.shape}, {mean2.shape} and covariances {cov1.shape}, {cov2.shape}")
    root2 = _root(cov2)
    overlap = np.sqrt(np.maximum(np.linalg.eigvalsh(root2 @ cov1 @ root2), 0)).sum()
    distance = ((mean1 - mean2) ** 2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * overlap
    return max(float(distance), 0.0)


def bootstrap_frechet(
    moments: Moments,
    reference: Moments | Reference,
    replicates: int = REPLICATES,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Array:
    """Return bootstrap replicates of the FID with a fixed reference, (R,), which are not recentred.

    Args:
        moments: The moments of the generated images. With fewer images than blocks, each block is one image.
        reference: The moments or statistics of the real images.
        replicates: The number of replicates R. Each takes one eigendecomposition of a D × D matrix.
        seed: The seed of the block weights.
        device: The device of the eigendecompositions, in float64.

    Raises:
        InputError: If fewer than two blocks hold images.
    """
    filled = moments.count > 0
    blocks = int(filled.sum())
    if blocks < 2:
        raise InputError(f"{blocks} non-empty blocks: an interval needs 2 or more; generate more images")
    count, total, outer = moments.count[filled], moments.total[filled], moments.outer[filled]
    weights = block_weights(blocks, replicates, seed)
    mean2, cov2 = reference.mean, reference.cov
    root2 = torch.from_numpy(_root(cov2)).to(device)
    dim = total.shape[1]
    result = np.empty(replicates)
    chunk = max(1, _CHUNK // dim**2)
    for start in range(0, replicates, chunk):
        w = weights[start : start + chunk].astype(np.float64)
        n = (w @ count)[:, None]
        mean = w @ total / n
        cov = (w @ outer.reshape(blocks, -1)).reshape(-1, dim, dim)
        cov -= n[..., None] * mean[:, :, None] * mean[:, None, :]
        cov /= n[..., None] - 1
        values = torch.linalg.eigvalsh(root2 @ torch.from_numpy(cov).to(device) @ root2)
        overlap = values.clamp_min(0).sqrt().sum(-1).cpu().numpy()
        traces = np.trace(cov, axis1=-2, axis2=-1) + np.trace(cov2)
        result[start : start + chunk] = ((mean - mean2) ** 2).sum(-1) + traces - 2 * overlap
    return result


@METRICS.register("fid")
class FID(Metric):
    """FID of all images, with replicates over 50 blocks, or over 20 blocks above 512 features to save memory."""

    numbers = (
        Number("fid", "FID", ".2f", "lower", log=True),
        Number("fid_corrected", "FID corrected", ".2f", "lower", detail=True),
        Number("fid_mean_term", "mean term", ".2f", "lower", detail=True),
    )
    needs: ClassVar[Need] = "features"

    def reset(self) -> None:
        dim = len(self.real.mean)
        self.moments = Moments(dim, BLOCKS if dim <= 512 else 20)
        self._replicates: Array | None = None

    def update(self, batch: Batch) -> None:
        self.moments.update(batch.features, batch.start)
        self._replicates = None

    def state(self) -> Any:
        return self.moments.state()

    def merge_state(self, state: Any) -> None:
        self.moments.merge_state(state)
        self._replicates = None

    def distance(self) -> float:
        """Return the FID of the images so far, of which there must be at least two."""
        return frechet_distance(self.moments.mean, self.moments.cov, self.real.mean, self.real.cov)

    def result(self) -> dict[str, float | None]:
        distance = self.distance()
        return {
            "fid": distance,
            "fid_corrected": corrected(distance, self.replicates()["fid"]),
            "fid_mean_term": float(((self.moments.mean - self.real.mean) ** 2).sum()),
        }

    def replicates(self) -> dict[str, Array]:
        if self._replicates is None:
            on_gpu = torch.device(self.device).type == "cuda"  # other devices may not have float64
            self._replicates = bootstrap_frechet(self.moments, self.real, device=self.device if on_gpu else "cpu")
        return {"fid": self._replicates}

    @property
    def blocks(self) -> int:
        return int((self.moments.count > 0).sum())
