r"""The forward (noising) process, and the noise that corresponds to a perturbed noisy point.

A process gives each time t its signal level α_t and noise level σ_t:

    q(x_t | x_0) = N(α_t x_0, σ_t² I),        x_t = α_t x_0 + σ_t ε,   ε ~ N(0, I).

The levels are stored in a table of T times. Processes with continuous time (flow matching, EDM) also define them at
every other time, by functions.

A perturbation δ of the noisy point is equivalent to a change of its noise:

    x_t + δ = α_t x_0 + σ_t (ε + δ/σ_t),

so training at x_t + δ is ordinary training with the noise ε' = ε + δ/σ_t, which :meth:`DiffusionProcess.absorb` (or
:func:`absorb`, for a caller that has σ) returns. The target of each parameterisation (:data:`PREDICTIONS`) follows:

    epsilon       ε'
    sample        x_0
    v_prediction  α_t ε' − σ_t x_0
    flow          ε' − x_0                      (with α_t = 1 − t, σ_t = t)

:meth:`DiffusionProcess.split` is the inverse: it maps (x_t, prediction) to (x_0, ε).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from pydantic import Field, model_validator
from torch import Tensor

from robustdiff.errors import InputError
from robustdiff.section import Named, Times

__all__ = [
    "PREDICTIONS",
    "DiffusionProcess",
    "Prediction",
    "ProcessConfig",
    "Table",
    "absorb",
    "broadcast",
    "split_output",
]

Prediction = Literal["epsilon", "sample", "v_prediction", "flow"]
PREDICTIONS: tuple[str, ...] = get_args(Prediction)


def broadcast(values: Tensor, like: Tensor) -> Tensor:
    """Return one value for each sample, (B,), as (B, 1, …, 1), to multiply ``like`` (B, *)."""
    return values.reshape(-1, *(1,) * (like.ndim - 1))


class Table:
    """A table of one number for each of T times, copied once to every device and precision that uses it, so that a
    training pass neither copies from the host nor waits for it.

    Args:
        values: The numbers, with shape (T,), on the CPU.
    """

    def __init__(self, values: Tensor) -> None:
        # DiffusionProcess.index returns T for a time that is not in the table: the last entry is the value there.
        self._padded = torch.cat([values, values.new_full((1,), math.nan if values.is_floating_point() else -1)])
        self._copies: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def _on(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        if (device, dtype) not in self._copies:
            with torch.inference_mode(False):  # a copy that is made in sampling may be used in training
                # Rounded before it moves: not every device has float64.
                self._copies[device, dtype] = self._padded.to(dtype).to(device)
        return self._copies[device, dtype]

    def on(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return the numbers on a device, with shape (T,)."""
        return self._on(device, dtype)[:-1]

    def take(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the numbers at indices (B,) in [0, T], with shape (B,), on the device of the indices.

        At index T, which stands for an unknown time, the number is NaN (−1 in a table of integers).
        """
        # Not table[index], which would accept negative indices.
        return self._on(index.device, dtype).index_select(0, index.reshape(-1))

    def at(self, index: Tensor, like: Tensor) -> Tensor:
        """Return the numbers at indices (B,), shaped (B, 1, …, 1) to multiply ``like`` (B, *), in its precision."""
        return broadcast(self.take(index.to(like.device), like.dtype), like)


def _check_shapes(noise: Tensor, delta: Tensor) -> None:
    if noise.shape != delta.shape:
        raise ValueError(f"noise and delta must be of one shape; got {tuple(noise.shape)} and {tuple(delta.shape)}")


def _per_sample(name: str, given: Tensor | float, like: Tensor) -> Tensor:
    """Return the values if there is one for each sample of ``like`` (B, *), or one for all; else raise."""
    values = torch.as_tensor(given)
    if values.numel() not in (1, len(like)) or any(size != 1 for size in values.shape[1:]):
        raise ValueError(f"{name} must have shape (B,) with B = {len(like)}; got {tuple(values.shape)}")
    return values


def absorb(noise: Tensor, delta: Tensor, sigma: Tensor | float) -> Tensor:
    """Return the noise ε' = ε + δ/σ for which x_t + δ = α x_0 + σ ε', given σ itself.

    Use it in a training loop with x_t = (1 − σ) x_0 + σ ε (flow matching: SD3, Flux), x_t = x_0 + σ ε (EDM), or any
    other x_t = α x_0 + σ ε. δ is detached: no gradient reaches it through the target.

    Args:
        noise: The noise ε, with shape (B, *).
        delta: The perturbation δ of x_t, with shape (B, *).
        sigma: The noise level σ > 0 of each sample, with shape (B,) or (B, 1, …, 1); or one number for all samples.

    Raises:
        ValueError: If the shapes do not match, or σ is not positive. The second is checked on the CPU only.
    """
    _check_shapes(noise, delta)
    dtype = torch.promote_types(noise.dtype, delta.dtype)
    sigma = _per_sample("sigma", torch.as_tensor(sigma, dtype=dtype, device=noise.device), noise)
    if sigma.device.type == "cpu" and not bool((sigma > 0).all()):
        raise ValueError("sigma must be positive: without noise there is none that could absorb a perturbation")
    return noise + delta.detach() / broadcast(sigma, noise)


def split_output(
    prediction: Prediction, x_t: Tensor, output: Tensor, alpha: Tensor, sigma: Tensor
) -> tuple[Tensor, Tensor]:
    """Return x_0 and ε, each with shape (B, *), from a model's output at x_t, given α and σ (B, 1, …, 1).

    They solve the two linear equations x_t = α x_0 + σ ε and output = target(x_0, ε).
    """
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


class DiffusionProcess:
    """A Gaussian noising process.

    Args:
        alphas: The signal levels α_t, with shape (T,).
        sigmas: The noise levels σ_t > 0, with shape (T,).
        times: The time that is passed to the network for each index, with shape (T,). Default: the indices.
        levels_at: For continuous time, a function that maps floating-point times (B,), as passed to the network, to
            their levels (α, σ), each with shape (B,). With it, floating-point times need not be in the table.
        time_at: For continuous time that is drawn uniformly, a function that maps fractions u in (0, 1], with shape
            (B,), to floating-point times (B,); u = 1 is the noisiest time.
        scaled_by: The name of the scheduler that gives the network c_in x_t, and whether it has ᾱ_t; None if the
            network is called with x_t.

    Raises:
        ValueError: If the tables differ in shape, are empty, or contain a level that is not finite, an α_t < 0
            or a σ_t ≤ 0 (δ/σ_t would be undefined).
    """

    def __init__(
        self,
        alphas: Tensor,
        sigmas: Tensor,
        times: Tensor | None = None,
        *,
        levels_at: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None,
        time_at: Callable[[Tensor], Tensor] | None = None,
        scaled_by: tuple[str, bool] | None = None,
    ) -> None:
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
        self.levels_at, self.time_at, self._scaled_by = levels_at, time_at, scaled_by

    @classmethod
    def from_betas(cls, betas: Tensor) -> DiffusionProcess:
        """Return the variance-preserving process of Ho et al. (2020): ᾱ_t = Π(1 − β_s), α_t = √ᾱ_t, σ_t = √(1 − ᾱ_t).

        Args:
            betas: The variances β_t in (0, 1], with shape (T,).
        """
        return cls.from_alphas_cumprod(torch.cumprod(1.0 - torch.as_tensor(betas, dtype=torch.float64), dim=0))

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: Tensor) -> DiffusionProcess:
        """Return the variance-preserving process for a table of ᾱ_t in [0, 1), with shape (T,)."""
        alphas_cumprod = torch.as_tensor(alphas_cumprod, dtype=torch.float64, device="cpu")
        return cls(alphas_cumprod.sqrt(), (1.0 - alphas_cumprod).sqrt())

    @classmethod
    def linear(cls, T: int = 1000) -> DiffusionProcess:
        """Return the linear schedule: β_t from 0.0001 to 0.02, scaled by 1000/T (Ho et al., 2020, as in ADM).

        Raises:
            InputError: If T is 20 or less, where the last β_t would be 1 or more.
        """
        if T <= 20:
            raise InputError(f"the linear schedule needs more than 20 times, of which the last β is 20/T; got T={T}")
        scale = 1000 / T
        return cls.from_betas(torch.linspace(scale * 0.0001, scale * 0.02, T, dtype=torch.float64))

    @classmethod
    def cosine(cls, T: int = 1000) -> DiffusionProcess:
        """Return the cosine schedule of Nichol & Dhariwal (2021, equation 17).

        ᾱ(t) ∝ cos²(π/2 · (t + 0.008)/1.008), with β_t ≤ 0.999.
        """

        def alpha_bar(t: float) -> float:
            return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

        betas = [min(1 - alpha_bar((i + 1) / T) / alpha_bar(i / T), 0.999) for i in range(T)]
        return cls.from_betas(torch.tensor(betas, dtype=torch.float64))

    @classmethod
    def flow(cls, T: int = 1000, shift: float = 1.0, time_scale: float = 1000.0) -> DiffusionProcess:
        """Return rectified flow (Liu et al., 2023; Lipman et al., 2023): α = 1 − σ, σ = s u/(1 + (s − 1) u), 0 < u ≤ 1.

        Time is continuous: for any u, the time passed to the network is ``time_scale``·σ, as in diffusers'
        flow-matching schedulers. The table contains u = 1/T, …, 1. Its indices ascend with the noise, whereas the
        positions in ``scheduler.timesteps`` descend (:meth:`from_scheduler`).

        Args:
            T: The number of times in the table.
            shift: The shift s > 0; s > 1 moves the times towards the noise (Esser et al., 2024, equation 23).
            time_scale: The time that is passed to the network at σ = 1.

        Raises:
            ValueError: If ``shift`` is not positive and finite.
        """
        if not (shift > 0 and math.isfinite(shift)):
            raise ValueError(f"shift must be positive and finite; got {shift}")

        def shifted(u: Tensor) -> Tensor:
            return shift * u / (1 + (shift - 1) * u)

        sigmas = shifted(torch.arange(1, T + 1, dtype=torch.float64) / T)
        return cls(
            1.0 - sigmas,
            sigmas,
            time_scale * sigmas,
            levels_at=lambda t: (1 - t / time_scale, t / time_scale),
            time_at=lambda u: time_scale * shifted(u),
        )

    @classmethod
    def from_scheduler(cls, scheduler: Any) -> DiffusionProcess:
        """Return the process that a diffusers scheduler's ``add_noise`` (or ``scale_noise``) defines.

        α_t and σ_t are computed by calling the scheduler, so that x_t + δ = add_noise(x_0, absorb(ε, t, δ), t) for
        every accepted scheduler. α_t is √ᾱ_t for DDPM-like schedulers, 1 for Euler-like and EDM schedulers, and
        1 − σ_t for flow matching.

        The network of an Euler-like scheduler is called with x_t/√(1 + σ_t²). A loop that does so itself can use the
        process. Objectives and :func:`robustdiff.sample`, which call the network with x_t, refuse it
        (:meth:`check_network`).

        The ``add_noise`` of DPM-Solver, DEIS and UniPC is for sampling alone: before ``set_timesteps`` it adds the
        noise of time T − 1 − t at time t, and afterwards one level for all times that are not visited. These
        schedulers are refused. ``DDPMScheduler.from_config(scheduler.config)`` is the scheduler of their training.

        If the scheduler accepts the whole numbers 0 … T − 1 as timesteps, t is the timestep. Otherwise (flow matching,
        EDM, consistency models) t is a position in ``scheduler.timesteps``, which begin with the noisiest, or one of
        these floating-point timesteps.

        Raises:
            ValueError: If the scheduler does not add Gaussian noise at its own timesteps, adds none at one of them, or
                adds another noise at a timestep than its ``alphas_cumprod`` has.
        """
        from robustdiff.schedulers import process_of

        return process_of(scheduler)

    def __len__(self) -> int:
        return len(self.alphas)

    @property
    def variance_preserving(self) -> bool:
        """True if α_t² + σ_t² = 1 at every t."""
        return bool(torch.allclose(self.alphas**2 + self.sigmas**2, torch.ones_like(self.alphas)))

    @property
    def alphas_cumprod(self) -> Tensor:
        """The signal's share of the variance, ᾱ_t = α_t²/(α_t² + σ_t²), with shape (T,)."""
        return self.alphas**2 / (self.alphas**2 + self.sigmas**2)

    @property
    def betas(self) -> Tensor:
        """The variance of one step q(x_t | x_{t−1}), β_t = 1 − ᾱ_t/ᾱ_{t−1} with ᾱ_{−1} = 1, with shape (T,)."""
        return 1 - self.alphas_cumprod / self._alphas_cumprod_before

    @property
    def _alphas_cumprod_before(self) -> Tensor:
        """ᾱ_{t−1}, with ᾱ_{−1} = 1, with shape (T,)."""
        a = self.alphas_cumprod
        return torch.cat([a.new_ones(1), a[:-1]])

    @property
    def posterior_variance(self) -> Tensor:
        """The variance of q(x_{t−1} | x_t, x_0), β̃_t = β_t (1 − ᾱ_{t−1})/(1 − ᾱ_t), with shape (T,); 0 at t = 0."""
        return self.betas * (1 - self._alphas_cumprod_before) / (1 - self.alphas_cumprod)

    @property
    def log_variance_range(self) -> tuple[Tensor, Tensor]:
        """The bounds (log β̃_t, log β_t) of a learned log-variance, each with shape (T,).

        β̃_0 = 0 is replaced by β̃_1 (Nichol & Dhariwal, 2021, section 3.1, as in their code).
        """
        low = self.posterior_variance.clone()
        low[0] = low[1] if len(low) > 1 else self.betas[0]
        return low.log(), self.betas.log()

    def log_variances(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return log β̃_t and log β_t shaped (B, 1, …, 1), on the device and in the precision of ``like`` (B, *)."""
        index = self.index(t)
        low, high = self._log_variances
        return low.at(index, like), high.at(index, like)

    def posterior_mean(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the mean (B, *) of q(x_{t−1} | x_t, x_0) (Ho et al., 2020, equation 7).

        The process must preserve variance.
        """
        index = self.index(t)
        of_x0, of_x_t = self._posterior
        return of_x0.at(index, x0) * x0 + of_x_t.at(index, x_t) * x_t

    def respace(self, t: Tensor) -> DiffusionProcess:
        """Return the process restricted to given indices or times (S,), such as the times that a sampler visits.

        Raises:
            ValueError: If one of the times is not in the process.
        """
        t = t.cpu()
        levels, like = self._levels(t, t.device, torch.float64), torch.empty((), dtype=torch.float64)
        times = self.times_at(t, like)
        return DiffusionProcess(*levels, times, levels_at=self.levels_at, scaled_by=self._scaled_by)

    def check_network(self, prediction: Prediction) -> None:
        """Check that the process is one of a network that is called with x_t itself, without a factor.

        Objectives and samplers call the network so. The process of an Euler-like scheduler is for a network that is
        called with x_t/√(1 + σ_t²). That of an EDM or consistency scheduler is for a preconditioned network, which
        predicts x_0.

        Raises:
            InputError: If the process is one of a scheduler that scales the network's input, unless it is one of
                EDM or consistency models and ``prediction`` is "sample".
        """
        if self._scaled_by is None:
            return
        name, discrete = self._scaled_by
        if discrete:
            raise InputError(
                f"{name} gives the network x_t/√(1 + σ²), and here the network is called with x_t: take the process of "
                "DDPMScheduler.from_config(scheduler.config)"
            )
        if prediction != "sample":
            raise InputError(
                f"{name} gives the network a scaled x_t, and here the network is called with x_t: take the process and "
                "the model of Model.of(network, scheduler), or a preconditioned network with prediction='sample'"
            )

    def check_signal(self, prediction: Prediction) -> None:
        """Check that x_0 follows from a prediction at all times; from the noise it does not where α_t = 0.

        Raises:
            InputError: If it does not.
        """
        if prediction == "epsilon" and not bool((self.alphas > 0).all()):
            raise InputError(
                "prediction=epsilon does not go with a process that ends without any signal (zero terminal SNR, as by "
                "rescale_betas_zero_snr), where x_0 does not follow from the noise: such a network predicts "
                "v_prediction or sample"
            )

    def at(self, u: Tensor) -> Tensor:
        """Return the times (B,) at fractions u (B,) in (0, 1] of the process; for discrete time the ⌈uT⌉ − 1."""
        if self.time_at is not None:
            return self.time_at(u)
        return (u * len(self) * (1 - 1e-7)).ceil().long() - 1  # u·T may be rounded to just above a whole number

    def index(self, t: Tensor | float) -> Tensor:
        """Return the table indices of times (B,), with shape (B,), int64; or of one number, with shape ().

        Integer tensors are indices already; the values of floating-point tensors are looked up in ``times``.

        Tensors on a GPU are not read back: there, an index out of range raises a device error, and an unknown time
        gives the index T, at which levels are NaN.

        Raises:
            ValueError: If ``t`` is boolean or, on the CPU, an index is not in [0, T) or a time is not in ``times``.
        """
        t = torch.as_tensor(t)
        if t.dtype == torch.bool:
            raise ValueError("t is boolean: give time indices as whole numbers, or times")
        readable = t.device.type == "cpu" and t.numel() > 0
        if not t.is_floating_point():
            if readable and not 0 <= int(t.min()) <= int(t.max()) < len(self):
                raise ValueError(f"t must be in [0, {len(self)}); got {int(t.min())} to {int(t.max())}")
            return t.long()
        times, order = self._sorted_times
        precision = torch.promote_types(t.dtype, torch.float32)
        known, value = times.on(t.device, precision), t.to(precision)
        above = torch.searchsorted(known, value).clamp_max(len(self) - 1)
        below = (above - 1).clamp_min(0)
        nearest = torch.where((value - known[below]).abs() < (known[above] - value).abs(), below, above)
        # The tolerance is the rounding of float32, far below the distance of two times.
        found = (known[nearest] - value).abs() <= self._tolerance
        if readable and not bool(found.all()):
            raise ValueError(
                f"there is no time {float(value[~found].flatten()[0]):g} in this process of {len(self)} times from "
                f"{float(known[0]):g} to {float(known[-1]):g}: give its own times, or indices as whole numbers"
            )
        return torch.where(found, order.on(t.device, torch.int64)[nearest], len(self))

    def _levels(self, t: Tensor, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return α_t and σ_t, each with shape (B,); NaN for an unknown time on a GPU."""
        if self.levels_at is None or not t.is_floating_point():
            index = self.index(t).to(device)
            return self._alphas.take(index, dtype), self._sigmas.take(index, dtype)
        t = t.reshape(-1).to(torch.promote_types(t.dtype, torch.float32))
        alphas, sigmas = self.levels_at(t)
        known = (sigmas > 0) & (alphas >= 0) & sigmas.isfinite()
        if t.device.type == "cpu" and not bool(known.all()):
            most = "" if self.alphas.min() > 0 else f" and at most {float(self.times.max()):g}"
            raise ValueError(f"there is no time {float(t[~known][0]):g} in this process: its times are above 0{most}")
        alphas, sigmas = (torch.where(known, level, math.nan).to(device, dtype) for level in (alphas, sigmas))
        return alphas, sigmas

    def times_at(self, t: Tensor, like: Tensor) -> Tensor:
        """Return the times that the network receives with points ``like`` (B, *), with shape (B,), on their device.

        Integers stay integers. Other times have at least the precision of float32, in which neighbouring times differ.
        """
        dtype = self.times.dtype
        if self.times.is_floating_point():
            dtype = torch.promote_types(like.dtype, torch.float32)
        if self.levels_at is not None and t.is_floating_point():
            return t.reshape(-1).to(like.device, dtype)
        return self._times.take(self.index(t).to(like.device), dtype)

    def levels(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return α_t and σ_t shaped (B, 1, …, 1), on the device and in the precision of ``like`` (B, *).

        ``t`` (B,) holds indices, or floating-point times: any for continuous time, otherwise those of the table.
        """
        alphas, sigmas = self._levels(t, like.device, like.dtype)
        return broadcast(alphas, like), broadcast(sigmas, like)

    def sigmas_at(self, t: Tensor, like: Tensor) -> Tensor:
        """Return σ_t with shape (B,), on the device of ``like``, in at least float32 so that levels stay distinct."""
        return self._levels(t, like.device, torch.promote_types(like.dtype, torch.float32))[1]

    @cached_property
    def _alphas(self) -> Table:
        return Table(self.alphas)

    @cached_property
    def _sigmas(self) -> Table:
        return Table(self.sigmas)

    @cached_property
    def _times(self) -> Table:
        return Table(self.times)

    @cached_property
    def _sorted_times(self) -> tuple[Table, Table]:
        times, order = self.times.to(torch.float64).sort()
        return Table(times), Table(order)

    @cached_property
    def _tolerance(self) -> float:
        return 1e-6 * float(self.times.abs().max())

    @cached_property
    def _log_variances(self) -> tuple[Table, Table]:
        low, high = self.log_variance_range
        return Table(low), Table(high)

    @cached_property
    def _posterior(self) -> tuple[Table, Table]:
        """The factors of x_0 and x_t in :meth:`posterior_mean`."""
        a, before = self.alphas_cumprod, self._alphas_cumprod_before
        of_x0 = before.sqrt() * self.betas / (1 - a)
        return Table(of_x0), Table((1 - self.betas).sqrt() * (1 - before) / (1 - a))

    def _levels_of_batch(self, t: Tensor | float, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return :meth:`levels` at one time for each sample of ``like`` (B, *), or one time for all."""
        return self.levels(_per_sample("t", t, like), like)

    def diffuse(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Return x_t = α_t x_0 + σ_t ε (B, *) at time indices in [0, T), or times, ``t`` (B,)."""
        alpha, sigma = self._levels_of_batch(t, x0)
        return alpha * x0 + sigma * noise

    def absorb(self, noise: Tensor, t: Tensor | float, delta: Tensor) -> Tensor:
        """Return the noise ε' = ε + δ/σ_t for which x_t + δ = α_t x_0 + σ_t ε'.

        ε and δ have shape (B, *); ``t`` (B,) holds time indices in [0, T), or times, or one for all samples. δ is
        detached: no gradient reaches it through the target.

        Raises:
            ValueError: If the shapes do not match, or one of the times is not in the process.
        """
        _check_shapes(noise, delta)
        wider = noise if torch.promote_types(noise.dtype, delta.dtype) == noise.dtype else delta
        return noise + delta.detach() / self._levels_of_batch(t, wider)[1]

    def target(self, prediction: Prediction, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Return the training target of a parameterisation at x_t = α_t x_0 + σ_t ε, with shape (B, *)."""
        alpha, sigma = self._levels_of_batch(t, x0)
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
        """Return x_0 and ε, each with shape (B, *), from a model's output at x_t: the inverse of :meth:`target`."""
        return split_output(prediction, x_t, output, *self._levels_of_batch(t, x_t))


class ProcessConfig(Named):
    """The section ``process`` of a recipe."""

    name: Literal["cosine", "linear", "flow", "pretrained"] = Field(
        "cosine", description="the noise schedule; pretrained: that of the checkpoint"
    )
    T: Times = Field(
        1000,
        description="the number of times; flow: the size of the table for loss-second-moment alone, since times are "
        "otherwise drawn continuously and the saved scheduler has 1000",
    )
    shift: float = Field(1.0, gt=0, description="flow: the shift s; above 1, more of the times are noisy")

    @model_validator(mode="after")
    def _shifted(self) -> ProcessConfig:
        if self.shift != 1 and self.name != "flow":
            raise ValueError("process.shift is for process.name=flow")
        return self

    def build(self) -> DiffusionProcess:
        """Return the process.

        Raises:
            InputError: If the name is "pretrained", which only a checkpoint can supply.
        """
        match self.name:
            case "cosine":
                return DiffusionProcess.cosine(self.T)
            case "linear":
                return DiffusionProcess.linear(self.T)
            case "flow":
                return DiffusionProcess.flow(self.T, self.shift)
        raise InputError("process=pretrained needs model.name=pretrained: choose cosine, linear or flow")
