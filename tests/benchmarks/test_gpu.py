"""The benchmark of a GPU runs without one, and its JSON holds what it says; nothing is asserted of the times."""

import json
import sys

import numpy as np
import pytest


def test_it_writes_speeds_with_quartiles_and_settings(benchmark, tmp_path):
    out = benchmark("gpu.py", "--tiny", "--rounds", 1, "--batch-size", 2, "--out", tmp_path / "gpu.json")
    result = json.loads((tmp_path / "gpu.json").read_text())
    trained = {f"{name} bf16" for name in ("free", "none", "pgd", "bare")}
    trained |= {"free bf16, eager", "fashion-16 free, eager"}
    assert trained | {"sampling bf16", "fashion-16 free", "fashion-16 none"} <= set(result["images_per_second"])
    for name, speed in result["images_per_second"].items():
        low, high = speed["quartiles"]
        assert 0 < low <= speed["median"] <= high
        assert f"{name:24}{speed['median']:9.1f} images/s" in out
    assert set(result["ratios"]) == {"free_over_bare", "free_over_plain", "fashion-16_eager_over_free"}
    assert (result["settings"]["network"], result["settings"]["batch_size"]) == ("tiny", 2)
    assert result["settings"]["device"]


def test_loops_take_turns(benchmark):
    """Each loop is advanced as often as it says, in another order in each round, and the first round is not counted."""
    benchmark  # noqa: B018  (the fixture makes the module importable)
    from interleaved import quartiles, take_turns

    order: list[str] = []

    def loop(name):
        while True:
            yield order.append(name)

    times = take_turns({"a": loop("a"), "b": loop("b")}, {"a": 2, "b": 1}, rounds=3)
    assert order == ["a", "a", "b", "b", "a", "a"] * 2
    assert {name: values.shape for name, values in times.items()} == {"a": (3,), "b": (3,)}
    assert quartiles(np.arange(5.0)) == {"median": 2.0, "quartiles": [1.0, 3.0]}
    sys.modules.pop("interleaved")


@pytest.mark.parametrize("name", ["gpu.py", "adm_iteration.py", "training_overhead.py"])
def test_every_benchmark_of_speed_has_the_same_options(benchmark, name):
    with pytest.raises(SystemExit) as stop:
        benchmark(name, "--rounds", "many")
    assert stop.value.code == 2
