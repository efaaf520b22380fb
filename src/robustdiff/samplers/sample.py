"""One entry for all samplers: :func:`sample`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from robustdiff.errors import InputError
from robustdiff.process import DiffusionProcess, Prediction
from robustdiff.samplers.ddim import ddim
from robustdiff.samplers.denoiser import Denoiser, Evaluation
from robustdiff.samplers.dpmpp import dpmpp
from robustdiff.samplers.euler import euler
from robustdiff.samplers.iddpm import iddpm
from robustdiff.samplers.multistep import multistep, scale_numbers
from robustdiff.samplers.spacing import check_steps
from robustdiff.samplers.time_shift import time_shift

__all__ = ["SAMPLERS", "Sampler", "check_options", "check_sampler", "sample", "suited"]

Sampler = Callable[..., Tensor]
"""(denoiser, process, steps, x_T, noises, **options of its own) ↦ x_0."""

SAMPLERS: dict[str, Sampler] = {
    "ddim": ddim,
    "iddpm": iddpm,
    "es": iddpm,
    "time-shift": time_shift,
    "dpm++": dpmpp,
    "euler": euler,
    "multistep": multistep,
}
_RESPACED = ("ddim", "iddpm", "es", "time-shift")
_ES_SCALE = 1.017


def suited(process: DiffusionProcess) -> tuple[str, ...]:
    """The samplers that suit a process: a diffusion model's, flow matching's, or a consistency model's (α = 1)."""
    if process.variance_preserving:
        return tuple(name for name in SAMPLERS if name not in ("euler", "multistep"))
    return ("multistep",) if bool((process.alphas == 1).all()) else ("euler",)


def check_sampler(sampler: str, steps: int | str, process: DiffusionProcess) -> int:
    """The number of network evaluations for one image.

    Raises:
        InputError: If the sampler does not exist, or does not suit the process, or cannot have these steps.
    """
    if sampler not in SAMPLERS:
        raise InputError(f"unknown sampler {sampler!r}: use one of {', '.join(SAMPLERS)}")
    if sampler not in (names := suited(process)):
        kind = {"multistep": "consistency model", "euler": "flow-matching model"}.get(names[0], "diffusion model")
        raise InputError(f"the sampler {sampler} does not suit this {kind}: use {' or '.join(names)}")
    if sampler == "multistep":
        return len(scale_numbers(steps, len(process)))
    if isinstance(steps, str) and sampler not in _RESPACED:
        raise InputError(f"{sampler} takes a number of steps, not {steps!r}: those are for {', '.join(_RESPACED)}")
    return check_steps(steps, len(process))


def check_options(
    sampler: str,
    evaluations: int,
    eps_scale: float | tuple[float, float] | None = None,
    window: int | None = None,
    cutoff: int | None = None,
) -> tuple[float | tuple[float, float], dict[str, int]]:
    """The epsilon scale, and what options the sampler has beside it; the arguments are those of :func:`sample`.

    Raises:
        InputError: If the sampler has no such option, or the scale is not positive at all times.
    """
    options = {name: value for name, value in (("window", window), ("cutoff", cutoff)) if value is not None}
    if options and sampler != "time-shift":
        raise InputError(f"{' and '.join(options)} is for time-shift, not for {sampler}")
    if eps_scale is not None and sampler == "multistep":
        raise InputError("eps_scale is for diffusion models: the sampler multistep has no predicted noise to scale")
    scale = eps_scale if eps_scale is not None else _ES_SCALE if sampler == "es" else 1.0
    if isinstance(scale, tuple):
        if sampler != "es":
            raise InputError(f"a linear eps_scale is for es, not for {sampler}")
        scales = [scale[1], scale[0] * (evaluations - 1) + scale[1]]
    else:
        scales = [scale]
    if not all(value > 0 and math.isfinite(value) for value in scales):
        raise InputError(f"eps_scale must be positive at all times; got {scale}")
    return scale, options


