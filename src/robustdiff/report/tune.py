"""The result of a search (:mod:`robustdiff.study.tune`) as tables, as advice, and as Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import Any

import yaml
from rich import box
from rich.table import Table

from robustdiff.errors import printable
from robustdiff.metrics.metric import number_named
from robustdiff.notation import change, interval
from robustdiff.recipe import load_recipe
from robustdiff.report.run_sections import command
from robustdiff.report.tables import shown
from robustdiff.report.words import code_span, threads
from robustdiff.study.tune import RULE, Speed, Stage, Tuning, default_space

__all__ = ["advice", "comparison_table", "confirmation_table", "failures", "plan_table", "rung_table", "tune_markdown"]

Record = dict[str, Any]
Rows = tuple[list[str], list[list[str]]]
"""The headings, and the rows."""

SYMBOLS = {"adversary.step_size": "α", "adversary.steps": "K", "adversary.radius": "radius"}
ROLES = {
    "candidate": "the candidate",
    "plain": "plain fine-tuning",
    "control": "clean passes",
    "untouched": "the untouched checkpoint",
}


def described(settings: Mapping[str, Any] | None) -> str:
    """Return settings in one line, such as "α = 0.3, K = 3, radius none, lr = 0.0001, ema = auto"."""
    if settings is None:
        return "the checkpoint as it is"
    parts = []
    for field, value in settings.items():
        if field == "adversary":
            parts.append("no δ" if value == "none" else f"K = {value['steps']} clean passes")
        elif field == "adversary.radius":
            own = {"value": value} if not isinstance(value, dict) else value
            given = ", ".join(f"{name} {number}" for name, number in own.items() if number is not None)
            parts.append(f"radius {given or 'none'}")
        else:
            parts.append(f"{SYMBOLS.get(field, field)} = {f'{value:g}' if isinstance(value, float) else value}")
    return ", ".join(parts)


def _table(title: str, rows: Rows) -> Table:
    headings, lines = rows
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title=shown(title), title_justify="left")
    for i, heading in enumerate(headings):
        table.add_column(shown(heading), no_wrap=True, justify="left" if i < 2 else "right")
    for line in lines:
        table.add_row(*map(shown, line))
    return table


def _markdown(rows: Rows) -> str:
    headings, lines = rows
    rule = "|---|---|" + "---:|" * (len(headings) - 2)
    return "\n".join([f"| {' | '.join(headings)} |", rule, *(f"| {' | '.join(line)} |" for line in lines)])


def plan_table(tuning: Tuning, stages: Sequence[Stage], speed: Speed, processes: int) -> Table:
    """Return a table of what is trained and measured, with the minutes that it takes."""
    headings = ["", "contestants", "backward passes of each", "trainings", "cells", "minutes"]
    minutes = [stage.seconds(tuning, speed, processes) / 60 for stage in stages]
    lines = []
    for stage, own in zip(stages, minutes, strict=True):
        contestants = f"{stage.candidates} with δ, {stage.plain} plain" + ", untouched" * tuning.untouched
        sizes = [f"{stage.passes:,}", str(stage.trainings), str(stage.cells), f"{own:.1f}"]
        lines.append([stage.name, contestants, *sizes])
    totals = [str(sum(stage.trainings for stage in stages)), str(sum(stage.cells for stage in stages))]
    return _table("", (headings, [*lines, ["at most", "", "", *totals, f"{sum(minutes):.0f}"]]))


def _rung(record: Record, tuning: Record) -> Rows:
    number = Tuning.model_validate(tuning).number
    sign = 1 if number.better == "lower" else -1
    every = {name: (own, own["values"].get(str(record["seed"]))) for name, own in record["contestants"].items()}
    if record["untouched"] is not None:
        every["untouched"] = {"settings": None, "kept": True}, record["untouched"]
    lines = []
    for name, (own, value) in sorted(every.items(), key=lambda item: (item[1][1] is None, sign * (item[1][1] or 0))):
        shown_value = "failed" if value is None else format(value, number.format)
        lines.append([name, described(own["settings"]), shown_value, "goes on" if own["kept"] else ""])
    return ["", "settings", f"{number.title}, {tuning['sampler']} {tuning['steps']}", ""], lines


def _rung_title(record: Record, tuning: Record) -> str:
    return f"Rung {record['rung']} of {tuning['rungs']}: {record['backward_passes']:,} backward passes each"


def failures(contestants: Mapping[str, Record]) -> list[str]:
    """Return a line for each error by which contestants of a rung failed."""
    found: dict[str, list[str]] = {}
    for name, own in contestants.items():
        for error in own["failed"].values():
            found.setdefault(error, []).append(name)
    return [f"{', '.join(names)} failed: {printable(error)}" for error, names in found.items()]


def rung_table(record: Record, tuning: Tuning) -> Table:
    """Return a table of a rung, the best first."""
    settings = tuning.model_dump(mode="json")
    return _table(_rung_title(record, settings), _rung(record, settings))


def _confirmation(record: Record) -> Rows:
    number, own = number_named(record["number"]), record["confirmation"]
    seeds = [str(seed) for seed in own["seeds"]]
    lines = []
    for role, contestant in own["contestants"].items():
        values = contestant["values"]
        line = [format(values[s], number.format) if s in values else "failed" for s in seeds]
        mean = None
        if values:  # the geometric mean, as differences are of logarithms
            mean = (geometric_mean if number.log else fmean)(values.values())
        name = ROLES[role] if role == "untouched" else f"{ROLES[role]}, {contestant['name']}"
        lines.append(
            [name, described(contestant["settings"]), *line, "–" if mean is None else format(mean, number.format)]
        )
    return ["", "settings", *(f"seed {seed}" for seed in seeds), "mean"], lines


def _comparisons(record: Record) -> Rows:
    lines = []
    for own in record["comparisons"]:
        adjusted = own.get("p_adjusted")
        lines.append(
            [
                f"{ROLES[own['of']]} vs {ROLES[own['to']]}",
                "decides" if own["decides"] else "explains",
                _difference(own, record["number"]),
                "–" if own["p"] is None else f"{own['p']:.2g}",
                "–" if adjusted is None else f"{adjusted:.2g}",
            ]
        )
    return ["", "", "change (95 % interval)", "p", "p, Holm"], lines


def _difference(own: Record, number: str) -> str:
    """Return a change with its interval."""
    if own["mean"] is None:
        return "no common seed"
    ends, spec = own["interval"], f"+{number_named(number).format}"
    text = change(own["mean"], ends) if own["relative"] else interval(own["mean"], ends, spec)
    return text if ends is not None else f"{text} (no interval)"


def confirmation_table(record: Record) -> Table:
    """Return a table of the values of each confirming seed."""
    passes = record["confirmation"]["backward_passes"]
    return _table(
        f"Confirmation: {passes:,} backward passes each, seeds and noise not searched on", _confirmation(record)
    )


def comparison_table(record: Record) -> Table:
    """Return a table of the differences over the confirming seeds."""
    return _table("Differences over the confirming seeds", _comparisons(record))


def advice(record: Record, folder: Path | None = None) -> str:
    """Return what a user should do, in one line, with the intervals; ``folder`` is that of the search."""
    answer, contestants = record["answer"], record["confirmation"]["contestants"]
    tuning, title = record["tuning"], number_named(record["number"]).title
    found = {
        (own["of"], own["to"]): f"{_difference(own, record['number'])} vs {ROLES[own['to']]}"
        for own in record["comparisons"]
    }
    where = f"{title} with {tuning['sampler']} at {tuning['steps']} steps"
    if answer == "untouched":
        text = "Leave the checkpoint as it is: no training was found that makes it better beyond chance. "
        shares = [
            f"{ROLES[one]} {found[one, 'untouched']}" for one in ("candidate", "plain") if (one, "untouched") in found
        ]
        return f"{text}{where}: {', '.join(shares)}."
    what = "with the candidate's settings" if answer == "candidate" else "plainly"
    shares = [text for (one, to), text in found.items() if one == answer and to in ("plain", "untouched")]
    if answer == "plain" and "untouched" not in contestants:
        shares = [f"the candidate {text}" for (one, to), text in found.items() if (one, to) == ("candidate", "plain")]
    command = "" if folder is None else f" Run: robustdiff train {folder / 'recipe.yaml'}"
    settings = described(contestants[answer]["settings"])
    return printable(f"Train {what}: {settings}. {where}: {', '.join(shares)}.{command}")


def _yaml(values: Sequence[Any]) -> str:
    """Return values as YAML in one line, with commas."""
    made = (yaml.safe_dump([value], default_flow_style=True, width=math.inf, allow_unicode=True) for value in values)
    return ",".join(text.strip()[1:-1] for text in made)


def _repeated(tuning: Record) -> str:
    """Return the command that repeats a search."""
    recipe = load_recipe(tuning["recipe"], changes=tuning["set"])
    usual, given = default_space(recipe), ["tune", tuning["recipe"]]
    for key, value in tuning["set"].items():
        given += ["--set", f"{key}={_yaml([value])}"]
    for key, values in tuning["space"].items():
        if list(values) != list(usual.get(key, ())):
            given += ["--try", f"{key}={_yaml(values)}"]
    defaults = {name: field.default for name, field in Tuning.model_fields.items()} | {"seed": recipe.seed}
    for name in ("sampler", "steps", "updates", "features"):  # which have no default, or another one for each dataset
        given += [f"--{name}", str(tuning[name])]
    for name in ("metric", "candidates", "rungs", "seeds", "seed", "num", "batch_size", "weights", "guidance"):
        if tuning[name] != defaults[name]:
            given += [f"--{name.replace('_', '-')}", str(tuning[name])]
    return command(*given)


def tune_markdown(record: Record) -> str:
    """Return the whole result as Markdown, without a heading."""
    tuning, own, on = record["tuning"], record["confirmation"], record["obtained_on"]
    minutes = record["process_seconds"] / 60
    number = number_named(record["number"])
    parts = [
        f"**{advice(record)}**",
        f"{code_span(_repeated(tuning))} on "
        f"{on['data']}, {threads(on['threads'])} a process of a {on['device'].upper()}, torch {on['torch']}: "
        f"{record['trainings']} trainings in {minutes:.0f} minutes of one process. {number.title} of {tuning['num']:,} "
        f"images on the features `{tuning['features']}`. Every contestant of a table makes the same number of backward "
        f"passes and sees as many images in them.",
    ]
    for rung in record["rungs"]:
        parts += [f"{_rung_title(rung, tuning)}, seed {tuning['seed']}:", _markdown(_rung(rung, tuning))]
        parts += failures(rung["contestants"])
    parts += [
        f"Confirmation: {own['backward_passes']:,} backward passes each, on {len(own['seeds'])} seeds and image noises "
        "that the search has not used:",
        _markdown(_confirmation(record)),
        "The differences, with Student's 95 % interval over the confirming seeds. " + RULE,
        _markdown(_comparisons(record)),
    ]
    return "\n\n".join(parts)
