r"""Consistency distillation and training (Song et al., 2023, arXiv 2303.01469), at a perturbed point.

A consistency function f (:class:`~robustdiff.objectives.preconditioning.Preconditioned`) maps every point of a
trajectory of the probability-flow ODE to its end. Given levels σ_0 < … < σ_{N−1} (:func:`karras_sigmas`; Song et al.
count them from 1), a draw fixes the following once for a batch:

    n < N − 1,      x_{n+1} = x_0 + σ_{n+1} ε,      Φ̂ = the solver's step from x_{n+1} at σ_{n+1} to σ_n.

Every pass over the batch evaluates the loss at another δ, with θ⁻ the parameters of the target network:

    perturb = "solver"      L(δ) = w_n d( f_θ(x_{n+1}, σ_{n+1}), f_θ⁻(Φ̂ + δ, σ_n) ),
    perturb = "student"     L(δ) = w_n d( f_θ(x_{n+1} + δ, σ_{n+1}), f_θ⁻(Φ̂, σ_n) ).

The error of the solver is the mismatch between training and sampling of a consistency model (Wang et al., 2025,
arXiv 2502.17099): "solver" trains on the worst point near Φ̂. One backward pass computes the gradient of δ, through the
target network with frozen parameters, and that of θ, through the student. "student" needs no backward pass through the
target network. Φ̂ depends neither on δ nor on θ. Both ascents are of the whole loss:
δ moves all of f, c_skip x included.

Distillation (Song et al., algorithm 2) integrates dx/dσ = (x − D(x, σ))/σ with a teacher D, by Euler's or Heun's step.
Training without a teacher (algorithm 3) takes Euler's step with D = x_0, so that Φ̂ = x_0 + σ_n ε with the same ε.

After every optimiser update θ⁻ ← μ θ⁻ + (1 − μ) θ. N and μ may depend on the number k of updates made, out of K:

    fixed        N, μ
    growing      N(k) = ⌈√(k/K ((s_1 + 1)² − s_0²) + s_0²) − 1⌉ + 1,   μ(k) = exp(s_0 ln μ_0 / N(k))      (appendix C)
    doubling     N(k) = min(s_0 2^⌊k/K'⌋, s_1) + 1,   K' = ⌊K/(log_2⌊s_1/s_0⌋ + 1)⌋,   μ as given

From k = K on, after the last update, N is that of k = K − 1: a saved model has the levels that it was trained at.

"doubling" is due to Song & Dhariwal (2024, arXiv 2310.14189), as are μ = 0 (θ⁻ = θ, no gradient), the pseudo-Huber
distance √(‖a − b‖² + c²) − c with c = 0.00054 √d, the weights w_n = 1/(σ_{n+1} − σ_n), and the log-normal instead of
the uniform distribution of n (:class:`~robustdiff.objectives.timesteps.LogNormal`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar, Literal, get_args

import torch
from pydantic import Field, ValidationInfo, field_validator, model_validator
from torch import Tensor, nn
from torch.nn.functional import interpolate

from robustdiff.errors import InputError, installing
from robustdiff.objectives.distillation import Distillation, DistillationDraw, Perturbed, check_names
from robustdiff.objectives.levels import LevelsConfig
from robustdiff.objectives.objective import OBJECTIVES, gaussian, precise
from robustdiff.objectives.preconditioning import Denoise, Preconditioned, karras_process, karras_sigmas
from robustdiff.objectives.timesteps import LogNormal, Uniform
from robustdiff.process import DiffusionProcess, broadcast
from robustdiff.section import Fraction, given

__all__ = [
    "DISTANCES",
    "SOLVERS",
    "ConsistencyConfig",
    "ConsistencyObjective",
    "DoublingScales",
    "FixedScales",
    "GrowingScales",
    "Metric",
    "ScaleSchedule",
    "Solver",
    "Weighting",
    "euler_step",
    "heun_step",
]

Solver = Literal["heun", "euler"]
Metric = Literal["l1", "l2", "pseudo-huber", "lpips"]
Weighting = Literal["uniform", "inverse-gap"]


def euler_step(denoise: Denoise, x: Tensor, sigma: Tensor, lower: Tensor) -> Tensor:
    """Make one Euler step of dx/dσ = (x − D(x, σ))/σ, with one call of D.

    Args:
        denoise: The denoiser D.
        x: Points, with shape (B, *).
        sigma: Their levels, with shape (B,).
        lower: The levels after the step, with shape (B,).
    """
    slope = (x - denoise(x, sigma)) / broadcast(sigma, x)
    return (x + broadcast(lower - sigma, x) * slope).to(x.dtype)


def heun_step(denoise: Denoise, x: Tensor, sigma: Tensor, lower: Tensor) -> Tensor:
    """Make one Heun step, with the mean of the slopes at both ends and two calls of D.

    The arguments are those of :func:`euler_step`; ``lower`` must be positive.
    """
    slope = (x - denoise(x, sigma)) / broadcast(sigma, x)
    gap = broadcast(lower - sigma, x)
    end = (x + gap * slope).to(x.dtype)
    slope_at_end = (end - denoise(end, lower)) / broadcast(lower, x)
    return (x + gap / 2 * (slope + slope_at_end)).to(x.dtype)


SOLVERS: dict[str, Callable[[Denoise, Tensor, Tensor, Tensor], Tensor]] = {"heun": heun_step, "euler": euler_step}


def _l1(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).abs().flatten(1).mean(1)


def _l2(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().flatten(1).mean(1)


def _pseudo_huber(a: Tensor, b: Tensor) -> Tensor:
    square = (a - b).square().flatten(1).sum(1)
    c = 0.00054 * math.sqrt(a[0].numel())
    # √(s + c²) − c, without cancellation for small s.
    return square / ((square + c**2).sqrt() + c)


class _LPIPS:
    """The perceptual distance of Zhang et al. (2018), from the package lpips: VGG-16 with max pooling.

    Images of less than 256 pixels a side are resized to 224×224, as in the code of Song et al. They use the LPIPS of
    the package piq, with average pooling, so that the values of the loss cannot be compared with theirs.
    """

    def __init__(self) -> None:
        try:
            package: Any = import_module("lpips")
        except ImportError:
            raise InputError(
                f"the metric lpips needs the package lpips: {installing('lpips')}, or choose l1, l2 or pseudo-huber"
            ) from None
        try:
            network = package.LPIPS(net="vgg", verbose=False)
        except OSError as error:
            raise InputError(
                f"the metric lpips cannot load the weights of VGG-16 ({error}): connect once, so that torchvision can "
                "download them, or choose l1, l2 or pseudo-huber"
            ) from None
        self.network = network.eval().requires_grad_(False)

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        self.network.to(a.device)
        a, b = (x.expand(-1, 3, -1, -1) for x in (a, b))
        if min(a.shape[-2:]) < 256:
            a, b = (interpolate(x, size=224, mode="bilinear") for x in (a, b))
        return self.network(a, b).flatten()


DISTANCES: dict[str, Callable[[], Callable[[Tensor, Tensor], Tensor]]] = {
    "l1": lambda: _l1,
    "l2": lambda: _l2,
    "pseudo-huber": lambda: _pseudo_huber,
    "lpips": _LPIPS,
}
"""Constructors of the distance d: (B, *), (B, *) ↦ (B,). l1 and l2 are the means of |a − b| and (a − b)² over
elements."""


class ScaleSchedule(ABC):
    """The number N of levels and the decay μ of the target network as functions of the number of updates made.

    Attributes:
        fixed: True if both are the same throughout.
    """

    fixed: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, updates: int) -> tuple[int, float]:
        """Return (N, μ) after the given number of optimiser updates."""


def _check_decay(decay: float) -> None:
    if not 0 <= decay < 1:
        raise ValueError(f"decay must be in [0, 1); got {decay}")


@dataclass(frozen=True)
class FixedScales(ScaleSchedule):
    """A constant number of levels N = ``scales`` ≥ 2 and a constant decay μ in [0, 1)."""

    fixed: ClassVar[bool] = True
    scales: int
    decay: float

    def __post_init__(self) -> None:
        _check_decay(self.decay)
        if self.scales < 2:
            raise ValueError(f"scales must be at least 2; got {self.scales}")

    def __call__(self, updates: int) -> tuple[int, float]:
        return self.scales, self.decay


@dataclass(frozen=True)
class _MoreScales(ScaleSchedule):
    """A number of levels N that grows from s_0 = ``start`` to s_1 + 1, s_1 = ``end``, in K = ``total`` updates.

    From K updates on it is that of the last, k = K − 1. ``decay`` is μ in [0, 1); for ``GrowingScales`` μ_0, where 0
    means μ = 0 throughout.
    """

    start: int
    end: int
    decay: float
    total: int
    least: ClassVar[int]

    def __post_init__(self) -> None:
        _check_decay(self.decay)
        if not (self.least <= self.start <= self.end and self.total >= 1):
            raise ValueError(
                f"the numbers of levels need {self.least} ≤ start ≤ end and total ≥ 1; got {self.start}, {self.end}, "
                f"{self.total}"
            )

    def _update(self, updates: int) -> int:
        return min(updates, self.total - 1)


class GrowingScales(_MoreScales):
    """The schedule of Song et al. (2023), appendix C, as printed; their code has N(k) − 1 instead of N(k) in μ(k)."""

    least = 2

    def __call__(self, updates: int) -> tuple[int, float]:
        progress = self._update(updates) / self.total
        square = progress * ((self.end + 1) ** 2 - self.start**2) + self.start**2
        scales = math.ceil(math.sqrt(square) - 1) + 1
        return scales, math.exp(self.start * math.log(self.decay) / scales) if self.decay else 0.0


class DoublingScales(_MoreScales):
    """The schedule of Song & Dhariwal (2024), section 3.4. The initial N is s_0 + 1.

    Its formula stops at s_0 2^m + 1 levels where ⌊s_1/s_0⌋ = 2^m, which is s_1 + 1 only if s_1 = s_0 2^m.
    """

    least = 1

    def __call__(self, updates: int) -> tuple[int, float]:
        length = max(int(self.total / (math.log2(self.end // self.start) + 1)), 1)
        return min(self.start * 2 ** (self._update(updates) // length), self.end) + 1, self.decay


def _recorded(device: torch.device) -> bool:
    """Return whether what is computed on a device is recorded as a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _states(device: torch.device) -> list[Tensor]:
    """Return the states of the generators from which a network on a device draws."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


class ConsistencyObjective(Distillation):
    """The consistency loss, as a callable.

    Student and target are networks F, called with (c_in x, 250 ln σ) as diffusers calls them.

    Args:
        target: The target network, initially a copy of the student. Its parameters are frozen.
        teacher: The denoiser D, such as a ``Preconditioned`` or a ``DiffusionDenoiser``; None for training without a
            teacher.
        scales: The number N of levels, or a schedule of (N, μ).
        decay: The decay μ in [0, 1), if ``scales`` is a number.
        solver: The solver of the teacher's ODE: "heun" or "euler".
        metric: The distance d: "l1", "l2", "pseudo-huber" or "lpips".
        perturb: The point that δ is added to: "solver" (Φ̂) or "student" (x_{n+1}).
        weighting: The weights w_n: "uniform" (1), or "inverse-gap" (1/(σ_{n+1} − σ_n)).
        times: (P_mean, P_std) of the log-normal distribution of n, (−1.1, 2.0) in Song & Dhariwal (2024); None for the
            uniform distribution.
        sigma_min: The smallest level σ_0 > 0.
        sigma_max: The largest level σ_{N−1} > σ_0.
        rho: The exponent ρ of the levels, which are uniform in σ^{1/ρ}.
        sigma_data: The standard deviation σ_d > 0 of the data.

    Raises:
        ValueError: If a name is unknown or a number is out of range.
        InputError: If the metric "lpips" lacks its package or its weights.
    """

    recordable = True

    def __init__(
        self,
        target: nn.Module,
        teacher: Denoise | None = None,
        scales: int | ScaleSchedule = 18,
        decay: float = 0.95,
        solver: Solver = "heun",
        metric: Metric = "l2",
        perturb: Perturbed = "solver",
        weighting: Weighting = "uniform",
        times: tuple[float, float] | None = None,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        rho: float = 7.0,
        sigma_data: float = 0.5,
    ) -> None:
        check_names(
            solver=(solver, SOLVERS),
            metric=(metric, DISTANCES),
            perturb=(perturb, get_args(Perturbed)),
            weighting=(weighting, get_args(Weighting)),
        )
        super().__init__(target.requires_grad_(False), perturb, DISTANCES[metric]())
        self.teacher = teacher
        self.schedule = scales if isinstance(scales, ScaleSchedule) else FixedScales(scales, decay)
        self.solver = SOLVERS[solver]
        self.weighting = weighting
        self.times = times
        self.sigma_min, self.sigma_max, self.rho, self.sigma_data = sigma_min, sigma_max, rho, sigma_data
        self._drops_out: bool | None = None  # whether the target does; None before it was called
        self._set_scales()

    def _set_scales(self) -> None:
        """Make the tables for the current number of levels."""
        N, _ = self.schedule(self.updates)
        self.process = karras_process(karras_sigmas(N, self.sigma_min, self.sigma_max, self.rho))
        self.timesteps = Uniform(N - 1) if self.times is None else LogNormal(self.process.sigmas, *self.times)

    @torch.no_grad()
    def draw(
        self,
        x0: Tensor,
        t: Tensor | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        weight: Tensor | None = None,
        **condition: Any,
    ) -> DistillationDraw:
        """Draw n, ε, x_{n+1} and Φ̂ for a batch. The passes over the batch do not evaluate the teacher again.

        The arguments are those of :meth:`DenoisingObjective.draw`, with n in [0, N − 1), ascending in σ, for ``t``, a
        ``weight`` in addition to w_n, and a ``condition`` of student, target and teacher.
        """
        if t is None:
            t, _ = self.timesteps.draw(len(x0), generator, x0.device)  # neither distribution has weights
            t = t.to(x0.device)
        if noise is None:
            noise = gaussian(x0, generator)
        upper, lower = self.process.sigmas_at(t + 1, x0), self.process.sigmas_at(t, x0)
        x_next = (x0 + broadcast(upper, x0) * noise).to(x0.dtype)
        if self.teacher is None:
            solved = (x0 + broadcast(lower, x0) * noise).to(x0.dtype)
        else:
            teacher = self.teacher
            solved = self.solver(lambda x, sigma: teacher(x, sigma, **condition), x_next, upper, lower)
        if self.weighting == "inverse-gap":
            gap = 1 / (upper - lower)
            weight = gap if weight is None else weight * gap
        moved, at = (solved, t) if self.perturb == "solver" else (x_next, t + 1)
        return DistillationDraw(
            x0, at, noise, moved, weight, condition, x_next=x_next, solved=solved, upper=upper, lower=lower
        )

    def _function(self, network: Callable[..., Any], x: Tensor, level: Tensor, draw: DistillationDraw) -> Tensor:
        """Return f(x, σ), with shape (B, *), in at least float32.

        Raises:
            RuntimeError: If the call is recorded as a CUDA graph, and the target was not seen to be without dropout in
                a call before.
        """
        function = Preconditioned(network, self.sigma_data, self.sigma_min)
        generators = self._observed_generators if network is self.target else self._restored_generators
        with generators(draw.x0.device):
            return function(x, level, **draw.condition).to(precise(draw.x0.dtype))

    @property
    def _may_drop_out(self) -> bool:
        return getattr(self.target, "training", True)  # in eval mode nothing is dropped out

    def _restored_generators(self, device: torch.device) -> AbstractContextManager[None]:
        """Restore the generators after the block, so that the target's dropout is the student's, as in the original."""
        if not self._may_drop_out:
            return nullcontext()
        if _recorded(device):  # where the states of generators can be neither read nor set
            if self._drops_out is not False:
                raise RuntimeError("the target drops out what the student does")
            return nullcontext()
        fork = torch.random.fork_rng
        return fork([]) if device.type == "cpu" else fork([device], device_type=device.type)

    @contextmanager
    def _observed_generators(self, device: torch.device) -> Iterator[None]:
        """Compare the states of the generators before and after the block, in which the target is evaluated.

        Dropout may be a layer or a function, so that a look at the network's modules cannot tell.
        """
        if not self._may_drop_out or _recorded(device):
            yield
            return
        before = _states(device)
        yield
        drew = any(not torch.equal(*states) for states in zip(before, _states(device), strict=True))
        self._drops_out = drew or bool(self._drops_out)

    def unrecordable(self) -> str | None:
        return None if self.schedule.fixed else "the number of levels changes in the run"

    @torch.no_grad()
    def after_update(self, model: nn.Module, stepped: Tensor | None = None) -> None:
        """Update the target network, unless the optimiser skipped the step, and then the number of levels."""
        self._follow(model, self.schedule(self.updates)[1], stepped)
        self.updates += 1
        if self.schedule(self.updates)[0] != len(self.process):
            self._set_scales()

    def state(self) -> dict[str, Any]:
        """Return the number of updates made. The parameters of the target network are not included."""
        return {"updates": self.updates}

    def load_state(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]
        self._set_scales()


@OBJECTIVES.register("consistency")
class ConsistencyConfig(LevelsConfig):
    """Consistency distillation, or training without a teacher."""

    needs_target: ClassVar[bool] = True
    scheduler: ClassVar[str] = "CMStochasticIterativeScheduler"

    name: Literal["consistency"] = "consistency"
    solver: Solver = Field("heun", description="the solver of the teacher's ODE")
    perturb: Perturbed = Field("solver", description="the point that δ is added to: the solver's or the student's")
    metric: Metric = Field("pseudo-huber", description="the distance d")
    weighting: Weighting = Field("uniform", description="the weights w_n; inverse-gap: 1/(σ_{n+1} − σ_n)")
    times: Literal["uniform", "log-normal"] = Field("uniform", description="the distribution of pairs of levels")
    mean: float = Field(-1.1, description="log-normal: the mean P_mean of ln σ; null: the default")
    std: float = Field(2.0, gt=0, description="log-normal: the standard deviation P_std of ln σ; null: the default")
    schedule: Literal["fixed", "growing", "doubling"] = Field(
        "fixed", description="the schedule of the number of levels"
    )
    scales: int = Field(
        18, ge=2, le=100_000, description="fixed: the number N of levels; otherwise s_1, at most N − 1 at the end"
    )
    start_scales: int | None = Field(None, ge=2, description="growing, doubling: the initial s_0")
    decay: Fraction = Field(0.95, description="the decay μ of the target network (growing: μ_0); 0: the student itself")

    @field_validator("mean", "std", mode="before")
    @classmethod
    def _null_is_the_default(cls, value: Any, info: ValidationInfo) -> Any:
        """Return the default for null, which takes back what a recipe says."""
        return cls.model_fields[info.field_name or ""].default if value is None else value

    @model_validator(mode="after")
    def _scheduled(self) -> ConsistencyConfig:
        if (self.schedule == "fixed") != (self.start_scales is None):
            raise ValueError("start_scales goes with schedule growing or doubling: give both, or neither")
        if self.start_scales is not None and self.start_scales > self.scales:
            raise ValueError(f"start_scales {self.start_scales} is more than scales {self.scales}")
        return self

    @model_validator(mode="after")
    def _used(self) -> ConsistencyConfig:
        self._needs_teacher("solver")
        if self.times == "uniform" and (given(self, "mean") or given(self, "std")):
            raise ValueError(
                "mean and std have a meaning only with objective.times=log-normal: set it, or leave them out (or null, "
                "where a recipe has them)"
            )
        return self

    @property
    def fixed_levels(self) -> bool:
        return self.schedule == "fixed"

    def scale_schedule(self, steps: int) -> ScaleSchedule:
        """Return the schedule of the number of levels over the given number of optimiser updates."""
        if self.start_scales is None:
            return FixedScales(self.scales, self.decay)
        kind = GrowingScales if self.schedule == "growing" else DoublingScales
        return kind(self.start_scales, self.scales, self.decay, steps)

    def last_levels(self, steps: int) -> int:
        return self.scale_schedule(steps)(steps)[0]

    def build(
        self, process: DiffusionProcess, steps: int, target: nn.Module | None = None, teacher: Denoise | None = None
    ) -> ConsistencyObjective:
        assert target is not None
        try:
            return ConsistencyObjective(
                target,
                teacher,
                self.scale_schedule(steps),
                solver=self.solver,
                metric=self.metric,
                perturb=self.perturb,
                weighting=self.weighting,
                times=(self.mean, self.std) if self.times == "log-normal" else None,
                **self.arguments,
            )
        except ValueError as error:  # such as levels that have no share of the log-normal distribution
            raise InputError(str(error)) from None
