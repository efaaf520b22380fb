"""The page of a study: text, tables and figures of the statistics of :mod:`robustdiff.study.analysis`."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student_t

from robustdiff.data.decode import open_image
from robustdiff.errors import InputError, printable
from robustdiff.files import atomic_write, make_folder
from robustdiff.metrics.bootstrap import BLOCKS, interval
from robustdiff.metrics.metric import Number, number_named
from robustdiff.mismatch.measure import MEASURES as MISMATCHES
from robustdiff.report.figures import (
    Figure,
    Line,
    default_settings,
    label,
    loss_curves,
    points,
    samples_name,
    save_figure,
    step_panels,
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
    mean_terms,
    mismatch_agreement,
    mismatch_pairs,
    pairs,
    rank_correlation,
    ratio_to,
    sensitivity,
    spread,
    trend,
    values,
)
from robustdiff.study.schema import Study
from robustdiff.study.store import MEASURES, Results, read_results

__all__ = ["fid_interval", "middle_steps", "page_parts", "read_picture", "write_page"]

FID, *OTHERS = MEASURES
SHIFTED = "fid_shifted"
TITLES = {"kid": "KID"}
SIGNIFICANT = 0.05


def _text(words: str) -> str:
    """Return text from a file in one line, with Markdown, HTML and separators of table cells escaped."""
    return re.sub(r"([\\`*_{}\[\]<>#|~$&])", r"\\\1", printable(" ".join(words.split())))


def _code(word: str) -> str:
    """Return a word from a file as a code span, delimited by more backticks than it holds."""
    fence = "`" * (1 + max(map(len, re.findall("`+", word)), default=0))
    space = " " if len(fence) > 1 else ""
    return f"{fence}{space}{printable(word)}{space}{fence}"


def _percent(value: float) -> str:
    return f"{value:+.1%}".replace("-", "−")


def _ends(interval: Interval) -> str:
    return f"{_percent(interval.low)} … {_percent(interval.high)}"


def _estimate(interval: Interval) -> str:
    return f"{_percent(interval.mean)} ({_ends(interval)})"


def _each(effect: Effect) -> str:
    """Return the change of each seed."""
    return ", ".join(_percent(change) for change in effect.changes.values())


def _effect(effect: Effect | None) -> str:
    """Return an effect with its interval and the number of trainings, or the change of each if there are too few."""
    if effect is None:
        return "–"
    return _each(effect) if effect.interval is None else f"{_estimate(effect.interval)}, n = {effect.n}"


def _probability(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def _tested(effect: Effect | None, adjusted: float | None) -> str:
    """Return an effect with its interval and adjusted p-value, in bold below 0.05."""
    if effect is None or effect.interval is None or adjusted is None:
        return "–"
    mark = "**" if adjusted < SIGNIFICANT else ""
    return f"{mark}{_percent(effect.mean)}{mark} ({_ends(effect.interval)}), {_probability(adjusted)}"


def _correlation(value: float | None) -> str:
    return "–" if value is None else f"{value:+.2f}".replace("-", "−")


def _title(measures: Iterable[str]) -> list[str]:
    return [TITLES.get(name, name) for name in measures]


def _table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(heading) + " |", "|---|" + "---:|" * (len(heading) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _figure(folder: Path, name: str, made: Figure, caption: str) -> str:
    """Write a figure into the page's folder, and return the Markdown that shows it."""
    save_figure(made, folder / f"{name}.png")
    return f"![{caption}]({quote(folder.name)}/{name}.png)"


