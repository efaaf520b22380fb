r"""The denoising loss of diffusion models and flow matching, at a perturbed point.

t and ε, and so x_t, are drawn once for a batch. Every pass over the batch evaluates the loss at another δ:

    mse(δ) = mean over elements of ( target(x_0, t, ε + δ/σ_t) − model(x_t + δ, t) )²,

which is the ordinary loss at the noise ε + δ/σ_t (Wang et al., 2025, equation 16; :mod:`robustdiff.process`).

With a learned variance the model has 2C output channels. The second half, v ∈ [−1, 1], interpolates the log-variance
of p(x_{t−1} | x_t) between log β̃_t and log β_t. It is trained by the variational bound, with the mean detached:

    vb(δ) = KL( q(x_{t−1} | x_t + δ, x_0) ‖ p(x_{t−1} | x_t + δ) )   in bits per dimension,

and at t = 0 by the negative log-likelihood of x_0 on 256 grey values. The loss is mse + scale · vb (Nichol & Dhariwal,
2021, equations 15 and 16).

The gradient with respect to δ has two terms, one through the model's output at x_t + δ and one through the target. The
authors' code takes the first alone (δ in the target is a constant), which is the default here. A step along it need not
raise the loss: with the residual r and J = ∂ε̂/∂x it moves δ along −Jᵀr, which changes ‖r‖² at the rate
−2 rᵀ(I/σ_t − J)Jᵀr. This is negative if the model is near a denoiser and 0 ≺ J ≺ I/σ_t. ``through_target`` takes both
terms, which gives the steepest ascent of the loss. That direction is the same for every parameterisation, since their
losses differ by a factor for each sample. For x_0-prediction, whose target does not depend on δ, it is also the
default direction. The directions through the model alone differ from parameterisation to parameterisation.

If times are not drawn uniformly, each loss is multiplied by a weight (:mod:`robustdiff.objectives.timesteps`).

Input perturbation (Ning et al., ICML 2023, arXiv 2301.11706) is a baseline that adds random noise to x_t:

    x_t = α_t x_0 + σ_t (ε + γξ),   ξ ~ N(0, I),   with the noise ε in the target.

Its target does not include the perturbation: the network learns to treat γξ as signal, whereas adversarial training
learns to remove δ. With both, the network is trained at x_t + δ with the noise ε + δ/σ_t in the target.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal, get_args

import numpy as np
import torch
from pydantic import AfterValidator, Field
from torch import Tensor
from torch.nn import Module

from robustdiff.errors import InputError
from robustdiff.objectives.objective import OBJECTIVES, Draw, Objective, ObjectiveConfig, gaussian, precise, predict
from robustdiff.objectives.preconditioning import Denoise
from robustdiff.objectives.timesteps import TIMESTEPS, TimestepSampler, uniform
from robustdiff.process import PREDICTIONS, DiffusionProcess, Prediction, ProcessConfig, broadcast

__all__ = ["DenoisingConfig", "DenoisingObjective", "Variance"]

Variance = Literal["fixed", "learned_range"]


class DenoisingObjective(Objective):
    """The denoising loss, with the variational bound if the variance is learned, as a callable.

    Args:
        process: The forward process.
        prediction: The parameterisation of the model: "epsilon", "sample" (x_0), "v_prediction" or "flow".
        variance: "fixed", or "learned_range" for models with 2C output channels (ADM's hybrid loss).
        vb_scale: The factor of the variational bound in the loss, for a learned variance only. Default: 1; guided-
            diffusion's ``rescale_learned_sigmas`` corresponds to T/1000.
        timesteps: The distribution of the times. Default: uniform.
        input_perturbation: The strength γ ≥ 0 of input perturbation; 0.1, and 0.15 on CIFAR-10, in Ning et al. (2023).
        through_target: If True, the gradient with respect to δ includes the target of mse. The losses and the gradients
            of the parameters are unaffected.

    Raises:
        ValueError: If a name is unknown, γ < 0, a learned variance is combined with a process that does not preserve
            variance, ``vb_scale`` is given for a fixed variance, or the process is one of a scheduler that scales the
            network's input (:meth:`DiffusionProcess.check_network`), or ends without signal and ``prediction`` is
            "epsilon".
    """

    recordable = True

    def __init__(
        self,
        process: DiffusionProcess,
        prediction: Prediction = "epsilon",
        variance: Variance = "fixed",
        vb_scale: float | None = None,
        timesteps: TimestepSampler | None = None,
        input_perturbation: float = 0.0,
        through_target: bool = False,
    ) -> None:
        if prediction not in PREDICTIONS:
            raise ValueError(f"unknown prediction {prediction!r}: use one of {', '.join(PREDICTIONS)}")
        process.check_network(prediction)
        process.check_signal(prediction)
        if variance not in get_args(Variance):
            raise ValueError(f"unknown variance {variance!r}: use one of {', '.join(get_args(Variance))}")
        if variance == "learned_range" and not process.variance_preserving:
            raise ValueError("a learned variance needs a variance-preserving process")
        if vb_scale is not None and variance == "fixed":
            raise ValueError("vb_scale has a meaning only with variance='learned_range'")
        if not input_perturbation >= 0:
            raise ValueError(f"input_perturbation must be at least 0; got {input_perturbation}")
        self.process = process
        self.timesteps = uniform(process) if timesteps is None else timesteps
        self.input_perturbation = input_perturbation
        self.through_target = through_target
        self.prediction: Prediction = prediction
        self.variance: Variance = variance
        self.vb_scale = 1.0 if vb_scale is None else vb_scale

    def draw(
        self,
        x0: Tensor,
        t: Tensor | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        weight: Tensor | None = None,
        input_noise: Tensor | None = None,
        **condition: Any,
    ) -> Draw:
        """Draw t, ε and, for input perturbation, ξ for a batch.

        Args:
            x0: Clean samples in [−1, 1], with shape (B, *).
            t: Time indices, or times, with shape (B,). Default: drawn from ``timesteps``, with their weights.
            noise: The noise ε, with shape (B, *). Default: standard normal.
            generator: The source of randomness for arguments that are not given. Default: PyTorch's global generator.
            weight: The weights of the losses, with shape (B,), in addition to those of ``timesteps``; None for weights
                of 1.
            input_noise: The noise ξ of input perturbation, with shape (B, *). Default: standard normal.
            condition: Further keyword arguments of the model, such as ``class_labels``.
        """
        if t is None:
            t, of_times = self.timesteps.draw(len(x0), generator, x0.device)
            t = t.to(x0.device)
            if of_times is not None:
                of_times = of_times.to(x0.device)
                weight = of_times if weight is None else weight * of_times
        noise = gaussian(x0, generator) if noise is None else noise
        at = noise
        if self.input_perturbation:
            at = noise + self.input_perturbation * (gaussian(x0, generator) if input_noise is None else input_noise)
        return Draw(x0, t, noise, self.process.diffuse(x0, t, at), weight, condition)

    def more_noise(self, shape: tuple[int, ...], generator: torch.Generator) -> dict[str, Tensor]:
        """Draw ``input_noise`` for :meth:`draw`, if there is input perturbation."""
        if not self.input_perturbation:
            return {}
        return {"input_noise": torch.randn(shape, generator=generator, device=generator.device)}

    def state(self) -> dict[str, Any]:
        """Return what the distribution of the times has taken from losses."""
        return {name: value.tolist() for name, value in self.timesteps.state_dict().items()}

    def load_state(self, state: dict[str, Any]) -> None:
        # numpy makes float64 of Python's numbers.
        self.timesteps.load_state_dict({name: torch.from_numpy(np.asarray(value)) for name, value in state.items()})

    def __call__(self, model: Callable[..., Any], draw: Draw, delta: Tensor | None = None) -> dict[str, Tensor]:
        """Return the losses at x_t + δ, in at least float32: "loss" (weighted), "mse", and for a learned variance "vb".

        "vb" is in bits per dimension, without its factor.

        Raises:
            ValueError: If the number of the model's output channels does not match the variance.
        """
        x, noise = draw.x_t, draw.noise
        if delta is not None:
            x, noise = x + delta, self.process.absorb(noise, draw.t, delta)
            if self.through_target:
                noise = noise + (delta - delta.detach()) / self.process.levels(draw.t, delta)[1]  # + 0
        output = predict(model, x, self.process.times_at(draw.t, x), draw.condition)
        channels = draw.x0.shape[1] * (2 if self.variance == "learned_range" else 1)
        if output.shape[1] != channels:
            raise ValueError(
                f"the model gives {output.shape[1]} channels where variance={self.variance!r} needs {channels}"
            )
        # The losses are computed in float32 if the points are in half precision.
        precision = precise(draw.x0.dtype)
        x0, x, noise, output = (value.to(precision) for value in (draw.x0, x, noise, output))
        prediction, v = output[:, : x0.shape[1]], output[:, x0.shape[1] :]
        target = self.process.target(self.prediction, x0, draw.t, noise)
        losses = {"mse": (target - prediction).square().flatten(1).mean(1)}
        loss = losses["mse"]
        if self.variance == "learned_range":
            # As in the target, δ is a constant in the two posteriors (x.detach()).
            losses["vb"] = self._variational_bound(x0, x.detach(), draw.t, prediction.detach(), v)
            loss = loss + self.vb_scale * losses["vb"]
        return {"loss": loss if draw.weight is None else draw.weight * loss, **losses}

    def _variational_bound(self, x0: Tensor, x_t: Tensor, t: Tensor, prediction: Tensor, v: Tensor) -> Tensor:
        """Return one term of the variational bound, in bits per dimension, with shape (B,)."""
        low, high = self.process.log_variances(t, x_t)
        fraction = (v + 1) / 2
        log_variance = fraction * high + (1 - fraction) * low
        x0_hat, _ = self.process.split(self.prediction, x_t, t, prediction)
        mean = self.process.posterior_mean(x0_hat, x_t, t)
        true_mean = self.process.posterior_mean(x0, x_t, t)
        divergence = 0.5 * (
            log_variance - low + (low - log_variance).exp() + (true_mean - mean).square() * (-log_variance).exp() - 1
        )
        nll = -_log_likelihood_of_pixels(x0, mean, log_variance)
        first = broadcast(self.process.index(t) == 0, x0)
        return torch.where(first, nll, divergence).flatten(1).mean(1) / math.log(2)


def _log_likelihood_of_pixels(x0: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return log P of each element among 256 grey values in [−1, 1], under a Gaussian (Ho et al., 2020, section 3.3).

    The bin of a value extends half a step, 1/255, to each side; the first and the last bin are unbounded. The normal
    distribution function is approximated by tanh as in ADM, so that bits per dimension can be compared.
    """

    def cdf(z: Tensor) -> Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    centered, inverse_std = x0 - mean, (-0.5 * log_variance).exp()
    below = cdf(inverse_std * (centered - 1 / 255))
    above = cdf(inverse_std * (centered + 1 / 255))
    probability = torch.where(x0 < -0.999, above, torch.where(x0 > 0.999, 1 - below, above - below))
    return probability.clamp_min(1e-12).log()


def _known(name: str) -> str:
    TIMESTEPS[name]  # raises for an unknown name
    return name


@OBJECTIVES.register("denoising")
class DenoisingConfig(ObjectiveConfig):
    """The denoising loss of a diffusion model or of flow matching."""

    name: Literal["denoising"] = "denoising"
    prediction: Prediction = "epsilon"  # type: ignore[misc]
    variance: Variance = "fixed"
    vb_scale: float | None = Field(None, gt=0, description="the factor of the variational bound; learned_range only")
    timesteps: Annotated[str, AfterValidator(_known)] = Field(
        "uniform",
        description="the distribution of times",
        json_schema_extra=lambda schema: schema.update(enum=list(TIMESTEPS)),
    )
    input_perturbation: float = Field(0.0, ge=0, description="the strength γ of input perturbation; 0: none")
    through_target: bool = Field(False, description="true: the gradient with respect to δ includes the target")

    @property
    def learned_variance(self) -> bool:
        return self.variance == "learned_range"

    def adopt(self, own: ObjectiveConfig) -> ObjectiveConfig:
        if own.over_levels:
            return self
        of_network = {"prediction": own.prediction, "variance": "learned_range" if own.learned_variance else "fixed"}
        return self.model_copy(update={n: v for n, v in of_network.items() if n not in self.model_fields_set})

    def new_process(self, process: ProcessConfig | None, steps: int) -> tuple[DiffusionProcess, Any]:
        from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

        process = process or ProcessConfig()
        table = process.build()
        if (process.name == "flow") != (self.prediction == "flow"):
            raise InputError("process=flow and objective.prediction=flow go together: set both, or neither")
        if process.name == "flow":
            # A flow's time is continuous: T is the size of the table alone, and the scheduler always has 1000 times.
            return table, FlowMatchEulerDiscreteScheduler(shift=process.shift)
        return table, DDPMScheduler(
            process.T,
            beta_schedule={"cosine": "squaredcos_cap_v2"}.get(process.name, process.name),
            beta_start=0.0001 * 1000 / process.T,
            beta_end=0.02 * 1000 / process.T,
            prediction_type=self.prediction,
            variance_type={"fixed": "fixed_small"}.get(self.variance, self.variance),
        )

    def build(
        self, process: DiffusionProcess, steps: int, target: Module | None = None, teacher: Denoise | None = None
    ) -> DenoisingObjective:
        try:
            return DenoisingObjective(
                process,
                self.prediction,
                self.variance,
                vb_scale=self.vb_scale,
                timesteps=TIMESTEPS[self.timesteps](process),
                input_perturbation=self.input_perturbation,
                through_target=self.through_target,
            )
        except ValueError as error:  # vb_scale for a fixed variance, or a variance that the process cannot have
            raise InputError(f"objective: {error}") from None
