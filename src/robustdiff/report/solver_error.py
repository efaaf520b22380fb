"""Table and figure of the local error of a solver."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from rich import box
from rich.table import Table

from robustdiff.files import written_last
from robustdiff.mismatch.solver_error import LocalError, SolverError, fitted_order
from robustdiff.report.figures import Figure, default_settings, label, matplotlib, save_figure

__all__ = ["solver_error_figure", "solver_error_table", "write_solver_error"]

_COLUMNS = 5


def _by_solver(errors: Sequence[LocalError]) -> dict[str, dict[int, list[LocalError]]]:
    """Return the errors by solver and N, ascending in σ."""
    grouped: dict[str, dict[int, list[LocalError]]] = {}
    for error in errors:
        grouped.setdefault(error.solver, {}).setdefault(error.scales, []).append(error)
    return grouped


def solver_error_table(errors: Sequence[LocalError]) -> Table:
    """Return a table of the RMS error per dimension at some levels that all N share, with the fitted orders in N."""
    grouped = _by_solver(errors)
    by_position = {(e.solver, e.scales, round(e.position, 6)): e for e in errors}
    numbers = dict.fromkeys(e.scales for e in errors)
    solver = next(iter(grouped))
    positions = sorted({p for _, _, p in by_position if all((solver, N, p) in by_position for N in numbers)})
    shown = [positions[i] for i in np.unique(np.linspace(0, len(positions) - 1, _COLUMNS).round().astype(int))]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), collapse_padding=True, caption_justify="left")
    table.add_column("", no_wrap=True)
    for position in shown:
        level = np.exp(np.mean([np.log(by_position[solver, N, position].lower) for N in numbers]))
        table.add_column(f"σ ≈ {level:.2g}", justify="right", no_wrap=True)
    table.add_column("reference", justify="right", no_wrap=True)
    orders = []
    for name, groups in grouped.items():
        for i, (N, group) in enumerate(groups.items()):
            own = float(np.median([e.reference for e in group]))
            values = [f"{by_position[name, N, position].rms:.1e}" for position in shown]
            table.add_row(f"{name} N={N}", *values, f"{own:.0e}", end_section=i + 1 == len(groups))
        order = fitted_order([e for group in groups.values() for e in group])
        orders.append(f"{name} not fitted" if order is None else f"{name} N^-{order:.2f}")
    table.caption = f"RMS of the local error per dimension falls as {', '.join(orders)}"
    return table


@default_settings()
def solver_error_figure(errors: Sequence[LocalError], title: str) -> Figure:
    """Draw the RMS error against σ, a panel for each solver and a line for each N. The reference's error is dotted."""
    grouped = _by_solver(errors)
    figure = Figure(figsize=(1 + 3.8 * len(grouped), 3.8), layout="constrained")
    panels = figure.subplots(1, len(grouped), sharey=True, squeeze=False)[0]
    for panel, (solver, groups) in zip(panels, grouped.items(), strict=True):
        colours = matplotlib.colormaps["viridis"].resampled(len(groups) + 1)
        for i, (N, group) in enumerate(groups.items()):
            sigmas = [e.lower for e in group]
            panel.plot(sigmas, [e.rms for e in group], "o-", color=colours(i), label=f"N = {N}", markersize=3.5)
            low, _, high = zip(*(e.quantiles for e in group), strict=True)
            panel.fill_between(sigmas, low, high, color=colours(i), alpha=0.15, linewidth=0)
            panel.plot(sigmas, [max(e.reference, 1e-12) for e in group], ":", color=colours(i), linewidth=1)
        order = fitted_order([e for group in groups.values() for e in group])
        panel.set_title(solver if order is None else f"{solver}: falls as $N^{{-{order:.2f}}}$", fontsize=10)
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_xlabel("σ, the level that the step goes to")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("RMS of the local error per dimension")
    panels[0].legend(frameon=False, fontsize="small")
    figure.suptitle(f"{label(title)}\nbands: 5 to 95 % of images; dotted: the reference's own error", fontsize=9)
    return figure


def write_solver_error(folder: Path, result: SolverError) -> None:
    """Write ``result.json`` and the figure ``solver-error.png`` into a folder, which is created if it is missing.

    Raises:
        RunError: If a number is not finite. Nothing is written then.
    """
    title = f"One step of the solver on {Path(result.teacher).name}, {result.num} images of {result.data}"
    with written_last(folder / "result.json", asdict(result)):
        save_figure(solver_error_figure(result.errors, title), folder / "solver-error.png")