def _effects(results: Results, steps: int) -> list[str]:
    """Return the effects with three trainings or more: by sampler, and the contrast of the study's two samplers."""
    contrasted = results.study.contrast
    found: dict[Pair, list[Effect | None]] = {}
    for method, baseline in pairs(results):
        row = [effect(results, method, sampler, steps, baseline) for sampler in results.samplers]
        if contrasted is not None:
            row.append(contrast(results, method, contrasted, steps, baseline))
        if any(one is not None and one.interval is not None for one in row):
            found[method, baseline] = row
    if not found:
        return [f"No comparison has the {TRAININGS} trainings that an interval needs."]
    tests = [one for row in found.values() for one in row if one is not None and one.p is not None]
    adjusted = iter(holm([one.p for one in tests if one.p is not None]))
    rows, lines = [], []
    columns = [*results.samplers, *([f"{contrasted[0]} against {contrasted[1]}"] if contrasted else [])]
    for (method, baseline), row in found.items():
        cells = []
        for column, one in zip(columns, row, strict=True):
            p = None if one is None or one.p is None else next(adjusted)
            cells.append(_tested(one, p))
            if one is not None and p is not None and p < SIGNIFICANT:
                lines.append(f"- **{method}** to {baseline}, {column}: {cells[-1]}, {one.n} trainings.")
        n = sorted({one.n for one in row if one is not None and one.interval is not None})
        rows.append([f"{method} to {baseline}", " to ".join(map(str, dict.fromkeys((n[0], n[-1])))), *cells])
    shared = results.study.measure.image_noise == "shared"
    noise = " and over the noise of the images, which all trainings share," if shared else ","
    degrees = (
        "P-values have one degree of freedom less than there are trainings, so that they hold however much of the "
        "variance is that of the images; intervals have Satterthwaite's. "
    )
    return [
        f"The relative change of FID at {steps} steps, for each sampler by itself: the geometric mean over trainings, "
        f"Student's 95 % interval over trainings{noise} and the p-value of no change, adjusted by Holm's method for "
        f"the {len(tests)} tests of this table. {degrees if shared else ''}"
        + (f"{columns[-1]}: the ratio of the two changes, less one. " if contrasted else "")
        + ("Below 0.05:" if lines else "No p-value is below 0.05."),
        *(["\n".join(lines)] if lines else []),
        _table([f"{steps} steps", "trainings", *columns], rows),
    ]


def _trend(results: Results, steps: int, folder: Path) -> list[str]:
    """Return the change of the effect with the length of training, and the effect at each length.

    The slope with the first sampler is the primary hypothesis. The other slopes and the effects at the largest number
    of updates come behind it, adjusted for their number.
    """
    heading = "## Does the effect grow with the length of training?"
    compared = results.study.trend
    if missing := [name for name in itertools.chain(*compared) if name not in results.methods]:
        return [heading, f"Not known yet: {', '.join(map(_code, missing))} has no cells."]
    updates = [_of_method(results, method)["training"]["steps"] for method, _ in compared]
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

    def cell(sampler: str, i: int) -> str:
        own = found[sampler][i]
        return _tested(own, adjusted[sampler, i]) if (sampler, i) in adjusted else _effect(own)

    rows = [[sampler, *(cell(sampler, i) for i in range(1 + len(compared)))] for sampler in found]
    return [
        heading,
        f"The relative change of FID at {steps} steps with each doubling of the number of updates, by least squares "
        f"over {', '.join(f'{count:,}' for count in updates)} updates in each of {0 if slope is None else slope.n} "
        f"seeds, with Student's 95 % interval over seeds. The slope with {primary} is the primary hypothesis, and its "
        "p-value is not adjusted. Those of the other slopes and of the effects at "
        f"{max(updates):,} updates are adjusted by Holm's method for their {len(p)} tests.",
        _table([f"{steps} steps", "with each doubling", *(f"{one} to {other}" for one, other in compared)], rows),
        *_consequence(slope, primary, updates),
        _figure(
            folder, "trend", _trend_figure({s: own[1:] for s, own in found.items()}, updates), "The effect by updates"
        ),
    ]


