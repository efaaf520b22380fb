"""The ADM benchmark runs, and its JSON holds what it says; nothing is asserted of the times."""

import json


def test_it_writes_the_ratio_with_quartiles_and_settings(benchmark, tmp_path):
    out = benchmark("adm_iteration.py", "--rounds", 2, "--batch-size", 1, "--out", tmp_path / "r.json")
    result = json.loads((tmp_path / "r.json").read_text())
    ratio = result["ratios"]["free_over_bare_images_per_second"]
    assert 0 < ratio["quartiles"][0] <= ratio["median"] <= ratio["quartiles"][1]
    assert f"{ratio['median']:.3f}" in out
    assert result["settings"]["K"] == 3
    assert set(result["images_per_second"]) == {"bare", "free"}
