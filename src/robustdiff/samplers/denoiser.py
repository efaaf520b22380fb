r"""A network as a sampler sees it: x_t and a time in, (x̂_0, ε̂) out.

Whatever the network predicts is turned into ε̂, divided by the epsilon scale (Ning et al., ICLR 2024), and x̂_0 follows
from x_t = α_t x̂_0 + σ_t ε̂. Clipping holds x̂_0 in [−1, 1]; ε̂ is then what x_t and the clipped x̂_0 imply.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from robustdiff.objectives.denoising import predict
from robustdiff.process import DiffusionProcess, Prediction

__all__ = ["Denoised", "Denoiser"]


@dataclass(frozen=True)
class Denoised:
    """What a network says at x_t; each with shape (B, C, H, W).

    Attributes:
        x0: x̂_0.
        noise: ε̂, consistent with x̂_0.
        variance: Where in its range the log-variance of p(x_{t−1} | x_t) lies, in [−1, 1], when it is learned.
    """

    x0: Tensor
    noise: Tensor
    variance: Tensor | None


@dataclass(frozen=True)
class Denoiser:
    """A network with its process and parameterisation.

    Arguments:
        model: Called as diffusers calls it.
        prediction: What it predicts.
        eps_scale: What ε̂ is divided by.
        clip: Whether x̂_0 is clipped to [−1, 1].
        condition: What else the model is called with.
    """

    model: Callable[..., Any]
    prediction: Prediction = "epsilon"
    eps_scale: float = 1.0
    clip: bool = True
    condition: dict[str, Any] = field(default_factory=dict)

    def __call__(self, x_t: Tensor, index: int, process: DiffusionProcess) -> Denoised:
        """Evaluate the network at time ``process.times[index]``."""
        channels = x_t.shape[1]
        t = torch.full((len(x_t),), index, device=x_t.device)
        output = predict(self.model, x_t, process.times.to(x_t.device)[t], self.condition).to(x_t.dtype)
        variance = output[:, channels:] if output.shape[1] == 2 * channels else None
        x0, noise = process.split(self.prediction, x_t, t, output[:, :channels])
        if self.eps_scale != 1.0:
            noise = noise / self.eps_scale
            x0, _ = process.split("epsilon", x_t, t, noise)
        if self.clip:
            x0 = x0.clamp(-1, 1)
            _, noise = process.split("sample", x_t, t, x0)
        return Denoised(x0, noise, variance)
