"""Pipelines of Stable Diffusion are read, called and sampled as diffusers does, and saved again."""

from __future__ import annotations

import json
import logging
import shutil
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler

from robustdiff.backbones.lora import LoraSection
from robustdiff.backbones.model import Model, load_model
from robustdiff.errors import InputError
from robustdiff.samplers import sample

pytest.importorskip("transformers")
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PROMPTS = ["A red shoe", "blue"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, make_sd_pipeline: Any) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sd")
    return {kind: make_sd_pipeline(folder / kind, kind) for kind in ("sd", "xl", "lcm")}


@pytest.fixture
def copied(saved: dict[str, Path], tmp_path: Path) -> Any:
    def copy(kind: str) -> Path:
        return Path(shutil.copytree(saved[kind], tmp_path / kind))

    return copy


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def images_of(
    model: Model,
    latents: torch.Tensor,
    guidance: float,
    negative: str | None = None,
    sampler: str = "ddim",
    steps: int = 5,
) -> torch.Tensor:
    condition = model.condition
    ours = sample(
        model,
        model.process,
        sampler,
        steps,
        latents=latents,
        guidance=guidance,
        condition=condition.batch(None, PROMPTS, None),
        unconditional=condition.empty() if negative is None else condition.batch(None, [negative], None),
    )
    return (model.codec.decode(ours) / 2 + 0.5).clamp(0, 1)


def pipeline_of(folder: Path) -> Any:
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def of_diffusers(
    pipeline: Any, latents: torch.Tensor, guidance: float, negative: str | None = None, steps: int = 5
) -> torch.Tensor:
    result = pipeline(
        PROMPTS,
        num_inference_steps=steps,
        guidance_scale=guidance,
        latents=latents,
        output_type="np",
        negative_prompt=None if negative is None else [negative] * len(PROMPTS),
    )
    return torch.from_numpy(result.images).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def both(saved: dict[str, Path]) -> dict[str, tuple[Model, Any]]:
    return {kind: (load_model(saved[kind]), pipeline_of(saved[kind])) for kind in ("sd", "xl")}


LEADING: dict[str, Any] = {**BETAS, "timestep_spacing": "leading", "steps_offset": 1}
SCHEDULERS = {
    "ddim": (DDIMScheduler(**LEADING, clip_sample=False, set_alpha_to_one=False), "ddim"),
    "v-prediction": (DDIMScheduler(**LEADING, clip_sample=False, prediction_type="v_prediction"), "ddim"),
    "trailing": (DDIMScheduler(**{**LEADING, "timestep_spacing": "trailing"}, clip_sample=False), "ddim"),
    "dpm++": (DPMSolverMultistepScheduler(**LEADING), "dpm++"),
    "euler": (EulerDiscreteScheduler(**LEADING), "ddim"),
}


