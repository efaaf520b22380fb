"""The documentation is true: its commands and its Python run, its recipes are valid, its links lead somewhere.

The README and CONTRIBUTING.md are documents, too. Documents share a folder, in which a command runs once.
"""

from __future__ import annotations

import json
import re
import runpy
import shlex
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from sklearn import datasets

from robustdiff.backbones.adm.flags import PRESETS, AdmFlags
from robustdiff.metrics.extractors.inception import INCEPTION_URL

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SITE = {"notebooks/first-steps.md"}
"""Pages of the site alone, which scripts/site_pages.py makes."""

SMALL = {
    "train": ["--set", "steps=2", "--set", "batch_size=4", "--set", "checkpoint_every=1", "--set", "precision=fp32"],
    "sample": ["--num", "30", "--steps", "2"],
    "evaluate": ["--num", "30"],
    "mismatch": ["--num", "40", "--steps", "2", "--sampler", "ddim", "--probes", "0"],
    "search-times": ["--steps", "2", "--num", "8"],
    "solver-error": ["--num", "2", "--scales", "3", "--points", "2", "--substeps", "2"],
    "report": ["--num", "2", "--steps", "2", "--cpu"],
    "demo": [],
    "study": [],
    "tune": [
        *("--set", "batch_size=4", "--updates", "2", "--candidates", "2", "--rungs", "1", "--seeds", "3"),
        *("--num", "16", "--processes", "1", "--steps", "1"),
    ],
    "reproduce": [],
    "convert": [],
}
"""Options that make a documented command take a moment; a later one overrides an earlier one."""

WATCHED = ("fashion-16-at", "fashion-16-consistency")
"""Recipes that are watched, which takes longer than their training here."""

TEXT = {
    "train": [*SMALL["train"], "--cpu", *(f"--set={value}" for value in ("data.size=8", "data.workers=0", "warmup=0"))],
    "sample": ["--num", "2", "--steps", "2", "--cpu"],
    "convert": [],
    "evaluate": ["--num", "4", "--steps", "2", "--cpu"],
}
"""The same for a page on models of text."""

TINY = AdmFlags(
    image_size=8,
    num_channels=32,
    num_res_blocks=1,
    channel_mult="1",
    attention_resolutions="8",
    learn_sigma=True,
)
"""The network of all published checkpoints here."""

STUDY = """
title: a study of no use
recipe: fashion-16-at
set: {steps: 2, batch_size: 4, threads: 1}
baseline: plain
methods: {plain: {set: {adversary: none}}, free: {}}
measure: {samplers: [ddim], steps: [1, 10], num: 40}
"""
"""A small study, which is run in place of the documented one."""


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands(path: Path) -> list[list[str]]:
    """The robustdiff commands of a document's bash blocks, in order."""
    lines = "\n".join(blocks(path, "bash")).replace("\\\n", " ").splitlines()
    split = [shlex.split(line, comments=True) for line in lines]
    return [words[words.index("robustdiff") + 1 :] for words in split if "robustdiff" in words]


def documents(found: Any) -> list[Any]:
    """The documents in which something is found, as parameters with their names."""
    return [pytest.param(path, id=path.relative_to(ROOT).as_posix()) for path in DOCUMENTS if found(path)]


