r"""Distributions of the times of a batch, and the weights that make the loss unbiased where they are not uniform.

The loss is a mean over t = 0 … T − 1. If t is drawn with probabilities p_t, weights of 1/(p_t T) make it unbiased:

    E_{t∼p} [ L_t / (p_t T) ] = Σ_t p_t L_t / (p_t T) = (1/T) Σ_t L_t.

The variance is least at p_t ∝ √E[L_t²] (Nichol & Dhariwal, 2021, section 3.3), which is estimated from the last ten
losses at every t and mixed with the uniform distribution, so that every t is drawn at times:

    p_t = (1 − u) · √(mean of the last 10 L_t²) / Σ_s(same) + u/T,        u = 0.001.

p is uniform until every t has ten losses. Nichol & Dhariwal train networks of the bound alone with it, and Wang et al.
(2025) fine-tune with it.

The logit-normal distribution of flow matching (Esser et al., 2024, arXiv 2403.03206, equation 19, with m = 0 and s = 1)
has more of the times in the middle: the fraction of the process is u = 1/(1 + e^{−z}) with z ~ N(0, 1). It replaces
weights of the losses, so that it has none.

For models over noise levels σ (Karras et al., 2022; consistency models) the distribution ln σ ~ N(P_mean, P_std²) is a
part of the loss, and has no such weights. If time is continuous (flow matching, EDM), times are floating-point numbers;
otherwise they are indices.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from robustdiff.errors import InputError
from robustdiff.process import DiffusionProcess, Table
from robustdiff.registry import Registry

__all__ = [
    "TIMESTEPS",
    "Continuous",
    "LogNormal",
    "LogNormalLevels",
    "LogitNormal",
    "LossSecondMoment",
    "TimestepSampler",
    "Uniform",
    "double",
    "uniform",
]

_UNIFORM = 0.001  # the share u of the uniform distribution


def double(device: torch.device) -> torch.dtype:
    """Return float64, or float32 on a device without float64."""
    return torch.float32 if device.type == "mps" else torch.float64


class TimestepSampler(ABC):
    """The base class of distributions over times.

    Attributes:
        adaptive: True if the distribution depends on the losses of the batches before (:meth:`update`).
    """

    adaptive: ClassVar[bool] = False

    def draw(
        self, n: int, generator: torch.Generator | None = None, device: torch.device | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Draw times, and return them with the weights of their losses.

        Args:
            n: The number of times.
            generator: The source of randomness; times are drawn on its device. Default: PyTorch's global generator.
            device: The device on which times are drawn without a generator. Default: the CPU.

        Returns:
            The times, indices or floating-point, with shape (n,), and the weights, with shape (n,), or None for
            weights of 1.
        """
        device = torch.device("cpu" if device is None else device) if generator is None else generator.device
        return self._draw(n, generator, device)

    @abstractmethod
    def _draw(self, n: int, generator: torch.Generator | None, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Draw times on the device of the generator, if there is one."""

    def update(self, t: Tensor, losses: Tensor) -> None:  # noqa: B027  (most distributions do not change)
        """Take the losses of a batch into account, if the distribution is adaptive.

        Args:
            t: The times, with shape (B,).
            losses: The unweighted losses, with shape (B,), in the order of the batch.
        """

    def state_dict(self) -> dict[str, Tensor]:
        """Return a copy of what the distribution has taken from losses, on the CPU."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:  # noqa: B027
        """Restore a state that :meth:`state_dict` returned."""


class Uniform(TimestepSampler):
    """The uniform distribution over the indices 0 … T − 1."""

    def __init__(self, T: int) -> None:
        self.T = T

    def _draw(self, n: int, generator: torch.Generator | None, device: torch.device) -> tuple[Tensor, Tensor | None]:
        return torch.randint(self.T, (n,), generator=generator, device=device), None


class Continuous(TimestepSampler):
    """The uniform distribution over the fractions u in (0, 1] of a process whose time is continuous."""

    def __init__(self, process: DiffusionProcess) -> None:
        self.process = process

    def _draw(self, n: int, generator: torch.Generator | None, device: torch.device) -> tuple[Tensor, Tensor | None]:
        return self.process.at(1 - torch.rand(n, generator=generator, device=device)), None


class LogitNormal(TimestepSampler):
    """The logit-normal distribution over the fractions u in (0, 1) of a process, ln(u/(1 − u)) ~ N(0, 1)."""

    def __init__(self, process: DiffusionProcess) -> None:
        self.process = process

    def _draw(self, n: int, generator: torch.Generator | None, device: torch.device) -> tuple[Tensor, Tensor | None]:
        return self.process.at(torch.randn(n, generator=generator, device=device).sigmoid()), None


class LogNormalLevels(TimestepSampler):
    """The log-normal distribution of levels σ, ln σ ~ N(P_mean, P_std²), not truncated (Karras et al., 2022).

    Args:
        mean: The mean P_mean of ln σ.
        std: The standard deviation P_std > 0 of ln σ.

    Raises:
        InputError: If P_std is not positive, or six standard deviations reach levels below 10⁻¹² or above 10¹², at
            which the loss is not finite.
    """

    def __init__(self, mean: float, std: float) -> None:
        if not (std > 0 and abs(mean) + 6 * std <= math.log(1e12)):
            raise InputError(
                f"ln σ ~ N({mean:g}, {std:g}²) reaches levels below 1e-12 or above 1e12: set another mean, or a "
                "smaller std > 0"
            )
        self.mean, self.std = mean, std

    def _draw(self, n: int, generator: torch.Generator | None, device: torch.device) -> tuple[Tensor, Tensor | None]:
        return (self.mean + self.std * torch.randn(n, generator=generator, device=device)).exp(), None


class LogNormal(TimestepSampler):
    r"""A distribution over T intervals of noise levels (Song & Dhariwal, 2024, section 3.5).

    The probability of an interval is its share of a log-normal distribution:

        p_n ∝ Φ((ln σ_{n+1} − P_mean)/P_std) − Φ((ln σ_n − P_mean)/P_std).

    Args:
        edges: The levels σ_0 < … < σ_T, with shape (T + 1,); the first may be 0 and the last infinite.
        mean: The mean P_mean of ln σ.
        std: The standard deviation P_std > 0 of ln σ.

    Raises:
        ValueError: If P_std is not positive, or all probabilities are 0.
    """

    def __init__(self, edges: Tensor, mean: float, std: float) -> None:
        if not std > 0:
            raise ValueError(f"std must be positive; got {std}")
        self.T = len(edges) - 1
        z = (edges.cpu().double().log() - mean) / std
        # Above the mean, differences of the upper tail are taken, for precision in both tails. (Not by torch's ndtr,
        # which is (1 + erf)/2 and so 0 in the tail.)
        low, high = (torch.special.erfc(sign * z / math.sqrt(2)) / 2 for sign in (-1, 1))
        shares = torch.where(z[:-1] > 0, high[:-1] - high[1:], low[1:] - low[:-1])
        if not shares.sum() > 0:
            raise ValueError(
                f"ln σ ~ N({mean}, {std}²) never falls between the levels {edges[0]:g} and {edges[-1]:g}: set another "
                "mean, or a larger std"
            )
        self.probabilities = shares / shares.sum()
        """The probabilities p, with shape (T,), float64."""
        self._cumulative = Table(self.probabilities.cumsum(0))

    def _draw(self, n: int, generator: torch.Generator | None, device: torch.device) -> tuple[Tensor, Tensor | None]:
        position = torch.rand(n, generator=generator, device=device)
        cumulative = self._cumulative.on(position.device, double(position.device))
        return torch.searchsorted(cumulative, position.to(cumulative), right=True).clamp_max(self.T - 1), None


class LossSecondMoment(TimestepSampler):
    """Importance sampling by the root of the second moment of the losses (Nichol & Dhariwal, 2021, section 3.3).

    Until every time has ``history`` losses, the distribution is :class:`Uniform`.

    Args:
        T: The number of times.
        history: The number of losses that are stored for each time.
    """

    adaptive = True

    def __init__(self, T: int, history: int = 10) -> None:
        self.T = T
        self._losses = torch.zeros(T, history, dtype=torch.float64)
        self._counts = torch.zeros(T, dtype=torch.int64)

    @property
    def _full(self) -> Tensor:
        """A boolean scalar tensor: True if every time has ``history`` losses."""
        return (self._counts >= self._losses.shape[1]).all()

    @property
    def probabilities(self) -> Tensor:
        """The probabilities p, with shape (T,), float64 (float32 on MPS)."""
        moments = self._losses.square().mean(1).sqrt()
        p = (1 - _UNIFORM) * moments / moments.sum() + _UNIFORM / self.T
        return torch.where(self._full, p, 1 / self.T)

    def _draw(self, n: int, generator: torch.Generator | None, device: torch.device) -> tuple[Tensor, Tensor | None]:
        self._losses, self._counts = self._losses.to(device, double(device)), self._counts.to(device)
        readable = device.type == "cpu"
        if readable and not self._full:
            return Uniform(self.T).draw(n, generator)
        # In fixed point: sums of integers do not depend on their order, which can vary on a GPU.
        scale = 2.0**53
        p = self.probabilities
        cumulative = (p * scale).round().long().cumsum(0)
        position = torch.rand(n, generator=generator, device=device).to(p) * scale
        t = torch.searchsorted(cumulative, position.long(), right=True).clamp_max(self.T - 1)
        weight = (1 / (p[t] * self.T)).to(torch.float32)
        if readable:
            return t, weight
        # On a GPU the flag is not read back: both are drawn, and the device selects one.
        uniform, _ = Uniform(self.T).draw(n, generator, device)
        return torch.where(self._full, t, uniform), torch.where(self._full, weight, 1.0)

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Store the losses of a batch. Losses that are not finite, as when fp16 overflows, are skipped.

        Args:
            t: The indices of the times, with shape (B,).
            losses: The unweighted losses, with shape (B,), in the order in which they are stored.
        """
        T, history = self._losses.shape
        t, losses = t.to(self._counts), losses.detach().to(self._losses)
        order = t.argsort(stable=True)
        t, losses = t[order], losses[order]
        kept = losses.isfinite()
        before = torch.cat([kept.new_zeros(1, dtype=torch.int64), kept.cumsum(0)])  # the number kept before each
        first, end = torch.searchsorted(t, t), torch.searchsorted(t, t, right=True)
        rank = before[:-1] - before[first]  # among those of the same time
        # Each loss replaces the oldest of its time; of more losses than the history holds, the last are stored. The
        # others are written to an extra entry at the end, which is dropped.
        last = kept & (before[end] - before[first] - rank <= history)
        place = torch.where(last, t * history + (self._counts[t] + rank) % history, T * history)
        flat = torch.cat([self._losses.flatten(), self._losses.new_zeros(1)])
        flat[place] = losses
        self._losses = flat[:-1].reshape(T, history)
        self._counts.index_add_(0, t, kept.long())

    def state_dict(self) -> dict[str, Tensor]:
        """Return a copy of the history."""
        return {"losses": self._losses.cpu().to(torch.float64, copy=True), "counts": self._counts.to("cpu", copy=True)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._losses, self._counts = state["losses"].to(torch.float64, copy=True), state["counts"].clone()


TIMESTEPS: Registry[Callable[[DiffusionProcess], TimestepSampler]] = Registry(
    "distribution of times", "timesteps", folder="objectives"
)
"""Constructors of distributions over the times of a process, by name."""


@TIMESTEPS.register("uniform")
def uniform(process: DiffusionProcess) -> TimestepSampler:
    """Return the uniform distribution over the times of a process, continuous if the process's time is."""
    return Uniform(len(process)) if process.time_at is None else Continuous(process)


TIMESTEPS.register("logit-normal")(LogitNormal)


@TIMESTEPS.register("loss-second-moment")
def _loss_second_moment(process: DiffusionProcess) -> TimestepSampler:
    return LossSecondMoment(len(process))