def _trend_figure(effects: dict[str, list[Effect | None]], updates: Sequence[int]) -> Figure:
    """Draw the effect at each number of updates, by sampler: each seed, and the mean with its interval."""
    panels: dict[str, dict[str, list[Line]]] = {}
    for sampler, found in effects.items():
        at = [(n, one) for n, one in sorted(zip(updates, found, strict=True), key=itemgetter(0)) if one is not None]
        seeds = {seed for _, one in at for seed in one.logs}
        lines = []
        for seed in sorted(seeds):
            own = [(n, 100 * one.changes[seed]) for n, one in at if seed in one.logs]
            x, y = [n for n, _ in own], [change for _, change in own]
            lines.append(Line(x, y, y, y))
        bands = [
            (n, *(100 * end for end in (i.mean, i.low, i.high))) for n, one in at if (i := one.interval) is not None
        ]
        mean = Line(*np.reshape(bands, (-1, 4)).T.tolist())
        panels[sampler] = {"one seed": lines, "mean, 95 % interval": [mean]}
    number = Number("change", "change of FID to the baseline, %", ".1f", "lower")
    title = "each method against its baseline"
    return step_panels(panels, title, {"no change": 0.0}, number, "optimiser updates")


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
        f"What follows for a training: with {sampler} no change of the effect with the length of training was found. "
        f"From {min(updates):,} to {max(updates):,} updates, {doublings:.1f} doublings, the interval allows the ratio "
        f"of the FIDs a change of {_ends(ends)}."
    ]


def _few_trainings(results: Results, steps: int) -> list[str]:
    """Return the changes of comparisons with too few trainings for an interval."""
    rows = []
    for method, baseline in pairs(results):
        row = [effect(results, method, sampler, steps, baseline) for sampler in results.samplers]
        if any(row) and all(one is None or one.interval is None for one in row):
            rows.append([f"{method} to {baseline}", *map(_effect, row)])
    if not rows:
        return []
    return [
        f"Fewer than {TRAININGS} trainings, the change of each, about which nothing can be decided:",
        _table([f"{steps} steps", *results.samplers], rows),
    ]


def _chosen(results: Results) -> list[str]:
    """Return a sentence on the seeds that are left out."""
    chosen = {name: method.chosen_on for name, method in results.study.methods.items() if method.chosen_on}
    if not chosen:
        return []
    named = ", ".join(f"{name} (seed {', '.join(map(str, seeds))})" for name, seeds in chosen.items())
    return [f"Seeds on which settings were chosen are in the tables of levels, and not in comparisons: {named}."]


def _spread(results: Results, steps: int) -> list[str]:
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
                cells.append("–")
            else:
                apart = np.expm1(student_t.ppf(0.975, freedom) * np.sqrt(2) * deviation)
                cells.append(f"{np.expm1(deviation):.1%} ({apart:.0%})")
        rows.append([f"{passes} pass{'es' * (passes > 1)} over each batch", *cells])
    return [
        "## Trainings that differ in their seed alone",
        "The standard deviation of FID over seeds, pooled over the methods with as many passes over each batch, and in "
        "brackets the 95 % range of the difference of two trainings, by Student's t, which is wide with few trainings.",
        _table([f"{steps} steps", *results.samplers], rows),
    ]


def _mean(numbers: Sequence[float], shown: str = ".2f") -> str:
    """Return the mean over seeds with the standard deviation."""
    if not numbers:
        return "–"
    deviation = f" ± {np.std(numbers, ddof=1):{shown}}" if len(numbers) > 1 else ""
    return f"{np.mean(numbers):{shown}}{deviation}"


def _levels(results: Results, folder: Path) -> list[str]:
    """Return the FID of methods and references."""
    beside = levels(results, beside=True)
    parts = ["## FID", "Mean over seeds ± their standard deviation where there are several.", *_references(results)]
    for sampler in results.samplers:
        rows = [
            [method, *(_mean(values(results, method, sampler, steps)) for steps in results.steps)]
            for method in results.methods
        ]
        for name in dict.fromkeys(name for name, own, _ in beside if own == sampler):
            found = [beside.get((name, sampler, steps)) for steps in results.steps]
            cells = ("–" if record is None else f"{record['numbers'][FID]:.2f}" for record in found)
            rows.append([f"{name}, as it is", *cells])
        parts.append(_table([f"{sampler}, steps", *map(str, results.steps)], rows))
    terms = _terms(results, middle_steps(results))
    if len(results.steps) == 1 and not levels(results):  # columns of points, which are in the table
        return [*parts, *terms]
    return [*parts, *terms, _figure(folder, "fid", _fid_figure(results), "FID against steps")]


def fid_interval(record: dict[str, Any]) -> tuple[float, float]:
    """Return the 95 % interval of the FID of a cell over its images."""
    blocks = record["blocks"].get(FID, BLOCKS)
    return interval(record["numbers"][FID], np.array(record["replicates"]), blocks, log=True)