def small(command: list[str]) -> list[str]:
    """A documented command at a size of moments: of assignments to a field the last one alone."""
    words = [*command, *SMALL[command[0]]]
    if command[0] == "evaluate" and "--steps" in command:
        words += ["--steps", "2"]
    if command[:2] in (["train", "fashion-16-dit"], ["train", "emoji"]):
        words += ["--set", "codec.cache=false"]
    if command[:2] in (["train", "emoji"], ["train", "emoji-lcm"]):
        words += ["--set", "data.split=unseen"]  # fewer captions to encode
    if command[:2] == ["train", "cifar10-adm"]:  # in place of the download
        words += [
            f"--set={value}" for value in ("data.name=npz", "data.root=cifar.npz", "data.size=8", "data.workers=0")
        ]
    if command[:2] == ["train", "sd15-at-lora"]:
        words += TEXT["train"][len(SMALL["train"]) :]
    if command[0] == "train" and (command[1] in WATCHED or "watch" in " ".join(command).replace("watch=none", "")):
        words += ["--set", "watch.num=8", "--set", "watch.steps=[1]"]
    if command[0] != "train":
        return words
    fields = {words[i + 1].partition("=")[0]: words[i + 1] for i, word in enumerate(words) if word == "--set"}
    rest = [word for i, word in enumerate(words) if word != "--set" and words[i - 1] != "--set"]
    return [*rest, *(part for field in sorted(fields) for part in ("--set", fields[field]))]


def without_inception(words: list[str], size: int) -> list[str]:
    """A command with the features of a small classifier of RGB images in place of Inception's."""
    kept: list[str] = []
    for before, word in zip(["", *words], words, strict=False):
        if word.startswith("watch.weights="):
            kept.pop()  # its --set
        elif "--weights" not in (word, before):
            kept.append(re.sub(r"^(watch\.features=)?inception$", rf"\g<1>features-{size}.safetensors", word))
    return kept


def _small(name):
    """Return a study that comes with the package, at a size of seconds: one cell of each of its networks."""
    from robustdiff.study.schema import load_study

    study = load_study(name)
    measure = study.measure.model_copy(update={"num": 16, "steps": (1,), "samplers": study.measure.samplers[:1]})
    references = {key: one.model_copy(update={"steps": (2,)}) for key, one in study.references.items()}
    changes = {**study.set, "steps": 3, "batch_size": 4, **({"data.split": "unseen"} if name == "demo-text" else {})}
    return study.model_copy(update={"set": changes, "measure": measure, "references": references})


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, make_unet, make_sd_pipeline) -> Path:
    """A folder with everything that the documents refer to: checkpoints, images, and their own recipes."""
    from diffusers import DDPMPipeline, DDPMScheduler

    from robustdiff.backbones.adm import build_adm, save_adm
    from robustdiff.metrics.extractors.classifier import Classifier

    folder = tmp_path_factory.mktemp("workspace")
    for name in ("64x64_diffusion.pt", "ADM-baseline.pt"):
        save_adm(build_adm(TINY), folder / name)
    (folder / "benchmarks" / "studies").mkdir(parents=True)
    (folder / "benchmarks" / "studies" / "fashion-16.yaml").write_text(STUDY)
    make_sd_pipeline(folder / "stabilityai" / "stable-diffusion-xl-base-1.0", "xl")  # in place of the download
    for path, size in (("path/to/pipeline", 64), ("models/ddpm-cifar10-32", 32)):
        unet = make_unet(sample_size=size, in_channels=3, out_channels=3)
        DDPMPipeline(unet, DDPMScheduler(1000)).save_pretrained(folder / path)
    np.savez(folder / "cifar.npz", images=np.random.default_rng(0).integers(0, 256, (16, 8, 8, 3), dtype=np.uint8))
    for size in (8, 32):
        Classifier(3, size, [4], 3, 2).save(folder / f"features-{size}.safetensors")
    make_sd_pipeline(folder / "stable-diffusion-v1-5" / "stable-diffusion-v1-5")
    (folder / "data" / "captioned").mkdir(parents=True)
    for i in range(4):
        Image.fromarray(np.full((8, 9, 3), 40 * i, np.uint8)).save(folder / "data" / "captioned" / f"000{i}.jpg")
        (folder / "data" / "captioned" / f"000{i}.txt").write_text("a red shoe")
    (folder / "photos").mkdir()
    for i in range(8):
        Image.fromarray(np.full((66, 70, 3), 30 * i, np.uint8)).save(folder / "photos" / f"{i}.png")
    for path in DOCUMENTS:
        for block in blocks(path, "yaml"):
            if name := re.match(r"# ([\w-]+\.yaml)\n", block):
                (folder / name[1]).write_text(block)
    return folder


