r"""What a study found, as one page of tables, figures and sentences, made from the files of its cells alone.

The difference of a method M to the baseline B under one sampler and number of steps is relative,

    D = (FID_M − FID_B)/FID_B,

for runs of the same seed; it is averaged over seeds, and where it says so over samplers. Its 95 % interval comes from
the cells' bootstrap replicates, averaged in the same way: replicate r resamples the same images in all cells, which
share their noise, so that what they have in common cancels. It is an interval over images, for the trained networks as
they are; how much another training would change is shown by the seeds, each by its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from scipy.stats import spearmanr

from robustdiff.errors import InputError
from robustdiff.evaluation.fidelity import interval
from robustdiff.files import atomic_write
from robustdiff.mismatch.measure import MEASURES
from robustdiff.report.figures import Line, fid_panels, loss_curves, save_figure
from robustdiff.study import Study, plan, reference_cells

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
        mark = "**" if self.high < 0 or self.low > 0 else ""
        return f"{mark}{self.mean:+.0%}{mark} ({self.low:+.0%} … {self.high:+.0%})".replace("-", "−")

    @property
    def confirmed(self) -> bool:
        """Whether the interval excludes 0 and all seeds agree in sign."""
        return (self.high < 0 and max(self.seeds) < 0) or (self.low > 0 and min(self.seeds) > 0)


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
        self.planned = 0
        self.missing: dict[str, int] = {}
        for run in plan(study, folder):
            for cell in run.cells:
                self.planned += 1
                if cell.done:
                    record = json.loads(cell.path.read_text(encoding="utf-8"))
                    self.cells[run.method, run.seed, cell.sampler, cell.steps] = record
                else:
                    self.missing[run.method] = self.missing.get(run.method, 0) + 1
        if not self.cells:
            raise InputError(f"no cells in {folder / 'cells'}: run the study first")
        present = {method for method, *_ in self.cells}
        self.references: dict[tuple[str, str, int], Record] = {}
        for cell in reference_cells(study, folder):
            self.planned += 1
            if cell.done:
                record = json.loads(cell.path.read_text(encoding="utf-8"))
                self.references[cell.network, cell.sampler, cell.steps] = record
            else:
                self.missing[cell.network] = self.missing.get(cell.network, 0) + 1
        self.mismatch: dict[tuple[str, int, str, int], Record] = {}
        for run in plan(study, folder):
            path = run.mismatch_path
            if path is not None and path.is_file():
                for found in json.loads(path.read_text(encoding="utf-8"))["paths"]:
                    self.mismatch[run.method, run.seed, found["sampler"], found["steps"]] = found
        self.methods = [method for method in study.methods if method in present]
        self.samplers = [s for s in study.measure.samplers if any(key[2] == s for key in self.cells)]
        self.steps = sorted({key[3] for key in self.cells})

    def seeds(self, method: str, sampler: str, steps: int) -> list[int]:
        """The seeds for which a cell is there."""
        return [s for s in self.study.methods[method].seeds if (method, s, sampler, steps) in self.cells]

    def values(self, method: str, sampler: str, steps: int, name: str = "fid") -> list[float]:
        """One number of each seed."""
        return [self.cells[method, s, sampler, steps][name] for s in self.seeds(method, sampler, steps)]

    def change(self, method: str, samplers: Iterable[str], steps: int) -> Change | None:
        """The difference of a method to the baseline, averaged over samplers and the seeds that both have.

        None where a cell is missing for every seed.
        """
        by_seed: dict[int, list[tuple[float, Array]]] = {}
        samplers = list(samplers)
        for seed in self.study.methods[method].seeds:
            for sampler in samplers:
                one = self.cells.get((method, seed, sampler, steps))
                base = self.cells.get((self.study.baseline, seed, sampler, steps))
                if one is not None and base is not None:
                    replicates = np.array(one["replicates"]) - np.array(base["replicates"])
                    by_seed.setdefault(seed, []).append(
                        ((one["fid"] - base["fid"]) / base["fid"], replicates / base["fid"])
                    )
        whole = {seed: parts for seed, parts in by_seed.items() if len(parts) == len(samplers)}
        if not whole:
            return None
        seeds = tuple(float(np.mean([value for value, _ in parts])) for parts in whole.values())
        replicates = np.mean([r for parts in whole.values() for _, r in parts], axis=0)
        mean = float(np.mean(seeds))
        return Change(mean, *interval(mean, replicates), seeds)


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
        parts.append(_table([f"{sampler}, steps", *map(str, results.steps)], rows))
    return "\n\n".join(parts)


def _references(results: Results) -> list[str]:
    """The networks that are there to compare with."""
    rows = [
        [name, f"{sampler} {steps}", f"{r['fid']:.2f} ({r['fid_ci'][0]:.2f} … {r['fid_ci'][1]:.2f})"]
        + [f"{r[measure]:.3f}" for measure in ("kid", "precision", "recall")]
        for (name, sampler, steps), r in results.references.items()
    ]
    heading = ["as they are", "sampler, steps", "FID (95 % interval)", "KID", "precision", "recall"]
    return [_table(heading, rows)] if rows else []


def _changes(results: Results, samplers: Sequence[str], heading: str) -> str:
    rows = []
    for method in results.methods:
        if method == results.study.baseline:
            continue
        changes = [results.change(method, samplers, steps) for steps in results.steps]
        if any(changes):
            seeds = max(len(change.seeds) for change in changes if change)
            rows.append([method, str(seeds), *("–" if change is None else str(change) for change in changes)])
    return _table([heading, "seeds", *map(str, results.steps)], rows)


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


def _mismatch(results: Results) -> list[str]:
    """FID beside each measure of the mismatch, and how their ranks agree."""
    keys = [key for key in results.mismatch if key in results.cells]
    if len({method for method, *_ in keys}) < 2:
        return []
    names = list(MEASURES)
    base = results.study.baseline
    rows, changes, counts = [], [], {name: [0, 0] for name in names}
    fids = [results.cells[key]["fid"] for key in keys]
    correlations = []
    for name in names:
        values = [abs(results.mismatch[key]["mean"][name]["value"]) for key in keys]
        correlations.append(f"{spearmanr(fids, values).statistic:+.2f}")
        signed = [
            (
                results.cells[key]["fid"] / results.cells[pair]["fid"],
                abs(results.mismatch[key]["mean"][name]["value"]) / abs(results.mismatch[pair]["mean"][name]["value"]),
            )
            for key in keys
            if key[0] != base and (pair := (base, *key[1:])) in keys
        ]
        changes.append(f"{spearmanr(*zip(*signed, strict=True)).statistic:+.2f}")
        counts[name] = [sum((fid < 1) == (other < 1) for fid, other in signed), len(signed)]
    agreement = [f"{same} of {total}" for same, total in counts.values()]
    summary = _table(
        ["", *names],
        [
            ["ranks of FID and measure, over all cells", *correlations],
            [f"ranks of their ratios to {base}", *changes],
            [f"cells where both move the same way from {base}", *agreement],
        ],
    )
    for key in keys:
        method, _, sampler, steps = key
        record = results.mismatch[key]["mean"]
        rows.append(
            [f"{sampler} {steps}, {method}", f"{results.cells[key]['fid']:.2f}"]
            + [f"{record[name]['value']:.3g}" for name in names]
        )
    meanings = "; ".join(f"`{name}`: {meaning}" for name, meaning in MEASURES.items())
    return [
        "## The mismatch beside FID",
        f"How far the states of each sampler are from q(x_t), averaged over its steps, with "
        f"{results.study.measure.mismatch:,} images on common random numbers; first seed. {meanings}.",
        f"Spearman's rank correlation with FID, of absolute values over {len(keys)} cells of method × sampler × steps. "
        "The first line is mostly that fewer steps are worse in both; the other two ask whether a method that changes "
        "FID changes the mismatch with it:",
        summary,
        "<details><summary>All cells</summary>",
        _table(["", "FID", *names], rows),
        "</details>",
    ]


def _cost(results: Results) -> str:
    rows = []
    for method in results.methods:
        record = next(record for (m, *_), record in results.cells.items() if m == method)
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


def _sensitivity(results: Results, steps: int) -> tuple[str, Figure] | None:
    """The α × K map of free adversarial training in ℓ2 without a radius."""
    found: dict[tuple[float, int], Change] = {}
    common: set[str] = set()
    for method in results.methods:
        record = next(record for (m, *_), record in results.cells.items() if m == method)
        adversary = record["recipe"]["adversary"]
        plain_settings = {k: v for k, v in record["recipe"].items() if k not in ("adversary", "seed", "output")}
        free = adversary["name"] == "free" and adversary["norm"] == "l2" and adversary["radius"] is None
        key = json.dumps(plain_settings, sort_keys=True)
        change = results.change(method, results.samplers, steps)
        if free and change is not None:
            if not common:
                common.add(key)
            if key in common:
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
    figure.colorbar(image, ax=panel, label=f"FID against {results.study.baseline}, %")
    figure.suptitle(f"{steps} steps, mean over {', '.join(results.samplers)}", fontsize=10)
    return table, figure


def _fid_figure(results: Results) -> Figure:
    """One line for each method, in the band of its seeds."""
    panels: dict[str, dict[str, Line]] = {}
    for sampler in results.samplers:
        panels[sampler] = {}
        for method in results.methods:
            values = {s: v for s in results.steps if (v := results.values(method, sampler, s))}
            panels[sampler][method] = Line(
                list(values),
                [float(np.mean(v)) for v in values.values()],
                [min(v) for v in values.values()],
                [max(v) for v in values.values()],
            )
    return fid_panels(panels, "mean over seeds; bands from the least to the largest")


def _pictures(results: Results, folder: Path, sampler: str, steps: int) -> Figure | None:
    """The first images of each method, all from the same noise."""
    rows = []
    for run in plan(results.study, folder):
        for cell in run.cells:
            path = cell.path.with_suffix(".png")
            if (cell.sampler, cell.steps) == (sampler, steps) and path.is_file():
                with Image.open(path) as image:
                    rows.append((run.method, np.asarray(image)))
    if not rows:
        return None
    figure = Figure(figsize=(6.4, 0.72 * len(rows) + 0.5), layout="constrained")
    for panel, (method, pixels) in zip(figure.subplots(len(rows), 1, squeeze=False)[:, 0], rows, strict=True):
        panel.imshow(pixels, cmap="gray", vmin=0, vmax=255)
        panel.set_xticks([])
        panel.set_yticks([])
        panel.set_ylabel(method, rotation=0, ha="right", va="center", fontsize=8)
    figure.suptitle(f"{sampler}, {steps} steps, the same noise in every row", fontsize=10)
    return figure


def _verdict(results: Results) -> str:
    """Which methods help where, in sentences made of the numbers."""
    lines = []
    for method in results.methods:
        if method == results.study.baseline:
            continue
        lower, higher, undecided = [], [], 0
        for sampler in results.samplers:
            for steps in results.steps:
                change = results.change(method, [sampler], steps)
                if change is None:
                    continue
                name = f"{sampler} {steps} ({change.mean:+.0%})".replace("-", "−")
                if change.high < 0 and max(change.seeds) < 0:
                    lower.append(name)
                elif change.low > 0 and min(change.seeds) > 0:
                    higher.append(name)
                else:
                    undecided += 1
        total = len(lower) + len(higher) + undecided
        if total:
            text = f"- **{method}**: lower in {len(lower)} of {total} cells"
            text += f" [{', '.join(lower)}]" if lower else ""
            text += f", higher in {len(higher)}" + (f" [{', '.join(higher)}]" if higher else "")
            lines.append(text + f", undecided in {undecided}.")
    return "\n".join(lines)


def write_page(study: Study, folder: Path, page: Path) -> str:
    """Write the page and its figures (into a folder beside it, of the page's name).

    Arguments:
        study: The study.
        folder: Where its cells are.
        page: The Markdown file.

    Returns:
        The page's text.

    Raises:
        InputError: If there are no cells.
    """
    results = Results(study, folder)
    figures = page.with_suffix("")
    figures.mkdir(parents=True, exist_ok=True)

    def figure(name: str, made: Figure, caption: str) -> str:
        save_figure(made, figures / f"{name}.png")
        return f"![{caption}]({figures.name}/{name}.png)"

    record = next(iter(results.cells.values()))
    recipe, measure = record["recipe"], record["measure"]
    middle = 10 if 10 in results.steps else results.steps[len(results.steps) // 2]
    training = record["training"]
    parts = [
        f"# {study.title}",
        f"Data: {training['data']}, {training['images']:,} images. Base: {recipe['model']['path'] or 'none'}. "
        f"{recipe['steps']:,} optimiser updates of batch {recipe['batch_size']}, learning rate {recipe['lr']:g}, "
        f"moving average {recipe['ema']:g}, {recipe['precision']}, unless a method says otherwise. "
        f"{measure['num']:,} images a cell from common noise, features `{measure['features']}`, "
        f"{record['threads']} thread of a {record['device']}, torch {record['torch']}. "
        f"{len(results.cells) + len(results.references)} of {results.planned} planned cells are there. "
        "This page is made by `robustdiff study` from the files of the cells.",
        "## What the numbers say",
        f"Against {study.baseline}, counted as lower or higher where the 95 % interval over images excludes 0 and all "
        "seeds agree:",
        _verdict(results),
        "## FID against the baseline, mean over samplers",
        f"Relative difference of FID to {study.baseline} at the same seed, averaged over "
        f"{', '.join(results.samplers)} and seeds, with the 95 % interval over images; bold where it excludes 0.",
        _changes(results, results.samplers, "steps"),
    ]
    if (sensitivity := _sensitivity(results, middle)) is not None:
        table, made = sensitivity
        parts += ["## Sensitivity to α and K", table, figure("sensitivity", made, "α × K")]
    parts += [
        "## FID",
        "Mean over seeds ± their standard deviation where there are several.",
        *_references(results),
        _fid_tables(results),
        figure("fid", _fid_figure(results), "FID against steps"),
        "## By sampler",
        *(_changes(results, [sampler], f"{sampler}, steps") for sampler in results.samplers),
        "## KID, precision, recall",
        _other_measures(results, middle),
        *_mismatch(results),
        "## Cost",
        _cost(results),
    ]
    curves = {}
    for run in plan(study, folder):
        if run.seed == study.methods[run.method].seeds[0] and run.path.is_file():
            curve = json.loads(run.path.read_text(encoding="utf-8"))
            curves[run.method] = (curve["step"], curve["loss"])
    if curves:
        parts.append(figure("loss", loss_curves(curves, "first seed of each method"), "Training loss"))
    parts.append("## Samples")
    for sampler in results.samplers:
        made_of = _pictures(results, folder, sampler, middle)
        if made_of is not None:
            name = f"samples-{sampler.replace('+', 'p')}"
            parts.append(figure(name, made_of, f"Samples of {sampler} at {middle} steps"))
    parts.append("## What was not run")
    if results.missing:
        missing = ", ".join(f"{method} ({n} cells)" for method, n in results.missing.items())
        parts.append(f"Of what the study file plans: {missing}.")
    if study.cut:
        parts.append(study.cut.strip())
    text = "\n\n".join(parts) + "\n"
    with atomic_write(page) as file:
        file.write(text.encode())
    return text
