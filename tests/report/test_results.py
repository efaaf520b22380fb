"""A grid as files."""

from __future__ import annotations

import json
from dataclasses import asdict

import torch

from robustdiff.evaluation.grid import Cell, Difference, Grid
from robustdiff.report.results import write_results


def cell(name, sampler, steps):
    return Cell(name, sampler, steps, 40, 2.0, (1.0, 3.0), 0.1, 0.01, 0.5, 0.4, 73.0, 1.0)


def test_a_grid_becomes_figures_and_a_record(tmp_path):
    cells = [cell(name, sampler, n) for sampler in ("ddim", "dpm++") for n in (5, 10) for name in ("a", "b")]
    samples = {(c.checkpoint, c.sampler, c.steps): torch.zeros(8, 1, 4, 4, dtype=torch.uint8) for c in cells}
    difference = Difference("b", "a", "ddim", 5, 0.5, (0.1, 0.9), 0.25)
    beside = [cell("teacher", "multistep", 2)]
    folder = tmp_path / "new"
    record = write_results(folder, Grid(cells, [difference], samples), "title", {"seed": 3}, beside)
    names = ["fid.png", "result.json", "samples-ddim.png", "samples-dpmpp.png"]
    assert sorted(path.name for path in folder.iterdir()) == names
    written = json.loads((folder / "result.json").read_text())
    assert written == json.loads(json.dumps(record))
    assert written["seed"] == 3
    assert [c["fid"] for c in written["cells"]] == [2.0] * 8, "what is beside is no cell of the grid"
    assert written["differences"] == [json.loads(json.dumps(asdict(difference)))]
