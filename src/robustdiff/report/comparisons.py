"""The parts of a study's page that compare methods: by sampler, steps, length of training, brightness and settings."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student_t

from robustdiff.metrics.metric import Number
from robustdiff.notation import change, number
from robustdiff.report.figures import ROLES, Figure, Line, default_settings, label, points, step_panels
from robustdiff.report.levels import method_styles
from robustdiff.report.words import (
    EFFECT_COLUMNS,
    NOTHING,
    SIGNIFICANT,
    code_span,
    columns,
    count,
    effect_row,
    filled,
    saved_figure,
    shown_correlation,
    shown_effect,
    table,
    tested_effect,
    versus,
)
from robustdiff.study.analysis import (
    TRAININGS,
    Effect,
    Interval,
    Pair,
    at_equal_brightness,
    brightness,
    contrast,
    effect,
    holm,
    levels,
    main_methods,
    pairs,
    rank_correlation,
    ratio_to,
    sensitivity,
    spread,
    trend,
)
from robustdiff.study.store import Results

__all__ = [
    "against_references",
    "at_real_brightness",
    "brightness_section",
    "by_steps",
    "chosen_seeds",
    "effects_section",
    "few_trainings",
    "sensitivity_section",
    "spread_section",
    "trend_section",
]

SHIFTED = "fid_shifted"
WITH_INTERVAL = f"with its 95 % interval where there are {TRAININGS} trainings or more"


def effects_section(results: Results, steps: int) -> list[str]:
    """Return the effects with three trainings or more: by sampler, and the contrast of the study's two samplers."""
    contrasted = results.study.contrast
    both = f"{contrasted[0]} against {contrasted[1]}" if contrasted else ""
    found: dict[tuple[Pair, str], Effect] = {}
    few = False
    for pair in pairs(results):
        row = {own: effect(results, pair[0], own, steps, pair[1]) for own in results.samplers}
        if contrasted:
            row[both] = contrast(results, pair[0], contrasted, steps, pair[1])
        if any(one is not None and one.interval is not None for one in row.values()):
            found |= {(pair, own): one for own, one in row.items() if one is not None}
            few |= any(one is not None and one.interval is None for one in row.values())
    if not found:
        return [f"No comparison has the {TRAININGS} trainings that an interval needs."]
    p = {key: one.p for key, one in found.items() if one.p is not None}
    adjusted = dict(zip(p, holm(list(p.values())), strict=True))
    lines = [
        f"- **{pair[0]}** vs {pair[1]}, {own}: {tested_effect(one, adjusted[pair, own])}, {one.n} trainings."
        for (pair, own), one in found.items()
        if adjusted.get((pair, own), 1.0) < SIGNIFICANT
    ]
    rows = [effect_row(versus(pair), own, one, adjusted.get((pair, own))) for (pair, own), one in found.items()]
    shared = results.study.measure.image_noise == "shared"
    noise = " and over the noise of the images, which all trainings share," if shared else ","
    degrees = (
        "P-values have one degree of freedom less than there are trainings, so that they hold however much of the "
        "variance is that of the images; intervals have Satterthwaite's. "
    )
    return [
        f"The relative change of FID at {steps} steps, for each sampler by itself: the geometric mean over trainings, "
        f"Student's 95 % interval over trainings{noise} and the p-value of no change, adjusted by Holm's method for "
        f"the {len(p)} tests of this table. In a row “A vs B” a change below 0 says that A has the lower, better FID. "
        f"{degrees if shared else ''}"
        + (f"{both}: the ratio of the two changes, less one. " if contrasted else "")
        + (f"With fewer than {TRAININGS} trainings, the change of each. " if few else "")
        + ("Below 0.05:" if lines else "No p-value is below 0.05."),
        *(["\n".join(lines)] if lines else []),
        table(EFFECT_COLUMNS, rows),
    ]


def few_trainings(results: Results, steps: int) -> list[str]:
    """Return the changes of comparisons with too few trainings for an interval."""
    rows = []
    for pair in pairs(results):
        row = [effect(results, pair[0], sampler, steps, pair[1]) for sampler in results.samplers]
        if any(row) and all(one is None or one.interval is None for one in row):
            rows.append([versus(pair), *map(shown_effect, row)])
    if not rows:
        return []
    return [
        f"Comparisons with fewer than {TRAININGS} trainings decide nothing. The change of each training:",
        table([f"{steps} steps", *results.samplers], rows),
    ]


