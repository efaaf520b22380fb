r"""Statistics of the results of a study, which :func:`robustdiff.study.store.read_results` returns.

The effect of a method M against a baseline B, under one sampler and number of steps, in the trainings of seed s, is

    e_s = ln FID_{M,s} − ln FID_{B,s}.

Its mean ē over n seeds is given as the relative change exp(ē) − 1, so that the changes from B to M and from M to B are
inverse. Effects on different samplers are not averaged, since a method can help one and harm another. The contrast of
two samplers is the effect on one minus that on the other. The trend over lengths of training is the slope of e_s, by
least squares, over log₂ of the number of updates: the relative change of the effect with each doubling.

A network is one draw of a method. Its own bootstrap interval says how well the network is measured, and nothing about
the method, so intervals and tests need three seeds or more. With the variance s² of the e_s, and the variance v of ē
due to the noise of the images that all trainings share,

    Var ē = s²/n + v,     ν = (s²/n + v)² / ((s²/n)²/(n − 1) + v²/(K − 1))     (Satterthwaite, 1946),

the 95 % interval is ē ± t_ν √(s²/n + v). K is the number of blocks of the bootstrap, and v the mean covariance of the
bootstrap replicates of two seeds, which resample the same images; v = 0 if every seed has images of its own. P-values
are adjusted by Holm's method (1979) for the number of tests, which asks for small ones, and there ν, an estimate, does
not hold: if s² is small by chance, ν is large and the tail of t_ν too thin. They are those of Student's t with n − 1
degrees of freedom, the smallest that are valid whatever the ratio of the two variances (Mickey and Brown, 1966); with
v = 0 this is Student's t-test. Seeds on which a setting was chosen are left out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from scipy.stats import spearmanr
from scipy.stats import t as student_t

from robustdiff.errors import RunError
from robustdiff.metrics.bootstrap import BLOCKS, Array
from robustdiff.mismatch.measure import MEASURES as MISMATCHES
from robustdiff.recipe import Recipe
from robustdiff.study.store import MEASURES, Results
from robustdiff.training.run import network_settings

__all__ = [
    "TRAININGS",
    "Effect",
    "Interval",
    "Pair",
    "Sensitivity",
    "adjusted_effects",
    "agreeing_digits",
    "at_equal_brightness",
    "baseline_of",
    "brightness",
    "compare",
    "contrast",
    "effect",
    "holm",
    "levels",
    "main_methods",
    "mean_terms",
    "mismatch_agreement",
    "mismatch_pairs",
    "pairs",
    "rank_correlation",
    "ratio_to",
    "roles",
    "sensitivity",
    "spread",
    "trend",
    "values",
]

Record = dict[str, Any]
Pair = tuple[str, str]
Key = tuple[str, int, str, int]

FID = MEASURES[0]
SMALLEST = 1e-3  # replicates of an FID near 0 can be negative
TRAININGS = 3
"""The smallest number of trainings for which there is an interval."""
DIGITS = 4
"""The number of significant digits to which the numbers of a reproduced cell must agree."""


@dataclass(frozen=True)
class Interval:
    """A relative change with the ends of its 95 % interval."""

    mean: float
    low: float
    high: float

    @property
    def ends(self) -> tuple[float, float]:
        """Return both ends."""
        return self.low, self.high


@dataclass(frozen=True)
class Sensitivity:
    """Hold the changes of FID by setting.

    Attributes:
        baseline: The method from which the changes are.
        seeds: The seeds that all settings have, over which a change is the geometric mean.
        changes: The relative change of each (α, K).
    """

    baseline: str
    seeds: list[int]
    changes: dict[tuple[float, int], float]


@dataclass(frozen=True)
class Effect:
    """The effect of a method over its trainings.

    Attributes:
        logs: The effect e_s, a difference of logarithms, of each seed.
        shared: The variance v of the mean due to the noise of images that all trainings share.
        blocks: The number of blocks K from whose bootstrap v was estimated.
        relative: False if the e_s are plain differences, of a measure that is not on a logarithmic scale.
    """

    logs: dict[int, float]
    shared: float = 0.0
    relative: bool = True
    blocks: int = BLOCKS

    @property
    def n(self) -> int:
        """Return the number of trainings."""
        return len(self.logs)

    @property
    def mean(self) -> float:
        """Return the relative change, the geometric mean over seeds, or the mean difference."""
        value = float(np.mean(list(self.logs.values())))
        return float(np.expm1(value)) if self.relative else value

    @property
    def changes(self) -> dict[int, float]:
        """Return the relative change of each seed."""
        return {seed: float(np.expm1(value)) for seed, value in self.logs.items()}

    @cached_property
    def _error(self) -> tuple[float, float] | None:
        """Return the standard error of the mean and its degrees of freedom, or None for too few trainings."""
        if self.n < TRAININGS:
            return None
        own = float(np.var(list(self.logs.values()), ddof=1)) / self.n
        total = own + self.shared
        weights = own**2 / (self.n - 1) + self.shared**2 / (self.blocks - 1)
        return math.sqrt(total), total**2 / weights if weights else math.inf

    @property
    def interval(self) -> Interval | None:
        """Return the relative change with its interval over trainings, or None for too few trainings."""
        if self._error is None:
            return None
        error, freedom = self._error
        value, half = np.mean(list(self.logs.values())), student_t.ppf(0.975, freedom) * error
        ends = np.array([value, value - half, value + half])
        return Interval(*(np.expm1(ends) if self.relative else ends).tolist())

    @property
    def p(self) -> float | None:
        """Return the two-sided p-value of no effect with n − 1 degrees of freedom, or None for too few trainings."""
        if self._error is None:
            return None
        error, _ = self._error
        value = abs(np.mean(list(self.logs.values())))
        return float(2 * student_t.sf(value / error, self.n - 1)) if error else float(value == 0)


def holm(p: Sequence[float]) -> list[float]:
    """Return p-values adjusted for their number by the step-down method of Holm (1979), in the given order."""
    order = np.argsort(p, kind="stable")
    adjusted = np.empty(len(p))
    adjusted[order] = np.maximum.accumulate(np.arange(len(p), 0, -1) * np.array(p)[order]).clip(max=1)
    return [float(value) for value in adjusted]


def _log(fid: float) -> float:
    """Return the logarithm of an FID, or of 0.001 if the FID is smaller."""
    return float(np.log(max(fid, SMALLEST)))


def _logs(record: Record, measure: str = FID) -> Array:
    """Return ln FID of a cell and of its R replicates, centred at FID since their own mean is biased upwards.

    ``measure`` may name another FID that has replicates.
    """
    drawn = record["replicates"] if measure == FID else record["other_replicates"][measure]
    value, replicates = record["numbers"][measure], np.array(drawn)
    return np.log(np.maximum([value, *(replicates - replicates.mean() + value)], SMALLEST))


def _effect(results: Results, seeds: Mapping[int, Array], common: float = 0.0) -> Effect | None:
    """Return the effect of seeds, each with its difference and the R replicates of it, or None without seeds.

    ``common`` is the variance of what is common to all differences if every seed has images of its own.
    """
    if not seeds:
        return None
    shared = common
    if results.study.measure.image_noise == "shared":
        shared = 0.0
        if len(seeds) > 1:
            covariance = np.cov([logs[1:] for logs in seeds.values()])
            off = covariance.sum() - np.trace(covariance)
            shared = max(0.0, float(off / (len(seeds) * (len(seeds) - 1))))
    blocks = next(iter(results.cells.values()))["blocks"].get(FID, BLOCKS)
    return Effect({seed: float(logs[0]) for seed, logs in seeds.items()}, shared, blocks=blocks)


def _recipe(record: Record) -> Recipe:
    """Return the recipe by which the network of a cell was trained."""
    return Recipe.model_validate(record["recipe"])


def baseline_of(results: Results, method: str) -> str:
    """Return the baseline of a method."""
    return results.study.methods[method].baseline or results.study.baseline


def pairs(results: Results) -> list[Pair]:
    """Return each method that has cells with its baseline, and the further pairs that the study compares."""
    own = [(method, baseline_of(results, method)) for method in results.methods if method != results.study.baseline]
    return list(dict.fromkeys([*own, *results.study.compare]))


def main_methods(results: Results) -> list[str]:
    """Return the methods with three trainings or more, or all that have cells if none has as many."""
    trained = {method: len({seed for name, seed, *_ in results.cells if name == method}) for method in results.methods}
    return [method for method, n in trained.items() if n >= min(TRAININGS, max(trained.values()))]


def roles(results: Results) -> dict[str, str]:
    """Return what each method that has cells does with a batch, by its recipe.

    Returns:
        ``plain`` for one pass without a perturbation, ``passes`` for several, ``random`` for random perturbations, and
        ``adversarial`` for all others.
    """
    found = {}
    for method in results.methods:
        adversary = results.record_of(method)["recipe"]["adversary"]
        clean = adversary["name"] == "random" and adversary["radius"] is not None and adversary["radius"]["value"] == 0
        own = "passes" if clean else {"none": "plain", "random": "random"}.get(adversary["name"], "adversarial")
        found[method] = own
    return found


def _seeds(results: Results, method: str, sampler: str, steps: int) -> list[int]:
    """Return the seeds of a method that have a cell."""
    return [s for s in results.study.methods[method].seeds if (method, s, sampler, steps) in results.cells]


def _unseen(results: Results, method: str, sampler: str, steps: int) -> list[int]:
    """Return the seeds of a method that have a cell, and on which it was not chosen."""
    chosen = results.study.methods[method].chosen_on
    return [seed for seed in _seeds(results, method, sampler, steps) if seed not in chosen]


def values(results: Results, method: str, sampler: str, steps: int, measure: str = FID) -> list[float]:
    """Return the values of a measure for each seed of a method that has a cell with the measure."""
    cells = (results.cells[method, seed, sampler, steps] for seed in _seeds(results, method, sampler, steps))
    return [cell["numbers"][measure] for cell in cells if measure in cell["numbers"]]


def _differences(
    results: Results, method: str, sampler: str, steps: int, baseline: str, measure: str = FID
) -> dict[int, Array]:
    """Return e_s and its replicates, by seed, of the seeds on which neither method was chosen."""
    cells, of_baseline = results.cells, _unseen(results, baseline, sampler, steps)
    return {
        s: _logs(cells[method, s, sampler, steps], measure) - _logs(cells[baseline, s, sampler, steps], measure)
        for s in _unseen(results, method, sampler, steps)
        if s in of_baseline
    }


def effect(
    results: Results, method: str, sampler: str, steps: int, baseline: str | None = None, measure: str = FID
) -> Effect | None:
    """Return the effect of a method against a baseline, by default its own, or None if no seed has both cells.

    ``measure`` is FID, or another FID of which every cell has replicates, such as ``fid_shifted``.
    """
    baseline = baseline or baseline_of(results, method)
    return _effect(results, _differences(results, method, sampler, steps, baseline, measure))


def mean_terms(results: Results, method: str, sampler: str, steps: int) -> list[float]:
    """Return the mean term of FID for each seed of a method, or an empty list if a cell does not hold it."""
    cells = [results.cells[method, seed, sampler, steps] for seed in _seeds(results, method, sampler, steps)]
    found = [cell["fid_mean_term"] for cell in cells]
    return [] if None in found else found


def contrast(
    results: Results, method: str, samplers: tuple[str, str], steps: int, baseline: str | None = None
) -> Effect | None:
    """Return the effect on the first sampler minus that on the second, or None if no seed has all four cells."""
    baseline = baseline or baseline_of(results, method)
    one, other = (_differences(results, method, sampler, steps, baseline) for sampler in samplers)
    return _effect(results, {seed: one[seed] - other[seed] for seed in one if seed in other})


def trend(results: Results, sampler: str, steps: int) -> Effect | None:
    """Return the change of the effect with each doubling of the updates, over the pairs of the study's ``trend``.

    Returns:
        The slope of each seed that has the cells of all pairs, or None without such a seed.
    """
    found = [_differences(results, method, sampler, steps, baseline) for method, baseline in results.study.trend]
    seeds = [seed for seed in found[0] if all(seed in own for own in found)]
    if not seeds:
        return None
    lengths = [
        results.cells[method, seeds[0], sampler, steps]["training"]["steps"] for method, _ in results.study.trend
    ]
    centred = np.log2(lengths) - np.mean(np.log2(lengths))
    weights = centred / np.sum(centred**2)
    return _effect(results, {seed: weights @ np.stack([own[seed] for own in found]) for seed in seeds})


def ratio_to(results: Results, method: str, sampler: str, steps: int, reference: Record) -> Effect | None:
    """Return the effect of a method against a reference's cell, common to all seeds, or None without seeds."""
    base, cells = _logs(reference), results.cells
    differences = {s: _logs(cells[method, s, sampler, steps]) - base for s in _unseen(results, method, sampler, steps)}
    return _effect(results, differences, float(np.var(base[1:], ddof=1)))


