"""The tables of speeds in the documentation are those of the committed results."""

import json
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.parametrize("name", ["cpu", "gpu", "gpu_kernels"])
def test_a_table_in_the_documentation_is_that_of_the_committed_result(name, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    table = runpy.run_path(str(ROOT / "benchmarks" / f"{name}.py"))["table"]
    made = table(json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8")))
    text = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    assert text.partition(f"<!-- {name} -->\n")[2].partition(f"<!-- /{name} -->")[0] == made
