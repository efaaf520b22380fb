"""The benchmark of kernels runs without a GPU, as far as it can, and says what needs one."""

import json

import pytest


def test_it_measures_what_needs_no_gpu(benchmark, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    out = benchmark("gpu_kernels.py", "--tiny", "--rounds", 1, "--batch-size", 2, "--out", tmp_path / "kernels.json")
    variants = json.loads((tmp_path / "kernels.json").read_text())["variants"]
    for name in ("eager channels-last", "eager contiguous"):
        assert variants[name]["training"]["median"] > 0
        assert variants[name]["forward"]["median"] > 0
        for error in variants[name]["errors"].values():
            assert 0 < error["relative"] < 0.1
            assert error["norm_ratio"] == pytest.approx(1, abs=0.1)
    assert variants["fused norms"] == {"error": "needs a GPU"}
    assert "fused norms" in out


def test_tiles_need_a_gpu(benchmark, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        benchmark("gpu_kernels.py", "--tiles", 5)
    assert stop.value.code == 2