RUN: set[tuple[str, ...]] = set()


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("path", documents(lambda path: commands(path) and path.name != "text-to-image.md"))
def test_every_command_runs(path, robustdiff, workspace, monkeypatch):
    from robustdiff import demo
    from robustdiff.backbones.adm import PRESETS, convert

    monkeypatch.chdir(workspace)
    monkeypatch.setattr(demo, "load_study", _small)
    monkeypatch.setattr(convert, "PRESETS", dict.fromkeys(PRESETS, TINY))
    for command in commands(path):
        words = without_inception(small(command), 8 if path.name == "cifar10.md" else 32)
        key = tuple(sorted({*words} - {"--resume", "--cpu"}))
        if key not in RUN:
            outcome = robustdiff(*words)
            assert outcome.code == 0, (command, outcome.err)
            RUN.add(key)


def test_every_command_of_text_to_image_runs(robustdiff, make_sd_pipeline, clip_folder, tmp_path, monkeypatch):
    """In a folder with a tiny model and a tiny CLIP for the downloads, images with captions, and prompts."""
    from robustdiff.metrics.extractors.classifier import Classifier

    monkeypatch.chdir(tmp_path)
    make_sd_pipeline(tmp_path / "stable-diffusion-v1-5" / "stable-diffusion-v1-5")
    shutil.copytree(clip_folder, tmp_path / "models" / "clip-vit-large-patch14")
    for folder in (tmp_path / "data" / "captioned", tmp_path / "data" / "real"):
        folder.mkdir(parents=True)
        for i in range(4):
            Image.fromarray(np.full((8, 9, 3), 40 * i, np.uint8)).save(folder / f"000{i}.jpg")
            (folder / f"000{i}.txt").write_text("a red shoe")
    (tmp_path / "prompts.txt").write_text("a red shoe\na blue shirt\nred\nblue\n")
    Classifier(3, 8, [4], 3, 2).save(tmp_path / "features-8.safetensors")
    for command in commands(ROOT / "docs" / "text-to-image.md"):
        command = without_inception(command, 8)
        more = ["--set", "data.size=8"] if command[0] == "evaluate" and "--data" in command else []
        outcome = robustdiff(*command, *TEXT[command[0]], *more)
        assert outcome.code == 0, (command, outcome.err)


@pytest.fixture
def registries(monkeypatch):
    """Restore the registries after a test, whose document may register kinds of its own."""
    from robustdiff.codecs.codec import CODECS
    from robustdiff.data.registry import DATASETS
    from robustdiff.metrics.metric import METRICS
    from robustdiff.perturbation import ADVERSARIES
    from robustdiff.samplers.sampler import SAMPLERS

    for registry in (ADVERSARIES, CODECS, DATASETS, METRICS, SAMPLERS):
        monkeypatch.setattr(registry, "_entries", dict(registry._load()))


@pytest.mark.usefixtures("registries")
@pytest.mark.parametrize("path", documents(lambda path: blocks(path, "python")))
def test_python_runs(path, workspace, monkeypatch):
    from robustdiff.backbones import adm

    digits = datasets.load_digits()
    digits.images, digits.target = digits.images[:256], digits.target[:256]  # for loops over all of them
    monkeypatch.setattr(datasets, "load_digits", lambda: digits)
    monkeypatch.chdir(workspace)
    monkeypatch.setattr(adm, "PRESETS", dict.fromkeys(adm.PRESETS, TINY))
    variables: dict[str, Any] = {}
    for block in blocks(path, "python"):
        exec(compile(block, path.name, "exec", dont_inherit=True), variables)


