"""The page on the shipped text-to-image model says what the committed result does."""

import json
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def benchmark():
    pytest.importorskip("transformers")
    return runpy.run_path(str(ROOT / "benchmarks" / "emoji.py"))


@pytest.fixture(scope="module")
def record():
    return json.loads((ROOT / "benchmarks" / "results" / "emoji.json").read_text(encoding="utf-8"))


def test_the_page_is_that_of_the_committed_result(benchmark, record):
    page = (ROOT / "docs" / "emoji.md").read_text(encoding="utf-8")
    assert benchmark["replaced"](page, record) == page
    assert benchmark["table"](record) in page


def test_the_result_is_of_the_shipped_model(benchmark, record):
    assert record["fingerprint"] == benchmark["load_model"]("emoji").fingerprint()
    assert len(record["cells"]) == len(benchmark["CELLS"])
    shown = next(cell for cell in record["cells"] if (cell["steps"], cell["guidance"]) == benchmark["SHOWN"])
    assert shown["first_of_40"] >= 30