def chosen_seeds(results: Results) -> list[str]:
    """Return a sentence on the seeds that are left out."""
    chosen = {name: method.chosen_on for name, method in results.study.methods.items() if method.chosen_on}
    if not chosen:
        return []
    named = ", ".join(f"{name} (seed {', '.join(map(str, seeds))})" for name, seeds in chosen.items())
    return [
        "Seeds on which a setting was chosen are left out of comparisons; the tables of FID include them. They are: "
        f"{named}."
    ]


def trend_section(results: Results, steps: int, folder: Path) -> list[str]:
    """Return the change of the effect with the length of training, and the effect at each length.

    The slope with the first sampler is the primary hypothesis. The other slopes and the effects at the largest number
    of updates come behind it, adjusted for their number.
    """
    heading = "## Does the effect grow with the length of training?"
    compared = results.study.trend
    if missing := [name for name in itertools.chain(*compared) if name not in results.methods]:
        return [heading, f"Not known yet: {', '.join(map(code_span, missing))} has no cells."]
    updates = [results.record_of(method)["training"]["steps"] for method, _ in compared]
    longest = updates.index(max(updates))
    found = {
        sampler: [
            trend(results, sampler, steps),
            *(effect(results, method, sampler, steps, baseline) for method, baseline in compared),
        ]
        for sampler in results.samplers
    }
    primary = results.study.measure.samplers[0]
    tested = [(sampler, 0) for sampler in found if sampler != primary] + [(sampler, 1 + longest) for sampler in found]
    p = {key: one.p for key in tested if (one := found[key[0]][key[1]]) is not None and one.p is not None}
    adjusted: dict[tuple[str, int], float | None] = dict(zip(p, holm(list(p.values())), strict=True))
    slope = found[primary][0] if primary in found else None
    adjusted[primary, 0] = None if slope is None else slope.p

    names = ["with each doubling", *map(versus, compared)]
    rows = [
        effect_row(name, sampler, own, adjusted.get((sampler, i)))
        for sampler, effects in found.items()
        for i, (name, own) in enumerate(zip(names, effects, strict=True))
        if own is not None
    ]
    return [
        heading,
        f"The relative change of FID at {steps} steps with each doubling of the number of updates, by least squares "
        f"over {', '.join(f'{count:,}' for count in updates)} updates in each of {0 if slope is None else slope.n} "
        f"seeds, with Student's 95 % interval over seeds. The slope with {primary} is the primary hypothesis, and its "
        "p-value is not adjusted. Those of the other slopes and of the effects at "
        f"{max(updates):,} updates are adjusted by Holm's method for their {len(p)} tests.",
        table(EFFECT_COLUMNS, rows),
        *_consequence(slope, primary, updates),
        saved_figure(
            folder,
            "trend",
            _trend_figure({f"{own}, {steps} steps": effects[1:] for own, effects in found.items()}, updates),
            "The change of FID against the baseline by the number of updates",
        ),
    ]


def _trend_figure(effects: dict[str, list[Effect | None]], updates: Sequence[int]) -> Figure:
    """Draw the effect at each number of updates, by panel: each seed, and the mean with its interval."""
    panels: dict[str, dict[str, list[Line]]] = {}
    for panel, found in effects.items():
        at = [(n, one) for n, one in sorted(zip(updates, found, strict=True), key=itemgetter(0)) if one is not None]
        seeds = {seed for _, one in at for seed in one.logs}
        lines = []
        for seed in sorted(seeds):
            own = [(n, 100 * one.changes[seed]) for n, one in at if seed in one.logs]
            x, y = [n for n, _ in own], [change for _, change in own]
            lines.append(Line(x, y, y, y, thin=True))
        bands = [
            (n, *(100 * end for end in (i.mean, i.low, i.high))) for n, one in at if (i := one.interval) is not None
        ]
        mean = Line(*np.reshape(bands, (-1, 4)).T.tolist())
        panels[panel] = {"one seed": lines, "mean, 95 % interval": [mean]}
    styles = dict.fromkeys(("one seed", "mean, 95 % interval"), (ROLES["adversarial"][0], "o"))
    change = Number("change", "change of FID, %", ".1f")
    return step_panels(panels, {"no change": 0.0}, change, "optimiser updates", styles=styles)


def _consequence(slope: Effect | None, sampler: str, updates: Sequence[int]) -> list[str]:
    """Return what the slope of the primary hypothesis means for someone who trains, if it has an interval."""
    if slope is None or slope.interval is None:
        return []
    low, high = slope.interval.low, slope.interval.high
    if high < 0 or low > 0:
        worth = "more" if high < 0 else "less"
        return [
            f"What follows for a training: the longer it is, the {worth} the method is worth with {sampler} against "
            "its baseline."
        ]
    doublings = math.log2(max(updates) / min(updates))
    ends = Interval(*((1 + end) ** doublings - 1 for end in (slope.mean, low, high)))
    return [
        f"What follows for a training: no change of the effect with length was found with {sampler}. From "
        f"{min(updates):,} to {max(updates):,} updates the ratio of FIDs may change by {change(ends.low)} to "
        f"{change(ends.high)}."
    ]


