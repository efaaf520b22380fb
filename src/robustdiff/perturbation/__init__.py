r"""Perturbations of noisy points: norms, radii, and the adversaries that move δ.

Training on the worst point of a ball around each x_t is distributionally robust optimisation over the points
that a sampler may produce (Wang et al., 2025, arXiv 2502.17099, Theorem 1). The inner maximisation is projected
steepest ascent, per sample, from δ⁰ = 0:

    δ ← Π_r( δ + α · d ),        d = argmax_{‖d‖ ≤ 1} ⟨∇_δ L, d⟩,        Π_r(z) = argmin_{‖δ‖ ≤ r} ‖δ − z‖₂.

    norm    d                                 Π_r
    l2      g/‖g‖₂                            z · min(1, r/‖z‖₂)
    linf    sign(g)                           clamp(z, −r, r)
    l1      sign(g_i) e_i, i = argmax |g_i|   soft threshold at the level that makes ‖·‖₁ = r (Duchi et al., 2008)

An adversary is called on a batch of noisy points and yields perturbations; the caller trains on each::

    for delta in adversary(x_t):
        loss = ...                      # of the model at x_t + delta
        loss.backward()                 # fills the parameters' gradients and delta.grad
        optimizer.step()
        optimizer.zero_grad()

When the body is left, the adversary reads ``delta.grad`` and ascends. :class:`FreeAdversary` thus needs no
backward pass of its own (Shafahi et al., 2019; Wang et al., 2025, Algorithm 1).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from robustdiff.process import DiffusionProcess, Table, broadcast

__all__ = [
    "L1",
    "L2",
    "NORMS",
    "Adversary",
    "Constant",
    "FreeAdversary",
    "Linf",
    "NoAdversary",
    "NoiseLevel",
    "Norm",
    "PGDAdversary",
    "PerDimension",
    "RadiusSchedule",
    "Ramp",
    "RandomAdversary",
    "SamplerDistance",
    "Within",
]

LossOfDelta = Callable[[Tensor], Tensor]


# -- norms ---------------------------------------------------------------------------------------------------


class Norm(ABC):
    """A norm on samples: its size, its direction of steepest ascent, and the projection on its ball."""

    name: str
    order: float
    """p of ℓp."""

    def __call__(self, delta: Tensor) -> Tensor:
        """‖δ‖ per sample: (B, *) → (B,)."""
        return torch.linalg.vector_norm(delta.flatten(1), ord=self.order, dim=1)

    def of_ones(self, d: int) -> float:
        """‖(1, …, 1)‖ in d dimensions: d^(1/p). A radius η per dimension is η·‖(1, …, 1)‖ in every norm."""
        return d ** (1 / self.order)

    @abstractmethod
    def ascent(self, grad: Tensor) -> Tensor:
        """The d of norm 1 that maximises ⟨grad, d⟩, per sample: (B, *) → (B, *). Each gradient must be nonzero."""

    @abstractmethod
    def project(self, delta: Tensor, radius: Tensor) -> Tensor:
        """The nearest point (in ℓ2) of the ball of the given radius, per sample: (B, *), (B,) → (B, *)."""


class L2(Norm):
    """The Euclidean norm; the paper's choice."""

    name, order = "l2", 2.0

    def ascent(self, grad: Tensor) -> Tensor:
        # Scaled to a largest entry of 1 first: the squares of a tiny gradient would underflow.
        grad = grad / broadcast(grad.flatten(1).abs().amax(1), grad)
        return grad / broadcast(self(grad), grad)

    def project(self, delta: Tensor, radius: Tensor) -> Tensor:
        size = self(delta)
        # Inside the ball the factor is exactly 1, so that δ keeps its bits.
        factor = torch.where(size > radius, radius / size.clamp_min(torch.finfo(size.dtype).tiny), 1.0)
        return delta * broadcast(factor, delta)


