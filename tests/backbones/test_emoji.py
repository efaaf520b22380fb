"""The text-to-image model of emoji and its CLIP, which come with the package."""

from __future__ import annotations

from importlib.resources import files

import pytest
import torch

transformers = pytest.importorskip("transformers")

from diffusers import StableDiffusionPipeline  # noqa: E402

from robustdiff import sample  # noqa: E402
from robustdiff.backbones.model import PRETRAINED, load_model  # noqa: E402
from robustdiff.data import load_dataset, to_uint8, to_unit  # noqa: E402
from robustdiff.evaluation.generate import Generator  # noqa: E402
from robustdiff.metrics.clip_score import ClipScore  # noqa: E402

CLIP = files("robustdiff.metrics") / "weights" / "emoji-clip"
CAPTIONS = (
    "a red apple on a pale blue background",
    "a soccer ball on a maroon background",
    "a mushroom on a pale yellow background",
    "blueberries on a white background",
)


@pytest.fixture(scope="module")
def model():
    return load_model("emoji")


@pytest.fixture(scope="module")
def clip():
    return ClipScore(folder="emoji-clip")


def ranked(clip: ClipScore, images: torch.Tensor, captions: tuple[str, ...]) -> list[int]:
    """Return the number of the caption that is the nearest to each image."""
    scores = [clip.scores(images, [caption] * len(images)) for caption in captions]
    return [max(range(len(captions)), key=lambda k: scores[k][i]) for i in range(len(images))]


def test_its_shapes_and_types(model):
    assert (model.shape, model.image_shape) == ((4, 8, 8), (3, 64, 64))
    assert model.prediction == "v_prediction"
    assert model.network.dtype == model.codec.network.dtype == torch.float32
    assert model.condition.takes_captions


def test_diffusers_draws_what_robustdiff_draws(model):
    pipeline = StableDiffusionPipeline.from_pretrained(str(PRETRAINED / "emoji"), local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    generator = Generator(model, "ddim", 4, guidance=3.0, prompts=CAPTIONS[:1])
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    theirs = pipeline(
        CAPTIONS[0], height=64, width=64, num_inference_steps=4, guidance_scale=3.0, latents=noise, output_type="latent"
    ).images
    ours = sample(
        model,
        model.process,
        "ddim",
        4,
        latents=noise,
        condition=generator.condition.batch(None, list(CAPTIONS[:1]), None),
        guidance=3.0,
        unconditional=generator.condition.empty(),
    )
    assert torch.allclose(ours, theirs, atol=1e-3)


def test_samples_are_of_their_captions(model, clip):
    generator = Generator(model, "ddim", 10, guidance=3.0, prompts=CAPTIONS)
    images = torch.cat([part for _, part in generator.images(range(4))])
    assert ranked(clip, images, CAPTIONS) == [0, 1, 2, 3]


def test_clip_knows_the_images_of_the_test_split(clip):
    data = load_dataset("emoji", split="test")
    batch = data.__getitems__(range(5, 1567, 130))
    captions = tuple(several[0] for several in batch.captions)
    assert ranked(clip, batch.images, captions) == list(range(len(captions)))


def test_the_vae_reconstructs(model):
    images = load_dataset("emoji", split="test").__getitems__(range(0, 1567, 200)).images
    decoded = to_uint8(model.codec.decode(model.codec.encode(to_unit(images))))
    assert (decoded.double() - images.double()).square().mean().sqrt() < 40


def test_their_size():
    folders = PRETRAINED / "emoji", CLIP
    assert sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file()) < 25_000_000
