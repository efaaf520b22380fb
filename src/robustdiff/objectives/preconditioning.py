r"""Networks over noise levels σ, and conversions between them and networks over discrete times.

The process of Karras et al. (2022, arXiv 2206.00364) has α = 1, x = x_0 + σ ε, at levels σ_min … σ_max that are
uniform in σ^{1/ρ} (their equation 5). A network F defines a denoiser D, or a consistency function f, by

    f(x, σ) = c_skip(σ) x + c_out(σ) F(c_in(σ) x, k ln σ),

    c_skip = σ_d²/((σ − σ_0)² + σ_d²),   c_out = (σ − σ_0) σ_d/√(σ² + σ_d²),   c_in = 1/√(σ² + σ_d²),

with σ_0 = 0 for D (their table 1), and σ_0 = σ_min for f. f is then the identity at σ_min, which is the boundary
condition of a consistency model (Song et al., 2023, arXiv 2303.01469, appendix C). k = 250 as in Song et al. and
diffusers' ``CMStochasticIterativeScheduler``, a thousand times the 1/4 of Karras et al.

Division of x by √(1 + σ²) makes the process variance-preserving, with α = 1/√(1 + σ²) and the same signal-to-noise
ratio. A network over discrete times can therefore be used as a denoiser D(x, σ) ↦ x̂_0 (:class:`DiffusionDenoiser`),
and a denoiser as a network over the times σ of such a process (:class:`OverTimes`), to which the samplers of diffusion
models apply.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from robustdiff.objectives.objective import precise, predict
from robustdiff.objectives.timesteps import double
from robustdiff.process import DiffusionProcess, Prediction, Table, broadcast, split_output

__all__ = ["Denoise", "DiffusionDenoiser", "OverTimes", "Preconditioned", "karras_process", "karras_sigmas"]

Denoise = Callable[..., Tensor]
"""A denoiser: a function that maps (x (B, *), σ (B,), **condition) to x̂_0 (B, *)."""


def karras_sigmas(N: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Tensor:
    """Return N levels ascending from σ_min to σ_max, uniform in σ^{1/ρ}, with shape (N,), float64.

    Raises:
        ValueError: Unless N ≥ 2, 0 < σ_min < σ_max and ρ > 0.
    """
    if not (N >= 2 and 0 < sigma_min < sigma_max and rho > 0):
        raise ValueError(
            f"levels need N ≥ 2, 0 < sigma_min < sigma_max and rho > 0; got {N}, {sigma_min}, {sigma_max}, {rho}"
        )
    ends = torch.tensor([sigma_min, sigma_max], dtype=torch.float64)
    low, high = ends ** (1 / rho)
    sigmas = (low + torch.linspace(0, 1, N, dtype=torch.float64) * (high - low)) ** rho
    sigmas[0], sigmas[-1] = ends  # exact, since the boundary condition is at σ_min
    return sigmas


def karras_process(sigmas: Tensor) -> DiffusionProcess:
    """Return the process x = x_0 + σ ε at any σ > 0, with σ as its time and a table of the given levels (T,)."""
    return DiffusionProcess(torch.ones_like(sigmas), sigmas, sigmas, levels_at=lambda s: (torch.ones_like(s), s))


class Preconditioned:
    """A denoiser D or, with ``sigma_min`` > 0, a consistency function f, made of a network F.

    Args:
        network: The network F, called as diffusers calls it.
        sigma_data: The standard deviation σ_d > 0 of the data.
        sigma_min: The level σ_0 ≥ 0 at which the result is x itself.
        time_scale: The factor k of the network's time k ln σ.
        through_skip: If False, the gradient with respect to x is that through F alone: in c_skip x, x is a constant.
    """

    def __init__(
        self,
        network: Callable[..., Any],
        sigma_data: float = 0.5,
        sigma_min: float = 0.0,
        time_scale: float = 250.0,
        through_skip: bool = True,
    ) -> None:
        self.network = network
        self.time_scale = time_scale
        self.sigma_data = sigma_data
        self.sigma_min = sigma_min
        self.through_skip = through_skip

    def __call__(self, x: Tensor, sigma: Tensor, **condition: Any) -> Tensor:
        """Return f(x, σ), with shape (B, *).

        Args:
            x: Noisy points, with shape (B, *).
            sigma: Their levels, with shape (B,).
            condition: Further keyword arguments of the network.
        """
        sigma = sigma.to(precise(sigma.dtype))
        time = (self.time_scale * sigma.log()).to(precise(x.dtype))
        s = broadcast(sigma, x)
        size = (s**2 + self.sigma_data**2).sqrt()
        c_skip = self.sigma_data**2 / ((s - self.sigma_min) ** 2 + self.sigma_data**2)
        c_out = (s - self.sigma_min) * self.sigma_data / size
        output = predict(self.network, (1 / size).to(x.dtype) * x, time, condition)
        # A learned variance is in further channels.
        output = output[:, : x.shape[1]].to(x.dtype)
        return c_skip.to(x.dtype) * (x if self.through_skip else x.detach()) + c_out.to(x.dtype) * output


class DiffusionDenoiser:
    """A denoiser D made of a network over the discrete times of a variance-preserving process.

    D(x, σ) calls the network with x/√(1 + σ²) at the time t with σ_t/α_t = σ, found by linear interpolation of
    ln(σ_t/α_t) between the times of the table. For σ outside the table, t is the first or last time, at which the
    network was trained for points with less (small σ) or more (large σ) signal.

    Args:
        network: The network, called as diffusers calls it.
        process: The process that the network was trained on, which must preserve variance.
        prediction: The parameterisation of the network: "epsilon", "sample" or "v_prediction".

    Raises:
        ValueError: If the process does not preserve variance, or the network predicts flow.
    """

    def __init__(
        self, network: Callable[..., Any], process: DiffusionProcess, prediction: Prediction = "epsilon"
    ) -> None:
        if prediction == "flow":
            raise ValueError("a model that predicts flow has no variance-preserving process")
        if not process.variance_preserving:
            raise ValueError("a denoiser over noise levels can be made of a variance-preserving diffusion model only")
        self.network = network
        self.process = process
        self.prediction: Prediction = prediction
        log_sigmas = (process.sigmas / process.alphas.clamp_min(1e-12)).log()
        self._log_range = float(log_sigmas[0]), float(log_sigmas[-1])
        self._log_sigmas, self._times = Table(log_sigmas), Table(process.times.to(torch.float64))

    def times(self, sigma: Tensor) -> Tensor:
        """Return the (fractional) times of levels (B,), with shape (B,), float64 (float32 on MPS)."""
        precision = double(sigma.device)
        log_sigmas = self._log_sigmas.on(sigma.device, precision)
        times = self._times.on(sigma.device, precision)
        log_sigma = sigma.to(precision).log().clamp(*self._log_range)
        above = torch.searchsorted(log_sigmas, log_sigma).clamp(1, len(log_sigmas) - 1)
        low, high = log_sigmas[above - 1], log_sigmas[above]
        return torch.lerp(times[above - 1], times[above], (log_sigma - low) / (high - low))

    def __call__(self, x: Tensor, sigma: Tensor, **condition: Any) -> Tensor:
        """Return D(x, σ), with shape (B, *)."""
        sigma = sigma.to(x.device)
        time = self.times(sigma).to(precise(x.dtype))
        exact = sigma.to(double(x.device))
        # The levels of σ itself, not of the table, so that x = x̂_0 + σ ε̂ holds exactly.
        scale = (1 + exact**2) ** -0.5
        alpha, sigma = (broadcast(level.to(x.dtype), x) for level in (scale, exact * scale))
        x_t = alpha * x
        output = predict(self.network, x_t, time, condition)[:, : x.shape[1]].to(x.dtype)
        return split_output(self.prediction, x_t, output, alpha, sigma)[0]


class OverTimes:
    """A network that predicts x_0 over the variance-preserving process of :meth:`process`, made of a denoiser D.

    Its time is the level σ, any positive number.
    """

    def __init__(self, denoise: Denoise) -> None:
        self.denoise = denoise

    @staticmethod
    def process(sigmas: Tensor) -> DiffusionProcess:
        """Return the process with levels 1/√(1 + σ²) and σ/√(1 + σ²) at any time σ > 0, with a table of times (T,)."""

        def levels(sigmas: Tensor) -> tuple[Tensor, Tensor]:
            scale = (1 + sigmas**2).sqrt()
            return 1 / scale, sigmas / scale

        sigmas = sigmas.cpu().double()  # not every device has float64
        return DiffusionProcess(*levels(sigmas), sigmas, levels_at=levels)

    def __call__(self, x_t: Tensor, sigma: Tensor, **condition: Any) -> Tensor:
        """Return x̂_0 for x_t = x/√(1 + σ²), with shape (B, *), and times σ, with shape (B,)."""
        sigma = sigma.to(x_t.device, precise(x_t.dtype)).expand(len(x_t))
        scale = broadcast((1 + sigma**2).sqrt().to(x_t.dtype), x_t)
        return self.denoise(scale * x_t, sigma, **condition)
