"""Studies of text-to-image models: prompts, guidance, CLIP score and CLIP's features; and the demonstration of them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from robustdiff import demo
from robustdiff.data import load_dataset
from robustdiff.errors import InputError
from robustdiff.evaluation.generate import Generator
from robustdiff.metrics.clip_score import ClipScore
from robustdiff.metrics.extractors.extractor import load_extractor
from robustdiff.metrics.reservoir import fixed_order
from robustdiff.report.page import write_page
from robustdiff.study.run import reproduce, run_study
from robustdiff.study.schema import load_study
from robustdiff.study.store import read_results

pytest.importorskip("transformers")
PROMPTS = [f"{word} shoe {letter}" for letter in "abc" for word in ("red", "blue", "odd", "my")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, make_sd_pipeline, clip_folder):
    """A study of a distillation by two methods, and its folder."""
    folder = tmp_path_factory.mktemp("text")
    make_sd_pipeline(folder / "pipeline")
    (folder / "photos").mkdir()
    rng = np.random.default_rng(0)
    for i, prompt in enumerate(PROMPTS):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / "photos" / f"{i:02d}.png")
        (folder / "photos" / f"{i:02d}.txt").write_text(prompt)
    study = {
        "title": "text",
        "recipe": "lcm-sd15",
        "set": {
            "model": {"name": "pretrained", "path": str(folder / "pipeline")},
            "data": {"name": "imagefolder", "root": str(folder / "photos"), "size": 8, "channels": 3},
            "codec": None,
            "objective.guidance_embedding": 8,
            "steps": 2,
            "batch_size": 4,
            "precision": "fp32",
            "threads": 1,
        },
        "baseline": "plain",
        "methods": {"plain": {"set": {"adversary": "none"}}, "AT": {"set": {"adversary.steps": 2}}},
        "references": {
            name: {"path": str(folder / "pipeline"), "samplers": ["ddim"], "steps": [2], "guidance": guidance}
            for name, guidance in {"guided": 7.5, "teacher": None}.items()
        },
        "measure": {
            "samplers": ["lcm"],
            "steps": [1, 2],
            "num": 12,
            "pictured": 4,
            "features": f"clip={clip_folder}",
            "metrics": [f"clip-score={clip_folder}"],
            "guidance": 4.0,
        },
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    study = load_study(folder / "study.yaml")
    threads = torch.get_num_threads()
    assert run_study(study, folder)
    torch.set_num_threads(threads)
    return study, folder


def test_images_are_of_the_captions_of_the_data(finished, clip_folder):
    _, folder = finished
    record = json.loads((folder / "cells" / "plain-s0-lcm-2.json").read_text())
    prompts = [PROMPTS[i] for i in fixed_order(12)]
    generator = Generator.load(
        folder / "runs" / "plain-s0", sampler="lcm", steps=2, guidance=4.0, prompts=tuple(prompts), batch_size=64
    )
    ((_, images),) = generator.images(range(12))
    scores = ClipScore(folder=clip_folder).scores(images, prompts)
    assert record["clip_score"] == pytest.approx(scores.mean(), abs=1e-3)
    assert len(record["other_replicates"]["clip_score"]) == 200
    assert record["measure"]["guidance"] == 4.0


def test_a_mismatch_of_captions_is_refused_before_anything_is_trained(finished, tmp_path):
    study, _ = finished
    measure = study.measure.model_copy(update={"mismatch": 40})
    with pytest.raises(InputError, match=r"measure\.mismatch is not for text-to-image models: leave it out"):
        run_study(study.model_copy(update={"measure": measure}), tmp_path)
    assert not list(tmp_path.glob("runs/*"))


def test_a_reference_has_the_guidance_of_its_own(finished):
    study, folder = finished
    cells = {name: json.loads((folder / "cells" / f"{name}-ddim-2.json").read_text()) for name in study.references}
    assert (cells["guided"]["reference"]["guidance"], cells["teacher"]["reference"]["guidance"]) == (7.5, None)
    assert cells["guided"]["fid"] != cells["teacher"]["fid"]
    results = read_results(study, folder)
    assert set(results.cells["AT", 0, "lcm", 1]["numbers"]) == {"fid", "kid", "precision", "recall", "clip_score"}
    other = {**study.references, "teacher": study.references["teacher"].model_copy(update={"guidance": 2.0})}
    with pytest.raises(InputError, match="made with other settings"):
        read_results(study.model_copy(update={"references": other}), folder)


def test_the_page_has_the_clip_score(finished, tmp_path):
    study, folder = finished
    text = write_page(study, folder, tmp_path / "page.md")
    cells = [json.loads((folder / "cells" / f"AT-s0-lcm-{steps}.json").read_text()) for steps in (1, 2)]
    _, found = text.split("## CLIP score")
    assert f"| AT | {cells[0]['clip_score']:.2f} | {cells[1]['clip_score']:.2f} |" in found
    teacher = json.loads((folder / "cells" / "teacher-ddim-2.json").read_text())
    assert f"| teacher, as it is | ddim 2 | {teacher['clip_score']:.2f} |" in found


@pytest.mark.parametrize("name", ["plain-s0-lcm-1", "guided-ddim-2"])
def test_a_cell_is_made_again_from_its_file_alone(finished, tmp_path, name):
    _, folder = finished
    before, after = reproduce(folder / "cells" / f"{name}.json", tmp_path)
    assert {**before, "seconds": 0} == {**after, "seconds": 0}


def test_the_demonstration_shows_fid_and_clip_score_beside_captions(finished, robustdiff, monkeypatch, tmp_path):
    """The demonstration's own code, on the tiny study in place of the one of emoji."""
    study, folder = finished
    only = {"teacher": study.references["teacher"]}
    small = study.model_copy(update={"references": only, "measure": study.measure.model_copy(update={"seed": 0})})
    monkeypatch.setattr(demo, "demo_study", lambda name, *settings: small)
    monkeypatch.setattr(demo, "DATA", {"imagefolder": "photos"})
    monkeypatch.setattr(demo, "run_study", lambda study, folder, **settings: True)
    monkeypatch.setattr(demo, "_claim", lambda study, folder: None)
    outcome = robustdiff("demo", "--text", "--output", folder)
    assert outcome.code == 0, outcome.err
    for title in ("FID of 12 images a cell", "CLIP score of 12 images a cell"):
        assert title in outcome.out
    assert outcome.out.count("the teacher, ddim 2:") == 2
    result = json.loads((folder / "result.json").read_text())
    assert {difference.get("clip_score") is not None for difference in result["differences"]} == {True, False}
    for name in ("fid", "clip_score", "samples-lcm"):
        assert (folder / f"{name}.png").stat().st_size > 1000


