"""The report as one file: what it says of runs, what it refuses, and that it loads nothing and runs no foreign code."""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from robustdiff.errors import InputError
from robustdiff.evaluation.generate import Generator
from robustdiff.metrics.reservoir import fixed_order
from robustdiff.report import html as html_module
from robustdiff.report.html import write_report
from robustdiff.report.pictures import Pictures, gallery

VOID = {"meta", "img", "input", "br", "path", "rect"}
ROOT = Path(__file__).resolve().parents[2]
HOSTILE = (
    "</script><script>alert(1)</script><img src=x onerror=alert(1)>\"'><b style=color:red>\x1b[31m\u202e {{ 7 * 7 }}"
)


class Page(HTMLParser):
    """The elements of a page with their attributes, the text outside scripts, and the content of styles and scripts."""

    def __init__(self, contents: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.raw: dict[str, list[str]] = {"style": [], "script": []}
        self.open: list[str] = []
        self.headings: list[str] = []
        self.feed(contents)
        self.close()
        assert self.open == [], "every element is closed"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "th":
            self.headings.append("")

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag, f"</{tag}> where another element is open"

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.open and self.open[-1] in self.raw:
            self.raw[self.open[-1]].append(data)
        else:
            self.words.append(data)
            if "th" in self.open:
                self.headings[-1] += data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def read(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def report(make_run, tmp_path_factory) -> Path:
    """The report of a run that improved, without a model of another size than the start's in between."""
    folder = tmp_path_factory.mktemp("report")
    write_report([str(make_run(folder / "free"))], folder / "report.html", pictures=Pictures(4, steps=[2, 3]))
    return folder / "report.html"


def test_the_page_says_whether_the_training_helped(report):
    text = read(report).text
    assert (
        "The training helped. The best checkpoint, of update 40, has a mean FID of 6.67 on fresh noise (600 images in "
        "all), −16.7% (−20.8% … −12.5%) vs the start." in text
    )
    assert "Compared with the start at 3 pairs of sampler and steps: better: 3, worse: 0." in text
    assert "FID, ddim, 5 steps 8.00 6.00 (5.00 … 7.00) −25.0% (−31.2% … −18.8%) better" in text
    assert "long-sampling , update 60 (warn): FID at 5 steps is above that of the start" in text
    assert "Fine-tuning of fashion-16 on fashion-16 (60,000 images), with the adversary free" in text
    assert "radius eta 0.1)" in text
    assert "4 measurements, each of 600 images in all; together they took 14 s." in text


def test_the_page_names_the_commands(report):
    text = read(report).text
    folder = report.parent / "free"
    assert f"robustdiff train {folder}/recipe.yaml --set output={folder}-again" in text
    assert f"robustdiff evaluate fashion-16 {folder}/best" in text
    again = f"robustdiff report {folder} --output {report} --num 4 --seed 0 --sampler ddim --steps 2,3"
    assert again in text


def test_charts_have_their_numbers_as_text(report):
    page = read(report)
    assert "FID against steps, ddim" in page.text
    assert "FID vs the start, dpm++ change of FID, % (lower is better)" in page.text
    assert "60 updates; 5 steps: +16.7 (+8.3 … +25.0)" in page.text, "as the title of a column"
    assert " −30 −20 −10 start 10 " in page.text, "the start is a tick, where no marker is drawn over it"
    assert "best" in page.words
    assert "⚑1" in page.words


def test_pictures_are_of_the_start_the_best_and_the_last_model_from_the_same_noise(report):
    images = read(report).all("img")
    assert [image["alt"] for image in images[:3]] == [
        f"4 samples of {name} by ddim at 2 steps, in 2 columns"
        for name in ("start, fashion-16", "best (update 40)", "last model")
    ]
    assert len(images) == 6
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(images[0]["src"].partition(",")[2]))))
    ((_, made),) = Generator.load("fashion-16", sampler="ddim", steps=2).images(range(4))
    assert shown.shape == (33, 33)
    np.testing.assert_array_equal(shown[17:, :16], made[2, 0].numpy())
    assert images[1]["src"] == images[2]["src"], "of the same weights"


