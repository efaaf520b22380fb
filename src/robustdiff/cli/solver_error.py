"""The command `robustdiff solver-error`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from robustdiff.cli import app, err, options, out, say


@app.command(short_help="Measure the error of one solver step of a distillation")
def solver_error(
    teacher: Annotated[
        str, typer.Argument(help="A diffusion model or a denoiser: a run, a folder or a shipped model.")
    ],
    scales: Annotated[str, typer.Option(help="Numbers N of levels, with commas.")] = "18,40,80,160",
    solver: Annotated[str, typer.Option(help="heun, euler, or both with a comma.")] = "heun,euler",
    num: Annotated[int, typer.Option(min=2, max=options.MOST_IMAGES, help="The number of images.")] = 256,
    points: Annotated[int, typer.Option(min=2, help="Pairs of levels of each N, evenly spaced.")] = 8,
    substeps: Annotated[
        int, typer.Option(min=2, max=100_000, help="Heun steps of the reference between two levels.")
    ] = 32,
    data: options.Data = None,
    root: options.Root = None,
    overrides: options.SetData = [],  # noqa: B006
    output: Annotated[Path, typer.Option(help="A folder for result.json and the figure.")] = Path("solver-error"),
    seed: Annotated[int, typer.Option(min=0, max=options.LARGEST_SEED, help="The seed of the noise.")] = 0,
    batch_size: options.BatchSize = 128,
    cpu: options.Cpu = False,
) -> None:
    """Measure how far one solver step of distillation is from the teacher's trajectory, level by level."""
    from robustdiff.distributed import make_accelerator
    from robustdiff.mismatch.solver_error import measure_teacher
    from robustdiff.report.bar import Bar
    from robustdiff.report.solver_error import solver_error_table, write_solver_error
    from robustdiff.report.tables import print_whole

    levels = options.parse_counts(scales, "--scales", "18,40,80,160")
    real = options.real_images(teacher, data, root, overrides)
    options.claim(output / "result.json", real)
    settings = options.given(points=points, substeps=substeps, seed=seed, batch_size=batch_size)
    with Bar(err) as bar:
        method = make_accelerator(cpu).device, levels, options.parse_names(solver, "--solver"), num
        result = measure_teacher(teacher, real, *method, progress=bar, **settings)
    write_solver_error(output, result)  # first, since nothing may read what is printed
    print_whole(out, solver_error_table(result.errors))
    say(f"the figure and result.json are in {output}")
