"""Figures and tables show the numbers that they are given."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from robustdiff.evaluation.grid import Cell, Difference, Grid
from robustdiff.report.figures import Line, fid_against_steps, fid_panels, points, sample_grid, save_figure
from robustdiff.report.tables import cell_table, grid_table


def cell(checkpoint: str, sampler: str, steps: int, fid: float) -> Cell:
    return Cell(checkpoint, sampler, steps, 100, fid, (fid - 1, fid + 1), 0.1, 0.01, 0.5, 0.4, 73.0, 1.0)


CELLS = [cell(c, s, k, f + k) for c, f in (("plain", 20.0), ("AT", 10.0)) for s in ("ddim", "iddpm") for k in (5, 10)]


def test_lines_have_the_fids_and_the_panels_the_samplers():
    figure = fid_against_steps(CELLS, "title")
    assert [axes.get_title() for axes in figure.axes] == ["ddim", "iddpm"]
    for axes in figure.axes:
        plain, at = axes.get_lines()
        assert plain.get_xdata().tolist() == [5, 10]
        assert plain.get_ydata().tolist() == [25.0, 30.0]
        assert at.get_ydata().tolist() == [15.0, 20.0]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["plain", "AT"]


def test_levels_are_dashed_lines_with_their_names():
    figure = fid_panels({"a": {"plain": [Line([1, 2], [4, 3], [4, 3], [4, 3])]}}, "title", {"teacher": 2.5})
    line, level = figure.axes[0].get_lines()
    assert set(level.get_ydata()) == {2.5}
    assert (line.get_linestyle(), level.get_linestyle()) == ("-", "--")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["plain", "teacher"]


def test_points_keep_their_colour_in_every_panel():
    figure = points({"a": {"plain": [(1, 2)], "AT": [(3, 4), (5, 6)]}, "b": {"AT": [(7, 8)]}}, "x", "y", "title")
    (plain, at), (nothing, alone) = (axes.collections for axes in figure.axes)
    assert (plain.get_offsets().tolist(), at.get_offsets().tolist()) == ([[1, 2]], [[3, 4], [5, 6]])
    assert (nothing.get_offsets().tolist(), alone.get_offsets().tolist()) == ([], [[7, 8]])
    assert at.get_facecolor().tolist() == alone.get_facecolor().tolist() != plain.get_facecolor().tolist()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["plain", "AT"]


def test_a_saved_figure_is_a_picture(tmp_path):
    samples = {(c, "ddim", 5): torch.zeros(16, 3, 8, 8, dtype=torch.uint8) for c in ("a", "b")}
    save_figure(sample_grid(samples, ["a", "b"], "ddim", [5], "title"), tmp_path / "f.png")
    with Image.open(tmp_path / "f.png") as image:
        assert min(image.size) > 100
        assert np.asarray(image.convert("L")).min() == 0
    assert [p.name for p in tmp_path.iterdir()] == ["f.png"]


@pytest.mark.parametrize(("low", "high", "style"), [(-8, -2, "32"), (2, 8, "31"), (-8, 2, "2")])
def test_the_table_shows_the_difference_and_whether_it_is_sure(low, high, style):
    difference = Difference("AT", "plain", "ddim", 5, (low + high) / 2, (low, high), (low + high) / 50)
    grid = Grid([CELLS[0], CELLS[4]], [difference], {})
    console = Console(width=120, force_terminal=True, color_system="standard", record=True)
    with console.capture() as capture:
        console.print(grid_table(grid, "plain"))
    text = capture.get()
    assert "25.00 ±1" in text
    assert "15.00 ±1" in text
    assert f"\x1b[{style}m{(low + high) / 50:+.0%} ({low * 4:+.0f}…{high * 4:+.0f})" in text


def test_the_table_of_cells_has_a_dash_for_what_is_not_known():
    file = replace(CELLS[0], checkpoint="[a].npz", sampler="file", steps=None, kid=None, kid_se=None, recall=None)
    console = Console(width=120)
    with console.capture() as capture:
        console.print(cell_table([CELLS[0], file]))
    rows = [line.split() for line in capture.get().splitlines() if "±" in line]
    first = ["plain", "ddim", "5", "100", "25.00", "±1", "0.1", "±0.01", "0.500", "0.400", "73.0"]
    assert rows == [first, ["[a].npz", "—", "—", "100", "25.00", "±1", "—", "0.500", "—", "73.0"]]


def test_images_without_steps_are_levels_of_the_figure():
    figure = fid_against_steps([*CELLS, replace(CELLS[0], checkpoint="a.npz", sampler="file", steps=None)], "title")
    assert [axes.get_title() for axes in figure.axes] == ["ddim", "iddpm"]
    assert set(figure.axes[0].get_lines()[-1].get_ydata()) == {25.0}
