"""The memory benchmark runs, and the document has the table that it computes."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("peft")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def memory():
    specification = importlib.util.spec_from_file_location("memory", ROOT / "benchmarks" / "memory.py")
    module = importlib.util.module_from_spec(specification)
    sys.modules["memory"] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    yield module
    del sys.modules["memory"]


def test_the_document_has_the_arithmetic(memory):
    document = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    assert "\n".join(memory.table()) in document


def test_it_trains_and_writes_what_it_measures(memory, tmp_path, capsys):
    out = tmp_path / "results" / "memory.json"
    memory.main(["--tiny", "--only", "2", "--out", str(out)])
    result = json.loads(out.read_text())
    assert [record["name"] for record in result["settings"]] == ["SD 1.5 full", "Flux LoRA of rank 16"]
    for record in result["settings"]:
        assert record["seconds_per_update"] > 0
        assert record["delta_norm"] > 0
        numbers = record["arithmetic"]
        assert numbers["gradients"] == 4 * numbers["trained"]
        assert (numbers["trained"] == numbers["parameters"]) == (record["rank"] is None)
    assert result["device"] == "CPU"
    memory.main(["--tiny", "--seconds", "0", "--only", "1", "--out", str(out)])
    assert json.loads(out.read_text())["settings"][0]["failed"] == "not begun within 0 s"
    assert "not begun within 0 s" in capsys.readouterr().out


def test_a_quantised_base_is_measured_too(memory):
    record = memory.measure(memory.Setting("Flux", rank=2, quantize="int8"), "cpu", True)
    assert "failed" not in record
    assert record["delta_norm"] > 0
    plain = memory.arithmetic(memory.Setting("Flux", rank=2), 10, 1000, 900)
    assert memory.arithmetic(memory.Setting("Flux", rank=2, quantize="int8"), 10, 1000, 900)["weights"] == 40 + 1100
    assert plain["weights"] == 40 + 2000


def test_without_a_gpu_it_says_so(memory, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        memory.main([])
    assert "there is no GPU" in capsys.readouterr().err
