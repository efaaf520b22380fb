"""Figures: numbers against steps, and samples from common noise side by side.

This is the only module that imports matplotlib. On import, matplotlib reads a file ``matplotlibrc`` in the working
folder, which may come from somebody else and whose settings can start programs (LaTeX). Therefore it is imported from
another folder here, and figures are drawn under its default settings.
"""

from __future__ import annotations

import contextlib
import itertools
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from robustdiff.data.pixels import tile
from robustdiff.errors import printable
from robustdiff.evaluation.grid import Cell
from robustdiff.files import atomic_write
from robustdiff.metrics.fid import FID
from robustdiff.metrics.metric import Number

with contextlib.chdir(Path(__file__).parent):
    import matplotlib
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

__all__ = [
    "COLOURS",
    "MARKERS",
    "REFERENCE",
    "ROLES",
    "Axes",
    "Figure",
    "Line",
    "bare",
    "caption_grid",
    "default_settings",
    "label",
    "matplotlib",
    "numbers_against_steps",
    "points",
    "sample_grid",
    "samples_name",
    "save_figure",
    "step_panels",
]

COLOURS = matplotlib.colormaps["tab10"].colors  # type: ignore[attr-defined]
MARKERS = "os^vP*Xd"
ROLES = {
    "plain": ("#1f5f9e", "#6aa3d8", "#0b2f52", "#a9cbea"),
    "passes": ("#2e8b57", "#86c79f", "#14532d", "#b9e0c8"),
    "adversarial": ("#c2571a", "#f0a060", "#7a2e05", "#f6c79f"),
    "random": ("#7b4fa3", "#b79ad1", "#4a2370", "#d8c8e8"),
}
"""The shades of what methods do (:func:`robustdiff.study.analysis.roles`), so that they look alike on all pages."""
REFERENCE = ("black", "D")
"""The colour and marker of a network that is measured as it is."""
GREY = ("0.7", "o")


@contextlib.contextmanager
def default_settings() -> Iterator[None]:
    """Use matplotlib's default settings within a block, or as a decorator within a function."""
    defaults = matplotlib.rcParamsDefault
    # The backend is not used, and reading its setting would select one.
    with matplotlib.rc_context({name: defaults[name] for name in defaults if not name.startswith("backend")}):
        yield


def label(name: str) -> str:
    """Return a name from a file for a figure, escaped so that it is no formula and appears in legends."""
    shown = printable(name)
    shown = shown if len(shown) <= 200 else shown[:199] + "…"
    # Matplotlib leaves names that begin with _ out of legends.
    return (" " if shown.startswith("_") else "") + shown.replace("$", r"\$")


def samples_name(sampler: str) -> str:
    """Return the name of the figure of a sampler's images, without an extension."""
    return f"samples-{sampler.replace('+', 'p')}"


@default_settings()
def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG file atomically. A character that matplotlib's font does not have is drawn as a box."""
    FigureCanvasAgg(figure)
    with atomic_write(path) as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(file, format="png", dpi=150, bbox_inches="tight")


@dataclass(frozen=True)
class Line:
    """Hold a line of points (x, y) with a band from ``low`` to ``high``; thin, if it is one of those of a mean."""

    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    thin: bool = field(default=False, kw_only=True)


