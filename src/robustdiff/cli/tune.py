"""The command `robustdiff tune`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from robustdiff.cli import INTERRUPTED, app, err, options, out, say

if TYPE_CHECKING:
    from robustdiff.study.tune import Speed, Tuning


@app.command(short_help="Find the best settings for your sampler, or none")
def tune(
    recipe: Annotated[str, typer.Argument(help="A recipe that fine-tunes a checkpoint: a file, or a shipped one.")],
    sampler: Annotated[str, typer.Option(help="The sampler that you use.")],
    steps: Annotated[int, typer.Option(min=1, help="The number of network evaluations for one image that you use.")],
    overrides: Annotated[
        list[str],
        typer.Option("--set", metavar="KEY=VALUE", help="Change the recipe for all: --set lr_schedule=cosine"),
    ] = [],  # noqa: B006  (typer reads it and does not change it)
    tries: Annotated[
        list[str], typer.Option("--try", metavar="KEY=VALUES", help="Search other values: --try adversary.steps=2,3")
    ] = [],  # noqa: B006
    output: Annotated[Path | None, typer.Option(help="A folder; tuning/RECIPE-SAMPLER-STEPS by default.")] = None,
    minutes: Annotated[float, typer.Option(min=0.1, help="The time to spend, by which the updates are chosen.")] = 30,
    updates: Annotated[
        int | None,
        typer.Option(min=1, help="Backward passes of each confirming training, which --minutes would choose."),
    ] = None,
    candidates: Annotated[int, typer.Option(min=1, help="Settings in the first rung.")] = 12,
    rungs: Annotated[int, typer.Option(min=1, help="Halvings; each trains twice as long as the one before.")] = 3,
    seeds: Annotated[int, typer.Option(min=3, help="Confirming trainings of each contestant.")] = 5,
    seed: Annotated[
        int | None,
        typer.Option(min=0, max=options.LARGEST_SEED, help="Seed of the search; that of the recipe by default."),
    ] = None,
    num: Annotated[int, typer.Option(min=4, max=options.MOST_IMAGES, help="Images of each measurement.")] = 2000,
    metric: Annotated[str, typer.Option(help="What to rank by: fid, kid, clip-score=FOLDER, …")] = "fid",
    features: options.Features = None,
    weights: options.Weights = None,
    guidance: options.Guidance = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images that are sampled at a time.")] = 64,
    processes: Annotated[int, typer.Option(min=1, max=1024, help="Single-threaded processes that share the work.")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and its time, and do nothing.")] = False,
) -> None:
    """Find out whether, and how, to fine-tune a checkpoint for one sampler at one number of steps.

    α, K, radius, learning rate and moving average are searched by successive halving; the best settings, plain
    fine-tuning and the untouched checkpoint are then compared on new seeds. After an interruption the same command goes
    on, and processes that are started by the same command share the work.
    """
    from robustdiff.study.tune import new_tuning

    folder = output or Path("tuning") / f"{Path(recipe).stem}-{sampler}-{steps}"
    changes = options.parse_assignments(overrides, "--set", "adversary.step_size=0.5")
    tried = options.parse_assignments(tries, "--try", "adversary.step_size=0.03,0.1,0.3", lists=True)
    given: dict[str, Any] = {"sampler": sampler, "steps": steps, "metric": metric, "guidance": guidance, "seed": seed}
    given |= {"candidates": candidates, "rungs": rungs, "seeds": seeds, "num": num, "batch_size": batch_size}
    given |= {"updates": updates, "minutes": minutes, "features": features, "weights": weights}
    settings, speed = new_tuning(recipe, changes, tried, folder, processes=processes, **given)
    _show_plan(settings, speed, processes)
    if not dry_run and not _search(settings, folder, processes):
        say(f"stopped; the same command goes on from {folder}", err)
        raise typer.Exit(INTERRUPTED)


def _show_plan(settings: Tuning, speed: Speed, processes: int) -> None:
    from robustdiff.report.tables import print_whole
    from robustdiff.report.tune import plan_table
    from robustdiff.study.tune import RULE, stages

    print_whole(out, plan_table(settings, stages(settings), speed, processes))
    say(RULE)


def _search(settings: Tuning, folder: Path, processes: int) -> bool:
    from robustdiff.report.bar import Bar
    from robustdiff.report.tables import print_whole
    from robustdiff.report.tune import advice, comparison_table, confirmation_table, failures, rung_table
    from robustdiff.study.tune import tune as search

    with Bar(err) as bar:
        for record in search(settings, folder, processes=None if processes == 1 else processes, progress=bar):
            if "answer" not in record:
                print_whole(out, rung_table(record, settings))
                for line in failures(record["contestants"]):
                    say(line)
                continue
            print_whole(out, confirmation_table(record))
            print_whole(out, comparison_table(record))
            say(advice(record, folder))
            return True
    return False
