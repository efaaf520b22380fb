"""The parts of a study's page with the numbers of each method and reference: FID, the other measures, the mismatch."""

from __future__ import annotations

import itertools
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from robustdiff.metrics.bootstrap import BLOCKS, interval
from robustdiff.metrics.metric import number_named
from robustdiff.mismatch.measure import MEASURES as MISMATCHES
from robustdiff.notation import number
from robustdiff.report.figures import MARKERS, REFERENCE, ROLES, Figure, Line, step_panels
from robustdiff.report.words import (
    NOTHING,
    code_span,
    columns,
    filled,
    mean_over_seeds,
    saved_figure,
    shown_correlation,
    table,
    titles,
)
from robustdiff.study.analysis import (
    levels,
    main_methods,
    mean_terms,
    mismatch_agreement,
    mismatch_pairs,
    roles,
    values,
)
from robustdiff.study.store import MEASURES, Results

__all__ = [
    "fid_interval",
    "further_measures",
    "levels_section",
    "method_styles",
    "mismatch_section",
    "other_measures",
]

FID, *OTHERS = MEASURES


def method_styles(results: Results) -> dict[str, tuple[str, str]]:
    """Return the colour and marker of each method: those of what it does, and shades first for the main methods."""
    found: dict[str, tuple[str, str]] = {}
    shades = {role: itertools.cycle(colours) for role, colours in ROLES.items()}
    role_of = roles(results)
    for method in dict.fromkeys([*main_methods(results), *results.methods]):
        found[method] = next(shades[role_of[method]]), MARKERS[len(found) % len(MARKERS)]
    return found


def _by_columns(results: Results, measure: str = FID, form: str = ".2f") -> list[str]:
    """Return the tables of a measure: the mean of each method, and what references beside them have."""
    parts = []
    beside = levels(results, beside=True)
    for heading, names, keys in columns(results):
        rows = [
            [method, *(mean_over_seeds(values(results, method, *key, measure), form) for key in keys)]
            for method in results.methods
        ]
        for name in dict.fromkeys(name for name, *_ in beside):
            records = [beside.get((name, *key), {"numbers": {}}) for key in keys]
            found = [record["numbers"].get(measure) for record in records]
            rows.append([f"{name}, as it is", *(NOTHING if x is None else number(x, form) for x in found)])
        if rows := filled(rows):
            parts.append(table([heading, *names], rows))
    return parts


def levels_section(results: Results, folder: Path) -> list[str]:
    """Return the FID of methods and references."""
    parts = ["## FID", "Mean over seeds ± their standard deviation where there are several.", *_references(results)]
    parts += [*_by_columns(results), *_terms(results, results.middle_steps)]
    if len(results.steps) == 1 and not levels(results):  # columns of points, which are in the table
        return parts
    return [*parts, saved_figure(folder, "fid", *_fid_figure(results))]


def fid_interval(record: dict[str, Any]) -> tuple[float, float]:
    """Return the 95 % interval of the FID of a cell over its images."""
    blocks = record["blocks"].get(FID, BLOCKS)
    return interval(record["numbers"][FID], np.array(record["replicates"]), blocks, log=True)


def _fid_of(record: dict[str, Any]) -> str:
    """Return the FID of a cell with the interval over its images."""
    low, high = fid_interval(record)
    return f"{number(record['numbers'][FID], '.2f')} ({number(low, '.2f')} … {number(high, '.2f')})"


def _kid_of(record: dict[str, Any]) -> str:
    return f"{number(record['numbers']['kid'], '.3f')} ± {record['kid_se']:.3f}"


def _references(results: Results) -> list[str]:
    """Return the table of the reference levels."""
    rows = [
        [name, f"{sampler} {steps}", _fid_of(r), _kid_of(r)]
        + [f"{r['numbers'][measure]:.3f}" for measure in OTHERS if measure != "kid"]
        for (name, sampler, steps), r in levels(results).items()
    ]
    others = [name for name in OTHERS if name != "kid"]
    heading = ["as they are", "sampler, steps", "FID (95 % interval)", "KID ± standard error", *titles(others)]
    return [table(heading, rows)] if rows else []


def _terms(results: Results, steps: int) -> list[str]:
    """Return the mean term of FID and the rest of it, of the methods whose cells hold it."""
    rows = []
    for method in results.methods:
        row = []
        for sampler in results.samplers:
            means = mean_terms(results, method, sampler, steps)
            if means:
                rest = np.mean(values(results, method, sampler, steps)) - np.mean(means)
                row.append(f"{np.mean(means):.2f} + {rest:.2f}")
            else:
                row.append(NOTHING)
        rows.append([method, *row])
    if not (rows := filled(rows)):
        return []
    return [
        "The terms of FID, means over seeds: the squared distance of the mean features, and what the covariances add.",
        table([f"{steps} steps: means + covariances", *results.samplers], rows),
    ]


