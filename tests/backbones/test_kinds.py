"""What a checkpoint's scheduler says is honoured, as diffusers' own loops show, or refused in one line."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from robustdiff.backbones.kinds.kind import KINDS, ModelKind, kind_of, mark_as_own
from robustdiff.backbones.model import Model
from robustdiff.errors import InputError
from robustdiff.evaluation.generate import Generator
from robustdiff.evaluation.noise import ImageNoise
from robustdiff.objectives.preconditioning import Preconditioned
from robustdiff.process import DiffusionProcess

ONE = torch.device("cpu")


def unet(channels: int = 1, out: int | None = None, classes: int | None = None) -> diffusers.UNet2DModel:
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8,
        in_channels=channels,
        out_channels=out or channels,
        layers_per_block=1,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        norm_num_groups=4,
        num_class_embeds=classes,
    ).eval()


NETWORK = unet()


def described(scheduler) -> ModelKind:
    return Model.of(NETWORK, scheduler).kind


def ours(scheduler, sampler: str, steps: int, network=NETWORK, **options) -> tuple[Tensor, list[float]]:
    """Two images, and the times at which the network was called."""
    times: list[float] = []
    generator = Generator.of(
        Model.of(network, scheduler), sampler=sampler, steps=steps, seed=3, options=options or None
    )

    def seen(evaluation) -> None:
        times.append(float(evaluation.process.times_at(evaluation.index[:1], evaluation.x_t)))

    return generator.sample(range(2), None, on_evaluation=seen), times


@torch.no_grad()
def theirs(scheduler, steps: int, network=NETWORK, scale: float | None = None, **step_options) -> Tensor:
    """Diffusers' own loop from the same latents, with the same noise in each step where the scheduler takes it."""
    noise = ImageNoise(3, range(2), (1, 8, 8), ONE)
    scheduler.set_timesteps(steps)
    x = noise.draw() * (scheduler.init_noise_sigma if scale is None else scale)
    for t in scheduler.timesteps:
        given = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        output = network(given, t).sample
        if isinstance(scheduler, diffusers.DDPMScheduler) and t != scheduler.timesteps[-1]:
            # Its noise comes from the generator that it is given: shown here by what it adds.
            mean = _ddpm_mean(scheduler, output, t, x)
            x = mean + scheduler._get_variance(int(t)).sqrt() * noise.draw()
        else:
            x = scheduler.step(output, t, x, **step_options).prev_sample
    return x


def _ddpm_mean(scheduler, output: Tensor, t: Tensor, x: Tensor) -> Tensor:
    """The mean of a DDPM step: the step without its noise, which a generator of known numbers shows."""
    one, two = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    step = scheduler.step(output, t, x, generator=one).prev_sample
    return step - scheduler._get_variance(int(t)).sqrt() * torch.randn(x.shape, generator=two)


SPACED = [
    {"timestep_spacing": "leading"},
    {"timestep_spacing": "leading", "steps_offset": 1},
    {"timestep_spacing": "trailing"},
    {"timestep_spacing": "linspace"},
]


@pytest.mark.parametrize("settings", SPACED)
@pytest.mark.parametrize("steps", [1, 3, 10])
@pytest.mark.parametrize(
    ("kind", "sampler"),
    [("DDIMScheduler", "ddim"), ("DDPMScheduler", "iddpm"), ("DPMSolverMultistepScheduler", "dpm++")],
)
def test_the_times_are_those_that_the_scheduler_visits(kind, sampler, steps, settings):
    if kind == "DDPMScheduler" and settings["timestep_spacing"] == "linspace" and steps == 3:
        settings = {**settings, "num_train_timesteps": 1000}
    scheduler = getattr(diffusers, kind)(**settings)
    _, times = ours(scheduler, sampler, steps)
    scheduler.set_timesteps(steps)
    expected = scheduler.timesteps.tolist()
    if expected in ([0], [1]):  # diffusers' only step is at the least noisy time, and returns the noise
        expected = [999]
    assert times == expected


@pytest.mark.parametrize("steps", [2, 10])
@pytest.mark.parametrize(
    "settings",
    [
        {"timestep_spacing": "trailing"},
        {"timestep_spacing": "leading", "steps_offset": 1},
        {"set_alpha_to_one": False},
        {"clip_sample": False},
        {"clip_sample_range": 0.4},
        {"thresholding": True, "dynamic_thresholding_ratio": 0.8, "sample_max_value": 1.5},
        {"prediction_type": "sample"},
        {"prediction_type": "v_prediction"},
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    ],
)
def test_ddim_gives_what_diffusers_gives(settings, steps):
    scheduler = diffusers.DDIMScheduler(**settings)
    mine, _ = ours(scheduler, "ddim", steps)
    expected = theirs(scheduler, steps, eta=0.0, use_clipped_model_output=True)
    if settings.get("rescale_betas_zero_snr"):
        assert mine.isfinite().all()  # theirs divides by the signal, of which there is none
        assert mine.std() > 0.1
        return
    torch.testing.assert_close(mine, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {"variance_type": "fixed_small"},
        {"variance_type": "fixed_large"},
        {"timestep_spacing": "trailing"},
        {"clip_sample": False},
        {"clip_sample_range": 0.5, "variance_type": "fixed_large"},
        {"thresholding": True, "sample_max_value": 2.0},
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    ],
)
def test_iddpm_gives_what_diffusers_gives(settings):
    mine, _ = ours(diffusers.DDPMScheduler(**settings), "iddpm", 5)
    torch.testing.assert_close(mine, theirs(diffusers.DDPMScheduler(**settings), 5), rtol=2e-4, atol=2e-4)


