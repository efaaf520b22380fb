r"""The kernel inception distance (Bińkowski et al., ICLR 2018, arXiv 1801.01401).

KID is an unbiased estimate of the squared maximum mean discrepancy with the kernel k(x, y) = (x·y/D + 1)³. For the
features x of m generated images and y of m real ones

    KID_m = 1/(m(m−1)) Σ_{i≠j} [k(x_i, x_j) + k(y_i, y_j)] − 2/m² Σ_{i,j} k(x_i, y_j)

and the estimate is the mean over disjoint groups of m features. The groups are independent, so their spread gives the
standard error (the B-test of Zaremba, Gretton and Blaschko, NeurIPS 2013, arXiv 1307.1954).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustdiff.errors import InputError
from robustdiff.metrics.bootstrap import Array
from robustdiff.metrics.metric import METRICS, Number
from robustdiff.metrics.sampled import SampledMetric

__all__ = ["KID", "kernel_distance"]


def _kernel(x: Array, y: Array) -> Array:
    """Return (x·y/D + 1)³ for all pairs of (m, D) and (n, D): (m, n)."""
    return np.asarray((x @ y.T / x.shape[1] + 1) ** 3)


def kernel_distance(generated: NDArray[Any], reference: NDArray[Any], block: int = 1000) -> tuple[float, float]:
    """Return KID over disjoint groups, which may be negative since it is unbiased, and its standard error.

    If both sets have the same distribution, the estimate is skewed, and the standard error does not make a t-test.

    Args:
        generated: The features of generated images, (n, D), in random order.
        reference: The features of real images, (n', D), in random order.
        block: The largest number m of features in a group; small sets have groups of a tenth. Remaining features are
            not used.

    Raises:
        InputError: If a set has fewer than 4 features.
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


@METRICS.register("kid")
class KID(SampledMetric):
    """KID with its standard error."""

    numbers = (Number("kid", "KID", ".4g", "lower", standard_error=True),)

    def result(self) -> dict[str, float | None]:
        kid, error = kernel_distance(*self.samples())
        return {"kid": kid, "kid_se": error}
