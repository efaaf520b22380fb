"""Multistep consistency sampling is diffusers' own, noise for noise, and the command line's images with it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline, DDPMScheduler
from diffusers.models.unets.unet_2d import UNet2DModel

from robustdiff import DiffusionProcess, sample
from robustdiff.backbones.model import Model
from robustdiff.data import to_uint8
from robustdiff.errors import InputError
from robustdiff.evaluation.generate import Generator
from robustdiff.evaluation.noise import ImageNoise
from robustdiff.objectives.preconditioning import Preconditioned, karras_process, karras_sigmas
from robustdiff.samplers.multistep import scale_numbers


def small_unet(channels: int = 3, classes: int | None = None) -> UNet2DModel:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, in_channels=channels, out_channels=channels, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, norm_num_groups=4,
        attention_head_dim=8, num_class_embeds=classes,
    )  # fmt: skip
    return unet.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    scheduler = CMStochasticIterativeScheduler(num_train_timesteps=18, sigma_data=0.7, sigma_max=50.0)
    Model.of(small_unet(), scheduler).save(path)
    return path


@pytest.fixture
def given_noise(monkeypatch):
    """Return what diffusers draws in its steps, from outside."""
    from diffusers.schedulers import scheduling_consistency_models as module

    noises = []
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: noises.pop(0))
    return noises


def by_diffusers(folder: Path, noise: list[torch.Tensor], given_noise: list[torch.Tensor], **steps) -> torch.Tensor:
    pipeline = ConsistencyModelPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    # The pipeline calls its scheduler's noise even after the last step, where it has no weight.
    given_noise[:] = [*noise[1:], torch.zeros_like(noise[0])]
    images = pipeline(batch_size=len(noise[0]), latents=noise[0].clone(), output_type="pt", **steps).images
    return images * 2 - 1


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8, 17])
def test_the_command_makes_the_images_of_diffusers_pipeline(robustdiff, folder, tmp_path, given_noise, steps):
    outcome = robustdiff("sample", folder, "--sampler", "multistep", "--steps", steps, "--num", 5, "--seed", 3,
                         "--output", tmp_path / "a.npz", "--cpu")  # fmt: skip
    assert outcome.code == 0, outcome.err
    drawn = ImageNoise(3, range(5), (3, 8, 8), torch.device("cpu"))
    expected = by_diffusers(folder, [drawn.draw() for _ in range(steps)], given_noise, num_inference_steps=steps)
    with np.load(tmp_path / "a.npz") as file:
        images = torch.from_numpy(file["arr_0"]).permute(0, 3, 1, 2)
    difference = (images.int() - to_uint8(expected).int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 0.01
    assert images.unique().numel() > 20


@pytest.mark.parametrize(("text", "numbers"), [("0,9,17", [9, 0]), ("0,3,12", [12, 3, 0]), ("0", [0]), ("4,7", [7, 4])])
def test_scales_by_their_numbers(folder, given_noise, text, numbers):
    noise = list(torch.randn(4, 2, 3, 8, 8, generator=torch.Generator().manual_seed(0)))[: len(numbers)]
    unet = small_unet()
    process = karras_process(karras_sigmas(18, sigma_max=50.0))
    model = Preconditioned(unet, 0.7, 0.002)
    out = sample(model, process, "multistep", text, latents=noise[0], step_noise=noise[1:], prediction="sample")
    first = karras_sigmas(18, sigma_max=50.0)[17 - numbers[-1]].item() / 50
    expected = by_diffusers(folder, [first * noise[0], *noise[1:]], given_noise, timesteps=numbers)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_numbers_of_scales_are_spaced_as_diffusers_spaces_them():
    for N in (18, 40, 151):
        scheduler = CMStochasticIterativeScheduler(num_train_timesteps=N)
        for steps in (1, 2, 4, 8, N - 1):
            scheduler.set_timesteps(steps)
            sigmas = karras_sigmas(N).flip(0)[scale_numbers(steps, N)]
            np.testing.assert_allclose(sigmas, scheduler.sigmas[:-1], rtol=1e-6)


def test_a_last_scale_without_noise_costs_nothing():
    assert scale_numbers("0,22,39", 40) == scale_numbers("0,22", 40) == [0, 22]


@pytest.mark.parametrize("steps", [0, -1, 18, "", "a", "3,1", "2,2", "-1,3", "0,18", "17", "ddim5"])
def test_scales_that_there_are_not(steps):
    with pytest.raises(InputError, match=r"17"):
        scale_numbers(steps, 18)


def test_images_are_clipped_unless_asked_otherwise():
    process = karras_process(karras_sigmas(18))
    latents = torch.ones(1, 1, 2, 2)
    for clip, expected in ((True, 1.0), (False, 5.0)):
        out = sample(
            lambda x, sigma: torch.full_like(x, 5.0), process, "multistep", 1,
            latents=latents, prediction="sample", clip=clip,
        )  # fmt: skip
        assert torch.equal(out, torch.full_like(out, expected))


def test_class_labels_reach_the_network(tmp_path):
    Model.of(small_unet(classes=3), CMStochasticIterativeScheduler(num_train_timesteps=18)).save(tmp_path)
    one, other = (Generator.load(tmp_path, label=label, steps=1) for label in (0, 2))
    first, second = (next(iter(g.images(range(4))))[1] for g in (one, other))
    assert not torch.equal(first, second)


# -- what suits what ------------------------------------------------------------------------------------------


def test_a_consistency_model_is_sampled_by_multistep_unless_told(folder):
    generator = Generator.load(folder)
    assert (generator.sampler, generator.steps) == ("multistep", 2)
    assert (Generator.load("fashion-16").sampler, Generator.load("fashion-16").steps) == ("ddim", 20)


@pytest.mark.parametrize(
    ("model", "arguments", "words"),
    [
        (None, ["--sampler", "ddim"], ["ddim does not suit this process", "use multistep, for consistency models"]),
        (
            "fashion-16",
            ["--sampler", "multistep"],
            ["multistep does not suit this process", "use ddim", "for diffusion models"],
        ),
        (None, ["--steps", "18"], ["between 1 and 17", "18"]),
        (None, ["--steps", "3,2"], ["3,2", "ascending"]),
        (None, ["--set", "eps_scale=1.01"], ["eps_scale", "multistep"]),
        (None, ["--set", "window=3"], ["time-shift", "multistep"]),
    ],
)
def test_what_does_not_suit_is_said_in_one_line(robustdiff, folder, tmp_path, model, arguments, words):
    outcome = robustdiff("sample", model or folder, "--num", 2, "--output", tmp_path / "x.npz", *arguments)
    assert outcome.code == 2
    assert outcome.err.count("\n") <= 2
    for word in words:
        assert word in outcome.err
    assert not list(tmp_path.iterdir())


def test_flows_keep_their_own_sampler():
    with pytest.raises(InputError, match=r"multistep does not suit this process.*: use euler"):
        sample(lambda x, t: x, DiffusionProcess.flow(10), "multistep", 1, shape=(1, 1, 2, 2), prediction="flow")


def test_evaluate_takes_one_two_four_and_eight_steps(robustdiff, tmp_path):
    Model.of(small_unet(1), CMStochasticIterativeScheduler(num_train_timesteps=18)).save(tmp_path / "model")
    Model.of(small_unet(1), DDPMScheduler()).save(tmp_path / "diffusion")
    words = ["--data", "digits", "--num", 12, "--cpu"]
    outcome = robustdiff("evaluate", tmp_path / "model", *words)
    assert outcome.code == 0, outcome.err
    for steps in (1, 2, 4, 8):
        assert re.search(rf"multistep {steps} ", outcome.out), outcome.out
    outcome = robustdiff("evaluate", tmp_path / "model", tmp_path / "diffusion", *words)
    assert outcome.code == 2
    assert "multistep does not suit this process" in outcome.err
