"""The CLIP score: transformers' CLIP on the images, batches and processes, and folders that are refused."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from robustdiff.errors import InputError
from robustdiff.metrics.bootstrap import interval
from robustdiff.metrics.metric import Batch, MetricCollection, compared

transformers = pytest.importorskip("transformers")

from robustdiff.metrics.clip_score import ClipScore  # noqa: E402

CAPTIONS = ["a red shoe", "a blue shoe", "a short dress", "the old shed", "blue", "a red and blue robot"]


def drawn(n: int, channels: int = 3, height: int = 20, width: int = 20) -> torch.Tensor:
    """Return random images with structure at all scales."""
    generator = torch.Generator().manual_seed(n)
    noise = torch.rand(n, channels, height, width, generator=generator)
    low = torch.nn.functional.interpolate(torch.rand(n, channels, 3, 3, generator=generator), (height, width))
    return ((noise + 2 * low) * 85).to(torch.uint8)


@pytest.fixture(scope="module")
def metric(clip_folder: Path) -> ClipScore:
    return ClipScore(folder=clip_folder)


@pytest.fixture
def folder(clip_folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(clip_folder, tmp_path / "clip")
    return tmp_path / "clip"


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def prepared(image: Image.Image, side: int) -> torch.Tensor:
    """Prepare an image as the paper on CLIP: resized by its shorter side, cropped in the middle, normalised."""
    image = image.convert("RGB")
    width, height = image.size
    short = min(width, height)
    image = image.resize((int(side * width / short), int(side * height / short)), Image.Resampling.BICUBIC)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    pixels = np.asarray(image.crop((left, top, left + side, top + side)), np.float64) / 255
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    return torch.from_numpy((pixels - mean) / std).permute(2, 0, 1).float()


@pytest.mark.parametrize(("channels", "height", "width"), [(3, 20, 20), (1, 8, 8), (3, 24, 36), (3, 12, 12)])
def test_it_is_the_cosine_of_transformers_clip(metric, clip_folder, channels, height, width):
    """logits_per_image is the cosine times exp(logit_scale); images are prepared by hand."""
    clip = transformers.CLIPModel.from_pretrained(clip_folder).eval()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(clip_folder)
    images = drawn(6, channels, height, width)
    scores = metric.scores(images, CAPTIONS)
    for image, caption, score in zip(images, CAPTIONS, scores, strict=True):
        picture = Image.fromarray(image.permute(1, 2, 0).squeeze(-1).numpy())
        text = tokenizer(caption, truncation=True, max_length=16, return_tensors="pt")
        with torch.no_grad():
            logit = clip(pixel_values=prepared(picture, 12)[None], **text).logits_per_image
            cosine = (logit / clip.logit_scale.exp()).item()
        assert score == pytest.approx(100 * cosine, abs=2e-4)
    assert np.ptp(scores) > 5, "captions and images matter"


def test_it_is_that_of_the_processor_of_transformers(metric, clip_folder):
    kind = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    processor = transformers.CLIPProcessor(
        kind.from_pretrained(clip_folder), transformers.CLIPTokenizer.from_pretrained(clip_folder)
    )
    images = drawn(6, 3, 30, 40)
    given = processor(
        text=CAPTIONS,
        images=[Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images],
        padding=True,
        truncation=True,
        max_length=16,
        return_tensors="pt",
    )
    clip = transformers.CLIPModel.from_pretrained(clip_folder).eval()
    with torch.no_grad():
        image = clip.visual_projection(clip.vision_model(given["pixel_values"]).pooler_output)
        text = clip.text_projection(clip.text_model(given["input_ids"], given["attention_mask"]).pooler_output)
    cosine = torch.nn.functional.cosine_similarity(image, text).numpy()
    assert metric.scores(images, CAPTIONS) == pytest.approx(100 * cosine, abs=2e-4)


def test_captions_are_matched_to_their_images(metric):
    images = drawn(6)
    ones = [metric.scores(images[i : i + 1], CAPTIONS[i : i + 1])[0] for i in range(6)]
    assert metric.scores(images, CAPTIONS) == pytest.approx(ones, abs=1e-4)
    assert metric.scores(images, CAPTIONS[::-1]) != pytest.approx(ones, abs=1)


def filled(collection: MetricCollection, images: torch.Tensor, size: int = 16, first: int = 0, step: int = 1) -> None:
    captions = [CAPTIONS[i % 6] for i in range(len(images))]
    for start in range(first * size, len(images), step * size):
        batch = slice(start, start + size)
        collection.update(images[batch], start, captions=captions[batch])


@pytest.fixture(scope="module")
def collection(clip_folder: Path) -> MetricCollection:
    return MetricCollection(["clip-score"], values={"clip-score": str(clip_folder)})


def test_the_mean_and_its_interval(collection, metric):
    images = drawn(60)
    collection.reset()
    filled(collection, images)
    values, intervals, replicates, blocks = collection.result("x")
    scores = metric.scores(images, [CAPTIONS[i % 6] for i in range(60)])
    assert values == {"clip_score": pytest.approx(scores.mean(), abs=1e-4)}
    assert blocks == {"clip_score": 60}, "each image is a block"
    assert intervals == {"clip_score": interval(values["clip_score"], replicates["clip_score"], 60)}
    assert replicates["clip_score"].std() == pytest.approx(scores.std() / 60**0.5, rel=0.2), "a replicate resamples"


def test_a_difference_on_common_numbers_is_of_the_same_images(collection):
    """The images of two models from the same noise: the interval of the difference is that of paired scores."""
    images = drawn(60)
    changed = (images.float() + 6).clamp(max=255).to(torch.uint8)
    found = []
    for part in (images, changed):
        collection.reset()
        filled(collection, part)
        found.append((collection.result("x")[2]["clip_score"], collection.state()["clip-score"]["scores"]))
    (one, a), (other, b) = found
    assert (other - one).std() == pytest.approx((b - a).std() / 60**0.5, rel=0.2)
    assert (other - one).std() < 0.5 * one.std()


def test_batches_and_processes_do_not_matter(collection, clip_folder):
    images = drawn(60)
    collection.reset()
    filled(collection, images)
    whole, _, replicates, _ = collection.result("x")
    states = []
    for rank in (1, 0):
        collection.reset()
        filled(collection, images, 7, rank, 2)
        states.append(pickle.dumps(collection.state()))
    collection.reset()
    for state in states:
        collection.merge_state(pickle.loads(state))
    merged, _, others, _ = collection.result("x")
    assert merged["clip_score"] == pytest.approx(whole["clip_score"], abs=1e-4)
    assert others["clip_score"] == pytest.approx(replicates["clip_score"], abs=1e-4)
    filled(collection, images[:7], 7)
    with pytest.raises(ValueError, match="twice"):
        collection.result("x")


def test_many_images_are_resampled_in_blocks(metric):
    metric.reset()
    scores = np.random.default_rng(0).normal(20, 5, 2500)
    metric.merge_state({"index": np.arange(2500), "scores": scores})
    assert metric.result() == {"clip_score": pytest.approx(scores.mean())}
    assert metric.replicates()["clip_score"].std() == pytest.approx(scores.std() / 50, rel=0.2)
    metric.reset()
    metric.merge_state({"index": np.arange(1), "scores": scores[:1]})
    assert (metric.result(), metric.replicates()) == ({"clip_score": scores[0]}, {}), "no interval of one image"


def test_nothing_and_no_captions_have_no_score(metric):
    metric.reset()
    with pytest.raises(InputError, match="no images"):
        metric.result()
    with pytest.raises(InputError, match="these images have none"):
        metric.update(Batch(drawn(2), 0))
    with pytest.raises(InputError, match="4 channels"):
        metric.update(Batch(drawn(2, 4), 0, captions=CAPTIONS[:2]))


def test_long_captions_are_cut_and_said_once(metric, caplog):
    long = "a short dress and a red shoe and a hat"
    metric._warned = False
    one, other = (metric.scores(drawn(1), [text])[0] for text in (long, long + " and more"))
    assert one == other
    assert [record.message for record in caplog.records] == [
        f"clip-score: captions are cut after 16 tokens, such as {long!r}"
    ]


def test_it_compares_nothing_with_real_images():
    assert not compared(["clip-score", "brightness"])


def test_its_folder_is_given_with_its_name(clip_folder):
    with pytest.raises(InputError, match="clip-score needs the folder of a CLIP model: write it as clip-score=VALUE"):
        MetricCollection(["clip-score"])
    with pytest.raises(InputError, match="the metric brightness takes no value, and has x"):
        MetricCollection(["brightness"], values={"brightness": "x"})
    assert MetricCollection(["brightness"]).needs_captions is None
    assert MetricCollection(["clip-score"], values={"clip-score": str(clip_folder)}).needs_captions == "clip-score"


def test_a_shipped_clip_is_given_by_its_name(clip_folder, metric, monkeypatch):
    monkeypatch.setattr("robustdiff.metrics.clip_score.SHIPPED", clip_folder.parent)
    images = drawn(6)
    shipped = ClipScore(folder=clip_folder.name)
    assert shipped.scores(images, CAPTIONS) == pytest.approx(metric.scores(images, CAPTIONS))
    with pytest.raises(InputError, match="no such folder"):
        ClipScore(folder=f"./{clip_folder.name}")


@pytest.mark.parametrize("name", ["processor_config.json", "preprocessor_config.json"])
def test_processors_of_all_releases_are_read(folder, metric, name):
    """The first releases wrote CLIPFeatureExtractor and sizes as numbers; since 5.0 all is in processor_config.json."""
    old = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 12, "crop_size": 12, "resample": 3}
    new = {"image_processor": {"image_processor_type": "CLIPImageProcessorFast", "size": {"shortest_edge": 12}}}
    new["image_processor"]["crop_size"] = {"height": 12, "width": 12}
    (folder / "preprocessor_config.json").unlink()
    (folder / name).write_text(json.dumps(old if name.startswith("pre") else new))
    images = drawn(6)
    assert ClipScore(folder=folder).scores(images, CAPTIONS) == pytest.approx(metric.scores(images, CAPTIONS), abs=1e-6)


def test_the_settings_of_the_processor_count(folder, metric):
    edit(folder / "preprocessor_config.json", image_mean=[0.5, 0.5, 0.5], image_std=[0.5, 0.5, 0.5])
    images = drawn(6)
    assert ClipScore(folder=folder).scores(images, CAPTIONS) != pytest.approx(metric.scores(images, CAPTIONS), abs=0.1)


def without(*names: str) -> Any:
    return lambda folder: [path.unlink() for name in names for path in folder.glob(name)]


def change(name: str, **fields: Any) -> Any:
    return lambda folder: edit(folder / name, **fields)


def write(name: str, text: str) -> Any:
    return lambda folder: (folder / name).write_text(text)


def weights(change: Any) -> Any:
    def rewrite(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors", {"format": "pt"})

    return rewrite


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: shutil.rmtree(folder), "no such folder; give that of a CLIP model"),
        (without("config.json"), "has no config.json"),
        (change("config.json", model_type="siglip"), 'config.json is of "siglip", not of a CLIP model'),
        (change("config.json", model_type="clip_text_model"), "not of a CLIP model"),
        (write("config.json", "["), "is not JSON"),
        (change("config.json", text_config={"hidden_size": 8}), "model of CLIP cannot be read"),
        (change("config.json", vision_config=7), "model of CLIP cannot be read"),
        (without("tokenizer*", "vocab.json", "merges.txt"), "has no tokenizer"),
        (write("tokenizer.json", "{}"), "tokenizer of CLIP cannot be read"),
        (without("pre*"), "has no preprocessor_config.json"),
        (write("preprocessor_config.json", "7"), "holds 7"),
        (change("preprocessor_config.json", image_processor_type="ViTImageProcessor"), '"ViTImageProcessor"'),
        (change("preprocessor_config.json", size={"shortest_edge": 10**9}), "from 1 to 4096"),
        (change("preprocessor_config.json", crop_size="x"), "from 1 to 4096"),
        (change("preprocessor_config.json", crop_size=8), "makes 3×8×8, and the model takes 3×12×12"),
        (change("preprocessor_config.json", image_mean="a"), "preprocessor_config.json is malformed"),
        (without("model.safetensors"), "weights must be safetensors"),
        (write("model.safetensors", "no weights"), "model of CLIP cannot be read"),
        (weights(lambda state: state.pop("text_projection.weight")), "lacks the weights of text_projection.weight"),
        (weights(lambda state: state["text_projection.weight"].fill_(np.nan)), "not finite"),
        (weights(lambda state: state.update({"logit_scale": torch.zeros(3)})), "model of CLIP cannot be read"),
        (lambda f: transformers.CLIPTokenizer(vocab=dict.fromkeys("ab", 99)).save_pretrained(f), "the token 99"),
    ],
)
def test_a_folder_that_is_no_clip_is_one_line(folder, spoil, words, capsys):
    spoil(folder)
    with pytest.raises(InputError) as error:
        ClipScore(folder=folder)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert capsys.readouterr().err == ""


def test_negative_values_stay(folder, metric):
    weights(lambda state: state["visual_projection.weight"].neg_())(folder)
    images = drawn(6)
    assert ClipScore(folder=folder).scores(images, CAPTIONS) == pytest.approx(-metric.scores(images, CAPTIONS))


def test_weights_that_can_run_code_are_not_read(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"x": torch.zeros(1)}, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="weights must be safetensors"):
        ClipScore(folder=folder)


def test_a_tokenizer_of_another_clip_is_said(folder, caplog):
    edit(folder / "config.json", text_config={**json.loads((folder / "config.json").read_text())["text_config"],
                                              "eos_token_id": 5})  # fmt: skip
    ClipScore(folder=folder)
    assert "all have one embedding" in caplog.text


def test_without_transformers_it_says_what_to_install(clip_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match="install the extra text"):
        ClipScore(folder=clip_folder)
