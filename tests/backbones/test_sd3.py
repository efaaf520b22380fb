"""Stable Diffusion 3: pipelines of diffusers are read, called and sampled as diffusers does, and saved again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from torch import Tensor

from robustdiff.backbones.model import Model, load_model
from robustdiff.errors import InputError
from robustdiff.samplers import sample

pytest.importorskip("transformers")

PROMPTS = ["A red shoe", "a blue shirt"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, make_sd3_pipeline: Any) -> Path:
    return make_sd3_pipeline(tmp_path_factory.mktemp("sd3") / "pipeline")


@pytest.fixture
def pipeline(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / "p")
    return tmp_path / "p"


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def images_of(model: Model, latents: Tensor, guidance: float, prompts: list[str] = PROMPTS) -> Tensor:
    ours = sample(
        model,
        model.process,
        "euler",
        4,
        latents=latents,
        guidance=guidance,
        condition=model.condition.batch(None, prompts, None),
        unconditional=model.condition.empty(),
    )
    return (model.codec.decode(ours) / 2 + 0.5).clamp(0, 1)


def of_diffusers(folder: Path, **components: Any) -> StableDiffusion3Pipeline:
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, **components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def theirs(pipeline: StableDiffusion3Pipeline, latents: Tensor, guidance: float) -> Tensor:
    height, width = (2 * side for side in latents.shape[2:])
    images = pipeline(
        PROMPTS,
        num_inference_steps=4,
        guidance_scale=guidance,
        latents=latents,
        height=height,
        width=width,
        output_type="np",
    ).images
    return torch.from_numpy(images).permute(0, 3, 1, 2)


DYNAMIC = {"use_dynamic_shifting": True, "base_image_seq_len": 4, "max_image_seq_len": 64}


@pytest.mark.parametrize("t5", [True, False])
def test_images_are_those_of_diffusers_with_and_without_guidance(
    tmp_path: Path, make_sd3_pipeline: Any, t5: bool
) -> None:
    folder = make_sd3_pipeline(tmp_path / "first", t5)
    load_model(folder).save(tmp_path / "again")
    model = load_model(tmp_path / "again")
    assert model.image_shape == (3, 8, 8)
    latents = torch.randn(2, *model.shape)
    parts = {} if t5 else {"text_encoder_3": None, "tokenizer_3": None}
    pipelines = [of_diffusers(path, **parts) for path in (folder, tmp_path / "again")]
    images = []
    for guidance in (1.0, 3.0):
        images.append(images_of(model, latents, guidance))
        for pipeline in pipelines:
            torch.testing.assert_close(images[-1], theirs(pipeline, latents, guidance), rtol=0, atol=1e-5)
    assert (images[0] - images[1]).abs().max() > 1e-3
    assert (images[1] - images_of(model, latents, 3.0, PROMPTS[::-1])).abs().max() > 1e-3


@pytest.mark.parametrize("settings", [{}, {"time_shift_type": "linear", "shift_terminal": 0.1}])
def test_images_are_those_of_diffusers_with_a_dynamic_shift(saved: Path, settings: Any) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(**DYNAMIC, **settings)
    model = Model(load_model(saved).backbone, scheduler, load_model(saved).codec)
    pipeline = of_diffusers(saved, scheduler=scheduler)
    latents = torch.randn(2, *model.shape)
    torch.testing.assert_close(images_of(model, latents, 3.0), theirs(pipeline, latents, 3.0), rtol=0, atol=1e-5)


def test_the_network_is_called_with_its_time_and_embeddings(saved: Path) -> None:
    model = load_model(saved)
    x, t = torch.randn(2, *model.shape), torch.tensor([3.5, 700.0])
    embeddings = {"encoder_hidden_states": torch.randn(2, 5, 24), "pooled_projections": torch.randn(2, 14)}
    with torch.no_grad():
        wanted = model.network(hidden_states=x, timestep=t, **embeddings).sample
        torch.testing.assert_close(model(x, t, **embeddings).sample, wanted, rtol=0, atol=0)
    assert model.prediction == "flow"
    assert model.samplers == ("euler",)
    torch.testing.assert_close(model.process.sigmas[499], torch.tensor(3 * 0.5 / 2, dtype=torch.float64))


def test_layers_with_two_attentions_are_read(tmp_path: Path, make_sd3_pipeline: Any) -> None:
    """The transformer of Stable Diffusion 3.5 medium."""
    folder = make_sd3_pipeline(tmp_path / "p", dual_attention_layers=(0,), qk_norm="rms_norm")
    model = load_model(folder)
    latents = torch.randn(2, *model.shape)
    wanted = theirs(of_diffusers(folder), latents, 3.0)
    torch.testing.assert_close(images_of(model, latents, 3.0), wanted, rtol=0, atol=1e-5)


def test_a_network_takes_the_size_of_the_data_once(saved: Path, tmp_path: Path) -> None:
    model = load_model(saved, 16)
    assert model.image_shape == (3, 16, 16)
    assert model.backbone.tokens == 16
    model = load_model(saved)
    model.check_shape((3, 16, 8))
    assert model.image_shape == (3, 16, 8)
    model.save(tmp_path / "p")
    again = load_model(tmp_path / "p")
    assert again.image_shape == (3, 16, 8)
    latents = torch.randn(2, *again.shape)
    ours = images_of(again, latents, 2.0)
    torch.testing.assert_close(ours, theirs(of_diffusers(tmp_path / "p"), latents, 2.0), rtol=0, atol=1e-5)
    with pytest.raises(InputError, match="takes images of 16×8, the data has 8×8"):
        again.check_shape((3, 8, 8))


def test_data_or_a_size_that_does_not_fit_is_refused(saved: Path) -> None:
    model = load_model(saved)
    for shape, words in (
        ((3, 6, 8), "multiples of 4 pixels, not 6×8"),
        ((3, 20, 8), "sides up to 16 pixels, not 20×8"),
        ((1, 8, 8), "takes 3 channels and the data has 1: set data.channels=3"),
    ):
        with pytest.raises(InputError, match=words):
            model.check_shape(shape)
    for size in (0, 6, 20):
        with pytest.raises(InputError, match="pixels"):
            load_model(saved, size)


def test_a_dynamic_shift_follows_the_size(saved: Path) -> None:
    """μ is 0.5 at 4 tokens and 1.15 at 64; an image of 16×16 pixels has 16."""
    given = load_model(saved)
    model = Model(given.backbone, FlowMatchEulerDiscreteScheduler(**DYNAMIC), given.codec)
    shift = torch.tensor(0.5, dtype=torch.float64).exp()
    torch.testing.assert_close(model.process.sigmas[499], shift * 0.5 / (1 + (shift - 1) * 0.5))
    model.check_shape((3, 16, 16))
    shift = torch.tensor(0.5 + 0.65 * 12 / 60, dtype=torch.float64).exp()
    torch.testing.assert_close(model.process.sigmas[499], shift * 0.5 / (1 + (shift - 1) * 0.5))
    levels = FlowMatchEulerDiscreteScheduler(**DYNAMIC)
    levels.set_timesteps(3, mu=0.5 + 0.65 * 12 / 60)
    torch.testing.assert_close(model.sampling["spacing"](3, 1000), levels.sigmas[:3].double())


@pytest.mark.parametrize(
    ("part", "fields", "words"),
    [
        ("model_index.json", {"_class_name": "StableDiffusion3Img2ImgPipeline"}, "only a StableDiffusion3Pipeline"),
        ("model_index.json", {"text_encoder": [None, None]}, "has no text_encoder:"),
        ("model_index.json", {"text_encoder_2": ["os", "system"]}, "text_encoder_2 is system of os"),
        ("model_index.json", {"tokenizer_3": [None, None]}, "has no tokenizer_3"),
        ("model_index.json", {"text_encoder_3": [None, None]}, "has no text_encoder_3"),
        ("model_index.json", {"tokenizer_2": ["transformers", "T5TokenizerFast"]}, "only CLIPTokenizer"),
        ("model_index.json", {"vae": [None, None]}, "vae is null"),
        ("model_index.json", {"image_encoder": ["transformers", "SiglipVisionModel"]}, "conditioned on images"),
        ("transformer/config.json", {"num_layers": 100_000}, "num_layers of 100000 in all do not fit the weights"),
        ("transformer/config.json", {"sample_size": 0}, "sample_size=0 is no number"),
        ("transformer/config.json", {"_sample_size": [4, "x"]}, "_sample_size="),
        ("transformer/config.json", {"pos_embed_max_size": None}, "pos_embed_max_size=null is no number"),
        ("transformer/config.json", {"pos_embed_max_size": 5}, "not of the network"),
        ("transformer/config.json", {"out_channels": 8}, "its output has the shape"),
        ("transformer/config.json", {"caption_projection_dim": 8}, "cannot be called"),
        ("transformer/config.json", {"dual_attention_layers": ["evil"]}, "dual_attention_layers"),
        ("vae/config.json", {"shift_factor": None}, "shift_factor"),
        ("vae/config.json", {"latents_mean": [0.0, 0.0, 0.0, 0.0]}, "numbers per channel"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(pipeline: Path, part: str, fields: Any, words: str) -> None:
    edit(pipeline / part, **fields)
    with pytest.raises(InputError, match=words) as error:
        load_model(pipeline)
    assert "\n" not in str(error.value)


def replace(folder: Path, part: str, component: Any) -> None:
    shutil.rmtree(folder / part)
    component.save_pretrained(folder / part)


@pytest.mark.parametrize(
    ("part", "settings", "words"),
    [
        ("text_encoder_3", {"d_model": 16}, "embeddings of 24 numbers and text_encoder_3 makes 16"),
        ("text_encoder_2", {"projection": 10}, "pooled embeddings of 14 numbers and the CLIPs make 16"),
        ("text_encoder_2", {"width": 20, "projection": 8}, "embeddings of 24 numbers and the CLIPs make 28"),
        ("vae", {"channels": 8}, "takes 4 channels and the VAE encodes as 8"),
        ("scheduler", {}, "is a flow-matching model, and DDPMScheduler is not"),
    ],
)
def test_components_that_do_not_belong_together_are_refused(
    pipeline: Path, make_t5: Any, make_clip: Any, make_shifted_vae: Any, part: str, settings: Any, words: str
) -> None:
    makers = {"text_encoder_3": make_t5, "text_encoder_2": make_clip, "vae": make_shifted_vae}
    made = makers.get(part, DDPMScheduler)(**settings)
    component = made[1] if isinstance(made, tuple) else made
    replace(pipeline, part, component)
    if part == "scheduler":
        edit(pipeline / "model_index.json", scheduler=["diffusers", type(component).__name__])
    with pytest.raises(InputError, match=words) as error:
        load_model(pipeline)
    assert "\n" not in str(error.value)


def test_a_network_alone_has_no_captions(saved: Path) -> None:
    network = diffusers.SD3Transformer2DModel.from_pretrained(saved / "transformer")
    model = Model.of(network, FlowMatchEulerDiscreteScheduler())
    with pytest.raises(InputError, match="no text encoder"):
        model.condition  # noqa: B018
