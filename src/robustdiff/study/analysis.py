r"""Statistics of the results of a study, which :func:`robustdiff.study.store.read_results` returns.

The change from a baseline B to a method M under one sampler and number of steps is

    D = exp( mean of ln FID_M − ln FID_B ) − 1

where the mean is over pairs of runs with the same seed, and over samplers if there are several. It is a geometric mean,
so that the changes from B to M and from M to B are inverse. The 95 % interval of D comes from the bootstrap replicates
of the cells, centred at each cell's FID and averaged in the same way. Replicate r resamples the same images in all
cells, which share their noise, so that common variation cancels. This is an interval over images, for given trained
networks. The variation between trainings is given by the change of each seed, and by Student's interval mean ± t_{n−1}
· s/√n over the n seeds' values of ln(1 + D).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr
from scipy.stats import t as student_t

from robustdiff.errors import RunError
from robustdiff.metrics.bootstrap import interval
from robustdiff.mismatch.measure import MEASURES as MISMATCHES
from robustdiff.study.store import MEASURES, Results

__all__ = [
    "Change",
    "Interval",
    "adjusted_differences",
    "agreeing_digits",
    "at_equal_brightness",
    "baseline_of",
    "brightness",
    "chance",
    "change",
    "change_of_logs",
    "compare",
    "levels",
    "log",
    "mismatch_agreement",
    "mismatch_pairs",
    "over_references",
    "pairs",
    "rank_correlation",
    "ratio_to",
    "sensitivity",
    "student_interval",
    "values",
]

Array = NDArray[np.float64]
Record = dict[str, Any]
Pair = tuple[str, str]
Key = tuple[str, int, str, int]

FID = MEASURES[0]
SMALLEST = 1e-3  # replicates of an FID near 0 can be negative
DIGITS = 4
"""The number of significant digits to which the numbers of a reproduced cell must agree."""


@dataclass(frozen=True)
class Interval:
    """A relative difference with the ends of its 95 % interval."""

    mean: float
    low: float
    high: float

    @property
    def sign(self) -> int:
        """Return the sign, −1 or 1, if the interval excludes 0, else 0."""
        return -1 if self.high < 0 else int(self.low > 0)


@dataclass(frozen=True)
class Change(Interval):
    """A relative difference with its interval over images, and the difference of each seed."""

    seeds: tuple[float, ...]

    @property
    def over_seeds(self) -> Interval:
        """Return the mean with its interval over trainings, which needs at least two seeds."""
        ends = student_interval(np.log1p(self.seeds))
        return Interval(self.mean, ends.low, ends.high)

    @property
    def direction(self) -> int:
        """Return the sign, −1 or 1, if the interval excludes 0 and all seeds agree in sign, else 0."""
        agreed = all(math.copysign(1, seed) == self.sign and seed != 0 for seed in self.seeds)
        return self.sign if agreed else 0


def log(value: float) -> float:
    """Return the logarithm of an FID, or of 0.001 if the FID is smaller."""
    return float(np.log(max(value, SMALLEST)))


def _logs(record: Record) -> Array:
    """Return ln FID of a cell and of its R replicates, centred at FID since their own mean is biased upwards."""
    value, replicates = record["numbers"][FID], np.array(record["replicates"])
    return np.log(np.maximum([value, *(replicates - replicates.mean() + value)], SMALLEST))


def change_of_logs(seeds: Sequence[Array]) -> Change | None:
    """Return the mean over seeds of log ratios and their replicates, (1 + R,) each, or None without seeds."""
    if not seeds:
        return None
    logs, *replicates = np.transpose(seeds)
    value = float(np.mean(logs))
    ends = interval(value, np.mean(replicates, axis=1))
    mean, low, high = np.expm1([value, *ends]).tolist()
    return Change(mean, low, high, tuple(np.expm1(logs).tolist()))


def student_interval(logs: Sequence[float] | Array) -> Interval:
    """Return the mean relative difference of two log ratios or more, with Student's interval."""
    mean = np.mean(logs)
    half = student_t.ppf(0.975, len(logs) - 1) * np.std(logs, ddof=1) / np.sqrt(len(logs))
    return Interval(*np.expm1([mean, mean - half, mean + half]).tolist())