def _panels(count: int, labels: int, *, sharey: bool = False) -> tuple[Figure, list[Axes]]:
    """Return a figure with panels, two in a row so that it can be read on a page, and room for a legend below."""
    rows, columns = -(-count // 2), min(count, 2)
    figure = Figure(figsize=(7.2, 2.9 * rows + 0.4 + 0.2 * -(-labels // 3)), layout="constrained")
    axes = list(figure.subplots(rows, columns, sharey=sharey, squeeze=False).flat)
    for unused in axes[count:]:
        unused.remove()
    return figure, axes[:count]


def _finish(figure: Figure, axes: Sequence[Axes], xlabel: str, ylabel: str) -> None:
    """Add the labels of the outer axes, and the legend of all panels."""
    handles: dict[str, Artist] = {}
    for i, panel in enumerate(axes):
        panel.grid(alpha=0.3)
        if i + 2 >= len(axes):
            panel.set_xlabel(xlabel)
        if i % 2 == 0:
            panel.set_ylabel(ylabel)
        for handle, name in zip(*panel.get_legend_handles_labels(), strict=True):
            handles.setdefault(name, handle)
    figure.legend([*handles.values()], [*handles], loc="outside lower center", ncols=3, frameon=False, fontsize="small")


def _style(styles: Mapping[str, tuple[str, str]], name: str, i: int) -> tuple[Any, str]:
    """Return the colour and marker of a label: its own, or those of its place if no label has one."""
    if styles:
        return styles.get(name, GREY)
    return COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]


@default_settings()
def step_panels(
    panels: dict[str, dict[str, list[Line]]],
    levels: Mapping[str, float] = {},
    number: Number = FID.numbers[0],
    xlabel: str = "steps (network evaluations)",
    *,
    title: str = "",
    styles: Mapping[str, tuple[str, str]] = {},
) -> Figure:
    """Draw a number against steps, or others, on a logarithmic axis, as lines by title of the panel and by label.

    Lines with the same label have the same colour and marker, from ``styles`` if there are any. Levels are dashed
    horizontal lines.
    """
    labels = list(dict.fromkeys(name for groups in panels.values() for name in groups))
    figure, axes = _panels(len(panels), len(labels) + len(levels), sharey=True)
    for panel, (heading, groups) in zip(axes, panels.items(), strict=True):
        for name, lines in groups.items():
            colour, marker = _style(styles, name, labels.index(name))
            # Thin lines are drawn first, and named in the legend only if there is nothing else.
            ordered = sorted(lines, key=lambda line: not line.thin)
            named = next((j for j, line in enumerate(ordered) if not line.thin), 0)
            for j, line in enumerate(ordered):
                style = {"linewidth": 0.8, "alpha": 0.35} if line.thin else {"marker": marker, "markersize": 5}
                panel.plot(line.x, line.y, color=colour, label=label(name) if j == named else None, **style)
                edges = np.array([line.low, line.high])
                edges = np.maximum(edges, 1e-3) if number.log else edges
                panel.fill_between(line.x, *edges, color=colour, alpha=0.15, linewidth=0)
        for (name, level), grey in zip(levels.items(), np.linspace(0.2, 0.6, len(levels)), strict=True):
            panel.axhline(level, color=str(grey), linestyle="--", linewidth=1, label=label(name))
        panel.set_title(label(heading), fontsize="medium")
        panel.set_xscale("log")
        if number.log:
            panel.set_yscale("log")
        steps = sorted({x for lines in groups.values() for line in lines for x in line.x})
        panel.set_xticks(steps, [f"{s:,g}" for s in steps])
        panel.minorticks_off()
    _finish(figure, axes, xlabel, number.title + (f" ({number.better} is better)" if number.better else ""))
    if number.log:
        _set_logarithmic_ticks(axes[0])
    if title:
        figure.suptitle(label(title), fontsize=10)
    return figure


def _set_logarithmic_ticks(panel: Axes) -> None:
    """Set round ticks of a logarithmic vertical axis, and none between them."""
    ticks = _logarithmic_ticks(*panel.get_ylim())
    panel.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    panel.minorticks_off()


def _logarithmic_ticks(low: float, high: float) -> list[float]:
    """Return round numbers between two ends, of the coarsest spacing that has three of them."""
    finer = [np.arange(10, 100, step) / 10 for step in (10, 2, 1)]
    for multiples in ((1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8), *finer):
        ticks = [float(m * 10.0**e) for e in range(-3, 5) for m in multiples if low <= m * 10.0**e <= high]
        if len(ticks) >= 3:
            break
    return ticks


@default_settings()
def numbers_against_steps(cells: Sequence[Cell], number: Number, title: str) -> Figure:
    """Draw a number with one panel for each sampler and one line for each checkpoint. Cells without steps are levels.

    Cells with steps must have an interval of the number.
    """
    points: dict[tuple[str, str], list[tuple[float, ...]]] = {}
    levels: dict[str, float] = {}
    for cell in cells:
        value = cell.values.get(number.name)
        if value is not None and cell.steps is None:
            levels[cell.checkpoint] = value
        elif value is not None and cell.steps is not None:
            point = (cell.steps, value, *cell.intervals[number.name])
            points.setdefault((cell.sampler, cell.checkpoint), []).append(point)
    samplers = {sampler: [c for s, c in points if s == sampler] for sampler, _ in points}
    compared = set(itertools.chain(*(own for own in samplers.values() if len(own) > 1)))
    for sampler, (checkpoint, *others) in samplers.items():
        if compared and not others and checkpoint not in compared:  # a panel of its own would be nearly empty
            found = sorted(points.pop((sampler, checkpoint)))
            levels |= {f"{checkpoint}, {sampler} {steps}": value for steps, value, *_ in found}
    panels = {
        sampler: {
            checkpoint: [Line(*np.transpose(sorted(found)).tolist())]
            for (own, checkpoint), found in points.items()
            if own == sampler
        }
        for sampler in dict.fromkeys(sampler for sampler, _ in points)
    }
    return step_panels(panels, levels, number, title=title)


@default_settings()
def points(
    panels: dict[str, dict[str, list[tuple[float, float]]]],
    xlabel: str,
    ylabel: str,
    styles: Mapping[str, tuple[str, str]] = {},
) -> Figure:
    """Draw points (x, y) by title of the panel and by label, on a logarithmic y axis. Panels have axes of their own.

    With styles, the colour and marker by label, other labels are grey.
    """
    labels = list(dict.fromkeys(name for found in panels.values() for name in found))
    figure, axes = _panels(len(panels), len(labels))
    for panel, (heading, found) in zip(axes, panels.items(), strict=True):
        for name, own in found.items():
            colour, marker = _style(styles, name, labels.index(name))
            order = 1 + (name in styles)  # what is grey is behind
            x, y = np.reshape(own, (-1, 2)).T
            panel.scatter(x, y, label=label(name), s=25, color=colour, marker=marker, zorder=order)
        panel.set_title(label(heading), fontsize="medium")
        panel.set_yscale("log")
        _set_logarithmic_ticks(panel)
    _finish(figure, axes, xlabel, ylabel)
    return figure


def bare(panel: Axes) -> None:
    """Remove the ticks and the box of a panel that shows images."""
    panel.set(xticks=[], yticks=[])
    panel.spines[:].set_visible(False)


@default_settings()
def sample_grid(
    samples: dict[tuple[str, str, int], Tensor],
    checkpoints: Sequence[str],
    sampler: str,
    steps: Sequence[int],
    title: str,
) -> Figure:
    """Draw samples, a column for each checkpoint and a row for each number of steps, from the same noise in all."""
    figure = Figure(figsize=(2.8 * len(checkpoints) + 0.6, 0.95 * len(steps) + 0.6), layout="constrained")
    panels = figure.subplots(len(steps), len(checkpoints), squeeze=False)
    for row, count in zip(panels, steps, strict=True):
        for panel, checkpoint in zip(row, checkpoints, strict=True):
            images = tile(samples[checkpoint, sampler, count], columns=8, scale=4)
            panel.imshow(images.squeeze(-1) if images.shape[-1] == 1 else images, cmap="gray", vmin=0, vmax=255)
            bare(panel)
        row[0].set_ylabel(f"{count} steps", fontsize=9)
    for panel, checkpoint in zip(panels[0], checkpoints, strict=True):
        panel.set_title(label(checkpoint), fontsize=10)
    figure.suptitle(label(title), fontsize=10)
    return figure


@default_settings()
def caption_grid(
    samples: dict[tuple[str, str, int], Tensor],
    captions: Sequence[str],
    checkpoints: Sequence[str],
    sampler: str,
    steps: Sequence[int],
    title: str,
) -> Figure:
    """Draw samples, a row for each caption and a column for each checkpoint and number of steps.

    Images in a row have the same noise. ``samples`` has an image of each caption.
    """
    columns = [(checkpoint, count) for checkpoint in checkpoints for count in steps]
    figure = Figure(figsize=(1.4 * len(columns) + 2, 1.4 * len(captions) + 0.8), layout="constrained")
    panels = figure.subplots(len(captions), len(columns), squeeze=False)
    for i, (row, caption) in enumerate(zip(panels, captions, strict=True)):
        for panel, (checkpoint, count) in zip(row, columns, strict=True):
            image = samples[checkpoint, sampler, count][i].permute(1, 2, 0).numpy()
            panel.imshow(image.squeeze(-1) if image.shape[-1] == 1 else image, cmap="gray", vmin=0, vmax=255)
            bare(panel)
        lines = textwrap.wrap(label(caption), 26, max_lines=6, placeholder=" …")
        row[0].set_ylabel("\n".join(lines), rotation=0, ha="right", va="center", fontsize=8)
    for panel, (checkpoint, count) in zip(panels[0], columns, strict=True):
        name = textwrap.fill(label(checkpoint), 20, max_lines=3, placeholder=" …")
        panel.set_title(f"{name}\n{count} steps", fontsize=8)
    figure.suptitle(label(title), fontsize=10)
    return figure
