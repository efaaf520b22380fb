"""The forward process: a perturbation is a change of noise; tables against diffusers and by hand."""

from __future__ import annotations

import copy
import math
import re

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from hypothesis import given, settings
from hypothesis import strategies as st

import robustdiff
from robustdiff.errors import InputError
from robustdiff.objectives.denoising import DenoisingObjective
from robustdiff.process import PREDICTIONS, DiffusionProcess, absorb

PROCESSES = {
    "cosine": DiffusionProcess.cosine(1000),
    "linear": DiffusionProcess.linear(1000),
    "flow": DiffusionProcess.flow(100),
}


def gaussian(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", PROCESSES)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), fraction=st.floats(0, 0.999))
def test_moving_the_point_is_changing_the_noise(name, seed, fraction):
    process = PROCESSES[name]
    t = torch.full((3,), int(fraction * len(process)))
    x0, noise, delta = (gaussian(seed + i, 3, 2, 4) for i in range(3))
    moved = process.diffuse(x0, t, noise) + delta
    torch.testing.assert_close(process.diffuse(x0, t, process.absorb(noise, t, delta)), moved, rtol=1e-9, atol=1e-9)


def test_delta_is_detached():
    process = PROCESSES["cosine"]
    delta = torch.ones(1, 2, requires_grad=True)
    assert not process.absorb(torch.zeros(1, 2), torch.tensor([5]), delta).requires_grad


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_target_is_split_back_into_image_and_noise(name, prediction):
    process = PROCESSES[name]
    t = torch.tensor([0, len(process) // 2, int((process.alphas > 0).nonzero().max())])
    x0, noise = gaussian(0, 3, 5), gaussian(1, 3, 5)
    x_t = process.diffuse(x0, t, noise)
    split = process.split(prediction, x_t, t, process.target(prediction, x0, t, noise))
    torch.testing.assert_close(split[0], x0, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(split[1], noise, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("prediction", ["sample", "v_prediction", "flow"])
def test_a_target_is_split_even_where_no_signal_is_left(prediction):
    process, t = PROCESSES["flow"], torch.tensor([99, 99])
    assert process.alphas[99] == 0
    x0, noise = gaussian(0, 2, 5), gaussian(1, 2, 5)
    split = process.split(prediction, process.diffuse(x0, t, noise), t, process.target(prediction, x0, t, noise))
    torch.testing.assert_close(split, (x0, noise), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "schedule"), [("cosine", "squaredcos_cap_v2"), ("linear", "linear")]
)  # fmt: skip
def test_tables_are_those_of_diffusers(name, schedule):
    scheduler = DDPMScheduler(1000, beta_schedule=schedule)
    mine, theirs = PROCESSES[name], DiffusionProcess.from_scheduler(scheduler)
    # theirs are products of a thousand float32 numbers
    torch.testing.assert_close(mine.alphas, theirs.alphas, rtol=2e-4, atol=1e-6)
    torch.testing.assert_close(mine.sigmas, theirs.sigmas, rtol=2e-4, atol=1e-6)
    x0, noise, t = torch.randn(4, 3), torch.randn(4, 3), torch.tensor([0, 10, 500, 999])
    torch.testing.assert_close(mine.diffuse(x0, t, noise), scheduler.add_noise(x0, noise, t), rtol=1e-3, atol=1e-4)
    velocity = scheduler.get_velocity(x0, noise, t)
    torch.testing.assert_close(mine.target("v_prediction", x0, t, noise), velocity, rtol=1e-3, atol=1e-4)


def test_any_scheduler_with_alphas_cumprod_is_a_process():
    scheduler = DDIMScheduler(50, trained_betas=np.linspace(0.01, 0.2, 50).tolist())
    process = DiffusionProcess.from_scheduler(scheduler)
    assert len(process) == 50
    np.testing.assert_allclose(process.betas, np.linspace(0.01, 0.2, 50), rtol=1e-4)


@pytest.mark.parametrize("T", [100, 250, 4000])
def test_linear_betas_are_scaled_to_the_number_of_times(T):
    expected = np.linspace(0.1 / T, 20 / T, T)
    np.testing.assert_allclose(DiffusionProcess.linear(T).betas, expected, rtol=1e-8)


def test_flow_is_a_straight_line():
    process = DiffusionProcess.flow(4)
    assert process.alphas.tolist() == [0.75, 0.5, 0.25, 0.0]
    assert process.sigmas.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert process.times.tolist() == [250, 500, 750, 1000]
    assert not process.variance_preserving


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
def test_a_flow_is_continuous_in_time(shift):
    process = DiffusionProcess.flow(4, shift)
    u = torch.tensor([1e-6, 0.1, 0.25, 0.777, 1.0], dtype=torch.float64)
    sigma = shift * u / (1 + (shift - 1) * u)
    t = process.at(u)
    torch.testing.assert_close(t, 1000 * sigma)
    torch.testing.assert_close(process.at(torch.arange(1, 5).double() / 4), process.times)
    x0, noise, delta = (gaussian(i, 5, 3) for i in range(3))
    x_t = process.diffuse(x0, t, noise)
    torch.testing.assert_close(x_t, (1 - sigma[:, None]) * x0 + sigma[:, None] * noise)
    torch.testing.assert_close(process.diffuse(x0, t, process.absorb(noise, t, delta)), x_t + delta)
    torch.testing.assert_close(process.sigmas_at(t.float(), x0.half()), sigma.float())
    assert torch.equal(process.times_at(t, x0), t)
    few = process.respace(t)
    assert few.times.tolist() == t.tolist()
    torch.testing.assert_close(few.sigmas, sigma)


def test_fractions_of_discrete_times_are_indices():
    for T in (7, 100, 1000):
        u = torch.arange(1, T + 1, dtype=torch.float64) / T
        assert PROCESSES["linear"].respace(torch.arange(T)).at(u).tolist() == list(range(T))
    assert PROCESSES["linear"].at(torch.tensor([1e-9, 0.5, 0.50001, 1.0])).tolist() == [0, 499, 500, 999]


@pytest.mark.parametrize("t", [0.0, -1.0, 1000.1, math.nan, math.inf])
def test_a_continuous_time_that_does_not_exist_is_refused(t):
    x = torch.zeros(2, 3)
    for call in (PROCESSES["flow"].levels, PROCESSES["flow"].sigmas_at):
        with pytest.raises(ValueError, match=f"there is no time {t:g}.*above 0 and at most 1000"):
            call(torch.tensor([500.5, t]), x)


def test_the_posterior_is_gaussian_conditioning():
    """q(x_{t−1} | x_t, x_0) from the joint covariance of (x_{t−1}, x_t) given x_0, for two neighbouring times."""
    process = PROCESSES["linear"]
    a, betas = np.cumprod(1 - process.betas.numpy()), process.betas.numpy()
    for time in (1, 2, 400, 999):
        s = time - 1
        cov = np.array([[1 - a[s], math.sqrt(1 - betas[time]) * (1 - a[s])], [0, 1 - a[time]]])
        gain = cov[0, 1] / cov[1, 1]
        x0, x_t = 0.7, -0.4
        mean = math.sqrt(a[s]) * x0 + gain * (x_t - math.sqrt(a[time]) * x0)
        variance = cov[0, 0] - gain * cov[0, 1]
        got = process.posterior_mean(
            *(torch.tensor([[v]], dtype=torch.float64) for v in (x0, x_t)), torch.tensor([time])
        )
        assert got.item() == pytest.approx(mean, rel=1e-9)
        assert process.posterior_variance[time].item() == pytest.approx(variance, rel=1e-9)
        low, high = process.log_variance_range
        assert low[time].item() == pytest.approx(math.log(variance))
        assert high[time].item() == pytest.approx(math.log(betas[time]))
    assert process.posterior_variance[0] == 0
    assert process.log_variance_range[0][0] == process.log_variance_range[0][1]


def test_the_posterior_is_bayes_rule_on_a_grid():
    """q(x_{t−1} | x_t, x_0) ∝ q(x_t | x_{t−1}) q(x_{t−1} | x_0), both densities written out and summed."""
    betas = np.linspace(0.05, 0.6, 8)
    process = DiffusionProcess.from_betas(torch.from_numpy(betas))
    grid, x0, x_t = np.linspace(-12, 12, 20_001), 0.7, -0.4
    for time in range(1, 8):
        share = np.prod(1 - betas[:time])
        log_density = -((grid - math.sqrt(share) * x0) ** 2) / (2 * (1 - share))
        log_density -= (x_t - math.sqrt(1 - betas[time]) * grid) ** 2 / (2 * betas[time])
        density = np.exp(log_density - log_density.max())
        density /= density.sum()
        mean = (density * grid).sum()
        x = [torch.tensor([[value]], dtype=torch.float64) for value in (x0, x_t)]
        assert process.posterior_mean(*x, torch.tensor([time])).item() == pytest.approx(mean, abs=1e-9)
        variance = (density * (grid - mean) ** 2).sum()
        assert process.posterior_variance[time].item() == pytest.approx(variance, rel=1e-9)


def test_at_time_zero_the_posterior_is_the_image():
    x0, x_t = gaussian(0, 1, 4), gaussian(1, 1, 4)
    torch.testing.assert_close(PROCESSES["cosine"].posterior_mean(x0, x_t, torch.tensor([0])), x0)


def test_a_process_of_one_time_has_one_variance():
    low, high = DiffusionProcess.from_betas(torch.tensor([0.3])).log_variance_range
    assert low.item() == high.item() == pytest.approx(math.log(0.3))


@settings(max_examples=25, deadline=None)
@given(indices=st.lists(st.integers(0, 999), min_size=1, max_size=20, unique=True).map(sorted))
def test_a_respaced_process_has_the_same_levels(indices):
    process = PROCESSES["cosine"].respace(torch.tensor(indices))
    torch.testing.assert_close(torch.cumprod(1 - process.betas, 0), PROCESSES["cosine"].alphas_cumprod[indices])
    assert process.times.tolist() == indices


def test_respacing_twice_keeps_what_the_network_is_told():
    process = PROCESSES["flow"].respace(torch.arange(9, 100, 10)).respace(torch.tensor([0, 4, 9]))
    assert process.times.tolist() == pytest.approx([100, 500, 1000])
    assert process.sigmas.tolist() == pytest.approx([0.1, 0.5, 1])


@pytest.mark.parametrize(
    ("alphas", "sigmas"),
    [
        ([], []),
        ([1.0], [0.5, 0.5]),
        ([[1.0]], [[0.5]]),
        ([math.nan], [1.0]),
        ([1.0], [0.0]),
        ([-1.0], [1.0]),
        ([1.0], [math.inf]),
    ],
)
def test_bad_tables_are_refused(alphas, sigmas):
    with pytest.raises(ValueError, match="alpha"):
        DiffusionProcess(torch.tensor(alphas), torch.tensor(sigmas))


def test_an_unknown_prediction_is_named():
    x, t = torch.zeros(1, 1), torch.zeros(1, dtype=torch.long)
    for method in (PROCESSES["cosine"].target, PROCESSES["cosine"].split):
        with pytest.raises(ValueError, match="score"):
            method("score", x, t, x)


# -- diffusers' schedulers -----------------------------------------------------------------------------------

REFUSED = {
    "DDIMInverseScheduler",
    "DDPMWuerstchenScheduler",
    "EDMDPMSolverMultistepScheduler",
    "FlowMapEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "IPNDMScheduler",
    "KarrasVeScheduler",
    "LTXEulerAncestralRFScheduler",
    "RePaintScheduler",
    "SCMScheduler",
    "ScoreSdeVeScheduler",
    "UniPCMultistepScheduler-flow",
    "DPMSolverMultistepScheduler-flow",
    *(f"{name}Scheduler" for name in ("DPMSolverMultistep", "DPMSolverSinglestep", "DEISMultistep", "UniPCMultistep")),
}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
OTHERS = {
    "DDPMScheduler-zero-snr": lambda: DDPMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction"),
    "DDPMScheduler-sigmoid": lambda: DDPMScheduler(beta_schedule="sigmoid"),
    "DDPMScheduler-50": lambda: DDPMScheduler(50, trained_betas=np.linspace(1e-4, 0.02, 50)),
    "EulerDiscreteScheduler-karras": lambda: diffusers.EulerDiscreteScheduler(use_karras_sigmas=True),
    "FlowMatchEulerDiscreteScheduler-3": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    "FlowMatchEulerDiscreteScheduler-250": lambda: FlowMatchEulerDiscreteScheduler(250, shift=12.0),
    "UniPCMultistepScheduler-flow": lambda: diffusers.UniPCMultistepScheduler(**FLOW),
    "DPMSolverMultistepScheduler-flow": lambda: diffusers.DPMSolverMultistepScheduler(**FLOW, flow_shift=3.0),
}


def every_scheduler():
    """Each scheduler that diffusers exports and that can be made without arguments, and some with settings."""
    for name in dir(diffusers):
        kind = getattr(diffusers, name) if name.endswith("Scheduler") else None
        if isinstance(kind, type) and issubclass(kind, SchedulerMixin):
            try:
                yield name, kind()
            except (TypeError, ImportError):  # it needs arguments, or a package
                continue
    yield from ((name, make()) for name, make in OTHERS.items())


def add_noise(scheduler, x0, noise, times):
    """Return what the scheduler itself makes of x_0 at timesteps."""
    if hasattr(scheduler, "add_noise"):
        return scheduler.add_noise(x0, noise, times)
    return scheduler.scale_noise(x0, times, noise)


SCHEDULERS = dict(every_scheduler())


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_of_diffusers_agrees_or_is_refused_by_name(name):
    scheduler = SCHEDULERS[name]
    try:
        process = DiffusionProcess.from_scheduler(scheduler)
    except ValueError as error:
        discrete = {"BlockRefinementScheduler", "DiscreteDDIMScheduler", "EntropyBoundScheduler"}  # of text
        assert name in REFUSED | discrete or not hasattr(scheduler, "config") or name not in KNOWN
        assert type(scheduler).__name__ in str(error)
        assert "\n" not in str(error)
        if name == "DDPMWuerstchenScheduler":  # a scheduler of training, with levels by a continuous time
            assert str(error).endswith(
                "or, where the loop has σ, the factor of the noise in x_t, absorb(noise, delta, sigma)"
            )
        return
    assert name not in REFUSED
    index = torch.linspace(0, len(process) - 1, 7).long()
    x0, noise, delta = torch.randn(3, 7, 2, 4, generator=torch.Generator().manual_seed(0)).unbind()
    delta = 0.1 * delta
    times = process.times[index]
    x_t = add_noise(scheduler, x0, noise, times)
    scale = float(x_t.abs().max())
    torch.testing.assert_close(process.diffuse(x0, index, noise), x_t, rtol=1e-5, atol=1e-6 * scale)
    for t in (index, index.int(), times.float(), times.double()):
        moved = add_noise(scheduler, x0, process.absorb(noise, t, delta), times)
        torch.testing.assert_close(moved, x_t + delta, rtol=1e-5, atol=2e-6 * scale)


# Those that are known to be right: a new release of diffusers may bring others, which may be either.
KNOWN = (
    set(OTHERS)
    | {
        f"{name}Scheduler"
        for name in (
            *("DDPM", "DDIM", "PNDM", "LCM", "TCD", "UnCLIP", "CogVideoXDDIM", "CogVideoXDPM", "CMStochasticIterative"),
            *("EulerDiscrete", "EulerAncestralDiscrete", "LMSDiscrete", "HeunDiscrete", "KDPM2Discrete", "EDMEuler"),
            *("KDPM2AncestralDiscrete", "SASolver", "FlowMatchEulerDiscrete"),
        )
    }
    - REFUSED
)


@pytest.mark.parametrize("name", sorted(KNOWN - REFUSED))
def test_the_schedulers_of_training_are_not_refused(name):
    sigmas = DiffusionProcess.from_scheduler(SCHEDULERS[name]).sigmas
    assert (sigmas.diff() > 0).all() or (sigmas.diff() < 0).all(), "the noise grows, or falls, from time to time"


def test_the_loop_of_sd3_draws_positions_in_the_schedulers_timesteps():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    process = DiffusionProcess.from_scheduler(scheduler)
    index = torch.tensor([0, 300, 500, 999])
    x0, noise, delta = (gaussian(i, 4, 3) for i in range(3))
    sigma = scheduler.sigmas[index]
    x_t = (1 - sigma[:, None]) * x0 + sigma[:, None] * noise + delta
    for moved in (
        process.absorb(noise, index, delta),
        process.absorb(noise, scheduler.timesteps[index], delta),
        absorb(noise, delta, sigma),
        robustdiff.absorb(noise, delta, sigma[:, None]),
    ):
        torch.testing.assert_close((1 - sigma[:, None]) * x0 + sigma[:, None] * moved, x_t, rtol=1e-6, atol=1e-6)


def test_a_flow_has_the_times_of_a_shifted_scheduler():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    process = DiffusionProcess.flow(shift=3.0)
    torch.testing.assert_close(process.times.flip(0), scheduler.timesteps.double(), rtol=1e-6, atol=1e-6)
    # σ is a thousandth of the time, whatever the shift that it was drawn with.
    sigma = DiffusionProcess.flow().levels(scheduler.timesteps, torch.zeros(1, 2).double())[1]
    torch.testing.assert_close(sigma.flatten(), scheduler.sigmas.double(), rtol=1e-6, atol=0)


def test_an_euler_scheduler_has_no_factor_before_the_image():
    process = DiffusionProcess.from_scheduler(diffusers.EulerDiscreteScheduler())
    assert (process.alphas == 1).all()
    assert process.sigmas[-1] == pytest.approx(157.407, abs=1e-3)


def test_the_scheduler_is_asked_as_it_is():
    scheduler = diffusers.EulerDiscreteScheduler()
    scheduler.set_timesteps(10)
    process = DiffusionProcess.from_scheduler(scheduler)
    assert process.times.tolist() == scheduler.timesteps.tolist()
    assert process.sigmas.tolist() == pytest.approx(scheduler.sigmas[:-1].tolist())
    assert scheduler.step_index is None  # nothing of it has changed
    silent = diffusers.DPMSolverMultistepScheduler()
    silent.set_timesteps(10)  # now takes every other timestep for the last of ten
    with pytest.raises(ValueError, match=r"DPMSolverMultistepScheduler does not.*DDPMScheduler.from_config"):
        DiffusionProcess.from_scheduler(silent)


SOLVERS = ("DPMSolverMultistep", "DPMSolverSinglestep", "DEISMultistep", "UniPCMultistep", "DPMSolverMultistepInverse")
SETTINGS = (
    *({}, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"use_beta_sigmas": True}),
    *({"timestep_spacing": "leading"}, {"timestep_spacing": "trailing"}, {"rescale_betas_zero_snr": True}),
)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("steps", [None, 2, 20, 1000])
@pytest.mark.parametrize("name", SOLVERS)
def test_a_process_never_has_other_levels_than_the_network_is_told(name, steps, settings):
    """Schedulers for sampling add the noise of other times: they are right, or refused with their remedy."""
    kind = getattr(diffusers, f"{name}Scheduler")
    if settings.keys() - kind().config.keys():
        pytest.skip("it has no such setting")
    scheduler = kind(beta_schedule="scaled_linear", **settings)
    if steps is not None:
        scheduler.set_timesteps(steps)
    right = DDPMScheduler.from_config(scheduler.config)
    try:
        process = DiffusionProcess.from_scheduler(scheduler)
    except ValueError as error:
        assert re.fullmatch(rf"{name}Scheduler[^\n]*DDPMScheduler\.from_config\(scheduler\.config\)[^\n]*", str(error))
    else:
        assert not (steps is None and name != "DPMSolverMultistepInverse")
        index = process.times.long()
        torch.testing.assert_close(process.alphas_cumprod, right.alphas_cumprod.double()[index], rtol=2e-3, atol=1e-5)
    torch.testing.assert_close(
        DiffusionProcess.from_scheduler(right).alphas_cumprod[:-1], scheduler.alphas_cumprod.double()[:-1]
    )


EULERS = ("EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "LMSDiscrete", "KDPM2Discrete")
EULERS = (*EULERS, "KDPM2AncestralDiscrete")


def test_a_scheduler_of_continuous_times_is_one_of_a_preconditioned_network():
    settings = {"timestep_type": "continuous", "prediction_type": "v_prediction", "use_karras_sigmas": True}
    scheduler = diffusers.EulerDiscreteScheduler(**settings, sigma_min=0.002, sigma_max=700.0)
    with pytest.raises(InputError, match=r"or a preconditioned network with prediction='sample'"):
        DenoisingObjective(DiffusionProcess.from_scheduler(scheduler), "v_prediction")


@pytest.mark.parametrize("kind", ["UniPCMultistepScheduler", "DPMSolverMultistepScheduler"])
def test_a_sampling_scheduler_of_flow_matching_names_that_of_its_training(kind):
    scheduler = getattr(diffusers, kind)(**FLOW, flow_shift=3.0)
    for steps in (None, 20):
        if steps is not None:
            scheduler.set_timesteps(steps)
        with pytest.raises(ValueError, match=r"FlowMatchEulerDiscreteScheduler\(shift=3\).*flow\(T, 3\)") as error:
            DiffusionProcess.from_scheduler(scheduler)
        assert "\n" not in str(error.value)


def test_one_time_may_be_a_number():
    process, noise, delta = DiffusionProcess.linear(), gaussian(0, 3, 4), gaussian(1, 3, 4)
    assert torch.equal(process.absorb(noise, 5, delta), process.absorb(noise, torch.tensor([5] * 3), delta))
    assert process.index(5).tolist() == 5


@pytest.mark.parametrize("steps", [None, 20])
@pytest.mark.parametrize("name", EULERS)
def test_a_process_whose_network_has_a_scaled_input_is_for_own_loops(name, steps):
    scheduler = getattr(diffusers, f"{name}Scheduler")()
    if steps is not None:
        scheduler.set_timesteps(steps)
    process = DiffusionProcess.from_scheduler(scheduler)
    noise, delta = gaussian(0, 3, 4), gaussian(1, 3, 4)
    t = torch.tensor([0, 5, 10])
    torch.testing.assert_close(process.absorb(noise, t, delta), noise + delta / process.sigmas[t][:, None])
    for one in (process, process.respace(t), copy.deepcopy(process)):
        for prediction in ("epsilon", "v_prediction", "sample"):
            with pytest.raises(InputError, match=rf"{name}Scheduler.*DDPMScheduler\.from_config\(scheduler\.config\)"):
                DenoisingObjective(one, prediction)
        with pytest.raises(InputError, match=r"DDPMScheduler\.from_config\(scheduler\.config\)") as error:
            robustdiff.sample(lambda x, t: x, one, "ddim", 2, shape=(1, 1, 4, 4))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["EDMEuler", "CMStochasticIterative"])
def test_a_process_of_preconditioned_networks_is_for_them(name):
    process = DiffusionProcess.from_scheduler(SCHEDULERS[f"{name}Scheduler"])
    with pytest.raises(InputError, match=rf"{name}Scheduler.*prediction='sample'"):
        DenoisingObjective(process)
    with pytest.raises(InputError, match=rf"{name}Scheduler.*prediction='sample'"):
        robustdiff.sample(lambda x, t: x, process, "multistep", 2, shape=(1, 1, 4, 4))
    DenoisingObjective(process, "sample")
    robustdiff.sample(lambda x, t: 0 * x, process, "multistep", 2, shape=(1, 1, 4, 4), prediction="sample")


@pytest.mark.parametrize("name", ["DDPM", "DDIM", "PNDM", "LCM", "TCD", "UnCLIP", "SASolver"])
def test_a_process_whose_network_has_the_point_itself_is_for_all(name):
    process = DiffusionProcess.from_scheduler(SCHEDULERS[f"{name}Scheduler"])
    assert DenoisingObjective(process).process is process


@pytest.mark.parametrize("scheduler", [DDIMScheduler(rescale_betas_zero_snr=True), FlowMatchEulerDiscreteScheduler()])
def test_noise_is_not_predicted_where_there_is_no_signal(scheduler):
    process = DiffusionProcess.from_scheduler(scheduler)
    with pytest.raises(InputError, match=r"ends without any signal.*predicts v_prediction or sample"):
        DenoisingObjective(process)
    for prediction in ("v_prediction", "sample"):
        DenoisingObjective(process, prediction)


@pytest.mark.parametrize("T", [1, 2, 10, 19, 20])
def test_the_linear_schedule_has_more_than_twenty_times(T, tmp_path, robustdiff):
    with pytest.raises(InputError, match=f"more than 20 times.*T={T}"):
        DiffusionProcess.linear(T)
    assert DiffusionProcess.linear(21).alphas[-1] > 0
    outcome = robustdiff(
        "train",
        "digits",
        "--set",
        "process.name=linear",
        "--set",
        f"process.T={T}",
        "--set",
        f"output={tmp_path / 'run'}",
    )
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("t", [5, 500, 900])
def test_the_target_is_as_precise_as_delta_is(t):
    """A loop that keeps its noise in bfloat16 has the levels in the precision of δ."""
    process = DiffusionProcess.cosine()
    noise, delta = torch.zeros(1, 4, dtype=torch.bfloat16), torch.ones(1, 4)
    expected = 1 / process.sigmas[t].float()
    for found in (process.absorb(noise, torch.tensor([t]), delta), absorb(noise, delta, process.sigmas[t])):
        torch.testing.assert_close(found, expected.expand(1, 4), rtol=1e-6, atol=0)


@pytest.mark.parametrize("first", [0.0, 1e-9])
def test_a_time_without_noise_is_named(first):
    scheduler = DDPMScheduler(4, trained_betas=[first, 0.1, 0.1, 0.1])
    with pytest.raises(ValueError, match=r"σ = 0 at timestep 0.*betas"):
        DiffusionProcess.from_scheduler(scheduler)


# -- which time --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8, torch.float32, torch.float64])
def test_a_time_is_the_same_in_every_type(dtype):
    noise, delta = gaussian(0, 4, 3), gaussian(1, 4, 3)
    t = torch.tensor([5, 6, 7, 200])
    expected = noise + delta / PROCESSES["linear"].sigmas[t][:, None]
    torch.testing.assert_close(PROCESSES["linear"].absorb(noise, t.to(dtype), delta), expected)


def test_one_time_may_stand_for_the_batch():
    noise, delta = gaussian(0, 4, 3), gaussian(1, 4, 3)
    process, five = PROCESSES["linear"], torch.full((4,), 5)
    for t in (torch.tensor(5), torch.tensor([5]), torch.tensor(5.0)):
        torch.testing.assert_close(process.absorb(noise, t, delta), process.absorb(noise, five, delta))


@pytest.mark.parametrize(
    ("t", "message"),
    [
        ([1000, 2], "t must be in"),
        ([-1, 2], "t must be in"),
        ([0.5, 2.0], "there is no time 0.5"),
        ([2.0, 1000.0], "there is no time 1000"),
        ([math.nan, 2.0], "there is no time nan"),
        ([True, False], "boolean"),
    ],
)
def test_a_time_that_does_not_exist_is_refused(t, message):
    x = torch.zeros(2, 3)
    for call in (PROCESSES["linear"].absorb, lambda noise, t, delta: PROCESSES["linear"].levels(t, noise)):
        with pytest.raises(ValueError, match=message):
            call(x, torch.tensor(t), x)


def test_where_nothing_can_be_read_back_an_unknown_time_makes_nan():
    """The index behind the table, which a GPU gives for a time that it does not find."""
    process = PROCESSES["linear"]
    assert process._sigmas.at(torch.tensor([1000]), torch.zeros(1, 2)).isnan().all()
    assert process._sigmas.at(torch.tensor([999]), torch.zeros(1, 2)).isfinite().all()


def test_a_table_that_was_first_used_while_sampling_serves_training():
    process, x0 = DiffusionProcess.linear(100), torch.randn(2, 3, requires_grad=True)
    t = torch.tensor([1, 2])
    with torch.inference_mode():
        process.diffuse(x0.detach(), t, x0.detach())
    process.diffuse(x0, t, torch.randn(2, 3)).sum().backward()
    assert x0.grad is not None


# -- by sigma ----------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), log_sigma=st.floats(-6, 5))
def test_absorbing_by_sigma_is_absorbing(seed, log_sigma):
    x0, noise, delta = (gaussian(seed + i, 3, 2, 4) for i in range(3))
    sigma = math.exp(log_sigma)
    moved = x0 + sigma * absorb(noise, delta, torch.full((3,), sigma, dtype=torch.float64))
    torch.testing.assert_close(moved, x0 + sigma * noise + delta, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        absorb(noise, delta, sigma), absorb(noise, delta, torch.full((3, 1, 1), sigma, dtype=torch.float64))
    )
    assert not absorb(noise, delta.requires_grad_(), sigma).requires_grad


@pytest.mark.parametrize(
    ("sigma", "message"),
    [(torch.ones(2), "shape"), (torch.ones(3, 2), "shape"), (torch.tensor([1.0, 0.0, 1.0]), "positive"), (0.0, "pos")],
)
def test_a_sigma_that_does_not_fit_is_refused(sigma, message):
    with pytest.raises(ValueError, match=message):
        absorb(torch.zeros(3, 4), torch.zeros(3, 4), sigma)


@pytest.mark.parametrize("shape", [(3, 1), (1, 4), (3, 4, 1), (4,), (6, 4)])
@pytest.mark.parametrize(
    "call", [absorb, lambda noise, delta, _: PROCESSES["linear"].absorb(noise, torch.tensor(5), delta)]
)
def test_noise_and_delta_of_two_shapes_are_refused(call, shape):
    with pytest.raises(ValueError, match="one shape"):
        call(torch.zeros(3, 4), torch.zeros(shape), 1.0)


@pytest.mark.parametrize(("batch", "shape"), [(1, (1, 6)), (1, (6,)), (3, (2,)), (3, (3, 4)), (3, (1, 3)), (3, (4, 1))])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_times_that_are_not_of_the_batch_are_refused(batch, shape, dtype):
    process, x = PROCESSES["linear"], torch.zeros(batch, 4, 6)
    t = torch.full(shape, 5, dtype=dtype)
    for call in (
        lambda: process.absorb(x, t, x),
        lambda: process.diffuse(x, t, x),
        lambda: process.target("v_prediction", x, t, x),
        lambda: process.split("epsilon", x, t, x),
    ):
        with pytest.raises(ValueError, match=rf"t must have shape \(B,\) with B = {batch}; got"):
            call()


def test_times_may_be_shaped_to_multiply_the_batch():
    process, x = PROCESSES["linear"], gaussian(0, 3, 4, 6)
    t = torch.tensor([5, 6, 7])
    assert torch.equal(process.absorb(x, t[:, None, None], x), process.absorb(x, t, x))
