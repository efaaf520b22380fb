r"""A sampler as a rule for one step, and the one loop over steps.

A sampler visits S points of a process, from the noisiest to the least noisy. At each the network is called, and the
step leads from the time t to the next one, s:

    x_s = α_s x̂_0 + σ_s ε̂,

which is DDIM's step; other samplers add terms to it. After the last point come the levels where sampling ends,
(α, σ) = (1, 0) as a rule, where x_s = x̂_0.

A file of this folder, or a module that a package names as an entry point in ``robustdiff.samplers``, adds one::

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
"""The choice of S times out of T: a name, or a function (S, T) ↦ S ascending indices or times."""


@dataclass(frozen=True)
class Path:
    """The points that a sampler visits.

    Attributes:
        points: The process at the S points, in ascending noise.
        process: The process that the network was trained on.
        times: The indices (or times) of the points in it, with shape (S,).
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
        """Return (α, σ) at the end and at the S points, in ascending noise."""
        return [self.end, *zip(self.points.alphas.tolist(), self.points.sigmas.tolist(), strict=True)]


@dataclass
class Step:
    """One step, from the time t to s.

    Attributes:
        x: x_t, with shape (B, C, H, W).
        denoised: The network's x̂_0 and ε̂ there.
        path: The path.
        index: The position of t in it; the last step is that at 0.
        before: (α_t, σ_t).
        after: (α_s, σ_s).
        noises: Standard normal noise: the next, (B, C, H, W), is that of this step.
        previous: The step before this one, if any.
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
    """A sampler; its fields are its own options. The rule and the times of this class are DDIM's.

    Attributes:
        model: The kind of model that it samples, for messages.
        needs: The condition on the process, for messages.
        default: Whether it is taken for its kind of model where no sampler is asked for.
        strings: Whether guided-diffusion's respacing strings are for it.
        clips: Whether x̂_0 may be clipped to a range, and not by dynamic thresholding only.
        linear_scale: Whether ``eps_scale`` may be (k, b), for k·i + b at the i-th point.
        default_steps: The number of steps where none is asked for.
        grid_steps: The same for a comparison of several.
    """

    model: ClassVar[str] = "diffusion model"
    needs: ClassVar[str] = "α² + σ² = 1"
    default: ClassVar[bool] = False
    strings: ClassVar[bool] = True
    clips: ClassVar[bool] = True
    linear_scale: ClassVar[bool] = False
    default_steps: ClassVar[int] = 20
    grid_steps: ClassVar[tuple[int, ...]] = (5, 10, 20, 50)

    eps_scale: float | tuple[float, float] = Field(1.0, description="what the predicted noise is divided by")

    @field_validator("eps_scale")
    @classmethod
    def _scale(cls, value: Any) -> Any:
        if isinstance(value, tuple) and not cls.linear_scale:
            owners = " and ".join(name for name, kind in SAMPLERS.items() if kind.linear_scale)
            raise ValueError(f"a linear scale is for {owners} only: give a number")
        return value

    @classmethod
    def suits(cls, process: DiffusionProcess) -> bool:
        """Return whether the sampler is for a process."""
        return process.variance_preserving

    def own(self, steps: int, process: DiffusionProcess) -> Path:
        """Return the path of S steps as the sampler's authors space it.

        Raises:
            InputError: If there is no path of so many steps.
        """
        return self.along(strided(steps, len(process)), process)

    def along(self, times: Tensor, process: DiffusionProcess) -> Path:
        """Return the path over given times: ascending indices in [0, T), or times of the process, with shape (S,)."""
        return Path(process.respace(times), process, times)

    def path(
        self, steps: int | str, process: DiffusionProcess, spacing: TimeSpacing | None = None, steps_offset: int = 0
    ) -> Path:
        """Return the path of some steps; the arguments are those of :func:`robustdiff.sample`.

        Raises:
            InputError: If the sampler cannot have these steps, or they are not of this spacing.
        """
        T = len(process)
        if isinstance(spacing, str) and spacing not in SPACINGS:
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
        """Return the first state from standard normal noise (B, C, H, W)."""
        return x

    def denoise(self, denoiser: Denoiser, x: Tensor, index: int, path: Path) -> Denoised:
        """Call the network on the state (B, C, H, W) at a point of the path."""
        return denoiser(x, index, path.points)

    def step(self, step: Step) -> Tensor:
        """Return x_s (B, C, H, W)."""
        alpha, sigma = step.after
        return alpha * step.denoised.x0 + sigma * step.denoised.noise

    def run(self, denoiser: Denoiser, path: Path, x: Tensor, noises: Iterator[Tensor]) -> Tensor:
        """Sample from standard normal noise x (B, C, H, W) to the end of a path."""
        levels, previous = path.levels, None
        x = self.start(x, path)
        for index in reversed(range(len(path))):
            denoised = self.denoise(denoiser, x, index, path)
            step = Step(x, denoised, path, index, levels[index + 1], levels[index], noises, previous)
            x = self.step(step)
            previous, step.previous = step, None  # two steps back nothing is kept
        return x


SAMPLERS: Registry[type[Sampler]] = Registry("sampler", "samplers")
