r"""The exponential moving average of the parameters, θ̄_t = β_t θ̄_{t−1} + (1 − β_t) θ_t, from θ̄_0 = θ_0 at the start.

Two choices of β_t after update t = 1, 2, …:

- a constant, ADM's. After T updates the start has the weight β^T, which is most of the average where T is not several
  times 1/(1 − β).
- "auto", the power function of Karras et al. (2024, "Analyzing and Improving the Training Dynamics of Diffusion
  Models", Section 3.1 and Appendix C): β_t = (1 − 1/t)^{γ+1}. Its weights grow as t^γ: their width is a constant
  fraction σ_rel of the run so far, and the start has none of them after the first update.

It is kept over the list of parameters, not over a copy of the module, so that it works on the shards of FSDP as on
a whole model. (diffusers' EMAModel warms a constant up from 0; ADM's is needed to agree with it.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from robustdiff.objectives.objective import follow

__all__ = ["EMA", "power_exponent", "sufficient_decay"]

RELATIVE_WIDTH = 0.10  # σ_rel of "auto", the middle of what Karras et al. find best
REMAINDER = 0.05  # of the starting weights that an average may hold at the end without a warning


def power_exponent(relative_width: float) -> float:
    r"""Return γ of the power-function average whose weights have a standard deviation of σ_rel times the run.

    The weights at τ = t/T in [0, 1] are (γ + 1) τ^γ, whose variance is σ_rel² = (γ + 1) / ((γ + 2)² (γ + 3)): a cubic
    in γ with one root ≥ 0 for each width up to that of constant weights, 12^{-1/2}.

    Arguments:
        relative_width: σ_rel in (0, 12^{-1/2}].

    Raises:
        ValueError: If it is out of its range.
    """
    if not 0 < relative_width <= 12**-0.5:
        raise ValueError(f"the relative width must be in (0, {12**-0.5:.4f}]; got {relative_width}")
    inverse = relative_width**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def sufficient_decay(steps: int) -> float:
    """Return the largest decay of two digits that leaves at most 5 % of the start in an average of so many updates."""
    complement = 1 - REMAINDER ** (1 / steps)
    digits = 1 - math.floor(math.log10(complement))
    return round(1 - math.ceil(complement * 10**digits) / 10**digits, digits)


class EMA:
    """An exponential moving average of parameters.

    Arguments:
        parameters: The parameters to follow.
        decay: β in [0, 1), or "auto".

    Attributes:
        average: The averages, in the order of the parameters.
        updates: The number of updates averaged. The power function depends on it, so set it when averages are loaded.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float | Literal["auto"]) -> None:
        if not isinstance(decay, str) and not 0 <= decay < 1:
            raise ValueError(f"the EMA's decay must be in [0, 1); got {decay}")
        self.parameters = list(parameters)
        self.decay = decay
        self.average = [p.detach().clone() for p in self.parameters]
        self.updates = 0
        self._exponent = power_exponent(RELATIVE_WIDTH)

    def update(self, stepped: Tensor | None = None) -> None:
        """Update the average by the parameters, after an optimiser step.

        Arguments:
            stepped: A boolean scalar on the parameters' device, false where the optimiser left the step out: θ̄ then
                stays. None is true.
        """
        self.updates += 1
        power = (1 - 1 / self.updates) ** (self._exponent + 1)
        beta = power if isinstance(self.decay, str) else self.decay
        follow(self.average, [p.detach() for p in self.parameters], 1 - beta, stepped)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Replace the parameters by the average within the block."""
        with torch.no_grad():
            values: list[Tensor] = [p.detach() for p in self.parameters]
            kept = [value.clone() for value in values]
            torch._foreach_copy_(values, self.average)
            try:
                yield
            finally:
                torch._foreach_copy_(values, kept)