def test_a_small_and_a_large_variance_are_two_results():
    small, _ = ours(diffusers.DDPMScheduler(variance_type="fixed_small"), "iddpm", 5)
    large, _ = ours(diffusers.DDPMScheduler(variance_type="fixed_large"), "iddpm", 5)
    assert (small - large).abs().max() > 0.05


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
@pytest.mark.parametrize("thresholding", [False, True])
def test_dpmpp_gives_what_diffusers_gives(spacing, thresholding):
    settings = {"timestep_spacing": spacing, "thresholding": thresholding, "euler_at_final": False}
    mine, _ = ours(diffusers.DPMSolverMultistepScheduler(**settings), "dpm++", 12)
    expected = theirs(diffusers.DPMSolverMultistepScheduler(**settings), 12)
    torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("steps", [2, 4, 9])
@pytest.mark.parametrize(
    "settings", [{"shift": 3.0}, {}, {"shift": 0.5, "num_train_timesteps": 250}, {"shift": 3.0, "shift_terminal": 0.1}]
)
def test_euler_gives_what_diffusers_flow_matching_gives(settings, steps):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**settings)
    mine, times = ours(scheduler, "euler", steps, clip=False)
    expected = theirs(scheduler, steps, scale=1.0)
    assert times == pytest.approx(scheduler.timesteps.tolist())
    torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps", [1, 4])
def test_the_levels_of_a_second_order_solver_are_visited_once(steps):
    scheduler = diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0)
    _, times = ours(scheduler, "euler", steps, clip=False)
    scheduler.set_timesteps(steps)
    assert times == pytest.approx(scheduler.timesteps[::2].tolist())


@pytest.mark.parametrize("kind", ["UniPCMultistepScheduler", "DPMSolverMultistepScheduler"])
def test_a_multistep_scheduler_of_flow_sigmas_is_a_flow(kind):
    scheduler = getattr(diffusers, kind)(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    assert kind_of(scheduler) is KINDS["flow"]
    assert Model.of(NETWORK, scheduler).prediction == "flow"
    _, times = ours(scheduler, "euler", 6)
    scheduler.set_timesteps(6)
    assert times == pytest.approx((1000 * scheduler.sigmas[:6]).tolist(), rel=1e-5)


def test_an_edm_scheduler_is_euler_in_its_own_time():
    """With levels that are a table of 1000, four steps are at indices that are whole."""
    scheduler = diffusers.EDMEulerScheduler()
    assert described(scheduler).model(NETWORK).denoise.time_scale == 0.25
    mine, _ = ours(scheduler, "ddim", 4, clip=False)
    # x_T is of unit variance here, and of σ_max there: √(1 + σ_max²) and σ_max.
    expected = theirs(scheduler, 4, scale=(1 + 80.0**2) ** 0.5)
    torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-3)


def test_a_consistency_model_is_clipped_as_its_scheduler_says():
    assert "clip" not in described(diffusers.CMStochasticIterativeScheduler()).sampling()  # that of the codec
    assert described(diffusers.CMStochasticIterativeScheduler(clip_denoised=False)).sampling()["clip"] is False


def test_what_this_package_trained_keeps_its_own_times():
    scheduler = mark_as_own(diffusers.EDMEulerScheduler())
    denoise = described(scheduler).model(NETWORK).denoise
    assert isinstance(denoise, Preconditioned)
    assert denoise.time_scale == 250
    assert "spacing" not in described(scheduler).sampling()
    ddpm = mark_as_own(diffusers.DDPMScheduler())
    again = diffusers.DDPMScheduler.from_config(ddpm.config, prediction_type="v_prediction")
    assert "spacing" not in described(again).sampling()
    assert "spacing" in described(diffusers.DDPMScheduler()).sampling()


def test_an_option_comes_before_the_checkpoint():
    scheduler = diffusers.DDIMScheduler(timestep_spacing="trailing", clip_sample=False)
    _, times = ours(scheduler, "ddim", 5, spacing="linspace")
    assert times == [999, 749, 500, 250, 0]
    _, times = ours(scheduler, "ddim", 5, spacing="own")
    assert times == [800, 600, 400, 200, 0]
    wild, _ = ours(scheduler, "ddim", 5)
    tame, _ = ours(scheduler, "ddim", 5, clip=0.01)
    assert tame.abs().max() <= 0.01 + 1e-6 < wild.abs().max()


