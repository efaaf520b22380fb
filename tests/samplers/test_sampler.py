"""A sampler is one file with one rule: found by its name, with options of its own, for the processes that suit it."""

from __future__ import annotations

import math
from importlib.metadata import EntryPoint
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from pydantic import Field
from torch import Tensor

from robustdiff import DiffusionProcess, sample
from robustdiff.errors import InputError
from robustdiff.evaluation.generate import Generator
from robustdiff.objectives.preconditioning import karras_process, karras_sigmas
from robustdiff.samplers import SAMPLERS
from robustdiff.samplers.denoiser import DynamicThreshold
from robustdiff.samplers.sample import resolve, suited
from robustdiff.samplers.sampler import Sampler, Step

COSINE, FLOW = DiffusionProcess.cosine(1000), DiffusionProcess.flow(30)
CONSISTENCY = karras_process(karras_sigmas(18))


def model(x: Tensor, t: Tensor) -> Tensor:
    return 0.5 * x


@pytest.fixture
def damped():
    """A sampler as a third party writes it."""

    @SAMPLERS.register("damped")
    class Damped(Sampler):
        strength: float = Field(0.5, ge=0, le=1)

        def step(self, step: Step) -> Tensor:
            return self.strength * super().step(step)

    yield
    del SAMPLERS._entries["damped"]


def test_every_sampler_is_found_and_each_kind_of_model_has_a_default():
    assert list(SAMPLERS) == ["ddim", "dpm++", "es", "euler", "iddpm", "lcm", "multistep", "time-shift"]
    assert suited(COSINE) == ("ddim", "dpm++", "es", "iddpm", "lcm", "time-shift")
    assert (suited(FLOW), suited(CONSISTENCY)) == (("euler",), ("multistep",))
    assert suited(DiffusionProcess(torch.tensor([0.9]), torch.tensor([0.7]))) == ()


def test_a_new_sampler_needs_nothing_but_its_class(damped, robustdiff, tmp_path):
    latents = torch.ones(1, 1, 4, 4)
    out = sample(model, COSINE, "damped", 1, latents=latents, strength=0.25)
    torch.testing.assert_close(out, 0.25 * sample(model, COSINE, "ddim", 1, latents=latents))
    assert "damped" in suited(COSINE)
    with pytest.raises(InputError, match=r"strength of damped.*less than or equal to 1; got 2"):
        sample(model, COSINE, "damped", 1, latents=latents, strength=2)
    with pytest.raises(InputError, match="strength is for damped, not for ddim"):
        sample(model, COSINE, "ddim", 1, latents=latents, strength=0.5)
    words = ["fashion-16", "--num", 2, "--steps", 2, "--sampler", "damped", "--output", tmp_path / "x.npz"]
    outcome = robustdiff("sample", *words)
    assert outcome.code == 0, outcome.err


def test_an_installed_package_brings_its_own(tmp_path, monkeypatch):
    (tmp_path / "halved_sampler.py").write_text(
        "from robustdiff.samplers.sampler import SAMPLERS, Sampler\n\n"
        "@SAMPLERS.register('halved')\n"
        "class Halved(Sampler):\n"
        "    def step(self, step):\n"
        "        return super().step(step) / 2\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(SAMPLERS, "_loaded", False)
    point = EntryPoint("halved", "halved_sampler", "robustdiff.samplers")
    monkeypatch.setattr("robustdiff.registry.entry_points", lambda group: [point] if group == point.group else [])
    latents = torch.ones(1, 1, 4, 4)
    try:
        out = sample(model, COSINE, "halved", 1, latents=latents)
    finally:
        SAMPLERS._entries.pop("halved", None)
    torch.testing.assert_close(out, sample(model, COSINE, "ddim", 1, latents=latents) / 2)


@pytest.mark.parametrize(
    ("sampler", "options", "words"),
    [
        ("ddim", {"window": 3}, "window is for time-shift, not for ddim"),
        ("ddim", {"variance": "fixed_large"}, "variance is for es and iddpm, not for ddim"),
        ("iddpm", {"variance": "large"}, "variance of iddpm: .*'fixed_small' or 'fixed_large'; got 'large'"),
        ("ddim", {"walk": 1}, "walk is for no sampler, not for ddim"),
        ("ddim", {"steps": "10", "spacing": lambda steps, T: torch.arange(steps)}, "'10' say the times themselves"),
        ("ddim", {"unconditional": {"class_labels": 5}}, "unconditional is for guidance .*: give guidance too"),
        ("time-shift", {"cutoff": 2.5}, "cutoff of time-shift: .*got 2.5"),
        ("dpm++", {"eps_scale": True}, "eps_scale of dpm.*true"),
        ("es", {"eps_scale": (-0.5, 1.0)}, "positive at all times"),
        (
            "euler",
            {},
            r"the sampler euler does not suit this process, as it needs α \+ σ = 1: use ddim or .*, for diffusion m",
        ),
        ("dpm++", {"steps": "ddim5"}, "steps 'ddim5' are for ddim, es, iddpm, time-shift"),
        ("ddim", {"spacing": "even"}, "unknown spacing 'even'"),
        ("ddim", {"spacing": 3}, "unknown spacing 3"),
        ("ddim", {"spacing": []}, r"unknown spacing \[\]"),
        ("ddim", {"steps_offset": "1", "spacing": "leading"}, "steps_offset must be a whole number; got '1'"),
        *(("ddim", {"clip": clip}, "clip must be a positive number, True") for clip in (math.nan, 0, -1, "x", [])),
        ("dpm++", {"clip": True}, r"clip=True is not for dpm\+\+"),
        ("dpm++", {"clip": 0.5}, r"clip=0.5 is not for dpm\+\+.*DynamicThreshold"),
        ("ddim", {"steps_offset": 1}, "give spacing=leading too"),
        ("ddim", {"steps_offset": 1, "spacing": "trailing"}, "give spacing=leading too"),
    ],
)
def test_what_a_sampler_does_not_take_is_said_in_one_line(sampler, options, words):
    with pytest.raises(InputError, match=words) as error:
        sample(model, COSINE, sampler, **{"steps": 5, "shape": (1, 1, 4, 4), **options})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["sampler", "steps", "process"])
