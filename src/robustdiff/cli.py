"""The command line: parse, call, print.

Exit code 0 is success; 2 bad input, with one line on stderr that names the thing and the remedy; 1 a failed run.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer
from rich.console import Console

from robustdiff.errors import InputError, RunError, printable

if TYPE_CHECKING:
    from robustdiff.data import ImageDataset
    from robustdiff.evaluation.features import FeatureExtractor
    from robustdiff.evaluation.generate import Generator
    from robustdiff.recipe import DataConfig

__all__ = ["app", "main"]

app = typer.Typer(
    name="robustdiff",
    help="Adversarial training of diffusion models, so that they stay good at 5 to 20 sampling steps.",
    epilog="Start with: robustdiff demo",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
# click's; newer typers hold a copy of click, and export only this one's descendant.
_UsageError: Any = typer.BadParameter.__base__

_T = TypeVar("_T")

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

Set = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a field: --set adversary.step_size=0.5")
]
Cpu = Annotated[bool, typer.Option("--cpu", help="Use the CPU even where there is a GPU.")]
Seed = Annotated[int, typer.Option(min=0, help="Image i depends on the seed and i alone.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images at a time.")]
Runs = Annotated[list[str], typer.Argument(help="Runs, pipeline folders or shipped models.")]
Samplers = Annotated[
    str | None, typer.Option(help="Samplers, with commas; by default ddim, multistep for consistency models.")
]
Data = Annotated[str | None, typer.Option(help="The real images, by name; those of the run by default.")]
Root = Annotated[str | None, typer.Option(help="The folder or file of the real images.")]
SetData = Annotated[
    list[str],
    typer.Option("--set", metavar="data.FIELD=VALUE", help="Change how the real images are read: --set data.size=16"),
]
Features = Annotated[
    str | None, typer.Option(help="digits, fashion-16, fashion-mnist, inception, or a .safetensors file.")
]
Spacing = Annotated[
    Literal["own", "leading", "trailing", "linspace"] | None,
    typer.Option(help="Which times are visited; by default what the checkpoint says; own: the sampler's own."),
]
Guidance = Annotated[
    float | None,
    typer.Option(min=0, help="Scale of classifier-free guidance, for models with a null class; 1: none."),
]
Classes = Annotated[
    int | None,
    typer.Option(min=1, help="How many classes are sampled; one less than the model has, if its last is null."),
]
Weights = Annotated[Path | None, typer.Option(help="Inception's weights file.")]


def _say(message: str, console: Console = out) -> None:
    """Print one line as it is: paths are neither broken at the width of the terminal nor read as markup or escapes."""
    console.print(printable(message), markup=False, emoji=False, soft_wrap=True)


def _native(precision: str) -> str:
    if precision != "auto":  # without importing torch while arguments are parsed
        return precision
    from robustdiff.section import native_precision

    return native_precision()


Precision = Annotated[
    Literal["auto", "fp32", "bf16", "fp16"],
    typer.Option(callback=_native, help="Mixed precision of the network; auto: bf16 where the device computes in it."),
]


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        from robustdiff import __version__

        _say(__version__)
        raise typer.Exit


@app.command()
def demo(
    output: Annotated[
        Path | None, typer.Option(help="Where runs, figures and result.json go; robustdiff-demo by default.")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="More updates and images: an hour instead of minutes.")] = False,
    consistency: Annotated[
        bool, typer.Option("--consistency", help="Distil the checkpoint into consistency models of 1 to 8 steps.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the batches, the noise and the samples.")] = 0,
) -> None:
    """Fine-tune a checkpoint plainly, randomly perturbed, and adversarially; then compare them.

    Sixty thousand real images of 16×16 pixels and a small pretrained network come with the package. It takes minutes on
    two CPU cores. Interrupted, the same command goes on where it was.
    """
    from robustdiff import demo as demonstrations
    from robustdiff.report.bar import Bar
    from robustdiff.report.tables import grid_table, print_whole

    folder = output or Path("robustdiff-demo-consistency" if consistency else "robustdiff-demo")
    if consistency:
        run = demonstrations.run_consistency_demo
        size = demonstrations.FULL_CONSISTENCY if full else demonstrations.QUICK_CONSISTENCY
    else:
        run, size = demonstrations.run_demo, demonstrations.FULL if full else demonstrations.QUICK
    folder.mkdir(parents=True, exist_ok=True)
    with Bar(err, "demonstration (%)", 100) as bar:
        result = run(folder, size, seed, on_progress=bar.update)
    if result is None:
        options = " --consistency" * consistency + " --full" * full + f" --seed {seed}" * bool(seed)
        _say(f"stopped; robustdiff demo{options} --output {folder} goes on from here", err)
        return
    grid, record = result
    _say(f"FID of {grid.cells[0].n} images a cell, with 95 % bootstrap intervals:")
    print_whole(out, grid_table(grid, "plain"))
    for cell in record.get("teacher", []):
        low, high = cell["fid_ci"]
        _say(f"the teacher, {cell['sampler']} {cell['steps']}: {cell['fid']:.2f} ±{(high - low) / 2:.2g}")
    _say(f"figures and result.json are in {folder}")


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a recipe that comes with the package.")],
    overrides: Set = [],  # noqa: B006  (typer reads it and does not change it)
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint; start if none.")] = False,
    cpu: Cpu = False,
) -> None:
    """Train a recipe: pretraining or fine-tuning, plain or adversarial.

    On several GPUs or machines: accelerate launch -m robustdiff train RECIPE. Ctrl-C saves first.
    """
    from accelerate import PartialState

    from robustdiff.recipe import load_recipe
    from robustdiff.report.bar import Bar
    from robustdiff.training.trainer import train as run

    settings = load_recipe(recipe, overrides)
    quiet = not PartialState(cpu=cpu).is_main_process
    with Bar(err, settings.output, settings.steps, quiet=quiet) as bar:
        result = run(settings, resume=resume, cpu=cpu, progress=bar)
    if quiet:
        return
    if result is None:
        _say(f"stopped and saved; --resume goes on from {settings.output}", err)
    else:
        _say(f"{settings.output}: {result['steps']} updates, loss {result['loss']:.4f}; the model is in model/")


@app.command()
def sample(
    run: Annotated[str, typer.Argument(help="A run, a diffusers pipeline folder, or a shipped model.")],
    output: Annotated[Path, typer.Option(help="A file.npz, or a folder for PNGs.")] = Path("samples.npz"),
    num: Annotated[int, typer.Option(min=1, help="How many images.")] = 64,
    sampler: Annotated[
        str | None,
        typer.Option(help="ddim, iddpm, dpm++, es, time-shift; euler for flows; multistep for consistency models."),
    ] = None,
    steps: Annotated[
        str | None,
        typer.Option(help='Network evaluations for one image; or "10,20,30", "ddim25"; multistep: scales "0,22,39".'),
    ] = None,
    seed: Seed = 0,
    batch_size: BatchSize = 128,
    precision: Precision = "fp32",
    label: Annotated[
        int | None, typer.Option("--class", help="The class of all images; all in turn by default.")
    ] = None,
    eps_scale: Annotated[
        str | None,
        typer.Option(help="What the predicted noise is divided by, 1.017 for es by default; for es also k,b."),
    ] = None,
    window: Annotated[int | None, typer.Option(help="time-shift: the window's width, in training times.")] = None,
    cutoff: Annotated[int | None, typer.Option(help="time-shift: the time down from which nothing is shifted.")] = None,
    spacing: Spacing = None,
    guidance: Guidance = None,
    classes: Classes = None,
    size: Annotated[
        int | None, typer.Option(min=1, help="Pixels a side, where the model does not say it, or another size.")
    ] = None,
    cpu: Cpu = False,
) -> None:
    """Sample images into an .npz (arr_0: uint8 NHWC, what ADM's evaluator reads) or into PNGs.

    Interrupted, the same command goes on; images of another run or other settings are not overwritten. On several GPUs:
    accelerate launch -m robustdiff sample RUN.
    """
    from accelerate import Accelerator

    from robustdiff.evaluation.generate import Generator, write_npz, write_pngs
    from robustdiff.report.bar import Bar

    accelerator = Accelerator(cpu=cpu)
    generator = Generator.load(
        run,
        accelerator.device,
        size=size,
        sampler=sampler,
        steps=int(steps) if steps is not None and steps.lstrip("-").isdigit() else steps,
        seed=seed,
        batch_size=batch_size,
        precision=precision,
        label=label,
        num_classes=classes,
        guidance=guidance,
        options=_given(eps_scale=_scale(eps_scale), window=window, cutoff=cutoff, spacing=spacing),
    )
    if output.suffix and output.suffix != ".npz":
        raise InputError(f"{output}: give a file that ends in .npz, or a folder")
    generator.shape  # noqa: B018  (raises where the model does not say it)
    output.parent.mkdir(parents=True, exist_ok=True)
    quiet = not accelerator.is_main_process
    with Bar(err, f"{generator.sampler}, {generator.steps} steps", num, quiet=quiet) as bar:
        write = write_npz if output.suffix == ".npz" else write_pngs
        made = write(generator, num, output, accelerator, bar)
    if not quiet:
        _say(f"{num} images in {output}" + ("" if made else ", which were there already"))


@app.command()
def evaluate(
    sources: Annotated[
        list[str], typer.Argument(help="Runs, pipeline folders or shipped models; folders of images or .npz files.")
    ],
    sampler: Samplers = None,
    steps: Annotated[
        str | None,
        typer.Option(help="Numbers of network evaluations, with commas: 5,10,20,50; 1,2,4,8 for consistency models."),
    ] = None,
    num: Annotated[
        int | None, typer.Option(min=4, help="Images of each cell; by default 5000, and all of a folder or file.")
    ] = None,
    data: Data = None,
    root: Root = None,
    overrides: SetData = [],  # noqa: B006
    reference: Annotated[
        Path | None, typer.Option(help="In place of real images, their mu and sigma under --features: an .npz file.")
    ] = None,
    features: Features = None,
    weights: Weights = None,
    output: Annotated[Path | None, typer.Option(help="A folder for result.json and figures.")] = None,
    seed: Seed = 0,
    batch_size: BatchSize = 128,
    precision: Precision = "fp32",
    spacing: Spacing = None,
    guidance: Guidance = None,
    cpu: Cpu = False,
) -> None:
    """FID, KID, precision and recall over checkpoint × sampler × steps, on common random numbers.

    Images in a folder or an .npz file (arr_0: uint8 NHWC) are measured as they are. On several GPUs: accelerate launch
    -m robustdiff evaluate RUN.
    """
    from accelerate import Accelerator

    from robustdiff.evaluation.fidelity import load_reference, reference_statistics
    from robustdiff.evaluation.grid import evaluate_grid, evaluate_images
    from robustdiff.evaluation.images import check_size, load_images, number_of_images
    from robustdiff.report.bar import Bar
    from robustdiff.report.results import write_results
    from robustdiff.report.tables import cell_table, grid_table, print_whole

    accelerator = Accelerator(cpu=cpu)
    named = _names(sources)
    sets = {name: images for name, source in named.items() if (images := load_images(source)) is not None}
    numbers = {name: number_of_images(images, num) for name, images in sets.items()}
    num = num or 5000
    runs = {name: source for name, source in named.items() if name not in sets}
    for option, value in (("--sampler", sampler), ("--steps", steps)):
        if value is not None and not runs:
            raise InputError(f"{option} is how runs are sampled, and only images are given: leave it out")
    samplers, counts = _samplers(sampler), [] if steps is None else _counts(steps)
    if reference is not None and (data is not None or root is not None or overrides):
        raise InputError("--reference takes the place of --data, --root and --set: give it, or them")
    real = _real_images(next(iter(runs.values()), None), data, root, overrides) if reference is None else None
    dataset = None if real is None else real.load()
    # Steps are given, so that no run's recipe decides how all are sampled.
    generators = _generators(
        runs,
        accelerator.device,
        samplers,
        counts or [1],
        dataset,
        seed=seed,
        batch_size=batch_size,
        precision=precision,
        guidance=guidance,
        options=_given(spacing=spacing),
    )
    if generators:
        samplers = samplers or [next(iter(generators.values())).sampler]
        counts = counts or ([1, 2, 4, 8] if samplers[0] == "multistep" else [5, 10, 20, 50])
    if dataset is not None:
        for images in sets.values():
            check_size(images, dataset.shape)
    extractor = _extractor(features, weights, None if real is None else real.name, accelerator.device)
    quiet = not accelerator.is_main_process
    with Bar(err, "statistics of the real images", 1, quiet=quiet) as bar:
        if reference is not None:
            statistics = load_reference(reference, extractor)
        else:
            assert dataset is not None
            with accelerator.main_process_first():  # the others read the cache
                statistics = reference_statistics(dataset, extractor)
        cells = []
        for name, images in sets.items():  # before the runs, which take longer
            bar.describe(name, numbers[name])
            cells.append(
                evaluate_images(
                    name, images, numbers[name], extractor, statistics, accelerator, batch_size, bar.advance
                )
            )
        bar.describe("network evaluations", len(runs) * len(samplers) * sum(counts) * num)
        grid = evaluate_grid(
            generators, samplers, counts, num, extractor, statistics, accelerator, on_images=bar.advance
        )
    if quiet:
        return
    target = str(reference) if dataset is None else dataset.name
    _say(f"to {target} on the features {extractor.name}, FID with 95 % bootstrap intervals:")
    print_whole(out, cell_table([*grid.cells, *cells]))
    if len(runs) > 1:
        _say(f"FID, and its difference to {next(iter(runs))} on common random numbers:")
        print_whole(out, grid_table(grid, next(iter(runs))))
    if output is not None:
        title = f"{target}, {num} images a cell, seed {seed}"
        record = {
            "data": None if dataset is None else dataset.name,
            "reference": str(reference) if real is None else real.model_dump(mode="json"),
            "features": extractor.name,
            "seed": seed,
        }
        write_results(output, replace(grid, cells=[*grid.cells, *cells]), title, record)
        _say(f"figures and result.json are in {output}" if runs else f"result.json is in {output}")


@app.command()
def search_times(
    run: Annotated[str, typer.Argument(help="A consistency model: a run or a pipeline folder.")],
    steps: Annotated[int, typer.Option(min=2, help="Network evaluations for one image.")] = 4,
    num: Annotated[int, typer.Option(min=4, help="Images for each candidate.")] = 2000,
    data: Data = None,
    root: Root = None,
    overrides: SetData = [],  # noqa: B006
    features: Features = None,
    weights: Weights = None,
    output: Annotated[Path | None, typer.Option(help="A .json for what was found and all that was tried.")] = None,
    seed: Seed = 0,
    batch_size: BatchSize = 128,
    precision: Precision = "fp32",
    cpu: Cpu = False,
) -> None:
    """Find the scales at which a consistency model is sampled best in so many steps: greedily, by FID.

    The scales that are found are what robustdiff sample RUN --steps takes. Choose another --seed to judge them.
    """
    from accelerate import Accelerator

    from robustdiff.evaluation.fidelity import Fidelity, check_finite, reference_statistics
    from robustdiff.evaluation.generate import Generator
    from robustdiff.files import atomic_write
    from robustdiff.report.bar import Bar
    from robustdiff.samplers.time_search import search_times as search

    device = Accelerator(cpu=cpu).device
    generator = Generator.load(run, device, sampler="multistep", seed=seed, batch_size=batch_size, precision=precision)
    config = _real_images(run, data, root, overrides)
    dataset = config.load()
    generator.model.backbone.check_shape(dataset.shape, generator.model.codec, run)
    extractor = _extractor(features, weights, config.name, device)
    with Bar(err, "statistics of the real images", 1) as bar:
        reference = reference_statistics(dataset, extractor)

        def fid(numbers: tuple[int, ...]) -> float:
            candidate = ",".join(map(str, numbers))
            bar.describe(f"scales {candidate}", num)
            fidelity = Fidelity(extractor, reference)
            for batch, images in replace(generator, steps=candidate).images(range(num)):
                fidelity.update(images, batch.start)
                bar.advance(len(batch))
            value = fidelity.fid()
            check_finite(f"scales {candidate}", {"fid": value})
            return value

        found = search(fid, steps, len(generator.model.process))
    best = ",".join(map(str, found.numbers))
    _say(f"--steps {best}  FID {found.value:.2f} of {num} images, {len(found.evaluated)} candidates tried")
    if output is not None:
        tried = [{"steps": ",".join(map(str, n)), "fid": value} for n, value in found.evaluated.items()]
        record = {"steps": best, "fid": found.value, "num": num, "seed": seed, "evaluated": tried}
        with atomic_write(output) as file:
            file.write(json.dumps(record, indent=1).encode())


@app.command()
def solver_error(
    teacher: Annotated[
        str, typer.Argument(help="A diffusion model or a denoiser: a run, a folder or a shipped model.")
    ],
    scales: Annotated[str, typer.Option(help="Numbers N of levels, with commas.")] = "18,40,80,160",
    solver: Annotated[str, typer.Option(help="heun, euler, or both with a comma.")] = "heun,euler",
    num: Annotated[int, typer.Option(min=2, help="Images.")] = 256,
    points: Annotated[int, typer.Option(min=2, help="Pairs of levels of each N, evenly spaced.")] = 8,
    substeps: Annotated[int, typer.Option(min=2, help="Heun steps of the reference between two levels.")] = 32,
    data: Data = None,
    root: Root = None,
    overrides: SetData = [],  # noqa: B006
    output: Annotated[Path, typer.Option(help="A folder for result.json and the figure.")] = Path("solver-error"),
    seed: Annotated[int, typer.Option(min=0, help="Of the noise.")] = 0,
    batch_size: BatchSize = 128,
    cpu: Cpu = False,
) -> None:
    """Measure how far one solver step of distillation is from the teacher's trajectory, level by level."""
    from accelerate import Accelerator

    from robustdiff.backbones.model import load_model
    from robustdiff.data import to_unit
    from robustdiff.files import atomic_write
    from robustdiff.mismatch.solver_error import fitted_order, measure_solver_error
    from robustdiff.objectives.consistency import SOLVERS
    from robustdiff.report.bar import Bar
    from robustdiff.report.figures import save_figure
    from robustdiff.report.solver_error import solver_error_figure, solver_error_table
    from robustdiff.report.tables import print_whole

    solvers = solver.split(",")
    if unknown := [name for name in solvers if name not in SOLVERS]:
        raise InputError(f"unknown solver {unknown[0]!r}: use {' or '.join(SOLVERS)}")
    counts = _counts(scales, "--scales", "18,40,80,160")
    if min(counts) < 2:
        raise InputError(f"--scales {scales}: two levels are the fewest that have a step between them")
    device = Accelerator(cpu=cpu).device
    model = load_model(teacher).to(device)
    denoise = model.denoiser()
    dataset = _real_images(teacher, data, root, overrides).load()
    model.check_data(dataset)
    if num > len(dataset):
        raise InputError(f"--num {num}: {dataset.name} has {len(dataset)} images")
    batch, labels = dataset.__getitems__(list(range(num)))
    images = to_unit(batch).to(device)
    if model.condition.classes is None:
        labels = None
    pairs = sum(min(points, N - 1) for N in counts)
    with Bar(err, f"{2 * (substeps + 1)} evaluations for each of the images", pairs * num) as bar:
        errors = measure_solver_error(
            denoise,
            images,
            counts,
            solvers,
            labels=None if labels is None else labels.to(device),
            points=points,
            substeps=substeps,
            seed=seed,
            batch_size=batch_size,
            on_images=bar.advance,
        )
    print_whole(out, solver_error_table(errors))
    output.mkdir(parents=True, exist_ok=True)
    record = {
        "teacher": teacher,
        "data": dataset.name,
        "num": num,
        "dimensions": images[0].numel(),
        "substeps": substeps,
        "seed": seed,
        "orders": {name: fitted_order([e for e in errors if e.solver == name]) for name in solvers},
        "errors": [asdict(error) for error in errors],
    }
    title = f"One step of the solver on {Path(teacher).name}, {num} images of {dataset.name}"
    with atomic_write(output / "result.json") as file:
        file.write(json.dumps(record, indent=1).encode())
    save_figure(solver_error_figure(errors, title), output / "solver-error.png")
    _say(f"the figure and result.json are in {output}")


@app.command()
def mismatch(
    runs: Runs,
    sampler: Samplers = None,
    steps: Annotated[str, typer.Option(help="Numbers of network evaluations, with commas.")] = "10",
    num: Annotated[
        int | None, typer.Option(min=1, help="Images; by default 2000, or half of the real ones if they are fewer.")
    ] = None,
    radii: Annotated[str, typer.Option(help="ℓ2 radii of the robust loss, with commas.")] = "0.1,0.3,1.0",
    probes: Annotated[
        int | None, typer.Option(min=0, help="Images of the robust loss, by default 32; 0 leaves it out.")
    ] = None,
    data: Data = None,
    root: Root = None,
    overrides: SetData = [],  # noqa: B006
    output: Annotated[Path, typer.Option(help="A folder for mismatch.json and figures.")] = Path("mismatch"),
    seed: Seed = 0,
    batch_size: BatchSize = 128,
    precision: Precision = "fp32",
    spacing: Spacing = None,
    guidance: Guidance = None,
    cpu: Cpu = False,
) -> None:
    """How far the points that a sampler makes are from those that the network was trained on, step by step.

    Spread (exposure bias), sliced Wasserstein, energy and Fréchet distance and KL divergence along the sampler's path,
    with intervals and floors; robust loss and Lipschitz constant at true points, in fp32. All on common random numbers.
    """
    from accelerate import Accelerator

    from robustdiff.files import atomic_write
    from robustdiff.mismatch.measure import measure_mismatch
    from robustdiff.report.bar import Bar
    from robustdiff.report.figures import save_figure
    from robustdiff.report.mismatch import mismatch_figure, mismatch_table, robustness_figure, robustness_table
    from robustdiff.report.tables import print_whole

    samplers, counts = _samplers(sampler), _counts(steps)
    try:
        sizes = [float(part) for part in radii.split(",")]
    except ValueError:
        raise InputError(f"--radii {radii}: give numbers with commas, such as 0.1,0.3,1.0") from None
    device = Accelerator(cpu=cpu).device
    named = _names(runs)
    dataset = _real_images(runs[0], data, root, overrides).load()
    generators = _generators(
        named,
        device,
        samplers,
        counts,
        dataset,
        batch_size=batch_size,
        precision=precision,
        guidance=guidance,
        options=_given(spacing=spacing),
    )
    num = min(2000, len(dataset) // 2) if num is None else num
    probes = min(32, num) if probes is None else probes
    with Bar(err, "mismatch", 1) as bar:
        result = measure_mismatch(
            generators,
            dataset,
            samplers or [next(iter(generators.values())).sampler],
            counts,
            num,
            radii=sizes,
            probes=probes,
            seed=seed,
            on_part=bar.describe,
            on_progress=bar.advance,
        )
    output.mkdir(parents=True, exist_ok=True)
    with atomic_write(output / "mismatch.json") as file:
        file.write(json.dumps(asdict(result), indent=1).encode())
    _say(f"p(x_t) of {num} images against q(x_t) of {dataset.name}, with 95 % intervals:")
    print_whole(out, mismatch_table(result))
    title = f"{dataset.name}, {num} images, seed {seed}"
    save_figure(mismatch_figure(result, title), output / "mismatch.png")
    if result.robustness:
        _say(f"robust loss and Lipschitz constant of the predicted noise at {probes} true points:")
        print_whole(out, robustness_table(result))
        save_figure(robustness_figure(result, f"{dataset.name}, {probes} images, seed {seed}"), output / "robust.png")
    _say(f"figures and mismatch.json are in {output}")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def convert(
    context: typer.Context,
    source: Annotated[Path, typer.Argument(help="A guided-diffusion .pt; or a run or pipeline folder, to go back.")],
    output: Annotated[Path, typer.Argument(help="The pipeline folder to make; or the .pt.")],
    preset: Annotated[str | None, typer.Option(help="The flags of a published model, such as imagenet64-adm.")] = None,
    flags: Annotated[str, typer.Option(help="The flags as one string, such as the MODEL_FLAGS of a README.")] = "",
) -> None:
    """Convert a guided-diffusion (ADM) checkpoint to diffusers and back, bit for bit.

    The flags that the checkpoint was trained with come from --preset, from --flags "…", or one by one as
    guided-diffusion spells them: robustdiff convert model.pt OUT --image_size 64 --num_channels 192 …
    """
    from robustdiff.backbones.convert import convert as run
    from robustdiff.backbones.convert import read_flags

    text = " ".join([flags, *context.args])
    if source.is_dir() and preset is None and not text.strip():
        run(source, output)
    else:
        run(source, output, *read_flags(preset, text))
    _say(f"{source} → {output}")


@app.command()
def study(
    file: Annotated[Path, typer.Argument(help="A study file: methods, seeds, samplers and steps.")],
    output: Annotated[Path | None, typer.Option(help="Where runs and cells are; studies/NAME by default.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what is left, and how long it takes.")] = False,
    report: Annotated[
        Path | None, typer.Option(help="Compute nothing: write what is there as this page (.md), with its figures.")
    ] = None,
) -> None:
    """Train and measure a matrix of methods × seeds × samplers × steps.

    Each result is a file; only what is missing is computed. Start the same command several times, and the processes
    share the work.
    """
    from robustdiff.report.bar import Bar
    from robustdiff.report.study import write_page
    from robustdiff.report.tables import print_whole, remaining_table
    from robustdiff.study import load_study, remaining, run_study

    settings = load_study(file)
    folder = output or Path("studies") / file.stem
    if dry_run:
        print_whole(out, remaining_table(remaining(settings, folder)))
        return
    if report is not None:
        write_page(settings, folder, report)
        _say(f"{report} and its figures in {report.with_suffix('')}")
        return
    with Bar(err, settings.title, 1) as bar:
        finished = run_study(settings, folder, on_part=bar.describe, on_progress=bar.update)
    if finished:
        _say(f"every cell is in {folder / 'cells'}")
    else:
        _say(f"stopped; robustdiff study {file} --output {folder} goes on from here", err)


@app.command()
def reproduce(
    cell: Annotated[Path, typer.Argument(help="The file of a cell.")],
    output: Annotated[Path, typer.Option(help="Where the run goes.")] = Path("reproduced"),
) -> None:
    """Make one cell of a study again, from the settings in its file alone, and compare."""
    from robustdiff.report.bar import Bar
    from robustdiff.report.tables import print_whole, reproduced_table
    from robustdiff.study import MEASURES
    from robustdiff.study import reproduce as run

    with Bar(err, cell.stem, 1) as bar:
        result = run(cell, output, on_part=bar.describe, on_progress=bar.update)
    if result is None:
        _say(f"stopped; robustdiff reproduce {cell} --output {output} goes on from here", err)
        return
    before, after = result
    print_whole(out, reproduced_table(before, after))
    if any(before[name] != after[name] for name in ("weights", "replicates", *MEASURES)):
        raise RunError("the cell is not the same: another machine, torch or number of threads rounds differently")
    _say("the same to the last digit")


def _scale(text: str | None) -> float | tuple[float, float] | None:
    """A constant epsilon scale, or the (k, b) of a linear one."""
    if text is None:
        return None
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if len(values) == 1:
        return values[0]
    if len(values) == 2:
        return values[0], values[1]
    raise InputError(f"--eps-scale {text}: give a number, or k,b for k·i + b")


def _given(**options: Any) -> dict[str, Any]:
    """Return the options that are not None."""
    return {name: value for name, value in options.items() if value is not None}


def _real_images(run: str | None, data: str | None, root: str | None, overrides: list[str]) -> DataConfig:
    """The data section of a run's recipe, or else of fashion-16, changed as the options say.

    A run may come from others. What its recipe has this command read is said first; nothing is fetched and no folder
    above the working folder is searched because a recipe says so.
    """
    from accelerate import PartialState

    from robustdiff.data.huggingface import is_remote
    from robustdiff.recipe import load_data_config

    recipe = None if run is None else Path(run) / "recipe.yaml"
    if recipe is None or not recipe.is_file():
        return load_data_config("fashion-16", overrides, data, root)
    config = load_data_config(str(recipe), overrides, data, root)
    fields = {assignment.partition("=")[0] for assignment in overrides}
    named = data is not None or not fields.isdisjoint({"data", "data.name"})
    rooted = root is not None or "data.root" in fields
    remote = config.name.startswith("hf:")
    if named or not (remote or (config.root is not None and not rooted)):
        return config
    if remote and is_remote(config.name):
        raise InputError(
            f"{recipe} names the data {config.name}, which is fetched from the network: add --data {config.name} if "
            "that is wanted, or name other images by --data"
        )
    folder = Path(config.name.removeprefix("hf:") if remote else str(config.root)).resolve()
    if folder in Path.cwd().parents:
        raise InputError(
            f"{recipe} names the data {folder}, which this folder lies in: add --root {folder} if all of it is meant, "
            "or name other images by --data and --root"
        )
    if os.path.exists(folder) and PartialState().is_main_process:
        _say(printable(f"{recipe} names the data: reading {folder}"), err)
    return config


def _extractor(features: str | None, weights: Path | None, data: str | None, device: Any) -> FeatureExtractor:
    """The features of a name, or else those of a dataset."""
    from robustdiff.evaluation.features import INCEPTION_URL, SHIPPED, load_extractor

    if features is None and data is None:
        raise InputError("--reference needs the features that it is of: give --features inception --weights FILE")
    if features is None and data not in SHIPPED:
        raise InputError(f"no features are known for {data}: give --features inception --weights FILE, or others")
    if features == "inception" and weights is None:
        raise InputError(f"--features inception needs --weights FILE; download it from {INCEPTION_URL}")
    return load_extractor(features or str(data), weights=weights, device=device)


def _counts(text: str, option: str = "--steps", example: str = "5,10,20,50") -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"{option} {text}: give whole numbers with commas, such as {example}") from None
    return _distinct(counts, option)


def _samplers(text: str | None) -> list[str]:
    """The samplers that are asked for; none where nothing is."""
    return [] if text is None else _distinct(text.split(","), "--sampler")


def _distinct(values: list[_T], option: str) -> list[_T]:
    if twice := [value for value in values if values.count(value) > 1]:
        raise InputError(f"{option} has {twice[0]} twice: give each once")
    return values


def _names(sources: list[str]) -> dict[str, str]:
    """The sources by the last part of their paths, or by the whole path where that is not unique."""
    short = [Path(source).name for source in sources]
    named = {s if short.count(s) == 1 else str(Path(source)): source for s, source in zip(short, sources, strict=True)}
    if len(named) < len(sources):
        raise InputError("the same run, folder or file is given twice: give each once")
    return named


def _generators(
    runs: dict[str, str],
    device: Any,
    samplers: list[str],
    counts: list[int],
    dataset: ImageDataset | None,
    **settings: Any,
) -> dict[str, Generator]:
    """Return the generators of runs by name, with the first of the samplers and numbers of steps.

    Raises:
        InputError: If a run makes images of another shape than the dataset's.
    """
    from robustdiff.evaluation.generate import Generator

    settings |= {"sampler": samplers[0] if samplers else None, "steps": counts[0]}
    classes = None if dataset is None else dataset.num_classes
    generators = {name: Generator.load(run, device, data_classes=classes, **settings) for name, run in runs.items()}
    if dataset is not None:
        for name, generator in generators.items():
            generator.model.backbone.check_shape(dataset.shape, generator.model.codec, runs[name])
    return generators


def main() -> None:
    """Run the command line and exit."""
    # logging stays as it is: its last resort writes warnings to what sys.stderr is at the time, so above a bar.
    try:
        code = app(prog_name="robustdiff", standalone_mode=False)
    except InputError as error:
        sys.exit(_fail(str(error), 2))
    except _UsageError as error:
        message = error.format_message().replace("Value error, ", "")  # what pydantic, in newer typers, says before it
        sys.exit(_fail(f"{message} (robustdiff --help)", 2))
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(_fail("interrupted", 130))
    except RunError as error:
        sys.exit(_fail(str(error), 1))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            sys.exit(_fail(f"the disk is full ({error.filename or error}): free some space; --resume goes on", 1))
        if error.filename is None or error.errno == errno.EIO:
            raise
        sys.exit(_fail(f"{os.fsdecode(error.filename)}: {error.strerror}: give another path", 2))
    except ValueError as error:  # what Python raises for names that the system cannot have
        if isinstance(error, UnicodeEncodeError) and error.reason == "surrogates not allowed":
            sys.exit(_fail(f"{error.object!r} holds a character that no text has: correct the path or the name", 2))
        if "embedded null" not in str(error):
            raise
        sys.exit(_fail("a path holds a null byte: correct it", 2))
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> int:
    """One line on stderr, without what would move the cursor or hide text."""
    print("robustdiff: " + printable(" ".join(message.split())), file=sys.stderr)
    return code
