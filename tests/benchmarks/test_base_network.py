"""The comparison of networks runs, and its JSON holds what it says; nothing is asserted of the times."""

import json
import runpy
from pathlib import Path

ROOT = Path(__file__).parents[2]
BENCHMARK = ROOT / "benchmarks" / "base_network.py"


def test_it_writes_the_fid_of_each_network_with_its_interval_and_the_settings(benchmark, tmp_path):
    options = ["--tiny", "--minutes", 0.001, "--num", 20]
    out = benchmark(BENCHMARK.name, *options, "--out", tmp_path / "r.json", "--document", tmp_path / "page.md")
    result = json.loads((tmp_path / "r.json").read_text())
    assert set(result["networks"]) == {"unet", "unet-patch2", "dit-patch2"}
    for row in result["networks"].values():
        assert row["fid_ci"][0] <= row["fid"] <= row["fid_ci"][1]
        assert row["updates"] > 0
        assert f"FID {row['fid']:.2f}" in out
        assert f"| {row['fid']:.2f} (" in (tmp_path / "page.md").read_text(encoding="utf-8")
    assert result["settings"]["images"] == 20


def test_the_page_is_that_of_the_committed_result():
    document = runpy.run_path(str(BENCHMARK))["document"]
    record = json.loads((ROOT / "benchmarks" / "results" / "base_network.json").read_text(encoding="utf-8"))
    assert document(record) == (ROOT / "docs" / "base-network.md").read_text(encoding="utf-8")
