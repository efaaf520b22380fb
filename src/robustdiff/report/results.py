"""The files of a grid of results: ``NUMBER.png``, ``samples-SAMPLER.png`` and ``result.json``."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from robustdiff.errors import InputError, printable
from robustdiff.evaluation.grid import Cell, Grid
from robustdiff.files import check_outside, remove_leftovers, written_last
from robustdiff.metrics.metric import number_named
from robustdiff.report.figures import caption_grid, numbers_against_steps, sample_grid, samples_name, save_figure

__all__ = ["claim_results", "write_results"]

MOST_CAPTIONS = 8
"""The number of captions in a figure of samples."""


def claim_results(file: Path, sources: Iterable[Path]) -> None:
    """Check that results can be written, before anything is computed for them. Nothing is made.

    Args:
        file: The file of the results.
        sources: Folders that are read, in which nothing may be written.

    Raises:
        InputError: If the file exists, or its folder is in one that is read, or cannot be made or written to.
    """
    folder = file.parent
    check_outside(folder, sources, "--output")
    if os.path.lexists(file):
        raise InputError(f"{folder} holds results already ({file.name}): give another --output, or remove it")
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        what = "cannot be written to" if there.is_dir() else "is no folder"
        raise InputError(f"{printable(there)} {what}: give another --output")


def write_results(
    folder: Path, grid: Grid, title: str, settings: dict[str, Any], beside: Sequence[Cell] = ()
) -> dict[str, Any]:
    """Write ``result.json``, which begins with the settings, and return its contents.

    Cells of checkpoints have a figure of samples, a row for each caption if there are captions, and one of each number
    with intervals, with the cells ``beside``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder, r"result\.json|[\w.-]+\.png")
    record = {
        **settings,
        "cells": [cell.record() for cell in grid.cells],
        "differences": [difference.record() for difference in grid.differences],
    }
    with written_last(folder / "result.json", record):
        _figures(folder, grid, title, beside)
    return record


def _figures(folder: Path, grid: Grid, title: str, beside: Sequence[Cell]) -> None:
    """Write the figures of checkpoints into a folder, if the grid has any."""
    if grid.samples:
        for name in dict.fromkeys(name for cell in grid.cells for name in cell.intervals):
            figure = numbers_against_steps([*grid.cells, *beside], number_named(name), title)
            save_figure(figure, folder / f"{name}.png")
    checkpoints = list(dict.fromkeys(checkpoint for checkpoint, _, _ in grid.samples))
    steps = list(dict.fromkeys(steps for _, _, steps in grid.samples))
    for sampler in dict.fromkeys(sampler for _, sampler, _ in grid.samples):
        note = f"{sampler}: image i of each network starts from the same noise"
        if grid.captions:
            # One of several processes has fewer images than there are captions.
            captions = grid.captions[: min(MOST_CAPTIONS, *map(len, grid.samples.values()))]
            figure = caption_grid(grid.samples, captions, checkpoints, sampler, steps, note)
        else:
            figure = sample_grid(grid.samples, checkpoints, sampler, steps, note)
        save_figure(figure, folder / f"{samples_name(sampler)}.png")
