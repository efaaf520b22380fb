r"""The exponential moving average of the parameters, θ̄_t = β_t θ̄_{t−1} + (1 − β_t) θ_t, from θ̄_0 = θ_0 at the start.

There are two choices of β_t after update t = 1, 2, …:

- A constant, as in ADM. After T updates θ_0 has the weight β^T, which is large unless T is several times 1/(1 − β).
- "auto", the power function of Karras et al. (2024, "Analyzing and Improving the Training Dynamics of Diffusion
  Models", Section 3.1 and Appendix C): β_t = (1 − 1/t)^{γ+1}. The weight of θ_t grows as t^γ: the width of the weights
  is a constant fraction σ_rel of the run so far, and θ_0 has no weight after the first update.

The average is kept over the list of parameters and not over a copy of the module, so that it also works on the shards
of FSDP. (diffusers' EMAModel warms a constant decay up from 0, which does not agree with ADM.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from robustdiff.objectives.objective import follow

__all__ = ["EMA", "EXPONENT", "REMAINDER", "sufficient_decay"]

EXPONENT = 6.937203937601809
"""γ of "auto". The weights (γ + 1) τ^γ of τ = t/T in [0, 1] then have a standard deviation σ_rel of 0.10, the middle of
what Karras et al. find best: γ is the root ≥ 0 of σ_rel² = (γ + 1) / ((γ + 2)² (γ + 3))."""

REMAINDER = 0.05
"""The largest weight of the start in the final average that gives no warning."""


def sufficient_decay(steps: int) -> float:
    """Return the largest two-digit decay with which θ_0 has a weight of at most 5 % after a number of updates."""
    complement = 1 - REMAINDER ** (1 / steps)
    digits = 1 - math.floor(math.log10(complement))
    return round(1 - math.ceil(complement * 10**digits) / 10**digits, digits)


class EMA:
    """An exponential moving average of parameters.

    Args:
        parameters: The parameters to follow.
        decay: β in [0, 1), or "auto".

    Attributes:
        average: The averages, in the order of the parameters.
        updates: The number of updates so far, on which "auto" depends. Set it when averages are loaded.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float | Literal["auto"]) -> None:
        if not isinstance(decay, str) and not 0 <= decay < 1:
            raise ValueError(f"the EMA's decay must be in [0, 1); got {decay}")
        self.parameters = list(parameters)
        self.decay = decay
        self.average = [p.detach().clone() for p in self.parameters]
        self.updates = 0

    def weight(self, update: int) -> float:
        """Return the weight 1 − β_t of the parameters after an update t = 1, 2, …"""
        return 1 - ((1 - 1 / update) ** (EXPONENT + 1) if isinstance(self.decay, str) else self.decay)

    def update(self, stepped: Tensor | None = None, weight: Tensor | None = None) -> None:
        """Update the average with the parameters, after an optimiser step.

        Args:
            stepped: A boolean scalar on the parameters' device. If it is false, the average is left as it is. None
                means true.
            weight: The weight 1 − β_t of "auto" as a scalar on the parameters' device, which is not read. Default: that
                of the next update.
        """
        self.updates += 1
        own = self.weight(self.updates) if weight is None or not isinstance(self.decay, str) else weight
        follow(self.average, [p.detach() for p in self.parameters], own, stepped)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Replace the parameters by the average within the block, in which ``average`` holds the parameters.

        They are swapped one by one, so that no second copy of the network is made.
        """
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter, average in zip(self.parameters, self.average, strict=True):
            value = parameter.detach()
            kept = value.clone()
            value.copy_(average)
            average.copy_(kept)
