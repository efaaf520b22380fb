"""`robustdiff evaluate` of models of text: prompts, the CLIP score, guidance, and captions of the real images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from robustdiff.evaluation.generate import Generator
from robustdiff.metrics.clip_score import ClipScore
from robustdiff.metrics.extractors.classifier import Classifier
from robustdiff.metrics.extractors.extractor import load_extractor
from robustdiff.metrics.fid import frechet_distance
from robustdiff.metrics.reservoir import fixed_order

pytest.importorskip("transformers")
PROMPTS = ["a red shoe", "a blue shoe", "blue", "a robot", "an old red house"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, make_sd_pipeline: Any) -> list[Path]:
    """Two tiny Stable Diffusion pipelines, which differ in the weights of the UNet."""
    folder = tmp_path_factory.mktemp("models")
    return [make_sd_pipeline(folder / name, seed=seed) for seed, name in enumerate(("one", "other"))]


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("features") / "c.safetensors"
    Classifier(3, 8, [4], 3, 2).save(path)
    return path


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS) + "\n")
    return tmp_path / "p.txt"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of six images, each with two captions."""
    (tmp_path / "photos").mkdir()
    random = np.random.default_rng(0)
    lines = []
    for i in range(6):
        Image.fromarray(random.integers(0, 256, (8, 8, 3), np.uint8)).save(tmp_path / "photos" / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": [PROMPTS[i % 5], "another caption"]}))
    (tmp_path / "photos" / "metadata.jsonl").write_text("\n".join(lines))
    return tmp_path / "photos"


def scores_of(folder: Path, clip: Path, texts: list[str], num: int, **settings: Any) -> np.ndarray:
    """Return the CLIP scores of images that the library makes, one after the other."""
    generator = Generator.load(folder, prompts=tuple(texts), seed=3, batch_size=1, **settings)
    images = torch.cat([images for _, images in generator.images(range(num))])
    return ClipScore(folder=clip).scores(images, [texts[i % len(texts)] for i in range(num)])


def result(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return record


def test_models_are_compared_at_the_same_prompts_and_noise(robustdiff, models, clip_folder, prompts, tmp_path):
    words = ["--metrics", f"clip-score={clip_folder},brightness", "--steps", 2, "--guidance", "1,3", "--seed", 3]
    outcome = robustdiff("evaluate", *models, "--prompts", prompts, *words, "--cpu", "--output", tmp_path / "e")
    assert outcome.code == 0, outcome.err
    record = result(tmp_path / "e")
    names = [f"{model}, guidance {scale}" for model in ("one", "other") for scale in (1, 3)]
    assert [cell["checkpoint"] for cell in record["cells"]] == names
    scores = {}
    for cell in record["cells"]:
        name, scale = cell["checkpoint"], cell["guidance"]
        assert (cell["n"], f"guidance {scale:g}") == (5, name.split(", ")[1])
        assert f"{cell['clip_score']:.2f} (" in outcome.out
        model = models[name.startswith("other")]
        scores[name] = scores_of(model, clip_folder, PROMPTS, 5, sampler="ddim", steps=2, guidance=scale)
        assert cell["clip_score"] == pytest.approx(scores[name].mean(), abs=0.5)  # in batches of another size
    changes = [change for change in record["differences"] if change["checkpoint"] == names[2]]
    assert [change["baseline"] for change in changes] == names[:2]
    assert changes[0]["clip_score"] == pytest.approx((scores[names[2]] - scores[names[0]]).mean(), abs=0.5)
    assert record["prompts"]["n"] == 5
    assert record["metrics"] == {"clip-score": str(clip_folder)}
    assert {path.name for path in (tmp_path / "e").iterdir()} == {"clip_score.png", "result.json", "samples-ddim.png"}


def test_the_captions_of_the_real_images_are_the_prompts(robustdiff, models, features, photos, clip_folder, tmp_path):
    words = ["--features", features, "--metrics", f"fid,clip-score={clip_folder}", "--steps", 1, "--seed", 3]
    words += ["--data", "imagefolder", "--root", photos, "--cpu", "--output", tmp_path / "e"]
    outcome = robustdiff("evaluate", models[0], photos, *words)
    assert outcome.code == 0, outcome.err
    record = result(tmp_path / "e")
    made, real = record["cells"]
    texts = [*PROMPTS, PROMPTS[0]]
    assert (made["n"], made["fid"] > 0, real["fid"]) == (6, True, pytest.approx(0, abs=1e-6))
    turns = [texts[i] for i in fixed_order(6)]
    assert made["clip_score"] == pytest.approx(scores_of(models[0], clip_folder, turns, 6, steps=1).mean(), abs=0.5)
    images = [np.asarray(Image.open(photos / f"{i}.png")) for i in range(6)]
    scores = ClipScore(folder=clip_folder).scores(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), texts)
    assert real["clip_score"] == pytest.approx(scores.mean(), abs=1e-3)
    assert record["prompts"]["source"] == str(photos)


def test_captions_may_be_all_that_is_wanted_of_the_data(robustdiff, models, photos, clip_folder, tmp_path):
    Image.new("RGB", (9, 20)).save(photos / "0.png")  # the sizes of real images do not matter
    words = [
        "--metrics",
        f"clip-score={clip_folder}",
        "--data",
        "imagefolder",
        "--root",
        photos,
        "--set",
        "data.size=9",
    ]
    outcome = robustdiff("evaluate", models[0], *words, "--steps", 1, "--cpu", "--output", tmp_path / "e")
    assert outcome.code == 0, outcome.err
    assert [cell["n"] for cell in result(tmp_path / "e")["cells"]] == [6]


def test_captions_of_coco_name_the_real_images(robustdiff, models, features, photos, tmp_path):
    coco = {"images": [{"id": i, "file_name": f"{i}.png"} for i in range(5)]}
    coco["annotations"] = [{"image_id": i, "id": i, "caption": PROMPTS[i]} for i in range(5)]
    (tmp_path / "c.json").write_text(json.dumps(coco))
    words = ["--features", features, "--metrics", "fid", "--steps", 1, "--data", "imagefolder", "--root", photos]
    words += ["--prompts", tmp_path / "c.json", "--cpu", "--output", tmp_path / "e"]
    outcome = robustdiff("evaluate", models[0], *words)
    assert outcome.code == 0, outcome.err
    generator = Generator.load(models[0], prompts=tuple(PROMPTS), steps=1)
    real = np.stack([np.asarray(Image.open(photos / f"{i}.png")) for i in range(5)])
    extractor = load_extractor(str(features))
    sets = (next(generator.images(range(5)))[1], torch.from_numpy(real).permute(0, 3, 1, 2))
    moments = [(f.mean(axis=0), np.cov(f, rowvar=False)) for f in map(extractor.extract, sets)]
    (cell,) = result(tmp_path / "e")["cells"]
    assert cell["fid"] == pytest.approx(frechet_distance(*moments[0], *moments[1]), rel=1e-5)


def test_a_negative_caption_is_guided_away_from(robustdiff, models, prompts, clip_folder, tmp_path):
    words = ["--metrics", f"clip-score={clip_folder}", "--steps", 2, "--guidance", 3, "--num", 4, "--cpu", "--seed", 3]
    words += ["--negative", "a red robot", "--output", tmp_path / "e"]
    outcome = robustdiff("evaluate", models[0], "--prompts", prompts, *words)
    assert outcome.code == 0, outcome.err
    record, one = result(tmp_path / "e"), {"sampler": "ddim", "steps": 2, "guidance": 3}
    guided = scores_of(models[0], clip_folder, PROMPTS, 4, **one, negative="a red robot")
    assert record["cells"][0]["clip_score"] == pytest.approx(guided.mean(), abs=0.1)
    assert guided.mean() != pytest.approx(scores_of(models[0], clip_folder, PROMPTS, 4, **one).mean(), abs=0.2)
    assert record["negative"] == "a red robot"


def test_existing_images_have_prompts_in_turn(robustdiff, prompts, clip_folder, tmp_path):
    images = np.random.default_rng(1).integers(0, 256, (12, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "a.npz", arr_0=images)
    words = ["--prompts", prompts, "--metrics", f"clip-score={clip_folder}", "--output", tmp_path / "e"]
    assert robustdiff("evaluate", tmp_path / "a.npz", *words).code == 0
    texts = [PROMPTS[i % 5] for i in range(12)]
    scores = ClipScore(folder=clip_folder).scores(torch.from_numpy(images).permute(0, 3, 1, 2), texts)
    (cell,) = result(tmp_path / "e")["cells"]
    assert cell["clip_score"] == pytest.approx(scores.mean(), abs=1e-3)
    low, high = cell["clip_score_ci"]
    assert low < cell["clip_score"] < high


@pytest.mark.parametrize(
    ("sources", "arguments", "words"),
    [
        (["MODEL"], [], ["give one or more by --prompt (evaluate: --prompts FILE"]),
        (["MODEL", "fashion-16"], ["--prompts", "PROMPTS"], ["fashion-16", "leave --prompt out (evaluate: --prompts)"]),
        (["fashion-16"], ["--num", "4"], ["fashion-16: the metric clip-score compares images with captions"]),
        (["IMAGES"], [], ["a.npz: the metric clip-score compares", "give --prompts FILE"]),
        (["IMAGES"], ["--data", "digits"], ["--data is for comparing with real images"]),
        (["IMAGES"], ["--prompts", "PROMPTS", "--metrics", "brightness"], ["--prompts is for models of captions"]),
        (["MODEL"], ["--prompts", "PROMPTS", "--metrics", "clip-score"], ["needs the folder of a CLIP model"]),
        (["MODEL"], ["--prompts", "PROMPTS", "--metrics", "clip-score=no"], ["no: no such folder"]),
        (["MODEL"], ["--prompts", "PROMPTS", "--metrics", "brightness=3"], ["the metric brightness takes no value"]),
        (["MODEL"], ["--prompts", "PROMPTS", "--metrics", "clip-score=a,clip-score=b"], ["has clip-score twice"]),
        (["MODEL"], ["--prompts", "p.csv"], ["p.csv", "give a .txt"]),
        (["MODEL"], ["--prompts", "THREE"], ["3 prompts make as many images, and 4 or more are needed"]),
        (["MODEL"], ["--prompts", "PROMPTS", "--guidance", "-1"], ["--guidance -1: give numbers from 0 up"]),
        (["MODEL"], ["--prompts", "PROMPTS", "--guidance", "nan"], ["--guidance nan: give numbers from 0 up"]),
        (["MODEL"], ["--prompts", "PROMPTS", "--guidance", "2,2"], ["--guidance has 2.0 twice"]),
        (["MODEL"], ["--prompts", "PROMPTS", "--negative", "a"], ["give --guidance above 1"]),
    ],
)  # fmt: skip
def test_what_cannot_be_evaluated_is_one_line(
    robustdiff, models, prompts, clip_folder, tmp_path, sources, arguments, words, assert_bad_input
):
    (tmp_path / "three.txt").write_text("a\nb\nc\n")
    np.savez(tmp_path / "a.npz", arr_0=np.zeros((4, 8, 8, 3), np.uint8))
    names = {"MODEL": models[0], "IMAGES": tmp_path / "a.npz", "PROMPTS": prompts, "THREE": tmp_path / "three.txt"}
    metrics = [] if "--metrics" in arguments else ["--metrics", f"clip-score={clip_folder}"]
    given = [names.get(word, word) for word in (*sources, *arguments)]
    steps = [] if sources == ["IMAGES"] else ["--steps", 1]
    outcome = robustdiff("evaluate", *given, *metrics, *steps, "--cpu", "--output", tmp_path / "e")
    assert_bad_input(outcome, *words)
    assert not (tmp_path / "e").exists()


def test_three_prompts_take_turns(robustdiff, models, clip_folder, tmp_path):
    (tmp_path / "three.txt").write_text("a\nb\nc\n")
    words = ["--prompts", tmp_path / "three.txt", "--num", 7, "--metrics", f"clip-score={clip_folder}", "--steps", 1]
    outcome = robustdiff("evaluate", models[0], *words, "--seed", 3, "--cpu", "--output", tmp_path / "e")
    assert outcome.code == 0, outcome.err
    scores = scores_of(models[0], clip_folder, ["a", "b", "c"], 7, steps=1)
    assert result(tmp_path / "e")["cells"][0]["clip_score"] == pytest.approx(scores.mean(), abs=0.5)