def test_the_same_call_makes_the_same_file(report, make_run, tmp_path):
    before = report.read_bytes()
    write_report([str(report.parent / "free")], report, pictures=Pictures(4, steps=[2, 3]))
    assert report.read_bytes() == before


def test_the_page_loads_nothing(report):
    page = read(report)
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form")
        for name in ("src", "href", "srcset", "action", "data", "poster", "xlink:href"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:image/png;", "data:image/webp;", "#")), (tag, value)
        assert "style" not in attributes
        assert not any(name.startswith("on") for name in attributes)
    for text in (*page.raw["style"], *page.raw["script"]):
        assert not re.search(r"@import|url\(|https?:|//[a-z]|fetch\(|XMLHttpRequest|eval\(|innerHTML", text)


def test_the_policy_allows_the_own_style_and_script_alone(report):
    page = read(report)
    (policy,) = [m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    (style,), (script,) = page.raw["style"], page.raw["script"]
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)]
    assert policy == (
        f"default-src 'none'; img-src data:; style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}'; "
        "base-uri 'none'; form-action 'none'"
    )


def structure(page: Page) -> None:
    """Assert that headings descend by one level, tables have captions and scopes, and names of elements are unique."""
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(later <= earlier + 1 for earlier, later in itertools.pairwise(levels))
    assert len(page.all("table")) == len(page.all("caption"))
    assert all(attributes.get("scope") in ("col", "row") for attributes in page.all("th"))
    assert "" not in page.headings
    assert all(attributes.get("alt") for attributes in page.all("img"))
    names = [attributes["id"] for _, attributes in page.elements if attributes.get("id")]
    assert len(names) == len(set(names))
    targets = {attributes["href"] for attributes in page.all("a")}
    assert targets <= {f"#{name}" for name in names}


def test_the_structure_of_the_page(report):
    structure(read(report))


