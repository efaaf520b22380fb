r"""Flow matching, α_t = 1 − t and σ_t = t: ``FlowMatch…`` schedulers, and others with ``use_flow_sigmas``.

The shift s of a flow (Esser et al., 2024, equation 23) is a number, or with ``use_dynamic_shifting`` a function of the
number of tokens of an image: s = e^μ or, with ``time_shift_type: linear``, s = μ, where μ is on the line through
(``base_image_seq_len``, ``base_shift``) and (``max_image_seq_len``, ``max_shift``), as in the pipelines of Flux and
Stable Diffusion 3. Images of one size have one shift, in the process of training and in the levels of sampling.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustdiff.backbones.kinds.kind import KINDS, ModelKind, incorrect
from robustdiff.errors import InputError, first_line
from robustdiff.objectives.denoising import DenoisingConfig
from robustdiff.objectives.objective import ObjectiveConfig
from robustdiff.process import DiffusionProcess

__all__ = ["Flow"]


@KINDS.register("flow")
class Flow(ModelKind):
    """A flow-matching model, with any fixed or dynamic shift."""

    name = "flow"
    title = "a flow-matching model"

    @classmethod
    def reads(cls, scheduler: Any) -> bool:
        return type(scheduler).__name__.startswith("FlowMatch") or bool(scheduler.config.get("use_flow_sigmas", False))

    def process(self) -> DiffusionProcess:
        if self.config.get("invert_sigmas", False):
            raise InputError("invert_sigmas=true in scheduler_config.json is not supported: set it to false")
        try:
            T = self.config.num_train_timesteps
            return DiffusionProcess.flow(T, self._shift(), time_scale=T)
        except (ValueError, TypeError, ArithmeticError) as error:
            raise incorrect(self.scheduler, error) from None

    def _shift(self) -> float:
        """Return the shift s."""
        mu = self._mu()
        if mu is not None:
            return mu if self.config.get("time_shift_type") == "linear" else math.exp(mu)
        shift = self.config.get("shift", self.config.get("flow_shift"))
        return 1.0 if shift is None else float(shift)

    def _mu(self) -> float | None:
        """Return the μ of a dynamic shift for the size of the network's input; None if the shift is fixed."""
        if not self.config.get("use_dynamic_shifting", False):
            return None
        tokens = self.backbone.tokens
        if tokens is None:
            raise InputError(
                "use_dynamic_shifting=true in scheduler_config.json is for networks of tokens, such as Flux: set a "
                "fixed shift instead"
            )
        names = ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")
        values = [self.config.get(name) for name in names]
        if not all(type(value) in (int, float) for value in values) or values[2] == values[3]:
            given = ", ".join(f"{name}={value}" for name, value in zip(names, values, strict=True))
            raise InputError(
                f"use_dynamic_shifting=true needs a line, and scheduler_config.json has {given}: correct it"
            )
        low, high, first, last = values
        return float(low + (high - low) * (tokens - first) / (last - first))

    def objective(self) -> ObjectiveConfig:
        given = self.config.get("prediction_type", "flow_prediction")
        if given != "flow_prediction":
            raise InputError(f"prediction_type={given} with flow sigmas is not supported: only flow_prediction is")
        return DenoisingConfig(
            prediction="flow", variance="learned_range" if self.backbone.learned_variance else "fixed"
        )

    def spacing(self) -> Callable[[int, int], Tensor] | None:
        if self.config.get("stochastic_sampling", False):
            raise InputError("stochastic_sampling=true in scheduler_config.json is not supported: set it to false")
        return _FlowSpacing(self.scheduler, self._mu(), self.backbone.linear_levels)


@dataclass(frozen=True)
class _FlowSpacing:
    """The levels σ of a flow-matching scheduler, in descending order.

    Attributes:
        scheduler: The scheduler.
        mu: The μ of a dynamic shift; None if the shift is fixed.
        linear: Whether the scheduler is given the levels 1, (S − 1)/S, …, 1/S, which it shifts.
    """

    scheduler: Any
    mu: float | None = field(default=None, repr=False)
    linear: bool = field(default=False, repr=False)

    def __call__(self, steps: int, T: int) -> Tensor:
        scheduler = copy.deepcopy(self.scheduler)
        given: dict[str, Any] = {"num_inference_steps": steps}
        if self.linear and not scheduler.config.get("use_flow_sigmas", False):
            given["sigmas"] = np.linspace(1.0, 1 / steps, steps)
        if self.mu is not None:
            given["mu"] = self.mu
        try:
            scheduler.set_timesteps(**given)
        except Exception as error:  # the classes differ in the arguments that they take, and check few of them
            raise InputError(
                f"{type(scheduler).__name__} of the checkpoint makes no {steps} levels ({first_line(error)}): use "
                "FlowMatchEulerDiscreteScheduler, or choose a --spacing"
            ) from None
        # Solvers of second order have each level but the first twice.
        sigmas = torch.unique_consecutive(scheduler.sigmas.to(torch.float64))[:steps]
        if not bool(((sigmas > 0) & (sigmas <= 1)).all()):
            raise InputError(
                f"the checkpoint's scheduler has no {steps} levels in (0, 1] to visit: choose another number of steps, "
                "or a --spacing"
            )
        return sigmas