def _fid_of(record: dict[str, Any]) -> str:
    """Return the FID of a cell with the interval over its images."""
    low, high = fid_interval(record)
    return f"{record['numbers'][FID]:.2f} ({low:.2f} … {high:.2f})"


def _references(results: Results) -> list[str]:
    """Return the table of the reference levels."""
    rows = [
        [name, f"{sampler} {steps}", _fid_of(r), f"{r['numbers']['kid']:.3f} ± {r['kid_se']:.3f}"]
        + [f"{r['numbers'][measure]:.3f}" for measure in OTHERS if measure != "kid"]
        for (name, sampler, steps), r in levels(results).items()
    ]
    others = [name for name in OTHERS if name != "kid"]
    heading = ["as they are", "sampler, steps", "FID (95 % interval)", "KID ± standard error", *_title(others)]
    return [_table(heading, rows)] if rows else []


def _against_references(results: Results) -> list[str]:
    """Return the change of FID from each reference, at equal sampler and steps or from its largest number of steps."""
    parts = []
    for (name, sampler, steps), reference in levels(results, beside=True).items():
        rows = [[method, _effect(ratio_to(results, method, sampler, steps, reference))] for method in results.methods]
        parts.append(_table([f"{sampler}, {steps} steps", f"to {name}, {sampler} {steps}"], rows))
    found = levels(results)
    best = {(name, sampler): steps for name, sampler, steps in sorted(found)}  # keeps the largest number of steps
    for ((name, sampler), count), own in itertools.product(best.items(), results.samplers):
        reference = found[name, sampler, count]
        rows = [
            [method, *(_effect(ratio_to(results, method, own, steps, reference)) for steps in results.steps)]
            for method in results.methods
        ]
        parts.append(_table([f"{own} to {name}, {sampler} {count}; steps", *map(str, results.steps)], rows))
    text = f"The relative change of FID, with the 95 % interval from {TRAININGS} trainings."
    return ["## FID against the references", text, *parts] if parts else []


def _by_steps(results: Results) -> list[str]:
    """Return the change of each pair by sampler and number of steps."""
    if len(results.steps) == 1:
        return []
    parts = [
        "## By sampler and steps",
        f"The relative change of FID, with the 95 % interval from {TRAININGS} trainings, and without one that of each "
        "training.",
    ]
    for sampler in results.samplers:
        rows = []
        for method, baseline in pairs(results):
            found = [effect(results, method, sampler, steps, baseline) for steps in results.steps]
            if sum(one is not None for one in found) > 1:
                rows.append([f"{method} to {baseline}", *map(_effect, found)])
        if rows:
            parts.append(_table([f"{sampler}, steps", *map(str, results.steps)], rows))
    return parts