def test_words_of_a_run_are_words_on_the_page(make_run, tmp_path):
    """Names of folders, messages of signs, and captions and names in results."""
    name = HOSTILE.replace("/", "").replace("\x1b", "").replace("\u202e", "")
    run = make_run(tmp_path / name, message=HOSTILE)
    lines = [json.loads(line) for line in (run / "watch.jsonl").read_text().splitlines()]
    for line in lines:
        line["cells"] = [{**cell, "sampler": HOSTILE, "metric": HOSTILE} for cell in line["cells"]]
    (run / "watch.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    estimate = {"value": 1.0, "low": 0.5, "high": 2.0, "floor": None}
    path = {"checkpoint": HOSTILE, "sampler": HOSTILE, "steps": 5, "n": 9, "mean": {"delta": estimate}}
    (run / "mismatch.json").write_text(json.dumps({"data": HOSTILE, "seed": 0, "paths": [path]}))
    result = json.loads((run / "result.json").read_text())
    result["signs"][0]["name"] = result["device"] = HOSTILE
    (run / "result.json").write_text(json.dumps(result))
    cell = {"checkpoint": HOSTILE, "sampler": HOSTILE, "steps": 5, "n": 9, "seconds": 1.0, "fid": 1.0}
    evaluated = {"data": HOSTILE, "features": HOSTILE, "seed": 0, "cells": [{**cell, "fid_ci": [0.5, 1.5]}]}
    (tmp_path / "evaluated").mkdir()
    (tmp_path / "evaluated" / "result.json").write_text(json.dumps(evaluated))
    write_report([str(run)], tmp_path / "r.html", results=[tmp_path / "evaluated"])
    contents = (tmp_path / "r.html").read_text(encoding="utf-8")
    page = Page(contents)
    assert len(page.all("script")) == len(page.all("style")) == 1
    assert not page.all("img")
    assert not page.all("b")
    assert not any("style" in attributes or "onerror" in attributes for _, attributes in page.elements)
    assert "{{ 7 * 7 }}" in page.text
    assert all(c.isprintable() or c == "\n" for c in contents)
    structure(page)


def test_a_run_that_is_not_finished_has_a_report(make_run, tmp_path):
    """Without a result, and without anything but its recipe."""
    run = make_run(tmp_path / "half", finished=False)
    write_report([str(run)], tmp_path / "half.html", pictures=Pictures(1, steps=[1]))
    text = read(tmp_path / "half.html").text
    assert "The run is not finished: 60 of 999 updates are logged" in text
    assert "Measured on the noise by which the checkpoint is chosen" in text
    assert "half has no model yet." in text
    for name in ("data.json", "metrics.jsonl", "watch.jsonl"):
        (run / name).unlink()
    write_report([str(run)], tmp_path / "half.html")
    assert "0 of 999 updates are logged" in read(tmp_path / "half.html").text


def test_a_model_of_text_is_sampled_for_its_prompts_or_the_captions_of_its_data(make_sd_pipeline, make_run, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    first, second = fixed_order(4)[:2]
    for i in range(4):
        Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(photos / f"{i}.png")
        (photos / f"{i}.txt").write_text(f"a red shoe {'</script><script>' if i == second else i}")
    run = make_run(tmp_path / "text", gains=())
    shutil.rmtree(run / "model")
    recipe = {"data": {"name": "imagefolder", "root": str(photos)}, "model": {"name": "pretrained"}}
    recipe["model"]["path"] = str(make_sd_pipeline(tmp_path / "base"))
    shutil.copytree(tmp_path / "base", run / "model")
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    data = {"name": "photos", "images": 4, "shape": [3, 8, 8], "classes": None, "labels": None, "captions": "1f"}
    data["fingerprint"] = "2e"
    (run / "data.json").write_text(json.dumps(data))
    said: list[str] = []
    write_report(
        [str(run)], tmp_path / "r.html", pictures=Pictures(2, samplers=["ddim"], steps=[1]), on_read=said.append
    )
    assert said == [
        f"{run}/recipe.yaml names the data: reading {photos}",
        f"{run}/recipe.yaml names the starting checkpoint: reading {tmp_path / 'base'}",
    ]
    page = read(tmp_path / "r.html")
    assert f"a red shoe {first}" in page.text
    assert "a red shoe </script>" in page.text
    assert len(page.all("script")) == 1
    structure(page)
    pictures = Pictures(2, samplers=["ddim"], steps=[1], prompts=["blue <i>"], guidance=3.0)
    write_report([str(run)], tmp_path / "r.html", pictures=pictures)
    page = read(tmp_path / "r.html")
    assert "Captions blue <i> blue <i>" in page.text
    assert "--guidance 3 --prompt 'blue <i>'" in page.text
    shutil.rmtree(photos)
    with pytest.raises(InputError, match="--prompt"):
        write_report([str(run)], tmp_path / "r.html", pictures=Pictures(2, samplers=["ddim"], steps=[1]))


def test_a_run_that_was_not_watched_says_so(make_run, tmp_path):
    run = make_run(tmp_path / "plain", gains=())
    write_report([str(run)], tmp_path / "r.html")
    assert "No metric was watched during the training" in read(tmp_path / "r.html").text


def test_a_run_that_did_not_help_says_so(make_run, tmp_path):
    run = make_run(tmp_path / "bad", gains=(3.0, 9.0))
    write_report([str(run)], tmp_path / "r.html", pictures=Pictures(1, steps=[1]))
    text = read(tmp_path / "r.html").text
    assert "The training did not help: no watched checkpoint had a better mean FID than the starting" in text
    assert "The best checkpoint of bad is the one that it started from." in text
    assert "best (update" not in text


@pytest.mark.parametrize(
    ("ends", "words"),
    [
        ([-2.5, 0.5], "The training made no difference beyond the interval. The best checkpoint"),
        ([0.5, 2.5], "The training made the model worse. The best checkpoint"),
        (None, "learning rate 0.0001. The best checkpoint"),
    ],
)
def test_the_verdict_is_what_the_interval_of_the_difference_says(make_run, tmp_path, ends, words):
    run = make_run(tmp_path / "run")
    result = json.loads((run / "result.json").read_text())
    result["best"]["difference_ci"] = ends
    result["best"]["relative_ci"] = ends and [end / 12 for end in ends]
    (run / "result.json").write_text(json.dumps(result))
    write_report([str(run)], tmp_path / "r.html")
    assert words in read(tmp_path / "r.html").text


def test_runs_of_earlier_versions_have_differences(make_run, tmp_path):
    """Their files have no relative changes."""
    run = make_run(tmp_path / "old")
    result = json.loads((run / "result.json").read_text())
    lines = [json.loads(line) for line in (run / "watch.jsonl").read_text().splitlines()]
    for record in (result["best"], *result["best"]["cells"], *(cell for line in lines for cell in line["cells"])):
        record.pop("relative", None)
        record.pop("relative_ci", None)
    (run / "result.json").write_text(json.dumps(result))
    (run / "watch.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_report([str(run)], tmp_path / "r.html")
    text = read(tmp_path / "r.html").text
    assert "in all), −2.00 (−2.50 … −1.50) vs the start." in text
    assert "FID, ddim, 5 steps 8.00 6.00 (5.00 … 7.00) −2.00 (−2.50 … −1.50) better" in text
    assert "FID minus that of the start, dpm++" in text
    assert "60 updates; 5 steps: +1.00 (+0.50 … +1.50)" in text


def test_a_training_from_nothing_has_values_in_place_of_differences(make_run, tmp_path):
    run = make_run(tmp_path / "new", gains=(9.0, 3.0), start=False)
    write_report([str(run)], tmp_path / "r.html")
    text = read(tmp_path / "r.html").text
    assert "The best checkpoint, of update 40, has a mean FID of 11.67" in text
    assert "minus that of the start" not in text
    assert "40 updates; 5 steps: 9.00 (8.00 … 10.00)" in text


def test_several_runs_stand_side_by_side(make_run, tmp_path):
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", gains=(4.0,))]
    recipe = runs[1] / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("lr: 0.0001", "lr: 0.02"))
    write_report([str(run) for run in runs], tmp_path / "r.html", pictures=Pictures(1, steps=[1]))
    page = read(tmp_path / "r.html")
    assert "lr 0.0001 0.02" in page.text
    assert "a, best, update 40" in page.text
    assert "b: FID vs the start, ddim" in page.text
    assert "start, fashion-16" in page.text
    assert "a, start" not in page.text, "both runs started from the same checkpoint, measured on the same noise"
    names = [re.match(r"1 samples of (.*) by", image["alt"])[1] for image in page.all("img")]
    assert names == ["start, fashion-16", "a, best (update 40)", "a, last model", "b, last model"]
    structure(page)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        ({"watch.jsonl": "{}\n"}, ["watch.jsonl, line 1, is damaged", "step"]),
        ({"watch.jsonl": '{"step": NaN}\n'}, ["watch.jsonl, line 1, is damaged"]),
        ({"watch.jsonl": "[" * 100_000 + "\n"}, ["watch.jsonl, line 1, is damaged"]),
        ({"metrics.jsonl": '{"step": 2, "loss": "1"}\n'}, ["metrics.jsonl, line 1", "loss"]),
        ({"result.json": "{}"}, ["result.json", "steps"]),
        ({"result.json": "nothing"}, ["result.json"]),
        ({"mismatch.json": "{}"}, ["mismatch.json", "data"]),
        ({"data.json": "[]"}, ["data.json"]),
        ({"recipe.yaml": "lr: -1"}, ["recipe.yaml", "lr"]),
    ],
)
def test_a_damaged_file_is_named(make_run, tmp_path, spoil, words):
    run = make_run(tmp_path / "run")
    for name, contents in spoil.items():
        (run / name).write_text(contents)
    with pytest.raises(InputError) as error:
        write_report([str(run)], tmp_path / "r.html")
    assert len(str(error.value).splitlines()) == 1
    assert all(word in str(error.value) for word in words)
    assert not (tmp_path / "r.html").exists()


