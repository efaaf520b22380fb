"""The benchmark of a CPU runs, and its JSON holds what it says; nothing is asserted of the times."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[2]
BENCHMARK = ROOT / "benchmarks" / "cpu.py"
RESULT = ROOT / "benchmarks" / "results" / "cpu.json"


def test_it_writes_the_speed_of_each_precision_and_format_with_the_processor(benchmark, tmp_path):
    out = benchmark("cpu.py", "--rounds", 2, "--batch-size", 4, "--out", tmp_path / "r.json")
    result = json.loads((tmp_path / "r.json").read_text())
    assert set(result["networks"]) == {"fashion-16", "adm"}
    for kinds in result["networks"].values():
        assert set(kinds) == {
            f"{precision}, {layout}" for precision in ("fp32", "bf16") for layout in ("contiguous", "channels-last")
        }
        assert kinds["fp32, contiguous"]["speed"]["median"] == 1
        for row in kinds.values():
            assert 0 < row["speed"]["quartiles"][0] <= row["speed"]["median"] <= row["speed"]["quartiles"][1]
            assert f"{row['images_per_second']:.0f} images/s" in out
    settings = result["settings"]
    assert settings["processor"] in out
    assert settings["batch_size"] == {"fashion-16": 4, "adm": 1}
    assert settings["auto"] in ("fp32", "bf16")


def test_the_defaults_for_a_cpu_are_what_the_committed_result_found_fastest():
    """precision=auto is bf16 where the processor has instructions for it, and channels_last is off."""
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    settings, networks = result["settings"], result["networks"]
    assert (settings["auto"], settings["instructions_for_bf16"]) == ("bf16", ["avx512_bf16", "amx_bf16"])
    for kinds in networks.values():
        medians = {kind: row["speed"]["median"] for kind, row in kinds.items()}
        assert medians["bf16, contiguous"] > medians["bf16, channels-last"]
        assert max(medians, key=medians.get).endswith("contiguous")
    speeds = networks["fashion-16"]
    assert speeds["bf16, contiguous"]["speed"]["quartiles"][0] > speeds["fp32, contiguous"]["speed"]["quartiles"][1]
