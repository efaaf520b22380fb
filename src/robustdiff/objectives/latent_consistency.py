r"""Latent consistency distillation (Luo et al., 2023, arXiv 2310.04378), at a perturbed point.

The teacher is a diffusion model with guidance, over a variance-preserving process of T discrete times. A latent
consistency function maps every point of a trajectory of its guided ODE to the end of the trajectory:

    f(x, t, w) = c_skip(t) x + c_out(t) x̂_0(x, t, w),

    c_skip = σ_d²/((s t)² + σ_d²),   c_out = s t/√((s t)² + σ_d²),   s = 10,  σ_d = 0.5,

so that f is the identity at t = 0. The solver has N times, with gaps of k = ⌊T/N⌋. A draw fixes the following once for
a batch:

    i < N,        t_{n+k} = (i + 1) k − 1,        t_n = max(t_{n+k} − k, 0),        w uniform in [w_min, w_max],

    x_{n+k} = √ᾱ x_0 + √(1 − ᾱ) ε  at t_{n+k},

    F = F(x_{n+k}, c) + w (F(x_{n+k}, c) − F(x_{n+k}, ∅)),      the teacher's output with guidance,

    Φ̂ = √ᾱ x̂_0 + √(1 − ᾱ) ε̂  at t_n,  the DDIM step, with x̂_0 and ε̂ from F.

x̂_0 and ε̂ are affine in F, and so guidance of F is guidance of both. w = g − 1 for the guidance scale g of diffusers and
of :mod:`robustdiff.samplers.guidance`. The student receives w as an embedding (:func:`embed_guidance`), or learns the
mean over w without one, as LCM-LoRA does (Luo et al., 2023, arXiv 2311.05556).

Every pass over the batch evaluates the loss at another δ, with θ⁻ the parameters of the target network:

    perturb = "solver"      L(δ) = d( f_θ(x_{n+k}, t_{n+k}), f_θ⁻(Φ̂ + δ, t_n) ),
    perturb = "student"     L(δ) = d( f_θ(x_{n+k} + δ, t_{n+k}), f_θ⁻(Φ̂, t_n) ),

where d is the mean over elements of (a − b)² or of √((a − b)² + c²) − c. The error of the solver is the mismatch
between training and sampling (Wang et al., 2025, arXiv 2502.17099): "solver" trains on the worst point near Φ̂. One
backward pass computes the gradient of δ, through the target network as a constant function, and that of θ, through the
student. Both ascents are of the whole loss: δ moves all of f, c_skip x included. Φ̂ depends neither on δ nor on θ, so
that the teacher is evaluated once for all passes.

After every optimiser update θ⁻ ← μ θ⁻ + (1 − μ) θ. The target may also be the student itself, θ⁻ = θ, whose parameters
receive no gradient through the target.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, get_args

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from robustdiff.errors import InputError
from robustdiff.objectives.consistency import DISTANCES
from robustdiff.objectives.distillation import Distillation, DistillationDraw, Perturbed, check_names
from robustdiff.objectives.objective import OBJECTIVES, ObjectiveConfig, gaussian, precise, predict
from robustdiff.objectives.timesteps import Uniform, double
from robustdiff.process import PREDICTIONS, DiffusionProcess, Prediction, ProcessConfig, Table, broadcast
from robustdiff.section import Fraction, Text, Times, given

__all__ = [
    "LatentConsistencyConfig",
    "LatentConsistencyDraw",
    "LatentConsistencyObjective",
    "LatentMetric",
    "boundary_scalings",
    "embed_guidance",
    "solver_times",
]

LatentMetric = Literal["huber", "l2"]


def solver_times(solver_steps: int, T: int) -> Tensor:
    """Return the N times (i + 1)⌊T/N⌋ − 1 of the solver, ascending, with shape (N,), int64.

    Raises:
        ValueError: If N is not in [1, T].
    """
    if not 1 <= solver_steps <= T:
        raise ValueError(f"solver_steps must be between 1 and the {T} times of the process; got {solver_steps}")
    return torch.arange(1, solver_steps + 1) * (T // solver_steps) - 1


def boundary_scalings(t: Tensor, sigma_data: float = 0.5, timestep_scaling: float = 10.0) -> tuple[Tensor, Tensor]:
    """Return c_skip and c_out at floating-point times (B,), in their precision, each with shape (B,)."""
    scaled = timestep_scaling * t
    total = scaled.square() + sigma_data**2
    return sigma_data**2 / total, scaled / total.sqrt()


def embed_guidance(w: Tensor, width: int) -> Tensor:
    """Return the embedding of guidance strengths, [sin(1000 w f_j), cos(1000 w f_j)] with f_j = 10000^{−j/(h − 1)}.

    j runs from 0 to h − 1, with h = ⌊width/2⌋; an odd width ends with a zero. It is diffusers'
    ``get_guidance_scale_embedding``. The arguments reach 15 000 radians for w = 15, where float32 has errors of 10⁻³,
    and are computed in float64.

    Args:
        w: The strengths w = g − 1, with shape (B,).
        width: The width of the embedding, at least 4: the ``time_cond_proj_dim`` of the network.

    Returns:
        The embedding, with shape (B, width), in at least float32.
    """
    exact, half = double(w.device), width // 2
    frequencies = torch.exp(torch.arange(half, dtype=exact, device=w.device) * (-math.log(10000) / (half - 1)))
    angles = 1000 * w.to(exact)[:, None] * frequencies
    embedding = torch.cat([angles.sin(), angles.cos()], dim=1).to(precise(w.dtype))
    return nn.functional.pad(embedding, (0, width % 2))


def _huber(a: Tensor, b: Tensor, c: float) -> Tensor:
    square = (a - b).square()
    # √(s + c²) − c, without cancellation for small s.
    return (square / ((square + c**2).sqrt() + c)).flatten(1).mean(1)


def _rows(empty: Any, like: Any) -> Any:
    """Return an empty condition with as many rows as the condition that it replaces."""
    if isinstance(like, Mapping):
        if unknown := [name for name in empty if name not in like]:
            raise ValueError(f"unconditional has {unknown[0]}, which the condition does not have")
        return {name: _rows(empty[name], value) if name in empty else value for name, value in like.items()}
    if not isinstance(like, Tensor):
        return empty
    return empty.to(like).expand_as(like) if isinstance(empty, Tensor) else torch.full_like(like, empty)


@dataclass(kw_only=True)
class LatentConsistencyDraw(DistillationDraw):
    """A training batch, of which ``t``, ``upper`` and ``lower`` hold times as indices of the process.

    Attributes:
        w: The guidance strengths w, with shape (B,).
        w_embedding: Their embedding, with shape (B, width), which student and target are called with as
            ``timestep_cond``; None for networks without one. It may be replaced.
    """

    w: Tensor
    w_embedding: Tensor | None


class LatentConsistencyObjective(Distillation):
    """The latent consistency loss, as a callable.

    Student, target and teacher are networks, called as diffusers calls a ``UNet2DConditionModel``.

    Args:
        target: The target network, a copy of the student, or the student itself. In either case its parameters receive
            no gradient from the loss through the target, and the objective does not change their ``requires_grad``.
        teacher: The teacher. For LoRA it may be the student's network with its adapter switched off.
        process: The process of the teacher. It must preserve variance, and its times must begin with 0.
        solver_steps: The number N of the solver's times, in [1, T].
        guidance: The range [w_min, w_max] of the guidance strength w = g − 1, 0 ≤ w_min ≤ w_max.
        prediction: The parameterisation of all three networks: "epsilon", "sample" or "v_prediction".
        metric: The distance d: "huber" or "l2".
        huber_c: The constant c > 0 of "huber".
        perturb: The point that δ is added to: "solver" (Φ̂) or "student" (x_{n+k}).
        sigma_data: The constant σ_d > 0 of the boundary scalings.
        timestep_scaling: The factor s > 0 of the time in the boundary scalings.
        guidance_embedding: The width of the embedding of w, at least 4, which student and target are called with as
            ``timestep_cond``; None for networks without one.
        decay: The decay μ in [0, 1) of the target network in :meth:`after_update`. Without effect if the target is the
            student.

    Raises:
        ValueError: If a name is unknown, a number is out of range, or the process does not suit.
    """

    recordable = True

    def __init__(
        self,
        target: Callable[..., Any],
        teacher: Callable[..., Any],
        process: DiffusionProcess,
        solver_steps: int = 50,
        guidance: tuple[float, float] = (3.0, 15.0),
        prediction: Prediction = "epsilon",
        metric: LatentMetric = "huber",
        huber_c: float = 0.001,
        perturb: Perturbed = "solver",
        sigma_data: float = 0.5,
        timestep_scaling: float = 10.0,
        guidance_embedding: int | None = None,
        decay: float = 0.95,
    ) -> None:
        predictions = tuple(name for name in PREDICTIONS if name != "flow")
        check_names(
            prediction=(prediction, predictions),
            metric=(metric, get_args(LatentMetric)),
            perturb=(perturb, get_args(Perturbed)),
        )
        for name, number in (("huber_c", huber_c), ("sigma_data", sigma_data), ("timestep_scaling", timestep_scaling)):
            if not (number > 0 and math.isfinite(number)):
                raise ValueError(f"{name} must be positive and finite; got {number}")
        low, high = guidance
        if not 0 <= low <= high < math.inf:
            raise ValueError(f"guidance must be a range 0 ≤ w_min ≤ w_max; got {guidance}")
        if guidance_embedding is not None and guidance_embedding < 4:
            raise ValueError(f"guidance_embedding must be at least 4, or None; got {guidance_embedding}")
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1); got {decay}")
        if not (process.variance_preserving and process.times[0] == 0):
            raise ValueError(
                "latent consistency needs a process with α² + σ² = 1 and times from 0 on, where f is the identity: "
                "take that of a scheduler with alphas_cumprod, such as DDPMScheduler"
            )
        super().__init__(target, perturb, DISTANCES["l2"]() if metric == "l2" else partial(_huber, c=huber_c))
        self.process = process
        upper = solver_times(solver_steps, len(process))
        if prediction == "epsilon" and not process.alphas[upper[-1]] > 0:
            raise ValueError(
                "the process ends without any signal (zero terminal SNR), where x̂_0 does not follow from the noise: "
                "take networks that predict v or x_0"
            )
        self.solver_steps, self.timesteps = solver_steps, Uniform(solver_steps)
        self._upper, self._lower = Table(upper), Table((upper - len(process) // solver_steps).clamp_min(0))
        self.teacher = teacher
        self.guidance = (low, high)
        self.prediction: Prediction = prediction
        self.sigma_data, self.timestep_scaling = sigma_data, timestep_scaling
        self.guidance_embedding = guidance_embedding
        self.decay = decay

    @torch.no_grad()
    def draw(
        self,
        x0: Tensor,
        t: Tensor | None = None,
        noise: Tensor | None = None,
        w: Tensor | None = None,
        generator: torch.Generator | None = None,
        weight: Tensor | None = None,
        unconditional: Mapping[str, Any] | Tensor | None = None,
        **condition: Any,
    ) -> LatentConsistencyDraw:
        """Draw i, ε, w, x_{n+k} and Φ̂ for a batch. The passes over the batch do not evaluate the teacher again.

        The teacher is called twice, with the condition and with the empty one, which needs half the memory of one call
        with both.

        Args:
            x0: Clean latents, with shape (B, *).
            t: The indices i in [0, N) of the solver's times, with shape (B,). Default: uniform.
            noise: The noise ε, with shape (B, *). Default: standard normal.
            w: The guidance strengths w, with shape (B,). Default: uniform in the range ``guidance``.
            generator: The source of randomness for arguments that are not given. Default: PyTorch's global generator.
            weight: The weights of the losses, with shape (B,); None for weights of 1.
            unconditional: The empty condition ∅, under names of the condition, or the empty ``encoder_hidden_states``
                alone. Each value is a tensor with one or B rows, or a number. Arguments that it does not name, such as
                the size of the images, are those of the condition. It may be left out only for a range ``guidance`` of
                (0, 0), without guidance.
            condition: Further keyword arguments of the networks, such as ``encoder_hidden_states``.

        Raises:
            ValueError: If an index is out of range, a shape is wrong, or the empty condition is missing.
        """
        if t is None:
            t, _ = self.timesteps.draw(len(x0), generator, x0.device)
        t = t.to(x0.device)
        N = self.solver_steps
        if t.is_floating_point() or t.shape != x0.shape[:1]:
            raise ValueError(f"t must be whole numbers with shape ({len(x0)},); got {t.dtype}, {tuple(t.shape)}")
        if t.device.type == "cpu" and not bool(((t >= 0) & (t < N)).all()):
            raise ValueError(f"t must be in [0, {N}); got {int(t.min())} to {int(t.max())}")
        if noise is None:
            noise = gaussian(x0, generator)
        if isinstance(unconditional, Tensor):
            unconditional = {"encoder_hidden_states": unconditional}
        if not unconditional and (w is not None or self.guidance != (0, 0)):
            raise ValueError("guidance needs unconditional, the empty condition: give it, or guidance=(0, 0)")
        if w is None:
            w = self._strengths(len(x0), generator, x0.device)
        w = w.to(x0.device)
        if w.shape != x0.shape[:1]:
            raise ValueError(f"w must have shape ({len(x0)},); got {tuple(w.shape)}")
        upper, lower = self._upper.take(t, torch.int64), self._lower.take(t, torch.int64)
        x_next = self.process.diffuse(x0, upper, noise)
        solved = self._solve(x_next, upper, lower, w, condition, unconditional)
        embedding = None
        if self.guidance_embedding is not None:
            embedding = embed_guidance(w, self.guidance_embedding).to(x0.dtype)
        moved, at = (solved, lower) if self.perturb == "solver" else (x_next, upper)
        return LatentConsistencyDraw(
            x0,
            at,
            noise,
            moved,
            weight,
            condition,
            x_next=x_next,
            solved=solved,
            upper=upper,
            lower=lower,
            w=w,
            w_embedding=embedding,
        )

    def _strengths(self, n: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        low, high = self.guidance
        device = device if generator is None else generator.device
        return low + (high - low) * torch.rand(n, generator=generator, device=device)

    def more_noise(self, shape: tuple[int, ...], generator: torch.Generator) -> dict[str, Tensor]:
        """Draw the guidance strengths ``w`` for :meth:`draw`."""
        return {} if self.guidance == (0, 0) else {"w": self._strengths(shape[0], generator, generator.device)}

    def _solve(
        self,
        x: Tensor,
        upper: Tensor,
        lower: Tensor,
        w: Tensor,
        condition: dict[str, Any],
        unconditional: Mapping[str, Any] | None,
    ) -> Tensor:
        """Return the teacher's guided DDIM step from ``upper`` to ``lower``."""
        precision, time = precise(x.dtype), self.process.times_at(upper, x)

        def output(given: dict[str, Any]) -> Tensor:
            return predict(self.teacher, x, time, given)[:, : x.shape[1]].to(precision)

        guided = output(condition)
        if unconditional:
            guided = guided + broadcast(w.to(precision), guided) * (guided - output(_rows(unconditional, condition)))
        x0, noise = self.process.split(self.prediction, x.to(precision), upper, guided)
        return self.process.diffuse(x0, lower, noise).to(x.dtype)

    def _function(self, network: Callable[..., Any], x: Tensor, t: Tensor, draw: LatentConsistencyDraw) -> Tensor:
        """Return f(x, t), with shape (B, *), in at least float32."""
        precision, time = precise(x.dtype), self.process.times_at(t, x)
        condition = draw.condition
        if draw.w_embedding is not None:
            condition = {**condition, "timestep_cond": draw.w_embedding}
        output = predict(network, x, time, condition)[:, : x.shape[1]].to(precision)
        x = x.to(precision)
        x0, _ = self.process.split(self.prediction, x, t, output)
        skip, out = boundary_scalings(time.to(precision), self.sigma_data, self.timestep_scaling)
        return broadcast(skip, x) * x + broadcast(out, x) * x0

    @torch.no_grad()
    def after_update(self, model: nn.Module, stepped: Tensor | None = None) -> None:
        """Update the target network, unless the optimiser skipped the step, or the target is the student itself."""
        self._follow(model, self.decay, stepped)


