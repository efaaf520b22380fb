"""The page of a study: text, tables and figures of the statistics of :mod:`robustdiff.study.analysis`."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from robustdiff.data.decode import open_image
from robustdiff.errors import InputError, printable
from robustdiff.files import atomic_write, make_folder
from robustdiff.mismatch.measure import MEASURES as MISMATCHES
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
from robustdiff.study.analysis import (
    Change,
    Interval,
    at_equal_brightness,
    baseline_of,
    brightness,
    chance,
    change,
    levels,
    mismatch_agreement,
    mismatch_pairs,
    over_references,
    pairs,
    rank_correlation,
    ratio_to,
    sensitivity,
    values,
)
from robustdiff.study.schema import Study
from robustdiff.study.store import MEASURES, Results, read_results

__all__ = ["read_picture", "write_page"]

FID, *OTHERS = MEASURES
TITLES = {"kid": "KID"}


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


def _bold(interval: Interval) -> str:
    """Return the mean, in bold if the interval excludes 0."""
    mark = "**" if interval.sign else ""
    return f"{mark}{_percent(interval.mean)}{mark}"


def _estimate(interval: Interval) -> str:
    return f"{_bold(interval)} ({_ends(interval)})"


def _counted(interval: Interval | None, change: Change | None) -> str:
    """Return an estimate with the number of seeds, or a dash without an estimate."""
    return "–" if interval is None or change is None else f"{_estimate(interval)}, n = {len(change.seeds)}"


def _ratio(c: Change | None) -> str:
    return "–" if c is None else f"{1 + c.mean:.2f} ({1 + c.low:.2f} … {1 + c.high:.2f}), n = {len(c.seeds)}"


def _correlation(value: float | None) -> str:
    return "–" if value is None else f"{value:+.2f}".replace("-", "−")


def _title(measures: Sequence[str]) -> list[str]:
    return [TITLES.get(name, name) for name in measures]


def _table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(heading) + " |", "|---|" + "---:|" * (len(heading) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _figure(folder: Path, name: str, made: Figure, caption: str) -> str:
    """Write a figure into the page's folder, and return the Markdown that shows it."""
    save_figure(made, folder / f"{name}.png")
    return f"![{caption}]({quote(folder.name)}/{name}.png)"


def _over_trainings(results: Results, steps: int) -> list[str]:
    """Return the result over trainings for each pair with several seeds."""
    lines = []
    for method, baseline in pairs(results):
        found = change(results, method, results.samplers, steps, baseline)
        if found is None or len(found.seeds) < 2:
            continue
        word = {-1: "lower", 0: "undecided", 1: "higher"}[found.over_seeds.sign]
        text = (
            f"- **{method}** to {baseline}: {_percent(found.mean)} ({_ends(found.over_seeds)}, "
            f"{len(found.seeds)} trainings): {word}."
        )
        alone = {sampler: change(results, method, [sampler], steps, baseline) for sampler in results.samplers}
        decided = [
            f"{sampler} {_percent(own.mean)} ({_ends(own.over_seeds)})"
            for sampler, own in alone.items()
            if len(alone) > 1 and own is not None and own.over_seeds.sign  # these seeds have cells of every sampler
        ]
        lines.append(text + (f" By sampler: {', '.join(decided)}." if decided else ""))
    return lines


def _single_trainings(results: Results, steps: int) -> list[str]:
    """Return the methods of one training that differ from their baseline by more than seeds explain."""
    lines = []
    for baseline, (deviation, bound) in chance(results, steps).items():
        text = (
            f"- Trainings of {baseline} and of what is compared with it that differ in their seed alone have FIDs with "
            f"a standard deviation of {np.expm1(deviation):.1%}: two of them are up to {np.expm1(bound):.0%} apart by "
            "chance (95 %)."
        )
        compared = [m for m, other in pairs(results) if other == baseline == baseline_of(results, m)]
        changes = {method: change(results, method, results.samplers, steps) for method in compared}
        single = [(own.mean, method) for method, own in changes.items() if own is not None and len(own.seeds) == 1]
        for beyond, word in ((True, "further"), (False, "no further")):
            these = [(mean, method) for mean, method in sorted(single) if (abs(np.log1p(mean)) > bound) == beyond]
            if these:
                named = ", ".join(f"{method} ({_percent(mean)})" for mean, method in these)
                text += f" With one training, and {word} from {baseline} than that: {named}."
        lines.append(text)
    return lines


def _beside_references(results: Results, steps: int) -> list[str]:
    """Return the changes from each reference to the baseline and to the best method with as many trainings."""
    lines, baseline = [], results.study.baseline
    for name, (own, best, lowest) in over_references(results, steps).items():
        rest = "" if best == baseline else f", {best}, {_percent(lowest)}"
        lines.append(
            f"- Against {name}, as it is: {baseline} {_percent(own)}{';' if rest else ','} "
            f"the lowest with as many trainings{rest}."
        )
    return lines