def test_an_argument_is_no_option(name):
    with pytest.raises(InputError, match=f"^{name} is no option of ddim: "):
        resolve(None, COSINE, "ddim", 5, {name: 3})


def test_what_a_sampler_does_anyway_may_be_said():
    given = {"steps": 3, "latents": torch.zeros(1, 1, 4, 4)}
    assert torch.equal(sample(model, COSINE, "dpm++", clip=False, **given), sample(model, COSINE, "dpm++", **given))
    assert sample(model, COSINE, "ddim", spacing="leading", steps_offset=1, **given).isfinite().all()


def test_an_option_that_is_none_is_the_default():
    sampler, *_ = resolve(None, COSINE, "time-shift", 5, {"window": None, "cutoff": 7, "eps_scale": None})
    assert sampler.model_dump() == {"eps_scale": 1.0, "window": 30, "cutoff": 7}


def test_a_process_for_which_there_is_no_sampler_is_said():
    with pytest.raises(InputError, match=r"does not suit this process, .*: no sampler does"):
        resolve(None, DiffusionProcess(torch.tensor([0.9]), torch.tensor([0.7])), "ddim", 1, {})


def test_times_are_computed_once():
    calls = []

    def spacing(steps: int, T: int) -> Tensor:
        calls.append(steps)
        return torch.arange(steps)

    sample(model, COSINE, "ddim", 5, shape=(1, 1, 4, 4), spacing=spacing)
    assert calls == [5]


@pytest.mark.parametrize("steps", [7, 30, 31, 100])
def test_euler_takes_any_number_of_steps_over_continuous_times(steps):
    path = resolve(None, FLOW, "euler", steps, {}).path
    torch.testing.assert_close(path.points.sigmas, torch.arange(1, steps + 1).double() / steps)
    torch.testing.assert_close(path.points.times, 1000 * path.points.sigmas)
    table = DiffusionProcess(FLOW.alphas, FLOW.sigmas, FLOW.times)
    if steps > 30:
        with pytest.raises(InputError, match="between 1 and 30"):
            resolve(None, table, "euler", steps, {})
    else:
        indices = resolve(None, table, "euler", steps, {}).path.times
        assert indices.tolist() == [29 - i * 30 // steps for i in reversed(range(steps))]


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("codec", [None, SimpleNamespace(clip=0.5), SimpleNamespace(clip=None)])
def test_by_default_pixels_are_clipped_and_latents_are_not(channels, codec):
    def five(x: Tensor, t: Tensor) -> Tensor:
        return torch.full_like(x, 5.0)

    def highest(**options) -> float:
        shape = (1, channels, 4, 4)
        return sample(five, COSINE, "ddim", 2, shape=shape, prediction="sample", **options).max().item()

    if codec is not None:
        five.codec = codec
        assert highest() == (codec.clip or 5.0)
    else:
        assert highest() == (1.0 if channels in (1, 3) else 5.0)
    assert (highest(clip=True), highest(clip=False), highest(clip=0.25)) == (1.0, 5.0, 0.25)
    assert highest(clip=DynamicThreshold(maximum=2.0)) == 1.0


def test_a_dynamic_threshold_leaves_what_is_within_the_range():
    x0 = torch.linspace(-0.7, 0.7, 48).reshape(1, 3, 4, 4)
    assert torch.equal(DynamicThreshold()(x0), x0)


def test_guidance_leaves_the_default_of_the_model():
    class Model:
        codec: ClassVar = SimpleNamespace(clip=None)

        def __call__(self, x: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
            return torch.full_like(x, 5.0)

    labels = {"class_labels": torch.tensor([0]), "unconditional": {"class_labels": 1}, "guidance": 2.0}
    out = sample(Model(), COSINE, "ddim", 2, shape=(1, 1, 4, 4), prediction="sample", **labels)
    assert out.max() == 5


def test_the_defaults_of_generation_are_the_samplers():
    assert (Generator.load("fashion-16").sampler, Generator.load("fashion-16").steps) == ("ddim", 20)
    assert SAMPLERS["multistep"].default_steps == 2
    assert SAMPLERS["multistep"].grid_steps == (1, 2, 4, 8)


def test_a_path_ends_where_the_sampler_says():
    assert resolve(None, COSINE, "ddim", 5, {}).path.end == (1.0, 0.0)
    levels = float(COSINE.alphas[0]), float(COSINE.sigmas[0])
    path = resolve(None, COSINE, "ddim", 5, {"set_alpha_to_one": False}).path
    assert path.end == path.levels[0] == levels
    assert resolve(None, CONSISTENCY, "multistep", 3, {}).path.end == (1.0, 0.002)