def test_lines_out_of_order_are_refused(make_run, tmp_path):
    path = make_run(tmp_path / "run") / "watch.jsonl"
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    with pytest.raises(InputError, match="comes after"):
        write_report([str(tmp_path / "run")], tmp_path / "r.html")


def test_results_of_evaluate_and_mismatch_are_on_the_page(tmp_path):
    cell = {"checkpoint": "free", "sampler": "ddim", "steps": 5, "n": 400, "seconds": 1.0}
    cells = [{**cell, "fid": 8.0, "fid_ci": [7.5, 8.5], "kid": 0.1, "kid_se": 0.01}]
    cells += [{**cells[0], "steps": 10, "fid": 5.0, "fid_ci": [-0.5, 5.5]}, {**cell, "sampler": "file", "steps": None}]
    record = {"data": "fashion-16", "features": "fashion-16", "seed": 3, "cells": cells}
    estimate = {"value": -1.25, "low": -1.5, "high": -1.0, "floor": 0.5}
    paths = [{"checkpoint": "free", "sampler": "ddim", "steps": 5, "n": 40, "mean": {"delta": estimate}}]
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "result.json").write_text(json.dumps(record))
    (tmp_path / "e" / "mismatch.json").write_text(json.dumps({"data": "fashion-16", "seed": 0, "paths": paths}))
    write_report([], tmp_path / "r.html", results=[tmp_path / "e"])
    page = read(tmp_path / "r.html")
    assert "free ddim 5 400 8.00 (7.50 … 8.50)" in page.text
    assert "± 0.010" in page.text
    assert "0.5 −1.25 (−1.50 … −1.00)" in page.text
    structure(page)


