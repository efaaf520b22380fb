r"""Diffusion models over the discrete times of a table ᾱ_t: schedulers with ``alphas_cumprod`` (DDPM, DDIM, Euler, …).

    α_t = √ᾱ_t,    σ_t = √(1 − ᾱ_t),    with the prediction_type ε, v or x_0

Euler-like schedulers scale the network's input to x/√(1 + σ²), the variance-preserving point, so the process is the one
with ᾱ_t. (:meth:`DiffusionProcess.from_scheduler` returns the process of ``add_noise`` instead, with α = 1.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from robustdiff.backbones.kinds.kind import KINDS, ModelKind
from robustdiff.errors import InputError
from robustdiff.objectives.denoising import DenoisingConfig
from robustdiff.objectives.objective import ObjectiveConfig
from robustdiff.objectives.preconditioning import Denoise, DiffusionDenoiser
from robustdiff.process import PREDICTIONS, DiffusionProcess, Prediction
from robustdiff.samplers.spacing import scheduled

__all__ = ["Diffusion", "table_spacing"]

_FIXED = ("fixed_small", "fixed_large", "fixed_small_log", "fixed_large_log")


@KINDS.register("diffusion")
class Diffusion(ModelKind):
    """A diffusion model, by any scheduler with ᾱ_t; 2C output channels mean a learned variance."""

    name = "diffusion"
    title = "a diffusion model"
    general = True

    @classmethod
    def reads(cls, scheduler: Any) -> bool:
        return hasattr(scheduler, "alphas_cumprod")

    def process(self) -> DiffusionProcess:
        table = self.scheduler.alphas_cumprod
        try:
            return DiffusionProcess.from_alphas_cumprod(table)
        except ValueError:
            at = int(((table >= 1) | ~(table >= 0)).nonzero()[0])
            raise InputError(
                f"{type(self.scheduler).__name__} has ᾱ = {float(table[at]):g} at time {at}, which is no noisy point: "
                "take betas that are all above 0 and below 1"
            ) from None

    def objective(self) -> ObjectiveConfig:
        learned = self.backbone.learned_variance
        return DenoisingConfig(prediction=self._prediction(), variance="learned_range" if learned else "fixed")

    def _prediction(self) -> Prediction:
        """Return the parameterisation, after a check that it and the variance go with the network and the process."""
        config, learned = self.config, self.backbone.learned_variance
        given: Prediction = config.get("prediction_type", "epsilon")
        variance = config.get("variance_type")
        if given not in PREDICTIONS or given == "flow":
            known = ", ".join(name for name in PREDICTIONS if name != "flow")
            raise InputError(
                f"prediction_type={given} of {type(self.scheduler).__name__} is not supported: {known} are"
            )
        if variance not in (None, *_FIXED, "learned_range"):
            raise InputError(f"variance_type={variance} is not supported: {', '.join(_FIXED)} and learned_range are")
        if variance is not None and learned != (variance == "learned_range"):
            channels = self.backbone.channels
            raise InputError(
                f"variance_type={variance} does not go with a network of {channels} input and "
                f"{(1 + learned) * channels} output channels: set {'learned_range' if learned else 'fixed_small'} in "
                "scheduler_config.json"
            )
        self.process().check_signal(given)
        return given

    def denoiser(self, network: Callable[..., Any]) -> Denoise:
        return DiffusionDenoiser(network, self.process(), self._prediction())

    def sampling(self) -> dict[str, Any]:
        result = super().sampling()
        if self.config.get("variance_type") in _FIXED:
            result["variance"] = self.config.variance_type.removesuffix("_log")
        if not self.config.get("set_alpha_to_one", True):
            result["set_alpha_to_one"] = False
        return result

    def spacing(self) -> Callable[[int, int], Tensor] | None:
        # Multistep solvers space one more time than they use, and drop the last.
        return table_spacing(self.config, self.config.get("timestep_spacing"), int("solver_order" in self.config))


def table_spacing(config: Any, spacing: Any, left_out: int = 0) -> Callable[[int, int], Tensor] | None:
    """Return the function of (steps, T) that chooses times of a table as a scheduler does.

    Args:
        config: The configuration of the scheduler.
        spacing: Its ``timestep_spacing``; None for the samplers' own.
        left_out: The number of times that are spaced too, and not used.
    """
    for name in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"):
        if config.get(name, False):
            return _UnknownSpacing(f"{name}=true")
    if "original_inference_steps" in config:
        return _UnknownSpacing("original_inference_steps")
    if spacing is None:
        return None
    if spacing not in ("leading", "trailing", "linspace"):
        return _UnknownSpacing(f"timestep_spacing={spacing}")
    return _TableSpacing(spacing, config.get("steps_offset", 0), left_out)


@dataclass(frozen=True)
class _TableSpacing:
    """The times of a scheduler: its ``timestep_spacing`` over T discrete times."""

    spacing: Literal["leading", "trailing", "linspace"]
    offset: int = 0
    left_out: int = 0

    def __call__(self, steps: int, T: int) -> Tensor:
        return scheduled(self.spacing, steps, T, self.offset, self.left_out)


@dataclass(frozen=True)
class _UnknownSpacing:
    """A spacing that is not supported: calling it raises InputError."""

    name: str

    def __call__(self, steps: int, T: int) -> Tensor:
        raise InputError(
            f"the checkpoint's scheduler says {self.name}, a spacing that is not known here: choose one by --spacing, "
            "own, leading, trailing or linspace"
        )
