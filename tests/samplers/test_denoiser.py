"""Who looks on sees each evaluation of the network: the state, its time, what was predicted and what was used."""

from __future__ import annotations

import pytest
import torch

from robustdiff import DiffusionProcess, sample
from robustdiff.samplers.denoiser import Denoiser, Evaluation

PROCESS = DiffusionProcess.cosine(100)


def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return 0.5 * x + 0.001 * t.reshape(-1, 1, 1, 1)


@pytest.mark.parametrize("sampler", ["ddim", "iddpm", "es", "time-shift", "dpm++"])
def test_every_evaluation_is_seen_and_the_images_do_not_change_for_it(sampler):
    seen: list[Evaluation] = []
    x_T = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    step_noise = torch.randn(5, 3, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    settings = {"sampler": sampler, "steps": 5, "latents": x_T, "step_noise": step_noise}
    watched = sample(model, PROCESS, **settings, on_evaluation=seen.append)
    assert torch.equal(watched, sample(model, PROCESS, **settings))
    assert len(seen) == 5
    assert torch.equal(seen[0].x_t, x_T)
    for e in seen:
        times = e.process.times[e.index]
        assert torch.equal(e.predicted.noise, model(e.x_t, times))  # not scaled, not clipped
        alpha, sigma = e.process.levels(e.index, e.x_t)
        torch.testing.assert_close(alpha * e.used.x0 + sigma * e.used.noise, e.x_t)
        assert (e.used.x0.abs().max() <= 1) or sampler == "dpm++"
        again = Denoiser(e.denoiser.model, "epsilon", e.denoiser.eps_scale, e.denoiser.clip)(e.x_t, e.index, e.process)
        assert torch.equal(again.noise, e.used.noise)