@torch.inference_mode()
def sample(
    model: Callable[..., Any],
    process: DiffusionProcess,
    sampler: str = "iddpm",
    steps: int | str = 10,
    shape: tuple[int, ...] | None = None,
    latents: Tensor | None = None,
    step_noise: Iterable[Tensor] | None = None,
    generator: torch.Generator | None = None,
    eps_scale: float | tuple[float, float] | None = None,
    clip: bool = True,
    class_labels: Tensor | None = None,
    prediction: Prediction = "epsilon",
    on_evaluation: Callable[[Evaluation], None] | None = None,
    *,
    window: int | None = None,
    cutoff: int | None = None,
) -> Tensor:
    """Sample images.

    Arguments:
        model: Called as diffusers calls it, ``model(x, t, class_labels=…).sample``, or returning a tensor. Put it into
            eval mode before. 2C output channels mean a learned variance, which iddpm and es use. For multistep a
            consistency function, ``Preconditioned(network, sigma_min=…)``, with ``prediction="sample"``.
        process: The process that it was trained on.
        sampler: One of :data:`SAMPLERS`.
        steps: Network evaluations, in [1, T]; for ddim, iddpm, es and time-shift also one of guided-diffusion's
            strings: "10", "10,20,30" (sections) or "ddim25"; for multistep, in [1, N − 1], or scales as "0,22,39".
        shape: (n, C, H, W), where ``latents`` are not given.
        latents: x_T, with shape (n, C, H, W); standard normal by default.
        step_noise: The noise of each step: (steps, n, C, H, W), or any iterable of (n, C, H, W), from the noisiest step
            on. Common random numbers: the same latents and step noise make samples of two models comparable one to one.
        generator: Where what is not given comes from.
        eps_scale: What ε̂ is divided by: a number, for es also (k, b), which is k·i + b at the i-th of the sampler's
            times, the least noisy being 0. For es 1.017 by default, what Ning et al. (2024) take on CIFAR-10 at 100
            steps (fewer steps want more); 1 for the others.
        clip: Whether x̂_0 is clipped to [−1, 1] in each step; dpm++ never does.
        class_labels: Labels, with shape (n,).
        prediction: What the model predicts.
        on_evaluation: Called after each evaluation of the network with the sampler's state and what was made of it.
        window: time-shift: the width of the window around a time, in training times; 30 by default.
        cutoff: time-shift: the training time from which on down nothing is shifted; 300 by default.

    Returns:
        Images, nominally in [−1, 1], with shape (n, C, H, W), on the device of the latents.

    Raises:
        InputError: If the sampler is unknown or does not suit the process, or has no such option, or an option or steps
            are out of range.
        ValueError: If neither or both of shape and latents are given, or the step noise has another shape.
    """
    evaluations = check_sampler(sampler, steps, process)
    scale, options = check_options(sampler, evaluations, eps_scale, window, cutoff)
    if latents is None:
        if shape is None:
            raise ValueError("give shape=(n, C, H, W), or latents")
        device = generator.device if generator is not None else getattr(model, "device", torch.device("cpu"))
        latents = torch.randn(shape, generator=generator, device=device)
    elif shape is not None and tuple(shape) != tuple(latents.shape):
        raise ValueError(f"shape {tuple(shape)} is not that of the latents, {tuple(latents.shape)}")
    start = latents

    def noises() -> Iterator[Tensor]:
        if step_noise is None:
            while True:
                device = generator.device if generator is not None else start.device
                yield torch.randn(start.shape, generator=generator, device=device, dtype=start.dtype).to(start.device)
        for noise in step_noise:
            if noise.shape != start.shape:
                raise ValueError(
                    f"step_noise of a step has shape {tuple(noise.shape)}, the latents {tuple(start.shape)}"
                )
            yield noise.to(start)
        raise ValueError(f"step_noise ended early: {sampler} in {steps} steps needs one for each step but the last")

    condition = {} if class_labels is None else {"class_labels": class_labels}
    denoiser = Denoiser(model, prediction, scale, clip, condition, on_evaluation)
    return SAMPLERS[sampler](denoiser, process, steps, latents, noises(), **options)
