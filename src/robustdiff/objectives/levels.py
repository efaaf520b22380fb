"""The base class of recipe sections for objectives over noise levels σ."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

from pydantic import Field, model_validator

from robustdiff.errors import InputError
from robustdiff.objectives.objective import ObjectiveConfig
from robustdiff.objectives.preconditioning import karras_process, karras_sigmas
from robustdiff.process import DiffusionProcess, Prediction, ProcessConfig
from robustdiff.section import Text, given

__all__ = ["LevelsConfig"]


class LevelsConfig(ObjectiveConfig):
    """The section of a loss over noise levels σ, whose preconditioned network predicts x_0.

    Attributes:
        scheduler: The class name of the diffusers scheduler that describes such a network.
    """

    over_levels: ClassVar[bool] = True
    prediction: ClassVar[Prediction] = "sample"
    scheduler: ClassVar[str]

    sigma_min: float = Field(0.002, gt=0, description="the smallest level")
    sigma_max: float = Field(80.0, gt=0, description="the largest level")
    rho: float = Field(7.0, gt=0, description="the exponent ρ: the levels are uniform in σ^{1/ρ}")
    sigma_data: float = Field(0.5, gt=0, description="the standard deviation of the data")
    teacher: Text | None = Field(
        None,
        description="the teacher (diffusion or edm): a run, a pipeline folder or a shipped model; none: data alone",
    )

    @model_validator(mode="after")
    def _ascending(self) -> LevelsConfig:
        if not self.sigma_min < self.sigma_max:
            raise ValueError(f"sigma_min {self.sigma_min} is not below sigma_max {self.sigma_max}")
        return self

    def _needs_teacher(self, name: str) -> None:
        if self.teacher is None and given(self, name):
            raise ValueError(f"{name} has a meaning only with a teacher: set objective.teacher, or leave it out")

    @property
    def teacher_path(self) -> str | None:
        return self.teacher

    @property
    def teacher_bound(self) -> tuple[str, float]:
        return "sigma_max", self.sigma_max

    @abstractmethod
    def last_levels(self, steps: int) -> int:
        """Return the number of levels after the given number of optimiser updates."""

    @property
    def arguments(self) -> dict[str, float]:
        """The arguments that all objectives over noise levels have in common."""
        return self.model_dump(include={"sigma_min", "sigma_max", "rho", "sigma_data"})

    def new_process(self, process: ProcessConfig | None, steps: int) -> tuple[DiffusionProcess, Any]:
        import diffusers

        if process is not None:
            raise InputError(f"objective={self.name} has levels of its own: leave process out")
        levels = self.last_levels(steps)
        scheduler = getattr(diffusers, self.scheduler)(num_train_timesteps=levels, **self.arguments)
        return karras_process(karras_sigmas(levels, self.sigma_min, self.sigma_max, self.rho)), scheduler