def _fid_figure(results: Results) -> tuple[Figure, str]:
    """Draw FID against steps: its mean over trainings, and a thin line for each training if there are several.

    Methods with one point are left out, unless all have one.

    Returns:
        The figure, and its caption.
    """
    counts = {m: len({steps for method, _, _, steps in results.cells if method == m}) for m in results.methods}
    methods = [m for m in results.methods if counts[m] > 1 or max(counts.values()) == 1]
    styles = method_styles(results)
    beside = sorted(levels(results, beside=True).items(), key=lambda item: item[0][2])
    panels: dict[str, dict[str, list[Line]]] = {sampler: {} for sampler in results.samplers}
    for sampler, groups in panels.items():
        for method in methods:
            fids: dict[int, dict[int, float]] = {}
            for (name, seed, own, steps), record in sorted(results.cells.items(), key=itemgetter(0)):
                if (name, own) == (method, sampler):
                    fids.setdefault(seed, {})[steps] = record["numbers"][FID]
            means = {n: float(np.mean(of)) for n in results.steps if (of := values(results, method, sampler, n))}
            groups[method] = [_without_band(means)]
            if len(fids) > 1:
                groups[method] += [_without_band(of_seed, thin=True) for of_seed in fids.values()]
        as_they_are: dict[str, dict[int, float]] = {}
        for (name, own, steps), record in beside:
            if own == sampler:
                as_they_are.setdefault(name, {})[steps] = record["numbers"][FID]
        groups |= {f"{name}, as it is": [_without_band(of_name)] for name, of_name in as_they_are.items()}
        styles |= dict.fromkeys((f"{name}, as it is" for name in as_they_are), REFERENCE)
    dashed = {f"{name}, {sampler} {n}": r["numbers"][FID] for (name, sampler, n), r in levels(results).items()}
    several = any(line.thin for groups in panels.values() for lines in groups.values() for line in lines)
    caption = "FID against steps" + (": means over trainings, and single trainings as thin lines" if several else "")
    return step_panels(panels, dashed, styles=styles), caption


def _without_band(fids: dict[int, float], *, thin: bool = False) -> Line:
    return Line(list(fids), *[list(fids.values())] * 3, thin=thin)


def other_measures(results: Results, steps: int) -> list[str]:
    """Return KID, precision and recall of methods and of real images."""
    rows = []
    for method in results.methods:
        row = [method]
        for sampler in results.samplers:
            found = [values(results, method, sampler, steps, measure) for measure in OTHERS]
            means = [number(float(np.mean(each)), ".3f") for each in found if each]
            error = _kid_error(results, method, sampler, steps)
            if error is not None:
                means[0] += f" ± {error:.3f}"
            row.append(" / ".join(means) or NOTHING)
        rows.append(row)
    text = (
        "Means over seeds. KID has its standard error: over trainings where there are several, else over groups of "
        "images of the one."
    )
    heading = f"## {', '.join(titles(OTHERS))}"
    return [
        heading,
        text,
        table([f"{steps} steps: {' / '.join(titles(OTHERS))}", *results.samplers], rows),
        *_real(results),
    ]


def _real(results: Results) -> list[str]:
    """Return the numbers of other real images."""
    real = results.real
    if real is None:
        return []
    numbers, data = real["numbers"], real["measure"]["real"]
    row = ["real images", _fid_of(real), _kid_of(real)]
    row += [f"{numbers[name]:.3f}" for name in OTHERS if name != "kid"]
    heading = ["", "FID (95 % interval)", "KID ± standard error", *titles(name for name in OTHERS if name != "kid")]
    return [
        f"{real['n']:,} other real images (the split {code_span(data['split'])} of {code_span(data['name'])}), "
        "measured as generated ones are:",
        table(heading, [row]),
    ]


def _kid_error(results: Results, method: str, sampler: str, steps: int) -> float | None:
    """Return the standard error of the mean of KID, over trainings if there are several."""
    found = values(results, method, sampler, steps, "kid")
    if len(found) > 1:
        return float(np.std(found, ddof=1) / np.sqrt(len(found)))
    own = [r["kid_se"] for (name, _, *cell), r in results.cells.items() if (name, *cell) == (method, sampler, steps)]
    return own[0] if own else None


def further_measures(results: Results) -> list[str]:
    """Return the tables of the numbers that the study measures besides those of every cell."""
    parts = []
    for name in dict.fromkeys(name for record in results.cells.values() for name in record["numbers"]):
        if name in MEASURES:
            continue
        form = number_named(name).format
        parts.append(f"## {number_named(name).title}")
        parts.append("Mean over seeds ± their standard deviation where there are several.")
        parts += _by_columns(results, name, form)
        rows = [
            [f"{reference}, as it is", f"{sampler} {steps}", number(record["numbers"][name], form)]
            for (reference, sampler, steps), record in levels(results).items()
            if name in record["numbers"]
        ]
        parts += [table(["", "sampler, steps", number_named(name).title], rows)] if rows else []
    return parts


def mismatch_section(results: Results) -> list[str]:
    """Return FID beside each measure of the mismatch, and their rank correlations."""
    keys, compared = mismatch_pairs(results)
    if len({method for method, *_ in keys}) < 2:
        return []
    by_level, by_change, same = zip(*mismatch_agreement(results).values(), strict=True)
    summary = table(
        ["", *MISMATCHES],
        [
            [f"ranks of FID and measure, {len(keys)} cells", *map(shown_correlation, by_level)],
            [f"ranks of their changes from the baseline, {len(compared)} pairs", *map(shown_correlation, by_change)],
            ["pairs in which both move the same way", *(f"{n} of {len(compared)}" for n in same)],
        ],
    )
    rows = [
        [f"{key[2]} {key[3]}, {key[0]}", f"{results.cells[key]['numbers'][FID]:.2f}"]
        + [number(results.mismatch[key]["mean"][name]["value"], ".3g") for name in MISMATCHES]
        for key in keys
    ]
    meanings = "; ".join(f"`{name}`: {meaning}" for name, meaning in MISMATCHES.items())
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
        table(["", "FID", *MISMATCHES], rows),
        "</details>",
    ]
