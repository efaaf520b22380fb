"""The entry point of all samplers, :func:`sample`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from numbers import Integral, Real
from operator import index
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from robustdiff.errors import InputError, NotFiniteError
from robustdiff.objectives.objective import gaussian, precise
from robustdiff.process import DiffusionProcess, Prediction
from robustdiff.samplers.denoiser import Denoiser, DynamicThreshold, Evaluation
from robustdiff.samplers.guidance import guided
from robustdiff.samplers.sampler import SAMPLERS, Path, Sampler, TimeSpacing

__all__ = ["SAMPLERS", "Clip", "Resolved", "TimeSpacing", "resolve", "sample", "suited"]

Clip = bool | float | DynamicThreshold


def suited(process: DiffusionProcess) -> tuple[str, ...]:
    """Return the names of the samplers that suit a process, with the default sampler first."""
    names = [name for name, kind in SAMPLERS.items() if kind.suits(process)]
    return tuple(sorted(names, key=lambda name: not SAMPLERS[name].default))


class Resolved(NamedTuple):
    """The sampler of a call of :func:`sample` with its options, its path, and all settings by name."""

    sampler: Sampler
    path: Path
    settings: dict[str, Any]


def resolve(
    model: Any, process: DiffusionProcess, sampler: str, steps: int | str, given: Mapping[str, Any]
) -> Resolved:
    """Check the arguments of :func:`sample`, and complete the settings by those that the model brings with it.

    Args:
        model: The model. Its attribute ``sampling``, if it has one, holds settings by name, of which those are taken
            that the sampler has.
        process: The process.
        sampler: The name of the sampler.
        steps: The number or string of steps.
        given: The settings given by the caller, by name: "clip", "spacing", "steps_offset", and the options of the
            sampler. Those that are None are left out.

    Raises:
        InputError: If the sampler is unknown or does not suit the process, cannot make these steps, lacks an option, or
            a setting is out of range or would have no effect.
    """
    kind = SAMPLERS[sampler]
    given = {name: value for name, value in given.items() if value is not None}
    for name in ("sampler", "steps", "process"):
        if name in given:
            remedy = "it is that of the model" if name == "process" else f"give it by itself (--{name})"
            raise InputError(f"{name} is no option of {sampler}: {remedy}")
    has = ("clip", "steps_offset", *(["spacing"] if kind.spaced else []), *kind.model_fields)
    own: Mapping[str, Any] = getattr(model, "sampling", {})
    settings = {**{name: value for name, value in own.items() if name in has}, **given}
    _check(sampler, steps, settings, given)
    if not isinstance(steps, str):
        try:
            steps = index(steps)  # NumPy's integers too
        except TypeError:
            raise InputError(f"steps must be a whole number, or a string; got {steps!r}") from None
    if bool(process.sigmas[0] > process.sigmas[-1]):  # descending, as in a flow-matching scheduler
        process = process.respace(torch.arange(len(process)).flip(0))
    if not kind.suits(process):
        names = suited(process)
        remedy = f"use {' or '.join(names)}, for {SAMPLERS[names[0]].model}s" if names else "no sampler does"
        raise InputError(f"the sampler {sampler} does not suit this process, as it needs {kind.needs}: {remedy}")
    options = {name: value for name, value in settings.items() if name not in ("clip", "spacing", "steps_offset")}
    try:
        chosen = kind(**options)
    except ValidationError as error:
        first = error.errors()[0]
        message = first["msg"].removeprefix("Value error, ")
        raise InputError(f"{first['loc'][0]} of {sampler}: {message}; got {first['input']!r}") from None
    path = chosen.path(steps, process, settings.get("spacing"), settings.get("steps_offset", 0))
    k, b = chosen.eps_scale if isinstance(chosen.eps_scale, tuple) else (0.0, chosen.eps_scale)
    if not min(b, k * (len(path) - 1) + b) > 0:
        raise InputError(f"eps_scale must be positive at all times; got {chosen.eps_scale}")
    return Resolved(chosen, path, settings)


def _check(sampler: str, steps: int | str, settings: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Check that all settings are of their kinds, and that those given have an effect."""
    kind, clip, offset = SAMPLERS[sampler], settings.get("clip"), settings.get("steps_offset")
    if not (clip is None or isinstance(clip, bool | DynamicThreshold) or (isinstance(clip, Real) and float(clip) > 0)):
        raise InputError(f"clip must be a positive number, True for 1, or False for none; got {clip!r}")
    if not (offset is None or isinstance(offset, Integral)):
        raise InputError(f"steps_offset must be a whole number; got {offset!r}")
    clip, spacing = given.get("clip", False), given.get("spacing", "own")
    if clip is not False and not (kind.clips or isinstance(clip, DynamicThreshold)):
        raise InputError(f"clip={clip} is not for {sampler}, which clips by a DynamicThreshold only: leave clip out")
    if spacing != "own" and not kind.spaced:
        raise InputError(f"{sampler} has times of its own, and no spacing: leave spacing out")
    if "steps_offset" in given and settings.get("spacing") != "leading":
        raise InputError("steps_offset is the first time of the spacing leading: give spacing=leading too")
    if isinstance(steps, str) and callable(spacing):  # that of a model is a default, which such steps replace
        raise InputError(f"steps {steps!r} say the times themselves: leave spacing out")
    for name in given:
        if name not in ("clip", "spacing", "steps_offset", *kind.model_fields):
            owners = [other for other, one in SAMPLERS.items() if name in one.model_fields]
            raise InputError(f"{name} is for {' and '.join(owners) or 'no sampler'}, not for {sampler}")