class Linf(Norm):
    """The maximum norm."""

    name, order = "linf", math.inf

    def ascent(self, grad: Tensor) -> Tensor:
        return grad.sign()

    def project(self, delta: Tensor, radius: Tensor) -> Tensor:
        bound = broadcast(radius, delta)
        return torch.minimum(torch.maximum(delta, -bound), bound)


class L1(Norm):
    """The sum of absolute values: its steepest ascent moves one coordinate."""

    name, order = "l1", 1.0

    def ascent(self, grad: Tensor) -> Tensor:
        flat = grad.flatten(1)
        index = flat.abs().argmax(1, keepdim=True)
        return torch.zeros_like(flat).scatter(1, index, flat.gather(1, index).sign()).reshape(grad.shape)

    def project(self, delta: Tensor, radius: Tensor) -> Tensor:
        flat = delta.flatten(1)
        size = flat.abs()
        # Duchi et al. (2008), figure 1: with u sorted downwards, the threshold is (Σ_{j ≤ k} u_j − r)/k for the
        # largest k at which it is still below u_k.
        ordered = size.sort(dim=1, descending=True).values
        k = torch.arange(1, flat.shape[1] + 1, device=flat.device, dtype=flat.dtype)
        thresholds = (ordered.cumsum(1) - radius[:, None]) / k
        count = (ordered > thresholds).sum(1, keepdim=True).clamp_min(1)
        threshold = thresholds.gather(1, count - 1)
        projected = flat.sign() * (size - threshold).clamp_min(0)
        inside = size.sum(1, keepdim=True) <= radius[:, None]
        return torch.where(inside, flat, projected).reshape(delta.shape)


NORMS: dict[str, Norm] = {norm.name: norm for norm in (L2(), Linf(), L1())}


# -- radii ---------------------------------------------------------------------------------------------------


class RadiusSchedule(ABC):
    """The radius r of the ball, per sample; it may depend on the timestep and on how far training has come."""

    @abstractmethod
    def __call__(self, x_t: Tensor, t: Tensor | None, training_step: int | None, norm: Norm) -> Tensor:
        """The radius for each of the noisy points (B, *), with shape (B,).

        Raises:
            ValueError: If the schedule needs ``t`` or ``training_step`` and it is not given.
        """


@dataclass(frozen=True)
class Constant(RadiusSchedule):
    """The same radius everywhere. Arguments: radius: ≥ 0, in units of the norm."""

    radius: float

    def __post_init__(self) -> None:
        if not self.radius >= 0:
            raise ValueError(f"radius must be at least 0; got {self.radius}")

    def __call__(self, x_t: Tensor, t: Tensor | None, training_step: int | None, norm: Norm) -> Tensor:
        return x_t.new_full((len(x_t),), self.radius)


@dataclass(frozen=True)
class PerDimension(RadiusSchedule):
    """η·‖(1, …, 1)‖: in ℓ2 the paper's η√d, in ℓ∞ η, in ℓ1 ηd, with d the elements of one sample.

    Arguments:
        eta: η ≥ 0, in units of x_t (0.1 in the reference implementation).
    """

    eta: float

    def __post_init__(self) -> None:
        if not self.eta >= 0:
            raise ValueError(f"eta must be at least 0; got {self.eta}")

    def __call__(self, x_t: Tensor, t: Tensor | None, training_step: int | None, norm: Norm) -> Tensor:
        return x_t.new_full((len(x_t),), self.eta * norm.of_ones(x_t[0].numel()))


@dataclass(frozen=True)
class NoiseLevel(RadiusSchedule):
    """η·σ_t·‖(1, …, 1)‖: the noise ε + δ/σ_t moves by at most η‖(1, …, 1)‖, at every timestep alike.

    In ℓ2 that is η per dimension in root mean square, in ℓ∞ the most that any moves.

    Where the radius does not shrink with σ_t, the least noisy points are moved by many times their noise.

    Arguments:
        process: The process.
        eta: η ≥ 0, in units of the noise.
    """

    process: DiffusionProcess
    eta: float

    def __post_init__(self) -> None:
        if not self.eta >= 0:
            raise ValueError(f"eta must be at least 0; got {self.eta}")

    def __call__(self, x_t: Tensor, t: Tensor | None, training_step: int | None, norm: Norm) -> Tensor:
        if t is None:
            raise ValueError("a radius by timestep needs t: call adversary(x_t, t)")
        sigma = self.process.levels(t, x_t)[1].flatten()
        return self.eta * norm.of_ones(x_t[0].numel()) * sigma