@pytest.mark.parametrize("name", ["use_karras_sigmas", "use_exponential_sigmas"])
def test_a_spacing_that_is_not_known_is_asked_for(name):
    scheduler = diffusers.EulerDiscreteScheduler(**{name: True})
    with pytest.raises(InputError, match=f"{name}.*--spacing"):
        ours(scheduler, "ddim", 5)
    images, _ = ours(scheduler, "ddim", 5, spacing="linspace")
    assert images.isfinite().all()


def test_an_offset_that_leads_too_far_is_named():
    with pytest.raises(InputError, match="offset of 200"):
        ours(diffusers.DDIMScheduler(steps_offset=200), "ddim", 10)


def test_zero_terminal_snr_with_v_is_right_at_the_last_time(monkeypatch):
    """x̂_0 = −v there: a network that is right everywhere gives the one image that there is."""
    scheduler = diffusers.DDIMScheduler(
        rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing"
    )
    process = described(scheduler).process()
    assert process.alphas[-1] == 0
    image = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def network(x: Tensor, t: Tensor, **condition: Tensor) -> Tensor:
        alpha, sigma = process.levels(t.long(), x)
        return alpha * (x - alpha * image) / sigma - sigma * image

    for sampler in ("ddim", "iddpm", "es", "time-shift", "dpm++"):
        for steps in (1, 4, 1000 if sampler == "ddim" else 20):
            model = Model.of(NETWORK, scheduler)
            monkeypatch.setattr(model.backbone, "bind", lambda _: network)
            x = Generator.of(model, sampler=sampler, steps=steps).sample(range(2), None)
            atol = 0.1 if sampler == "es" else 1e-3  # es takes a part of the noise away
            torch.testing.assert_close(x, image.expand_as(x), rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: diffusers.DDIMScheduler(rescale_betas_zero_snr=True), "prediction=epsilon.*zero terminal SNR"),
        (lambda: diffusers.DDPMScheduler(prediction_type="trigflow"), "prediction_type=trigflow"),
        (lambda: diffusers.DDPMScheduler(prediction_type="flow_prediction"), "prediction_type=flow_prediction"),
        (lambda: diffusers.DDPMScheduler(variance_type="learned_range"), "variance_type=learned_range"),
        (lambda: diffusers.DDPMScheduler(variance_type="learned"), "variance_type=learned"),
        (lambda: diffusers.DDPMScheduler(50, trained_betas=np.linspace(0, 0.02, 50)), "ᾱ = 1 at time 0"),
        (lambda: diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True), "prediction_type=epsilon"),
        (lambda: diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "use_dynamic_shifting"),
        (lambda: diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), "stochastic_sampling=true"),
        (lambda: diffusers.EDMEulerScheduler(prediction_type="v_prediction"), "prediction_type=v_prediction"),
        (lambda: diffusers.EDMEulerScheduler(sigma_schedule="exponential"), "sigma_schedule=exponential"),
        (lambda: diffusers.ScoreSdeVeScheduler(), "ScoreSdeVeScheduler"),
    ],
)
def test_what_cannot_be_honoured_is_refused_in_one_line(make, words):
    with pytest.raises(InputError, match=words) as error:
        Generator.of(Model.of(NETWORK, make()))
    assert "\n" not in str(error.value)


def test_two_c_output_channels_are_not_a_fixed_variance():
    with pytest.raises(InputError, match="variance_type=fixed_small"):
        Generator.of(Model.of(unet(1, 2), diffusers.DDPMScheduler()))
    assert Model.of(unet(1, 2), diffusers.DDIMScheduler()).kind.objective().variance == "learned_range"


def test_an_euler_like_scheduler_is_variance_preserving_for_its_network():
    process = described(diffusers.EulerDiscreteScheduler()).process()
    torch.testing.assert_close(process.alphas, DiffusionProcess.from_scheduler(diffusers.DDPMScheduler()).alphas)


class Brownian(diffusers.DDPMScheduler):
    """A scheduler of another package."""


def test_a_kind_of_another_package_is_found_by_its_scheduler(monkeypatch):
    class Bridge(KINDS["diffusion"]):
        name, general = "bridge", False

        @classmethod
        def reads(cls, scheduler) -> bool:
            return isinstance(scheduler, Brownian)

    assert described(Brownian()).name == "diffusion"
    monkeypatch.setitem(KINDS._entries, "bridge", Bridge)
    assert described(Brownian()).name == "bridge"
    assert described(diffusers.DDPMScheduler()).name == "diffusion"


def test_every_kind_is_registered_under_its_name():
    assert {name: kind.name for name, kind in KINDS.items()} == {name: name for name in KINDS}
    assert set(KINDS) == {"consistency", "diffusion", "edm", "flow", "lcm"}
