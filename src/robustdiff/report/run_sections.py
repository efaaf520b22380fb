"""The parts of the HTML page on runs: what was run, whether it helped, its curves, its costs and its settings."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from robustdiff.errors import printable
from robustdiff.metrics.bootstrap import direction
from robustdiff.metrics.metric import Number, number_named
from robustdiff.mismatch.measure import MEASURES
from robustdiff.notation import difference as shown_difference
from robustdiff.notation import interval
from robustdiff.notation import number as shown_number
from robustdiff.report.charts import Chart, Mark, Point, Series, draw
from robustdiff.report.runs import Evaluated, Mismatches, RunFiles
from robustdiff.training.watch_files import Best, FiredSign, Line, WatchedCell

__all__ = [
    "Summary",
    "Table",
    "Watched",
    "command",
    "cost_table",
    "curves",
    "evaluation_parts",
    "mismatch_tables",
    "reproduction",
    "settings_tables",
    "steps_charts",
    "summary",
    "watched",
    "windows",
]

_WINDOWS = 80  # of a curve
_STEPS = "steps"
_UPDATES = "updates"


@dataclass(frozen=True)
class Table:
    """A table, whose first column heads its rows."""

    caption: str
    heading: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Summary:
    """The beginning of the page on a run: its configuration, its outcome in sentences, and the signs that fired."""

    name: str
    what: str
    outcome: list[str]
    differences: Table | None
    signs: list[FiredSign]
    watched: bool


@dataclass(frozen=True)
class Watched:
    """The watch over one training."""

    name: str
    charts: list[Chart]
    signs: list[FiredSign]
    note: str


def _show(number: Number, difference: bool = False) -> Callable[[float], str]:
    """Return the function that writes a number, or a difference with its sign."""
    sign = "+" if difference else ""
    return lambda value: shown_number(value, f"{sign}{number.format}")


def _setting(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_setting, value))
    if isinstance(value, dict):
        return " ".join(f"{key} {_setting(own)}" for key, own in value.items() if own not in (None, False))
    return str(value)


def _what(run: RunFiles) -> str:
    """Return a sentence on the configuration of a run."""
    recipe = run.recipe
    subject = "Training of a new network" if run.start is None else f"Fine-tuning of {run.start}"
    data = recipe.data.name if run.data is None else f"{run.data.name} ({run.data.images:,} images)"
    fields = recipe.adversary.model_dump(mode="json")
    name = fields.pop("name")
    details = ", ".join(f"{key} {_setting(value)}" for key, value in fields.items() if value)
    against = "without an adversary" if name == "none" else f"with the adversary {name} ({details})"
    return (
        f"{subject} on {data}, {against}: {recipe.steps:,} updates of batch {recipe.batch_size}, learning rate "
        f"{recipe.lr:g}."
    )


def _reading(number: Number, compared: WatchedCell | Best) -> str:
    """Return what the interval of a difference says."""
    if compared.difference_ci is None:
        return "no interval"
    sign = direction(compared.difference_ci, compared.relative_ci)
    if sign == 0:
        return "undecided"
    if number.better is None:
        return "lower" if sign < 0 else "higher"
    return "better" if (sign < 0) == (number.better == "lower") else "worse"


_VERDICTS = {
    "better": "The training helped. ",
    "worse": "The training made the model worse. ",
    "undecided": "The training made no difference beyond the interval. ",
    "lower": "",
    "higher": "",
    "no interval": "",
}


def _place(cell: WatchedCell) -> str:
    return f"{cell.place}, {cell.steps} steps"


def _outcome(run: RunFiles) -> list[str]:
    """Return sentences on whether the training helped."""
    result = run.result
    if result is None:
        return [
            f"The run is not finished: {run.updates:,} of {run.recipe.steps:,} updates are logged, and no checkpoint "
            "has been measured on fresh noise. robustdiff train goes on with --resume."
        ]
    found = []
    if result.steps < run.recipe.steps:
        found.append(f"The run ended at update {result.steps:,} of {run.recipe.steps:,}.")
    best = result.best
    if best is None:
        return [
            "No metric was watched during the training, so that the run itself does not say whether it helped: "
            "robustdiff evaluate compares its model with the start.",
            *found,
        ]
    number = number_named(best.cells[0].metric)
    mean = f"mean {number.title} of {_show(number)(best.mean)} on fresh noise ({best.images:,} images in all)"
    if best.start:
        return [
            f"The training did not help: no watched checkpoint had a better mean {number.title} than the starting "
            f"checkpoint, which best/ holds. It has a {mean}.",
            *found,
        ]
    sentence = f"The best checkpoint, of update {best.step:,}, has a {mean}"
    if best.difference is not None:
        sentence = f"{_VERDICTS[_reading(number, best)]}{sentence}, {_difference(best, number)} vs the start"
    found.insert(0, f"{sentence}.")
    compared = [_reading(number, cell) for cell in best.cells if cell.difference is not None]
    if len(compared) > 1:
        counts = (f"{word}: {compared.count(word)}" for word in dict.fromkeys(["better", "worse", *compared]))
        found.append(f"Compared with the start at {len(compared)} pairs of sampler and steps: {', '.join(counts)}.")
    return found


def _difference(compared: WatchedCell | Best, number: Number) -> str:
    assert compared.difference is not None
    return shown_difference(
        compared.difference, compared.difference_ci, number.format, compared.relative, compared.relative_ci
    )


def _differences(run: RunFiles) -> Table | None:
    """Return the table of the best checkpoint against the start, on fresh noise."""
    best = run.result.best if run.result is not None else None
    if best is None or best.start:
        return None
    rows = []
    for cell in best.cells:
        number = number_named(cell.metric)
        row = [f"{number.title}, {_place(cell)}"]
        if cell.difference is None:
            rows.append([*row, "–", interval(cell.value, cell.ci, number.format), "–", "no start to compare with"])
        else:
            start = _show(number)(cell.value - cell.difference)
            row += [start, interval(cell.value, cell.ci, number.format), _difference(cell, number)]
            rows.append([*row, _reading(number, cell)])
    heading = ["", "start", f"update {best.step:,}", "change", "reading"]
    caption = (
        f"The best checkpoint of {run.name} against the start, on fresh noise, with 95 % intervals. Undecided: that of "
        "the change contains 0"
    )
    return Table(caption, heading, rows)


def summary(run: RunFiles) -> Summary:
    """Return the beginning of the page on a run."""
    return Summary(run.name, _what(run), _outcome(run), _differences(run), run.signs, bool(run.watch))


# -- the metric against steps, and over the training ---------------------------------------------------------


def _levels_of(run: RunFiles) -> list[tuple[str, Sequence[WatchedCell], bool]]:
    """Return the cells of the start and of the checkpoints of a run, by name, and whether their noise is fresh."""
    best = run.result.best if run.result is not None else None
    if best is not None:
        if best.start:
            return [("start", best.cells, True)]
        starts = [
            cell.model_copy(update={"value": cell.value - cell.difference, "ci": None})
            for cell in best.cells
            if cell.difference is not None
        ]
        return [("start", starts, True), (f"best, update {best.step:,}", best.cells, True)]
    if not run.watch:
        return []
    kept = next((line for line in run.watch if line.step == run.best_step), None)
    lines: dict[int, tuple[str, Line]] = {run.watch[-1].step: (f"update {run.watch[-1].step:,}", run.watch[-1])}
    if kept is not None:
        lines[kept.step] = f"best so far, update {kept.step:,}", kept
    if run.watch[0].step == 0:
        lines[0] = "start", run.watch[0]
    return [(name, line.cells, False) for _, (name, line) in sorted(lines.items())]


def _named_levels(runs: Sequence[RunFiles]) -> list[tuple[str, Sequence[WatchedCell], bool]]:
    """Return the cells of :func:`_levels_of` of all runs, with a start that several of them share once."""
    if len(runs) == 1:
        return _levels_of(runs[0])
    found: dict[str, tuple[Sequence[WatchedCell], bool]] = {}
    for run in runs:
        for name, cells, fresh in _levels_of(run):
            label, shared = f"{run.name}, {name}", f"start, {run.start}"
            if name == "start" and (shared not in found or _are_equal(found[shared][0], cells)):
                label = shared
                if label in found and any(cell.ci is None for cell in cells):
                    continue
            found[label] = cells, fresh
    return [(label, *level) for label, level in found.items()]


def _are_equal(cells: Sequence[WatchedCell], others: Sequence[WatchedCell]) -> bool:
    """Return whether cells have the same places and, up to rounding, the same values."""
    places = [[(cell.metric, cell.place, cell.steps) for cell in own] for own in (cells, others)]
    pairs = zip(cells, others, strict=False)
    return places[0] == places[1] and all(math.isclose(a.value, b.value, rel_tol=1e-6) for a, b in pairs)


def steps_charts(runs: Sequence[RunFiles]) -> tuple[list[Chart], str]:
    """Return the charts of watched metrics against steps, one for each sampler, and a sentence on their noise."""
    charts: dict[tuple[str, str], dict[str, list[Point]]] = {}
    fresh: set[bool] = set()
    for name, cells, of_fresh in _named_levels(runs):
        fresh.add(of_fresh)
        for cell in cells:
            line = charts.setdefault((cell.metric, cell.place), {})
            line.setdefault(name, []).append(Point(cell.steps, cell.value, cell.ci))
    drawn = []
    for (metric, place), lines in charts.items():
        number = number_named(metric)
        title = f"{number.title} against steps, {place}"
        series = [Series(name, points) for name, points in lines.items()]
        show = _show(number)
        y_title = _y_title(number)
        drawn.append(draw(title, _STEPS, y_title, series, show=show, log_x=True, log_y=number.log, only_steps=True))
    notes = [
        "Measured on fresh noise, which took no part in the choice of the checkpoint." if True in fresh else "",
        "Measured on the noise by which the checkpoint is chosen, which flatters the best." if False in fresh else "",
        "Bars are 95 % intervals.",
    ]
    points = [point for lines in charts.values() for own in lines.values() for point in own]
    if any(point.ends is None for point in points) and any(point.ends for point in points):
        notes.append("The start has no bars where its number is that of the best less their difference.")
    return drawn, " ".join(note for note in notes if note)


def _percent(value: float) -> str:
    return shown_number(value, "+.1f")


def _y_title(number: Number, unit: str = "") -> str:
    return number.title + unit + (f" ({number.better} is better)" if number.better else "")


def watched(run: RunFiles, among: int = 1) -> Watched | None:
    """Return the charts of the watch over a training, one of several runs, or None if nothing was watched."""
    if not run.watch:
        return None
    cells = [cell for line in run.watch for cell in line.cells]
    differing = [cell for cell in cells if cell.difference is not None]
    against_start = bool(differing)
    by_ratio = against_start and all(cell.relative_ci is not None for cell in differing)
    signs = sorted(run.signs, key=lambda sign: (sign.step or 0, sign.name))
    labels: dict[int, str] = {}
    for i, sign in enumerate(signs, 1):
        if sign.step is not None:
            labels[sign.step] = f"{labels[sign.step]},{i}" if sign.step in labels else f"⚑{i}"
    marks = [Mark(step, label) for step, label in labels.items() if step != run.best_step]
    if run.best_step is not None:
        marks.append(Mark(run.best_step, f"best {labels.get(run.best_step, '')}".strip(), "best"))
    charts = []
    for metric, place in dict.fromkeys((cell.metric, cell.place) for cell in cells):
        number = number_named(metric)
        lines: dict[int, list[Point]] = {}
        for line in run.watch:
            for cell in line.cells:
                if (cell.metric, cell.place) != (metric, place):
                    continue
                points = lines.setdefault(cell.steps, [])
                if not against_start:
                    points.append(Point(line.step, cell.value, cell.ci))
                elif by_ratio and cell.relative is not None and cell.relative_ci is not None:
                    low, high = cell.relative_ci
                    points.append(Point(line.step, 100 * cell.relative, (100 * low, 100 * high)))
                elif cell.difference is not None:
                    points.append(Point(line.step, cell.difference, cell.difference_ci))
                elif line.step == 0:
                    points.append(Point(0, 0.0))
        series = [Series(f"{steps} steps", points) for steps, points in sorted(lines.items())]
        if not any(one.points for one in series):
            continue
        show = _show(number, against_start)
        if by_ratio:
            title, y_title = f"{number.title} vs the start, {place}", f"change of {_y_title(number, ', %')}"
            show = _percent
        elif against_start:
            title, y_title = f"{number.title} minus that of the start, {place}", f"difference in {_y_title(number)}"
        else:
            title, y_title = f"{number.title}, {place}", _y_title(number)
        charts.append(
            draw(
                f"{run.name}: {title}" if among > 1 else title,
                _UPDATES,
                y_title,
                series,
                show=show,
                log_y=number.log and not against_start,
                zero_label="start" if against_start else None,
                marks=marks,
            )
        )
    seconds, images = sum(line.seconds for line in run.watch), run.watch[-1].images
    note = f"{len(run.watch)} measurements, each of {images:,} images in all; together they took {seconds:,.0f} s."
    return Watched(run.name, charts, signs, note)


def curves(runs: Sequence[RunFiles]) -> list[Chart]:
    """Return the charts of the loss and of ‖δ‖ against updates, in windows of equal length."""
    loss: list[Series] = []
    delta: list[Series] = []
    for run in runs:
        if not run.metrics:
            continue
        for found, values in (
            (loss, [line.loss for line in run.metrics]),
            (delta, [line.delta_norm for line in run.metrics]),
        ):
            found.append(Series(run.name, windows([line.step for line in run.metrics], values)))

    def show(value: float) -> str:
        return f"{value:.4g}"

    drawn = (
        [draw("Training loss", _UPDATES, "loss, at δ where there is one", loss, show=show, log_y=True)] if loss else []
    )
    if any(point.y for one in delta for point in one.points):
        drawn.append(draw("Size of the perturbation", _UPDATES, "‖δ‖, mean over samples", delta, show=show))
    return drawn


def windows(steps: Sequence[int], values: Sequence[float]) -> list[Point]:
    """Return the means of values over at most 80 windows, each at its last update."""
    parts = np.array_split(np.arange(len(steps)), min(_WINDOWS, len(steps)))
    return [Point(steps[part[-1]], float(np.mean(np.asarray(values)[part]))) for part in parts]


# -- other measurements --------------------------------------------------------------------------------------


def mismatch_tables(found: Mapping[str, Mismatches]) -> list[Table]:
    """Return a table of the mismatch for each file, by sampler, steps and measure, with a column a checkpoint."""
    tables = []
    for name, mismatch in found.items():
        checkpoints = list(dict.fromkeys(path.checkpoint for path in mismatch.paths))
        paths = {(path.checkpoint, path.sampler, path.steps): path for path in mismatch.paths}
        rows = []
        for sampler, steps in dict.fromkeys((path.sampler, path.steps) for path in mismatch.paths):
            own = [paths.get((checkpoint, sampler, steps)) for checkpoint in checkpoints]
            for measure, meaning in MEASURES.items():
                estimates = [None if path is None else path.mean.get(measure) for path in own]
                known = [estimate for estimate in estimates if estimate is not None]
                if known:
                    floor = "–" if known[0].floor is None else f"{known[0].floor:.3g}"
                    texts = [
                        "–" if one is None else interval(one.value, (one.low, one.high), ".3g") for one in estimates
                    ]
                    rows.append([f"{sampler} {steps}: {meaning}", floor, *texts])
        caption = (
            f"{name}: the mean over the sampler's steps, with 95 % intervals, {mismatch.paths[0].n:,} images of "
            f"{mismatch.data}. Floor: the same between two samples of q(x_t)"
        )
        tables.append(Table(caption, ["", "floor", *checkpoints], rows))
    return tables


def evaluation_parts(name: str, evaluated: Evaluated) -> tuple[list[Chart], Table]:
    """Return the charts of numbers with intervals against steps, and the table of all cells, of `evaluate`."""
    charts = []
    cells = evaluated.cells
    for key in dict.fromkeys(key for cell in cells for key in cell.intervals):
        number = number_named(key)
        for sampler in dict.fromkeys(cell.sampler for cell in cells if cell.steps is not None):
            lines: dict[str, list[Point]] = {}
            for cell in cells:
                value = cell.numbers.get(key)
                if cell.sampler == sampler and cell.steps is not None and value is not None:
                    lines.setdefault(cell.checkpoint, []).append(Point(cell.steps, value, cell.intervals.get(key)))
            series = [Series(checkpoint, points) for checkpoint, points in lines.items()]
            if series:
                title = f"{number.title} against steps, {sampler}"
                y_title, show = _y_title(number), _show(number)
                charts.append(
                    draw(title, _STEPS, y_title, series, show=show, log_x=True, log_y=number.log, only_steps=True)
                )
    keys = dict.fromkeys(key for cell in cells for key in cell.numbers)
    numbers = [number_named(key) for key in keys if not (key.endswith("_se") and key.removesuffix("_se") in keys)]
    rows = []
    for cell in cells:
        texts = []
        for number in numbers:
            value, error = cell.numbers.get(number.name), cell.numbers.get(f"{number.name}_se")
            ends = cell.intervals.get(number.name)
            texts.append("–" if value is None else interval(value, ends, number.format, error))
        place = "as they are" if cell.steps is None else f"{cell.sampler} {cell.steps}"
        rows.append([cell.checkpoint, place, f"{cell.n:,}", *texts])
    features = "" if evaluated.features is None else f" on the features {evaluated.features}"
    against = "" if evaluated.data is None else f" against {evaluated.data}{features}"
    caption = f"{name}{against}, seed {evaluated.seed}, with 95 % intervals and standard errors"
    return charts, Table(caption, ["", "sampler, steps", "images", *(number.title for number in numbers)], rows)


# -- costs, settings, reproduction ---------------------------------------------------------------------------


def cost_table(runs: Sequence[RunFiles]) -> Table:
    """Return the table of what the runs cost."""
    rows = []
    for run in runs:
        result, seconds = run.result, run.training_seconds
        unknown = "–" if result is None else None
        images = run.updates * run.recipe.batch_size
        rows.append(
            [
                run.name,
                f"{run.updates:,}",
                unknown or f"{result.backward_passes:,}",  # type: ignore[union-attr]
                unknown or f"{result.batches * result.batch_size:,}",  # type: ignore[union-attr]
                f"{seconds:,.0f}" if seconds else "–",
                f"{images / seconds:,.0f}" if seconds else "–",
                f"{sum(line.seconds for line in run.watch):,.0f}" if run.watch else "–",
                unknown or f"{result.parameters:,}",  # type: ignore[union-attr]
                unknown or f"{result.processes} × {result.device}",  # type: ignore[union-attr]
            ]
        )
    heading = ["", "updates", "backward passes", "images drawn", "seconds of updates", "images/s"]
    heading += ["seconds of watching", "parameters", "processes"]
    return Table("Costs. Seconds of updates and images/s are of the logged updates", heading, rows)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return nested settings by their dotted names."""
    found: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = _setting(value)
    return found


