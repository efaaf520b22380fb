r"""The exponential moving average of the parameters, θ̄ ← μ θ̄ + (1 − μ) θ, from θ̄ = θ at the start.

It is kept over the list of parameters, not over a copy of the module, so that it works on the shards of FSDP as on
a whole model. (diffusers' EMAModel warms μ up from 0; the constant μ of ADM is needed to agree with it.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from robustdiff.objectives.objective import follow

__all__ = ["EMA"]


class EMA:
    """An exponential moving average of parameters.

    Arguments:
        parameters: The parameters to follow.
        decay: μ in [0, 1).
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"the EMA's decay must be in [0, 1); got {decay}")
        self.parameters = list(parameters)
        self.decay = decay
        self.average = [p.detach().clone() for p in self.parameters]

    def update(self, stepped: Tensor | None = None) -> None:
        """Set θ̄ ← μ θ̄ + (1 − μ) θ after an optimiser step.

        Arguments:
            stepped: Whether the optimiser made the step, a boolean scalar on the parameters' device; where it is false
                θ̄ stays. None: it did.
        """
        follow(self.average, [p.detach() for p in self.parameters], 1 - self.decay, stepped)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the block the parameters hold the average."""
        with torch.no_grad():
            values: list[Tensor] = [p.detach() for p in self.parameters]
            kept = [value.clone() for value in values]
            torch._foreach_copy_(values, self.average)
            try:
                yield
            finally:
                torch._foreach_copy_(values, kept)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averages by their number, contiguous whatever the parameters' memory format is."""
        return {f"{i:05d}": average.contiguous() for i, average in enumerate(self.average)}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take the averages from :meth:`state_dict`.

        Raises:
            KeyError: If one is missing.
        """
        for i, average in enumerate(self.average):
            average.copy_(state[f"{i:05d}"])