@dataclass(frozen=True)
class SamplerDistance(RadiusSchedule):
    r"""The distance that a sampler itself covers in one step at t, at most η, per dimension:

        r_t = min( √(2 − 2√(ᾱ_t/ᾱ_s)), η ) · ‖(1, …, 1)‖,

    with s the time one step before t in a schedule of ``steps`` steps (ᾱ_s = 1 past the end). For data of unit
    variance E‖x_t − x_s‖² = (2 − 2√(ᾱ_t/ᾱ_s))·d.

    Arguments:
        process: The (variance-preserving) process.
        eta: The largest radius per dimension.
        steps: The number of steps of the schedule.
    """

    process: DiffusionProcess
    eta: float
    steps: int = 50

    def distances(self) -> Tensor:
        """√(2 − 2√(ᾱ_t/ᾱ_s)) for every t, with shape (T,), float64, before the cap."""
        a = self.process.alphas_cumprod
        stride = len(a) // self.steps
        before = torch.cat([a.new_ones(stride), a[: len(a) - stride]])
        return (2 - 2 * (a / before).sqrt()).clamp_min(0).sqrt()

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= len(self.process):
            raise ValueError(f"steps must be between 1 and {len(self.process)}; got {self.steps}")
        if not self.eta >= 0:
            raise ValueError(f"eta must be at least 0; got {self.eta}")

    @cached_property
    def _radii(self) -> Table:
        return Table(self.distances().clamp_max(self.eta))

    def __call__(self, x_t: Tensor, t: Tensor | None, training_step: int | None, norm: Norm) -> Tensor:
        if t is None:
            raise ValueError("a radius by timestep needs t: call adversary(x_t, t)")
        return self._radii.at(self.process.index(t), x_t).flatten() * norm.of_ones(x_t[0].numel())


@dataclass(frozen=True)
class Within(RadiusSchedule):
    """Another radius at the times whose noise σ_t is between two levels, and 0 at all others.

    Where the radius is 0 all K passes train at the noisy point itself.

    Arguments:
        radius: The radius between the levels.
        process: The process.
        low: The lowest σ_t that is perturbed, ≥ 0.
        high: The highest, ≥ low.
    """

    radius: RadiusSchedule
    process: DiffusionProcess
    low: float
    high: float

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high:
            raise ValueError(f"the noise levels must be 0 ≤ low ≤ high; got {self.low} and {self.high}")

    def __call__(self, x_t: Tensor, t: Tensor | None, training_step: int | None, norm: Norm) -> Tensor:
        if t is None:
            raise ValueError("a radius by timestep needs t: call adversary(x_t, t)")
        sigmas = self.process.sigmas_at(t, x_t)
        return self.radius(x_t, t, training_step, norm) * ((sigmas >= self.low) & (sigmas <= self.high))


@dataclass(frozen=True)
class Ramp(RadiusSchedule):
    """Another radius, times min(1, (training_step + 1)/steps): a warm-up from almost nothing.

    Arguments:
        radius: The radius at the end.
        steps: The optimiser updates that the warm-up takes, ≥ 1.
    """

    radius: RadiusSchedule
    steps: int

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1; got {self.steps}")

    def __call__(self, x_t: Tensor, t: Tensor | None, training_step: int | None, norm: Norm) -> Tensor:
        if training_step is None:
            raise ValueError("a ramped radius needs the training step: call adversary(x_t, t, training_step=step)")
        return self.radius(x_t, t, training_step, norm) * min(1.0, (training_step + 1) / self.steps)


# -- adversaries ---------------------------------------------------------------------------------------------


