"""Figures and tables show the numbers that they are given."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from robustdiff.evaluation.grid import Cell, Difference, Grid
from robustdiff.metrics.fid import FID
from robustdiff.metrics.metric import Number
from robustdiff.report.figures import (
    Line,
    _logarithmic_ticks,
    caption_grid,
    numbers_against_steps,
    points,
    sample_grid,
    save_figure,
    step_panels,
)
from robustdiff.report.tables import cell_table, grid_table


def cell(checkpoint: str, sampler: str, steps: int, fid: float) -> Cell:
    values = {"fid": fid, "kid": 0.1, "kid_se": 0.01, "precision": 0.5, "recall": 0.4, "brightness": 73.0}
    return Cell(checkpoint, sampler, steps, 100, values, {"fid": (fid - 1, fid + 1)}, {}, 1.0)


CELLS = [cell(c, s, k, f + k) for c, f in (("plain", 20.0), ("AT", 10.0)) for s in ("ddim", "iddpm") for k in (5, 10)]


def test_lines_have_the_fids_and_the_panels_the_samplers():
    figure = numbers_against_steps(CELLS, FID.numbers[0], "title")
    assert [axes.get_title() for axes in figure.axes] == ["ddim", "iddpm"]
    for axes in figure.axes:
        plain, at = axes.get_lines()
        assert plain.get_xdata().tolist() == [5, 10]
        assert plain.get_ydata().tolist() == [25.0, 30.0]
        assert at.get_ydata().tolist() == [15.0, 20.0]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["plain", "AT"]


def test_levels_are_dashed_lines_with_their_names():
    figure = step_panels({"a": {"plain": [Line([1, 2], [4, 3], [4, 3], [4, 3])]}}, {"teacher": 2.5})
    line, level = figure.axes[0].get_lines()
    assert set(level.get_ydata()) == {2.5}
    assert (line.get_linestyle(), level.get_linestyle()) == ("-", "--")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["plain", "teacher"]


def test_thin_lines_are_named_where_there_is_no_other():
    thin = Line([1, 2], [4, 3], [4, 3], [4, 3], thin=True)
    figure = step_panels({"a": {"seeds": [thin, thin], "mean": [replace(thin, thin=False), thin]}})
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["seeds", "mean"]
    assert [line.get_marker() for line in figure.axes[0].get_lines()] == ["None", "None", "None", "s"]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.9, 60, [1, 2, 5, 10, 20, 50]),
        (14, 31, [15, 20, 30]),
        (6.7, 10.7, [7, 8, 9, 10]),
        (12.7, 22.5, [14, 16, 18, 20, 22]),
        (9.2, 10.6, [9.2, 9.4]),
    ],
)
def test_a_logarithmic_axis_has_three_round_numbers_or_more(low, high, expected):
    assert _logarithmic_ticks(low, high)[: len(expected)] == pytest.approx(expected)
    assert len(_logarithmic_ticks(low, high)) >= 3


def test_points_keep_their_colour_in_every_panel():
    figure = points({"a": {"plain": [(1, 2)], "AT": [(3, 4), (5, 6)]}, "b": {"AT": [(7, 8)]}}, "x", "y")
    (plain, at), (alone,) = (axes.collections for axes in figure.axes)
    assert (plain.get_offsets().tolist(), at.get_offsets().tolist()) == ([[1, 2]], [[3, 4], [5, 6]])
    assert alone.get_offsets().tolist() == [[7, 8]]
    assert {axes.get_yscale() for axes in figure.axes} == {"log"}
    assert at.get_facecolor().tolist() == alone.get_facecolor().tolist() != plain.get_facecolor().tolist()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["plain", "AT"]


def test_labels_without_a_style_are_grey():
    figure = points({"a": {"AT": [(1, 2)], "others": [(3, 4)]}}, "x", "y", {"AT": ("#c2571a", "o")})
    at, others = (found.get_facecolor()[0] for found in figure.axes[0].collections)
    assert len({*others[:3]}) == 1
    assert len({*at[:3]}) == 3


def test_a_row_has_two_panels_so_that_its_text_can_be_read_on_a_page():
    line = {"plain": [Line([1, 2], [4, 3], [4, 3], [4, 3])]}
    for count, rows in (1, 1), (2, 1), (3, 2), (4, 2):
        figure = step_panels({str(i): line for i in range(count)})
        assert len(figure.axes) == count
        assert figure.axes[0].get_subplotspec().get_gridspec().get_geometry() == (rows, min(count, 2))
        assert figure.get_figwidth() == 7.2


def test_a_network_that_is_alone_with_its_sampler_is_a_level():
    teacher = [replace(cell("teacher", "euler", n, 3.0), steps=n) for n in (20, 50)]
    figure = numbers_against_steps([*CELLS, *teacher], FID.numbers[0], "title")
    assert [axes.get_title() for axes in figure.axes] == ["ddim", "iddpm"]
    assert [text.get_text() for text in figure.legends[0].get_texts()][2:] == ["teacher, euler 20", "teacher, euler 50"]
    assert [axes.get_title() for axes in numbers_against_steps(teacher, FID.numbers[0], "title").axes] == ["euler"]


def test_a_panel_has_the_steps_of_its_own_lines():
    cells = [cell(c, s, n, 9.0) for c in "ab" for s, counts in {"ddim": (5, 10), "lcm": (1, 4)}.items() for n in counts]
    axes = numbers_against_steps(cells, FID.numbers[0], "title").axes
    assert [[text.get_text() for text in panel.get_xticklabels()] for panel in axes] == [["5", "10"], ["1", "4"]]


def test_a_saved_figure_is_a_picture(tmp_path):
    samples = {(c, "ddim", 5): torch.zeros(16, 3, 8, 8, dtype=torch.uint8) for c in ("a", "b")}
    save_figure(sample_grid(samples, ["a", "b"], "ddim", [5], "title"), tmp_path / "f.png")
    with Image.open(tmp_path / "f.png") as image:
        assert min(image.size) > 100
        assert np.asarray(image.convert("L")).min() == 0
    assert [p.name for p in tmp_path.iterdir()] == ["f.png"]


@pytest.mark.parametrize(("low", "high", "style"), [(-8, -2, "32"), (2, 8, "31"), (-8, 2, "2")])
def test_the_table_shows_the_difference_and_whether_it_is_sure(low, high, style):
    # The interval of the ratio decides, and not that of the difference.
    ends = low * 0.04, high * 0.04
    difference = Difference("AT", "plain", "ddim", 5, "fid", (low + high) / 2, (-9, 9), (low + high) / 50, ends)
    grid = Grid([CELLS[0], CELLS[4]], [difference], {})
    console = Console(width=120, force_terminal=True, color_system="standard", record=True)
    with console.capture() as capture:
        console.print(grid_table(grid, "plain", FID.numbers[0]))
    text = capture.get()
    assert "25.00" in text
    assert "15.00" in text
    change = f"{(low + high) * 2:+.1f}% ({low * 4:+.1f}% … {high * 4:+.1f}%)".replace("-", "−")
    assert f"\x1b[{style}m{change}" in text


@pytest.mark.parametrize(("better", "code"), [("lower", "31"), ("higher", "32"), (None, "")])
def test_the_table_knows_which_values_are_better(better, code):
    """Show a rise, of a number that its metric describes and that is not compared by ratios."""
    cells = [
        Cell(c, "ddim", 5, 9, {"x": v}, {"x": (v - 1, v + 1)}, {}, 1.0) for c, v in (("plain", 20.0), ("AT", 25.0))
    ]
    grid = Grid(cells, [Difference("AT", "plain", "ddim", 5, "x", 5.0, (4.0, 6.0), 0.25)], {})
    console = Console(width=120, force_terminal=True, color_system="standard", record=True)
    with console.capture() as capture:
        console.print(grid_table(grid, "plain", Number("x", "X", ".3f", better)))
    text = capture.get()
    assert "25.000" in text
    assert (f"\x1b[{code}m+5 (+4.00 … +6.00)" if code else "+5 (+4.00 … +6.00)") in text
    assert ("green: better, red: worse" in text) == bool(code)


def test_a_number_that_is_not_positive_has_a_linear_axis():
    cells = [Cell("a", "ddim", n, 9, {"x": -float(n)}, {"x": (-n - 1, -n + 1)}, {}, 1.0) for n in (10, 5)]
    (axes,) = numbers_against_steps(cells, Number("x", "X", ".3f", "higher"), "title").axes
    assert axes.get_yscale() == "linear"
    assert axes.get_ylabel() == "X (higher is better)"
    assert axes.get_lines()[0].get_xydata().tolist() == [[5, -5], [10, -10]]


def test_the_table_of_cells_has_a_dash_for_what_is_not_known():
    values = {**CELLS[0].values, "kid": None, "kid_se": None, "recall": None}
    file = replace(CELLS[0], checkpoint="[a].npz", sampler="file", steps=None, values=values)
    file = replace(file, n=1234)
    console = Console(width=120)
    with console.capture() as capture:
        console.print(cell_table([CELLS[0], file]))
    rows = [line.split() for line in capture.get().splitlines()[2:] if line.strip()]
    fid = ["25.00", "(24.0", "…", "26.0)"]
    first = ["ddim", "5", *fid, "0.100", "±", "0.010", "0.500", "0.400", "73.0"]
    second = ["—", *fid, "—", "0.500", "—", "73.0"]
    assert rows == [["plain", "100", "images"], first, ["[a].npz", "1,234", "images"], second]


def test_the_table_of_the_default_metrics_fits_into_a_terminal():
    """Without the images of equal cells and without details, such as FID without its bias."""
    values = {"fid": 131.25, "fid_corrected": 1.0, "fid_mean_term": 1.0, "kid": -2.6, "kid_se": 2.5}
    values |= {"precision": 0.5, "recall": 0.4, "brightness": 173.0}
    cells = [
        Cell(name, "iddpm", 50, 64, values, {"fid": (99.9, 150.1)}, {}, 1.0) for name in ("fashion-16-at", "plain")
    ]
    console = Console(width=200)
    with console.capture() as capture:
        console.print(cell_table(cells))
    lines = capture.get().splitlines()
    assert max(len(line.rstrip()) for line in lines) <= 79
    assert lines[0].split() == ["FID", "KID", "precision", "recall", "brightness"]
    assert "131.25 (100 … 150)  −2.6 ± 2.5" in lines[3]


def test_the_table_of_changes_fits_into_a_terminal_for_any_number_of_networks():
    names = ["fashion-16", "fashion-16-at", "plain", "random"]
    cells = [Cell(name, "time-shift", 50, 9, {"fid": 131.25}, {}, {}, 1.0) for name in names]
    changes = [
        Difference(name, names[0], "time-shift", 50, "fid", 9.0, (1, 9), 1.2, (1.05, 1.45)) for name in names[1:]
    ]
    console = Console(width=200)
    with console.capture() as capture:
        console.print(grid_table(Grid(cells, changes, {}), names[0], FID.numbers[0]))
    lines = capture.get().splitlines()
    assert max(len(line.rstrip()) for line in lines) <= 79
    assert [line.split() for line in lines if "random" in line] == [
        ["random", "131.25", "+120.0%", "(+105.0%", "…", "+145.0%)"]
    ]


def test_images_without_steps_are_levels_of_the_figure():
    file = replace(CELLS[0], checkpoint="a.npz", sampler="file", steps=None)
    figure = numbers_against_steps([*CELLS, file], FID.numbers[0], "title")
    assert [axes.get_title() for axes in figure.axes] == ["ddim", "iddpm"]
    assert set(figure.axes[0].get_lines()[-1].get_ydata()) == {25.0}


def test_a_caption_has_a_row_and_a_model_at_a_number_of_steps_a_column():
    images = {
        (name, "lcm", n): torch.full((3, 3, 4, 4), 10 * n + i, dtype=torch.uint8)
        for i, name in enumerate(("one", "other"))
        for n in (1, 4)
    }
    figure = caption_grid(images, ["a red shoe", "b", "c"], ["one", "other"], "lcm", [1, 4], "title")
    panels = np.reshape(figure.axes, (3, 4))
    assert [panel.get_title() for panel in panels[0]] == [f"{n}\n{s} steps" for n in ("one", "other") for s in (1, 4)]
    assert [row[0].get_ylabel() for row in panels] == ["a red shoe", "b", "c"]
    assert [int(panel.images[0].get_array()[0, 0, 0]) for panel in panels[1]] == [10, 40, 11, 41]