def _verdict(results: Results) -> str:
    """Return the comparisons of methods in sentences, those with most trainings first."""
    lines = []
    for method in results.methods:
        if method == results.study.baseline:
            continue
        found: dict[int, list[str]] = {-1: [], 0: [], 1: []}
        seeds = set()
        for sampler, steps in itertools.product(results.samplers, results.steps):
            if (own := change(results, method, [sampler], steps)) is not None:
                found[own.direction].append(f"{sampler} {steps} ({_percent(own.mean)})")
                seeds.add(len(own.seeds))
        total = sum(map(len, found.values()))
        if not total:
            continue
        baseline = baseline_of(results, method)
        to = "" if baseline == results.study.baseline else f" (against {baseline})"
        several = f"{min(seeds)} to {max(seeds)}" if len(seeds) > 1 else str(*seeds)
        text = f"- **{method}**{to}, {several} of {len(results.study.methods[method].seeds)} seed(s): "
        for direction, word in ((-1, "lower"), (1, "higher")):
            text += f"{word} in {len(found[direction])} of {total} cells"
            text += f" [{', '.join(found[direction])}]; " if found[direction] else "; "
        lines.append((-max(seeds), f"{text}undecided in {len(found[0])}."))
    return "\n".join(line for _, line in sorted(lines, key=itemgetter(0)))


def _mean(numbers: Sequence[float]) -> str:
    """Return the mean over seeds with the standard deviation."""
    if not numbers:
        return "–"
    return f"{np.mean(numbers):.2f}" + (f" ± {np.std(numbers, ddof=1):.2f}" if len(numbers) > 1 else "")


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
    return [*parts, _figure(folder, "fid", _fid_figure(results), "FID against steps")]


def _references(results: Results) -> list[str]:
    """Return the table of the reference levels."""
    rows = [
        [name, f"{sampler} {steps}", f"{r['numbers'][FID]:.2f} ({r['fid_ci'][0]:.2f} … {r['fid_ci'][1]:.2f})"]
        + [f"{r['numbers'][measure]:.3f}" for measure in OTHERS]
        for (name, sampler, steps), r in levels(results).items()
    ]
    heading = ["as they are", "sampler, steps", "FID (95 % interval)", *_title(OTHERS)]
    return [_table(heading, rows)] if rows else []


def _against_references(results: Results) -> list[str]:
    """Return the ratio of FID to that of each reference level at its largest number of steps."""
    found = levels(results)
    if not found:
        return []
    parts = [
        "## FID over that of the references",
        "Ratio of FIDs, geometric mean over n seeds, with the 95 % interval over images.",
    ]
    best = {(name, sampler): steps for name, sampler, steps in sorted(found)}  # keeps the largest number of steps
    for (name, sampler), count in best.items():
        reference = found[name, sampler, count]
        for own in results.samplers:
            rows = [
                [method, *(_ratio(ratio_to(results, method, own, steps, reference)) for steps in results.steps)]
                for method in results.methods
            ]
            parts.append(_table([f"{own} over {name}, {sampler} {count}; steps", *map(str, results.steps)], rows))
    return parts


def _changes(results: Results, samplers: Sequence[str], heading: str) -> str:
    """Return the table of the changes of each pair, by number of steps."""
    rows = []
    for method, baseline in pairs(results):
        found = [change(results, method, samplers, steps, baseline) for steps in results.steps]
        if any(found):
            name = method if baseline == results.study.baseline else f"{method} to {baseline}"
            rows.append([name, *(_counted(one, one) for one in found)])
    return _table([heading, *map(str, results.steps)], rows)


def _by_sampler(results: Results) -> list[str]:
    if len(results.samplers) == 1:
        return []
    return ["## By sampler", *(_changes(results, [sampler], f"{sampler}, steps") for sampler in results.samplers)]


def _spread(results: Results, steps: int) -> list[str]:
    """Return the variation over seeds: the difference of each training, and intervals over trainings."""
    rows = []
    for method, baseline in pairs(results):
        found = change(results, method, results.samplers, steps, baseline)
        if found is not None and len(found.seeds) > 1:
            each, over = ", ".join(map(_percent, found.seeds)), found.over_seeds
            rows.append([f"{method} to {baseline}", each, _bold(over), _ends(over)])
    if not rows:
        return []
    heading = [f"{steps} steps, mean over samplers", "each seed", "mean", "95 % interval over trainings"]
    by_sampler = []
    for count, (method, baseline) in itertools.product(results.steps, pairs(results)):
        changes = [change(results, method, [sampler], count, baseline) for sampler in results.samplers]
        cells = ["–" if c is None or len(c.seeds) < 3 else _counted(c.over_seeds, c) for c in changes]
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
        "What remains at equal brightness, with the 95 % interval over trainings (analysis of covariance: ln FID on "
        "the method and on brightness, with one slope for all). Brightness comes of the training, too: what a method "
        "changes through it is not in these numbers.",
        _table([f"{steps} steps", *found], rows),
    ]