class Adversary(ABC):
    """What moves δ.

    Arguments:
        steps: The number K of steps, ≥ 1.
        step_size: The length α > 0 of one step, in units of the norm.
        radius: None for no projection, a number in units of the norm, or a :class:`RadiusSchedule`.
        norm: The norm, by name: "l2", "linf" or "l1".
        grad_floor: A gradient whose ℓ2 norm is below it makes a step that is shorter in proportion, α·‖∇‖₂/grad_floor.
            0 for full steps always. (The authors' code in float32 has 2²⁰·10⁻⁸ for the gradient of the mean loss: it
            undoes a loss scale that was not applied before it bounds the norm below by 10⁻⁸. In fp16 it has none to
            speak of.)

    A sample whose gradient is zero or not finite (as when fp16 overflows) keeps its δ, and is counted in ``skipped``.

    Raises:
        ValueError: If an argument is out of its range or the norm is unknown.
    """

    def __init__(
        self,
        steps: int = 3,
        step_size: float = 0.1,
        radius: float | RadiusSchedule | None = None,
        norm: str = "l2",
        grad_floor: float = 0.0,
    ) -> None:
        if steps < 1:
            raise ValueError(f"steps must be at least 1; got {steps}")
        if not (step_size > 0 and math.isfinite(step_size)):
            raise ValueError(f"step_size must be positive and finite; got {step_size}")
        if norm not in NORMS:
            raise ValueError(f"unknown norm {norm!r}: use one of {', '.join(NORMS)}")
        if isinstance(radius, int | float):
            radius = Constant(float(radius))
        if not (grad_floor >= 0 and math.isfinite(grad_floor)):
            raise ValueError(f"grad_floor must be at least 0 and finite; got {grad_floor}")
        self.grad_floor = grad_floor
        self.steps = steps
        self.step_size = step_size
        self.radius = radius
        self.norm = NORMS[norm]
        self._skipped: int | Tensor = 0

    @property
    def skipped(self) -> int:
        """How many single ascents were left out so far: the gradient of that sample was zero or not finite."""
        return int(self._skipped)

    @skipped.setter
    def skipped(self, count: int) -> None:
        self._skipped = count

    @property
    def passes(self) -> int:
        """How many perturbations are yielded for one batch: the optimiser updates that it is trained on."""
        return self.steps

    @abstractmethod
    def __call__(
        self,
        x_t: Tensor,
        t: Tensor | None = None,
        *,
        loss: LossOfDelta | None = None,
        training_step: int | None = None,
    ) -> Iterator[Tensor]:
        """Yield the perturbations of a batch, in order, each like ``x_t``.

        Arguments:
            x_t: The noisy points, with shape (B, *).
            t: Their time indices, with shape (B,); for a radius by timestep.
            loss: δ ↦ the losses (B,), or their sum or mean, at x_t + δ; for adversaries that ascend on their own.
            training_step: The optimiser updates made so far; for a ramped radius.
        """

    def _project(self, delta: Tensor, x_t: Tensor, t: Tensor | None, training_step: int | None) -> Tensor:
        if self.radius is None:
            return delta
        return self.norm.project(delta, self.radius(x_t, t, training_step, self.norm))

    @torch.no_grad()
    def _ascend(self, delta: Tensor, grad: Tensor, x_t: Tensor, t: Tensor | None, training_step: int | None) -> Tensor:
        """Π_r(δ + α d); a sample whose gradient is zero or not finite keeps its δ and is counted."""
        flat = grad.flatten(1)
        usable = flat.isfinite().all(1) & (flat != 0).any(1)
        # A harmless stand-in where the gradient is unusable: the result there is thrown away.
        safe = torch.where(broadcast(usable, grad), grad, torch.ones_like(grad))
        step = self.step_size * self.norm.ascent(safe)
        if self.grad_floor > 0:
            step = step * broadcast((safe.flatten(1).norm(dim=1) / self.grad_floor).clamp_max(1), step)
        moved = self._project(delta + step, x_t, t, training_step)
        self._skipped = self._skipped + (~usable).sum()  # stays on the device: reading it here would stall a GPU
        return torch.where(broadcast(usable, delta), moved, delta)