_WIDTH = 256  # of the embedding of w in diffusers' scripts


@OBJECTIVES.register("latent-consistency")
class LatentConsistencyConfig(ObjectiveConfig):
    """Latent consistency distillation.

    The student is the pretrained network of the recipe, which gets an embedding of w, with a copy of itself as the
    target. With ``model.lora`` it is an adapter of that network, without an embedding, and its own target.
    """

    needs_target: ClassVar[bool] = True

    name: Literal["latent-consistency"] = "latent-consistency"
    teacher: Text | None = Field(
        None, description="the diffusion model to distil: a run or a pipeline folder; by default that of model.path"
    )
    prediction: Prediction = "epsilon"  # type: ignore[misc]
    solver_steps: Times = Field(50, description="number N of the times of the solver")
    guidance: tuple[float, float] = Field((3.0, 15.0), description="the range of w, the scale of guidance minus 1")
    metric: LatentMetric = Field("huber", description="the distance d")
    huber_c: float = Field(0.001, gt=0, description="huber: the constant c")
    perturb: Perturbed = Field("solver", description="the point that δ is added to: the solver's or the student's")
    timestep_scaling: float = Field(10.0, gt=0, description="the factor s of the time in c_skip and c_out")
    guidance_embedding: int | None = Field(
        None,
        ge=4,
        le=2**14,
        description="width of the embedding of w; by default the network's own, or else 256; none with model.lora",
    )
    decay: Fraction = Field(0.95, description="the decay μ of the target network; without model.lora only")

    @field_validator("guidance")
    @classmethod
    def _range(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= value[0] <= value[1]:
            raise ValueError(f"must be a range 0 ≤ w_min ≤ w_max; got {list(value)}")
        return value

    @model_validator(mode="after")
    def _used(self) -> LatentConsistencyConfig:
        if self.metric != "huber" and given(self, "huber_c"):
            raise ValueError("huber_c has a meaning only with objective.metric=huber: set it, or leave huber_c out")
        return self

    @property
    def teacher_path(self) -> str | None:
        return self.teacher

    @property
    def needs_teacher(self) -> bool:
        return True

    @property
    def needs_unconditional(self) -> bool:
        return self.guidance != (0, 0)

    def adopt(self, own: ObjectiveConfig) -> ObjectiveConfig:
        if own.over_levels or own.prediction == "flow":
            raise InputError(
                "objective=latent-consistency distils a diffusion model over discrete times, not flow matching or a "
                "model over noise levels: take another model.path"
            )
        if own.learned_variance:
            raise InputError(
                "objective=latent-consistency has no use for a learned variance, which the model of model.path has: "
                "take another model.path"
            )
        if "prediction" in self.model_fields_set and self.prediction != own.prediction:
            raise InputError(
                f"objective.prediction={self.prediction} is not the teacher's, {own.prediction}: leave it out"
            )
        return self.model_copy(update={"prediction": own.prediction})

    def student_of(self, backbone: Any, adapted: bool) -> tuple[ObjectiveConfig, Any]:
        own = backbone.guidance_embedding
        scales = self.guidance[0] + 1, self.guidance[1] + 1
        if adapted:
            for name in ("guidance_embedding", "decay"):
                if given(self, name):
                    raise InputError(
                        f"objective.{name} is for the training of all weights, and model.lora trains an adapter, which "
                        "is its own target: leave one of the two out"
                    )
            if own is not None:
                backbone = backbone.with_guidance_embedding(own, scales)
            return self.model_copy(update={"guidance_embedding": own}), backbone
        width = self.guidance_embedding or own or _WIDTH
        return self.model_copy(update={"guidance_embedding": width}), backbone.with_guidance_embedding(width, scales)

    def copies_student(self, adapted: bool) -> bool:
        return not adapted

    def teacher_of(self, model: Any, network: Callable[..., Any], process: DiffusionProcess) -> Callable[..., Any]:
        if model.kind.name != "diffusion" or model.prediction != self.prediction:
            raise InputError(
                f"the teacher {model.path} must be a diffusion model with the student's parameterisation, "
                f"{self.prediction}: set objective.teacher to one"
            )
        own = model.process.alphas
        if own.shape != process.alphas.shape or not torch.allclose(own, process.alphas, atol=1e-5):
            raise InputError(f"the teacher {model.path} has other noise levels than the student: take another teacher")
        bound: Callable[..., Any] = model.backbone.bind(network)
        return bound

    def scheduler_of(self, scheduler: Any) -> Any:
        from diffusers import LCMScheduler

        own = LCMScheduler.from_config(
            scheduler.config,
            original_inference_steps=self.solver_steps,
            timestep_scaling=self.timestep_scaling,
            clip_sample=False,
            thresholding=False,
        )
        if not torch.allclose(own.alphas_cumprod, scheduler.alphas_cumprod.to(own.alphas_cumprod)):
            raise InputError(
                f"the noise levels of {type(scheduler).__name__} of model.path are not those that diffusers' "
                "LCMScheduler makes of its configuration: save the pipeline with a DDPMScheduler or DDIMScheduler"
            )
        return own

    def new_process(self, process: ProcessConfig | None, steps: int) -> tuple[DiffusionProcess, Any]:
        if process is not None:
            raise InputError("objective=latent-consistency takes the process of its teacher: leave process out")
        raise InputError(
            "objective=latent-consistency distils a pretrained model: set model.name=pretrained and model.path"
        )

    def build(
        self,
        process: DiffusionProcess,
        steps: int,
        target: nn.Module | None = None,
        teacher: Callable[..., Any] | None = None,
    ) -> LatentConsistencyObjective:
        assert target is not None
        assert teacher is not None
        try:
            return LatentConsistencyObjective(
                target,
                teacher,
                process,
                self.solver_steps,
                self.guidance,
                self.prediction,
                self.metric,
                self.huber_c,
                self.perturb,
                timestep_scaling=self.timestep_scaling,
                guidance_embedding=self.guidance_embedding,
                decay=self.decay,
            )
        except ValueError as error:  # such as more solver steps than times
            raise InputError(f"objective: {error}") from None
