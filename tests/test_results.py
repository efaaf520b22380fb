"""The pages of results are what the committed files of the studies say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from robustdiff.report.page import write_page
from robustdiff.report.tune import tune_markdown
from robustdiff.study.schema import load_study

TUNED = "tune-fashion-16-iddpm-10"
ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    "fashion-16": "results.md",
    "fashion-16-constant-rate": "results-constant-rate.md",
    "length": "results-length.md",
    "one-sampler": "results-one-sampler.md",
    "fashion-16-scratch": "results-scratch.md",
    "fashion-28": "results-28.md",
    "fashion-16-consistency": "results-consistency.md",
    "emoji-lcm": "results-emoji.md",
}
THERE = [study for study in PAGES if (ROOT / "benchmarks" / "results" / study / "cells").is_dir()]


@pytest.mark.parametrize("study", THERE)
def test_a_page_is_made_of_the_committed_cells(study, tmp_path):
    page = ROOT / "docs" / PAGES[study]
    made = write_page(
        load_study(ROOT / "benchmarks" / "studies" / f"{study}.yaml"),
        ROOT / "benchmarks" / "results" / study,
        tmp_path / page.name,
    )
    assert made == page.read_text(encoding="utf-8"), (
        f"make it again: robustdiff study benchmarks/studies/{study}.yaml --output benchmarks/results/{study} "
        f"--report docs/{page.name}"
    )
    figures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", made)
    assert figures
    for figure in figures:
        assert (tmp_path / figure).is_file()
        assert (page.parent / figure).is_file()


@pytest.mark.parametrize("study", THERE)
def test_the_answer_has_the_numbers_of_its_page(study):
    head, _, rest = (ROOT / "docs" / PAGES[study]).read_text(encoding="utf-8").partition("\n## ")
    _, question, answer, *_ = head.split("\n\n")
    assert (question.split()[0], answer.split()[0]) == ("**Question.**", "**Answer.**")
    numbers = re.findall(r"[+−]?\d+\.\d+%|\d\.\d{2,}", answer)
    assert numbers
    assert [number for number in numbers if number not in rest] == []


def test_the_page_of_the_search_holds_the_committed_result():
    path = ROOT / "benchmarks" / "results" / TUNED / "result.json"
    section = (ROOT / "docs" / "tune.md").read_text(encoding="utf-8").partition("<!-- tune -->\n")[2]
    made = tune_markdown(json.loads(path.read_text(encoding="utf-8"))) + "\n" if path.exists() else ""
    assert section.partition("<!-- /tune -->")[0] == made, f"make it again: python scripts/update_tune.py {path.parent}"