def _at_equal_brightness(results: Results, steps: int) -> list[str]:
    """Return the difference of each pair at equal brightness."""
    found = {sampler: at_equal_brightness(results, sampler, steps) for sampler in results.samplers}
    found = {sampler: intervals for sampler, intervals in found.items() if intervals}
    rows = [
        [
            f"{pair[0]} to {pair[1]}",
            *(_estimate(intervals[pair]) if pair in intervals else "–" for intervals in found.values()),
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
        _table([f"{steps} steps", *found], rows),
    ]


def _at_real_brightness(results: Results, steps: int) -> list[str]:
    """Return the effects on FID of the images shifted to the real brightness, if every cell has it."""
    if not all(SHIFTED in record["numbers"] for record in results.cells.values()):
        return []
    rows = [
        [f"{method} to {baseline}"]
        + [_effect(effect(results, method, own, steps, baseline, SHIFTED)) for own in results.samplers]
        for method, baseline in pairs(results)
    ]
    if not rows:
        return []
    return [
        "The relative change of FID after the images of each training are shifted to the mean grey value of the real "
        f"ones, with the 95 % interval from {TRAININGS} trainings: the effect that is left without brightness.",
        _table([f"{steps} steps", *results.samplers], rows),
    ]


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
                row.append("–")
        if any(cell != "–" for cell in row):
            rows.append([method, *row])
    if not rows:
        return []
    return [
        "The terms of FID, means over seeds: the squared distance of the mean features, and what the covariances add.",
        _table([f"{steps} steps: means + covariances", *results.samplers], rows),
    ]


def _other_measures(results: Results, steps: int) -> list[str]:
    """Return KID, precision and recall of methods and of real images."""
    rows = []
    for method in results.methods:
        row = [method]
        for sampler in results.samplers:
            found = [values(results, method, sampler, steps, measure) for measure in OTHERS]
            means = [f"{np.mean(each):.3f}" for each in found if each]
            error = _kid_error(results, method, sampler, steps)
            if error is not None:
                means[0] += f" ± {error:.3f}"
            row.append(" / ".join(means) or "–")
        rows.append(row)
    text = (
        "Means over seeds. KID has its standard error: over trainings where there are several, else over groups of "
        "images of the one."
    )
    return [text, _table([f"{steps} steps: {' / '.join(_title(OTHERS))}", *results.samplers], rows), *_real(results)]


def _real(results: Results) -> list[str]:
    """Return the numbers of other real images."""
    real = results.real
    if real is None:
        return []
    numbers, data = real["numbers"], real["measure"]["real"]
    row = ["real images", _fid_of(real), f"{numbers['kid']:.3f} ± {real['kid_se']:.3f}"]
    row += [f"{numbers[name]:.3f}" for name in OTHERS if name != "kid"]
    heading = ["", "FID (95 % interval)", "KID ± standard error", *_title(name for name in OTHERS if name != "kid")]
    return [
        f"{real['n']:,} other real images (the split {_code(data['split'])} of {_code(data['name'])}), measured as "
        "generated ones are:",
        _table(heading, [row]),
    ]


def _kid_error(results: Results, method: str, sampler: str, steps: int) -> float | None:
    """Return the standard error of the mean of KID, over trainings if there are several."""
    found = values(results, method, sampler, steps, "kid")
    if len(found) > 1:
        return float(np.std(found, ddof=1) / np.sqrt(len(found)))
    own = [r["kid_se"] for (name, _, *cell), r in results.cells.items() if (name, *cell) == (method, sampler, steps)]
    return own[0] if own else None


def _further(results: Results) -> list[str]:
    """Return the tables of the numbers that the study measures besides those of every cell."""
    parts = []
    for name in dict.fromkeys(name for record in results.cells.values() for name in record["numbers"]):
        if name in MEASURES:
            continue
        shown = number_named(name).format
        parts.append(f"## {number_named(name).title}")
        parts.append("Mean over seeds ± their standard deviation where there are several.")
        for sampler in results.samplers:
            rows = [
                [method, *(_mean(values(results, method, sampler, steps, name), shown) for steps in results.steps)]
                for method in results.methods
            ]
            parts.append(_table([f"{sampler}, steps", *map(str, results.steps)], rows))
        rows = [
            [f"{reference}, as it is", f"{sampler} {steps}", f"{record['numbers'][name]:{shown}}"]
            for (reference, sampler, steps), record in results.references.items()
            if name in record["numbers"]
        ]
        parts += [_table(["", "sampler, steps", number_named(name).title], rows)] if rows else []
    return parts


def _mismatch(results: Results) -> list[str]:
    """Return FID beside each measure of the mismatch, and their rank correlations."""
    keys, compared = mismatch_pairs(results)
    if len({method for method, *_ in keys}) < 2:
        return []
    by_level, by_change, same = zip(*mismatch_agreement(results).values(), strict=True)
    summary = _table(
        ["", *MISMATCHES],
        [
            [f"ranks of FID and measure, {len(keys)} cells", *map(_correlation, by_level)],
            [f"ranks of their changes from the baseline, {len(compared)} pairs", *map(_correlation, by_change)],
            ["pairs in which both move the same way", *(f"{n} of {len(compared)}" for n in same)],
        ],
    )
    rows = [
        [f"{key[2]} {key[3]}, {key[0]}", f"{results.cells[key]['numbers'][FID]:.2f}"]
        + [f"{results.mismatch[key]['mean'][name]['value']:.3g}" for name in MISMATCHES]
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
        _table(["", "FID", *MISMATCHES], rows),
        "</details>",
    ]


def _of_method(results: Results, method: str) -> dict[str, Any]:
    """Return the record of a cell of a method. All of them hold the same recipe, except for the seed."""
    return next(record for (name, *_), record in results.cells.items() if name == method)


def _cost(results: Results) -> list[str]:
    rows = []
    for method in results.methods:
        record = _of_method(results, method)
        recipe, training = record["recipe"], record["training"]
        numbers = training["steps"], training["backward_passes"], training["batches"] * recipe["batch_size"]
        rows.append([method, *(f"{number:,}" for number in numbers), f"{training['delta_norm']:.2f}"])
    return [
        "## Cost",
        "An adversary of K passes makes K updates on each batch, free and random alike: for as many updates it draws a "
        "K-th of the images that plain training draws.",
        _table(["", "updates", "backward passes", "images drawn", "last ‖δ‖, in the method's norm"], rows),
    ]


def _losses(results: Results, folder: Path) -> list[str]:
    if not results.losses:
        return []
    curves = {method: (record.step, record.loss) for method, record in results.losses.items()}
    return [_figure(folder, "loss", loss_curves(curves, "first seed of each method"), "Training loss")]


def _brightness(results: Results, steps: int, folder: Path) -> list[str]:
    """Return FID against the mean grey value of the images, over all trainings."""
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    ranks = []
    for sampler in results.samplers:
        found = brightness(results, sampler, steps)
        trainings = list(itertools.chain(*(own.values() for own in found.values())))
        if len(trainings) >= 5:
            panels[sampler] = {method: list(own.values()) for method, own in found.items()}
            ranks.append(f"{sampler} {_correlation(rank_correlation(trainings))} ({len(trainings)} networks)")
    if not panels:
        return []
    made = points(panels, "mean grey value of the images", "FID (lower is better)", f"{steps} steps")
    return [
        f"FID at {steps} steps against the mean grey value of the images that it is measured on (0 to 255), over all "
        f"trainings. Spearman's rank correlation: {'; '.join(ranks)}. (Errors of the spatial mean are known as colour "
        "shifts: Deck & Bischoff, 2023, arXiv 2306.15832.)",
        _figure(folder, "brightness", made, "FID against brightness"),
        *_at_equal_brightness(results, steps),
    ]


@default_settings()
def _sensitivity(results: Results, steps: int, folder: Path) -> list[str]:
    """Return the changes by α and K of free adversarial training, by sampler, as a table and a figure."""
    baseline, _ = sensitivity(results, results.samplers[0], steps)
    found = {sampler: sensitivity(results, sampler, steps)[1] for sampler in results.samplers}
    keys = sorted({key for own in found.values() for key in own}, key=lambda key: (key[1], key[0]))
    if len(keys) < 3:
        return []
    grid = np.array([[own.get(key, np.nan) for own in found.values()] for key in keys])
    names = [f"α = {alpha:g}, K = {count}" for alpha, count in keys]
    rows = [[name, *("–" if np.isnan(v) else _percent(v) for v in row)] for name, row in zip(names, grid, strict=True)]
    figure = Figure(figsize=(2.4 + 0.9 * len(found), 1.2 + 0.4 * len(keys)), layout="constrained")
    panel = figure.subplots()
    limit = max(0.05, float(np.nanmax(np.abs(grid))))
    image = panel.imshow(100 * grid, cmap="RdBu_r", vmin=-100 * limit, vmax=100 * limit, aspect="auto")
    for i, j in np.argwhere(~np.isnan(grid)):
        dark = abs(grid[i, j]) > 0.6 * limit
        panel.text(j, i, f"{grid[i, j]:+.0%}", ha="center", va="center", fontsize=9, color="w" if dark else "k")
    panel.set_xticks(range(len(found)), list(found))
    panel.set_yticks(range(len(keys)), names)
    figure.colorbar(image, ax=panel, label=label(f"FID against {baseline}, %"))
    figure.suptitle(f"{steps} steps, first seed", fontsize=10)
    return [
        "## Sensitivity to α and K",
        f"The relative change of FID from {baseline} to free adversarial training, one training each. Trainings that "
        "differ in their seed alone are apart, too, as above.",
        _table([f"{steps} steps", *found], rows),
        _figure(folder, "sensitivity", figure, "α × K"),
    ]


def _fid_figure(results: Results) -> Figure:
    """Draw FID against steps, a line for each training. Methods with one point are left out, unless all have one."""
    counts = {m: len({steps for method, _, _, steps in results.cells if method == m}) for m in results.methods}
    methods = [m for m in results.methods if counts[m] > 1 or max(counts.values()) == 1]
    beside = levels(results, beside=True)
    panels: dict[str, dict[str, list[Line]]] = {sampler: {} for sampler in results.samplers}
    for sampler, groups in panels.items():
        for method in methods:
            fids: dict[int, dict[int, float]] = {}
            for (name, seed, own, steps), record in sorted(results.cells.items(), key=itemgetter(0)):
                if (name, own) == (method, sampler):
                    fids.setdefault(seed, {})[steps] = record["numbers"][FID]
            groups[method] = [_without_band(of_seed) for of_seed in fids.values()]
        as_they_are: dict[str, dict[int, float]] = {}
        for (name, own, steps), record in sorted(beside.items(), key=lambda item: item[0][2]):
            if own == sampler:
                as_they_are.setdefault(name, {})[steps] = record["numbers"][FID]
        groups |= {f"{name}, as it is": [_without_band(of_name)] for name, of_name in as_they_are.items()}
    dashed = {f"{name}, {sampler} {n}": r["numbers"][FID] for (name, sampler, n), r in levels(results).items()}
    return step_panels(panels, "one line for each training", dashed)


def _without_band(fids: dict[int, float]) -> Line:
    return Line(list(fids), *[list(fids.values())] * 3)


def read_picture(path: Path) -> NDArray[np.uint8]:
    """Return the pixels of a cell's picture, (H, W) or (H, W, 3). A file that is none, or too large, is refused."""
    try:
        with open_image(path) as image:
            if image.width * image.height > 2**26:
                raise InputError(f"{printable(path)} is a picture of {image.width}×{image.height} pixels: remove it")
            return np.asarray(image.convert("L" if image.mode == "L" else "RGB"))
    except InputError:
        raise
    except Exception as error:  # Pillow's decoders raise errors of many kinds on damaged files
        raise InputError(f"{printable(path)} is no picture ({printable(str(error))}): remove it") from None


def _samples(results: Results, steps: int, folder: Path) -> list[str]:
    figures = (
        _figure(folder, samples_name(sampler), made, f"Samples of {sampler} at {steps} steps")
        for sampler in results.samplers
        if (made := _pictures(results, sampler, steps)) is not None
    )
    return ["## Samples", *figures]


@default_settings()
def _pictures(results: Results, sampler: str, steps: int) -> Figure | None:
    """Return a figure of the first images of each method, all from the same noise."""
    paths = {method: results.pictures.get((method, sampler, steps)) for method in results.study.methods}
    rows = [(method, read_picture(path)) for method, path in paths.items() if path is not None]
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


def _obtained_on(results: Results) -> str:
    """Return a description of the machines on which the cells were made."""
    records = [*results.cells.values(), *results.references.values()]
    measure = results.study.measure
    data = measure.data.name if measure.data is not None else next(iter(results.cells.values()))["training"]["data"]
    machines = sorted({_text(f"{r['threads']} thread(s) of a {r['device']}, torch {r['torch']}") for r in records})
    noise = "common noise" if measure.image_noise == "shared" else "noise that is common to the methods of a seed"
    return (
        f"{measure.num:,} images a cell from {noise}, against the images of {_text(data)} on the features "
        f"{_code(measure.features)}; {'; '.join(machines)}. "
        f"{len(records)} of {results.planned} planned cells are there."
    )


def _check_settings(results: Results) -> None:
    """Check that the cells hold the settings that the page shows."""
    for key, record in itertools.chain(results.cells.items(), results.references.items()):
        needed = {name: record[name] for name in ("threads", "device", "torch")}
        if len(key) == 4:
            needed |= {f"training.{name}": value for name, value in record["training"].items()}
        else:
            needed["kid_se"] = record["kid_se"]
        if missing := [name for name, value in needed.items() if value is None]:
            cell = "-".join(map(str, key if len(key) == 3 else (f"{key[0]}-s{key[1]}", *key[2:])))
            raise InputError(f"the cell {cell} does not say its {missing[0]}: delete its file, and run the study again")


def _introduction(results: Results) -> list[str]:
    """Return the title, and the settings that the methods share."""
    recipe, training = (_of_method(results, results.study.baseline)[part] for part in ("recipe", "training"))
    return [
        f"# {_text(results.study.title)}",
        f"Trained on {_text(training['data'])}, {training['images']:,} images. "
        f"Base: {_text(recipe['model'].get('path') or 'none')}. "
        f"{recipe['steps']:,} optimiser updates of batch {recipe['batch_size']}, learning rate {recipe['lr']:g} "
        f"({recipe['lr_schedule']}), moving average {recipe['ema']}, {recipe['precision']}, unless a method says "
        f"otherwise. {_obtained_on(results)} This page is made by `robustdiff study` from the files of the cells.",
    ]


def _methods(results: Results) -> list[str]:
    """Return the methods and references with cells in words, or else by what they change in the recipe."""
    study, lines = results.study, []
    for name in results.methods:
        method = study.methods[name]
        changes = ", ".join(f"{key}: {value}" for key, value in method.set.items())
        lines.append((name, method.description or changes or "the recipe as it is"))
    present = {name for name, *_ in results.references}
    lines += [(name, one.description or one.path) for name, one in study.references.items() if name in present]
    return ["## The methods", "\n".join(f"- {_code(name)}: {_text(words)}" for name, words in lines)]


def _not_run(results: Results) -> list[str]:
    """Return what the study plans and does not have, and what it leaves out."""
    cut = results.study.cut
    parts = ["## What was not run"] if results.missing or results.failed or cut else []
    if results.missing:
        missing = ", ".join(f"{name} ({n})" for name, n in results.missing.items())
        parts.append(f"Of what the study file plans, by run and number of files: {missing}.")
    parts += [f"The training {name} failed: {_text(error)}." for name, error in results.failed.items()]
    return parts + [_text(paragraph) for paragraph in re.split(r"\n\s*\n", cut) if paragraph.strip()]


def page_parts(results: Results, figures: Path) -> list[str]:
    """Return the parts of the page of a study as Markdown, and write its figures into a folder, which may be missing.

    A part is a heading, a paragraph, a list, a table, a figure, or the beginning or end of details.

    Raises:
        InputError: If a cell does not say what the page shows, or the folder is a file or a link.
    """
    _check_settings(results)
    make_folder(figures)
    middle = middle_steps(results)
    trended = bool(results.study.trend)
    compared = bool(pairs(results)) and not trended
    return [
        *_introduction(results),
        *_methods(results),
        *(_trend(results, middle, figures) if trended else []),
        *(["## What the numbers say", *_effects(results, middle), *_chosen(results)] if compared else []),
        *(_few_trainings(results, middle) if compared else []),
        *_spread(results, middle),
        *_brightness(results, middle, figures),
        *_at_real_brightness(results, middle),
        *_sensitivity(results, middle, figures),
        *_levels(results, figures),
        *_against_references(results),
        *(_by_steps(results) if compared else []),
        f"## {', '.join(_title(OTHERS))}",
        *_other_measures(results, middle),
        *_further(results),
        *_mismatch(results),
        *_cost(results),
        *_losses(results, figures),
        *_samples(results, middle, figures),
        *_not_run(results),
    ]


def middle_steps(results: Results) -> int:
    """Return the number of steps at which the page compares methods: 10, or the middle one."""
    return 10 if 10 in results.steps else results.steps[len(results.steps) // 2]


def write_page(study: Study, folder: Path, page: Path) -> str:
    """Write the page of a study from its folder, with its figures in a folder beside it, and return the page's text.

    Raises:
        InputError: If the baseline has no cells, or the path does not end in .md.
    """
    if page.suffix != ".md":
        raise InputError(f"{page}: give a file that ends in .md")
    text = "\n\n".join(page_parts(read_results(study, folder), page.with_suffix(""))) + "\n"
    with atomic_write(page) as file:
        file.write(text.encode())
    return text