def baseline_of(results: Results, method: str) -> str:
    """Return the baseline of a method."""
    return results.study.methods[method].baseline or results.study.baseline


def pairs(results: Results) -> list[Pair]:
    """Return each method that has cells with its baseline, and the further pairs that the study compares."""
    own = [(method, baseline_of(results, method)) for method in results.methods if method != results.study.baseline]
    return list(dict.fromkeys([*own, *results.study.compare]))


def _seeds(results: Results, method: str, sampler: str, steps: int) -> list[int]:
    """Return the seeds of a method that have a cell."""
    return [s for s in results.study.methods[method].seeds if (method, s, sampler, steps) in results.cells]


def values(results: Results, method: str, sampler: str, steps: int, measure: str = FID) -> list[float]:
    """Return the values of a measure for each seed of a method that has a cell."""
    seeds = _seeds(results, method, sampler, steps)
    return [results.cells[method, seed, sampler, steps]["numbers"][measure] for seed in seeds]


def change(
    results: Results,
    method: str,
    samplers: Sequence[str],
    steps: int,
    baseline: str | None = None,
    seeds: Sequence[int] | None = None,
) -> Change | None:
    """Return the change from a baseline to a method, averaged over samplers and over the seeds that have all cells.

    By default the baseline is the method's own, and the seeds are all of the method. Without a seed that has all cells
    the result is None.
    """
    baseline = baseline or baseline_of(results, method)
    found = []
    for seed in results.study.methods[method].seeds if seeds is None else seeds:
        keys = [(seed, sampler, steps) for sampler in samplers]
        cells = [(results.cells.get((method, *key)), results.cells.get((baseline, *key))) for key in keys]
        parts = [_logs(one) - _logs(base) for one, base in cells if one is not None and base is not None]
        if len(parts) == len(keys):
            found.append(np.mean(parts, axis=0))
    return change_of_logs(found)


def ratio_to(results: Results, method: str, sampler: str, steps: int, reference: Record) -> Change | None:
    """Return the change from a reference's cell to a method, averaged over seeds, or None if no seed has a cell."""
    base = _logs(reference)
    seeds = _seeds(results, method, sampler, steps)
    return change_of_logs([_logs(results.cells[method, seed, sampler, steps]) - base for seed in seeds])


def levels(results: Results, beside: bool = False) -> dict[tuple[str, str, int], Record]:
    """Return the cells of references at the samplers and steps of methods (``beside``), or all others."""
    return {
        key: record
        for key, record in results.references.items()
        if (key[1] in results.samplers and key[2] in results.steps) == beside
    }


def over_references(results: Results, steps: int) -> dict[str, tuple[float, str, float]]:
    """Compare the baseline with each reference, over all samplers.

    Returns:
        By name of the reference: the baseline's change from it, the method with the lowest FID, and that method's
        change. Only methods with at least as many trainings as the baseline are considered, since the lowest of many
        single trainings would be low by chance.
    """
    found, baseline = {}, results.study.baseline
    references = levels(results, beside=True)
    for name in dict.fromkeys(name for name, *_ in references):
        changes: dict[str, float] = {}
        trainings: dict[str, int] = {}
        for method in results.methods:
            each = [
                ratio_to(results, method, sampler, steps, references[name, sampler, steps])
                for sampler in results.samplers
                if (name, sampler, steps) in references
            ]
            whole = [one for one in each if one is not None]
            if len(whole) == len(results.samplers):
                changes[method] = float(np.expm1(np.mean([np.log1p(one.mean) for one in whole])))
                trainings[method] = min(len(one.seeds) for one in whole)
        if baseline in changes:
            best = min((m for m in changes if trainings[m] >= trainings[baseline]), key=lambda method: changes[method])
            found[name] = changes[baseline], best, changes[best]
    return found


