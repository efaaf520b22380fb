"""Flux: pipelines of diffusers are read, called and sampled as diffusers does, and saved again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, FluxPipeline
from torch import Tensor

from robustdiff.backbones.flux import pack, unpack
from robustdiff.backbones.lora import LoraSection
from robustdiff.backbones.model import Model, load_model
from robustdiff.errors import InputError
from robustdiff.samplers import sample

pytest.importorskip("transformers")

PROMPTS = ["A red shoe", "a blue shirt"]


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory, make_flux_pipeline: Any) -> Path:
    return make_flux_pipeline(tmp_path_factory.mktemp("flux") / "dev")


@pytest.fixture
def pipeline(dev: Path, tmp_path: Path) -> Path:
    shutil.copytree(dev, tmp_path / "p")
    return tmp_path / "p"


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def images_of(
    model: Model, latents: Tensor, guidance: float | None, prompts: list[str] = PROMPTS, **more: Any
) -> Tensor:
    evaluations = []
    ours = sample(
        model,
        model.process,
        "euler",
        4,
        latents=latents,
        guidance=guidance,
        condition=model.condition.batch(None, prompts, None),
        on_evaluation=evaluations.append,
        **more,
    )
    assert len(evaluations) == 4
    return (model.codec.decode(ours) / 2 + 0.5).clamp(0, 1)


def of_diffusers(folder: Path, **components: Any) -> FluxPipeline:
    pipeline = FluxPipeline.from_pretrained(folder, **components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def theirs(pipeline: FluxPipeline, latents: Tensor, **settings: Any) -> Tensor:
    height, width = (2 * side for side in latents.shape[2:])
    images = pipeline(
        PROMPTS,
        num_inference_steps=4,
        latents=pack(latents),
        height=height,
        width=width,
        output_type="np",
        **settings,
    ).images
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def test_tokens_are_those_of_diffusers(dev: Path) -> None:
    x = torch.randn(2, 3, 4, 6)
    theirs = FluxPipeline._pack_latents(x, 2, 3, 4, 6)
    assert torch.equal(pack(x), theirs)
    assert torch.equal(unpack(theirs, 4, 6), x)
    with pytest.raises(InputError, match="even height and width, not 3×4"):
        pack(torch.randn(1, 2, 3, 4))


def test_the_network_is_called_as_diffusers_calls_it(dev: Path) -> None:
    model = load_model(dev, 8)
    x, t = torch.randn(2, 4, 4, 6), torch.tensor([3.5, 700.0])
    embeddings = {"encoder_hidden_states": torch.randn(2, 5, 24), "pooled_projections": torch.randn(2, 8)}
    with torch.no_grad():
        tokens = model.network(
            hidden_states=FluxPipeline._pack_latents(x, 2, 4, 4, 6),
            timestep=t / 1000,
            guidance=torch.tensor([3.5, 3.5]),
            img_ids=FluxPipeline._prepare_latent_image_ids(2, 2, 3, "cpu", torch.float32),
            txt_ids=torch.zeros(5, 3),
            **embeddings,
        ).sample
        wanted = FluxPipeline._unpack_latents(tokens, 4 * 2, 6 * 2, 2)
        torch.testing.assert_close(model(x, t, **embeddings), wanted, rtol=0, atol=0)
        other = model(x, t, **embeddings, guidance=torch.tensor([3.5, 1.0]))
    assert torch.equal(other[0], wanted[0])
    assert not torch.equal(other[1], wanted[1])


def test_images_of_dev_are_those_of_diffusers_with_the_scale_as_an_argument(dev: Path, tmp_path: Path) -> None:
    load_model(dev, 16).save(tmp_path / "again")
    model = load_model(tmp_path / "again")
    assert model.image_shape == (3, 16, 16)
    latents = torch.randn(2, *model.shape)
    pipelines = [of_diffusers(path) for path in (dev, tmp_path / "again")]
    images = []
    for settings in ({}, {"guidance_scale": 1.0}, {"guidance_scale": 8.0}):
        images.append(images_of(model, latents, settings.get("guidance_scale")))
        for pipeline in pipelines:
            torch.testing.assert_close(images[-1], theirs(pipeline, latents, **settings), rtol=0, atol=1e-5)
    torch.testing.assert_close(images_of(model, latents, 3.5), images[0], rtol=0, atol=0)
    assert (images[0] - images[1]).abs().max() > 1e-3
    assert (images[0] - images_of(model, latents, None, PROMPTS[::-1])).abs().max() > 1e-3
    with pytest.raises(InputError, match="guidance must be at least 0"):
        images_of(model, latents, float("inf"))
    with pytest.raises(InputError, match="this network takes the scale itself"):
        images_of(model, latents, 3.5, unconditional=model.condition.empty())


@pytest.mark.parametrize("adapted", [False, True])
def test_the_scale_of_training_is_that_of_sampling(dev: Path, tmp_path: Path, adapted: bool) -> None:
    model = load_model(dev, 16)
    model.backbone.take_guidance(2.0)
    if adapted:
        pytest.importorskip("peft")
        model.add_lora(LoraSection(rank=2), 0)
    model.save(tmp_path)
    again, latents = load_model(tmp_path), torch.randn(2, *model.shape)
    torch.testing.assert_close(images_of(again, latents, None), images_of(model, latents, 2.0), rtol=0, atol=1e-6)
    assert (images_of(again, latents, None) - images_of(again, latents, 3.5)).abs().max() > 1e-3


def test_images_of_schnell_are_those_of_diffusers_and_guidance_is_classifier_free(
    tmp_path: Path, make_flux_pipeline: Any
) -> None:
    folder = make_flux_pipeline(tmp_path / "p", dev=False)
    model = load_model(folder, 8)
    latents = torch.randn(2, *model.shape)
    pipeline = of_diffusers(folder)
    torch.testing.assert_close(images_of(model, latents, None), theirs(pipeline, latents), rtol=0, atol=1e-5)
    guided = theirs(pipeline, latents, true_cfg_scale=3.0, negative_prompt=["", ""])
    mine = images_of(model, latents, 3.0, unconditional=model.condition.empty())
    torch.testing.assert_close(mine, guided, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"time_shift_type": "linear", "base_shift": 1.5},
        {"shift_terminal": 0.1},
        {"use_karras_sigmas": True},
        {"base_image_seq_len": 256, "max_image_seq_len": 4096, "num_train_timesteps": 500},
    ],
)
def test_images_are_those_of_diffusers_with_other_schedules(dev: Path, settings: Any) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(
        **{"use_dynamic_shifting": True, "base_image_seq_len": 4, "max_image_seq_len": 64, **settings}
    )
    given = load_model(dev, 8)
    model = Model(given.backbone, scheduler, given.codec)
    latents = torch.randn(2, *model.shape)
    wanted = theirs(of_diffusers(dev, scheduler=scheduler), latents)
    torch.testing.assert_close(images_of(model, latents, None), wanted, rtol=0, atol=1e-5)


def test_a_scheduler_that_takes_no_levels_is_refused_in_sampling(dev: Path) -> None:
    model = Model(load_model(dev, 8).backbone, FlowMatchHeunDiscreteScheduler())
    with pytest.raises(InputError, match=r"FlowMatchHeunDiscreteScheduler of the checkpoint makes no 4 levels"):
        images_of(model, torch.randn(2, *model.shape), None)


def test_a_network_has_the_size_of_the_pipeline_until_it_takes_another(dev: Path) -> None:
    model = load_model(dev)
    assert model.shape == (4, 128, 128)
    model.check_shape((3, 8, 12))
    assert model.shape == (4, 4, 6)
    with pytest.raises(InputError, match="takes images of 8×12, the data has 8×8"):
        model.check_shape((3, 8, 8))


def test_odd_sides_of_latents_are_refused(dev: Path) -> None:
    model = load_model(dev)
    for shape in ((3, 6, 8), (3, 8, 10), (3, 9, 9)):
        with pytest.raises(InputError, match="multiples of 4 pixels"):
            model.check_shape(shape)
    with pytest.raises(InputError, match="multiples of 4 pixels"):
        load_model(dev, 6)


@pytest.mark.parametrize(
    ("part", "fields", "words"),
    [
        ("model_index.json", {"_class_name": "FluxFillPipeline"}, "only a FluxPipeline"),
        ("model_index.json", {"text_encoder_2": [None, None]}, "has no text_encoder_2"),
        ("model_index.json", {"tokenizer": [None, None]}, "has no tokenizer:"),
        ("model_index.json", {"text_encoder": ["transformers", "CLIPModel"]}, "only CLIPTextModel"),
        ("transformer/config.json", {"num_single_layers": 100_000}, "of 100001 in all do not fit the weights"),
        ("transformer/config.json", {"in_channels": 18}, "no number of channels of 2×2 latents|not of the network"),
        ("transformer/config.json", {"axes_dims_rope": [4, 4, 4]}, "cannot be called"),
        ("transformer/config.json", {"patch_size": 2}, "its output has the shape"),
        ("transformer/config.json", {"guidance_embeds": False}, "not of the network"),
        ("transformer/config.json", {"_sample_size": 10**7}, "_sample_size="),
        ("transformer/config.json", {"_guidance": "high"}, "_guidance="),
        ("vae/config.json", {"shift_factor": None}, "shift_factor"),
        ("scheduler/scheduler_config.json", {"base_image_seq_len": 64}, "needs a line"),
        ("scheduler/scheduler_config.json", {"base_shift": 1e9}, "correct scheduler_config.json"),
        ("scheduler/scheduler_config.json", {"time_shift_type": "linear", "base_shift": -1}, "shift must be positive"),
        ("scheduler/scheduler_config.json", {"invert_sigmas": True}, "invert_sigmas"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(pipeline: Path, part: str, fields: Any, words: str) -> None:
    edit(pipeline / part, **fields)
    with pytest.raises(InputError, match=words) as error:
        load_model(pipeline, 8).process  # noqa: B018
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("part", "settings", "words"),
    [
        ("text_encoder", {"width": 16}, "pooled embeddings of 8 numbers and text_encoder makes 16"),
        ("text_encoder_2", {"d_model": 16}, "embeddings of 24 numbers and text_encoder_2 makes 16"),
        ("vae", {"channels": 8}, "takes 4 channels and the VAE encodes as 8"),
        ("scheduler", {}, "is a flow-matching model, and DDIMScheduler is not"),
    ],
)
def test_components_that_do_not_belong_together_are_refused(
    pipeline: Path, make_t5: Any, make_clip: Any, make_shifted_vae: Any, part: str, settings: Any, words: str
) -> None:
    makers = {"text_encoder": make_clip, "text_encoder_2": make_t5, "vae": make_shifted_vae}
    made = makers.get(part, DDIMScheduler)(**settings)
    component = made[1] if isinstance(made, tuple) else made
    shutil.rmtree(pipeline / part)
    component.save_pretrained(pipeline / part)
    if part == "scheduler":
        edit(pipeline / "model_index.json", scheduler=["diffusers", type(component).__name__])
    with pytest.raises(InputError, match=words) as error:
        load_model(pipeline)
    assert "\n" not in str(error.value)