@pytest.mark.parametrize("path", documents(lambda path: blocks(path, "yaml")))
def test_recipes_and_studies_are_valid(path, tmp_path):
    from robustdiff.recipe import load_recipe
    from robustdiff.study.schema import load_study

    for block in blocks(path, "yaml"):
        file = tmp_path / "block.yaml"
        file.write_text(block)
        assert load_study(file) if "methods" in yaml.safe_load(block) else load_recipe(str(file))


@pytest.mark.parametrize("path", documents(lambda path: True))
def test_links_lead_somewhere(path):
    text = path.read_text(encoding="utf-8")
    for link in re.findall(r'\]\(([^)#]+)[)#]|(?:src|srcset)="([^"]+)"', text):
        target = "".join(link)
        made = (path.parent / target).resolve().is_relative_to(ROOT / "docs") and (
            (path.parent / target).resolve().relative_to(ROOT / "docs").as_posix() in SITE
        )
        assert target.startswith("http") or made or (path.parent / target).exists(), target
    for script in re.findall(r"^python (?!-)(\S+)", "\n".join(blocks(path, "bash")), re.MULTILINE):
        assert (ROOT / script).is_file()


def test_every_preset_is_in_the_table():
    text = (ROOT / "docs" / "adm.md").read_text(encoding="utf-8")
    rows = [row.strip("| ").split(" | ")[:5] for row in text.splitlines() if row.startswith("| `")]
    assert rows == [
        [
            f"`{name}`",
            str(flags.image_size),
            str(flags.num_channels),
            "yes" if flags.class_cond else "no",
            "learned" if flags.learn_sigma else "fixed",
        ]
        for name, flags in PRESETS.items()
    ]


def test_inceptions_weights_have_one_name_and_one_source():
    source = (ROOT / "docs" / "evaluating.md").read_text(encoding="utf-8")
    assert f"\ncurl -LO {INCEPTION_URL}\n" in source
    for path in DOCUMENTS:
        named = re.findall(r"[\w.-]*inception[\w.-]*\.pth", path.read_text(encoding="utf-8"))
        assert {*named} <= {INCEPTION_URL.rpartition("/")[2]}, path.name


def test_the_page_on_cifar10_has_the_measured_times():
    times = json.loads((ROOT / "benchmarks" / "results" / "gpu.json").read_text())
    text = (ROOT / "docs" / "cifar10.md").read_text(encoding="utf-8")
    for row, name in (("free AT | bf16", "free bf16"), ("plain | bf16", "none bf16"), ("PGD | bf16", "pgd bf16")):
        ms = times["milliseconds"][name]["median"]
        assert f"| {row} | {ms:.1f} ms | {200_000 * ms / 3.6e6:.1f} hours" in text
    ms = times["milliseconds"]["free fp16"]["median"]
    assert f"| {ms:.1f} ms | {200_000 * ms / 3.6e6:.1f} hours" in text
    speed = times["images_per_second"]["sampling bf16"]["median"]
    assert f"| {speed:,.0f} images/s | {50_000 / speed:.0f} seconds for 50,000 images" in text


def test_the_demonstrations_are_those_of_the_committed_results():
    script = runpy.run_path(str(ROOT / "scripts" / "update_demo.py"))
    for folder, section, page in (("demo", "demo_section", "demo.md"), ("demo-text", "text_section", "emoji.md")):
        record = json.loads((ROOT / "docs" / folder / "result.json").read_text())
        assert script[section](record) in (ROOT / "docs" / page).read_text(encoding="utf-8")


def test_differences_of_the_demonstration_lie_in_their_intervals():
    record = json.loads((ROOT / "docs" / "demo" / "result.json").read_text())
    found = re.findall(r"(\S+)% \((\S+)% … (\S+)%\)", (ROOT / "docs" / "demo.md").read_text().replace("−", "-"))
    expected = [d for d in record["differences"] if d["baseline"] == "plain"]
    assert len(found) == len(expected)
    assert {tuple(map(float, row)) for row in found} == {
        tuple(round(100 * x, 1) for x in (d["relative"], *d["relative_ci"])) for d in expected
    }
    for change, low, high in found:
        assert float(low) < float(change) < float(high)


