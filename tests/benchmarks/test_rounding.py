"""Test what bf16 leaves of δ: the shares against numbers by hand, and the table in the documentation."""

import itertools
import json
import runpy
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
BENCHMARK = ROOT / "benchmarks" / "rounding.py"


@pytest.fixture
def rounding(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARK.parent)
    return runpy.run_path(str(BENCHMARK))


def test_a_share_is_a_ratio_of_means_and_its_interval_that_of_the_delta_method(rounding):
    generator = torch.Generator().manual_seed(0)
    exact = torch.rand(2000, generator=generator, dtype=torch.float64) + 1
    seen = 0.8 * exact + 0.1 * torch.randn(2000, generator=generator, dtype=torch.float64)
    found = rounding["share"](seen, exact)
    draws = torch.randint(2000, (1000, 2000), generator=generator)
    bootstrap = (seen[draws].mean(1) / exact[draws].mean(1)).std().item()
    low, high = found["interval"]
    assert found["share"] == pytest.approx((seen.sum() / exact.sum()).item())
    assert (high - low) / (2 * 1.96) == pytest.approx(bootstrap, rel=0.1)
    assert low < 0.8 < high


def test_rises_are_those_of_a_loss_known_by_hand(rounding):
    """For L(δ) = ½‖x + δ‖² with x = (3, 4), two ascents of 0.5 give ½(6² − 5²)."""
    x = torch.tensor([[3.0, 4.0]])
    rises = rounding["rises"](lambda delta: {"loss": (x + delta).square().sum(1) / 2}, x, 0.5, 1.0)
    assert rises[:3, 0].tolist() == pytest.approx([5.5] * 3, rel=1e-5)
    assert rises[3, 0].item() == pytest.approx(1, abs=1e-3)


def test_networks_of_both_kinds_see_and_find_the_rise_in_bf16(rounding):
    images = torch.rand(4, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    cases = list(itertools.islice(rounding["cases"](images), 8))
    assert [name for name, _ in cases[:3]] == [
        "`fashion-16`, α = 0.3",
        "`fashion-16`, α = 0.03",
        "consistency, σ = 0.002",
    ]
    for _, case in (cases[0], cases[7]):
        exact, seen, found, _ = rounding["rises"](*case).mean(1).tolist()
        assert exact > 0
        assert seen == pytest.approx(exact, rel=0.1)
        assert found == pytest.approx(exact, rel=0.1)


def test_the_documentation_has_the_committed_numbers(rounding):
    result = json.loads((ROOT / "benchmarks" / "results" / "rounding.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    _, _, rest = page.partition("<!-- rounding -->\n")
    assert rest.partition("<!-- /rounding -->")[0].splitlines() == rounding["shown"](result).splitlines()
    assert all(
        0.97 < case[share]["share"] < 1.06
        for case in list(result["cases"].values())[:-1]
        for share in ("seen", "found")
    )