def test_two_demonstrations_are_refused(robustdiff):
    outcome = robustdiff("demo", "--text", "--consistency")
    assert outcome.code == 2
    assert "give one of them" in outcome.err


def test_the_demonstration_is_of_the_shipped_model():
    study = demo.demo_study("demo-text")
    assert study.measure.data is not None
    assert study.measure.data.load().captions is not None
    assert (study.recipe, study.references["teacher"].path) == ("emoji-lcm", "emoji")
    larger = demo.demo_study("demo-text", full=True, seed=3)
    assert larger.set["steps"] > study.set["steps"]
    assert larger.measure.num == len(load_dataset("emoji", split="test"))
    assert larger.measure.seed == 3


def test_features_of_clip_are_the_projected_embeddings(clip_folder):
    from transformers import CLIPModel

    extractor = load_extractor(f"clip={clip_folder}")
    images = torch.randint(0, 256, (3, 3, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    model = CLIPModel.from_pretrained(clip_folder).eval()
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    with torch.no_grad():
        pooled = model.vision_model((images / 255 - mean) / std).pooler_output
        expected = model.visual_projection(pooled).numpy()
    np.testing.assert_allclose(extractor.extract(images), expected, atol=1e-5)
    assert (extractor.dim, len(extractor.fingerprint)) == (8, 64)
    with pytest.raises(InputError, match="no such folder"):
        load_extractor("clip=nowhere")
    with pytest.raises(InputError, match="uint8"):
        extractor.extract(images.float())
