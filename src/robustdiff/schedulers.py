"""The process that a diffusers scheduler describes, found by calling the scheduler."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from robustdiff.errors import InputError
from robustdiff.process import DiffusionProcess

__all__ = ["process_of"]


def process_of(scheduler: Any) -> DiffusionProcess:
    """Return the process of a scheduler, as :meth:`DiffusionProcess.from_scheduler` says.

    Raises:
        ValueError: If the scheduler describes none, or one with times at which δ cannot be absorbed.
    """
    name = type(scheduler).__name__
    cumprod = getattr(scheduler, "alphas_cumprod", None)
    config = getattr(scheduler, "config", None)
    if getattr(config, "use_flow_sigmas", False):
        shift = getattr(config, "flow_shift", 1.0)
        raise ValueError(
            f"{name} with use_flow_sigmas is for sampling alone: train with FlowMatchEulerDiscreteScheduler(shift="
            f"{shift:g}), and take its process, or DiffusionProcess.flow(T, {shift:g})"
        )
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
        # Continuous times, 0.25 ln σ, are those of a preconditioned network.
        discrete = cumprod is not None and getattr(config, "timestep_type", None) != "continuous"
        scaled = _scales_input(scheduler, times[sigmas.argmax()])
        process = DiffusionProcess(alphas, sigmas, times, scaled_by=(name, discrete) if scaled else None)
        if cumprod is not None and not times.is_floating_point():
            expected = cumprod.detach().cpu().double()[times]
            wrong = ~torch.isclose(process.alphas_cumprod, expected, rtol=1e-3, atol=1e-5)
            if bool(wrong.any()):
                raise InputError(
                    f"{name}.add_noise has another level of noise at timestep {int(times[wrong][0])} than its "
                    "alphas_cumprod, as it is for sampling alone: train with "
                    "DDPMScheduler.from_config(scheduler.config), and take its process"
                )
        return process
    if cumprod is not None:
        remedy = "train with DDPMScheduler.from_config(scheduler.config), and take its process"
    else:
        remedy = (
            "take the scheduler of training, such as DDPMScheduler or FlowMatchEulerDiscreteScheduler, or a "
            "process by name (DiffusionProcess.linear, cosine, flow); or, where the loop has σ, the factor of the "
            "noise in x_t, absorb(noise, delta, sigma)"
        )
    raise ValueError(
        f"{name} does not add Gaussian noise to a batch at timesteps of its own, so it describes no process: {remedy}"
    )


def _timesteps_of(scheduler: Any) -> list[Tensor]:
    """Return the timesteps (T,) to try with a scheduler: first whole numbers, then those of its table."""
    T = getattr(getattr(scheduler, "config", None), "num_train_timesteps", None)
    table = getattr(scheduler, "timesteps", None)
    table = None if table is None or len(table) == 0 else table.detach().cpu()
    whole = None if T is None or not hasattr(scheduler, "add_noise") else torch.arange(T)
    # Some schedulers silently replace a timestep that is not in their table by the last one.
    if whole is not None and hasattr(scheduler, "index_for_timestep"):
        whole = whole if table is not None and bool(torch.isin(whole.to(table.dtype), table).all()) else None
    if whole is None and table is not None and _levels_of(scheduler, table.max() + 1 + torch.arange(3)) is not None:
        table = None
    return [times for times in (whole, table) if times is not None]


def _levels_of(scheduler: Any, times: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return α and σ of a scheduler at timesteps (T,), each with shape (T,), float64; None if it refuses them."""

    def noisy(x0: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        asked = copy.deepcopy(scheduler)  # some schedulers store the first timestep that they are called with
        if hasattr(asked, "add_noise"):
            result: Tensor = asked.add_noise(x0, noise, times)
        else:
            result = asked.scale_noise(x0, times, noise)
        return result

    zeros = torch.zeros(len(times), 1, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(zeros.shape, generator=generator, dtype=torch.float64) for _ in range(2))
    some = torch.randperm(len(times), generator=generator)[:3]  # a batch instead of the whole table
    try:
        alpha, sigma = noisy(zeros + 1, zeros, times), noisy(zeros, zeros + 1, times)
        expected = (alpha * x0 + sigma * noise)[some]
        linear = torch.allclose(noisy(x0[some], noise[some], times[some]), expected, rtol=1e-6, atol=1e-6)
    except Exception:  # with timesteps that it does not support, a scheduler may raise anything
        return None
    return (alpha[:, 0], sigma[:, 0]) if linear else None


def _scales_input(scheduler: Any, time: Tensor) -> bool:
    """Return whether a scheduler gives the network a multiple of x_t, such as x_t/√(1 + σ²), at a timestep."""
    if not hasattr(scheduler, "scale_model_input"):
        return False
    x = torch.ones(1, 1)
    return not torch.equal(copy.deepcopy(scheduler).scale_model_input(x.clone(), time), x)