def test_pictures_become_smaller_before_they_are_refused():
    noise = torch.randint(0, 256, (4, 3, 200, 100), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = {("ddim", steps, "model"): noise for steps in (5, 10)}
    whole = gallery(images, "Note.")
    assert (whole.frames[0].pictures[0].width, whole.note) == (201, "Note.")
    smaller = gallery(images, "Note.", most=60_000)
    assert smaller.note == "Note. Images of 200 pixels are shown at 128."
    assert smaller.frames[0].pictures[0].width == 129
    with pytest.raises(InputError, match="smaller --num"):
        gallery(images, "Note.", most=100)


def test_a_page_that_is_too_large_is_refused(make_run, tmp_path, monkeypatch):
    run = make_run(tmp_path / "run")
    monkeypatch.setattr(html_module, "MOST_BYTES", 2**10)
    with pytest.raises(InputError, match="at most"):
        write_report([str(run)], tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


@pytest.fixture(scope="module")
def study_report(tmp_path_factory) -> Path:
    """The report of a study of the repository."""
    path = tmp_path_factory.mktemp("study") / "study.html"
    name = "fashion-16-consistency"
    write_report([str(ROOT / f"benchmarks/studies/{name}.yaml")], path, ROOT / f"benchmarks/results/{name}")
    return path


def test_a_study_has_the_text_of_its_page(study_report):
    """Every number of the Markdown page is in the report as well, and charts and a gallery in place of figures."""
    page = read(study_report)
    markdown = (ROOT / "docs" / "results-consistency.md").read_text(encoding="utf-8")
    numbers = re.findall(r"[−+]?\d+\.\d+%?", markdown)
    assert len(numbers) > 100
    text = page.text
    assert [number for number in numbers if number not in text] == []
    assert "FID against steps, multistep" in text
    assert "Samples of solver by multistep at 2 steps" in [image["alt"] for image in page.all("img")]
    assert "|---" not in text
    structure(page)
    test_the_page_loads_nothing(study_report)


def test_a_study_without_its_cells_is_refused(tmp_path):
    with pytest.raises(InputError, match="run the study first"):
        write_report([str(ROOT / "benchmarks/studies/fashion-16.yaml")], tmp_path / "r.html", tmp_path)
