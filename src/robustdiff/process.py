r"""The forward (noising) process, and what a perturbation of a noisy point means in it.

A process gives each time t its signal and noise levels,

    q(x_t | x_0) = N(α_t x_0, σ_t² I),        x_t = α_t x_0 + σ_t ε,   ε ~ N(0, I),

in a table of T times, and where time is continuous (flow matching, EDM) at every time as well, by functions.

Moving the noisy point by δ is exactly a change of its noise:

    x_t + δ = α_t x_0 + σ_t (ε + δ/σ_t),

so a model trained at x_t + δ is trained as usual, at the noise ε' = ε + δ/σ_t. That one line is
:meth:`DiffusionProcess.absorb`, and :func:`absorb` where σ is at hand; every parameterisation follows from it
(:data:`PREDICTIONS`):

    epsilon       ε'
    sample        x_0
    v_prediction  α_t ε' − σ_t x_0
    flow          ε' − x_0                      (with α_t = 1 − t, σ_t = t)

and each of them is inverted from (x_t, prediction) back to (x_0, ε) by :meth:`DiffusionProcess.split`.

Tables are float64 on the CPU. A device gets its copy of them once (:class:`Table`), so that a training pass neither
copies from the host nor waits for it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from pydantic import Field, model_validator
from torch import Tensor

from robustdiff.errors import InputError
from robustdiff.section import Named, Times

__all__ = ["PREDICTIONS", "DiffusionProcess", "Prediction", "ProcessConfig", "Table", "absorb", "broadcast"]

Prediction = Literal["epsilon", "sample", "v_prediction", "flow"]
PREDICTIONS: tuple[str, ...] = get_args(Prediction)


def broadcast(values: Tensor, like: Tensor) -> Tensor:
    """Return one value for each sample, (B,), as (B, 1, …, 1), to multiply ``like`` (B, *)."""
    return values.reshape(-1, *(1,) * (like.ndim - 1))


class Table:
    """One number for each of T times, with a copy for every device and precision in which it is used.

    Arguments:
        values: The numbers, with shape (T,), on the CPU.
    """

    def __init__(self, values: Tensor) -> None:
        # Behind the last number, where times that are not of the table are looked up (DiffusionProcess.index).
        self._padded = torch.cat([values, values.new_full((1,), math.nan if values.is_floating_point() else -1)])
        self._copies: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def _on(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        if (device, dtype) not in self._copies:
            with torch.inference_mode(False):  # made while sampling, it may be used in training
                # Rounded before it moves: not every device has float64.
                self._copies[device, dtype] = self._padded.to(dtype).to(device)
        return self._copies[device, dtype]

    def on(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return the numbers on a device, with shape (T,)."""
        return self._on(device, dtype)[:-1]

    def take(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the numbers at indices (B,) in [0, T], with shape (B,), on the device of the indices; NaN at T."""
        # Not table[index], which takes −1 for the last.
        return self._on(index.device, dtype).index_select(0, index.reshape(-1))

    def at(self, index: Tensor, like: Tensor) -> Tensor:
        """Return the numbers at indices (B,), shaped (B, 1, …, 1) to multiply ``like`` (B, *), in its precision."""
        return broadcast(self.take(index.to(like.device), like.dtype), like)


def absorb(noise: Tensor, delta: Tensor, sigma: Tensor | float) -> Tensor:
    """Return the noise ε' = ε + δ/σ at which x_t + δ is an ordinary noisy point, where the caller's loop has σ itself.

    For a loop with x_t = (1 − σ) x_0 + σ ε (flow matching: SD3, Flux) or x_t = x_0 + σ ε (EDM), and any other
    x_t = α x_0 + σ ε. δ is detached: it is the point at which we train, not a variable of the target.

    Arguments:
        noise: The noise ε, with shape (B, *).
        delta: The perturbation δ of x_t, with shape (B, *).
        sigma: The level σ > 0 of each sample, with shape (B,) or (B, 1, …, 1); or one number for all.

    Raises:
        ValueError: If the shapes do not belong together, or σ is not positive (tensors on a GPU are not read back for
            this check).
    """
    sigma = torch.as_tensor(sigma, dtype=noise.dtype, device=noise.device)
    if noise.shape != delta.shape:
        raise ValueError(f"noise and delta must be of one shape; got {tuple(noise.shape)} and {tuple(delta.shape)}")
    if sigma.numel() not in (1, len(noise)) or any(size != 1 for size in sigma.shape[1:]):
        raise ValueError(f"sigma must have shape (B,) with B = {len(noise)}; got {tuple(sigma.shape)}")
    if sigma.device.type == "cpu" and not bool((sigma > 0).all()):
        raise ValueError("sigma must be positive: without noise there is none that could absorb a perturbation")
    return noise + delta.detach() / broadcast(sigma, noise)


class DiffusionProcess:
    """A Gaussian noising process.

    Arguments:
        alphas: The signal levels α_t, with shape (T,).
        sigmas: The noise levels σ_t > 0, with shape (T,).
        times: The times that the network is given, by index, with shape (T,); the indices themselves by default.
        levels_at: Where time is continuous, the function that gives floating-point times (B,), as the network is given
            them, their levels (α, σ), each with shape (B,). Floating-point times need then not be in the table.
        time_at: Where time is continuous and drawn uniformly, the function that gives fractions u in (0, 1], with shape
            (B,), their floating-point times; 1 is the noisiest.

    Raises:
        ValueError: If the tables differ in shape, are empty, or hold a level that is not finite, an α_t < 0
            or a σ_t ≤ 0 (a step without noise cannot absorb a perturbation).
    """

    def __init__(
        self,
        alphas: Tensor,
        sigmas: Tensor,
        times: Tensor | None = None,
        *,
        levels_at: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None,
        time_at: Callable[[Tensor], Tensor] | None = None,
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
        self.levels_at, self.time_at = levels_at, time_at

    # -- by name ---------------------------------------------------------------------------------------------

    @classmethod
    def from_betas(cls, betas: Tensor) -> DiffusionProcess:
        """Return the variance-preserving process of Ho et al. (2020): ᾱ_t = Π(1 − β_s), α_t = √ᾱ_t, σ_t = √(1 − ᾱ_t).

        Arguments:
            betas: The variances β_t in (0, 1], with shape (T,).
        """
        return cls.from_alphas_cumprod(torch.cumprod(1.0 - torch.as_tensor(betas, dtype=torch.float64), dim=0))

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: Tensor) -> DiffusionProcess:
        """Return the variance-preserving process of a table ᾱ_t in [0, 1), with shape (T,)."""
        alphas_cumprod = torch.as_tensor(alphas_cumprod, dtype=torch.float64, device="cpu")
        return cls(alphas_cumprod.sqrt(), (1.0 - alphas_cumprod).sqrt())

    @classmethod
    def linear(cls, T: int = 1000) -> DiffusionProcess:
        """Return the process of β_t from 0.0001 to 0.02, linear, scaled by 1000/T (Ho et al., 2020, as in ADM)."""
        scale = 1000 / T
        return cls.from_betas(torch.linspace(scale * 0.0001, scale * 0.02, T, dtype=torch.float64))

    @classmethod
    def cosine(cls, T: int = 1000) -> DiffusionProcess:
        """Return that of ᾱ(t) ∝ cos²(π/2 · (t + 0.008)/1.008), β_t ≤ 0.999 (Nichol & Dhariwal, 2021, equation 17)."""

        def alpha_bar(t: float) -> float:
            return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

        betas = [min(1 - alpha_bar((i + 1) / T) / alpha_bar(i / T), 0.999) for i in range(T)]
        return cls.from_betas(torch.tensor(betas, dtype=torch.float64))

    @classmethod
    def flow(cls, T: int = 1000, shift: float = 1.0, time_scale: float = 1000.0) -> DiffusionProcess:
        """Return rectified flow (Liu et al., 2023; Lipman et al., 2023): α = 1 − σ, σ = s u/(1 + (s − 1) u), 0 < u ≤ 1.

        Time is continuous: the network is given 1000·σ, as diffusers' flow-matching schedulers give it, for any u. The
        table has u = 1/T, …, 1; its indices ascend with the noise, and the positions in ``scheduler.timesteps``
        descend (:meth:`from_scheduler`).

        Arguments:
            T: The number of times of the table.
            shift: s > 0; above 1 it moves the times towards the noise (Esser et al., 2024, equation 23).
            time_scale: The time that the network is given at σ = 1.
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
        """Return the process in which a diffusers scheduler's ``add_noise`` (or ``scale_noise``) puts x_0.

        The scheduler itself is asked for α_t and σ_t, so that x_t + δ = add_noise(x_0, absorb(ε, t, δ), t) for every
        kind that is accepted. α_t is √ᾱ_t for DDPM-like schedulers, 1 for Euler-like and EDM ones, 1 − σ_t for flow
        matching.

        Where the scheduler takes the whole numbers 0 … T − 1 as timesteps, t is the timestep. Elsewhere (flow matching,
        EDM, consistency models) t is a position in ``scheduler.timesteps``, from the noisiest on, or one of these
        floating-point timesteps.

        Raises:
            ValueError: If the scheduler does not add Gaussian noise at timesteps of its own, or none at one of them.
        """
        name = type(scheduler).__name__
        for times in _timesteps_of(scheduler):
            levels = _levels_of(scheduler, times)
            if levels is None:
                continue
            alphas, sigmas = levels
            bad = ~((alphas >= 0) & (sigmas > 0) & alphas.isfinite() & sigmas.isfinite())
            if bool(bad.any()):
                raise ValueError(
                    f"{name} has α = {alphas[bad][0]:g}, σ = {sigmas[bad][0]:g} at timestep {times[bad][0]:g}, where "
                    "no perturbation can become noise: take betas that are all above 0, or for flow matching "
                    "DiffusionProcess.flow(T, shift)"
                )
            return cls(alphas, sigmas, times)
        raise ValueError(
            f"{name} does not add Gaussian noise to a batch at timesteps of its own, so it describes no process: take "
            "the scheduler of training, such as DDPMScheduler or FlowMatchEulerDiscreteScheduler, or a process by name "
            "(DiffusionProcess.linear, cosine, flow)"
        )

    # -- what it does ----------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.alphas)

    @property
    def variance_preserving(self) -> bool:
        """Return whether α_t² + σ_t² = 1 at every t."""
        return bool(torch.allclose(self.alphas**2 + self.sigmas**2, torch.ones_like(self.alphas)))

    @property
    def alphas_cumprod(self) -> Tensor:
        """Return ᾱ_t = α_t²/(α_t² + σ_t²), with shape (T,): the signal's share of the variance."""
        return self.alphas**2 / (self.alphas**2 + self.sigmas**2)

    @property
    def betas(self) -> Tensor:
        """Return β_t = 1 − ᾱ_t/ᾱ_{t−1}, with ᾱ_{−1} = 1 and shape (T,): the variance of one step q(x_t | x_{t−1})."""
        a = self.alphas_cumprod
        return 1 - a / torch.cat([a.new_ones(1), a[:-1]])

    @property
    def posterior_variance(self) -> Tensor:
        """Return β̃_t = β_t (1 − ᾱ_{t−1})/(1 − ᾱ_t), (T,): the variance of q(x_{t−1} | x_t, x_0); 0 at t = 0."""
        a = self.alphas_cumprod
        before = torch.cat([a.new_ones(1), a[:-1]])
        return self.betas * (1 - before) / (1 - a)

    @property
    def log_variance_range(self) -> tuple[Tensor, Tensor]:
        """Return (log β̃_t, log β_t), each with shape (T,): the two ends between which a learned variance lies.

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
        """Return the mean (B, *) of q(x_{t−1} | x_t, x_0), variance-preserving (Ho et al., 2020, equation 7)."""
        index = self.index(t)
        of_x0, of_x_t = self._posterior
        return of_x0.at(index, x0) * x0 + of_x_t.at(index, x_t) * x_t

    def respace(self, t: Tensor) -> DiffusionProcess:
        """Return the process at some of its times only, indices or times (S,): the table of a sampler with fewer steps.

        Raises:
            ValueError: If the process has no such time.
        """
        t = t.cpu()
        levels, like = self._levels(t, t.device, torch.float64), torch.empty((), dtype=torch.float64)
        return DiffusionProcess(*levels, self.times_at(t, like), levels_at=self.levels_at)

    def at(self, u: Tensor) -> Tensor:
        """Return the times at fractions u in (0, 1] of the process, (B,): indices ⌈uT⌉ − 1 where time is discrete."""
        if self.time_at is not None:
            return self.time_at(u)
        return (u * len(self) * (1 - 1e-7)).ceil().long() - 1  # less than whole numbers that were rounded up

    def index(self, t: Tensor) -> Tensor:
        """Return the indices (B,), int64, of times in the table: whole numbers are indices, others are in ``times``.

        A tensor on a GPU is not read back. There an index that is out of range is an error of the device, and a time
        that the process does not have makes NaN of all that is computed from it.

        Raises:
            ValueError: If ``t`` is boolean, an index is not in [0, T), or ``times`` has no such time.
        """
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
        # As wide as the rounding of float32, which is far below the distance of two times.
        found = (known[nearest] - value).abs() <= self._tolerance
        if readable and not bool(found.all()):
            raise ValueError(
                f"there is no time {float(value[~found].flatten()[0]):g} in this process of {len(self)} times from "
                f"{float(known[0]):g} to {float(known[-1]):g}: give its own times, or indices as whole numbers"
            )
        return torch.where(found, order.on(t.device, torch.int64)[nearest], len(self))

    def _levels(self, t: Tensor, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return α_t and σ_t, each (B,); where a GPU has no such time, NaN."""
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
        """Return what a network is given as the times of points ``like`` (B, *), with shape (B,), on their device.

        Whole numbers stay whole; others are never below float32, in which neighbouring times differ.
        """
        dtype = self.times.dtype
        if self.times.is_floating_point():
            dtype = torch.promote_types(like.dtype, torch.float32)
        if self.levels_at is not None and t.is_floating_point():
            return t.reshape(-1).to(like.device, dtype)
        return self._times.take(self.index(t).to(like.device), dtype)

    def levels(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return α_t and σ_t shaped (B, 1, …, 1), on the device and in the precision of ``like`` (B, *).

        Times (B,) are indices, or floating-point times: any where time is continuous, elsewhere those of the table.
        """
        alphas, sigmas = self._levels(t, like.device, like.dtype)
        return broadcast(alphas, like), broadcast(sigmas, like)

    def sigmas_at(self, t: Tensor, like: Tensor) -> Tensor:
        """Return σ_t with shape (B,), on the device of ``like`` and never below float32, in which levels differ."""
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
        """Return the factors of x_0 and x_t in :meth:`posterior_mean`."""
        a = self.alphas_cumprod
        before = torch.cat([a.new_ones(1), a[:-1]])
        of_x0 = before.sqrt() * self.betas / (1 - a)
        return Table(of_x0), Table((1 - self.betas).sqrt() * (1 - before) / (1 - a))

    def diffuse(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Return x_t = α_t x_0 + σ_t ε, with shape (B, *).

        Arguments:
            x0: Clean samples, with shape (B, *).
            t: Time indices in [0, T), or times, with shape (B,).
            noise: The noise ε, with shape (B, *).
        """
        alpha, sigma = self.levels(t, x0)
        return alpha * x0 + sigma * noise

    def absorb(self, noise: Tensor, t: Tensor, delta: Tensor) -> Tensor:
        """Return the noise ε' = ε + δ/σ_t at which x_t + δ is an ordinary noisy point.

        δ is detached: it is the point at which we train, not a variable of the target.

        Arguments:
            noise: The noise ε, with shape (B, *).
            t: Time indices in [0, T), or times, with shape (B,).
            delta: The perturbation δ of x_t, with shape (B, *).

        Raises:
            ValueError: If the process has no such time.
        """
        return noise + delta.detach() / self.levels(t, noise)[1]

    def target(self, prediction: Prediction, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Return what a model of a parameterisation is to predict at x_t = α_t x_0 + σ_t ε, with shape (B, *)."""
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
        """Return the (x_0, ε) that a model's output means at x_t, each (B, *): the inverse of :meth:`target`.

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


def _timesteps_of(scheduler: Any) -> list[Tensor]:
    """Return the timesteps (T,) that a scheduler may be asked for: whole numbers first, then those of its table."""
    T = getattr(getattr(scheduler, "config", None), "num_train_timesteps", None)
    table = getattr(scheduler, "timesteps", None)
    table = None if table is None or len(table) == 0 else table.detach().cpu()
    whole = None if T is None or not hasattr(scheduler, "add_noise") else torch.arange(T)
    # Some take a timestep that is not in their table for its last one, and say nothing.
    if whole is not None and hasattr(scheduler, "index_for_timestep"):
        whole = whole if table is not None and bool(torch.isin(whole.to(table.dtype), table).all()) else None
    if whole is None and table is not None and _levels_of(scheduler, table.max() + 1 + torch.arange(3)) is not None:
        table = None
    return [times for times in (whole, table) if times is not None]


def _levels_of(scheduler: Any, times: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return the α and σ of a scheduler at timesteps (T,), each with shape (T,), float64; None if it has none there."""

    def noisy(x0: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        asked = copy.deepcopy(scheduler)  # some remember the timestep that they were asked for first
        if hasattr(asked, "add_noise"):
            result: Tensor = asked.add_noise(x0, noise, times)
        else:
            result = asked.scale_noise(x0, times, noise)
        return result

    zeros = torch.zeros(len(times), 1, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(zeros.shape, generator=generator, dtype=torch.float64) for _ in range(2))
    some = torch.randperm(len(times), generator=generator)[:3]  # a batch, and not the whole table
    try:
        alpha, sigma = noisy(zeros + 1, zeros, times), noisy(zeros, zeros + 1, times)
        expected = (alpha * x0 + sigma * noise)[some]
        linear = torch.allclose(noisy(x0[some], noise[some], times[some]), expected, rtol=1e-6, atol=1e-6)
    except Exception:  # a scheduler that is asked for what it does not have raises anything
        return None
    return (alpha[:, 0], sigma[:, 0]) if linear else None


class ProcessConfig(Named):
    """The section ``process`` of a recipe."""

    name: Literal["cosine", "linear", "flow", "pretrained"] = Field(
        "cosine", description="pretrained: the one that the checkpoint was trained with"
    )
    T: Times = Field(1000, description="the number of times")
    shift: float = Field(1.0, gt=0, description="flow: above 1 more of the times are noisy")

    @model_validator(mode="after")
    def _shifted(self) -> ProcessConfig:
        if self.shift != 1 and self.name != "flow":
            raise ValueError("process.shift is for process.name=flow")
        return self

    def build(self) -> DiffusionProcess:
        """Make the process.

        Raises:
            InputError: If it is that of a checkpoint.
        """
        match self.name:
            case "cosine":
                return DiffusionProcess.cosine(self.T)
            case "linear":
                return DiffusionProcess.linear(self.T)
            case "flow":
                return DiffusionProcess.flow(self.T, self.shift)
        raise InputError("process=pretrained needs model.name=pretrained: choose cosine, linear or flow")
