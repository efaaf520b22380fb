r"""What a study found, as one page of tables, figures and sentences, made from the files of its cells alone.

The change from a baseline B to a method M under one sampler and number of steps is

    D = exp( mean of ln FID_M − ln FID_B ) − 1

over runs of the same seed, and where it says so over samplers: a geometric mean, so that M against B and B against M
are each other's inverse. Its 95 % interval comes from the cells' bootstrap replicates, centred at each cell's FID and
averaged in the same way: replicate r resamples the same images in all cells, which share their noise, so that what they
have in common cancels. It is an interval over images, for the trained networks as they are. How much another training
would change is shown by the seeds: each by its own, and the interval mean ± t_{n−1} · s/√n of Student's t over their n
values of ln(1 + D).
"""

from __future__ import annotations

import copy
import itertools
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr
from scipy.stats import t as student_t

from robustdiff.data.decode import open_image
from robustdiff.errors import InputError, printable
from robustdiff.files import atomic_write, make_folder
from robustdiff.metrics.bootstrap import interval
from robustdiff.mismatch.measure import MEASURES
from robustdiff.report.figures import (
    Figure,
    Line,
    default_settings,
    label,
    loss_curves,
    points,
    save_figure,
    step_panels,
)
from robustdiff.study import Study, plan, read_cell, read_failure, read_loss, read_mismatch, reference_cells

__all__ = ["Results", "write_page"]

Array = NDArray[np.float64]
Record = dict[str, Any]


@dataclass(frozen=True)
class Change:
    """A relative difference. Attributes: mean; low, high: its 95 % interval; seeds: the difference of each seed."""

    mean: float
    low: float
    high: float
    seeds: tuple[float, ...]

    def __str__(self) -> str:
        return _estimate(self.mean, self.low, self.high)

    @property
    def over_seeds(self) -> tuple[float, float]:
        """The 95 % interval over trainings, of two seeds or more."""
        logs = np.log1p(self.seeds)
        half = student_t.ppf(0.975, len(logs) - 1) * np.std(logs, ddof=1) / np.sqrt(len(logs))
        low, high = np.expm1([np.mean(logs) - half, np.mean(logs) + half]).tolist()
        return low, high

    @property
    def decided(self) -> int:
        """−1 or 1 where the interval over trainings, of two seeds or more, excludes 0, else 0."""
        low, high = self.over_seeds
        return -1 if high < 0 else int(low > 0)

    @property
    def direction(self) -> int:
        """−1 or 1 where the interval excludes 0 and all seeds agree in sign, else 0."""
        if self.high < 0 and max(self.seeds) < 0:
            return -1
        return int(self.low > 0 and min(self.seeds) > 0)


def _text(words: str) -> str:
    """Words from a file as they are: in one line, and not as Markdown, HTML or the end of a table's cell."""
    return re.sub(r"([\\`*_{}\[\]<>#|~$&])", r"\\\1", printable(" ".join(words.split())))


def _code(word: str) -> str:
    """A word from a file in a code span, within more backticks than it has."""
    fence = "`" * (1 + max(map(len, re.findall("`+", word)), default=0))
    space = " " if len(fence) > 1 else ""
    return f"{fence}{space}{printable(word)}{space}{fence}"


def _percent(value: float) -> str:
    return f"{value:+.1%}".replace("-", "−")


def _interval(low: float, high: float) -> str:
    return f"{_percent(low)} … {_percent(high)}"


def _estimate(mean: float, low: float, high: float) -> str:
    """A relative difference with its interval, bold where that excludes 0."""
    mark = "**" if high < 0 or low > 0 else ""
    return f"{mark}{_percent(mean)}{mark} ({_interval(low, high)})"


