"""The time-shift sampler: DDIM whose network is called at the time that the variance of x suggests."""

from __future__ import annotations

import pytest
import torch

from robustdiff.errors import InputError
from robustdiff.process import DiffusionProcess
from robustdiff.samplers import sample
from robustdiff.samplers.spacing import strided

COSINE = DiffusionProcess.cosine(1000)


def latents(n: int = 3) -> torch.Tensor:
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def recording(times: list[list[int]]):
    def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        times.append(t.tolist())
        return 0.8 * x

    return model


@pytest.mark.parametrize("steps", [5, 8, 10, 20, 50])
def test_without_a_window_it_is_ddim(steps):
    model = recording([])
    shifted = sample(model, COSINE, "time-shift", steps, latents=latents(), window=0)
    torch.testing.assert_close(shifted, sample(model, COSINE, "ddim", steps, latents=latents()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cutoff", [250, 300])
def test_the_network_is_called_where_the_noise_has_the_variance_of_the_sample(cutoff):
    """By brute force over the window, from the samples that the network was given."""
    calls: list[tuple[torch.Tensor, list[int]]] = []

    def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        calls.append((x.clone(), t.tolist()))
        return 0.8 * x

    window = 40
    sample(model, COSINE, "time-shift", 10, latents=latents().double(), window=window, cutoff=cutoff)
    planned = strided(10, 1000).flip(0).tolist()
    assert calls[0][1] == [planned[0]] * 3, "the first is the prior's own noise"
    shifted, ends = 0, set()
    for (x, t), time in zip(calls[1:], planned[1:], strict=True):
        for image, called in zip(x, t, strict=True):
            if time <= cutoff:
                assert called == time
                continue
            around = range(max(time - window // 2, 0), min(time + window // 2, 999) + 1)
            variance = float(image.var())
            assert called == min(around, key=lambda tau: abs(variance - float(COSINE.sigmas[tau]) ** 2))
            shifted += called != time
            ends |= {called - time} & {-window // 2, window // 2}
    assert shifted
    assert window // 2 in ends
    assert 300 in planned


@pytest.mark.parametrize("option", [{"window": -1}, {"cutoff": -1}])
def test_options_out_of_range_are_named(option):
    with pytest.raises(InputError, match=next(iter(option))):
        sample(recording([]), COSINE, "time-shift", 5, latents=latents(), **option)


def test_its_options_are_its_own():
    with pytest.raises(InputError, match="time-shift"):
        sample(recording([]), COSINE, "ddim", 5, latents=latents(), window=3)