def _bound(clip: Clip | None, model: Any, channels: int) -> float | DynamicThreshold | None:
    """Return the bound to which x̂_0 is clipped, or None for no clipping."""
    if clip is None:
        codec = getattr(model, "codec", None)
        bound: float | None = (1.0 if channels in (1, 3) else None) if codec is None else codec.clip
        return bound
    if isinstance(clip, bool):
        return 1.0 if clip else None
    return clip


def _weights_of(model: Any) -> tuple[torch.device | None, torch.dtype | None]:
    """Return the device and the type of a network's weights; None if they are not known, as for a function."""
    network = model
    while not isinstance(network, nn.Module) and getattr(network, "network", None) is not None:
        network = network.network  # a Model, or a preconditioned network
    device, dtype = getattr(model, "device", None), getattr(network, "dtype", None)
    if isinstance(network, nn.Module):
        first = next((weight for weight in network.parameters() if weight.is_floating_point()), None)
        if first is not None:
            device, dtype = device or first.device, dtype or first.dtype
    return device, dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else None


def _autocasts(device: torch.device) -> bool:
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def _start(
    model: Any, shape: tuple[int, ...] | None, latents: Tensor | None, generator: torch.Generator | None
) -> tuple[Tensor, torch.dtype]:
    """Return the latents, which are drawn if they are not given, and the type of the points that the network gets."""
    device, dtype = _weights_of(model)
    if latents is None:
        if shape is None:
            raise ValueError("give shape=(n, C, H, W), or latents")
        if device is None:
            device = torch.device("cpu") if generator is None else generator.device
        # In float32 whatever the model's type, so that a generator draws the same noise for each.
        latents = gaussian(torch.empty(shape, device=device, dtype=torch.float32), generator)
    elif shape is not None and tuple(shape) != tuple(latents.shape):
        raise ValueError(f"shape {tuple(shape)} is not that of the latents, {tuple(latents.shape)}")
    return latents, latents.dtype if dtype is None or _autocasts(latents.device) else dtype