def spread_section(results: Results, steps: int) -> list[str]:
    """Return the standard deviation of FID over trainings that differ in their seed alone."""
    found = {sampler: spread(results, sampler, steps) for sampler in results.samplers}
    counts = sorted({passes for own in found.values() for passes in own})
    if not counts:
        return []
    rows = []
    for passes in counts:
        cells = []
        for own in found.values():
            deviation, freedom = own.get(passes, (None, 0))
            if deviation is None:
                cells.append(NOTHING)
            else:
                apart = np.expm1(student_t.ppf(0.975, freedom) * np.sqrt(2) * deviation)
                cells.append(f"{np.expm1(deviation):.1%} ({apart:.0%})")
        rows.append([f"{passes} pass{'es' * (passes > 1)} over each batch", *cells])
    return [
        "## Trainings that differ in their seed alone",
        "The standard deviation of FID over seeds, pooled over the methods with as many passes over each batch, and in "
        "brackets the 95 % range of the difference of two trainings, by Student's t, which is wide with few trainings.",
        table([f"{steps} steps", *results.samplers], rows),
    ]


def against_references(results: Results) -> list[str]:
    """Return the change of FID from each reference, at equal sampler and steps or from its largest number of steps."""
    parts = []
    beside = levels(results, beside=True)
    for name in dict.fromkeys(name for name, *_ in beside):
        for heading, titles, keys in columns(results):
            there = [(title, key) for title, key in zip(titles, keys, strict=True) if (name, *key) in beside]
            rows = filled(
                [method, *(shown_effect(ratio_to(results, method, *key, beside[name, *key])) for _, key in there)]
                for method in results.methods
            )
            if rows:
                parts.append(table([f"vs {name}; {heading}", *(title for title, _ in there)], rows))
    found = levels(results)
    best = {(name, sampler): steps for name, sampler, steps in sorted(found)}  # keeps the largest number of steps
    for ((name, sampler), most), own in itertools.product(best.items(), results.samplers):
        reference = found[name, sampler, most]
        rows = filled(
            [method, *(shown_effect(ratio_to(results, method, own, steps, reference)) for steps in results.steps)]
            for method in results.methods
        )
        if rows:
            parts.append(table([f"{own} vs {name}, {sampler} {most}; steps", *map(str, results.steps)], rows))
    if not parts:
        return []
    where = "with the same sampler and steps" if beside else "with its largest number of steps"
    where += " or, where it has others, with its largest number of steps" if beside and found else ""
    text = f"The relative change of FID against a reference {where}, {WITH_INTERVAL}."
    return ["## FID against the references", text, *parts]


def by_steps(results: Results) -> list[str]:
    """Return the change of each pair by sampler and number of steps."""
    if len(results.steps) == 1:
        return []
    rows = []
    for pair, sampler in itertools.product(pairs(results), results.samplers):
        found = [effect(results, pair[0], sampler, steps, pair[1]) for steps in results.steps]
        if sum(one is not None for one in found) > 1:
            rows.append([versus(pair), sampler, *map(shown_effect, found)])
    if not rows:
        return []
    return [
        "## By sampler and steps",
        f"The relative change of FID, {WITH_INTERVAL}, and otherwise the change of each training.",
        table(["comparison", "sampler", *map(count, results.steps)], rows),
    ]


def sensitivity_section(results: Results, steps: int, folder: Path) -> list[str]:
    """Return the changes by α and K of free adversarial training, by sampler: a table, and a figure of several."""
    found = {sampler: sensitivity(results, sampler, steps) for sampler in results.samplers}
    keys = sorted({key for own in found.values() for key in own.changes}, key=lambda key: (key[1], key[0]))
    if len(keys) < 3:
        return []
    baseline = found[results.samplers[0]].baseline
    seeds = sorted({seed for own in found.values() for seed in own.seeds})
    grid = np.array([[own.changes.get(key, np.nan) for own in found.values()] for key in keys])
    names = [f"α = {alpha:g}, K = {count}" for alpha, count in keys]
    rows = [
        [name, *(NOTHING if np.isnan(v) else change(v) for v in row)] for name, row in zip(names, grid, strict=True)
    ]
    trainings = "one training each" if len(seeds) == 1 else "the geometric mean over trainings"
    figures = []
    if len(found) > 1:
        made = _heat_map(grid, list(found), names, f"change of FID vs {baseline}, %")
        figures = [saved_figure(folder, "sensitivity", made, f"The table at {steps} steps")]
    return [
        "## Sensitivity to α and K",
        f"Free adversarial training vs {baseline}, the relative change of FID: {trainings} (seed "
        f"{', '.join(map(str, seeds))}). Differences may be due to the seed (see above).",
        table([f"{steps} steps", *found], rows),
        *figures,
    ]


