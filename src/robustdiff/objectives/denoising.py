r"""The denoising loss of diffusion models and flow matching, at a perturbed point.

A draw fixes (x_0, t, ε), and so x_t, once for a batch; every pass over the batch evaluates the loss at another δ:

    mse(δ) = mean over elements of ( target(x_0, t, ε + δ/σ_t) − model(x_t + δ, t) )²,

which is the ordinary loss at the noise ε + δ/σ_t (Wang et al., 2025, equation 16; :mod:`robustdiff.process`).

With a learned variance the model has 2C output channels, the second half v ∈ [−1, 1] of which place the log-variance
of p(x_{t−1} | x_t) between log β̃_t and log β_t. It is trained by the variational bound, with the mean frozen,

    vb(δ) = KL( q(x_{t−1} | x_t + δ, x_0) ‖ p(x_{t−1} | x_t + δ) )   in bits per dimension,

at t = 0 the negative log-likelihood of x_0 on 256 grey values; loss = mse + scale · vb (Nichol & Dhariwal, 2021,
equations 15 and 16).

The gradient that moves δ has two terms: the model's output at x_t + δ, and the target. The authors' code takes the
first alone (δ in the target is a constant), and so do we by default. That step need not raise the loss: with r the
residual and J = ∂ε̂/∂x it moves δ along −Jᵀr, which changes ‖r‖² at the rate −2 rᵀ(I/σ_t − J)Jᵀr, below 0 where the
model is near a denoiser and 0 ≺ J ≺ I/σ_t. ``through_target`` takes both terms, for the steepest ascent of the loss
itself. Its direction is the same in every parameterisation, since their losses differ by a factor per sample; it is
also that of x_0-prediction without it, whose target does not move.

Times that are not drawn uniformly carry a weight that multiplies the loss (:mod:`robustdiff.objectives.timesteps`).

Input perturbation (Ning et al., ICML 2023, arXiv 2301.11706) is the baseline that moves x_t by random noise,

    x_t = α_t x_0 + σ_t (ε + γξ),   ξ ~ N(0, I),   with ε as it was in the target.

It is the one perturbation that the target does not absorb: the network learns to take γξ for signal, where adversarial
training learns to remove δ. Both together train at x_t + δ with the target's noise ε + δ/σ_t.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import Module

from robustdiff.errors import InputError
from robustdiff.objectives.objective import OBJECTIVES, Draw, Objective, ObjectiveConfig, gaussian, precise, predict
from robustdiff.objectives.preconditioning import Denoise
from robustdiff.objectives.timesteps import TIMESTEPS, LossSecondMoment, TimestepSampler, uniform
from robustdiff.process import PREDICTIONS, DiffusionProcess, Prediction, ProcessConfig, broadcast

__all__ = ["VARIANCES", "DenoisingConfig", "DenoisingObjective", "Variance"]

Variance = Literal["fixed", "learned_range"]
VARIANCES: tuple[str, ...] = get_args(Variance)


class DenoisingObjective(Objective):
    """The (hybrid) denoising loss, as a callable.

    Arguments:
        process: The forward process.
        prediction: What the model predicts: "epsilon", "sample" (x_0), "v_prediction" or "flow".
        variance: "fixed", or "learned_range" for models with 2C output channels (ADM's hybrid loss).
        vb_scale: The factor of the variational bound in the loss, with a learned variance; 1 by default, T/1000 for
            guided-diffusion's ``rescale_learned_sigmas``.
        timesteps: How times are drawn; uniformly by default.
        input_perturbation: γ ≥ 0 of input perturbation; 0.1, and 0.15 on CIFAR-10, in Ning et al. (2023).
        through_target: Whether the gradient with respect to δ goes through the target of mse as well. No loss changes,
            nor any gradient of the parameters.

    Raises:
        ValueError: If a name is unknown, γ < 0, or a learned variance is asked of a process that does not preserve
            variance.
    """

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
        if variance not in VARIANCES:
            raise ValueError(f"unknown variance {variance!r}: use one of {', '.join(VARIANCES)}")
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
        """Fix t, ε and, with input perturbation, ξ for a batch.

        Arguments:
            x0: Clean samples in [−1, 1], with shape (B, *).
            t: Time indices, or times, with shape (B,); from ``timesteps`` by default, and their weights with them.
            noise: The noise ε, with shape (B, *); standard normal by default.
            generator: Where what is not given comes from.
            weight: The weights of given times, with shape (B,); none is 1.
            input_noise: The ξ of input perturbation, with shape (B, *); standard normal by default.
            condition: What else the model is called with, such as ``class_labels``.
        """

        if t is None:
            t, weight = self.timesteps.draw(len(x0), generator, x0.device)
            t, weight = t.to(x0.device), None if weight is None else weight.to(x0.device)
        noise = gaussian(x0, generator) if noise is None else noise
        at = noise
        if self.input_perturbation:
            at = noise + self.input_perturbation * (gaussian(x0, generator) if input_noise is None else input_noise)
        return Draw(x0, t, noise, self.process.diffuse(x0, t, at), weight, condition)

    def more_noise(self, shape: tuple[int, ...], generator: torch.Generator) -> dict[str, Tensor]:
        """Draw the ξ of input perturbation, if there is any."""
        if not self.input_perturbation:
            return {}
        return {"input_noise": torch.randn(shape, generator=generator, device=generator.device)}

    def state(self) -> dict[str, Any]:
        """Return the losses that the sampler of times remembers."""
        if not isinstance(self.timesteps, LossSecondMoment):
            return {}
        return {name: value.tolist() for name, value in self.timesteps.state_dict().items()}

    def load_state(self, state: dict[str, Any]) -> None:
        if isinstance(self.timesteps, LossSecondMoment):
            losses = torch.tensor(state["losses"], dtype=torch.float64)
            self.timesteps.load_state_dict({"losses": losses, "counts": torch.tensor(state["counts"])})

    def __call__(self, model: Callable[..., Any], draw: Draw, delta: Tensor | None = None) -> dict[str, Tensor]:
        """Return the losses at x_t + δ.

        Arguments:
            model: Called as diffusers calls it; it is given ``process.times[t]``.
            draw: The batch.
            delta: The perturbation δ of x_t, with shape (B, *); none is 0.

        Returns:
            Losses with shape (B,), never below float32: "loss" (weighted), "mse", and "vb" (bits per dimension, before
            scaling) with a learned variance.

        Raises:
            ValueError: If the model's output does not have the channels that the objective needs.
        """
        x, noise = draw.x_t, draw.noise
        if delta is not None:
            x, noise = x + delta, self.process.absorb(noise, draw.t, delta)
            if self.through_target:
                noise = noise + (delta - delta.detach()) / self.process.levels(draw.t, delta)[1]  # + 0, with a gradient
        output = predict(model, x, self.process.times_at(draw.t, x), draw.condition)
        channels = draw.x0.shape[1] * (2 if self.variance == "learned_range" else 1)
        if output.shape[1] != channels:
            raise ValueError(
                f"the model gives {output.shape[1]} channels where variance={self.variance!r} needs {channels}"
            )
        # Losses of points in half precision are not computed in it.
        precision = precise(draw.x0.dtype)
        x0, x, noise, output = (value.to(precision) for value in (draw.x0, x, noise, output))
        prediction, v = output[:, : x0.shape[1]], output[:, x0.shape[1] :]
        target = self.process.target(self.prediction, x0, draw.t, noise)
        losses = {"mse": (target - prediction).square().flatten(1).mean(1)}
        loss = losses["mse"]
        if self.variance == "learned_range":
            # As in the target, δ is in the two posteriors only as the point at which we train (x.detach()).
            losses["vb"] = self._variational_bound(x0, x.detach(), draw.t, prediction.detach(), v)
            loss = loss + self.vb_scale * losses["vb"]
        return {"loss": loss if draw.weight is None else draw.weight * loss, **losses}

    def _variational_bound(self, x0: Tensor, x_t: Tensor, t: Tensor, prediction: Tensor, v: Tensor) -> Tensor:
        """One term of the variational bound, in bits per dimension, with shape (B,)."""
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
    """log P of the 256 grey values in [−1, 1] under a Gaussian, elementwise (Ho et al., 2020, section 3.3).

    The bin of a value reaches half a step, 1/255, to each side; the first and last are open. Φ is the tanh
    approximation that ADM uses, so that bits per dimension can be compared.
    """

    def cdf(z: Tensor) -> Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    centered, inverse_std = x0 - mean, (-0.5 * log_variance).exp()
    below = cdf(inverse_std * (centered - 1 / 255))
    above = cdf(inverse_std * (centered + 1 / 255))
    probability = torch.where(x0 < -0.999, above, torch.where(x0 > 0.999, 1 - below, above - below))
    return probability.clamp_min(1e-12).log()


@OBJECTIVES.register("denoising")
class DenoisingConfig(ObjectiveConfig):
    """The denoising loss of a diffusion model or of flow matching."""

    name: Literal["denoising"] = "denoising"
    prediction: Prediction = "epsilon"  # type: ignore[misc]
    variance: Variance = "fixed"
    vb_scale: float | None = Field(None, gt=0, description="factor of the variational bound; learned_range only")
    timesteps: Literal["uniform", "loss-second-moment"] = Field("uniform", description="how times are drawn")
    input_perturbation: float = Field(0.0, ge=0, description="γ of input perturbation; 0: none")
    through_target: bool = Field(False, description="whether the gradient that moves δ goes through the target as well")

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
            # A flow's time is continuous: T is how finely it is drawn, and the scheduler has always 1000 t.
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
        except ValueError as error:  # a variance that is not learned, or that the process cannot have
            raise InputError(f"objective: {error}") from None
