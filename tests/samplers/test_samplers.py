"""Samplers against exactly known models, diffusers' own schedulers, and themselves under common random numbers."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from robustdiff.errors import InputError
from robustdiff.objectives.preconditioning import karras_process, karras_sigmas
from robustdiff.process import DiffusionProcess
from robustdiff.samplers import sample
from robustdiff.samplers.denoiser import Evaluation
from robustdiff.samplers.sample import resolve
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
    arguments = {"clip": None if sampler == "dpm++" else True, "steps": 7}
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
    with pytest.raises(InputError, match=f"variance={variance} has no effect, as this network learns it"):
        sample(learned, LINEAR, "iddpm", 1, latents=latents, variance=variance)


@pytest.mark.parametrize(("steps", "order"), [(9, 1), (10, 2)])
def test_the_last_step_of_dpm_is_of_second_order_from_ten_steps_on(steps, order):
    seen: list[Evaluation] = []
    x = sample(optimal(LINEAR), LINEAR, "dpm++", steps, latents=noise_for(3, 1)[0].double(), on_evaluation=seen.append)
    levels = resolve(None, LINEAR, "dpm++", steps, {}).path.levels
    (alpha, sigma), *_ = levels
    log_snr = [math.log(a / s) for a, s in levels[:3]]
    h, h_before = log_snr[0] - log_snr[1], log_snr[1] - log_snr[2]
    before, last = seen[-2].used.x0, seen[-1].used.x0
    D = last if order == 1 else last + h / (2 * h_before) * (last - before)
    expected = sigma / levels[1][1] * seen[-1].x_t + alpha * (1 - math.exp(-h)) * D
    torch.testing.assert_close(x, expected, rtol=1e-9, atol=1e-9)
    assert (h / (2 * h_before) * (last - before)).abs().max() > 1e-5


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
    [
        ("plms", 5, "plms"),
        ("ddim", 0, "steps"),
        ("ddim", 5.0, "whole number"),
        ("ddim", [0, 500], "whole number"),
        ("iddpm", 1001, "1000"),
        ("dpm++", -1, "steps"),
        ("euler", 5, "euler"),
    ],
)
def test_what_cannot_be_sampled_is_named(sampler, steps, words):
    with pytest.raises(InputError, match=words):
        sample(optimal(COSINE), COSINE, sampler, steps, shape=(1, 1, 4, 4))


@pytest.mark.parametrize("kind", [np.int64, np.uint8, torch.tensor])
@pytest.mark.parametrize(
    ("sampler", "process"),
    [(name, LINEAR) for name in ("ddim", "iddpm", "es", "dpm++", "time-shift", "lcm")]
    + [("euler", DiffusionProcess.flow(10)), ("multistep", karras_process(karras_sigmas(18)))],
)
def test_numbers_of_steps_have_any_type_of_integer(sampler, process, kind):
    def network(x: Tensor, t: Tensor) -> Tensor:
        return x / 2

    latents, step_noise = noise_for(2, 4)
    given = {"latents": latents, "step_noise": step_noise, "prediction": "sample"}
    x = sample(network, process, sampler, kind(4), **given)
    assert x.equal(sample(network, process, sampler, 4, **given))


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


# -- few steps ---------------------------------------------------------------------------------------------


def gain(sampler: str, levels: list[tuple[float, float]], end: tuple[float, float]) -> float:
    """The standard deviation of samples of N(0, STD²) by the best model, from the factors and variances by hand."""
    variance = 1.0
    for i, (alpha, sigma) in enumerate(levels):
        after = levels[i + 1] if i + 1 < len(levels) else end
        x0 = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)  # the factor of x in x̂_0
        noise = (1 - alpha * x0) / sigma
        added = 0.0
        if sampler == "ddim":
            factor = after[0] * x0 + after[1] * noise
        elif sampler == "dpm++":  # of first order, in a form that does not use λ
            factor = after[1] / sigma + x0 * (after[0] - alpha * after[1] / sigma)
        else:  # x_s given x_t and x̂_0: precision and mean of two Gaussians, for x_t = ratio x_s + noise
            ratio = alpha / after[0]
            step = sigma**2 - ratio**2 * after[1] ** 2
            if after[1] == 0:
                factor = x0 * after[0]
            else:
                added = 1 / (1 / after[1] ** 2 + ratio**2 / step)
                factor = added * (after[0] * x0 / after[1] ** 2 + ratio / step)
        variance = factor**2 * variance + added
    return math.sqrt(variance)


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("spacing", ["own", "leading", "trailing", "linspace"])
@pytest.mark.parametrize("sampler", ["ddim", "time-shift", "iddpm", "es", "dpm++"])
def test_one_and_two_steps_have_the_spread_that_they_must_have(sampler, spacing, steps):
    """x_T ~ N(0, 1), a linear model and linear steps: the output is a Gaussian whose spread is known."""

    def model(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = points.levels(t, x)
        return sigma * x / (alpha**2 * STD**2 + sigma**2)

    options = {"window": 0} if sampler == "time-shift" else {"eps_scale": 1.0} if sampler == "es" else {}
    path = resolve(None, LINEAR, sampler, steps, {"spacing": spacing, **options}).path
    points = path.points if path.points.times.is_floating_point() else LINEAR
    latents, step_noise = noise_for(4000, steps)
    given = {"latents": latents.double(), "step_noise": step_noise, "clip": False, "spacing": spacing, **options}
    x = sample(model, LINEAR, sampler, steps, **given)
    rule = {"time-shift": "ddim", "es": "iddpm"}.get(sampler, sampler)
    expected = gain(rule, path.levels[:0:-1], path.end)
    assert x.std().item() == pytest.approx(expected, rel=0.02)
    if steps == 1:  # noise itself has a spread of 1
        assert x.std() < 0.5
        assert sampler == "dpm++" or path.times.tolist() == [999]


# -- what samples are --------------------------------------------------------------------------------------

EVERY = ["ddim", "iddpm", "es", "dpm++", "time-shift", "lcm"]


class Network(torch.nn.Module):
    """A network whose weights have a type of their own, which refuses points of another one."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer = torch.nn.Conv2d(1, 1, 1).to(dtype)
        self.seen: list[tuple[torch.dtype, bool]] = []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.seen.append((x.dtype, torch.is_inference_mode_enabled()))
        return self.layer(x)


