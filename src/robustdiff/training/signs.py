r"""Signs of a training that goes wrong, judged after each measurement of the watch.

A sign is a function of what was measured so far that returns a message, or None if there is nothing to say. It is
registered under a name, and its threshold is the field of ``watch.signs`` with that name (with _ for -); a sign whose
threshold is None is not judged.

    long-sampling      the metric at the most steps d above the start's s: d/s > threshold, and the interval above 0
    clip-score         the CLIP score below the start's by more than the threshold, and its interval below 0
    at-radius          the share of samples with ‖δ‖ at its radius
    skipped-ascents    the share of ascents that were skipped since their gradient was zero or not finite
    skipped-updates    the share of fp16 updates that overflowed, each of which lowers the scale of the loss
    pass-ratio         the loss of the last pass over that of the first, relative to that ratio when the run began
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from robustdiff.metrics.bootstrap import direction
from robustdiff.metrics.metric import number_named

__all__ = ["SIGNS", "History", "Rule"]


@dataclass(frozen=True)
class History:
    """The measurements of a run so far.

    Attributes:
        lines: The lines of ``watch.jsonl``, the last of which is judged.
        metrics: The lines of ``metrics.jsonl`` up to it.
        ascents: The number of ascents of single samples in one update.
    """

    lines: Sequence[Mapping[str, Any]]
    metrics: Sequence[Mapping[str, float]]
    ascents: float = 0.0

    @property
    def recent(self) -> Sequence[Mapping[str, float]]:
        """The lines of metrics since the measurement before the last."""
        before = self.lines[-2]["step"] if len(self.lines) > 1 else 0
        return [line for line in self.metrics if line["step"] > before]

    def mean(self, name: str, lines: Sequence[Mapping[str, float]]) -> float | None:
        """Return the mean of a metric over lines, or None if none has it."""
        values = [line[name] for line in lines if name in line]
        return sum(values) / len(values) if values else None

    def rate(self, name: str) -> float | None:
        """Return how much a counter has grown per update over the recent lines, or None if there are none."""
        if not self.recent:
            return None
        before = self.metrics[-len(self.recent) - 1] if len(self.recent) < len(self.metrics) else {}
        updates = self.recent[-1]["step"] - before.get("step", 0)
        return (self.recent[-1].get(name, 0) - before.get(name, 0)) / updates


Rule = Callable[[History, float], str | None]

SIGNS: dict[str, Rule] = {}
"""The rules of the signs, by name."""


def _sign(name: str) -> Callable[[Rule], Rule]:
    def add(rule: Rule) -> Rule:
        SIGNS[name] = rule
        return rule

    return add


def _direction(cell: Mapping[str, Any]) -> int:
    return direction(cell["difference_ci"], cell.get("relative_ci"))


@_sign("long-sampling")
def _long_sampling(history: History, threshold: float) -> str | None:
    cells = history.lines[-1]["cells"]
    most = max(cell["steps"] for cell in cells)
    for cell in cells:
        number = number_named(cell["metric"])
        if number.better != "lower" or cell["steps"] != most or _direction(cell) < 1:
            continue
        start = cell["value"] - cell["difference"]
        if start > 0 and cell["difference"] > threshold * start:
            return (
                f"{number.title} of {cell['sampler']} at {most} steps is {cell['value']:.4g}, "
                f"{100 * cell['difference'] / start:.0f} % above the start's {start:.4g}"
            )
    return None


@_sign("clip-score")
def _clip_score(history: History, threshold: float) -> str | None:
    for cell in history.lines[-1]["cells"]:
        if cell["metric"] == "clip_score" and _direction(cell) < 0 and cell["difference"] < -threshold:
            return (
                f"the CLIP score of {cell['sampler']} at {cell['steps']} steps is {cell['value']:.4g}, "
                f"{-cell['difference']:.2g} below the start's"
            )
    return None


@_sign("at-radius")
def _at_radius(history: History, threshold: float) -> str | None:
    share = history.mean("at_radius", history.recent)
    if share is None or share < threshold:
        return None
    found = f"δ is as long as its radius in {100 * share:.0f} % of the samples"
    return f"{found}: the radius decides, and not adversary.step_size"


@_sign("skipped-ascents")
def _skipped_ascents(history: History, threshold: float) -> str | None:
    rate = history.rate("skipped")
    if rate is None or not history.ascents or rate / history.ascents <= threshold:
        return None
    return (
        f"{100 * rate / history.ascents:.0f} % of the ascents were skipped, since their gradient was zero or not finite"
    )


@_sign("skipped-updates")
def _skipped_updates(history: History, threshold: float) -> str | None:
    rate = history.rate("skipped_updates")
    if rate is None or rate <= threshold:
        return None
    found = f"{100 * rate:.0f} % of the updates overflowed in fp16"
    return f"{found}, so that the scale of the loss shrinks: lower lr, or set bf16"


@_sign("pass-ratio")
def _pass_ratio(history: History, threshold: float) -> str | None:
    measured = [line["step"] for line in history.lines if line["step"] > 0]
    if len(measured) < 2:
        return None
    first = history.mean("pass_ratio", [line for line in history.metrics if line["step"] <= measured[0]])
    now = history.mean("pass_ratio", history.recent)
    if first is None or now is None or now <= threshold * first:
        return None
    return f"the loss of the last pass is {now:.3g} times that of the first, up from {first:.3g}"
