"""Results show themselves in notebooks, with all text escaped."""

from __future__ import annotations

import numpy as np
import torch

from robustdiff.evaluation.grid import Cell, Difference, Grid
from robustdiff.mismatch.distances import Estimate
from robustdiff.mismatch.measure import Mismatch, Path
from robustdiff.notebook import html_image, html_table
from robustdiff.training.run_files import RunResult

HOSTILE = "<script>alert('1')</script>\x1b[31m\""
ESCAPED = "&lt;script&gt;alert(&#x27;1&#x27;)&lt;/script&gt;\\x1b[31m&quot;"


def test_text_is_escaped():
    text = html_table(HOSTILE, ["", HOSTILE], [[HOSTILE, HOSTILE]]) + html_image(np.zeros((2, 2, 3), np.uint8), HOSTILE)
    assert text.count(ESCAPED) == 6
    assert "<script" not in text
    assert "\x1b" not in text


def test_a_grid_shows_its_cells_its_differences_and_its_samples():
    numbers = {"fid": 2.0, "kid": 0.1, "kid_se": 0.01, "recall": None}
    cells = [Cell(name, "ddim", 5, 40, numbers, {"fid": (1.0, 3.0)}, {}, 1.0) for name in ("a", HOSTILE)]
    difference = Difference(HOSTILE, "a", "ddim", 5, "fid", 0.5, (0.125, 0.875), 0.25, (0.0625, 0.4375))
    images = torch.zeros(3, 1, 8, 8, dtype=torch.uint8)
    text = Grid(cells, [difference], {(HOSTILE, "ddim", 5): images})._repr_html_()
    row = '<th scope="row">a</th><td>ddim</td><td>5</td><td>40</td><td>2.00 (1.00 … 3.00)</td>'
    assert row in text
    assert row in cells[0]._repr_html_()
    assert "0.100 ± 0.010" in text
    assert "<td>FID</td><td>+25.0% (+6.2% … +43.8%)</td>" in text
    assert text.count("data:image/png;base64,") == 1
    assert "<script" not in text


def test_the_result_of_a_training_shows_the_best_checkpoint_and_the_signs():
    cell = {"sampler": "ddim", "steps": 5, "metric": "fid", "value": 6.5, "ci": [6.0, 7.0], "difference": -1.5}
    best = {"step": 40, "start": False, "cells": [cell]}
    sign = {"step": 20, "name": "long-sampling", "message": HOSTILE, "action": "warn"}
    result = RunResult({"steps": 60, "loss": 0.25, "best": best, "signs": [sign]})
    text = result._repr_html_()
    assert '<th scope="row">loss</th><td>0.25</td>' in text
    assert "best checkpoint: update 40, on fresh noise" in text
    assert "<td>6.5</td><td>[6.0, 7.0]</td><td>-1.5</td>" in text
    assert ESCAPED in text
    assert result == {"steps": 60, "loss": 0.25, "best": best, "signs": [sign]}, "it is the dictionary of the file"
    assert "best checkpoint" not in RunResult({"steps": 60})._repr_html_()


def test_a_mismatch_shows_its_means():
    path = Path("free", "ddim", 5, 40, 40, [], {"delta": Estimate(0.5, 0.25, 0.75, 0.125)}, {})
    text = Mismatch("digits", 0, [path], [], [])._repr_html_()
    assert "<td>0.5</td><td>0.25 … 0.75</td><td>0.125</td>" in text