def _conditioned(
    model: Any,
    x: Tensor,
    condition: Mapping[str, Any] | None,
    class_labels: Tensor | None,
    guidance: float | None,
    unconditional: Mapping[str, Any] | None,
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Return the model with guidance, and the keyword arguments that it is called with for points like ``x``."""
    given = dict(condition or {})
    if class_labels is not None:
        given["class_labels"] = class_labels
    embed = getattr(model, "embed_guidance", None)
    embedded = None if guidance is None or embed is None else embed(guidance, x)
    if embedded is not None:
        if twice := [name for name in embedded if name in given]:
            raise InputError(f"the condition has the scale of guidance already, as {twice[0]}: leave one of them out")
        given.update(embedded)
    if unconditional and (guidance is None or embedded is not None):
        remedy = "give guidance too" if guidance is None else "this network takes the scale itself, leave it out"
        raise InputError(f"unconditional is for guidance by two evaluations in each step: {remedy}")
    if embedded is None and guidance is not None and guidance != 1:
        model = guided(model, guidance, given, unconditional or {})
    return model, given


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
    prediction: Prediction | None = None,
    on_evaluation: Callable[[Evaluation], None] | None = None,
    *,
    condition: Mapping[str, Any] | None = None,
    guidance: float | None = None,
    unconditional: Mapping[str, Any] | None = None,
    spacing: TimeSpacing | None = None,
    steps_offset: int | None = None,
    **options: Any,
) -> Tensor:
    """Sample images.

    Args:
        model: The model, called as diffusers calls it, ``model(x, t, class_labels=…)``, in eval mode. It returns a
            tensor, or an object with the attribute ``sample``. 2C output channels mean a learned variance, which iddpm
            and es use. A model that :func:`robustdiff.load_model` returned brings its settings of sampling with it:
            arguments that are not given are those of its scheduler. For multistep: a consistency function,
            ``Preconditioned(network, sigma_min=…)``, with ``prediction="sample"``. For lcm: the network itself.
        process: The process that the model was trained on.
        sampler: The name of a sampler in :data:`SAMPLERS`.
        steps: The number of network evaluations, in [1, T]. For ddim, iddpm, es and time-shift also a string of
            guided-diffusion: "10", "10,20,30" (sections) or "ddim25". For euler with continuous time any number. For
            multistep a number in [1, N − 1], or scales such as "0,22,39".
        shape: The shape (n, C, H, W) of the samples. Required without ``latents``.
        latents: The initial noise x_T, with shape (n, C, H, W), on the model's device. Default: standard normal, in
            float32. Steps are computed in the precision of the latents, and in at least float32. The network is called
            with points in the type of its weights or, under autocast or if they are not known, of the latents.
        step_noise: The noise of each step, from the noisiest on: a tensor (steps, n, C, H, W), or any iterable of
            tensors (n, C, H, W). Default: standard normal. Samples of two models with the same latents and step noise
            (common random numbers) can be compared one by one.
        generator: The source of randomness for latents and step noise that are not given, on any device: what it draws
            is moved to that of the model. Default: PyTorch's global generator.
        eps_scale: The number by which ε̂ is divided; for es also (k, b), which stands for k·i + b at the i-th of the
            sampler's times, counted from 0, the least noisy. Default: 1, and 1.017 for es.
        clip: The clipping of x̂_0 in each step: True for [−1, 1], a number c for [−c, c], a ``DynamicThreshold``, or
            False for none. Default: ``model.codec.clip`` if the model has a codec; otherwise True for 1 or 3 channels,
            which are taken to be pixels, and False for other numbers, taken to be latents. dpm++ supports
            ``DynamicThreshold`` only.
        class_labels: The class of each sample, with shape (n,).
        prediction: The parameterisation of the model. Default: ``model.prediction`` if the model is one that
            :func:`robustdiff.load_model` returned, otherwise "epsilon".
        on_evaluation: A callback that is called with an ``Evaluation`` after each evaluation of the network.
        condition: Further keyword arguments of the model: tensors with n rows each, or mappings of such tensors, as
            ``added_cond_kwargs`` of Stable Diffusion XL is.
        guidance: The scale g of classifier-free guidance (:mod:`robustdiff.samplers.guidance`), with two evaluations in
            each step. None and 1: no guidance. For a network that takes the scale as an argument (Flux dev, latent
            consistency models), it is this argument, and each step has one evaluation.
        unconditional: The empty condition, under the names of the condition. Each value is a tensor with one or n rows,
            a number, such as the null class for ``class_labels``, or a mapping of these. Names that a mapping leaves
            out, such as the size of the images, are those of the condition. It goes with ``guidance`` only.
        spacing: The choice of the times for a number of steps: "own" (as the sampler's authors space them);
            "leading", "trailing" or "linspace" as in diffusers' schedulers; or a function of (S, T) that returns S
            ascending indices or, for euler, S descending levels σ. multistep supports "own" only. Default: the spacing
            of the model's scheduler, otherwise "own".
        steps_offset: The first time of the spacing "leading", which must be given too.
        options: The options of the sampler, which are the fields of its class, such as ``variance`` of iddpm. None
            selects the default.

    Returns:
        Images, nominally in [−1, 1], with shape (n, C, H, W), on the device and in the type of the latents. The network
        is called in inference mode. The images themselves may be changed in place and trained on.

    Raises:
        InputError: If the sampler is unknown, does not suit the process or lacks an option, if an option or the steps
            are out of range or would have no effect, if the model predicts noise and the process has times without
            signal, or if the process is one of a scheduler that scales the network's input
            (:meth:`DiffusionProcess.check_network`).
        NotFiniteError: If an output of the network is not finite; the message names the first such step.
        ValueError: If ``shape`` and ``latents`` are both missing or disagree, or the step noise has another shape or
            ends early.
    """
    parameterisation: Prediction = getattr(model, "prediction", "epsilon") if prediction is None else prediction
    process.check_network(parameterisation)
    given = {"clip": clip, "spacing": spacing, "steps_offset": steps_offset, "eps_scale": eps_scale, **options}
    chosen, path, settings = resolve(model, process, sampler, steps, given)
    process.check_signal(parameterisation)
    latents, called = _start(model, shape, latents, generator)
    start = latents.to(precise(latents.dtype))
    bound = _bound(settings.get("clip"), model, start.shape[1])
    if not chosen.clips and not isinstance(bound, DynamicThreshold):
        bound = None

    def noises() -> Iterator[Tensor]:
        if step_noise is None:
            while True:
                yield gaussian(start, generator)
        for noise in step_noise:
            if noise.shape != start.shape:
                raise ValueError(
                    f"step_noise of a step has shape {tuple(noise.shape)}, the latents {tuple(start.shape)}"
                )
            yield noise.to(start)
        raise ValueError(f"step_noise ended early: {sampler} in {steps} steps needs one for each step but the last")

    model, arguments = _conditioned(model, start.to(called), condition, class_labels, guidance, unconditional)
    finite: list[Tensor] = []
    denoiser = Denoiser(model, parameterisation, chosen.eps_scale, bound, arguments, on_evaluation, finite, called)
    with torch.inference_mode():
        sampled = chosen.run(denoiser, path, start, noises())
        finite.append(sampled.isfinite().all())
    x = sampled.to(latents.dtype, copy=True)  # outside of inference mode, an ordinary tensor
    if not all(whole := torch.stack(finite).tolist()):  # read once, not in every step
        evaluations = len(path)
        raise NotFiniteError(
            f"{sampler}: the network's output is not finite in step {min(whole.index(False) + 1, evaluations)} of "
            f"{evaluations}: check its weights, or sample in fp32"
        )
    return x
