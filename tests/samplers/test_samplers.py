"""Samplers against exactly known models, diffusers' own schedulers, and themselves under common random numbers."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from robustdiff.errors import InputError
from robustdiff.process import DiffusionProcess
from robustdiff.samplers import sample
from robustdiff.samplers.spacing import evenly_spaced, strided

COSINE = DiffusionProcess.cosine(1000)
# α_T of the cosine schedule is 5e-5, where x̂_0 = (x − σ ε̂)/α magnifies the rounding of float32: a gentler schedule
# where two computations are compared.
LINEAR = DiffusionProcess.linear(1000)
MEAN, STD = 0.3, 0.5


def optimal(process: DiffusionProcess, prediction: str = "epsilon", std: float = STD):
    """The best model of data N(MEAN, std²), in any parameterisation, at any (also fractional) time."""

    def model(x: Tensor, t: Tensor) -> Tensor:
        position = t.double() / 10 - 1 if len(process) == 100 else t.double()
        low = position.floor().long().clamp(0, len(process) - 1)
        high = (low + 1).clamp_max(len(process) - 1)
        part = (position - low).clamp(0, 1)
        alpha = process.alphas[low].lerp(process.alphas[high], part).to(x).reshape(-1, 1, 1, 1)
        sigma = process.sigmas[low].lerp(process.sigmas[high], part).to(x).reshape(-1, 1, 1, 1)
        noise = sigma * (x - alpha * MEAN) / (alpha**2 * std**2 + sigma**2)
        x0 = MEAN + alpha * std**2 * (x - alpha * MEAN) / (alpha**2 * std**2 + sigma**2)
        match prediction:
            case "epsilon":
                return noise
            case "sample":
                return x0
            case "flow":
                return noise - x0
        return alpha * noise - sigma * x0

    return model


def noise_for(n: int, steps: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 1, 4, 4, generator=generator), torch.randn(steps, n, 1, 4, 4, generator=generator)


@pytest.mark.parametrize("sampler", ["ddim", "iddpm", "dpm++"])
def test_many_steps_give_the_distribution_of_the_data(sampler):
    latents, step_noise = noise_for(400, 250)
    x = sample(optimal(COSINE), COSINE, sampler, 250, latents=latents, step_noise=step_noise, clip=False).double()
    error = STD / math.sqrt(x.numel())
    assert x.mean().item() == pytest.approx(MEAN, abs=5 * error + 0.005)
    assert x.std().item() == pytest.approx(STD, rel=0.03)


def test_euler_gives_the_distribution_of_the_data():
    flow = DiffusionProcess.flow(100)
    x = sample(optimal(flow, "flow"), flow, "euler", 100, latents=noise_for(400, 1)[0], prediction="flow", clip=False)
    assert x.mean().item() == pytest.approx(MEAN, abs=0.03)
    assert x.std().item() == pytest.approx(STD, rel=0.03)


@pytest.mark.parametrize("sampler", ["ddim", "iddpm", "dpm++"])
def test_a_single_image_is_found_in_few_steps(sampler):
    latents, step_noise = noise_for(5, 10)
    x = sample(optimal(COSINE, std=0.0), COSINE, sampler, 10, latents=latents, step_noise=step_noise)
    torch.testing.assert_close(x, torch.full_like(x, MEAN), atol=0.03, rtol=0)


@pytest.mark.parametrize("clip", [True, False])
def test_iddpm_is_diffusers_ddpm_on_the_respaced_process(clip):
    steps, indices = 8, evenly_spaced(8, 1000)
    scheduler = DDPMScheduler(
        steps, trained_betas=LINEAR.respace(indices).betas.tolist(), clip_sample=clip, variance_type="fixed_small"
    )
    scheduler.set_timesteps(steps)
    x = latents = 2 * noise_for(3, 1)[0]
    model, generator = optimal(LINEAR), torch.Generator().manual_seed(7)
    for index in scheduler.timesteps:
        output = model(x, indices[index].expand(3))
        x = scheduler.step(output, index, x, generator=generator).prev_sample
    generator.manual_seed(7)
    step_noise = [torch.randn(latents.shape, generator=generator) for _ in range(steps)]
    mine = sample(model, LINEAR, "iddpm", steps, latents=latents, step_noise=step_noise, clip=clip)
    torch.testing.assert_close(mine, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps", [5, 10, 50])
def test_ddim_is_diffusers_ddim_where_the_times_are_the_same(steps):
    scheduler = DDIMScheduler(1000, clip_sample=False, timestep_spacing="leading", steps_offset=0)
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.flip(0).tolist() == strided(steps, 1000).tolist()
    x = latents = noise_for(3, 1)[0]
    model = optimal(LINEAR)
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t.expand(3)), t, x).prev_sample
    mine = sample(model, LINEAR, "ddim", steps, latents=latents, clip=False)
    torch.testing.assert_close(mine, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps", [1, 4, 10])
def test_euler_is_the_ode_by_hand_and_diffusers_flow_matching(steps):
    """x ← x + (s − t) v from t = 1 down to 0; diffusers' scheduler is given the same times."""
    flow = DiffusionProcess.flow(100)
    model, latents = optimal(flow, "flow"), noise_for(3, 1)[0].double()
    x = latents
    times = [1 - i / steps for i in range(steps + 1)]
    for t, s in itertools.pairwise(times):
        x = x + (s - t) * model(x, torch.full((3,), 1000 * t))
    scheduler = FlowMatchEulerDiscreteScheduler(100)
    scheduler.set_timesteps(sigmas=times[:-1])
    y = latents
    for t, time in zip(times, scheduler.timesteps, strict=False):
        y = scheduler.step(model(y, torch.full((3,), 1000 * t)), time, y).prev_sample
    mine = sample(model, flow, "euler", steps, latents=latents, prediction="flow", clip=False)
    torch.testing.assert_close(mine, x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mine, y.to(mine), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_parameterisations_of_one_flow_give_the_same_images(prediction):
    flow, latents = DiffusionProcess.flow(100), noise_for(3, 1)[0].double()
    x = sample(optimal(flow, "flow"), flow, "euler", 10, latents=latents, prediction="flow", clip=False)
    if prediction == "epsilon":  # α = 0 at the first time: no x̂_0 follows from ε̂ there
        flow = DiffusionProcess(flow.alphas.clamp_min(1e-6), flow.sigmas, flow.times)
    model = optimal(flow, prediction)
    other = sample(model, flow, "euler", 10, latents=latents, prediction=prediction, clip=False)
    torch.testing.assert_close(other, x, rtol=1e-4, atol=1e-4)


def test_euler_is_exact_on_a_point():
    """x_0 = MEAN for all: straight lines, v = (x − MEAN)/t, and one step or many end at MEAN."""
    flow = DiffusionProcess.flow(100)
    for steps in (1, 4):
        x = sample(
            optimal(flow, "flow", std=0.0), flow, "euler", steps, latents=noise_for(3, 1)[0].double(), prediction="flow"
        )
        torch.testing.assert_close(x, torch.full_like(x, MEAN), rtol=1e-5, atol=1e-5)


def test_euler_has_common_random_numbers_too():
    flow, latents = DiffusionProcess.flow(100), noise_for(6, 1)[0]
    model = optimal(flow, "flow")
    x = sample(model, flow, "euler", 7, latents=latents, prediction="flow")
    assert torch.equal(x, sample(model, flow, "euler", 7, latents=latents, prediction="flow"))
    part = sample(model, flow, "euler", 7, latents=latents[2:4], prediction="flow")
    torch.testing.assert_close(part, x[2:4], rtol=1e-5, atol=1e-5)


def test_spacings_are_guided_diffusions():
    assert evenly_spaced(10, 1000).tolist() == [0, 111, 222, 333, 444, 555, 666, 777, 888, 999]
    assert strided(25, 1000).tolist() == list(range(0, 1000, 40))


@pytest.mark.parametrize("sampler", ["ddim", "iddpm", "dpm++", "es", "time-shift"])
def test_common_random_numbers_give_the_same_images_and_a_batch_its_parts(sampler):
    latents, step_noise = noise_for(6, 7)
    arguments = {"clip": True, "steps": 7}
    model = optimal(COSINE)
    x = sample(model, COSINE, sampler, latents=latents, step_noise=step_noise, **arguments)
    assert torch.equal(x, sample(model, COSINE, sampler, latents=latents, step_noise=iter(step_noise), **arguments))
    part = sample(model, COSINE, sampler, latents=latents[2:4], step_noise=step_noise[:, 2:4], **arguments)
    torch.testing.assert_close(part, x[2:4], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sampler", ["ddim", "iddpm", "dpm++"])
@pytest.mark.parametrize("prediction", ["sample", "v_prediction", "flow"])
def test_parameterisations_of_one_model_give_the_same_images(sampler, prediction):
    latents, step_noise = noise_for(4, 6)
    arguments = {"latents": latents.double(), "step_noise": step_noise}
    x = sample(optimal(LINEAR), LINEAR, sampler, 6, **arguments)
    other = sample(optimal(LINEAR, prediction), LINEAR, sampler, 6, prediction=prediction, **arguments)
    torch.testing.assert_close(other, x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("v", "variance"), [(-1.0, "fixed_small"), (1.0, "fixed_large")])
def test_a_learned_variance_lies_between_the_two_fixed_ones(v, variance):
    steps, indices = 6, evenly_spaced(6, 1000)
    scheduler = DDPMScheduler(
        steps, trained_betas=LINEAR.respace(indices).betas.tolist(), clip_sample=True, variance_type=variance
    )  # fmt: skip
    scheduler.set_timesteps(steps)
    model = optimal(LINEAR)
    x = latents = noise_for(3, 1)[0]
    generator = torch.Generator().manual_seed(7)
    for index in scheduler.timesteps:
        x = scheduler.step(model(x, indices[index].expand(3)), index, x, generator=generator).prev_sample
    generator.manual_seed(7)
    step_noise = [torch.randn(latents.shape, generator=generator) for _ in range(steps)]

    def learned(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([model(x, t), torch.full_like(x, v)], 1)

    mine = sample(learned, LINEAR, "iddpm", steps, latents=latents, step_noise=step_noise)
    torch.testing.assert_close(mine, x, rtol=1e-4, atol=1e-4)


def test_clipping_holds_the_image_in_its_range():
    def model(x: Tensor, t: Tensor) -> Tensor:
        return -10 * x

    latents = noise_for(4, 1)[0]
    assert sample(model, COSINE, "ddim", 5, latents=latents).abs().max() <= 1 + 1e-5
    assert sample(model, COSINE, "ddim", 5, latents=latents, clip=False).abs().max() > 1


def test_a_generator_makes_everything_reproducible():
    model = optimal(COSINE)
    images = [
        sample(model, COSINE, "iddpm", 4, shape=(2, 1, 4, 4), generator=torch.Generator().manual_seed(s))
        for s in (1, 1, 2)
    ]
    assert torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])


def test_labels_reach_the_model():
    seen = []

    def model(x: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
        seen.append(class_labels)
        return x

    sample(model, COSINE, "ddim", 2, shape=(2, 1, 4, 4), class_labels=torch.tensor([4, 5]))
    assert all(labels.tolist() == [4, 5] for labels in seen)


@pytest.mark.parametrize(
    ("sampler", "steps", "words"),
    [("plms", 5, "plms"), ("ddim", 0, "steps"), ("iddpm", 1001, "1000"), ("dpm++", -1, "steps"), ("euler", 5, "euler")],
)
def test_what_cannot_be_sampled_is_named(sampler, steps, words):
    with pytest.raises(InputError, match=words):
        sample(optimal(COSINE), COSINE, sampler, steps, shape=(1, 1, 4, 4))


def test_ddim_does_not_suit_a_flow():
    with pytest.raises(InputError, match="euler"):
        sample(optimal(COSINE), DiffusionProcess.flow(10), "ddim", 5, shape=(1, 1, 4, 4))


def test_noise_that_does_not_fit_is_named():
    latents, step_noise = noise_for(2, 5)
    model = optimal(COSINE)
    with pytest.raises(ValueError, match="ended early"):
        sample(model, COSINE, "iddpm", 5, latents=latents, step_noise=step_noise[:2])
    with pytest.raises(ValueError, match="shape"):
        sample(model, COSINE, "iddpm", 5, latents=latents, step_noise=step_noise[:, :1])
    with pytest.raises(ValueError, match="shape"):
        sample(model, COSINE, "iddpm", 5)
    with pytest.raises(ValueError, match="shape"):
        sample(model, COSINE, "iddpm", 5, shape=(3, 1, 4, 4), latents=latents)
