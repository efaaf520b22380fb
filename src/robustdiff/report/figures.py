"""Figures: numbers against steps, and samples from common noise side by side.

This is the only module that imports matplotlib. On import, matplotlib reads a file ``matplotlibrc`` in the working
folder, which may come from somebody else and whose settings can start programs (LaTeX). Therefore it is imported from
another folder here, and figures are drawn under its default settings.
"""

from __future__ import annotations

import contextlib
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

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
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

__all__ = [
    "COLOURS",
    "MARKERS",
    "Axes",
    "Figure",
    "Line",
    "caption_grid",
    "default_settings",
    "label",
    "loss_curves",
    "matplotlib",
    "numbers_against_steps",
    "points",
    "sample_grid",
    "samples_name",
    "save_figure",
    "step_panels",
]

COLOURS = matplotlib.colormaps["tab10"].colors  # type: ignore[attr-defined]
MARKERS = "osD^vP*X"


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
    """A line of points (x, y) with a band from ``low`` to ``high``; thin, if it is one of those of a mean."""

    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    thin: bool = field(default=False, kw_only=True)


@default_settings()
def step_panels(
    panels: dict[str, dict[str, list[Line]]],
    title: str,
    levels: Mapping[str, float] = {},
    number: Number = FID.numbers[0],
    xlabel: str = "steps (network evaluations)",
) -> Figure:
    """Draw a number against steps, or others, on a logarithmic axis, as lines by title of the panel and by label.

    Lines with the same label have the same colour. Levels are dashed horizontal lines.
    """
    labels = list(dict.fromkeys(name for groups in panels.values() for name in groups))
    steps = sorted({x for groups in panels.values() for lines in groups.values() for line in lines for x in line.x})
    figure = Figure(figsize=(3 + 3.2 * len(panels), 3.6), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for panel, (heading, groups) in zip(axes, panels.items(), strict=True):
        for name, lines in groups.items():
            i = labels.index(name)
            colour = COLOURS[i % len(COLOURS)]
            marker = MARKERS[i % len(MARKERS)]
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
        panel.set_title(label(heading))
        panel.set_xscale("log")
        if number.log:
            panel.set_yscale("log")
        panel.set_xticks(steps, [f"{s:g}" for s in steps])
        panel.minorticks_off()
        panel.set_xlabel(xlabel)
        panel.grid(alpha=0.3)
    axes[0].set_ylabel(number.title + (f" ({number.better} is better)" if number.better else ""))
    if number.log:
        ticks = _logarithmic_ticks(*axes[0].get_ylim())
        axes[0].set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.suptitle(label(title), fontsize=10)
    return figure


def _logarithmic_ticks(low: float, high: float) -> list[float]:
    """Return round numbers between two ends, of the coarsest spacing that has three of them."""
    for multiples in ((1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8), np.arange(10, 100) / 10):
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
    checkpoints = dict.fromkeys(checkpoint for _, checkpoint in points)
    panels = {
        sampler: {
            # A line without points is kept, since the legend is that of the first panel.
            checkpoint: [Line(*np.reshape(sorted(points.get((sampler, checkpoint), [])), (-1, 4)).T.tolist())]
            for checkpoint in checkpoints
        }
        for sampler in dict.fromkeys(sampler for sampler, _ in points)
    }
    return step_panels(panels, title, levels, number)


@default_settings()
def loss_curves(curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], title: str) -> Figure:
    """Draw the training loss of each run, (steps, losses) by label, smoothed over ten values, on a logarithmic axis."""
    figure = Figure(figsize=(8.4, 3.6), layout="constrained")
    panel = figure.subplots()
    for i, (name, (steps, losses)) in enumerate(curves.items()):
        width = min(10, len(losses))
        smooth = np.convolve(losses, np.full(width, 1 / width), "valid")
        style = {"color": COLOURS[i % len(COLOURS)], "linestyle": "-" if i < len(COLOURS) else "--"}
        panel.plot(steps[width - 1 :], smooth, label=label(name), linewidth=1.2, **style)
    panel.set_xlabel("optimiser updates")
    panel.set_ylabel("loss, at δ where there is one")
    panel.set_yscale("log")
    panel.grid(alpha=0.3, which="both")
    figure.legend(loc="outside right center", frameon=False, fontsize="x-small")
    figure.suptitle(label(title), fontsize=10)
    return figure


@default_settings()
def points(panels: dict[str, dict[str, list[tuple[float, float]]]], xlabel: str, ylabel: str, title: str) -> Figure:
    """Draw points (x, y) by title of the panel and by label. Each panel has axes of its own."""
    labels = list(dict.fromkeys(name for found in panels.values() for name in found))
    figure = Figure(figsize=(3 + 3.2 * len(panels), 3.6), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for panel, (heading, found) in zip(axes, panels.items(), strict=True):
        for i, name in enumerate(labels):
            style = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
            x, y = np.reshape(found.get(name, []), (-1, 2)).T
            panel.scatter(x, y, label=label(name), s=30, **style)
        panel.set_title(label(heading))
        panel.set_xlabel(xlabel)
        panel.grid(alpha=0.3)
    axes[0].set_ylabel(ylabel)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize="small")
    figure.suptitle(label(title), fontsize=10)
    return figure


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
            panel.set_xticks([])
            panel.set_yticks([])
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
            panel.set_xticks([])
            panel.set_yticks([])
        lines = textwrap.wrap(label(caption), 26, max_lines=6, placeholder=" …")
        row[0].set_ylabel("\n".join(lines), rotation=0, ha="right", va="center", fontsize=8)
    for panel, (checkpoint, count) in zip(panels[0], columns, strict=True):
        name = textwrap.fill(label(checkpoint), 20, max_lines=3, placeholder=" …")
        panel.set_title(f"{name}\n{count} steps", fontsize=8)
    figure.suptitle(label(title), fontsize=10)
    return figure