def levels(results: Results, beside: bool = False) -> dict[tuple[str, str, int], Record]:
    """Return the cells of references at the samplers and steps of methods (``beside``), or all others."""
    return {
        key: record
        for key, record in results.references.items()
        if (key[1] in results.samplers and key[2] in results.steps) == beside
    }


def spread(results: Results, sampler: str, steps: int) -> dict[int, tuple[float, int]]:
    """Return the spread over trainings that differ in their seed alone.

    Returns:
        By the number of passes over each batch, over all methods that make as many: the pooled standard deviation of
        ln FID, and its degrees of freedom.
    """
    found: dict[int, list[tuple[float, int]]] = {}
    for method in results.methods:
        seeds = _seeds(results, method, sampler, steps)
        if len(seeds) > 1:
            variance = float(np.var([_log(fid) for fid in values(results, method, sampler, steps)], ddof=1))
            passes = _recipe(results.record_of(method)).adversary.example().passes
            found.setdefault(passes, []).append((variance, len(seeds) - 1))
    return {
        passes: (math.sqrt(sum(v * n for v, n in own) / sum(n for _, n in own)), sum(n for _, n in own))
        for passes, own in sorted(found.items())
    }


def sensitivity(results: Results, sampler: str, steps: int) -> Sensitivity:
    """Return the changes by (α, K) of free adversarial training in ℓ2 without a radius.

    Only methods that differ from the first of them in α and K alone and have the same baseline are compared, and on the
    seeds that all of them have: those on which one was chosen, too, since these compare the candidates.
    """
    found: dict[tuple[float, int], dict[int, float]] = {}
    settings: set[str] = set()
    common = results.study.baseline
    for method in results.methods:
        record = results.record_of(method)
        adversary, baseline = record["recipe"]["adversary"], baseline_of(results, method)
        free = adversary["name"] == "free" and adversary["norm"] == "l2" and adversary["radius"] is None
        seeds = set(_seeds(results, method, sampler, steps)) & set(_seeds(results, baseline, sampler, steps))
        if not free or not seeds:
            continue
        rest = {k: v for k, v in network_settings(_recipe(record)).items() if k not in ("adversary", "seed")}
        text = json.dumps([baseline, rest], sort_keys=True)
        if not settings:
            settings, common = {text}, baseline
        if text in settings:
            fids = {s: [results.cells[m, s, sampler, steps]["numbers"][FID] for m in (method, baseline)] for s in seeds}
            found[adversary["step_size"], adversary["steps"]] = {s: _log(a) - _log(b) for s, (a, b) in fids.items()}
    shared = sorted(set.intersection(*map(set, found.values()))) if found else []
    changes = {key: float(np.expm1(np.mean([logs[s] for s in shared]))) for key, logs in found.items() if shared}
    return Sensitivity(common, shared, changes)


