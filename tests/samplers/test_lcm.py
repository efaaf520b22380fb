"""The sampler lcm is diffusers' LCMScheduler with given noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import LCMScheduler

from robustdiff import DiffusionProcess, sample
from robustdiff.errors import InputError


class Network:
    def __call__(self, x, t, **condition):
        return torch.tanh(x + t[:, None, None, None] / 500 + condition.get("timestep_cond", 0.0))


@pytest.mark.parametrize(
    ("T", "N", "steps", "prediction", "scaling"),
    [(1000, 50, 4, "epsilon", 10.0), (1000, 37, 5, "sample", 2.0), (90, 90, 7, "v_prediction", 10.0)],
)
def test_samples_are_the_schedulers(monkeypatch, T, N, steps, prediction, scaling):
    scheduler = LCMScheduler(
        T, original_inference_steps=N, prediction_type=prediction, timestep_scaling=scaling, beta_end=0.02
    )
    process = DiffusionProcess.from_scheduler(scheduler)
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(0)
    latents, *noise = torch.randn(steps + 1, 2, 4, 3, 3, generator=generator)
    given = iter(noise)
    monkeypatch.setattr("diffusers.schedulers.scheduling_lcm.randn_tensor", lambda *_, **__: next(given))
    network, x = Network(), latents
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t.expand(2)), t, x).prev_sample
    out = sample(
        network,
        process,
        sampler="lcm",
        steps=steps,
        latents=latents,
        step_noise=torch.stack(noise),
        prediction=prediction,
        solver_steps=N,
        timestep_scaling=scaling,
    )
    torch.testing.assert_close(out, x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("N", [1, 7, 49, 50, 1000])
def test_times_are_the_schedulers(N):
    from robustdiff.samplers.lcm import LCM

    process, scheduler = DiffusionProcess.linear(1000), LCMScheduler(original_inference_steps=N)
    for steps in sorted({1, 2, 3, N // 3, N // 2, N} & set(range(1, N + 1))):
        scheduler.set_timesteps(steps)
        assert LCM(solver_steps=N).path(steps, process).times.flip(0).tolist() == scheduler.timesteps.tolist()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 51}, "steps of lcm must be between 1 and solver_steps=50; got 51"),
        ({"steps": 0}, "steps of lcm must be between"),
        ({"steps": "10,20"}, "give this sampler a number of steps"),
        ({"steps": 4, "spacing": "trailing"}, "lcm has times of its own, and no spacing: leave spacing out"),
        ({"steps": 4, "solver_steps": 1001}, "solver_steps must be between 1 and the 1000 times"),
        ({"steps": 4, "solver_steps": 0}, "solver_steps of lcm"),
        ({"steps": 4, "sampler": "ddim", "solver_steps": 10}, "solver_steps is for lcm, not for ddim"),
    ],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        sample(Network(), DiffusionProcess.linear(1000), **{"sampler": "lcm", "shape": (1, 4, 3, 3), **settings})


def test_the_spacing_of_a_models_scheduler_is_not_that_of_its_times():
    """As of Stable Diffusion with an LCM-LoRA."""
    network = Network()
    network.sampling = {"spacing": lambda steps, T: torch.arange(steps), "steps_offset": 1, "clip": False}
    given = {"sampler": "lcm", "steps": 2, "latents": torch.ones(1, 4, 3, 3), "step_noise": torch.ones(1, 1, 4, 3, 3)}
    first, second = (sample(one, DiffusionProcess.linear(1000), **given) for one in (network, Network()))
    assert torch.equal(first, second)


def test_flow_matching_is_refused():
    with pytest.raises(InputError, match=r"lcm does not suit this process.*: use euler, for flow-matching models"):
        sample(Network(), DiffusionProcess.flow(1000), sampler="lcm", shape=(1, 4, 3, 3))


def test_one_step_is_the_consistency_function():
    latents = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 4, 3, 3)))
    process = DiffusionProcess.linear(1000)
    out = sample(Network(), process, sampler="lcm", steps=1, latents=latents)
    t = torch.full((2,), 999)
    x0, _ = process.split("epsilon", latents, t, Network()(latents, t))
    torch.testing.assert_close(out, 0.25 / (9990**2 + 0.25) * latents + 9990 / (9990**2 + 0.25) ** 0.5 * x0)