def chance(results: Results, steps: int) -> dict[str, tuple[float, float]]:
    """Return the variation between trainings that differ in their seed alone.

    Returns:
        By baseline, over it and the methods compared with it: the pooled standard deviation of ln FID averaged over
            samplers, and the 95 % bound of the absolute difference between two trainings.
    """
    variances: dict[str, list[tuple[int, float]]] = {}
    baselines = {baseline_of(results, method) for method in results.methods}
    for method in results.methods:
        seeds = set.intersection(*(set(_seeds(results, method, sampler, steps)) for sampler in results.samplers))
        if len(seeds) > 1:
            keys = [[(method, seed, sampler, steps) for sampler in results.samplers] for seed in seeds]
            logs = [[log(results.cells[key]["numbers"][FID]) for key in of_seed] for of_seed in keys]
            found = len(seeds) - 1, float(np.var(np.mean(logs, axis=1), ddof=1))
            variances.setdefault(method if method in baselines else baseline_of(results, method), []).append(found)
    bounds = {}
    for baseline, group in variances.items():
        freedom = sum(n for n, _ in group)
        deviation = np.sqrt(sum(n * variance for n, variance in group) / freedom)
        bound = student_t.ppf(0.975, freedom) * np.sqrt(2) * deviation
        bounds[baseline] = float(deviation), float(bound)
    return bounds


def sensitivity(results: Results, steps: int) -> dict[tuple[float, int], Change]:
    """Return the changes by (α, K) of free adversarial training in ℓ2 without a radius.

    Only the first seed of each method is used, so that all changes are of the same seed, and only methods that differ
    from the first of them in α and K alone.
    """
    found: dict[tuple[float, int], Change] = {}
    settings: set[str] = set()
    for method in results.methods:
        recipe = next(record["recipe"] for (name, *_), record in results.cells.items() if name == method)
        adversary = recipe["adversary"]
        free = adversary["name"] == "free" and adversary["norm"] == "l2" and adversary["radius"] is None
        seeds = results.study.methods[method].seeds[:1]
        own = change(results, method, results.samplers, steps, seeds=seeds) if free else None
        if own is None:
            continue
        rest = {k: v for k, v in recipe.items() if k not in ("adversary", "seed", "output", "sampler")}
        settings = settings or {json.dumps(rest, sort_keys=True)}
        if json.dumps(rest, sort_keys=True) in settings:
            found[adversary["step_size"], adversary["steps"]] = own
    return found


def brightness(results: Results, sampler: str, steps: int) -> dict[str, list[tuple[float, float]]]:
    """Return the mean grey value and FID of each training, by method, from the cells that hold both."""
    found: dict[str, list[tuple[float, float]]] = {}
    for (method, _, *own), record in results.cells.items():
        if own == [sampler, steps] and record["brightness"] is not None:
            found.setdefault(method, []).append((record["brightness"], record["numbers"][FID]))
    return found


def at_equal_brightness(results: Results, sampler: str, steps: int) -> dict[Pair, Interval]:
    """Return the difference in FID of each pair at equal brightness, with intervals over trainings."""
    logs = {
        method: np.array([(grey, log(fid)) for grey, fid in own])
        for method, own in brightness(results, sampler, steps).items()
    }
    return adjusted_differences(logs, pairs(results))


