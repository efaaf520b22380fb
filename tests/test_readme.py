"""The README is true: its commands run, its numbers are those of the committed results."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

SMALL = {
    "train": ["--set", "steps=2", "--set", "batch_size=4", "--set", "checkpoint_every=1", "--set", "precision=fp32"],
    "sample": ["--num", "30", "--steps", "2"],
    "evaluate": ["--num", "30"],
    "mismatch": ["--num", "40", "--steps", "2", "--sampler", "ddim", "--probes", "2", "--radii", "0.5"],
    "search-times": ["--steps", "2", "--num", "8"],
    "solver-error": ["--num", "2", "--scales", "3", "--points", "2", "--substeps", "2"],
    "report": ["--num", "2", "--steps", "2", "--cpu"],
    "demo": [],
    "study": [],
    "tune": [
        *("--set", "batch_size=4", "--updates", "2", "--candidates", "2", "--rungs", "1", "--seeds", "3"),
        *("--num", "16", "--processes", "1"),
    ],
    "reproduce": [],
    "convert": [],
}
"""What makes a documented command take a moment; a later option overrides an earlier one."""

WATCHED = ("fashion-16-at", "fashion-16-consistency")
"""Recipes that are watched, which takes longer than their training here."""

TEXT = {
    "train": [*SMALL["train"], "--cpu", *(f"--set={value}" for value in ("data.size=8", "data.workers=0", "warmup=0"))],
    "sample": ["--num", "2", "--steps", "2", "--cpu"],
    "convert": [],
    "evaluate": ["--num", "4", "--steps", "2", "--cpu"],
}
"""The same for a page on models of text."""

STUDY = """
title: a study of no use
recipe: fashion-16-at
set: {steps: 2, batch_size: 4, threads: 1}
baseline: plain
methods: {plain: {set: {adversary: none}}, free: {}}
measure: {samplers: [ddim], steps: [1, 10], num: 40}
"""
"""What stands in for the documented study."""


def commands(path: Path) -> list[list[str]]:
    """The robustdiff commands of a document's bash blocks, in order."""
    blocks = re.findall(r"```bash\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    split = [shlex.split(line, comments=True) for line in lines]
    return [words[words.index("robustdiff") + 1 :] for words in split if "robustdiff" in words]


def _small(name):
    """A study that comes with the package, at a size of seconds."""
    from robustdiff.study.schema import load_study

    study = load_study(name)
    measure = study.measure.model_copy(update={"num": 16, "steps": (1, 2)})
    references = {key: one.model_copy(update={"steps": (2,)}) for key, one in study.references.items()}
    changes = {**study.set, "steps": 3}
    return study.model_copy(update={"set": changes, "measure": measure, "references": references})


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("path", [path for path in DOCUMENTS if path.name != "text-to-image.md"], ids=lambda p: p.name)
def test_every_command_runs(path, robustdiff, make_sd_pipeline, tmp_path, monkeypatch):
    from robustdiff import demo
    from robustdiff.backbones.adm import PRESETS, AdmFlags, build_adm, convert, save_adm

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "load_study", _small)
    flags = AdmFlags(image_size=8, num_channels=32, num_res_blocks=1, channel_mult="1", attention_resolutions="8")
    monkeypatch.setattr(convert, "PRESETS", dict.fromkeys(PRESETS, flags))
    save_adm(build_adm(flags), tmp_path / "64x64_diffusion.pt")
    (tmp_path / "benchmarks" / "studies").mkdir(parents=True)
    (tmp_path / "benchmarks" / "studies" / "fashion-16.yaml").write_text(STUDY)
    make_sd_pipeline(tmp_path / "stabilityai" / "stable-diffusion-xl-base-1.0", "xl")  # in place of the download
    for command in commands(path):
        more = ["--steps", "2"] if command[0] == "evaluate" and "--steps" in command else []
        if command[:2] in (["train", "fashion-16-dit"], ["train", "emoji"]):
            more += ["--set", "codec.cache=false"]
        if command[0] == "train" and command[1] in WATCHED:
            more += ["--set", "watch.num=8", "--set", "watch.steps=[1]"]
        if command[:2] == ["train", "emoji"]:
            more += ["--set", "data.split=unseen"]  # fewer captions to encode
        outcome = robustdiff(*command, *SMALL[command[0]], *more)
        assert outcome.code == 0, (command, outcome.err)


def test_every_command_of_text_to_image_runs(robustdiff, make_sd_pipeline, clip_folder, tmp_path, monkeypatch):
    """In a folder with a tiny model and a tiny CLIP for the downloads, images with captions, and prompts."""
    from robustdiff.metrics.features import Classifier

    monkeypatch.chdir(tmp_path)
    make_sd_pipeline(tmp_path / "models" / "sd15")
    shutil.copytree(clip_folder, tmp_path / "models" / "clip-vit-large-patch14")
    for folder in (tmp_path / "data" / "captioned", tmp_path / "data" / "real"):
        folder.mkdir(parents=True)
        for i in range(4):
            Image.fromarray(np.full((8, 9, 3), 40 * i, np.uint8)).save(folder / f"000{i}.jpg")
            (folder / f"000{i}.txt").write_text("a red shoe")
    (tmp_path / "prompts.txt").write_text("a red shoe\na blue shirt\nred\nblue\n")
    Classifier(3, 8, [4], 3, 2).save(tmp_path / "c.safetensors")
    for command in commands(ROOT / "docs" / "text-to-image.md"):
        if "inception" in command:  # and its weights
            k = command.index("inception")
            command[k : k + 3] = ["c.safetensors"]
        more = ["--set", "data.size=8"] if command[0] == "evaluate" and "--data" in command else []
        outcome = robustdiff(*command, *TEXT[command[0]], *more)
        assert outcome.code == 0, (command, outcome.err)


def test_python_in_the_readme_runs():
    (text,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    variables: dict = {}
    exec(text, variables)
    assert variables["images"].shape == (16, 1, 16, 16)


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", (ROOT / "README.md").read_text(), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_the_demo_section_is_made_from_the_committed_results():
    script = runpy.run_path(str(ROOT / "scripts" / "update_readme.py"))
    record = json.loads((ROOT / "docs" / "demo" / "result.json").read_text())
    assert script["demo_section"](record) in (ROOT / "README.md").read_text(encoding="utf-8")
    record = json.loads((ROOT / "docs" / "demo-text" / "result.json").read_text())
    assert script["text_section"](record) in (ROOT / "docs" / "emoji.md").read_text(encoding="utf-8")


def test_quoted_results_are_those_of_the_pages():
    pages = "\n".join(page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs").glob("results*.md")))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    quoted = [line.removeprefix("> ") for line in readme.splitlines() if line.startswith("> ")]
    assert quoted
    for line in quoted:
        assert line in pages.splitlines()


def test_links_lead_somewhere():
    for path in DOCUMENTS:
        for link in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
            if not link.startswith("http"):
                assert (path.parent / link).exists(), f"{path.name}: {link}"


def test_the_recipe_in_the_readme_is_valid(tmp_path):
    from robustdiff.recipe import load_recipe

    (text,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "mine.yaml").write_text(text)
    assert load_recipe(str(tmp_path / "mine.yaml")).adversary.name == "free"
