"""One entry for all samplers: :func:`sample`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from robustdiff.errors import InputError, RunError
from robustdiff.process import DiffusionProcess, Prediction
from robustdiff.samplers.denoiser import Denoiser, DynamicThreshold, Evaluation
from robustdiff.samplers.guidance import guided
from robustdiff.samplers.sampler import SAMPLERS, Path, Sampler, TimeSpacing

__all__ = ["SAMPLERS", "Clip", "Plan", "TimeSpacing", "check_sampler", "sample", "suited"]

Clip = bool | float | DynamicThreshold


@dataclass(frozen=True)
class Plan:
    """A sampler with its options, and the path that it takes: one evaluation of the network at each point."""

    sampler: Sampler
    path: Path


def suited(process: DiffusionProcess) -> tuple[str, ...]:
    """Return the names of the samplers for a process, the one that is taken by default first."""
    names = [name for name, kind in SAMPLERS.items() if kind.suits(process)]
    return tuple(sorted(names, key=lambda name: not SAMPLERS[name].default))


def check_sampler(
    sampler: str,
    steps: int | str,
    process: DiffusionProcess,
    spacing: TimeSpacing | None = None,
    steps_offset: int = 0,
    **options: Any,
) -> Plan:
    """Return what :func:`sample` does; the arguments are those of :func:`sample`.

    Raises:
        InputError: If the sampler does not exist, or does not suit the process, or cannot have these steps, or has no
            such option, or an option is out of range.
    """
    kind = SAMPLERS[sampler]
    if bool(process.sigmas[0] > process.sigmas[-1]):  # in the order of a flow-matching scheduler
        process = process.respace(torch.arange(len(process)).flip(0))
    if not kind.suits(process):
        names = suited(process)
        model = SAMPLERS[names[0]].model if names else "process"
        remedy = f"use {' or '.join(names)}" if names else "no sampler does"
        raise InputError(f"the sampler {sampler} does not suit this {model}: {remedy} ({sampler} needs {kind.needs})")
    given = {name: value for name, value in options.items() if value is not None}
    for name in given:
        if name not in kind.model_fields:
            owners = [other for other, one in SAMPLERS.items() if name in one.model_fields]
            raise InputError(f"{name} is for {' and '.join(owners) or 'no sampler'}, not for {sampler}")
    try:
        chosen = kind(**given)
    except ValidationError as error:
        first = error.errors()[0]
        message = first["msg"].removeprefix("Value error, ")
        raise InputError(f"{first['loc'][0]} of {sampler}: {message}; got {first['input']!r}") from None
    path = chosen.path(steps, process, spacing, steps_offset)
    k, b = chosen.eps_scale if isinstance(chosen.eps_scale, tuple) else (0.0, chosen.eps_scale)
    if not min(b, k * (len(path) - 1) + b) > 0:
        raise InputError(f"eps_scale must be positive at all times; got {chosen.eps_scale}")
    return Plan(chosen, path)


def _bound(clip: Clip | None, model: Any, channels: int) -> float | DynamicThreshold | None:
    """Return what x̂_0 is clipped to; None where it is not."""
    if clip is None:
        codec = getattr(model, "codec", None)
        bound: float | None = (1.0 if channels in (1, 3) else None) if codec is None else codec.clip
        return bound
    if isinstance(clip, bool):
        return 1.0 if clip else None
    if not isinstance(clip, DynamicThreshold) and not clip > 0:
        raise InputError(f"clip must be positive, or False for none; got {clip}")
    return clip


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
    **options: Any,
) -> Tensor:
    """Sample images.

    Arguments:
        model: Called as diffusers calls it, ``model(x, t, class_labels=…).sample``, or returning a tensor. Put it into
            eval mode before. 2C output channels mean a learned variance, which iddpm and es use. For multistep a
            consistency function, ``Preconditioned(network, sigma_min=…)``, with ``prediction="sample"``.
        process: The process that it was trained on.
        sampler: One of :data:`SAMPLERS`.
        steps: Network evaluations, in [1, T]; for ddim, iddpm, es and time-shift also one of guided-diffusion's
            strings: "10", "10,20,30" (sections) or "ddim25"; for euler any number where time is continuous; for
            multistep, in [1, N − 1], or scales as "0,22,39".
        shape: (n, C, H, W), where ``latents`` are not given.
        latents: x_T, with shape (n, C, H, W); standard normal by default.
        step_noise: The noise of each step: (steps, n, C, H, W), or any iterable of (n, C, H, W), from the noisiest step
            on. Common random numbers: the same latents and step noise make samples of two models comparable one to one.
        generator: Where what is not given comes from.
        eps_scale: What ε̂ is divided by: a number, for es also (k, b), which is k·i + b at the i-th of the sampler's
            times, the least noisy being 0. The sampler's own by default: 1, and 1.017 for es.
        clip: Whether x̂_0 is clipped to [−1, 1] in each step; a number c clips to [−c, c], a ``DynamicThreshold`` by
            dynamic thresholding. By default it is clipped where the model works on pixels: to ``model.codec.clip`` if
            the model has a codec; otherwise points with 1 or 3 channels are taken to be pixels, and all others are
            latents that nothing bounds. dpm++ clips by dynamic thresholding only.
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
        options: The sampler's own options, which are the fields of its class, such as ``variance`` of iddpm; None is
            its default.

    Returns:
        Images, nominally in [−1, 1], with shape (n, C, H, W), on the device of the latents.

    Raises:
        InputError: If the sampler is unknown or does not suit the process, or has no such option, or an option or steps
            are out of range, or the model predicts noise where the process has no signal.
        RunError: If an evaluation of the network is not finite; the message names the first such step.
        ValueError: If neither or both of shape and latents are given, or the step noise has another shape.
    """
    plan = check_sampler(sampler, steps, process, spacing, steps_offset, eps_scale=eps_scale, **options)
    if prediction == "epsilon" and not bool((process.alphas > 0).all()):
        raise InputError(
            "the process ends without any signal (zero terminal SNR), where x̂_0 does not follow from the noise: a "
            "network for it predicts v or x_0"
        )
    if latents is None:
        if shape is None:
            raise ValueError("give shape=(n, C, H, W), or latents")
        device = generator.device if generator is not None else getattr(model, "device", torch.device("cpu"))
        latents = torch.randn(shape, generator=generator, device=device)
    elif shape is not None and tuple(shape) != tuple(latents.shape):
        raise ValueError(f"shape {tuple(shape)} is not that of the latents, {tuple(latents.shape)}")
    start = latents
    bound = _bound(clip, model, start.shape[1])
    if not plan.sampler.clips and not isinstance(bound, DynamicThreshold):
        bound = None

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
    denoiser = Denoiser(model, prediction, plan.sampler.eps_scale, bound, given, on_evaluation, finite)
    x = plan.sampler.run(denoiser, plan.path, latents, noises())
    finite.append(x.isfinite().all())
    if not all(whole := torch.stack(finite).tolist()):  # read once, and not in every step
        evaluations = len(plan.path)
        raise RunError(
            f"{sampler}: the network's output is not finite in step {min(whole.index(False) + 1, evaluations)} of "
            f"{evaluations}: check its weights, or sample in fp32"
        )
    return x
