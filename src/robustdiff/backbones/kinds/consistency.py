"""Consistency models (Song et al., 2023): diffusers' ``CMStochasticIterativeScheduler``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from robustdiff.backbones.kinds.edm import LEVELS, levels_of, sigmas_of
from robustdiff.backbones.kinds.kind import KINDS, ModelKind, validated
from robustdiff.objectives.consistency import ConsistencyConfig
from robustdiff.objectives.objective import ObjectiveConfig
from robustdiff.objectives.preconditioning import Preconditioned, karras_process
from robustdiff.process import DiffusionProcess

__all__ = ["Consistency"]


@KINDS.register("consistency")
class Consistency(ModelKind):
    """A consistency function f(x, σ) over the noise levels of Karras et al. (2022)."""

    name = "consistency"
    title = "a consistency model"

    @classmethod
    def reads(cls, scheduler: Any) -> bool:
        return type(scheduler).__name__ == "CMStochasticIterativeScheduler"

    def process(self) -> DiffusionProcess:
        return karras_process(sigmas_of(self.scheduler))

    def levels(self) -> dict[str, float]:
        return levels_of(self.scheduler)

    def objective(self) -> ObjectiveConfig:
        levels = {name: self.config[name] for name in LEVELS}
        scales = self.config.num_train_timesteps
        return validated(self.scheduler, ConsistencyConfig, name="consistency", scales=scales, **levels)

    def model(self, network: Callable[..., Any]) -> Callable[..., Any]:
        return Preconditioned(network, self.config.sigma_data, self.config.sigma_min)

    def sampling(self) -> dict[str, Any]:
        # With clip_denoised the bound is that of the codec: [−1, 1] in pixels, as in diffusers.
        return super().sampling() | ({} if self.config.get("clip_denoised", True) else {"clip": False})
