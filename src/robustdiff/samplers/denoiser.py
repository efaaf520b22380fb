r"""The evaluation of a network by a sampler: (x_t, t) ↦ (x̂_0, ε̂).

The network's output is converted to ε̂, which is divided by the epsilon scale λ, and x̂_0 follows from
x_t = α_t x̂_0 + σ_t ε̂. Clipping limits x̂_0 to [−c, c] or by :class:`DynamicThreshold`; ε̂ is then recomputed from x_t
and the clipped x̂_0.

At α_t = 0 (no signal), x̂_0 comes from the output of a network that predicts v or x_0, and λ does not change it.

Epsilon scaling (Ning et al., "Elucidating the Exposure Bias in Diffusion Models", ICLR 2024, arXiv 2308.15321)
corrects a norm of ε̂ that is larger in sampling than in training: dividing ε̂ by λ > 1 brings x_t closer to the points
of training. λ is constant, or λ(i) = k·i + b at the i-th of the sampler's times, counted from 0, the least noisy, as
in their code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from robustdiff.objectives.objective import predict
from robustdiff.process import DiffusionProcess, Prediction, broadcast

__all__ = ["Denoised", "Denoiser", "DynamicThreshold", "Evaluation"]


@dataclass(frozen=True)
class DynamicThreshold:
    """Dynamic thresholding: each x̂_0 is clipped to its own quantile of |x̂_0| and divided by it.

    It is due to Saharia et al. ("Photorealistic Text-to-Image Diffusion Models with Deep Language Understanding", 2022,
    section 2.3), and is diffusers' ``thresholding``.

    Args:
        ratio: The quantile, in (0, 1].
        maximum: The upper limit of the threshold, ≥ 1; its lower limit is 1.
    """

    ratio: float = 0.995
    maximum: float = 1.0

    def __call__(self, x0: Tensor) -> Tensor:
        size = torch.quantile(x0.flatten(1).abs().to(torch.promote_types(x0.dtype, torch.float32)), self.ratio, dim=1)
        bound = broadcast(size.clamp(1, max(1.0, self.maximum)).to(x0.dtype), x0)
        return x0.clamp(-bound, bound) / bound


@dataclass(frozen=True)
class Denoised:
    """The prediction of a network at x_t. Each tensor has shape (B, C, H, W).

    Attributes:
        x0: The estimate x̂_0.
        noise: The estimate ε̂, consistent with x̂_0.
        variance: The position of the log-variance of p(x_{t−1} | x_t) in its range, from −1, the lower bound, to 1, the
            upper bound; None if the variance is not learned.
    """

    x0: Tensor
    noise: Tensor
    variance: Tensor | None


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of a network by a sampler, passed to the callback ``on_evaluation``.

    Attributes:
        denoiser: The denoiser that was called. The callback may call it at other points.
        x_t: The sampler's state, with shape (B, C, H, W).
        index: The indices of the times in ``process``, with shape (B,).
        process: The process that gives α_t, σ_t and the times passed to the network.
        predicted: The network's prediction, before scaling and clipping.
        used: The prediction after scaling and clipping, which the sampler uses.
    """

    denoiser: Denoiser
    x_t: Tensor
    index: Tensor
    process: DiffusionProcess
    predicted: Denoised
    used: Denoised


@dataclass(frozen=True)
class Denoiser:
    """A network, called as a sampler needs it.

    Args:
        model: The network, called as diffusers calls it.
        prediction: The parameterisation of the network.
        eps_scale: The epsilon scale λ, or (k, b) for λ(i) = k·i + b.
        clip: The bound c > 0 that limits x̂_0 to [−c, c], or a :class:`DynamicThreshold`; None for no clipping.
        condition: Further keyword arguments of the model.
        on_evaluation: A callback that is called after each evaluation.
        finite: A list. Each evaluation appends a boolean scalar tensor, on the network's device: True if the whole
            output is finite.
        dtype: The type of the points that the network is called with; None for that of the sampler's state.
    """

    model: Callable[..., Any]
    prediction: Prediction = "epsilon"
    eps_scale: float | tuple[float, float] = 1.0
    clip: float | DynamicThreshold | None = 1.0
    condition: dict[str, Any] = field(default_factory=dict)
    on_evaluation: Callable[[Evaluation], None] | None = None
    finite: list[Tensor] | None = None
    dtype: torch.dtype | None = None

    def __call__(self, x_t: Tensor, index: int | Tensor, process: DiffusionProcess) -> Denoised:
        """Evaluate the network at time ``process.times[index]``.

        Args:
            x_t: The noisy points, with shape (B, C, H, W).
            index: The index of the time, or one index for each sample, with shape (B,).
            process: The process that the index refers to.
        """
        channels = x_t.shape[1]
        t = index if isinstance(index, Tensor) else torch.full((len(x_t),), index, device=x_t.device)
        point = x_t if self.dtype is None else x_t.to(self.dtype)
        output = predict(self.model, point, process.times_at(t, x_t), self.condition).to(x_t.dtype)
        variance = output[:, channels:] if output.shape[1] == 2 * channels else None
        x0, noise = process.split(self.prediction, x_t, t, output[:, :channels])
        if self.finite is not None:  # before clipping, which would make infinite values finite
            self.finite.append(x0.isfinite().all() & noise.isfinite().all())
        predicted = Denoised(x0, noise, variance)
        k, b = self.eps_scale if isinstance(self.eps_scale, tuple) else (0.0, self.eps_scale)
        if (k, b) != (0.0, 1.0):
            scale = (k * t + b).to(noise)
            noise = noise / broadcast(scale, noise)
            alpha = process.levels(t, x_t)[0]
            x0 = torch.where(alpha > 0, process.split("epsilon", x_t, t, noise)[0], x0)
        if self.clip is not None:
            x0 = self.clip(x0) if isinstance(self.clip, DynamicThreshold) else x0.clamp(-self.clip, self.clip)
            _, noise = process.split("sample", x_t, t, x0)
        used = Denoised(x0, noise, variance)
        if self.on_evaluation is not None:
            self.on_evaluation(Evaluation(self, x_t, t, process, predicted, used))
        return used
