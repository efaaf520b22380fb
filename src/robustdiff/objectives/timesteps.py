r"""How the times of a batch are drawn, and what makes the loss unbiased when they are not drawn uniformly.

The loss is a mean over t = 0 … T − 1. Drawn with probabilities p_t, each sample is weighted by 1/(p_t T):

    E_{t∼p} [ L_t / (p_t T) ] = Σ_t p_t L_t / (p_t T) = (1/T) Σ_t L_t,

whatever p is. The variance is least at p_t ∝ √E[L_t²] (Nichol & Dhariwal, 2021, section 3.3), which is estimated from
the last ten losses at every t, and mixed with a little of the uniform distribution so that no t is forgotten:

    p_t = (1 − u) · √(mean of the last 10 L_t²) / Σ_s(same) + u/T,        u = 0.001,

from when every t has its ten losses; until then p is uniform. ADM's networks were trained so.

Models over noise levels σ (Karras et al., 2022; consistency models) have instead a distribution of their own, which is
a part of the loss and not weighted away: ln σ ~ N(P_mean, P_std²), on the levels of a table.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["TIMESTEPS", "LogNormal", "LossSecondMoment", "TimestepSampler", "Uniform"]


class TimestepSampler(ABC):
    """A distribution over times.

    Arguments:
        T: The number of times.
    """

    def __init__(self, T: int) -> None:
        self.T = T

    @abstractmethod
    def draw(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor | None]:
        """n times in [0, T) and the weights of their losses, each with shape (n,), on the generator's device.

        No weights means that all are 1.
        """


class Uniform(TimestepSampler):
    """Every time is as likely as any other."""

    def draw(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor | None]:
        device = generator.device if generator is not None else None
        return torch.randint(self.T, (n,), generator=generator, device=device), None


class LogNormal(TimestepSampler):
    r"""Bins between noise levels, by their share of a log-normal distribution (Song & Dhariwal, 2024, section 3.5):

        p_n ∝ Φ((ln σ_{n+1} − P_mean)/P_std) − Φ((ln σ_n − P_mean)/P_std).

    Arguments:
        edges: σ_0 < … < σ_T, with shape (T + 1,); the first may be 0 and the last infinite.
        mean: P_mean.
        std: P_std > 0.

    Raises:
        ValueError: If P_std is not positive, or no bin has a share.
    """

    def __init__(self, edges: Tensor, mean: float, std: float) -> None:
        if not std > 0:
            raise ValueError(f"std must be positive; got {std}")
        super().__init__(len(edges) - 1)
        z = (edges.to("cpu", torch.float64).log() - mean) / std
        # Differences of the upper tail where it is the smaller one, for the precision of both tails.
        shares = torch.where(
            z[:-1] > 0,
            torch.special.ndtr(-z[:-1]) - torch.special.ndtr(-z[1:]),
            torch.special.ndtr(z[1:]) - torch.special.ndtr(z[:-1]),
        )
        if not shares.sum() > 0:
            raise ValueError(
                f"ln σ ~ N({mean}, {std}²) never falls between the levels {edges[0]:g} and {edges[-1]:g}: set another "
                "mean, or a larger std"
            )
        self.probabilities = shares / shares.sum()
        """p, with shape (T,), float64."""

    def draw(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor | None]:
        device = generator.device if generator is not None else None
        position = torch.rand(n, generator=generator, device=device).to("cpu", torch.float64)
        t = torch.searchsorted(self.probabilities.cumsum(0), position, right=True).clamp_max(self.T - 1)
        return t.to(device), None


class LossSecondMoment(TimestepSampler):
    """Times in proportion to the root of the second moment of their losses (Nichol & Dhariwal, 2021, section 3.3).

    While the history fills, the times are those of :class:`Uniform`.

    Arguments:
        T: The number of times.
        history: The losses that are remembered for each time.
        uniform_prob: The share u of the uniform distribution.
    """

    def __init__(self, T: int, history: int = 10, uniform_prob: float = 0.001) -> None:
        super().__init__(T)
        self.uniform_prob = uniform_prob
        self._losses: NDArray[np.float64] = np.zeros((T, history))
        self._counts: NDArray[np.int64] = np.zeros(T, np.int64)

    @property
    def probabilities(self) -> Tensor:
        """p, with shape (T,), float64."""
        if (self._counts < self._losses.shape[1]).any():
            return torch.full((self.T,), 1 / self.T, dtype=torch.float64)
        moments = torch.from_numpy(np.sqrt(np.mean(self._losses**2, axis=1)))
        return (1 - self.uniform_prob) * moments / moments.sum() + self.uniform_prob / self.T

    def draw(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor | None]:
        if (self._counts < self._losses.shape[1]).any():
            return Uniform(self.T).draw(n, generator)
        device = generator.device if generator is not None else None
        p = self.probabilities
        position = torch.rand(n, generator=generator, device=device).to("cpu", torch.float64)
        t = torch.searchsorted(p.cumsum(0), position, right=True).clamp_max(self.T - 1)
        return t.to(device), (1 / (p[t] * self.T)).to(torch.float32).to(device)

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Remember the losses of a batch, in its order. A loss that is not finite, as when fp16 overflows, is left out.

        Arguments:
            t: Their times, with shape (B,).
            losses: The losses, not weighted, with shape (B,).
        """
        for time, loss in zip(t.tolist(), losses.tolist(), strict=True):
            if np.isfinite(loss):
                # The place of the oldest.
                self._losses[time, self._counts[time] % self._losses.shape[1]] = loss
                self._counts[time] += 1

    def state_dict(self) -> dict[str, Tensor]:
        """The history."""
        return {"losses": torch.from_numpy(self._losses.copy()), "counts": torch.from_numpy(self._counts.copy())}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take a history from :meth:`state_dict`."""
        self._losses, self._counts = state["losses"].numpy().copy(), state["counts"].numpy().copy()


TIMESTEPS: dict[str, type[TimestepSampler]] = {"uniform": Uniform, "loss-second-moment": LossSecondMoment}