class Results:
    """The cells of a study that are there.

    Arguments:
        study: The study.
        folder: Where its cells are.

    Raises:
        InputError: If there is none.
    """

    def __init__(self, study: Study, folder: Path) -> None:
        self.study = study
        self.cells: dict[tuple[str, int, str, int], Record] = {}
        self.references: dict[tuple[str, str, int], Record] = {}
        self.mismatch: dict[tuple[str, int, str, int], Record] = {}
        self.missing: dict[str, int] = {}
        self.failed: dict[str, str] = {}
        self.planned = 0
        for run in plan(study, folder):
            for cell in run.cells:
                self.planned += 1
                if cell.done:
                    self.cells[run.method, run.seed, cell.sampler, cell.steps] = read_cell(cell, study, run)
            if run.missing:
                self.missing[run.name] = len(run.missing)
            if run.failure.is_file():
                self.failed[run.name] = read_failure(run)
            if (path := run.mismatch_path) is not None and path.is_file():
                for found in read_mismatch(path):
                    self.mismatch[run.method, run.seed, found["sampler"], found["steps"]] = found
        for cell in reference_cells(study, folder):
            self.planned += 1
            if cell.done:
                self.references[cell.network, cell.sampler, cell.steps] = read_cell(cell, study, None)
            else:
                self.missing[cell.network] = self.missing.get(cell.network, 0) + 1
        if not any(method == study.baseline for method, *_ in self.cells):
            raise InputError(f"no cells of {study.baseline} in {folder / 'cells'}: run the study first")
        present = {method for method, *_ in self.cells}
        self.methods = [method for method in study.methods if method in present]
        self.samplers = [s for s in study.measure.samplers if any(key[2] == s for key in self.cells)]
        self.steps = sorted({key[3] for key in self.cells})
        # References that stand beside the methods, and those of other samplers or numbers of steps: levels to reach.
        beside = {key for key in self.references if key[1] in self.samplers and key[2] in self.steps}
        self.beside = {key: record for key, record in self.references.items() if key in beside}
        self.levels = {key: record for key, record in self.references.items() if key not in beside}

    def seeds(self, method: str, sampler: str, steps: int) -> list[int]:
        """The seeds for which a cell is there."""
        return [s for s in self.study.methods[method].seeds if (method, s, sampler, steps) in self.cells]

    def values(self, method: str, sampler: str, steps: int, name: str = "fid") -> list[float]:
        """One number of each seed."""
        return [self.cells[method, s, sampler, steps][name] for s in self.seeds(method, sampler, steps)]

    def brightness(self, sampler: str, steps: int) -> dict[str, list[tuple[float, float]]]:
        """The mean grey value and FID of each training, by method, of the cells that hold both."""
        found: dict[str, list[tuple[float, float]]] = {}
        for (method, _, *own), record in self.cells.items():
            if own == [sampler, steps] and record["brightness"] is not None:
                found.setdefault(method, []).append((record["brightness"], record["fid"]))
        return found

    def record(self, method: str) -> Record:
        """One cell of a method that has some: all say the same of its recipe, but for the seed."""
        return next(record for (m, *_), record in self.cells.items() if m == method)

    def baseline(self, method: str) -> str:
        """The method that a method is compared with."""
        return self.study.methods[method].baseline or self.study.baseline

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Each method that is there with its baseline, and the further pairs that the study asks for."""
        own = [(method, self.baseline(method)) for method in self.methods if method != self.study.baseline]
        return list(dict.fromkeys([*own, *self.study.compare]))

    def change(self, method: str, samplers: Sequence[str], steps: int, baseline: str | None = None) -> Change | None:
        """The change from a baseline to a method, averaged over samplers and the seeds that both have whole.

        The baseline is the method's own by default. None where there is no such seed.
        """
        baseline = baseline or self.baseline(method)
        seeds = []
        for seed in self.study.methods[method].seeds:
            keys = [(seed, sampler, steps) for sampler in samplers]
            pairs = [(self.cells.get((method, *k)), self.cells.get((baseline, *k))) for k in keys]
            parts = [_log_fid(one) - _log_fid(base) for one, base in pairs if one is not None and base is not None]
            if len(parts) == len(keys):
                seeds.append(np.mean(parts, axis=0))
        return _change(seeds)

    def against_reference(self, method: str, sampler: str, steps: int, reference: Record) -> Change | None:
        """The change from a reference's cell to a method's, averaged over its seeds; None where there is none."""
        base = _log_fid(reference)
        found = [self.cells[method, seed, sampler, steps] for seed in self.seeds(method, sampler, steps)]
        return _change([_log_fid(record) - base for record in found])


def _change(seeds: Sequence[Array]) -> Change | None:
    """The mean over seeds of log ratios with their replicates, (1 + R,) each."""
    if not seeds:
        return None
    values, *replicates = np.transpose(seeds)
    value = float(np.mean(values))
    ends = interval(value, np.mean(replicates, axis=1))
    mean, low, high = np.expm1([value, *ends]).tolist()
    return Change(mean, low, high, tuple(np.expm1(values).tolist()))


def _log_fid(record: Record) -> Array:
    """ln FID, and of its replicates, which are centred at FID, since a bootstrap's own mean is too high; (1 + R,)."""
    replicates = np.array(record["replicates"])
    centred = replicates - replicates.mean() + record["fid"]
    # An FID near 0 has replicates below it.
    return np.log(np.maximum([record["fid"], *centred], 1e-3))


def _log(fid: float) -> float:
    return float(np.log(max(fid, 1e-3)))


