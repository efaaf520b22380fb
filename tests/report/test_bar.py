"""The bar on a terminal and elsewhere."""

from __future__ import annotations

import io
import re
import sys
import types

import pytest
from rich.console import Console

from robustdiff.progress import Progress
from robustdiff.report import bar
from robustdiff.report.bar import Bar


def work(progress: Progress) -> None:
    progress.begin("work", 10)
    progress.advance(4, "note")
    progress.advance(2)
    progress.begin("more", 5)
    progress.advance(1)


def test_a_bar_without_a_terminal_prints_lines(monkeypatch):
    monkeypatch.setattr(bar, "_LINE_EVERY", -1.0)
    console = Console(force_terminal=False, width=80, record=True)
    with console.capture() as capture, Bar(console) as shown:
        work(shown)
    lines = [line.split(" in ")[0] + line.split(" s")[1].replace("  ", " ") for line in capture.get().splitlines()]
    assert lines == ["work: 4 of 10 note", "work: 6 of 10", "more: 1 of 5"]


def test_large_numbers_have_separators_and_lines_do_not_end_in_blanks(monkeypatch):
    monkeypatch.setattr(bar, "_LINE_EVERY", -1.0)
    console = Console(force_terminal=False, width=80)
    with console.capture() as capture, Bar(console) as shown:
        shown.begin("work", 12_345_678)
        shown.advance(1_234_567)
    assert capture.get() == "work: 1,234,567 of 12,345,678 in 0 s\n"


def test_a_long_note_is_shortened_and_not_the_numbers():
    console = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=80, legacy_windows=False)
    with Bar(console) as shown:
        shown.begin("network evaluations", 57_600)
        shown.advance(28_800, "a-long-name-of-a-run/best, guidance 7.5 · dpm++ 10")
    last = re.sub(r"\x1b\[[0-9?]*[A-Za-z]", "", console.file.getvalue()).replace("\r", "\n").split("\n")[-2]
    assert " 28,800/57,600 a-long" in last
    assert "…" in last
    assert re.search(r"0:00:0\d eta \S+\s*$", last)
    assert len(last) <= 80


@pytest.mark.parametrize("terminal", [True, False])
def test_a_quiet_bar_prints_nothing(monkeypatch, terminal):
    monkeypatch.setattr(bar, "_LINE_EVERY", -1.0)
    console = Console(file=io.StringIO(), force_terminal=terminal, width=80)
    with Bar(console, quiet=True) as shown:
        work(shown)
    assert console.file.getvalue().strip() == ""


def test_a_bar_in_a_notebook_is_one_element_that_changes(monkeypatch):
    drawn: list[str] = []

    class Handle:
        def update(self, shown: Bar) -> None:
            drawn.append(shown._repr_html_())

    def display(shown: Bar, display_id: bool) -> Handle:
        drawn.append(shown._repr_html_())
        return Handle()

    module = types.ModuleType("IPython.display")
    module.display = display  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    monkeypatch.setattr(bar, "_DRAW_EVERY", -1.0)
    console = Console(file=io.StringIO(), force_jupyter=True)
    with Bar(console) as shown:
        shown.begin("<work>", 10)
        shown.advance(4, "loss 0.5 & more")
    assert console.file.getvalue() == ""
    assert len(drawn) == 3, "at first, once, and at the end"
    assert drawn[-1].startswith('<progress value="4" max="10" aria-label="progress"></progress> &lt;work&gt;: 4 of 10')
    assert "loss 0.5 &amp; more" in drawn[-1]
