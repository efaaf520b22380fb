"""One entry for all samplers: :func:`sample`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from robustdiff.errors import InputError
from robustdiff.process import DiffusionProcess, Prediction
from robustdiff.samplers.ddim import ddim
from robustdiff.samplers.denoiser import Denoiser
from robustdiff.samplers.dpmpp import dpmpp
from robustdiff.samplers.euler import euler
from robustdiff.samplers.iddpm import iddpm

__all__ = ["SAMPLERS", "Sampler", "sample"]

Sampler = Callable[[Denoiser, DiffusionProcess, int, Tensor, Iterator[Tensor]], Tensor]

SAMPLERS: dict[str, Sampler] = {"ddim": ddim, "iddpm": iddpm, "dpm++": dpmpp, "euler": euler}


def check_sampler(sampler: str, process: DiffusionProcess) -> None:
    """Whether a sampler exists and suits a process.

    Raises:
        InputError: If it does not.
    """
    if sampler not in SAMPLERS:
        raise InputError(f"unknown sampler {sampler!r}: use one of {', '.join(SAMPLERS)}")
    if (sampler == "euler") == process.variance_preserving:
        suited = "ddim, iddpm or dpm++" if sampler == "euler" else "euler"
        raise InputError(f"the sampler {sampler} does not suit this process: use {suited}")


@torch.inference_mode()
def sample(
    model: Callable[..., Any],
    process: DiffusionProcess,
    sampler: str = "iddpm",
    steps: int = 10,
    shape: tuple[int, ...] | None = None,
    latents: Tensor | None = None,
    step_noise: Iterable[Tensor] | None = None,
    generator: torch.Generator | None = None,
    eps_scale: float = 1.0,
    clip: bool = True,
    class_labels: Tensor | None = None,
    prediction: Prediction = "epsilon",
) -> Tensor:
    """Sample images.

    Arguments:
        model: Called as diffusers calls it, ``model(x, t, class_labels=…).sample``, or returning a tensor. Put it into
            eval mode before. 2C output channels mean a learned variance, which iddpm uses.
        process: The process that it was trained on.
        sampler: One of :data:`SAMPLERS`.
        steps: Network evaluations, in [1, T].
        shape: (n, C, H, W), where ``latents`` are not given.
        latents: x_T, with shape (n, C, H, W); standard normal by default.
        step_noise: The noise of each step: (steps, n, C, H, W), or any iterable of (n, C, H, W), from the noisiest step
            on. Common random numbers: the same latents and step noise make samples of two models comparable one to one.
        generator: Where what is not given comes from.
        eps_scale: What ε̂ is divided by.
        clip: Whether x̂_0 is clipped to [−1, 1] in each step; dpm++ never does.
        class_labels: Labels, with shape (n,).
        prediction: What the model predicts.

    Returns:
        Images, nominally in [−1, 1], with shape (n, C, H, W), on the device of the latents.

    Raises:
        InputError: If the sampler is unknown or does not suit the process, or steps are out of range.
        ValueError: If neither or both of shape and latents are given, or the step noise has another shape.
    """
    check_sampler(sampler, process)
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
    denoiser = Denoiser(model, prediction, eps_scale, clip, condition)
    return SAMPLERS[sampler](denoiser, process, steps, latents, noises())
