"""The ADM benchmark runs, and its JSON holds what it says; nothing is asserted of the times."""

import json
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "adm_iteration.py"


def test_it_writes_the_ratio_with_quartiles_and_settings(tmp_path):
    command = [sys.executable, str(BENCHMARK), "--rounds", "2", "--batch-size", "2", "--out", str(tmp_path / "r.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "r.json").read_text())
    ratio = result["ratios"]["free_over_bare_images_per_second"]
    assert 0 < ratio["quartiles"][0] <= ratio["median"] <= ratio["quartiles"][1]
    assert f"{ratio['median']:.3f}" in done.stdout
    assert result["settings"]["K"] == 3
    assert set(result["images_per_second"]) == {"bare", "free"}
