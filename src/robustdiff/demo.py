"""The demonstration: three fine-tunings of one checkpoint on real images, and the evidence.

The shipped base checkpoint is fine-tuned on fashion-16 plainly, with a random perturbation of adversarial training's
size, and with free adversarial training. Each makes the same number of optimiser updates, one backward pass each, at
the same batch size, learning rate and moving average; all read the same sequence of batches, times and noise.
Plain fine-tuning makes one update on each batch, the other two K, and so they see the first K-th of the sequence.
Then FID over samplers and steps, from the same noise.

The second demonstration distils the checkpoint into consistency models instead: plainly, and with adversarial training
of the solver's output or of the student's input, again for equally many updates. All start from the same network, the
checkpoint fine-tuned as a denoiser over noise levels. FID at 1, 2, 4 and 8 steps, and the teacher's at 10 and 50.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from robustdiff.data import load_dataset
from robustdiff.evaluation.features import load_extractor
from robustdiff.evaluation.fidelity import reference_statistics
from robustdiff.evaluation.grid import Grid, evaluate_grid
from robustdiff.recipe import Recipe, load_recipe
from robustdiff.report.results import write_results
from robustdiff.samplers.generate import Generator
from robustdiff.training.trainer import Status, train

__all__ = ["FULL", "FULL_CONSISTENCY", "QUICK", "QUICK_CONSISTENCY", "DemoSize", "run_consistency_demo", "run_demo"]


METHODS = {"plain": "none", "random": "random", "free AT": "free"}
SAMPLERS = ("ddim", "iddpm", "dpm++")
STEPS = (5, 10, 20, 50)
DISTILLED = {
    "plain": ["adversary=none"],
    "AT (solver)": ["objective.perturb=solver"],
    "AT (student)": ["objective.perturb=student"],
}
DISTILLED_STEPS = (1, 2, 4, 8)
STUDENT, TEACHER = "fashion-16-edm", "fashion-16"
TEACHER_STEPS = (10, 50)
BATCH = 64  # images at a time: more do not fit into the cache of a core


@dataclass(frozen=True)
class DemoSize:
    """How much the demonstration does. Arguments: updates: of each fine-tuning; images: of each cell."""

    updates: int
    images: int


QUICK = DemoSize(updates=300, images=500)
FULL = DemoSize(updates=1200, images=5000)
QUICK_CONSISTENCY = DemoSize(updates=300, images=500)
FULL_CONSISTENCY = DemoSize(updates=6000, images=5000)


Part = Callable[[str, float], None]
Progress = Callable[[float, str], None]


def _train_each(
    recipes: dict[str, Recipe], seed: int, what: str, on_part: Part, on_progress: Progress
) -> tuple[dict[str, Generator], dict[str, Any]] | None:
    """The trained networks and what is recorded of each training; None when a signal stopped one."""
    generators: dict[str, Generator] = {}
    training: dict[str, Any] = {}
    for method, recipe in recipes.items():
        on_part(f"{what}: {method}", recipe.steps)

        def on_status(status: Status) -> None:
            on_progress(status.step, status.note)

        result = train(recipe, resume=True, on_status=on_status)
        if result is None:
            return None
        training[method] = {"recipe": recipe.model_dump(mode="json"), **result}
        generators[method] = _load(recipe.output, seed, recipe.precision)
    return generators, training


def _load(network: str, seed: int, precision: str) -> Generator:
    """Return how images are made of a network, on the device that is trained on."""
    return Generator.load(network, Accelerator().device, seed=seed, precision=precision, batch_size=BATCH)


def _counter(on_progress: Progress) -> Callable[[int, str], None]:
    """What a grid calls with new evaluations, for a bar that shows all of them."""
    done = 0

    def on_images(evaluations: int, cell: str) -> None:
        nonlocal done
        done += evaluations
        on_progress(done, cell)

    return on_images


def _evaluation(
    num: int, evaluations: int, on_part: Part, on_progress: Progress
) -> tuple[Callable[..., Grid], dict[str, Any]]:
    """Of generators, samplers and steps their grid, and what it is obtained on.

    Arguments:
        num: Images of a cell.
        evaluations: Of networks, for one image of each cell.
        on_part: As in :func:`run_demo`.
        on_progress: As in :func:`run_demo`.
    """
    accelerator = Accelerator()
    extractor = load_extractor("fashion-16", device=accelerator.device)
    on_part("statistics of the real images", 1)
    reference = reference_statistics(load_dataset("fashion-16"), extractor)
    on_part("sampling (network evaluations)", evaluations * num)
    evaluate = partial(
        evaluate_grid,
        num=num,
        extractor=extractor,
        reference=reference,
        accelerator=accelerator,
        on_images=_counter(on_progress),
    )
    return evaluate, {
        "data": "fashion-16: 60,000 training images of Fashion-MNIST at 16×16",
        "features": extractor.name,
        "device": accelerator.device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _folder(output: Path, method: str) -> Path:
    return output / "runs" / method.translate({ord(" "): "-", ord("("): None, ord(")"): None}).lower()


def run_demo(
    output: Path,
    size: DemoSize,
    seed: int = 0,
    *,
    on_part: Part = lambda description, total: None,
    on_progress: Progress = lambda done, note: None,
) -> tuple[Grid, dict[str, Any]] | None:
    """Fine-tune, evaluate, and write figures and ``result.json`` into a folder.

    Fine-tunings that are there already are not made again, and those that were interrupted go on.

    Arguments:
        output: The folder.
        size: How much to do.
        seed: Of the batches, the noise and the samples.
        on_part: Called when a part of the work begins, with what it is and its size.
        on_progress: Called with how much of the part is done, and a note.

    Returns:
        The grid and what ``result.json`` holds; None when a signal stopped it.

    Raises:
        InputError: If the folder holds a demonstration of another size or seed.
    """
    recipes = {
        method: load_recipe(
            "fashion-16-at",
            [
                f"adversary.name={adversary}",
                f"steps={size.updates}",
                f"seed={seed}",
                f"output={_folder(output, method)}",
            ],
        )
        for method, adversary in METHODS.items()
    }
    trained = _train_each(recipes, seed, "fine-tuning", on_part, on_progress)
    if trained is None:
        return None
    generators, training = trained
    evaluate, obtained_on = _evaluation(size.images, len(METHODS) * len(SAMPLERS) * sum(STEPS), on_part, on_progress)
    grid = evaluate(generators, SAMPLERS, STEPS)
    what = f"fashion-16, {size.updates} updates, {size.images} images a cell, seed {seed}"
    settings = {"obtained_on": obtained_on, "seed": seed, "training": training}
    return grid, write_results(output, grid, what, settings)


def run_consistency_demo(
    output: Path,
    size: DemoSize,
    seed: int = 0,
    *,
    on_part: Part = lambda description, total: None,
    on_progress: Progress = lambda done, note: None,
) -> tuple[Grid, dict[str, Any]] | None:
    """Distil the checkpoint, evaluate, and write figures and ``result.json`` into a folder.

    Distillations that are there already are not made again, and those that were interrupted go on.

    Arguments:
        output: The folder.
        size: How much to do.
        seed: Of the batches, the noise and the samples.
        on_part: Called when a part of the work begins, with what it is and its size.
        on_progress: Called with how much of the part is done, and a note.

    Returns:
        The grid of the consistency models and what ``result.json`` holds, the teacher's cells included; None when a
        signal stopped it.

    Raises:
        InputError: If the folder holds a demonstration of another size or seed.
    """
    recipes = {
        method: load_recipe(
            "fashion-16-consistency",
            [
                f"model.path={STUDENT}",
                f"objective.teacher={TEACHER}",
                *overrides,
                f"steps={size.updates}",
                f"seed={seed}",
                f"output={_folder(output, method)}",
            ],
        )
        for method, overrides in DISTILLED.items()
    }
    trained = _train_each(recipes, seed, "distillation", on_part, on_progress)
    if trained is None:
        return None
    generators, training = trained
    evaluations = len(DISTILLED) * sum(DISTILLED_STEPS) + sum(TEACHER_STEPS)
    evaluate, obtained_on = _evaluation(size.images, evaluations, on_part, on_progress)
    grid = evaluate(generators, ("multistep",), DISTILLED_STEPS)
    precision = recipes["plain"].precision
    teacher = evaluate({"teacher": _load(TEACHER, seed, precision)}, ("ddim",), TEACHER_STEPS)
    what = f"distillation on fashion-16, {size.updates} updates, {size.images} images a cell, seed {seed}"
    settings = {
        "obtained_on": obtained_on,
        "seed": seed,
        "training": training,
        "teacher": [asdict(cell) for cell in teacher.cells],
    }
    return grid, write_results(output, grid, what, settings, teacher.cells)
