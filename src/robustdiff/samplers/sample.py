"""One entry for all samplers: :func:`sample`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from robustdiff.errors import InputError, RunError
from robustdiff.process import DiffusionProcess, Prediction
from robustdiff.samplers.ddim import ddim
from robustdiff.samplers.denoiser import Denoiser, DynamicThreshold, Evaluation
from robustdiff.samplers.dpmpp import dpmpp
from robustdiff.samplers.euler import euler, uniform
from robustdiff.samplers.guidance import guided
from robustdiff.samplers.iddpm import FIXED_VARIANCES, FixedVariance, iddpm
from robustdiff.samplers.multistep import multistep, scale_numbers
from robustdiff.samplers.spacing import SPACINGS, Spacing, check_steps, evenly_spaced, scheduled, strided
from robustdiff.samplers.time_shift import time_shift

__all__ = ["SAMPLERS", "Clip", "Sampler", "TimeSpacing", "check_options", "check_sampler", "sample", "suited"]

Clip = bool | float | DynamicThreshold
TimeSpacing = Spacing | Callable[[int, int], Tensor]
"""The choice of S times out of T: a name, or a function (S, T) ↦ S ascending indices (for euler also levels σ)."""


@dataclass(frozen=True)
class Sampler:
    """One sampler.

    Attributes:
        run: (denoiser, process, times, x_T, noises, **options) ↦ x_0.
        spacing: (S or a respacing string, T) ↦ its own times, ascending indices; none where they are not indices.
        strings: Whether guided-diffusion's respacing strings are for it.
        options: What it takes beside the arguments that all have.
    """

    run: Callable[..., Tensor]
    spacing: Callable[[int | str, int], Tensor] | None
    strings: bool = False
    options: tuple[str, ...] = ()


SAMPLERS: dict[str, Sampler] = {
    "ddim": Sampler(ddim, strided, True, ("set_alpha_to_one",)),
    "iddpm": Sampler(iddpm, evenly_spaced, True, ("variance",)),
    "es": Sampler(iddpm, evenly_spaced, True, ("variance",)),
    "time-shift": Sampler(time_shift, strided, True, ("window", "cutoff")),
    "dpm++": Sampler(dpmpp, None),
    "euler": Sampler(euler, uniform),
    "multistep": Sampler(multistep, None),
}
_ES_SCALE = 1.017


def suited(process: DiffusionProcess) -> tuple[str, ...]:
    """Return the samplers for a process: a diffusion model's, flow matching's, or a consistency model's (α = 1)."""
    if process.variance_preserving:
        return tuple(name for name in SAMPLERS if name not in ("euler", "multistep"))
    return ("multistep",) if bool((process.alphas == 1).all()) else ("euler",)


def check_sampler(
    sampler: str,
    steps: int | str,
    process: DiffusionProcess,
    spacing: TimeSpacing | None = None,
    steps_offset: int = 0,
) -> int:
    """Return the number of network evaluations for one image; the arguments are those of :func:`sample`.

    Raises:
        InputError: If the sampler does not exist, or does not suit the process, or cannot have these steps.
    """
    if sampler not in SAMPLERS:
        raise InputError(f"unknown sampler {sampler!r}: use one of {', '.join(SAMPLERS)}")
    if sampler not in (names := suited(process)):
        kind = {"multistep": "consistency model", "euler": "flow-matching model"}.get(names[0], "diffusion model")
        raise InputError(f"the sampler {sampler} does not suit this {kind}: use {' or '.join(names)}")
    times = _times(sampler, steps, process, spacing, steps_offset)
    if sampler == "multistep":
        return len(scale_numbers(times, len(process)))
    return len(times) if isinstance(times, Tensor) else check_steps(times, len(process))


def _times(
    sampler: str, steps: int | str, process: DiffusionProcess, spacing: TimeSpacing | None, steps_offset: int
) -> Any:
    """Return what a sampler takes as times: a tensor, or the steps themselves where it has points of its own."""
    kind, T = SAMPLERS[sampler], len(process)
    if isinstance(spacing, str) and spacing not in SPACINGS:
        raise InputError(f"unknown spacing {spacing!r}: use one of {', '.join(SPACINGS)}")
    if isinstance(steps, str):
        if sampler != "multistep" and not kind.strings:
            strings = ", ".join(name for name, other in SAMPLERS.items() if other.strings)
            raise InputError(f"{sampler} takes a number of steps, not {steps!r}: those are for {strings}")
        if isinstance(spacing, str) and spacing != "own":
            raise InputError(f"steps {steps!r} say the times themselves: leave spacing={spacing} out")
        spacing = None
    if sampler == "multistep":
        if isinstance(spacing, str) and spacing != "own":
            raise InputError(
                f"multistep has scales of its own, not spacing={spacing}: give them as steps, such as 0,22,39"
            )
        return steps
    if isinstance(steps, int):
        check_steps(steps, T)
        if callable(spacing):
            return spacing(steps, T)
        if spacing is not None and spacing != "own":
            return scheduled(spacing, steps, T, steps_offset)
    return steps if kind.spacing is None else kind.spacing(steps, T)


