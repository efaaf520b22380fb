"""Tables and figures of the mismatch show the numbers that they are given."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from robustdiff.mismatch.distances import Estimate
from robustdiff.mismatch.measure import MEASURES, Difference, Mismatch, Path, Step
from robustdiff.mismatch.robustness import Robustness
from robustdiff.report.figures import save_figure
from robustdiff.report.mismatch import mismatch_figure, mismatch_table, robustness_figure, robustness_table


def path(checkpoint: str, sampler: str, base: float) -> Path:
    steps = []
    for i in range(3):
        estimates = {
            m: Estimate(base + i, base + i - 0.25, base + i + 0.25, None if m in ("x0_std", "noise") else 0.125)
            for m in MEASURES
        }
        steps.append(Step(900.0 - 300 * i, 0.5, 0.5, 1.0, 1.0, 0.1, 1.0, 1.0, 4.0, 4.0, estimates))
    return Path(checkpoint, sampler, 3, 100, 100, steps, steps[1].estimates, steps[2].estimates)


def robust(checkpoint: str, index: int, loss: float) -> Robustness:
    return Robustness(
        checkpoint, index, 0.5, 8, loss, 0.01, [0.1, 1.0], [2 * loss, 3 * loss], [0.01, 0.02], 1.5, 0.1, 2.5
    )


PATHS = [path(c, s, b) for s in ("ddim", "iddpm") for c, b in (("plain", 10.0), ("AT", 7.0))]
DIFFERENCES = [
    Difference("AT", "plain", s, 3, m, -3.0, *ends)
    for s, ends in (("ddim", (-4.0, -2.0)), ("iddpm", (2.0, 4.0)))
    for m in MEASURES
]
ROBUST = [robust(c, i, b) for i in (100, 500) for c, b in (("plain", 0.2), ("AT", 0.1))]
MISMATCH = Mismatch("digits", 0, PATHS, DIFFERENCES, ROBUST)


def printed(table, **settings) -> str:
    console = Console(width=200, force_terminal=True, color_system="standard", **settings)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_the_table_has_means_floors_and_judges_what_has_a_better_side():
    lines = printed(mismatch_table(MISMATCH)).splitlines()
    rows = {m: [line for line in lines if meaning in line] for m, meaning in MEASURES.items()}
    for m, (ddim, iddpm) in rows.items():
        for line in (ddim, iddpm):
            assert "11 (10.8 … 11.2)" in line
            assert "8 (7.75 … 8.25)" in line
        assert ("0.12" in ddim) == (m not in ("x0_std", "noise"))
        assert ("\x1b[32m8 (7.75 … 8.25)" in ddim) == (m not in ("x0_std", "noise"))
        assert ("\x1b[31m8 (7.75 … 8.25)" in iddpm) == (m not in ("x0_std", "noise"))


def test_one_checkpoint_needs_no_caption():
    assert "green" not in printed(mismatch_table(Mismatch("digits", 0, PATHS[:1], [], [])))


def test_the_robustness_table_has_a_row_for_each_time_and_checkpoint():
    text = printed(robustness_table(MISMATCH))
    assert "‖δ‖ ≤ 0.1" in text
    plain = next(line for line in text.splitlines() if "plain" in line)
    for number in ("100", "0.50", "0.200 ± 0.010", "0.400 ± 0.010", "0.600 ± 0.020", "1.50 ± 0.10", "2.5"):
        assert number in plain
    assert sum("AT" in line for line in text.splitlines()) == 2


def test_the_figure_has_a_line_for_each_checkpoint_and_the_floor():
    figure = mismatch_figure(MISMATCH, "title")
    assert len(figure.axes) == 2 * len(MEASURES)
    assert [axes.get_title() for axes in figure.axes[:2]] == ["ddim, 3 steps", "iddpm, 3 steps"]
    for axes in figure.axes:
        lines = {line.get_label(): line for line in axes.get_lines()}
        assert lines["plain"].get_xdata() == pytest.approx([900, 600, 300])
        assert lines["plain"].get_ydata() == pytest.approx([10, 11, 12])
        assert lines["AT"].get_ydata() == pytest.approx([7, 8, 9])
        assert set(lines["floor"].get_ydata()) <= {0.0, 0.125}
        assert axes.xaxis_inverted()


def test_the_robustness_figure_has_a_panel_for_each_radius_and_the_constant():
    figure = robustness_figure(MISMATCH, "title")
    values = [axes.get_lines()[0].get_ydata().tolist() for axes in figure.axes]
    assert values == [pytest.approx([0.2, 0.2]), pytest.approx([0.4, 0.4]), pytest.approx([0.6, 0.6]), [1.5, 1.5]]


def test_figures_are_pictures(tmp_path):
    save_figure(mismatch_figure(MISMATCH, "title"), tmp_path / "m.png")
    save_figure(robustness_figure(MISMATCH, "title"), tmp_path / "r.png")
    for name in ("m.png", "r.png"):
        with Image.open(tmp_path / name) as image:
            assert min(image.size) > 300
            assert np.asarray(image.convert("L")).min() < 100
