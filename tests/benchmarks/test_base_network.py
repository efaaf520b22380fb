"""The comparison of networks runs, and its JSON holds what it says; nothing is asserted of the times."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BENCHMARK = ROOT / "benchmarks" / "base_network.py"


def test_it_writes_the_fid_of_each_network_with_its_interval_and_the_settings(tmp_path):
    command = [sys.executable, str(BENCHMARK), "--tiny", "--minutes", "0.02", "--num", "128"]
    command += ["--out", str(tmp_path / "r.json"), "--document", str(tmp_path / "page.md")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "r.json").read_text())
    assert set(result["networks"]) == {"unet", "unet-patch2", "dit-patch2"}
    for row in result["networks"].values():
        assert row["fid_ci"][0] <= row["fid"] <= row["fid_ci"][1]
        assert row["updates"] > 0
        assert f"FID {row['fid']:.2f}" in done.stdout
        assert f"| {row['fid']:.2f} (" in (tmp_path / "page.md").read_text(encoding="utf-8")
    assert result["settings"]["images"] == 128


def test_the_page_is_that_of_the_committed_result():
    document = runpy.run_path(str(BENCHMARK))["document"]
    record = json.loads((ROOT / "benchmarks" / "results" / "base_network.json").read_text(encoding="utf-8"))
    assert document(record) == (ROOT / "docs" / "base-network.md").read_text(encoding="utf-8")