def check_options(
    sampler: str,
    evaluations: int,
    eps_scale: float | tuple[float, float] | None = None,
    **options: Any,
) -> tuple[float | tuple[float, float], dict[str, Any]]:
    """Return the epsilon scale, and the sampler's own options that are given; arguments as of :func:`sample`.

    Raises:
        InputError: If the sampler has no such option, or the scale is not positive at all times.
    """
    options = {name: value for name, value in options.items() if value is not None}
    for name in options:
        if name not in SAMPLERS[sampler].options:
            owners = [other for other, kind in SAMPLERS.items() if name in kind.options]
            raise InputError(f"{name} is for {' and '.join(owners) or 'no sampler'}, not for {sampler}")
    if options.get("variance") not in (None, *FIXED_VARIANCES):
        raise InputError(f"unknown variance {options['variance']!r}: use one of {', '.join(FIXED_VARIANCES)}")
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
    clip: Clip | None = None,
    class_labels: Tensor | None = None,
    prediction: Prediction = "epsilon",
    on_evaluation: Callable[[Evaluation], None] | None = None,
    *,
    condition: Mapping[str, Any] | None = None,
    guidance: float | None = None,
    unconditional: Mapping[str, Any] | None = None,
    spacing: TimeSpacing | None = None,
    steps_offset: int = 0,
    variance: FixedVariance | None = None,
    set_alpha_to_one: bool | None = None,
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
        clip: Whether x̂_0 is clipped to [−1, 1] in each step, as by default; a number c clips to [−c, c], a
            ``DynamicThreshold`` clips by dynamic thresholding. dpm++ clips by the last only.
        class_labels: Labels, with shape (n,).
        prediction: What the model predicts.
        on_evaluation: Called after each evaluation of the network with the sampler's state and what was made of it.
        condition: What else the model is called with, each a tensor with n rows.
        guidance: The scale g of classifier-free guidance (Ho & Salimans, 2022): the output becomes
            unconditional + g · (conditional − unconditional), in two evaluations for each step; 1 is none.
        unconditional: The empty condition, by the names of the condition: a tensor with n rows each, or a number, such
            as the null class for ``class_labels``.
        spacing: Which times are visited in a number of steps: "own" (the default, as the sampler's authors space them),
            "leading", "trailing" or "linspace" as in diffusers' schedulers, or (S, T) ↦ S ascending indices, for euler
            also S descending levels σ. For multistep "own" only.
        steps_offset: The first time of "leading".
        variance: iddpm, es: "fixed_small" (the default) or "fixed_large", where the network has not learned it.
        set_alpha_to_one: ddim: whether the last step ends at x̂_0, as by default, or at the noise of index 0.
        window: time-shift: the width of the window around a time, in training times; 30 by default.
        cutoff: time-shift: the training time from which on down nothing is shifted; 300 by default.

    Returns:
        Images, nominally in [−1, 1], with shape (n, C, H, W), on the device of the latents.

    Raises:
        InputError: If the sampler is unknown or does not suit the process, or has no such option, or an option or steps
            are out of range, or the model predicts noise where the process has no signal.
        RunError: If an evaluation of the network is not finite; the message names the first such step.
        ValueError: If neither or both of shape and latents are given, or the step noise has another shape.
    """
    if bool(process.sigmas[0] > process.sigmas[-1]):  # in the order of a flow-matching scheduler
        process = process.respace(torch.arange(len(process)).flip(0))
    evaluations = check_sampler(sampler, steps, process, spacing, steps_offset)
    own = {"variance": variance, "set_alpha_to_one": set_alpha_to_one, "window": window, "cutoff": cutoff}
    scale, options = check_options(sampler, evaluations, eps_scale, **own)
    if prediction == "epsilon" and not bool((process.alphas > 0).all()):
        raise InputError(
            "the process ends without any signal (zero terminal SNR), where x̂_0 does not follow from the noise: a "
            "network for it predicts v or x_0"
        )
    if not isinstance(clip, DynamicThreshold):
        clip = 1.0 if clip is None or clip is True else None if clip is False else float(clip)
        if clip is not None and not clip > 0:
            raise InputError(f"clip must be positive, or False for none; got {clip}")
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

    given = dict(condition or {})
    if class_labels is not None:
        given["class_labels"] = class_labels
    if guidance is not None and guidance != 1:
        model = guided(model, guidance, given, unconditional or {})
    finite: list[Tensor] = []
    denoiser = Denoiser(model, prediction, scale, clip, given, on_evaluation, finite)
    times = _times(sampler, steps, process, spacing, steps_offset)
    x = SAMPLERS[sampler].run(denoiser, process, times, latents, noises(), **options)
    finite.append(x.isfinite().all())
    if not all(whole := torch.stack(finite).tolist()):  # read once, and not in every step
        raise RunError(
            f"{sampler}: the network's output is not finite in step {min(whole.index(False) + 1, evaluations)} of "
            f"{evaluations}: check its weights, or sample in fp32"
        )
    return x
