"""The page of a study: text, tables and figures of the statistics of :mod:`robustdiff.study.analysis`."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustdiff.data.decode import open_image
from robustdiff.errors import InputError, printable
from robustdiff.files import atomic_write, make_folder
from robustdiff.report.comparisons import (
    against_references,
    at_real_brightness,
    brightness_section,
    by_steps,
    chosen_seeds,
    effects_section,
    few_trainings,
    sensitivity_section,
    spread_section,
    trend_section,
)
from robustdiff.report.figures import Figure, bare, default_settings, label, samples_name
from robustdiff.report.levels import further_measures, levels_section, mismatch_section, other_measures
from robustdiff.report.words import code_span, escaped, saved_figure, table, threads
from robustdiff.study.analysis import TRAININGS, main_methods, pairs
from robustdiff.study.schema import Study
from robustdiff.study.store import Results, read_results

__all__ = ["page_parts", "read_picture", "write_page"]


def _introduction(results: Results) -> list[str]:
    """Return the title, the question and its answer if the study has them, and the settings that the methods share."""
    study = results.study
    recipe, training = (results.record_of(study.baseline)[part] for part in ("recipe", "training"))
    asked = {"Question": study.question, "Answer": study.answer}
    return [
        f"# {escaped(study.title)}",
        *(f"**{name}.** {escaped(words)}" for name, words in asked.items() if words.strip()),
        f"Trained on {escaped(training['data'])}, {training['images']:,} images. "
        f"Base: {escaped(recipe['model'].get('path') or 'none')}. "
        f"{recipe['steps']:,} optimiser updates of batch {recipe['batch_size']}, learning rate {recipe['lr']:g} "
        f"({recipe['lr_schedule']}), moving average {recipe['ema']}, {recipe['precision']}, unless a method says "
        f"otherwise. {_obtained_on(results)} This page is made by `robustdiff study` from the files of these "
        "measurements.",
    ]


def _obtained_on(results: Results) -> str:
    """Return a description of the measurements and of the machines on which they were made."""
    records = [*results.cells.values(), *results.references.values()]
    measure = results.study.measure
    data = measure.data.name if measure.data is not None else next(iter(results.cells.values()))["training"]["data"]
    machines = " and ".join(sorted({_machine(r) for r in records}))
    noise = "common noise" if measure.image_noise == "shared" else "noise that is common to the methods of a seed"
    there = (
        ""
        if len(records) == results.planned
        else f" {len(records)} of {results.planned} planned measurements are there."
    )
    return (
        f"Each measurement is of one training with one sampler at one number of steps: {measure.num:,} images from "
        f"{noise}, against the images of {escaped(data)} on the features {code_span(measure.features)}. Made on "
        f"{machines}.{there}"
    )


def _machine(record: dict[str, Any]) -> str:
    """Return the device on which a measurement was made, and its version of torch."""
    device = record["device"]
    name = {"cpu": f"{threads(record['threads'])} of a CPU", "cuda": "a GPU"}.get(device, f"the device {device}")
    return escaped(f"{name} (torch {record['torch']})")


def _methods(results: Results) -> list[str]:
    """Return the methods and references with cells in words, or else by what they change in the recipe."""
    study, lines = results.study, []
    for name in results.methods:
        method = study.methods[name]
        changes = ", ".join(f"{key}: {value}" for key, value in method.set.items())
        lines.append((name, method.description or changes or "the recipe as it is"))
    present = {name for name, *_ in results.references}
    lines += [(name, one.description or one.path) for name, one in study.references.items() if name in present]
    return ["## The methods", "\n".join(f"- {code_span(name)}: {escaped(words)}" for name, words in lines)]


def _cost(results: Results) -> list[str]:
    rows = []
    for method in results.methods:
        record = results.record_of(method)
        recipe, training = record["recipe"], record["training"]
        numbers = training["steps"], training["backward_passes"], training["batches"] * recipe["batch_size"]
        rows.append([method, *(f"{number:,}" for number in numbers), f"{training['delta_norm']:.2f}"])
    return [
        "## Cost",
        "An adversary of K passes makes K updates on each batch, free and random alike: for as many updates it draws a "
        "K-th of the images that plain training draws.",
        table(["", "updates", "backward passes", "images drawn", "last ‖δ‖, in the method's norm"], rows),
    ]


def _samples(results: Results, steps: int, folder: Path) -> list[str]:
    figures = [
        saved_figure(folder, samples_name(sampler), made, f"Samples of {sampler} at {steps} steps")
        for sampler in results.samplers
        if (made := _pictures(results, sampler, steps)) is not None
    ]
    which = "" if len(main_methods(results)) == len(results.methods) else f" with {TRAININGS} trainings or more"
    note = f"The first images of the first training of each method{which}. Image i of each starts from the same noise."
    return ["## Samples", note, *figures] if figures else []


@default_settings()
def _pictures(results: Results, sampler: str, steps: int) -> Figure | None:
    """Return a figure of the first images of each of the main methods."""
    paths = {method: results.pictures.get((method, sampler, steps)) for method in main_methods(results)}
    rows = [(method, read_picture(path)) for method, path in paths.items() if path is not None]
    if not rows:
        return None
    figure = Figure(figsize=(7.2, 0.72 * len(rows) + 0.3), layout="constrained")
    for panel, (method, pixels) in zip(figure.subplots(len(rows), 1, squeeze=False)[:, 0], rows, strict=True):
        panel.imshow(pixels, cmap="gray", vmin=0, vmax=255)
        bare(panel)
        panel.set_ylabel(label(method), rotation=0, ha="right", va="center", fontsize=9)
    figure.suptitle(f"{sampler}, {steps} steps", fontsize=10)
    return figure


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


def _not_run(results: Results) -> list[str]:
    """Return what the study plans and does not have, and what it leaves out."""
    cut = results.study.cut
    parts = ["## How it was run"] if results.missing or results.failed or cut else []
    if results.missing:
        missing = ", ".join(f"{name} ({n})" for name, n in results.missing.items())
        parts.append(f"Not there, of what the study file plans, by run and number of files: {missing}.")
    parts += [f"The training {name} failed: {escaped(error)}." for name, error in results.failed.items()]
    return parts + [escaped(paragraph) for paragraph in re.split(r"\n\s*\n", cut) if paragraph.strip()]


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


def page_parts(results: Results, figures: Path) -> list[str]:
    """Return the parts of the page of a study as Markdown, and write its figures into a folder, which may be missing.

    A part is a heading, a paragraph, a list, a table, a figure, or the beginning or end of details.

    Raises:
        InputError: If a cell does not say what the page shows, or the folder is a file or a link.
    """
    _check_settings(results)
    make_folder(figures)
    middle = results.middle_steps
    trended = bool(results.study.trend)
    compared = bool(pairs(results)) and not trended
    return [
        *_introduction(results),
        *_methods(results),
        *(trend_section(results, middle, figures) if trended else []),
        *(["## What the numbers say", *effects_section(results, middle), *chosen_seeds(results)] if compared else []),
        *(few_trainings(results, middle) if compared else []),
        *spread_section(results, middle),
        *brightness_section(results, middle, figures),
        *at_real_brightness(results, middle),
        *sensitivity_section(results, middle, figures),
        *levels_section(results, figures),
        *against_references(results),
        *(by_steps(results) if compared else []),
        *other_measures(results, middle),
        *further_measures(results),
        *mismatch_section(results),
        *_cost(results),
        *_samples(results, middle, figures),
        *_not_run(results),
    ]


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