def _table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(heading) + " |", "|---|" + "---:|" * (len(heading) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _mean(values: Sequence[float], form: str = ".2f") -> str:
    """Of the seeds, with their standard deviation."""
    if not values:
        return "–"
    spread = f" ± {np.std(values, ddof=1):{form}}" if len(values) > 1 else ""
    return f"{np.mean(values):{form}}{spread}"


def _fid_tables(results: Results) -> str:
    parts = []
    for sampler in results.samplers:
        rows = [
            [method, *(_mean(results.values(method, sampler, steps)) for steps in results.steps)]
            for method in results.methods
        ]
        for name in dict.fromkeys(name for name, own, _ in results.beside if own == sampler):
            found = [results.beside.get((name, sampler, steps)) for steps in results.steps]
            rows.append([f"{name}, as it is", *("–" if r is None else f"{r['fid']:.2f}" for r in found)])
        parts.append(_table([f"{sampler}, steps", *map(str, results.steps)], rows))
    return "\n\n".join(parts)


def _references(results: Results) -> list[str]:
    """The levels to reach."""
    rows = [
        [name, f"{sampler} {steps}", f"{r['fid']:.2f} ({r['fid_ci'][0]:.2f} … {r['fid_ci'][1]:.2f})"]
        + [f"{r[measure]:.3f}" for measure in ("kid", "precision", "recall")]
        for (name, sampler, steps), r in results.levels.items()
    ]
    heading = ["as they are", "sampler, steps", "FID (95 % interval)", "KID", "precision", "recall"]
    return [_table(heading, rows)] if rows else []


def _against_references(results: Results) -> list[str]:
    """FID over that of each reference at its largest number of steps, of those that are levels."""
    if not results.levels:
        return []
    parts = [
        "## FID over that of the references",
        "Ratio of FIDs, geometric mean over n seeds, with the 95 % interval over images.",
    ]
    best = {(name, sampler): steps for name, sampler, steps in sorted(results.levels)}  # the last one stays
    for (name, sampler), count in best.items():
        reference = results.levels[name, sampler, count]
        for own in results.samplers:
            rows = []
            for method in results.methods:
                changes = [results.against_reference(method, own, steps, reference) for steps in results.steps]
                cells = [
                    "–" if c is None else f"{1 + c.mean:.2f} ({1 + c.low:.2f} … {1 + c.high:.2f}), n = {len(c.seeds)}"
                    for c in changes
                ]
                rows.append([method, *cells])
            parts.append(_table([f"{own} over {name}, {sampler} {count}; steps", *map(str, results.steps)], rows))
    return parts


def _changes(results: Results, pairs: Sequence[tuple[str, str]], samplers: Sequence[str], heading: str) -> str:
    """The change of each pair that has some, by number of steps."""
    rows = []
    for method, baseline in pairs:
        changes = [results.change(method, samplers, steps, baseline) for steps in results.steps]
        if any(changes):
            name = method if baseline == results.study.baseline else f"{method} to {baseline}"
            cells = ["–" if change is None else f"{change}, n = {len(change.seeds)}" for change in changes]
            rows.append([name, *cells])
    return _table([heading, *map(str, results.steps)], rows)


def _spread(results: Results, steps: int) -> list[str]:
    """What other seeds change: each training's own difference at some steps, and intervals over trainings at all."""
    rows = []
    for method, baseline in results.pairs:
        change = results.change(method, results.samplers, steps, baseline)
        if change is not None and len(change.seeds) > 1:
            mark = "**" if change.decided else ""
            each = ", ".join(map(_percent, change.seeds))
            mean = f"{mark}{_percent(change.mean)}{mark}"
            rows.append([f"{method} to {baseline}", each, mean, _interval(*change.over_seeds)])
    if not rows:
        return []
    heading = [f"{steps} steps, mean over samplers", "each seed", "mean", "95 % interval over trainings"]
    by_sampler = []
    for count in results.steps:
        for method, baseline in results.pairs:
            changes = [results.change(method, [sampler], count, baseline) for sampler in results.samplers]
            cells = ["–" if c is None or len(c.seeds) < 3 else _over_seeds(c) for c in changes]
            if set(cells) != {"–"}:
                by_sampler.append([f"{method} to {baseline}, {count}", *cells])
    parts = [
        "## How much another training changes",
        "The intervals elsewhere on this page are over images, for networks as they were trained. These are over "
        "trainings (Student's t), which differ in the order of the data and in all noise; methods of the same seed "
        "begin with the same.",
        _table(heading, rows),
    ]
    if by_sampler:
        parts.append(_table(["steps; intervals over three trainings or more", *results.samplers], by_sampler))
    return parts


def _over_seeds(change: Change) -> str:
    return f"{_estimate(change.mean, *change.over_seeds)}, n = {len(change.seeds)}"


def _brightness(results: Results, steps: int) -> tuple[str, Figure] | None:
    """FID against the mean grey value of the images, over all trainings."""
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    ranks = []
    for sampler in results.samplers:
        found = results.brightness(sampler, steps)
        trainings = list(itertools.chain(*found.values()))
        if len(trainings) < 5:
            continue
        panels[sampler] = found
        ranks.append(f"{sampler} {_rank_correlation(trainings)} ({len(trainings)} networks)")
    if not panels:
        return None
    text = (
        f"FID at {steps} steps against the mean grey value of the images that it is measured on (0 to 255), over all "
        f"trainings. Spearman's rank correlation: {'; '.join(ranks)}. (Errors of the spatial mean are known as colour "
        "shifts: Deck & Bischoff, 2023, arXiv 2306.15832.)"
    )
    return text, points(panels, "mean grey value of the images", "FID (lower is better)", f"{steps} steps")


def _at_equal_brightness(results: Results, steps: int) -> list[str]:
    """What remains of each pair's difference at equal brightness: an analysis of covariance over trainings.

    ln FID is modelled as a_method + b·brightness + e. With b from the deviations from each method's mean, the adjusted
    difference of two methods is Δȳ − b·Δx̄, with the variance s²·(1/n₁ + 1/n₀ + Δx̄²/Σ(x − x̄)²).
    """
    rows: dict[tuple[str, str], dict[str, str]] = {pair: {} for pair in results.pairs}
    for sampler in results.samplers:
        found = results.brightness(sampler, steps)
        logs = {method: np.array([(grey, _log(fid)) for grey, fid in own]) for method, own in found.items()}
        means = {method: own.mean(axis=0) for method, own in logs.items()}
        freedom = sum(len(own) - 1 for own in logs.values()) - 1
        if freedom < 2:
            continue
        x, y = np.concatenate([own - means[method] for method, own in logs.items()]).T
        squares = x @ x
        slope = x @ y / squares
        variance = np.sum((y - slope * x) ** 2) / freedom
        for method, baseline in rows:
            if method in means and baseline in means:
                dx, dy = means[method] - means[baseline]
                each = 1 / len(logs[method]) + 1 / len(logs[baseline]) + dx**2 / squares
                half = student_t.ppf(0.975, freedom) * np.sqrt(variance * each)
                value = dy - slope * dx
                rows[method, baseline][sampler] = _estimate(*np.expm1([value, value - half, value + half]).tolist())
    samplers = [sampler for sampler in results.samplers if any(sampler in row for row in rows.values())]
    if not samplers:
        return []
    return [
        "What remains at equal brightness, with the 95 % interval over trainings (analysis of covariance: ln FID on "
        "the method and on brightness, with one slope for all). Brightness comes of the training, too: what a method "
        "changes through it is not in these numbers.",
        _table(
            [f"{steps} steps", *samplers],
            [
                [f"{method} to {baseline}", *(row.get(sampler, "–") for sampler in samplers)]
                for (method, baseline), row in rows.items()
                if row
            ],
        ),
    ]


def _other_measures(results: Results, steps: int) -> str:
    rows = []
    for method in results.methods:
        row = [method]
        for sampler in results.samplers:
            kid = results.values(method, sampler, steps, "kid")
            precision = results.values(method, sampler, steps, "precision")
            recall = results.values(method, sampler, steps, "recall")
            row.append(f"{np.mean(kid):.3f} / {np.mean(precision):.3f} / {np.mean(recall):.3f}" if kid else "–")
        rows.append(row)
    return _table([f"{steps} steps: KID / precision / recall", *results.samplers], rows)


def _excess(record: Record, name: str) -> float:
    """How far a measure is above what equal laws give: its floor, or for those that may have either sign 0."""
    estimate = record["mean"][name]
    return abs(estimate["value"]) if estimate["floor"] is None else estimate["value"] - estimate["floor"]


def _rank_correlation(pairs: Sequence[tuple[float, float]]) -> str:
    return f"{spearmanr(*zip(*pairs, strict=True)).statistic:+.2f}".replace("-", "−") if len(pairs) > 2 else "–"


def _mismatch(results: Results) -> list[str]:
    """FID beside each measure of the mismatch, and how their ranks agree."""
    keys = [key for key in results.mismatch if key in results.cells]
    if len({method for method, *_ in keys}) < 2:
        return []
    pairs = [(key, pair) for key in keys if (pair := (results.baseline(key[0]), *key[1:])) in keys and pair != key]
    levels, changes, agreement = [], [], []
    for name in MEASURES:
        amounts = {key: _excess(results.mismatch[key], name) for key in keys}
        fids = {key: results.cells[key]["fid"] for key in keys}
        levels.append(_rank_correlation([(fids[key], amounts[key]) for key in keys]))
        moved = [(_log(fids[key]) - _log(fids[pair]), amounts[key] - amounts[pair]) for key, pair in pairs]
        changes.append(_rank_correlation(moved))
        agreement.append(f"{sum((fid < 0) == (amount < 0) for fid, amount in moved)} of {len(moved)}")
    summary = _table(
        ["", *MEASURES],
        [
            [f"ranks of FID and measure, {len(keys)} cells", *levels],
            [f"ranks of their changes from the baseline, {len(pairs)} pairs", *changes],
            ["pairs in which both move the same way", *agreement],
        ],
    )
    rows = [
        [f"{sampler} {steps}, {method}", f"{results.cells[method, seed, sampler, steps]['fid']:.2f}"]
        + [f"{results.mismatch[method, seed, sampler, steps]['mean'][name]['value']:.3g}" for name in MEASURES]
        for method, seed, sampler, steps in keys
    ]
    meanings = "; ".join(f"`{name}`: {meaning}" for name, meaning in MEASURES.items())
    return [
        "## The mismatch beside FID",
        "How far the states of each sampler are from q(x_t), averaged over its steps, with "
        f"{results.study.measure.mismatch:,} images on common random numbers; first seed. {meanings}.",
        "Spearman's rank correlation with FID over method × sampler × steps, of what a measure has above its floor (of "
        "the absolute value, where it has none). The first line compares samplers and numbers of steps as well as "
        "methods; the others ask whether a method that changes FID changes the mismatch with it. They describe these "
        "networks: the cells of one method are one network, and all share their images.",
        summary,
        "<details><summary>All cells</summary>",
        _table(["", "FID", *MEASURES], rows),
        "</details>",
    ]


def _cost(results: Results) -> str:
    rows = []
    for method in results.methods:
        record = results.record(method)
        recipe, training = record["recipe"], record["training"]
        images = training["batches"] * recipe["batch_size"]
        rows.append(
            [
                method,
                f"{training['steps']:,}",
                f"{training['backward_passes']:,}",
                f"{images:,}",
                f"{training['delta_norm']:.2f}",
            ]
        )
    return _table(["", "updates", "backward passes", "images drawn", "last ‖δ‖, in the method's norm"], rows)


@default_settings()
def _sensitivity(results: Results, steps: int) -> tuple[str, Figure] | None:
    """The α × K map of free adversarial training in ℓ2 without a radius."""
    # With one seed for all: a mean of several beside a single one would compare seeds.
    of_first = copy.copy(results)
    methods = {m: config.model_copy(update={"seeds": config.seeds[:1]}) for m, config in results.study.methods.items()}
    of_first.study = results.study.model_copy(update={"methods": methods})
    found: dict[tuple[float, int], Change] = {}
    settings: set[str] = set()
    for method in results.methods:
        recipe = results.record(method)["recipe"]
        adversary = recipe["adversary"]
        free = adversary["name"] == "free" and adversary["norm"] == "l2" and adversary["radius"] is None
        change = of_first.change(method, results.samplers, steps)
        if not free or change is None:
            continue
        # Those that differ from the first one in α and K alone.
        rest = {k: v for k, v in recipe.items() if k not in ("adversary", "seed", "output", "sampler")}
        settings = settings or {json.dumps(rest, sort_keys=True)}
        if json.dumps(rest, sort_keys=True) in settings:
            found[adversary["step_size"], adversary["steps"]] = change
    if len(found) < 3:
        return None
    alphas, counts = sorted({a for a, _ in found}), sorted({k for _, k in found})
    rows = [[f"K = {k}", *(str(found.get((a, k), "–")) for a in alphas)] for k in counts]
    table = _table([f"{steps} steps", *(f"α = {a:g}" for a in alphas)], rows)
    grid = np.array([[found[a, k].mean if (a, k) in found else np.nan for a in alphas] for k in counts])
    figure = Figure(figsize=(1.6 + 1.0 * len(alphas), 1.4 + 0.6 * len(counts)), layout="constrained")
    panel = figure.subplots()
    limit = max(0.05, float(np.nanmax(np.abs(grid))))
    image = panel.imshow(100 * grid, cmap="RdBu_r", vmin=-100 * limit, vmax=100 * limit, aspect="auto")
    for i, j in np.argwhere(~np.isnan(grid)):
        dark = abs(grid[i, j]) > 0.6 * limit
        panel.text(j, i, f"{grid[i, j]:+.0%}", ha="center", va="center", fontsize=9, color="w" if dark else "k")
    panel.set_xticks(range(len(alphas)), [f"{a:g}" for a in alphas])
    panel.set_yticks(range(len(counts)), [str(k) for k in counts])
    panel.set_xlabel("step size α (ℓ2 units of one image)")
    panel.set_ylabel("passes K")
    figure.colorbar(image, ax=panel, label=label(f"FID against {results.study.baseline}, %"))
    figure.suptitle(f"{steps} steps, mean over {', '.join(results.samplers)}; first seed", fontsize=10)
    return table, figure


def _fid_figure(results: Results) -> Figure:
    """One line for each training; none of the methods that have a point alone, unless all do."""
    counts = {m: len({steps for method, _, _, steps in results.cells if method == m}) for m in results.methods}
    methods = [m for m in results.methods if counts[m] > 1 or max(counts.values()) == 1]
    panels: dict[str, dict[str, list[Line]]] = {sampler: {} for sampler in results.samplers}
    for sampler, groups in panels.items():
        for method in methods:
            fids: dict[int, dict[int, float]] = {}
            for (name, seed, own, steps), record in sorted(results.cells.items()):
                if (name, own) == (method, sampler):
                    fids.setdefault(seed, {})[steps] = record["fid"]
            groups[method] = [_without_band(of_seed) for of_seed in fids.values()]
        for name in dict.fromkeys(name for name, own, _ in results.beside if own == sampler):
            as_it_is = {
                n: r["fid"] for (one, own, n), r in sorted(results.beside.items()) if (one, own) == (name, sampler)
            }
            groups[f"{name}, as it is"] = [_without_band(as_it_is)]
    levels = {f"{name}, {sampler} {n}": record["fid"] for (name, sampler, n), record in results.levels.items()}
    return step_panels(panels, "one line for each training", levels)


def _without_band(fids: dict[int, float]) -> Line:
    return Line(list(fids), *[list(fids.values())] * 3)


def _picture(path: Path) -> NDArray[np.uint8]:
    """The pixels of a cell's picture."""
    try:
        with open_image(path) as image:
            if image.width * image.height > 2**26:
                raise InputError(f"{printable(path)} is a picture of {image.width}×{image.height} pixels: remove it")
            return np.asarray(image.convert("L" if image.mode == "L" else "RGB"))
    except InputError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly all there are on damaged files
        raise InputError(f"{printable(path)} is no picture ({printable(str(error))}): remove it") from None


@default_settings()
def _pictures(results: Results, folder: Path, sampler: str, steps: int) -> Figure | None:
    """The first images of each method, all from the same noise."""
    rows = []
    for run in plan(results.study, folder):
        for cell in run.cells if run.first else ():
            path = cell.path.with_suffix(".png")
            if (cell.sampler, cell.steps) == (sampler, steps) and path.is_file():
                rows.append((run.method, _picture(path)))
    if not rows:
        return None
    figure = Figure(figsize=(6.4, 0.72 * len(rows) + 0.5), layout="constrained")
    for panel, (method, pixels) in zip(figure.subplots(len(rows), 1, squeeze=False)[:, 0], rows, strict=True):
        panel.imshow(pixels, cmap="gray", vmin=0, vmax=255)
        panel.set_xticks([])
        panel.set_yticks([])
        panel.set_ylabel(label(method), rotation=0, ha="right", va="center", fontsize=8)
    figure.suptitle(f"{sampler}, {steps} steps, the same noise in every row", fontsize=10)
    return figure


def _chance(results: Results, steps: int) -> dict[str, tuple[float, float]]:
    """How far apart trainings are that differ in their seed alone, by the baseline of those with a common one.

    The standard deviation of ln FID, and the difference of two trainings in it that 95 % of such pairs stay below.
    """
    variances: dict[str, list[tuple[int, float]]] = {}
    baselines = {results.baseline(method) for method in results.methods}
    for method in results.methods:
        seeds = set.intersection(*(set(results.seeds(method, sampler, steps)) for sampler in results.samplers))
        if len(seeds) > 1:
            logs = [[_log(results.cells[method, s, own, steps]["fid"]) for own in results.samplers] for s in seeds]
            found = len(seeds) - 1, float(np.var(np.mean(logs, axis=1), ddof=1))
            variances.setdefault(method if method in baselines else results.baseline(method), []).append(found)
    levels = {}
    for baseline, group in variances.items():
        freedom = sum(n for n, _ in group)
        deviation = np.sqrt(sum(n * variance for n, variance in group) / freedom)
        bound = student_t.ppf(0.975, freedom) * np.sqrt(2) * deviation
        levels[baseline] = float(deviation), float(bound)
    return levels


def _over_trainings(results: Results, steps: int) -> list[str]:
    """What the seeds say of each pair that has several."""
    lines = []
    for method, baseline in results.pairs:
        change = results.change(method, results.samplers, steps, baseline)
        if change is None or len(change.seeds) < 2:
            continue
        word = {-1: "lower", 0: "undecided", 1: "higher"}[change.decided]
        text = (
            f"- **{method}** to {baseline}: {_percent(change.mean)} ({_interval(*change.over_seeds)}, "
            f"{len(change.seeds)} trainings): {word}."
        )
        alone = {sampler: results.change(method, [sampler], steps, baseline) for sampler in results.samplers}
        decided = [
            f"{sampler} {_percent(own.mean)} ({_interval(*own.over_seeds)})"
            for sampler, own in alone.items()
            if len(alone) > 1 and own is not None and own.decided  # seeds that are whole are so in each sampler
        ]
        lines.append(text + (f" By sampler: {', '.join(decided)}." if decided else ""))
    return lines


def _single_trainings(results: Results, steps: int) -> list[str]:
    """Which methods of one training are further from their baseline than chance explains."""
    lines = []
    for baseline, (deviation, bound) in _chance(results, steps).items():
        text = (
            f"- Trainings of {baseline} and of what is compared with it that differ in their seed alone have FIDs with "
            f"a standard deviation of {np.expm1(deviation):.1%}: two of them are up to {np.expm1(bound):.0%} apart by "
            "chance (95 %)."
        )
        compared = [method for method, other in results.pairs if other == baseline == results.baseline(method)]
        changes = {method: results.change(method, results.samplers, steps) for method in compared}
        single = [(own.mean, method) for method, own in changes.items() if own is not None and len(own.seeds) == 1]
        for beyond, word in ((True, "further"), (False, "no further")):
            these = [(mean, method) for mean, method in sorted(single) if (abs(np.log1p(mean)) > bound) == beyond]
            if these:
                named = ", ".join(f"{method} ({_percent(mean)})" for mean, method in these)
                text += f" With one training, and {word} from {baseline} than that: {named}."
        lines.append(text)
    return lines


def _beside_references(results: Results, steps: int) -> list[str]:
    """How far the baseline, and the best of as many trainings, are from each network as it is."""
    lines = []
    for name in dict.fromkeys(name for name, *_ in results.beside):
        changes: dict[str, float] = {}
        trainings: dict[str, int] = {}
        for method in results.methods:
            each = [
                results.against_reference(method, sampler, steps, results.beside[name, sampler, steps])
                for sampler in results.samplers
                if (name, sampler, steps) in results.beside
            ]
            whole = [change for change in each if change is not None]
            if len(whole) == len(results.samplers):
                changes[method] = float(np.expm1(np.mean([np.log1p(change.mean) for change in whole])))
                trainings[method] = min(len(change.seeds) for change in whole)
        own = results.study.baseline
        if own in changes:
            # The lowest of many single trainings would be low by chance.
            best = min((m for m in changes if trainings[m] >= trainings[own]), key=lambda method: changes[method])
            rest = "" if best == own else f", {best}, {_percent(changes[best])}"
            lines.append(
                f"- Against {name}, as it is: {own} {_percent(changes[own])}{';' if rest else ','} "
                f"the lowest with as many trainings{rest}."
            )
    return lines


def _verdict(results: Results) -> str:
    """Which networks are better where, in sentences made of the numbers; first those of most trainings."""
    lines = []
    for method in results.methods:
        if method == results.study.baseline:
            continue
        found: dict[int, list[str]] = {-1: [], 0: [], 1: []}
        seeds = set()
        for sampler, steps in itertools.product(results.samplers, results.steps):
            if (change := results.change(method, [sampler], steps)) is not None:
                found[change.direction].append(f"{sampler} {steps} ({_percent(change.mean)})")
                seeds.add(len(change.seeds))
        total = sum(map(len, found.values()))
        if not total:
            continue
        to = "" if results.baseline(method) == results.study.baseline else f" (against {results.baseline(method)})"
        several = f"{min(seeds)} to {max(seeds)}" if len(seeds) > 1 else str(*seeds)
        text = f"- **{method}**{to}, {several} of {len(results.study.methods[method].seeds)} seed(s): "
        for direction, word in ((-1, "lower"), (1, "higher")):
            text += f"{word} in {len(found[direction])} of {total} cells"
            text += f" [{', '.join(found[direction])}]; " if found[direction] else "; "
        lines.append((-max(seeds), f"{text}undecided in {len(found[0])}."))
    return "\n".join(line for _, line in sorted(lines, key=itemgetter(0)))


def _obtained_on(results: Results) -> str:
    """What the cells say they were made on."""
    records = [*results.cells.values(), *results.references.values()]
    measure = results.study.measure
    data = measure.data.name if measure.data is not None else next(iter(results.cells.values()))["training"]["data"]
    machines = sorted({_text(f"{r['threads']} thread(s) of a {r['device']}, torch {r['torch']}") for r in records})
    return (
        f"{measure.num:,} images a cell from common noise, against the images of {_text(data)} on the features "
        f"{_code(measure.features)}; {'; '.join(machines)}. "
        f"{len(records)} of {results.planned} planned cells are there."
    )


def _check_settings(results: Results) -> None:
    """See that the cells say what the page says of how they were made."""
    for (method, *key), record in results.cells.items():
        needed = {name: record[name] for name in ("threads", "device", "torch")}
        needed |= {f"training.{name}": value for name, value in record["training"].items()}
        _check_given(f"{method}-s{'-'.join(map(str, key))}", needed)
    for (name, *key), record in results.references.items():
        of_reference = {part: record[part] for part in ("threads", "device", "torch", "fid_ci")}
        _check_given("-".join(map(str, (name, *key))), of_reference)


def _check_given(cell: str, settings: Record) -> None:
    if missing := [name for name, value in settings.items() if value is None]:
        raise InputError(f"the cell {cell} does not say its {missing[0]}: delete its file, and run the study again")


def write_page(study: Study, folder: Path, page: Path) -> str:
    """Write the page and its figures (into a folder beside it, of the page's name).

    Arguments:
        study: The study.
        folder: Where its cells are.
        page: The Markdown file.

    Returns:
        The page's text.

    Raises:
        InputError: If there are no cells of the baseline, or the page does not end in .md.
    """
    if page.suffix != ".md":
        raise InputError(f"{page}: give a file that ends in .md")
    results = Results(study, folder)
    _check_settings(results)
    figures = page.with_suffix("")
    make_folder(figures)

    def figure(name: str, made: Figure, caption: str) -> str:
        save_figure(made, figures / f"{name}.png")
        return f"![{caption}]({quote(figures.name)}/{name}.png)"

    several = len(results.samplers) > 1
    recipe, training = (results.record(study.baseline)[part] for part in ("recipe", "training"))
    middle = 10 if 10 in results.steps else results.steps[len(results.steps) // 2]
    parts = [
        f"# {_text(study.title)}",
        f"Trained on {_text(training['data'])}, {training['images']:,} images. "
        f"Base: {_text(recipe['model']['path'] or 'none')}. "
        f"{recipe['steps']:,} optimiser updates of batch {recipe['batch_size']}, learning rate {recipe['lr']:g} "
        f"({recipe['lr_schedule']}), moving average {recipe['ema']}, {recipe['precision']}, unless a method says "
        f"otherwise. {_obtained_on(results)} This page is made by `robustdiff study` from the files of the cells.",
    ]
    if verdict := _verdict(results):  # of what there is to compare
        parts.append("## What the numbers say")
        if lines := [
            *_over_trainings(results, middle),
            *_single_trainings(results, middle),
            *_beside_references(results, middle),
        ]:
            parts += [
                f"FID at {middle} steps, {'mean over samplers, ' if several else ''}with the 95 % interval over "
                f"trainings{'; a sampler is named where its own excludes 0' if several else ''}:",
                "\n".join(lines),
            ]
        parts += [
            f"For the networks as they were trained, against {study.baseline}, counted as lower or higher where the "
            "95 % interval over images excludes 0 and all seeds that are there agree (one interval in twenty excludes "
            "0 by chance, and a single seed agrees with itself):",
            verdict,
            f"## FID against {study.baseline}" + (", mean over samplers" if several else ""),
            f"Relative change of FID from {study.baseline}, or what else is named, at the same seed, geometric mean "
            f"over {', '.join(results.samplers) + ' and ' if several else ''}n seeds, with the 95 % interval over "
            "images; bold where it excludes 0.",
            _changes(results, results.pairs, results.samplers, "steps"),
            *_spread(results, middle),
        ]
    if (brightness := _brightness(results, middle)) is not None:
        text, made = brightness
        parts += [text, figure("brightness", made, "FID against brightness")]
        parts += _at_equal_brightness(results, middle)
    if (sensitivity := _sensitivity(results, middle)) is not None:
        table, made = sensitivity
        parts += ["## Sensitivity to α and K", table, figure("sensitivity", made, "α × K")]
    parts += [
        "## FID",
        "Mean over seeds ± their standard deviation where there are several.",
        *_references(results),
        _fid_tables(results),
        figure("fid", _fid_figure(results), "FID against steps"),
        *_against_references(results),
    ]
    if verdict and several:
        parts.append("## By sampler")
        parts += [_changes(results, results.pairs, [sampler], f"{sampler}, steps") for sampler in results.samplers]
    parts += [
        "## KID, precision, recall",
        _other_measures(results, middle),
        *_mismatch(results),
        "## Cost",
        "An adversary of K passes makes K updates on each batch, free and random alike: for as many updates it draws a "
        "K-th of the images that plain training draws.",
        _cost(results),
    ]
    curves = {}
    for run in plan(study, folder):
        if run.first and run.path.is_file():
            curves[run.method] = read_loss(run)
    if curves:
        parts.append(figure("loss", loss_curves(curves, "first seed of each method"), "Training loss"))
    parts.append("## Samples")
    for sampler in results.samplers:
        made_of = _pictures(results, folder, sampler, middle)
        if made_of is not None:
            name = f"samples-{sampler.replace('+', 'p')}"
            parts.append(figure(name, made_of, f"Samples of {sampler} at {middle} steps"))
    if results.missing or results.failed or study.cut:
        parts.append("## What was not run")
    if results.missing:
        missing = ", ".join(f"{name} ({n})" for name, n in results.missing.items())
        parts.append(f"Of what the study file plans, by run and number of files: {missing}.")
    for name, error in results.failed.items():
        parts.append(f"The training {name} failed: {_text(error)}.")
    parts += [_text(paragraph) for paragraph in re.split(r"\n\s*\n", study.cut) if paragraph.strip()]
    text = "\n\n".join(parts) + "\n"
    with atomic_write(page) as file:
        file.write(text.encode())
    return text
