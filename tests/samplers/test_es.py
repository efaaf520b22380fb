"""Epsilon scaling: ε̂ is divided, by a constant or linearly in the step, and nothing else changes."""

from __future__ import annotations

import pytest
import torch

from robustdiff.errors import InputError
from robustdiff.process import DiffusionProcess
from robustdiff.samplers import sample
from robustdiff.samplers.denoiser import Denoiser

COSINE = DiffusionProcess.cosine(1000)


def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return 0.9 * torch.tanh(x)


def noise(steps: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "latents": torch.randn(2, 1, 4, 4, generator=generator),
        "step_noise": torch.randn(steps, 2, 1, 4, 4, generator=generator),
    }


@pytest.mark.parametrize("steps", [5, 8, 10, 20, 50])
@pytest.mark.parametrize(("scaling", "plain"), [("es", "iddpm"), ("ddim", "ddim"), ("dpm++", "dpm++")])
def test_a_constant_scale_divides_the_prediction(scaling, plain, steps):
    scaled = sample(model, COSINE, scaling, steps, eps_scale=1.03, **noise(steps))
    expected = sample(lambda x, t: model(x, t) / 1.03, COSINE, plain, steps, **noise(steps))
    torch.testing.assert_close(scaled, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(scaled, sample(model, COSINE, plain, steps, **noise(steps)))


def test_a_linear_scale_grows_from_the_last_step_to_the_first():
    steps, k, b = 5, 0.01, 1.002
    calls = iter(reversed(range(steps)))  # the network is called from the noisiest time, index S − 1, on
    scaled = sample(model, COSINE, "es", steps, eps_scale=(k, b), **noise(steps))
    expected = sample(lambda x, t: model(x, t) / (k * next(calls) + b), COSINE, "iddpm", steps, **noise(steps))
    torch.testing.assert_close(scaled, expected, rtol=1e-4, atol=1e-4)


def test_the_default_is_the_papers():
    torch.testing.assert_close(
        sample(model, COSINE, "es", 5, **noise(5)), sample(model, COSINE, "iddpm", 5, eps_scale=1.017, **noise(5))
    )


def test_without_signal_the_scale_leaves_the_image_that_v_gives():
    process = DiffusionProcess(torch.tensor([0.8, 0.0]), torch.tensor([0.6, 1.0]))
    x = noise(1)["latents"]
    one, scaled = (Denoiser(model, "v_prediction", scale, clip=None)(x, 1, process) for scale in (1.0, 1.02))
    assert torch.equal(scaled.x0, one.x0)
    torch.testing.assert_close(scaled.noise, one.noise / 1.02)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), (-1.0, 1.0)])
def test_a_scale_that_is_not_positive_is_named(scale):
    with pytest.raises(InputError, match="eps_scale"):
        sample(model, COSINE, "es", 5, eps_scale=scale, **noise(5))


def test_a_linear_scale_is_for_es_alone():
    with pytest.raises(InputError, match="es"):
        sample(model, COSINE, "ddim", 5, eps_scale=(0.1, 1.0), **noise(5))