@pytest.mark.parametrize("sampler", EVERY)
@pytest.mark.parametrize("latents", [True, False])
def test_samples_are_ordinary_tensors_and_calls_are_in_inference_mode(sampler, latents):
    network, modes = Network(torch.float32), []
    start = {"latents": torch.randn(2, 1, 4, 4)} if latents else {"shape": (2, 1, 4, 4)}
    x = sample(
        network, LINEAR, sampler, 2, on_evaluation=lambda _: modes.append(torch.is_inference_mode_enabled()), **start
    )
    assert not x.is_inference()
    assert not x.requires_grad
    assert all(inference for _, inference in network.seen)
    assert all(modes)
    torch.nn.functional.mse_loss(network.layer(x), x).backward()
    x.clamp_(-1, 1).requires_grad_()


@pytest.mark.parametrize("sampler", EVERY)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_network_is_called_in_the_type_of_its_weights(sampler, dtype):
    network = Network(dtype)
    make = torch.Generator().manual_seed(0)
    x = sample(network, LINEAR, sampler, 3, shape=(2, 1, 4, 4), generator=make)
    assert {seen for seen, _ in network.seen} == {dtype}
    assert x.dtype == torch.float32
    assert x.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_samples_have_the_type_of_given_latents_and_steps_that_of_float32_at_least(dtype):
    states, network = [], Network(torch.bfloat16)
    latents = torch.randn(2, 1, 4, 4, dtype=dtype)
    x = sample(network, LINEAR, "ddim", 3, latents=latents, on_evaluation=lambda e: states.append(e.x_t.dtype))
    assert x.dtype == dtype
    assert set(states) == {torch.promote_types(dtype, torch.float32)}
    assert {seen for seen, _ in network.seen} == {torch.bfloat16}
    seen = []
    sample(lambda x, t: seen.append(x.dtype) or x, LINEAR, "ddim", 1, latents=latents)  # a function has no type
    assert seen == [dtype]


def test_under_autocast_points_keep_their_type():
    network = Network(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        sample(network, LINEAR, "ddim", 2, shape=(1, 1, 4, 4))
        sample(network, LINEAR, "ddim", 2, latents=torch.zeros(1, 1, 4, 4, dtype=torch.bfloat16))
    assert [seen for seen, _ in network.seen] == 2 * [torch.float32] + 2 * [torch.bfloat16]


@pytest.mark.parametrize("generator", [True, False])
def test_points_are_on_the_device_of_the_model_wherever_they_are_drawn(generator):
    class Called(Exception):
        pass

    class Meta:
        device = torch.device("meta")  # stands for a GPU

        def __call__(self, x: Tensor, t: Tensor) -> Tensor:
            raise Called(x.device)

    network = torch.nn.Conv2d(1, 1, 1, device="meta")
    network.forward = lambda x, t: Meta()(x, t)
    drawn = torch.Generator().manual_seed(0) if generator else None
    for model in (Meta(), network):
        with pytest.raises(Called, match="meta"):
            sample(model, LINEAR, "ddim", 2, shape=(1, 1, 4, 4), generator=drawn)
