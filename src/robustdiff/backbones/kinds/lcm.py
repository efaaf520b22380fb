"""Latent consistency models (Luo et al., 2023) over the process of a diffusion model: diffusers' ``LCMScheduler``."""

from __future__ import annotations

from typing import Any

from robustdiff.backbones.kinds.diffusion import Diffusion
from robustdiff.backbones.kinds.kind import KINDS, ModelKind, validated
from robustdiff.errors import InputError
from robustdiff.objectives.latent_consistency import LatentConsistencyConfig
from robustdiff.objectives.objective import ObjectiveConfig

__all__ = ["LatentConsistency"]


@KINDS.register("lcm")
class LatentConsistency(Diffusion):
    """A latent consistency model, with the number of solver times that it was distilled with."""

    name = "lcm"
    title = "a latent consistency model"
    general = False
    sampler = "lcm"

    @classmethod
    def reads(cls, scheduler: Any) -> bool:
        return type(scheduler).__name__ == "LCMScheduler"

    def objective(self) -> ObjectiveConfig:
        prediction = self._prediction()
        if self.backbone.learned_variance:
            raise InputError("a latent consistency model has no learned variance, and the network has 2C channels")
        return validated(
            self.scheduler,
            LatentConsistencyConfig,
            prediction=prediction,
            solver_steps=self.config.original_inference_steps,
            timestep_scaling=self.config.timestep_scaling,
        )

    denoiser = ModelKind.denoiser
    spacing = ModelKind.spacing

    def sampling(self) -> dict[str, Any]:
        return ModelKind.sampling(self) | {
            "solver_steps": self.config.original_inference_steps,
            "timestep_scaling": self.config.timestep_scaling,
        }