def adjusted_differences(groups: Mapping[str, Array], compared: Sequence[Pair]) -> dict[Pair, Interval]:
    """Return the differences of groups at an equal covariate, by an analysis of covariance.

    The model is y = a_group + b·x + e. With b estimated from the deviations from each group's mean, the adjusted
    difference of two groups is Δȳ − b·Δx̄, with the variance s²·(1/n₁ + 1/n₀ + Δx̄²/Σ(x − x̄)²).

    Arguments:
        groups: The points (x, y) of each group, with shape (n, 2); y is a logarithm.
        compared: The pairs of groups to compare.

    Returns:
        The relative differences of the pairs whose groups both exist, or nothing with fewer than two degrees of
        freedom.
    """
    means = {name: points.mean(axis=0) for name, points in groups.items()}
    freedom = sum(len(points) - 1 for points in groups.values()) - 1
    if freedom < 2:
        return {}
    x, y = np.concatenate([points - means[name] for name, points in groups.items()]).T
    squares = x @ x
    slope = x @ y / squares
    variance = np.sum((y - slope * x) ** 2) / freedom
    found = {}
    for one, other in compared:
        if one in means and other in means:
            dx, dy = means[one] - means[other]
            each = 1 / len(groups[one]) + 1 / len(groups[other]) + dx**2 / squares
            half = student_t.ppf(0.975, freedom) * np.sqrt(variance * each)
            value = dy - slope * dx
            found[one, other] = Interval(*np.expm1([value, value - half, value + half]).tolist())
    return found


def rank_correlation(points: Sequence[tuple[float, float]]) -> float | None:
    """Return Spearman's rank correlation, or None for fewer than three points."""
    return float(spearmanr(*zip(*points, strict=True)).statistic) if len(points) > 2 else None


def mismatch_pairs(results: Results) -> tuple[list[Key], list[tuple[Key, Key]]]:
    """Return the keys of cells that have a mismatch, and pairs of such keys: a cell and that of its baseline."""
    keys = [key for key in results.mismatch if key in results.cells]
    own = [(key, (baseline_of(results, key[0]), *key[1:])) for key in keys]
    return keys, [(key, base) for key, base in own if base in keys and base != key]


def mismatch_agreement(results: Results) -> dict[str, tuple[float | None, float | None, int]]:
    """Return the agreement between FID and each measure of the mismatch.

    Returns:
        By measure: the rank correlation over all cells, the rank correlation of changes from the baseline, and the
            number of changes with the same sign in both.
    """
    keys, compared = mismatch_pairs(results)
    fids = {key: results.cells[key]["numbers"][FID] for key in keys}
    found = {}
    for name in MISMATCHES:
        amounts = {key: _excess(results.mismatch[key], name) for key in keys}
        moved = [(log(fids[key]) - log(fids[base]), amounts[key] - amounts[base]) for key, base in compared]
        ranks = rank_correlation([(fids[key], amounts[key]) for key in keys]), rank_correlation(moved)
        found[name] = *ranks, sum((fid < 0) == (amount < 0) for fid, amount in moved)
    return found


def _excess(record: Record, name: str) -> float:
    """Return the excess of a measure over its floor, or its absolute value if it has no floor."""
    estimate = record["mean"][name]
    return float(abs(estimate["value"]) if estimate["floor"] is None else estimate["value"] - estimate["floor"])


def agreeing_digits(one: float, other: float) -> float:
    """Return the number of significant digits to which two numbers agree, infinity if they are equal.

    They agree to d digits where they differ by at most half a unit in the d-th digit of the larger one.
    """
    if one == other:
        return math.inf
    place = math.floor(math.log10(max(abs(one), abs(other)))) + 1
    return max(0, math.floor(place - math.log10(2 * abs(one - other)) + 1e-9))


def compare(before: Record, after: Record) -> str:
    """Return a statement of the agreement of a cell with itself made again, such as "the same to 5 digits".

    Raises:
        RunError: If the numbers agree to fewer than four significant digits.
    """
    numbers = [(before[name], after[name]) for name in MEASURES]
    numbers += zip(before["replicates"], after["replicates"], strict=True)
    digits = min(agreeing_digits(one, other) for one, other in numbers)
    if digits < DIGITS:
        raise RunError(
            f"the cell is not the same: its numbers agree to {digits} significant digits, and not to {DIGITS}: another "
            "machine, torch or number of threads rounds differently"
        )
    text = "the same to the last digit" if math.isinf(digits) else f"the same to {digits} digits"
    return text if before["weights"] == after["weights"] else f"{text}, from weights that differ"
