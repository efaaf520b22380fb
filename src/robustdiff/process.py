r"""The forward (noising) process, and what a perturbation of a noisy point means in it.

A process is a table of signal and noise levels, one pair for each of T discrete times,

    q(x_t | x_0) = N(α_t x_0, σ_t² I),        x_t = α_t x_0 + σ_t ε,   ε ~ N(0, I).

Moving the noisy point by δ is exactly a change of its noise:

    x_t + δ = α_t x_0 + σ_t (ε + δ/σ_t),

so a model trained at x_t + δ is trained as usual, at the noise ε' = ε + δ/σ_t. That one line is
:meth:`DiffusionProcess.absorb`; every parameterisation follows from it (:data:`PREDICTIONS`):

    epsilon       ε'
    sample        x_0
    v_prediction  α_t ε' − σ_t x_0
    flow          ε' − x_0                      (with α_t = 1 − t, σ_t = t)

and each of them is inverted from (x_t, prediction) back to (x_0, ε) by :meth:`DiffusionProcess.split`.
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor

__all__ = ["PREDICTIONS", "DiffusionProcess", "Prediction", "broadcast", "per_sample"]

Prediction = Literal["epsilon", "sample", "v_prediction", "flow"]
PREDICTIONS: tuple[str, ...] = get_args(Prediction)


def broadcast(values: Tensor, like: Tensor) -> Tensor:
    """One value for each sample, (B,), as (B, 1, …, 1), to multiply ``like`` (B, *)."""
    return values.reshape(-1, *(1,) * (like.ndim - 1))


def per_sample(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """table[t], rounded to the precision of ``like`` (B, *) and shaped (B, 1, …, 1) to multiply it.

    Arguments:
        table: One value for each time, with shape (T,), float64.
        t: Time indices in [0, T), with shape (B,).
        like: A batch, with shape (B, *).
    """
    # Rounded before it moves: not every device has float64.
    return broadcast(table.to(like.dtype).to(like.device, non_blocking=True)[t], like)


class DiffusionProcess:
    """A discrete-time Gaussian noising process.

    Arguments:
        alphas: The signal levels α_t, with shape (T,).
        sigmas: The noise levels σ_t > 0, with shape (T,).
        times: What the network is given as the time of index t, with shape (T,); the index itself by default.

    Raises:
        ValueError: If the tables differ in shape, are empty, or hold a level that is not finite, an α_t < 0
            or a σ_t ≤ 0 (a step without noise cannot absorb a perturbation).
    """

    def __init__(self, alphas: Tensor, sigmas: Tensor, times: Tensor | None = None) -> None:
        alphas = torch.as_tensor(alphas, dtype=torch.float64, device="cpu")
        sigmas = torch.as_tensor(sigmas, dtype=torch.float64, device="cpu")
        if alphas.ndim != 1 or alphas.shape != sigmas.shape or len(alphas) == 0:
            raise ValueError(
                f"alphas and sigmas must both be of one shape (T,), T > 0; got {tuple(alphas.shape)} and "
                f"{tuple(sigmas.shape)}"
            )
        if not bool((alphas.isfinite() & sigmas.isfinite() & (alphas >= 0) & (sigmas > 0)).all()):
            raise ValueError("every alpha must be finite and ≥ 0, and every sigma finite and > 0")
        self.alphas = alphas
        self.sigmas = sigmas
        self.times = torch.arange(len(alphas)) if times is None else torch.as_tensor(times, device="cpu")

    # -- by name ---------------------------------------------------------------------------------------------

    @classmethod
    def from_betas(cls, betas: Tensor) -> DiffusionProcess:
        """The variance-preserving process of Ho et al. (2020): ᾱ_t = Π(1 − β_s), α_t = √ᾱ_t, σ_t = √(1 − ᾱ_t).

        Arguments:
            betas: The variances β_t in (0, 1], with shape (T,).
        """
        return cls._from_alphas_cumprod(torch.cumprod(1.0 - torch.as_tensor(betas, dtype=torch.float64), dim=0))

    @classmethod
    def _from_alphas_cumprod(cls, alphas_cumprod: Tensor) -> DiffusionProcess:
        alphas_cumprod = torch.as_tensor(alphas_cumprod, dtype=torch.float64, device="cpu")
        return cls(alphas_cumprod.sqrt(), (1.0 - alphas_cumprod).sqrt())

    @classmethod
    def linear(cls, T: int = 1000) -> DiffusionProcess:
        """Linear β_t from 0.0001 to 0.02, scaled by 1000/T (Ho et al., 2020, as in ADM)."""
        scale = 1000 / T
        return cls.from_betas(torch.linspace(scale * 0.0001, scale * 0.02, T, dtype=torch.float64))

    @classmethod
    def cosine(cls, T: int = 1000) -> DiffusionProcess:
        """ᾱ(t) ∝ cos²(π/2 · (t + 0.008)/1.008), with β_t ≤ 0.999 (Nichol & Dhariwal, 2021, equation 17)."""

        def alpha_bar(t: float) -> float:
            return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

        betas = [min(1 - alpha_bar((i + 1) / T) / alpha_bar(i / T), 0.999) for i in range(T)]
        return cls.from_betas(torch.tensor(betas, dtype=torch.float64))

    @classmethod
    def flow(cls, T: int = 1000) -> DiffusionProcess:
        """Rectified flow (Liu et al., 2023; Lipman et al., 2023): α_t = 1 − t, σ_t = t at t = 1/T, 2/T, …, 1.

        The network is given 1000·t, as diffusers' flow-matching schedulers give it.
        """
        t = torch.arange(1, T + 1, dtype=torch.float64) / T
        return cls(1.0 - t, t, times=1000.0 * t)

    @classmethod
    def from_scheduler(cls, scheduler: Any) -> DiffusionProcess:
        """The process of any diffusers scheduler that has ``alphas_cumprod``.

        Raises:
            ValueError: If the scheduler has none.
        """
        if not hasattr(scheduler, "alphas_cumprod"):
            raise ValueError(
                f"{type(scheduler).__name__} has no alphas_cumprod, so it defines no discrete diffusion process: "
                "use a DDPM-like scheduler, or DiffusionProcess.flow() for flow matching"
            )
        return cls._from_alphas_cumprod(scheduler.alphas_cumprod)

    # -- what it does ----------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.alphas)

    @property
    def variance_preserving(self) -> bool:
        """Whether α_t² + σ_t² = 1 at every t."""
        return bool(torch.allclose(self.alphas**2 + self.sigmas**2, torch.ones_like(self.alphas)))

    @property
    def alphas_cumprod(self) -> Tensor:
        """ᾱ_t = α_t²/(α_t² + σ_t²), with shape (T,): the signal's share of the variance."""
        return self.alphas**2 / (self.alphas**2 + self.sigmas**2)

    @property
    def betas(self) -> Tensor:
        """β_t = 1 − ᾱ_t/ᾱ_{t−1}, with ᾱ_{−1} = 1 and shape (T,): the variance of one step q(x_t | x_{t−1})."""
        a = self.alphas_cumprod
        return 1 - a / torch.cat([a.new_ones(1), a[:-1]])

    @property
    def posterior_variance(self) -> Tensor:
        """β̃_t = β_t (1 − ᾱ_{t−1})/(1 − ᾱ_t), with shape (T,): the variance of q(x_{t−1} | x_t, x_0); 0 at t = 0."""
        a = self.alphas_cumprod
        before = torch.cat([a.new_ones(1), a[:-1]])
        return self.betas * (1 - before) / (1 - a)

    @property
    def log_variance_range(self) -> tuple[Tensor, Tensor]:
        """(log β̃_t, log β_t), each with shape (T,): the two ends between which a learned variance lies.

        β̃_0 = 0 is replaced by β̃_1 (Nichol & Dhariwal, 2021, section 3.1, as in their code).
        """
        low = self.posterior_variance.clone()
        low[0] = low[1] if len(low) > 1 else self.betas[0]
        return low.log(), self.betas.log()

    def posterior_mean(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The mean of q(x_{t−1} | x_t, x_0) of a variance-preserving process (Ho et al., 2020, equation 7), (B, *)."""
        a = self.alphas_cumprod
        before = torch.cat([a.new_ones(1), a[:-1]])
        of_x0 = before.sqrt() * self.betas / (1 - a)
        of_x_t = (1 - self.betas).sqrt() * (1 - before) / (1 - a)
        return per_sample(of_x0, t, x0) * x0 + per_sample(of_x_t, t, x_t) * x_t

    def respace(self, indices: Tensor) -> DiffusionProcess:
        """The process seen at some of its times only: the table of a sampler with fewer steps.

        Arguments:
            indices: Ascending time indices in [0, T), with shape (S,).
        """
        return DiffusionProcess(self.alphas[indices], self.sigmas[indices], self.times[indices])

    def levels(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """α_t and σ_t shaped (B, 1, …, 1), on the device and in the precision of ``like`` (B, *)."""
        return per_sample(self.alphas, t, like), per_sample(self.sigmas, t, like)

    def diffuse(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t = α_t x_0 + σ_t ε.

        Arguments:
            x0: Clean samples, with shape (B, *).
            t: Time indices in [0, T), with shape (B,).
            noise: The noise ε, with shape (B, *).
        """
        alpha, sigma = self.levels(t, x0)
        return alpha * x0 + sigma * noise

    def absorb(self, noise: Tensor, t: Tensor, delta: Tensor) -> Tensor:
        """The noise ε' = ε + δ/σ_t at which x_t + δ is an ordinary noisy point.

        δ is detached: it is the point at which we train, not a variable of the target.

        Arguments:
            noise: The noise ε, with shape (B, *).
            t: Time indices in [0, T), with shape (B,).
            delta: The perturbation δ of x_t, with shape (B, *).
        """
        return noise + delta.detach() / self.levels(t, noise)[1]

    def target(self, prediction: Prediction, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """What a model of the given parameterisation should predict at x_t = α_t x_0 + σ_t ε, with shape (B, *)."""
        alpha, sigma = self.levels(t, x0)
        match prediction:
            case "epsilon":
                return noise
            case "sample":
                return x0
            case "v_prediction":
                return alpha * noise - sigma * x0
            case "flow":
                return noise - x0
        raise ValueError(f"unknown prediction {prediction!r}: use one of {', '.join(PREDICTIONS)}")

    def split(self, prediction: Prediction, x_t: Tensor, t: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        """The (x_0, ε) that a model's output means at x_t, each with shape (B, *): the inverse of :meth:`target`.

        x_t = α x_0 + σ ε and output = target(x_0, ε) are two linear equations in x_0 and ε.
        """
        alpha, sigma = self.levels(t, x_t)
        match prediction:
            case "epsilon":
                return (x_t - sigma * output) / alpha, output
            case "sample":
                return output, (x_t - alpha * output) / sigma
            case "v_prediction":
                total = alpha**2 + sigma**2
                return (alpha * x_t - sigma * output) / total, (sigma * x_t + alpha * output) / total
            case "flow":
                total = alpha + sigma
                return (x_t - sigma * output) / total, (x_t + alpha * output) / total
        raise ValueError(f"unknown prediction {prediction!r}: use one of {', '.join(PREDICTIONS)}")
