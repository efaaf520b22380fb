r"""The base class of samplers, with the loop over steps.

A sampler visits S points of a process, from the noisiest to the least noisy. At each point it calls the network, and
steps from the time t to the next time s. The step of the base class is DDIM's, which other samplers replace:

    x_s = α_s x̂_0 + σ_s ε̂.

The last step leads to the levels where sampling ends, usually (α, σ) = (1, 0), where x_s = x̂_0.

A sampler is added by a file in this folder, or by a module that a package declares as an entry point in the group
``robustdiff.samplers``::

    @SAMPLERS.register("midpoint")
    class Midpoint(Sampler):
        strength: float = 1.0  # an option of its own, validated as the sections of a recipe are

        def step(self, step: Step) -> Tensor: ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import Field, field_validator
from torch import Tensor

from robustdiff.errors import InputError
from robustdiff.process import DiffusionProcess
from robustdiff.registry import Registry
from robustdiff.samplers.denoiser import Denoised, Denoiser
from robustdiff.samplers.spacing import SPACINGS, Spacing, check_steps, respaced, scheduled, strided
from robustdiff.section import Section

__all__ = ["SAMPLERS", "Path", "Sampler", "Step", "TimeSpacing"]

TimeSpacing = Spacing | Callable[[int, int], Tensor]
"""A choice of S out of T times: a name, or a function of (S, T) that returns S ascending indices or times."""


@dataclass(frozen=True)
class Path:
    """The points that a sampler visits.

    Attributes:
        points: The process restricted to the S points, with ascending noise.
        process: The process that the network was trained on.
        times: The indices or times of the points in ``process``, with shape (S,).
        end: The levels (α, σ) at which sampling ends.
    """

    points: DiffusionProcess
    process: DiffusionProcess
    times: Tensor
    end: tuple[float, float] = (1.0, 0.0)

    def __len__(self) -> int:
        return len(self.points)

    @property
    def levels(self) -> list[tuple[float, float]]:
        """The S + 1 levels (α, σ): those where sampling ends, then those of the S points with ascending noise."""
        return [self.end, *zip(self.points.alphas.tolist(), self.points.sigmas.tolist(), strict=True)]


@dataclass
class Step:
    """One sampling step, from the time t to the time s.

    Attributes:
        x: The state x_t, with shape (B, C, H, W).
        denoised: The network's x̂_0 and ε̂ at x_t.
        path: The path of the sampler.
        index: The position of t in the path; 0 in the last step.
        before: The levels (α_t, σ_t).
        after: The levels (α_s, σ_s).
        noises: An iterator over standard normal noise, (B, C, H, W) each; a step takes its noise by ``next``.
        previous: The step before this one; None in the first step.
    """

    x: Tensor
    denoised: Denoised
    path: Path
    index: int
    before: tuple[float, float]
    after: tuple[float, float]
    noises: Iterator[Tensor]
    previous: Step | None = None


class Sampler(Section):
    """The base class of samplers, whose step and times are DDIM's. The fields of a subclass are its options.

    Attributes:
        model: The kind of model that the sampler is for, used in messages.
        needs: The condition on the process, used in messages.
        default: True if the sampler is the default for its kind of model.
        strings: True if the sampler accepts guided-diffusion's respacing strings.
        spaced: True if the sampler takes a ``spacing``; otherwise its times are its own.
        clips: True if x̂_0 may be clipped to a fixed range; otherwise only by dynamic thresholding.
        linear_scale: True if ``eps_scale`` may be (k, b), for k·i + b at the i-th point.
        default_steps: The default number of steps.
        grid_steps: The default numbers of steps for a comparison of several.
    """

    model: ClassVar[str] = "diffusion model"
    needs: ClassVar[str] = "α² + σ² = 1"
    default: ClassVar[bool] = False
    strings: ClassVar[bool] = True
    spaced: ClassVar[bool] = True
    clips: ClassVar[bool] = True
    linear_scale: ClassVar[bool] = False
    default_steps: ClassVar[int] = 20
    grid_steps: ClassVar[tuple[int, ...]] = (5, 10, 20, 50)

    eps_scale: float | tuple[float, float] = Field(
        1.0, description="the number by which the predicted noise is divided"
    )

    @field_validator("eps_scale")
    @classmethod
    def _scale(cls, value: Any) -> Any:
        if isinstance(value, tuple) and not cls.linear_scale:
            owners = " and ".join(name for name, kind in SAMPLERS.items() if kind.linear_scale)
            raise ValueError(f"a linear scale is for {owners} only: give a number")
        return value

    @classmethod
    def suits(cls, process: DiffusionProcess) -> bool:
        """Return True if the sampler can be used with the process."""
        return process.variance_preserving

    def own(self, steps: int, process: DiffusionProcess) -> Path:
        """Return the path of S steps with the spacing of the sampler's authors.

        Raises:
            InputError: If the number of steps is out of range.
        """
        return self.along(strided(steps, len(process)), process)

    def along(self, times: Tensor, process: DiffusionProcess) -> Path:
        """Return the path over given times (S,): ascending indices in [0, T), or times of the process."""
        return Path(process.respace(times), process, times)

    def path(
        self, steps: int | str, process: DiffusionProcess, spacing: TimeSpacing | None = None, steps_offset: int = 0
    ) -> Path:
        """Return the path for a number or string of steps; the arguments are those of :func:`robustdiff.sample`.

        Raises:
            InputError: If the sampler does not support these steps or this spacing.
        """
        T = len(process)
        if not (spacing is None or callable(spacing) or (isinstance(spacing, str) and spacing in SPACINGS)):
            raise InputError(f"unknown spacing {spacing!r}: use one of {', '.join(SPACINGS)}")
        if isinstance(steps, str):
            if not self.strings:
                others = ", ".join(name for name, kind in SAMPLERS.items() if kind.strings)
                raise InputError(f"steps {steps!r} are for {others}: give this sampler a number of steps")
            if isinstance(spacing, str) and spacing != "own":
                raise InputError(f"steps {steps!r} say the times themselves: leave spacing={spacing} out")
            return self.along(respaced(steps, T), process)
        if spacing is None or spacing == "own":
            return self.own(steps, process)
        if isinstance(spacing, str):
            return self.along(scheduled(spacing, steps, T, steps_offset), process)
        check_steps(steps, None if process.time_at else T)
        return self.along(spacing(steps, T), process)

    def start(self, x: Tensor, path: Path) -> Tensor:
        """Return the initial state for standard normal noise ``x`` (B, C, H, W)."""
        return x

    def denoise(self, denoiser: Denoiser, x: Tensor, index: int, path: Path) -> Denoised:
        """Evaluate the network at the state ``x`` (B, C, H, W) and the point ``index`` of the path."""
        return denoiser(x, index, path.points)

    def step(self, step: Step) -> Tensor:
        """Return the next state x_s, with shape (B, C, H, W)."""
        alpha, sigma = step.after
        return alpha * step.denoised.x0 + sigma * step.denoised.noise

    def run(self, denoiser: Denoiser, path: Path, x: Tensor, noises: Iterator[Tensor]) -> Tensor:
        """Run all steps of a path from standard normal noise ``x`` (B, C, H, W), and return the samples."""
        levels, previous = path.levels, None
        x = self.start(x, path)
        for index in reversed(range(len(path))):
            denoised = self.denoise(denoiser, x, index, path)
            step = Step(x, denoised, path, index, levels[index + 1], levels[index], noises, previous)
            x = self.step(step)
            previous, step.previous = step, None  # keep one previous step only
        return x


SAMPLERS: Registry[type[Sampler]] = Registry("sampler", "samplers")
