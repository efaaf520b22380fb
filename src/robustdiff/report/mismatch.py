"""Tables, figures and a file of the mismatch along a sampler's path and of the robustness at true points."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
from rich import box
from rich.table import Table
from rich.text import Text

from robustdiff.files import written_last
from robustdiff.mismatch.measure import MEASURES, Mismatch
from robustdiff.notation import interval
from robustdiff.report.figures import COLOURS, MARKERS, Axes, Figure, default_settings, label, save_figure
from robustdiff.report.tables import shown

__all__ = ["mismatch_figure", "mismatch_table", "robustness_figure", "robustness_table", "write_mismatch"]

_SIGNED = ("x0_std", "noise")
_LABELS = {
    "delta": r"$\delta_t$",
    "x0_std": r"std $\hat{x}_0$, difference",
    "noise": r"$\Vert\hat{\epsilon}\Vert$, relative excess",
    "sliced": "sliced $W_2$\nper dimension",
    "energy": "energy distance",
    "frechet": "Fréchet², PCA",
    "kl": "KL(q‖p), k-NN\nPCA [nats]",
}


def _checkpoints(mismatch: Mismatch) -> list[str]:
    return list(dict.fromkeys(path.checkpoint for path in mismatch.paths))


def mismatch_table(mismatch: Mismatch) -> Table:
    """Return a table of means over steps with their intervals, with rows by sampler, steps and measure.

    A value is green (lower) or red (higher) if the interval of its difference to the first checkpoint excludes 0. The
    two signed measures are not coloured.
    """
    checkpoints = _checkpoints(mismatch)
    paths = {(p.checkpoint, p.sampler, p.steps): p for p in mismatch.paths}
    differences = {(d.checkpoint, d.baseline, d.sampler, d.steps, d.measure): d for d in mismatch.differences}
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), collapse_padding=True, caption_justify="left")
    table.add_column("mean over steps", no_wrap=True)
    table.add_column("floor", justify="right", no_wrap=True)
    for checkpoint in checkpoints:
        table.add_column(shown(checkpoint), justify="right", no_wrap=True)
    for sampler, steps in dict.fromkeys((p.sampler, p.steps) for p in mismatch.paths):
        table.add_row(Text(f"{sampler} {steps}", style="bold"))
        for i, (measure, meaning) in enumerate(MEASURES.items()):
            floor = paths[checkpoints[0], sampler, steps].mean[measure].floor
            row: list[str | Text] = [f" {meaning}", "0" if floor is None else f"{floor:.2g}"]
            for checkpoint in checkpoints:
                cell = paths[checkpoint, sampler, steps].mean[measure]
                text = Text(interval(cell.value, (cell.low, cell.high), ".3g"))
                difference = differences.get((checkpoint, checkpoints[0], sampler, steps, measure))
                if difference is not None and measure not in _SIGNED:
                    style = "green" if difference.high < 0 else "red" if difference.low > 0 else "dim"
                    text.stylize(style)
                row.append(text)
            table.add_row(*row, end_section=i + 1 == len(MEASURES))
    if len(checkpoints) > 1:
        table.caption = shown(
            f"green and red: lower and higher than {checkpoints[0]} beyond the interval of the difference"
        )
    return table


def robustness_table(mismatch: Mismatch) -> Table:
    """Return a table of the clean loss, the robust loss and the Lipschitz constant of ε̂, with standard errors."""
    radii = mismatch.robustness[0].radii
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), collapse_padding=True)
    for name in ("t", "σ_t"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for name in ("loss", *(f"‖δ‖ ≤ {r:g}" for r in radii), "Lipschitz", "largest"):
        table.add_column(name, justify="right", no_wrap=True)
    for index in dict.fromkeys(r.index for r in mismatch.robustness):
        rows = [r for r in mismatch.robustness if r.index == index]
        for i, r in enumerate(rows):
            losses = zip([r.loss, *r.robust], [r.loss_se, *r.robust_se], strict=True)
            table.add_row(
                *((str(index), f"{r.sigma:.2f}") if i == 0 else ("", "")),
                shown(r.checkpoint),
                *(interval(loss, None, ".3g", se) for loss, se in losses),
                interval(r.lipschitz, None, ".3g", r.lipschitz_se),
                f"{r.lipschitz_max:.3g}",
                end_section=i + 1 == len(rows),
            )
    return table


@default_settings()
def mismatch_figure(mismatch: Mismatch, title: str) -> Figure:
    """Draw measures against time: a row for each, a column for each sampler and steps, a line for each checkpoint.

    Bands are 95 % intervals. The dashed line is the floor, the measure between two samples of q.
    """
    checkpoints = _checkpoints(mismatch)
    columns = list(dict.fromkeys((p.sampler, p.steps) for p in mismatch.paths))
    figure = Figure(figsize=(1.2 + 3.4 * len(columns), 0.9 + 1.7 * len(MEASURES)), layout="constrained")
    panels = figure.subplots(len(MEASURES), len(columns), sharex="col", sharey="row", squeeze=False)
    for j, (sampler, steps) in enumerate(columns):
        for i, measure in enumerate(MEASURES):
            panel: Axes = panels[i, j]
            for k, checkpoint in enumerate(checkpoints):
                (path,) = (
                    p.path for p in mismatch.paths if (p.checkpoint, p.sampler, p.steps) == (checkpoint, sampler, steps)
                )
                times = [step.time for step in path]
                estimates = [step.estimates[measure] for step in path]
                style = {"color": COLOURS[k % len(COLOURS)], "marker": MARKERS[k % len(MARKERS)]}
                panel.plot(
                    times, [e.value for e in estimates], label=label(checkpoint), markersize=4, linewidth=1.4, **style
                )
                low, high = (np.array([getattr(e, end) for e in estimates]) for end in ("low", "high"))
                panel.fill_between(times, low, high, color=style["color"], alpha=0.15, linewidth=0)
                if checkpoint == checkpoints[-1]:
                    floor = [e.floor or 0.0 for e in estimates]
                    panel.plot(times, floor, color="0.4", linestyle="--", linewidth=1, label="floor")
            panel.grid(alpha=0.3)
            panel.margins(x=0.04)
        panels[0, j].set_title(f"{sampler}, {steps} steps", fontsize=10)
        panels[-1, j].set_xlabel("time t: sampling goes to the right")
        panels[0, j].invert_xaxis()
    for i, measure in enumerate(MEASURES):
        panels[i, 0].set_ylabel(_LABELS[measure], fontsize=9)
    panels[0, 0].legend(frameon=False, fontsize=8)
    figure.suptitle(label(title), fontsize=10)
    return figure


@default_settings()
def robustness_figure(mismatch: Mismatch, title: str) -> Figure:
    """Draw the clean loss, the robust loss of each radius, and the Lipschitz constant against time."""
    checkpoints = list(dict.fromkeys(r.checkpoint for r in mismatch.robustness))
    radii = mismatch.robustness[0].radii
    figure = Figure(figsize=(1 + 2.9 * (2 + len(radii)), 3.2), layout="constrained")
    panels = figure.subplots(1, 2 + len(radii), squeeze=False)[0]
    for panel in panels[1 : 1 + len(radii)]:
        panel.sharey(panels[0])
        panel.tick_params(labelleft=False)
    for k, checkpoint in enumerate(checkpoints):
        line = [r for r in mismatch.robustness if r.checkpoint == checkpoint]
        times = [r.index for r in line]
        style = {"color": COLOURS[k % len(COLOURS)], "marker": MARKERS[k % len(MARKERS)]}
        curves = [([r.loss for r in line], [r.loss_se for r in line])]
        curves += [([r.robust[i] for r in line], [r.robust_se[i] for r in line]) for i in range(len(radii))]
        curves.append(([r.lipschitz for r in line], [r.lipschitz_se for r in line]))
        for panel, (values, errors) in zip(panels, curves, strict=True):
            bars = 1.96 * np.array(errors)
            panel.errorbar(
                times, values, bars, label=label(checkpoint), markersize=4, linewidth=1.4, capsize=2, **style
            )
        largest = [r.lipschitz_max for r in line]
        panels[-1].plot(times, largest, color=style["color"], linestyle=":", label="largest" if k == 0 else None)
    titles = ["loss at x_t", *(f"robust loss, ‖δ‖ ≤ {r:g}" for r in radii), "Lipschitz constant of ε̂"]
    for panel, text in zip(panels, titles, strict=True):
        panel.set_title(text, fontsize=10)
        panel.set_yscale("log")
        panel.set_xlabel("time t: sampling goes to the right")
        panel.invert_xaxis()
        panel.grid(alpha=0.3)
    panels[0].legend(frameon=False, fontsize=8)
    panels[-1].legend(frameon=False, fontsize=8)
    figure.suptitle(label(title), fontsize=10)
    return figure


def write_mismatch(folder: Path, mismatch: Mismatch) -> None:
    """Write ``mismatch.json`` and the figures into a folder, which is created if it is missing.

    Raises:
        RunError: If a number is not finite. Nothing is written then.
    """
    title = f"{mismatch.data}, {mismatch.paths[0].n} images, seed {mismatch.seed}"
    with written_last(folder / "mismatch.json", asdict(mismatch)):
        save_figure(mismatch_figure(mismatch, title), folder / "mismatch.png")
        if mismatch.robustness:
            title = f"{mismatch.data}, {mismatch.robustness[0].n} images, seed {mismatch.seed}"
            save_figure(robustness_figure(mismatch, title), folder / "robust.png")
