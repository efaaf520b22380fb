r"""A network as a sampler sees it: x_t and a time in, (x̂_0, ε̂) out.

Whatever the network predicts is turned into ε̂, divided by the epsilon scale λ, and x̂_0 follows from
x_t = α_t x̂_0 + σ_t ε̂. Clipping holds x̂_0 in [−c, c], or by dynamic thresholding (Saharia et al., "Photorealistic
Text-to-Image Diffusion Models with Deep Language Understanding", 2022, section 2.3) in [−s, s]/s with s a quantile of
|x̂_0|; ε̂ is then what x_t and the clipped x̂_0 imply.

Where there is no signal, α_t = 0, x̂_0 is what a network that predicts v or x_0 says, and a scaled ε̂ leaves it as it is.

Epsilon scaling (Ning et al., "Elucidating the Exposure Bias in Diffusion Models", ICLR 2024, arXiv 2308.15321): at
inference ε̂ is longer than it was in training, and dividing it by λ > 1 brings x_t back to where it was trained.
λ is constant, or λ(i) = k·i + b at the i-th of the sampler's times, counted from the least noisy, 0, as in their code.
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
    """Clip each x̂_0 to its own quantile of |x̂_0|, and divide by it (diffusers' ``thresholding``).

    Arguments:
        ratio: The quantile, in (0, 1].
        maximum: The largest value that is divided by, ≥ 1; the smallest is 1.
    """

    ratio: float = 0.995
    maximum: float = 1.0

    def __call__(self, x0: Tensor) -> Tensor:
        size = torch.quantile(x0.flatten(1).abs().to(torch.promote_types(x0.dtype, torch.float32)), self.ratio, dim=1)
        bound = broadcast(size.clamp(1, max(1.0, self.maximum)).to(x0.dtype), x0)
        return x0.clamp(-bound, bound) / bound


@dataclass(frozen=True)
class Denoised:
    """A prediction of a network at x_t; each with shape (B, C, H, W).

    Attributes:
        x0: x̂_0.
        noise: ε̂, consistent with x̂_0.
        variance: Where in its range the log-variance of p(x_{t−1} | x_t) lies, in [−1, 1], when it is learned.
    """

    x0: Tensor
    noise: Tensor
    variance: Tensor | None


@dataclass(frozen=True)
class Evaluation:
    """One call of a network by a sampler, for who looks on.

    Attributes:
        denoiser: What was called; it may be called again at other points of the same times.
        x_t: The sampler's state, with shape (B, C, H, W).
        index: The times in the process, with shape (B,).
        process: The process that α_t, σ_t and the network's times come from.
        predicted: What the network says, before scaling and clipping.
        used: What the sampler goes on with.
    """

    denoiser: Denoiser
    x_t: Tensor
    index: Tensor
    process: DiffusionProcess
    predicted: Denoised
    used: Denoised


@dataclass(frozen=True)
class Denoiser:
    """A network with its process and parameterisation.

    Arguments:
        model: Called as diffusers calls it.
        prediction: What it predicts.
        eps_scale: λ, or (k, b) for λ(i) = k·i + b.
        clip: c > 0 for x̂_0 in [−c, c], or a :class:`DynamicThreshold`; none is not clipped.
        condition: What else the model is called with.
        on_evaluation: Called after each evaluation.
        finite: Gets after each evaluation whether all that the network says is finite, as a tensor on its device.
    """

    model: Callable[..., Any]
    prediction: Prediction = "epsilon"
    eps_scale: float | tuple[float, float] = 1.0
    clip: float | DynamicThreshold | None = 1.0
    condition: dict[str, Any] = field(default_factory=dict)
    on_evaluation: Callable[[Evaluation], None] | None = None
    finite: list[Tensor] | None = None

    def __call__(self, x_t: Tensor, index: int | Tensor, process: DiffusionProcess) -> Denoised:
        """Evaluate the network at time ``process.times[index]``; indices with shape (B,) are one for each sample."""
        channels = x_t.shape[1]
        t = index if isinstance(index, Tensor) else torch.full((len(x_t),), index, device=x_t.device)
        output = predict(self.model, x_t, process.times_at(t, x_t), self.condition).to(x_t.dtype)
        variance = output[:, channels:] if output.shape[1] == 2 * channels else None
        x0, noise = process.split(self.prediction, x_t, t, output[:, :channels])
        if self.finite is not None:  # before clipping, which would make numbers of infinities
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
