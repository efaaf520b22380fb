"""Who looks on sees each evaluation of the network: the state, its time, what was predicted and what was used."""

from __future__ import annotations

import pytest
import torch

from robustdiff import DiffusionProcess, sample
from robustdiff.objectives.denoising import DenoisingObjective
from robustdiff.samplers.denoiser import Denoiser, Evaluation

PROCESS = DiffusionProcess.cosine(100)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["cosine", "flow"])
def test_the_networks_times_are_whole_or_of_at_least_single_precision(precision, kind):
    """Not every device has float64, so a table of it must not be moved."""
    process, seen = getattr(DiffusionProcess, kind)(100), []
    prediction = "flow" if kind == "flow" else "epsilon"

    def network(x, t):
        seen.append(t)
        return torch.zeros_like(x)

    x, index = torch.zeros(3, 1, 2, 2, dtype=precision), torch.tensor([0, 3, 98])
    Denoiser(network, prediction)(x, index, process)
    objective = DenoisingObjective(process, prediction)
    objective(network, objective.draw(x, t=index, noise=x))
    expected = torch.int64 if kind == "cosine" else torch.promote_types(precision, torch.float32)
    assert [t.dtype for t in seen] == [expected] * 2
    assert torch.equal(seen[0], seen[1])
    assert [dtype for _, dtype in process._times._copies] == [expected]  # what was copied to the device, once


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