def _other_measures(results: Results, steps: int) -> str:
    rows = []
    for method in results.methods:
        row = [method]
        for sampler in results.samplers:
            found = [values(results, method, sampler, steps, measure) for measure in OTHERS]
            row.append(" / ".join(f"{np.mean(each):.3f}" for each in found) if found[0] else "–")
        rows.append(row)
    return _table([f"{steps} steps: {' / '.join(_title(OTHERS))}", *results.samplers], rows)


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
        trainings = list(itertools.chain(*found.values()))
        if len(trainings) >= 5:
            panels[sampler] = found
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
    """Return the α × K map of free adversarial training as a table and a figure."""
    found = sensitivity(results, steps)
    if len(found) < 3:
        return []
    alphas, counts = sorted({a for a, _ in found}), sorted({k for _, k in found})
    rows = [[f"K = {k}", *(_estimate(found[a, k]) if (a, k) in found else "–" for a in alphas)] for k in counts]
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
    return ["## Sensitivity to α and K", table, _figure(folder, "sensitivity", figure, "α × K")]


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
    parts = ["## Samples"]
    for sampler in results.samplers:
        if (made := _pictures(results, sampler, steps)) is not None:
            name = f"samples-{sampler.replace('+', 'p')}"
            parts.append(_figure(folder, name, made, f"Samples of {sampler} at {steps} steps"))
    return parts


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
    return (
        f"{measure.num:,} images a cell from common noise, against the images of {_text(data)} on the features "
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
            needed["fid_ci"] = record["fid_ci"]
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


def _comparisons(results: Results, verdict: str, steps: int) -> list[str]:
    """Return what the comparisons with the baseline show, and the changes from it."""
    several = len(results.samplers) > 1
    baseline = results.study.baseline
    parts = ["## What the numbers say"]
    if lines := [
        *_over_trainings(results, steps),
        *_single_trainings(results, steps),
        *_beside_references(results, steps),
    ]:
        parts += [
            f"FID at {steps} steps, {'mean over samplers, ' if several else ''}with the 95 % interval over "
            f"trainings{'; a sampler is named where its own excludes 0' if several else ''}:",
            "\n".join(lines),
        ]
    return [
        *parts,
        f"For the networks as they were trained, against {baseline}, counted as lower or higher where the "
        "95 % interval over images excludes 0 and all seeds that are there agree (one interval in twenty excludes "
        "0 by chance, and a single seed agrees with itself):",
        verdict,
        f"## FID against {baseline}" + (", mean over samplers" if several else ""),
        f"Relative change of FID from {baseline}, or what else is named, at the same seed, geometric mean "
        f"over {', '.join(results.samplers) + ' and ' if several else ''}n seeds, with the 95 % interval over "
        "images; bold where it excludes 0.",
        _changes(results, results.samplers, "steps"),
        *_spread(results, steps),
    ]


def _not_run(results: Results) -> list[str]:
    """Return what the study plans and does not have, and what it leaves out."""
    cut = results.study.cut
    parts = ["## What was not run"] if results.missing or results.failed or cut else []
    if results.missing:
        missing = ", ".join(f"{name} ({n})" for name, n in results.missing.items())
        parts.append(f"Of what the study file plans, by run and number of files: {missing}.")
    parts += [f"The training {name} failed: {_text(error)}." for name, error in results.failed.items()]
    return parts + [_text(paragraph) for paragraph in re.split(r"\n\s*\n", cut) if paragraph.strip()]


def write_page(study: Study, folder: Path, page: Path) -> str:
    """Write the page of a study from its folder, with its figures in a folder beside it, and return the page's text.

    Raises:
        InputError: If the baseline has no cells, or the path does not end in .md.
    """
    if page.suffix != ".md":
        raise InputError(f"{page}: give a file that ends in .md")
    results = read_results(study, folder)
    _check_settings(results)
    figures = page.with_suffix("")
    make_folder(figures)
    middle = 10 if 10 in results.steps else results.steps[len(results.steps) // 2]
    verdict = _verdict(results)  # empty without pairs to compare
    parts = [
        *_introduction(results),
        *(_comparisons(results, verdict, middle) if verdict else []),
        *_brightness(results, middle, figures),
        *_sensitivity(results, middle, figures),
        *_levels(results, figures),
        *_against_references(results),
        *(_by_sampler(results) if verdict else []),
        f"## {', '.join(_title(OTHERS))}",
        _other_measures(results, middle),
        *_mismatch(results),
        *_cost(results),
        *_losses(results, figures),
        *_samples(results, middle, figures),
        *_not_run(results),
    ]
    text = "\n\n".join(parts) + "\n"
    with atomic_write(page) as file:
        file.write(text.encode())
    return text