def brightness(results: Results, sampler: str, steps: int) -> dict[str, dict[int, tuple[float, float]]]:
    """Return the mean grey value and FID of each training, by method and seed, from the cells that hold both."""
    found: dict[str, dict[int, tuple[float, float]]] = {}
    for (method, seed, *own), record in results.cells.items():
        if own == [sampler, steps] and record["brightness"] is not None:
            found.setdefault(method, {})[seed] = record["brightness"], record["numbers"][FID]
    return found


def at_equal_brightness(results: Results, sampler: str, steps: int) -> dict[Pair, Interval]:
    """Return the difference in FID of each pair at equal brightness, of methods with three trainings or more."""
    points = {}
    for method, own in brightness(results, sampler, steps).items():
        seeds = [seed for seed in _unseen(results, method, sampler, steps) if seed in own]
        if len(seeds) >= TRAININGS:
            points[method] = {seed: (own[seed][0], _log(own[seed][1])) for seed in seeds}
    return adjusted_effects(points, pairs(results))


def adjusted_effects(
    groups: Mapping[str, Mapping[int, tuple[float, float]]], compared: Sequence[Pair]
) -> dict[Pair, Interval]:
    """Return the differences of groups at an equal covariate, by an analysis of covariance with seeds as blocks.

    The model is y = a_group + c_seed + b·x + e, fitted by least squares.

    Args:
        groups: The points (x, y) of each group by seed; y is a logarithm.
        compared: The pairs of groups to compare.

    Returns:
        The relative differences, with 95 % intervals, of the pairs whose groups both exist and are connected by common
        seeds; none with fewer than two degrees of freedom.
    """
    rows = [(name, seed, *point) for name, own in groups.items() for seed, point in own.items()]
    names, seeds = list(groups), sorted({seed for _, seed, *_ in rows})
    design = np.array(
        [[*(name == g for g in names), *(seed == s for s in seeds[1:]), x] for name, seed, x, _ in rows], np.float64
    )
    freedom = len(rows) - (np.linalg.matrix_rank(design) if rows else 0)
    if freedom < 2:
        return {}
    y = np.array([row[3] for row in rows])
    inverse = np.linalg.pinv(design.T @ design)
    fitted = inverse @ design.T @ y
    variance = np.sum((y - design @ fitted) ** 2) / freedom
    found = {}
    for one, other in compared:
        if one in groups and other in groups:
            weights = np.array([(name == one) - (name == other) for name in names] + [0] * len(seeds), np.float64)
            if not np.allclose(weights @ inverse @ design.T @ design, weights):
                continue  # the difference of groups without common seeds cannot be told from that of the seeds
            value, half = (
                weights @ fitted,
                student_t.ppf(0.975, freedom) * math.sqrt(variance * weights @ inverse @ weights),
            )
            found[one, other] = Interval(*np.expm1([value, value - half, value + half]).tolist())
    return found


def rank_correlation(points: Sequence[tuple[float, float]]) -> float | None:
    """Return Spearman's rank correlation, or None for fewer than three points."""
    return float(spearmanr(*zip(*points, strict=True)).statistic) if len(points) > 2 else None


def mismatch_pairs(results: Results) -> tuple[list[Key], list[tuple[Key, Key]]]:
    """Return the keys of cells that have a mismatch, and pairs of such keys: of the methods that are compared."""
    keys = [key for key in results.mismatch if key in results.cells]
    found = [(key, (other, *key[1:])) for method, other in pairs(results) for key in keys if key[0] == method]
    return keys, [(key, base) for key, base in found if base in keys]


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
        moved = [(_log(fids[key]) - _log(fids[base]), amounts[key] - amounts[base]) for key, base in compared]
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
