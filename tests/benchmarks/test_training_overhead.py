"""The overhead benchmark runs, and its JSON holds what it says; nothing is asserted of the times."""

import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
RATIOS = ["free_over_plain", "trainer_over_bare", "pgd_over_free"]


def test_it_writes_ratios_with_quartiles_and_settings(benchmark, tmp_path):
    path = tmp_path / "results" / "overhead.json"
    out = benchmark("training_overhead.py", "--tiny", "--rounds", 3, "--batch-size", 4, "--out", path)
    result = json.loads(path.read_text())
    assert list(result["ratios"]) == RATIOS
    for name, ratio in result["ratios"].items():
        low, high = ratio["quartiles"]
        assert 0 < low <= ratio["median"] <= high
        assert f"{name:20}{ratio['median']:.3f}" in out
    assert set(result["seconds_per_update"]) == {"bare", "plain", "free", "pgd"}
    settings = result["settings"]
    assert (settings["rounds"], settings["batch_size"], settings["threads"], settings["K"]) == (3, 4, 1, 3)
    assert settings["torch"]


def test_the_published_numbers_are_of_the_base_network():
    path = BENCHMARKS / "results" / "training_overhead.json"
    if not path.exists():
        pytest.skip("not measured yet")
    result = json.loads(path.read_text())
    assert list(result["ratios"]) == RATIOS
    assert result["settings"]["model"] == {"channels": [16, 48, 96], "layers": 1, "groups": 8}
    assert result["settings"]["batch_size"] == 128