class NoAdversary(Adversary):
    """Ordinary training: one pass at δ = 0."""

    def __init__(self) -> None:
        super().__init__(steps=1)

    def __call__(
        self,
        x_t: Tensor,
        t: Tensor | None = None,
        *,
        loss: LossOfDelta | None = None,
        training_step: int | None = None,
    ) -> Iterator[Tensor]:
        yield torch.zeros_like(x_t)


class FreeAdversary(Adversary):
    """Free adversarial training: K passes over one batch, each of which trains and ascends with one backward.

    Yields δ⁰ = 0, δ¹, …, δ^{K−1}. The caller calls backward and steps the optimiser in every pass; the gradient
    that the same backward left in ``delta.grad`` moves δ for the next one (Wang et al., 2025, Algorithm 1).

    Raises:
        RuntimeError: If ``delta.grad`` is missing when the body is left and another pass follows: the loss was not
            computed at x_t + delta, or backward was not called.
    """

    def __call__(
        self,
        x_t: Tensor,
        t: Tensor | None = None,
        *,
        loss: LossOfDelta | None = None,
        training_step: int | None = None,
    ) -> Iterator[Tensor]:
        delta = torch.zeros_like(x_t)
        for k in range(self.steps):
            delta = delta.detach().requires_grad_()
            yield delta
            if k + 1 < self.steps:
                if delta.grad is None:
                    raise RuntimeError(
                        "delta has no gradient: compute the loss at x_t + delta and call backward in the loop's body"
                    )
                delta = self._ascend(delta, delta.grad, x_t, t, training_step)


class PGDAdversary(Adversary):
    """Projected gradient ascent, then one update: K forwards and backwards that compute no parameter gradients.

    Yields δ^K once. It ascends on its own, so it must be given ``loss``.

    Raises:
        ValueError: If ``loss`` is not given.
    """

    @property
    def passes(self) -> int:
        return 1

    def __call__(
        self,
        x_t: Tensor,
        t: Tensor | None = None,
        *,
        loss: LossOfDelta | None = None,
        training_step: int | None = None,
    ) -> Iterator[Tensor]:
        if loss is None:
            raise ValueError("PGDAdversary needs the loss as a function of delta: adversary(x_t, t, loss=…)")
        delta = torch.zeros_like(x_t)
        for _ in range(self.steps):
            delta = delta.detach().requires_grad_()
            with torch.enable_grad():
                (grad,) = torch.autograd.grad(loss(delta).sum(), delta)
            delta = self._ascend(delta, grad, x_t, t, training_step)
        yield delta


class RandomAdversary(Adversary):
    """The control: δ of free AT's size in a direction that knows nothing of the loss.

    One direction u per sample is drawn uniformly from the unit sphere of the norm (for ℓ2; for ℓ∞ a random sign
    vector, for ℓ1 a random signed coordinate: what steepest ascent on a random gradient gives), and the K passes
    yield Π_r(k·α·u), k = 0 … K−1: the sizes of :class:`FreeAdversary` when its gradient does not turn.

    Arguments:
        generator: Where the directions come from, on the device of x_t; torch's global generator by default.
    """

    def __init__(
        self,
        steps: int = 3,
        step_size: float = 0.1,
        radius: float | RadiusSchedule | None = None,
        norm: str = "l2",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(steps, step_size, radius, norm)
        self.generator = generator

    def __call__(
        self,
        x_t: Tensor,
        t: Tensor | None = None,
        *,
        loss: LossOfDelta | None = None,
        training_step: int | None = None,
    ) -> Iterator[Tensor]:
        gaussian = torch.randn(x_t.shape, generator=self.generator, device=x_t.device, dtype=x_t.dtype)
        direction = self.norm.ascent(gaussian)
        for k in range(self.steps):
            yield self._project(k * self.step_size * direction, x_t, t, training_step)
