r"""Denoisers over noise levels in the preconditioning of Karras et al. (2022): diffusers' EDM schedulers.

diffusers' schedulers call a denoiser at the time ln σ/4. Denoisers trained by this package use 250 ln σ, the convention
of Song et al. for consistency models and their teachers; their scheduler stores the factor as ``_time_scale``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor

from robustdiff.backbones.kinds.diffusion import table_spacing
from robustdiff.backbones.kinds.kind import KINDS, ModelKind, incorrect, validated
from robustdiff.errors import InputError
from robustdiff.objectives.edm import EdmConfig
from robustdiff.objectives.objective import ObjectiveConfig
from robustdiff.objectives.preconditioning import Denoise, OverTimes, Preconditioned, karras_sigmas
from robustdiff.process import DiffusionProcess

__all__ = ["LEVELS", "Edm", "levels_of", "sigmas_of"]

LEVELS = ("sigma_min", "sigma_max", "rho", "sigma_data")
"""The fields of a scheduler and of an objective that define its levels and preconditioning."""


def sigmas_of(scheduler: Any) -> Tensor:
    """Return the levels of a scheduler, ascending, with shape (T,).

    Raises:
        InputError: If they are not those of Karras et al., or its numbers are out of range.
    """
    config = scheduler.config
    if config.get("sigma_schedule", "karras") != "karras":
        raise InputError(
            f"sigma_schedule={config.sigma_schedule} is not supported: use karras in scheduler_config.json"
        )
    try:
        return karras_sigmas(config.num_train_timesteps, config.sigma_min, config.sigma_max, config.rho)
    except (ValueError, TypeError, ArithmeticError) as error:
        raise incorrect(scheduler, error) from None


def levels_of(scheduler: Any) -> dict[str, float]:
    """Return the fields :data:`LEVELS` of a scheduler.

    Raises:
        InputError: As of :func:`sigmas_of`.
    """
    sigmas_of(scheduler)
    return {name: scheduler.config[name] for name in LEVELS}


@KINDS.register("edm")
class Edm(ModelKind):
    """A denoiser D(x, σ), by ``EDMEulerScheduler`` or ``EDMDPMSolverMultistepScheduler``."""

    name = "edm"
    title = "a denoiser over noise levels"
    marks: ClassVar[Mapping[str, Any]] = {"_time_scale": 250.0}

    @classmethod
    def reads(cls, scheduler: Any) -> bool:
        return type(scheduler).__name__ in ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")

    def process(self) -> DiffusionProcess:
        return OverTimes.process(sigmas_of(self.scheduler))

    def levels(self) -> dict[str, float]:
        return levels_of(self.scheduler)

    def objective(self) -> ObjectiveConfig:
        config, given = self.config, self.config.get("prediction_type", "epsilon")
        if given != "epsilon":
            raise InputError(f"prediction_type={given} of an EDM scheduler is not supported: only epsilon is")
        levels = {name: config[name] for name in LEVELS}
        return validated(self.scheduler, EdmConfig, name="edm", levels=config.num_train_timesteps, **levels)

    def model(self, network: Callable[..., Any]) -> Callable[..., Any]:
        return OverTimes(self.denoiser(network))

    def denoiser(self, network: Callable[..., Any]) -> Denoise:
        return Preconditioned(network, self.config.sigma_data, time_scale=self.config.get("_time_scale", 0.25))

    def check_trainable(self, path: str) -> None:
        if self.config.get("_time_scale") is None:
            raise InputError(
                f"the model {path} is called at ln σ/4, and training over noise levels calls networks at "
                "250 ln σ: it can be sampled and be a teacher, but not be trained"
            )

    def spacing(self) -> Callable[[int, int], Tensor] | None:
        return table_spacing(self.config, "linspace")
