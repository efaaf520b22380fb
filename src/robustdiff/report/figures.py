"""Figures: FID against steps, and samples on common noise side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from robustdiff.evaluation.grid import Cell
from robustdiff.files import atomic_write

__all__ = ["fid_against_steps", "sample_grid", "save_figure", "tile"]

_COLOURS = matplotlib.colormaps["tab10"].colors  # type: ignore[attr-defined]
_MARKERS = "osD^vP*X"


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG atomically."""
    FigureCanvasAgg(figure)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=150, bbox_inches="tight")


def fid_against_steps(cells: Sequence[Cell], title: str) -> Figure:
    """One panel for each sampler, one line for each checkpoint, with intervals; both axes logarithmic."""
    samplers = list(dict.fromkeys(cell.sampler for cell in cells))
    checkpoints = list(dict.fromkeys(cell.checkpoint for cell in cells))
    steps = sorted({cell.steps for cell in cells})
    figure = Figure(figsize=(1 + 3.2 * len(samplers), 3.6), layout="constrained")
    panels = figure.subplots(1, len(samplers), sharey=True, squeeze=False)[0]
    for panel, sampler in zip(panels, samplers, strict=True):
        for i, checkpoint in enumerate(checkpoints):
            line = sorted(
                (c for c in cells if c.sampler == sampler and c.checkpoint == checkpoint), key=lambda c: c.steps
            )
            fid = np.array([c.fid for c in line])
            ends = np.array([c.fid_ci for c in line]).T
            x = [c.steps for c in line]
            colour = _COLOURS[i % len(_COLOURS)]
            marker = _MARKERS[i % len(_MARKERS)]
            panel.plot(x, fid, marker=marker, color=colour, label=checkpoint, markersize=5, linewidth=1.5)
            panel.fill_between(x, *np.maximum(ends, 1e-3), color=colour, alpha=0.15, linewidth=0)
        panel.set_title(sampler)
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_xticks(steps, [str(s) for s in steps])
        panel.minorticks_off()
        panel.set_xlabel("steps (network evaluations)")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("FID (lower is better)")
    low, high = panels[0].get_ylim()
    ticks = [m * 10.0**e for e in range(-3, 5) for m in (1, 2, 5) if low <= m * 10.0**e <= high]
    panels[0].set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    panels[0].legend(frameon=False)
    figure.suptitle(title, fontsize=10)
    return figure


def tile(images: Tensor, columns: int, scale: int = 1) -> NDArray[np.uint8]:
    """Images uint8 (n, C, H, W) as one, (rows·H·scale, columns·W·scale, C), with a line of white between them."""
    pixels = images.permute(0, 2, 3, 1).numpy().repeat(scale, 1).repeat(scale, 2)
    pixels = np.pad(pixels, ((0, -len(pixels) % columns), (1, 1), (1, 1), (0, 0)), constant_values=255)
    n, height, width, channels = pixels.shape
    rows = pixels.reshape(n // columns, columns, height, width, channels).swapaxes(1, 2)
    return np.ascontiguousarray(rows.reshape(n // columns * height, columns * width, channels))


def sample_grid(
    samples: dict[tuple[str, str, int], Tensor],
    checkpoints: Sequence[str],
    sampler: str,
    steps: Sequence[int],
    title: str,
) -> Figure:
    """Checkpoints side by side, numbers of steps below each other; column j is the same x_T everywhere."""
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
        panel.set_title(checkpoint, fontsize=10)
    figure.suptitle(title, fontsize=10)
    return figure