def settings_tables(runs: Sequence[RunFiles]) -> list[Table]:
    """Return the settings that differ from the defaults, and between several runs those that differ first."""
    full = [_flat(run.recipe.model_dump(mode="json")) for run in runs]
    changed = [_flat(run.recipe.model_dump(mode="json", exclude_defaults=True)) for run in runs]
    keys = list(dict.fromkeys(key for one in full for key in one))
    differing = [key for key in keys if len({one.get(key) for one in full}) > 1]
    tables = []
    if len(runs) > 1:
        rows = [[key, *(one.get(key, "–") for one in full)] for key in differing]
        tables.append(Table("Settings in which the runs differ", ["", *(run.name for run in runs)], rows))
    alike = [key for key in keys if key not in differing and any(key in one for one in changed)]
    caption = "Settings that all runs share" if len(runs) > 1 else f"Settings of {runs[0].name}"
    rows = [[key, full[0][key]] for key in alike if key in full[0]]
    tables.append(Table(f"{caption} and that differ from the defaults", ["", "value"], rows))
    return [table for table in tables if table.rows]


def command(*words: str) -> str:
    """Return a command of the command line, quoted for a shell."""
    return shlex.join(["robustdiff", *(printable(word) for word in words)])


def reproduction(runs: Sequence[RunFiles], study: Sequence[str], own: Sequence[str]) -> list[str]:
    """Return the commands that train the runs again, compare them with their starts, and make this report.

    Args:
        runs: The runs.
        study: The study's file and folder, or nothing.
        own: The arguments of the report.
    """
    commands = [command("study", study[0], "--output", study[1])] if study else []
    for run in runs:
        again = run.source.rstrip("/") + "-again"
        commands.append(command("train", f"{run.source.rstrip('/')}/recipe.yaml", "--set", f"output={again}"))
    for run in runs:
        if run.start is not None and (run.folder / "model").is_dir():
            best = "best" if (run.folder / "best").is_dir() else "model"
            commands.append(command("evaluate", run.start, f"{run.source.rstrip('/')}/{best}"))
    return [*commands, command("report", *own)]
