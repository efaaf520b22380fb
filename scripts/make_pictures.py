"""Draw the picture of the README and of the documentation from the committed results: python scripts/make_pictures.py

FID against steps of plain and adversarial fine-tuning, with a dot for each training and a line through the means (at 8
steps there is one training, which is left out), and samples of both at 5 steps from
the same noise, as docs/images/fid-light.png and fid-dark.png, on no background. All numbers and images are those of the
cells in benchmarks/results/fashion-16.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
CELLS = ROOT / "benchmarks" / "results" / "fashion-16" / "cells"
METHODS = {"plain": "plain fine-tuning", "free-k3-a0.3": "free adversarial training"}
SAMPLERS = {"iddpm": "ancestral sampling, iddpm", "dpm++": "DPM-Solver++, dpm++"}
COLOURS = {
    "light": {"plain": "#5f6b7a", "free-k3-a0.3": "#c2571a", "text": "#1f2933", "base": "#1f5f9e"},
    "dark": {"plain": "#aab4c2", "free-k3-a0.3": "#f0a060", "text": "#e4e9f0", "base": "#8ab8ea"},
}
SEED = 1  # the training whose images are pictured


def fid_of(method: str, sampler: str) -> dict[int, list[float]]:
    """Return FID by the number of steps, a value for each training."""
    found: dict[int, list[float]] = {}
    for path in sorted(CELLS.glob(f"{method}-*.json")):
        cell: dict[str, Any] = json.loads(path.read_text())
        if cell["sampler"] == sampler:
            found.setdefault(cell["steps"], []).append(cell["fid"])
    found.pop(8, None)
    return dict(sorted(found.items()))


def draw(theme: str) -> Figure:
    """Return the figure in one theme."""
    colours = COLOURS[theme]
    figure = Figure(figsize=(10, 4.3), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=[1, 1], height_ratios=[3.2, 0.75])
    for column, (sampler, title) in enumerate(SAMPLERS.items()):
        axes = figure.add_subplot(grid[0, column])
        for method, label in METHODS.items():
            found = fid_of(method, sampler)
            shift = 0.985 if method == "plain" else 1.015
            means = [np.exp(np.mean(np.log(values))) for values in found.values()]
            axes.plot(np.array([*found]) * shift, means, "-", color=colours[method], linewidth=2, label=label)
            for steps, values in found.items():
                axes.plot([steps * shift] * len(values), values, "o", color=colours[method], markersize=5, alpha=0.75)
        base = {steps: values[0] for steps, values in fid_of("base", sampler).items()}
        axes.plot([*base], [*base.values()], "D", color=colours["base"], markersize=6, label="the checkpoint itself")
        axes.set(xscale="log", yscale="log", xticks=[5, 10, 20, 50], xticklabels=["5", "10", "20", "50"])
        ticks = [1, 2, 5, 10, 20] if sampler == "iddpm" else [2, 3, 5, 10]
        axes.set_yticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.set_title(title, fontsize=11, loc="left", color=colours["text"])
        axes.set_xlabel("sampling steps")
        if column == 0:
            axes.set_ylabel("FID (lower is better)")
            axes.legend(frameon=False, labelcolor=colours["text"], fontsize=9.5)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color=colours["text"], alpha=0.15)
        axes.tick_params(colors=colours["text"])
        axes.xaxis.label.set_color(colours["text"])
        axes.yaxis.label.set_color(colours["text"])
        for spine in axes.spines.values():
            spine.set_color(colours["text"])
    for column, (method, label) in enumerate(METHODS.items()):
        axes = figure.add_subplot(grid[1, column])
        with Image.open(CELLS / f"{method}-s{SEED}-iddpm-5.png") as image:
            axes.imshow(np.asarray(image), cmap="gray", interpolation="nearest")
        axes.set_title(f"{label}, 5 steps of iddpm", fontsize=9.5, loc="left", color=colours[method])
        axes.axis("off")
    return figure


@matplotlib.rc_context({"font.size": 10})
def main() -> None:
    """Write the picture in both themes."""
    for theme in COLOURS:
        figure = draw(theme)
        FigureCanvasAgg(figure)
        path = ROOT / "docs" / "images" / f"fid-{theme}.png"
        path.parent.mkdir(exist_ok=True)
        figure.savefig(path, dpi=150, transparent=True)


if __name__ == "__main__":
    main()