def test_the_notebook_runs_and_holds_such_outputs():
    run = runpy.run_path(str(ROOT / "scripts" / "run_notebook.py"))["run"]
    path = ROOT / "docs" / "notebooks" / "first-steps.ipynb"
    assert path.stat().st_size < 10**6
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    kept = [cell["outputs"] for cell in cells if cell["cell_type"] == "code"]
    for cell in cells:  # with fewer batches, and fewer images
        cell["source"] = "".join(cell["source"]).replace("range(30)", "range(2)").replace("[5], 200", "[5], 16")

    def kinds(outputs):
        return [[out.get("name", "image/png" in out.get("data", ())) for out in cell] for cell in outputs]

    assert kinds(run(cells)) == kinds(kept)


def test_plain_fine_tuning_was_better_than_each_candidate_of_the_search():
    text = " ".join((ROOT / "docs" / "results-summary.md").read_text(encoding="utf-8").split())
    assert "plain fine-tuning had a lower mean FID than each of the four candidates" in text
    cells = ROOT / "benchmarks" / "results" / "one-sampler" / "cells"

    def mean(method: str) -> float:
        fid = [
            json.loads((cells / f"{method}-s{seed}-iddpm-{steps}.json").read_text())["fid"]
            for seed in (20, 21, 22)
            for steps in (10, 20, 50)
        ]
        return float(np.mean(np.log(fid)))

    candidates = ("free-k3-a0.3", "free-k5-a0.3", "free-k3-a0.6", "free-k5-a0.3-short")
    assert mean("plain") < min(map(mean, candidates))


@pytest.mark.usefixtures("registries")
def test_the_pages_of_the_reference_are_up_to_date():
    pytest.importorskip("mkdocs")
    pages = runpy.run_path(str(ROOT / "scripts" / "site_pages.py"))["reference_pages"]()
    for name, page in pages.items():
        path = ROOT / "docs" / "reference" / name
        assert page == path.read_text(encoding="utf-8"), "make them again: python scripts/site_pages.py"


# ------------------------------------------------------------------------------------------------------------ the site


class Loads(HTMLParser):
    """Collects the anchors of a page, and what a browser loads for it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        names = {"link": ["href"], "a": [], "use": ["href"]}.get(tag, ["src", "srcset", "poster", "data"])
        if tag != "link" or values.get("rel") not in ("canonical", "prev", "next"):
            self.loads += [values[name] for name in names if values.get(name)]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site, built with warnings as errors."""
    pytest.importorskip("mkdocs")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True))
    return folder


def test_warnings_are_errors_for_make_as_well():
    """With --quiet mkdocs does not count them."""
    (line,) = re.findall(r"mkdocs build.*", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert line == "mkdocs build"


def test_the_site_loads_nothing_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        for load in Loads(page).loads:
            assert not re.match(r"(\w+:)?//", load), (page.name, load)
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(https?:)?//|@import", sheet.read_text(encoding="utf-8")), sheet.name


def test_the_reference_has_every_field_and_every_option(site):
    from typer.main import get_command

    from robustdiff import __all__ as public
    from robustdiff.cli import app
    from robustdiff.perturbation import ADVERSARIES
    from robustdiff.recipe import Recipe

    names = ("recipe", "command-line", "python")
    recipe, line, python = ((site / "reference" / f"{name}.html").read_text(encoding="utf-8") for name in names)
    for field in Recipe.model_fields:
        assert f"<code>{field}</code>" in recipe or f'id="{field}"' in recipe
    for kind in ADVERSARIES.values():
        for field in set(kind.model_fields) - {"name"}:
            assert f"<code>{field}</code>" in recipe
    for name, command in get_command(app).commands.items():
        assert f'<h2 id="{name}">' in line
        for parameter in command.params:
            assert parameter.opts[-1] in line or parameter.name.upper() in line
    for name in public:
        assert f'.{name}"' in python