@pytest.mark.parametrize("kind", ["sd", "xl"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_images_are_those_of_diffusers(both: dict[str, tuple[Model, Any]], kind: str, name: str) -> None:
    scheduler, sampler = SCHEDULERS[name]
    loaded, pipeline = both[kind]
    pipeline.scheduler = scheduler
    model = Model(loaded.backbone, scheduler, loaded.codec)
    assert model.prediction == ("v_prediction" if name == "v-prediction" else "epsilon")
    latents = torch.randn(2, *model.shape, generator=torch.Generator().manual_seed(0))
    found = []
    for guidance, negative in ((1.0, None), (5.0, None), (5.0, "blue shoe")):
        found.append(images_of(model, latents, guidance, negative, sampler))
        wanted = of_diffusers(pipeline, latents, guidance, negative)
        torch.testing.assert_close(found[-1], wanted, rtol=0, atol=1e-5)
    for one, other in ((0, 1), (1, 2)):
        assert (found[one] - found[other]).abs().max() > 1e-3


def with_scheduler(pair: tuple[Model, Any], scheduler: Any) -> tuple[Model, Any, torch.Tensor]:
    """Return our model and diffusers' pipeline with another scheduler, and latents for both."""
    loaded, pipeline = pair
    pipeline.scheduler = scheduler
    model = Model(loaded.backbone, scheduler, loaded.codec)
    return model, pipeline, torch.randn(2, *model.shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("spacing", "steps"), [("trailing", 5), ("linspace", 4)])
def test_euler_over_all_times_is_ddim_from_a_little_less_noise(
    both: dict[str, tuple[Model, Any]], spacing: str, steps: int
) -> None:
    """With these spacings diffusers begins at σ_T ε in place of ε. The four times of linspace are whole numbers."""
    scheduler = EulerDiscreteScheduler(**BETAS, timestep_spacing=spacing)
    model, pipeline, latents = with_scheduler(both["xl"], scheduler)
    last = float(model.process.sigmas[-1])
    assert 0.997 < last < 0.998
    ours = images_of(model, last * latents, 5.0, steps=steps)
    torch.testing.assert_close(ours, of_diffusers(pipeline, latents, 5.0, steps=steps), rtol=0, atol=1e-5)


def test_ddim_that_clips_derives_the_noise_from_what_is_clipped(
    both: dict[str, tuple[Model, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As guided-diffusion and ``use_clipped_model_output`` do; the pipeline leaves the noise as it was."""
    scheduler = DDIMScheduler(**LEADING, clip_sample=True)
    model, pipeline, latents = with_scheduler(both["xl"], scheduler)
    ours, plain = images_of(model, latents, 5.0), of_diffusers(pipeline, latents, 5.0)
    assert (ours - plain).abs().max() > 1e-3
    step = partial(scheduler.step, use_clipped_model_output=True)
    monkeypatch.setattr(scheduler, "step", lambda *given, **options: step(*given, **{**options, "eta": 0.0}))
    torch.testing.assert_close(ours, of_diffusers(pipeline, latents, 5.0), rtol=0, atol=1e-5)


def test_settings_that_the_pipeline_corrects_are_corrected(copied: Any, caplog: pytest.LogCaptureFixture) -> None:
    folder = copied("sd")
    edit(folder / "scheduler" / "scheduler_config.json", steps_offset=0, clip_sample=True)
    model = load_model(folder)
    assert (model.scheduler.config.steps_offset, model.scheduler.config.clip_sample) == (1, False)
    latents = torch.randn(2, *model.shape, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        wanted = of_diffusers(pipeline_of(folder), latents, 1.0)
    torch.testing.assert_close(images_of(model, latents, 1.0), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["sd", "xl", "lcm"])
def test_what_is_saved_loads_without_complaints_and_gives_the_same_images(
    saved: dict[str, Path], tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = load_model(saved[kind])
    model.save(tmp_path / "again")
    again = load_model(tmp_path / "again")
    assert again.fingerprint() == model.fingerprint()
    assert again.condition == model.condition
    with caplog.at_level(logging.WARNING), warnings.catch_warnings():
        warnings.simplefilter("error")
        pipeline = pipeline_of(tmp_path / "again")
    assert not caplog.records
    assert type(pipeline) is type(pipeline_of(saved[kind]))
    latents = torch.randn(2, *model.shape)
    if kind == "lcm":
        generators = [torch.Generator().manual_seed(0) for _ in range(2)]
        images = [
            one(PROMPTS, num_inference_steps=2, latents=latents, output_type="np", generator=generator).images
            for one, generator in zip((pipeline, pipeline_of(saved[kind])), generators, strict=True)
        ]
        assert np.array_equal(*images)
    else:
        wanted = of_diffusers(pipeline, latents, 5.0)
        torch.testing.assert_close(images_of(again, latents, 5.0), wanted, rtol=0, atol=1e-5)


def test_the_geometry_of_images_is_passed_on(both: dict[str, tuple[Model, Any]]) -> None:
    model, _ = both["xl"]
    geometry = torch.tensor([[30, 20, 3, 0], [8, 8, 0, 0]])
    condition = model.condition.batch(None, PROMPTS, torch.tensor([False, True]), geometry)
    assert not condition["encoder_hidden_states"][1].any()  # force_zeros_for_empty_prompt
    x, t = torch.randn(2, 4, 4, 4), torch.tensor([3, 700])
    added = {
        "text_embeds": condition["text_embeds"],
        "time_ids": torch.cat([geometry, torch.full((2, 2), 8)], dim=1).float(),
    }
    with torch.no_grad():
        wanted = model.network(x, t, condition["encoder_hidden_states"], added_cond_kwargs=added).sample
        assert torch.equal(model(x, t, **condition).sample, wanted)
        del condition["geometry"]  # whole images
        whole = model(x, t, **condition).sample
    assert not torch.equal(whole[0], wanted[0])
    torch.testing.assert_close(whole[1], wanted[1])


def test_the_empty_condition_may_be_the_empty_caption(copied: Any) -> None:
    folder = copied("xl")
    edit(folder / "model_index.json", force_zeros_for_empty_prompt=False)
    model = load_model(folder)
    assert torch.equal(model.condition.empty()["text_embeds"], model.condition.batch(None, [""], None)["text_embeds"])
    latents = torch.randn(2, *model.shape)
    wanted = of_diffusers(pipeline_of(folder), latents, 5.0)
    torch.testing.assert_close(images_of(model, latents, 5.0), wanted, rtol=0, atol=1e-5)
    model.save(folder / "again")
    assert pipeline_of(folder / "again").config.force_zeros_for_empty_prompt is False


@pytest.mark.parametrize("kind", ["sd", "xl"])
def test_a_guidance_embedding_changes_nothing_at_first(both: dict[str, tuple[Model, Any]], kind: str) -> None:
    model, _ = both[kind]
    student = model.backbone.with_guidance_embedding(6)
    assert student.network.config.time_cond_proj_dim == 6
    x, t, condition = torch.randn(2, 4, 4, 4), torch.tensor([3, 700]), model.condition.batch(None, PROMPTS, None)
    call = student.bind(student.network)
    with torch.no_grad():
        assert torch.equal(
            call(x, t, timestep_cond=torch.randn(2, 6), **condition).sample, model(x, t, **condition).sample
        )
    own = dict(model.network.named_parameters())
    for name, parameter in student.network.named_parameters():
        assert parameter.requires_grad
        assert name not in own or parameter.data_ptr() != own[name].data_ptr()
    call(x, t, timestep_cond=torch.randn(2, 6), **condition).sample.sum().backward()
    assert student.network.time_embedding.cond_proj.weight.grad.any()
    assert student.with_guidance_embedding(6) is student
    with pytest.raises(InputError, match="of 6 numbers, and 7 are asked for"):
        student.with_guidance_embedding(7)
    with pytest.raises(InputError, match="no embedding of the guidance scale"):
        model(x, t, timestep_cond=torch.randn(2, 6), **condition)
    with pytest.raises(InputError, match="UNet2DModel takes no embedding of the guidance scale"):
        load_model("fashion-16").backbone.with_guidance_embedding(6)


def test_other_sizes_are_sampled(saved: dict[str, Path]) -> None:
    model = load_model(saved["xl"], size=16)
    assert model.image_shape == (3, 16, 16)
    latents = torch.randn(2, *model.shape)
    pipeline = pipeline_of(saved["xl"])
    images = pipeline(
        PROMPTS, height=16, width=16, num_inference_steps=5, guidance_scale=1.0, latents=latents, output_type="np"
    ).images
    torch.testing.assert_close(
        images_of(model, latents, 1.0), torch.from_numpy(images).permute(0, 3, 1, 2), rtol=0, atol=1e-5
    )
    with pytest.raises(InputError, match="give a multiple of 2 pixels"):
        load_model(saved["xl"], size=11)


@pytest.mark.parametrize("adapted", [False, True])
def test_the_size_of_a_model_from_before_0_9_stays_when_it_is_saved(copied: Any, adapted: bool) -> None:
    """StableDiffusionPipeline sets the size of a UNet that diffusers before 0.9 saved to 512 pixels, in place."""
    folder = copied("sd")
    edit(folder / "unet" / "config.json", _diffusers_version="0.6.0")
    model = load_model(folder)
    if adapted:
        pytest.importorskip("peft")
        model.add_lora(LoraSection(rank=2), 0)
    (folder / "again").mkdir()
    model.save(folder / "again")
    assert model.image_shape == (3, 8, 8)
    assert load_model(folder / "again").image_shape == (3, 8, 8)


def test_the_safety_checker_is_said_to_be_dropped(copied: Any, caplog: pytest.LogCaptureFixture) -> None:
    folder = copied("sd")
    edit(
        folder / "model_index.json",
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPImageProcessor"],
        requires_safety_checker=True,
    )
    with caplog.at_level(logging.WARNING):
        model = load_model(folder)
    assert caplog.text.count("the safety checker is neither applied nor saved again") == 1
    model.save(folder / "again")
    assert json.loads((folder / "again" / "model_index.json").read_text())["requires_safety_checker"] is False


@pytest.mark.parametrize(
    ("kind", "part", "fields", "words"),
    [
        ("sd", "model_index.json", {"_class_name": "StableDiffusionImg2ImgPipeline"}, "StableDiffusionXLPipeline"),
        ("sd", "model_index.json", {"vae": ["diffusers", "AutoencoderTiny"]}, "only AutoencoderKL"),
        ("sd", "model_index.json", {"text_encoder": None}, "has no text_encoder"),
        ("xl", "model_index.json", {"tokenizer_2": [None, None]}, "has no tokenizer_2"),
        ("sd", "model_index.json", {"text_encoder": ["transformers", "T5EncoderModel"]}, "only CLIPTextModel is"),
        ("sd", "model_index.json", {"image_encoder": ["transformers", "CLIPVisionModel"]}, "conditioned on images"),
        ("sd", "model_index.json", {"_class_name": "LatentConsistencyModelPipeline"}, "time_cond_proj_dim is null"),
        ("sd", "unet/config.json", {"cross_attention_dim": 16}, "embeddings of 16 numbers .* makes 12"),
        ("sd", "unet/config.json", {"in_channels": 9}, "9 channels in and 4 out.*inpainting"),
        ("sd", "unet/config.json", {"class_embed_type": "timestep"}, "class_embed_type"),
        ("sd", "unet/config.json", {"sample_size": -1}, "sample_size=-1 is no size"),
        ("lcm", "unet/config.json", {"_guidance_range": [4, 2]}, "_guidance_range="),
        ("sd", "unet/config.json", {"layers_per_block": 100000}, "numbers of layers do not fit"),
        ("sd", "unet/config.json", {"transformer_layers_per_block": [[9999]]}, "numbers of layers do not fit"),
        ("sd", "unet/config.json", {"addition_embed_type": "text"}, "one text encoder"),
        ("sd", "unet/config.json", {"time_cond_proj_dim": 8}, "lacks 1 of its"),
        ("xl", "unet/config.json", {"addition_embed_type": None}, "two text encoders"),
        ("xl", "unet/config.json", {"projection_class_embeddings_input_dim": 50}, "refiner"),
        ("sd", "text_encoder/config.json", {"vocab_size": 10}, "text encoder cannot be read"),
        ("sd", "vae/config.json", {"shift_factor": 0.1}, "does not shift latents"),
        ("xl", "vae/config.json", {"shift_factor": 0.1}, "does not shift latents"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(copied: Any, kind: str, part: str, fields: Any, words: str) -> None:
    folder = copied(kind)
    edit(folder / part, **fields)
    with pytest.raises(InputError, match=words) as error:
        load_model(folder)
    assert "\n" not in str(error.value)


def test_a_text_encoder_without_transformers_is_refused(
    saved: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=r"install the extra text \(pip install '\.\[text\]' in the clone"):
        load_model(saved["sd"])


def test_a_network_alone_is_called_with_embeddings(both: dict[str, tuple[Model, Any]]) -> None:
    loaded, _ = both["sd"]
    model = Model.of(loaded.network, loaded.scheduler)
    condition = loaded.condition.batch(None, PROMPTS, None)
    x, t = torch.randn(2, 4, 4, 4), torch.tensor([3, 700])
    with torch.no_grad():
        assert torch.equal(model(x, t, **condition).sample, loaded(x, t, **condition).sample)
    with pytest.raises(InputError, match="has no text encoder"):
        model.condition  # noqa: B018