@default_settings()
def _heat_map(grid: NDArray[np.float64], samplers: Sequence[str], rows: Sequence[str], unit: str) -> Figure:
    """Draw relative changes as colours and in percent."""
    figure = Figure(figsize=(2.4 + 0.9 * len(samplers), 0.9 + 0.4 * len(rows)), layout="constrained")
    panel = figure.subplots()
    limit = max(0.05, float(np.nanmax(np.abs(grid))))
    image = panel.imshow(100 * grid, cmap="RdBu_r", vmin=-100 * limit, vmax=100 * limit, aspect="auto")
    for i, j in np.argwhere(~np.isnan(grid)):
        dark = abs(grid[i, j]) > 0.6 * limit
        text = number(grid[i, j], "+.0%")
        panel.text(j, i, text, ha="center", va="center", fontsize=9, color="w" if dark else "k")
    panel.set_xticks(range(len(samplers)), samplers)
    panel.set_yticks(range(len(rows)), rows)
    figure.colorbar(image, ax=panel, label=label(unit))
    return figure


def brightness_section(results: Results, steps: int, folder: Path) -> list[str]:
    """Return FID against the mean grey value of the images, over all trainings."""
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    ranks = []
    main = main_methods(results)
    styles = {method: style for method, style in method_styles(results).items() if method in main}
    shown = {method: [method] for method in main}
    if others := [method for method in results.methods if method not in main]:
        shown[f"fewer than {TRAININGS} trainings"] = others
    for sampler in results.samplers:
        found = brightness(results, sampler, steps)
        trainings = list(itertools.chain(*(own.values() for own in found.values())))
        if len(trainings) >= 5:
            panels[f"{sampler}, {steps} steps"] = {
                method: list(itertools.chain(*(found[one].values() for one in own if one in found)))
                for method, own in shown.items()
            }
            ranks.append(f"{sampler} {shown_correlation(rank_correlation(trainings))} ({len(trainings)} networks)")
    if not panels:
        return []
    made = points(panels, "mean grey value (0–255)", "FID (lower is better)", styles)
    return [
        f"FID at {steps} steps against the mean grey value of the images that it is measured on (0 to 255), over all "
        f"trainings. Spearman's rank correlation: {'; '.join(ranks)}. (Errors of the spatial mean are known as colour "
        "shifts: Deck & Bischoff, 2023, arXiv 2306.15832.)",
        saved_figure(
            folder, "brightness", made, "FID against the mean grey value of the images, a point each training"
        ),
        *_at_equal_brightness(results, steps),
    ]


def _at_equal_brightness(results: Results, steps: int) -> list[str]:
    """Return the difference of each pair at equal brightness."""
    found = {sampler: at_equal_brightness(results, sampler, steps) for sampler in results.samplers}
    found = {sampler: intervals for sampler, intervals in found.items() if intervals}
    rows = [
        [
            versus(pair),
            *(change(own[pair].mean, own[pair].ends) if pair in own else NOTHING for own in found.values()),
        ]
        for pair in pairs(results)
        if any(pair in intervals for intervals in found.values())
    ]
    if not rows:
        return []
    return [
        "The association at equal brightness, with 95 % intervals: an analysis of covariance of ln FID on the method, "
        f"the seed and brightness, over the methods with {TRAININGS} trainings or more. Training changes brightness, "
        "too, so that this is no estimate of a method's effect.",
        table([f"{steps} steps", *found], rows),
    ]


def at_real_brightness(results: Results, steps: int) -> list[str]:
    """Return the effects on FID of the images shifted to the real brightness, if every cell has it."""
    if not all(SHIFTED in record["numbers"] for record in results.cells.values()):
        return []
    rows = []
    for pair in pairs(results):
        row = [effect(results, pair[0], own, steps, pair[1], SHIFTED) for own in results.samplers]
        if any(row):
            rows.append([versus(pair), *map(shown_effect, row)])
    if not rows:
        return []
    return [
        "The relative change of FID after the images of each training are shifted to the mean grey value of the real "
        f"ones, {WITH_INTERVAL}: the change that remains after this shift.",
        table([f"{steps} steps", *results.samplers], rows),
    ]
