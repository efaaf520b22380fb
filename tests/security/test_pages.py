"""Names, numbers and settings files of somebody else's come out of tables, figures and pages as what they are."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console

from robustdiff.errors import InputError
from robustdiff.evaluation.grid import Cell, Difference, Grid
from robustdiff.metrics.fid import FID
from robustdiff.report import results as results_module
from robustdiff.report.bar import Bar
from robustdiff.report.figures import Line, label, points, sample_grid, save_figure, step_panels
from robustdiff.report.html import write_report
from robustdiff.report.page import write_page
from robustdiff.report.results import write_results
from robustdiff.report.tables import cell_table, grid_table, print_whole, remaining_table, reproduced_table
from robustdiff.study.estimate import Remaining
from robustdiff.study.plan import plan
from robustdiff.study.schema import Study

SRC = Path(__file__).resolve().parents[2] / "src"
NAMES = [
    "[/]",
    "a[red]b",
    "[bold",
    "a\x1b[31mb\x1b]0;title\x07",
    "c\r\n\u202ed",
    ":smile:",
    "$x^{$",
    r"$\frac{$",
    "_x",
    "\\",
]


def cell(name: str) -> Cell:
    return Cell(name, "ddim", 5, 40, {"fid": 2.0, "kid": 0.1, "kid_se": 0.01}, {"fid": (1.0, 3.0)}, {}, 1.0)


def printed(*tables: object) -> str:
    console = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=200)
    for table in tables:
        print_whole(console, table)
    return console.file.getvalue()


@pytest.mark.parametrize("name", NAMES)
def test_tables_show_names_as_they_are(name):
    grid = Grid([cell("plain"), cell(name)], [Difference(name, "plain", "ddim", 5, "fid", 0.5, (0.1, 0.9), 0.25)], {})
    swapped = Grid(grid.cells[::-1], [replace(grid.differences[0], checkpoint="plain", baseline=name)], {})
    record = {"fid": 1.0, "kid": name, "precision": 0.5, "recall": 0.5, "weights": name}
    text = printed(
        cell_table(grid.cells),
        grid_table(grid, "plain", FID.numbers[0]),
        grid_table(swapped, name, FID.numbers[0]),
        remaining_table([Remaining(name, 1, 1, 1.0)]),
        reproduced_table(record, {**record, "weights": "other"}),
    )
    assert "\x1b" not in text
    assert all(c.isprintable() or c == "\n" for c in text)
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
    assert text.count(shown) >= 5


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_shows_names_as_they_are(monkeypatch, name, terminal):
    monkeypatch.setattr("robustdiff.report.bar._LINE_EVERY", -1.0)
    console = Console(file=io.StringIO(), force_terminal=terminal, color_system=None, width=300, legacy_windows=False)
    with Bar(console) as bar:
        bar.begin(name, 3)
        bar.advance(1, name)
    text = re.sub(r"\x1b\[[0-9?]*[A-Za-z]", "", console.file.getvalue()) if terminal else console.file.getvalue()
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "\u202e" not in text
    assert "😄" not in text


def test_figures_show_names_as_they_are(tmp_path):
    """Dollar signs are no formula (an unclosed one is an error when the figure is drawn), and _x is in the legend."""
    line = [Line([1, 2], [4, 3], [4, 3], [4, 3])]
    title = "$" + "x" * 5000 + "$"
    figures = [
        step_panels({"$a$": dict.fromkeys(NAMES, line)}, dict.fromkeys(NAMES, 2.0), title=title),
        points({name: {key: [(1.0, 2.0)] for key in NAMES} for name in NAMES[-3:]}, "x", "y"),
        sample_grid({(n, "ddim", 5): torch.zeros(8, 1, 4, 4) for n in NAMES[-3:]}, NAMES[-3:], "ddim", [5], title),
    ]
    for i, figure in enumerate(figures):
        save_figure(figure, tmp_path / f"{i}.png")
    texts = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert texts == [label(name) for name in NAMES], "a name of a line and of a level is shown once"
    assert all("\x1b" not in text for text in texts)


def test_settings_of_the_process_change_no_figure(tmp_path):
    def draw(name: str) -> bytes:
        save_figure(step_panels({"plain": {"a": [Line([1, 2], *[[2.0, 1.0]] * 3)]}}), tmp_path / name)
        return (tmp_path / name).read_bytes()

    before = draw("before.png")
    hostile = {"text.usetex": True, "savefig.dpi": 10, "axes.facecolor": "red", "lines.linewidth": 30, "font.size": 40}
    with matplotlib.rc_context(hostile):
        assert draw("after.png") == before
        assert matplotlib.rcParams["font.size"] == 40, "what the process has stays"


def test_settings_of_the_working_folder_are_not_read(tmp_path):
    """Settings that run code (in older versions), call LaTeX, name a backend of their own, or are damaged."""
    folder = tmp_path / "work"
    folder.mkdir()
    pwned = tmp_path / "pwned"
    latex = tmp_path / "bin"
    latex.mkdir()
    for name in ("latex", "pdflatex", "xelatex", "dvipng", "kpsewhich"):
        (latex / name).write_text(f"#!/bin/sh\ntouch {pwned}\nexit 1\n")
        (latex / name).chmod(0o755)
    code = f"(lambda: __import__('pathlib').Path('{pwned}').touch())()"
    (folder / "evil.py").write_text(f"import pathlib\npathlib.Path({str(pwned)!r}).touch()\n")
    rc = f"text.usetex: True\nbackend: module://evil\naxes.prop_cycle: cycler('color', [{code}])\naxes.facecolor: red\n"
    (folder / "matplotlibrc").write_text(rc)
    draw = (
        "from pathlib import Path\n"
        "from robustdiff.report.figures import points, save_figure\n"
        f"save_figure(points({{'a': {{'plain': [(1, 2)]}}}}, 'x', 'y'), Path({str(tmp_path / 'there.png')!r}))\n"
    )

    def python(code: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(SRC), "PATH": f"{latex}:{os.environ['PATH']}"}
        command = [sys.executable, "-P", "-c", code]
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)

    assert python("import matplotlib; print(matplotlib.rcParams['text.usetex'])").stdout == "True\n", "it would have"
    done = python(draw)
    assert (done.returncode, done.stderr) == (0, "")
    save_figure(points({"a": {"plain": [(1, 2)]}}, "x", "y"), tmp_path / "here.png")
    assert (tmp_path / "there.png").read_bytes() == (tmp_path / "here.png").read_bytes()
    assert not pwned.exists()


def test_matplotlib_is_imported_in_one_place():
    pattern = re.compile(r"^\s*(import|from) matplotlib", re.MULTILINE)
    importers = [path for path in (SRC / "robustdiff").rglob("*.py") if pattern.search(path.read_text())]
    assert [path.name for path in importers] == ["figures.py"]
    assert "pyplot" not in importers[0].read_text()


def test_the_numbers_are_written_before_a_figure_can_fail(tmp_path, monkeypatch):
    def fail(*arguments: object) -> None:
        raise RuntimeError("no figure")

    monkeypatch.setattr(results_module, "save_figure", fail)
    samples = {("a", "ddim", 5): torch.zeros(8, 1, 4, 4, dtype=torch.uint8)}
    with pytest.raises(RuntimeError, match="no figure"):
        write_results(tmp_path, Grid([cell("a")], [], samples), "title", {})
    assert json.loads((tmp_path / "result.json").read_text())["cells"][0]["fid"] == 2.0


@pytest.fixture
def study(tmp_path):
    """A study with its cells, whose free words are hostile."""
    words = "<script>alert(1)</script> ![x](http://x/y.png) `code` | *b* $m$\x1b[31m\n# heading\n\n<img src=x>"
    study = Study.model_validate(
        {
            **dict.fromkeys(("title", "question", "answer"), words),
            "recipe": "fashion-16-at",
            "set": {"threads": 1, "steps": 3, "batch_size": 4},
            "baseline": "plain",
            "methods": {"plain": {"set": {"adversary": "none"}}, "free": {}, "wild": {}},
            "measure": {"samplers": ["ddim"], "steps": [5, 10], "num": 40, "features": "a`b``<b>", "mismatch": 40},
            "cut": words,
        }
    )
    for part in ("cells", "trainings", "mismatch"):
        (tmp_path / part).mkdir()
    for run in plan(study, tmp_path):
        if run.method == "wild":
            run.failure.write_text(json.dumps({"error": words}))
            continue
        for one in run.cells:
            training = {"steps": 3, "batches": 3, "backward_passes": 3, "images": 7, "delta_norm": 0.1}
            record = {
                **{"method": run.method, "seed": run.seed, "sampler": one.sampler, "steps": one.steps, "n": 40},
                **{"fid": 2.0, "kid": 0.5, "kid_se": 0.1, "precision": 0.5, "recall": 0.5},
                "replicates": np.random.default_rng(one.steps).normal(2, 0.1, 200).tolist(),
                "measure": study.measure.model_dump(mode="json"),
                "recipe": yaml.safe_load(run.recipe.to_yaml()),
                "training": {**training, "data": "<i>data</i>"},
                **{"threads": 1, "device": "<b>cpu</b>", "torch": "<u>2</u> | x"},
            }
            one.path.write_text(json.dumps(record))
        run.path.write_text(json.dumps({"seconds": 1.0, "step": [1, 2], "loss": [2.0, 1.0]}))
    return study


def test_words_of_files_are_words_on_the_page(study, tmp_path):
    text = write_page(study, tmp_path, tmp_path / "my page (1).md")
    code = "``` a`b``<b> ```"  # where < is a letter
    assert code in text
    text = text.replace(code, "")
    assert not re.search(r"(?<!\\)<(?!/?(details|summary))", text)
    assert not re.search(r"(?<!\\)\]\(http", text)
    assert "\x1b" not in text
    assert text.splitlines()[0].startswith("# &#60;script\\>")
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert len(headings) == len(set(headings))
    assert "# heading" not in headings
    assert "(my%20page%20%281%29/fid.png)" in text


def test_words_of_files_are_words_in_the_report(study, tmp_path):
    """In the HTML of the same page there are no elements and no addresses of theirs."""
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study.model_dump(mode="json"), allow_unicode=True))
    write_report([str(tmp_path / "study.yaml")], tmp_path / "page.html", tmp_path)
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert text.count("<script") == text.count("</script>") == 1
    assert "&lt;script&gt;alert(1)&lt;/script&gt; ![x](http://x/y.png) `code`" in text
    assert re.findall(r"<(?:img|a|i|b|u)\b[^>]*>", text) == re.findall(
        r'<img src="data:image/[^>]*>|<a (?:class="skip" )?href="#[^"]*">', text
    )
    assert all(c.isprintable() or c == "\n" for c in text)


def spoil(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    "change",
    [
        {"fid": float("nan")},
        {"fid": float("inf")},
        {"fid": "2"},
        {"fid": "<b>2</b>"},
        {"fid": True},
        {"kid_se": float("nan")},
        {"kid_se": None},
        {"kid": float("-inf")},
        {"replicates": [1.0]},
        {"replicates": [float("nan")] * 200},
        {"training": {"steps": 3}},
        {"training": None},
        {"threads": None},
        {"torch": 2},
        {"brightness": "1"},
        {"method": "other"},
        {"seed": 3},
        {"steps": 50},
        {"recipe": {}},
    ],
)
def test_a_cell_whose_numbers_are_none_is_not_tabulated(study, tmp_path, robustdiff, change):
    spoil(plan(study, tmp_path)[0].cells[0].path, **change)
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study.model_dump(mode="json"), allow_unicode=True))
    outcome = robustdiff("study", tmp_path / "study.yaml", "--output", tmp_path, "--report", tmp_path / "page.md")
    if change == {"kid_se": None}:  # needed of references alone
        assert outcome.code == 0
        return
    assert (outcome.code, len(outcome.err.strip().splitlines())) == (2, 1)
    assert "plain-s0-ddim-5" in outcome.err
    assert not (tmp_path / "page.md").exists()


@pytest.mark.parametrize(
    ("part", "text"),
    [
        ("trainings/wild-s0.failed.json", "{}"),
        ("trainings/wild-s0.failed.json", '{"error": [1]}'),
        ("mismatch/plain-s0.json", "{}"),
        ("mismatch/plain-s0.json", '{"paths": [{"sampler": "ddim", "steps": 5, "mean": {}}]}'),
        ("mismatch/plain-s0.json", '{"paths": [{"sampler": "../x", "steps": 5, "mean": {}}]}'),
        ("mismatch/plain-s0.json", "[" * 100_000),
    ],
)
def test_other_files_that_are_not_whole_are_named(study, tmp_path, part, text):
    (tmp_path / part).write_text(text)
    with pytest.raises(InputError, match=re.escape(part)) as error:
        write_page(study, tmp_path, tmp_path / "page.md")
    assert len(str(error.value).splitlines()) == 1


def test_a_picture_that_is_none_or_is_huge_is_named(study, tmp_path):
    picture = plan(study, tmp_path)[0].cells[1].path.with_suffix(".png")
    picture.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    with pytest.raises(InputError, match="plain-s0-ddim-10"):
        write_page(study, tmp_path, tmp_path / "page.md")
    Image.new("1", (9000, 9000)).save(picture)
    with pytest.raises(InputError, match="9000×9000"):
        write_page(study, tmp_path, tmp_path / "page.md")


def test_figures_go_into_no_folder_that_is_a_link(study, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "page").symlink_to(tmp_path / "mine")
    with pytest.raises(InputError, match="symbolic link"):
        write_page(study, tmp_path, tmp_path / "page.md")
    assert not list((tmp_path / "mine").iterdir())
