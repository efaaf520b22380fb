"""Samples of checkpoints from common noise, as pictures of the HTML page.

Image i of every checkpoint, sampler and number of steps begins with the same x_T. The images of one checkpoint, sampler
and number of steps are one picture, a grid, which the page holds as a data URI: PNG for small images, which browsers
enlarge without smoothing, and WebP for large ones. All pictures together have at most :data:`MOST_BYTES`; if they need
more, images are made smaller.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from robustdiff.backbones.model import PRETRAINED
from robustdiff.errors import InputError, printable
from robustdiff.evaluation.generate import Generator
from robustdiff.evaluation.prompts import captions_of
from robustdiff.evaluation.real_images import choose_real_images
from robustdiff.progress import SILENT, Progress
from robustdiff.report.runs import RunFiles
from robustdiff.samplers.sample import SAMPLERS

__all__ = [
    "Frame",
    "Gallery",
    "Picture",
    "Pictures",
    "Samples",
    "encode",
    "gallery",
    "gallery_of_rows",
    "sample_checkpoints",
]

MOST_BYTES = 7 * 2**20
_SMALL = 64  # pixels; smaller images are PNGs, enlarged by whole numbers
_SIDES = (256, 192, 128, 96, 64, 48, 32)

Key = tuple[str, int, str]
"""A sampler, a number of steps, and the name of a checkpoint or method."""


@dataclass(frozen=True)
class Pictures:
    """The settings of the pictures of checkpoints.

    Attributes:
        num: The number of images in each picture; 0 for no pictures.
        samplers: The samplers; by default the first that the first run watched, or one that suits it.
        steps: The numbers of network evaluations; by default those that the first run watched, or the sampler's.
        seed: The seed of the noise.
        guidance: The scale of classifier-free guidance.
        prompts: The captions for models that take them; by default those of the data of each run.
    """

    num: int = 16
    samplers: Sequence[str] = ()
    steps: Sequence[int] = ()
    seed: int = 0
    guidance: float | None = None
    prompts: Sequence[str] = ()


@dataclass(frozen=True)
class Samples:
    """Images of checkpoints from common noise.

    Attributes:
        images: The images, uint8 (n, C, H, W), by sampler, steps and checkpoint.
        captions: The captions of the images; empty if no checkpoint takes captions.
        notes: Sentences on checkpoints that are left out.
    """

    images: dict[Key, Tensor]
    captions: list[str]
    notes: list[str]


@dataclass(frozen=True)
class Picture:
    """A picture of one checkpoint, with its size on the page in pixels."""

    name: str
    uri: str
    alt: str
    width: int
    height: int
    pixelated: bool


@dataclass(frozen=True)
class Frame:
    """The pictures of one sampler at one number of steps."""

    sampler: str
    steps: int
    pictures: list[Picture]


@dataclass(frozen=True)
class Gallery:
    """Pictures of several checkpoints, samplers and numbers of steps."""

    frames: list[Frame]
    samplers: list[str]
    steps: list[int]
    names: list[str]
    note: str
    wide: bool = False
    captions: Sequence[str] = ()


def _start_of(run: RunFiles) -> str | None:
    """Return the starting checkpoint if it is on this machine: a recipe alone causes no download."""
    start = run.start
    if start is None or Path(start).is_dir() or (PRETRAINED / start).is_dir():
        return start
    return None


def _checkpoints(runs: Sequence[RunFiles]) -> tuple[dict[str, tuple[str, RunFiles]], list[str]]:
    """Return the checkpoints of runs that can be sampled, and sentences on those that cannot.

    They are the start, which runs may share, the best and the last model of each run.

    Returns:
        The path and the run of each checkpoint by name, and the sentences.
    """
    found: dict[str, tuple[str, RunFiles]] = {}
    notes = []
    for run in runs:
        start = _start_of(run)
        if start is not None:
            if all(path != start for path, _ in found.values()):
                found[f"start, {Path(start).name}"] = start, run
        elif run.start is not None:
            notes.append(f"The starting checkpoint {run.start} of {run.name} is not on this machine.")
        prefix = f"{run.name}, " if len(runs) > 1 else ""
        if run.best_step == 0:
            notes.append(f"The best checkpoint of {run.name} is the one that it started from.")
        elif (run.folder / "best").is_dir():
            step = "" if run.best_step is None else f" (update {run.best_step})"
            found[f"{prefix}best{step}"] = str(run.folder / "best"), run
        if (run.folder / "model").is_dir():
            found[f"{prefix}last model"] = str(run.folder / "model"), run
        else:
            notes.append(f"{run.name} has no model yet.")
    return found, notes


def _default_sampler(run: RunFiles, generator: Generator) -> str:
    """Return the sampler of a run: the first that was watched, that of the recipe, or one that suits the model."""
    watched = next((cell.sampler for line in run.watch for cell in line.cells), None)
    return watched or run.recipe.sampler.name or generator.sampler


def _default_steps(run: RunFiles, sampler: str) -> list[int]:
    """Return the numbers of steps that were watched with a sampler, or a few."""
    watched = {cell.steps for line in run.watch for cell in line.cells if cell.sampler == sampler}
    return sorted(watched) or list(SAMPLERS[sampler].grid_steps)


def _captions_of(run: RunFiles, on_read: Callable[[str], None]) -> tuple[str, ...]:
    """Return the captions of the data of a run."""
    try:
        return captions_of(choose_real_images(run.source, on_read=on_read).load())
    except InputError as error:
        raise InputError(
            f"{printable(run.source)}: the captions of its data cannot be read ({error}): give the pictures others by "
            "--prompt, or leave them out by --num 0"
        ) from None


def sample_checkpoints(
    runs: Sequence[RunFiles],
    pictures: Pictures,
    *,
    device: torch.device | str = "cpu",
    on_read: Callable[[str], None] = lambda message: None,
    progress: Progress = SILENT,
) -> Samples:
    """Sample the checkpoints of runs from common noise.

    Args:
        runs: The runs.
        pictures: The settings of the pictures.
        device: The device.
        on_read: A function that is called with a message before data or a checkpoint that a recipe names is read.
        progress: The receiver of the progress, in network evaluations.

    Raises:
        InputError: If a sampler or a number of steps does not suit a checkpoint, or a checkpoint cannot be read.
    """
    found, notes = _checkpoints(runs)
    num, samplers, steps = pictures.num, pictures.samplers, pictures.steps
    prompts = tuple(pictures.prompts)
    common: dict[str, Any] = {"seed": pictures.seed, "batch_size": num, "guidance": pictures.guidance}
    images: dict[Key, Tensor] = {}
    captions: list[str] = []
    known: dict[str, tuple[str, ...]] = {}  # of the data of each run
    for name, (path, run) in found.items():  # one in memory at a time
        settings = {**common, "prompts": prompts}
        if not prompts and run.data is not None and run.data.captions is not None:
            if run.name not in known:
                known[run.name] = _captions_of(run, on_read)[:num]
            settings["data_captions"] = known[run.name]
        if run.data is not None:
            settings["data_classes"] = run.data.classes
        if path == run.start and Path(path).is_dir():
            on_read(f"{printable(run.source)}/recipe.yaml names the starting checkpoint: reading {printable(path)}")
        sampler = samplers[0] if samplers else None
        generator = Generator.load(path, device, by_recipe=False, sampler=sampler, steps=1, **settings)
        if not images:
            samplers = samplers or [_default_sampler(run, generator)]
            steps = steps or _default_steps(run, samplers[0])
            captions = generator.captions(range(num)) or []
            progress.begin("samples for the report", len(found) * len(samplers) * sum(steps) * num)
        chosen = [replace(generator, sampler=sampler, steps=count) for sampler in samplers for count in steps]
        for one in chosen:
            count = int(one.steps)
            images[one.sampler, count, name] = torch.cat([batch for _, batch in one.images(range(num))])
            progress.advance(num * count, f"{name}, {one.sampler} {count}")
    return Samples(images, captions, notes)


def _tiled(images: Tensor, side: int, columns: int) -> NDArray[np.uint8]:
    """Return a grid of images, with gaps of one pixel, whose larger sides are at most ``side``."""
    pixels = images.permute(0, 2, 3, 1).numpy()
    height, width = pixels.shape[1:3]
    if max(height, width) > side:
        size = max(1, round(width * side / max(height, width))), max(1, round(height * side / max(height, width)))
        pixels = np.stack([_resized(image, size) for image in pixels])
        height, width = pixels.shape[1:3]
    rows = math.ceil(len(pixels) / columns)
    grid = np.full((rows * (height + 1) - 1, columns * (width + 1) - 1, pixels.shape[3]), 128, np.uint8)
    for i, image in enumerate(pixels):
        top, left = i // columns * (height + 1), i % columns * (width + 1)
        grid[top : top + height, left : left + width] = image
    return grid


def _resized(image: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    picture = Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)
    return np.asarray(picture.resize(size, Image.Resampling.BICUBIC)).reshape(size[1], size[0], image.shape[-1])


def encode(pixels: NDArray[np.uint8], lossless: bool) -> str:
    """Return pixels, uint8 (H, W), (H, W, 1) or (H, W, 3), as a data URI of a PNG or, with losses, a WebP."""
    buffer = io.BytesIO()
    picture = Image.fromarray(pixels.squeeze(-1) if pixels.ndim == 3 and pixels.shape[-1] == 1 else pixels)
    if lossless:
        picture.save(buffer, "png", optimize=True)
    else:
        picture.save(buffer, "webp", quality=85)
    kind = "png" if lossless else "webp"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def gallery(images: Mapping[Key, Tensor], note: str, captions: Sequence[str] = (), most: int = MOST_BYTES) -> Gallery:
    """Return the gallery of images, made smaller until all pictures together have at most ``most`` bytes.

    Args:
        images: The images, uint8 (n, C, H, W), by sampler, steps and checkpoint.
        note: A sentence on what is shown; what was made smaller is added to it.
        captions: The captions of the images.
        most: The largest number of bytes of all pictures together.

    Raises:
        InputError: If the smallest pictures have more.
    """
    largest = max(max(batch.shape[2:]) for batch in images.values())
    sides = [largest, *(side for side in _SIDES if side < largest)] if largest <= _SIDES[0] else list(_SIDES)
    for side in sides:
        found: dict[Key, Picture] = {}
        for (sampler, steps, name), batch in images.items():
            columns = math.ceil(math.sqrt(len(batch)))
            pixels = _tiled(batch, side, columns)
            small = max(batch.shape[2:]) <= _SMALL
            alt = f"{len(batch)} samples of {name} by {sampler} at {steps} steps, in {columns} columns"
            found[sampler, steps, name] = Picture(
                name, encode(pixels, small), alt, pixels.shape[1], pixels.shape[0], small
            )
        if sum(len(picture.uri) for picture in found.values()) <= most:
            if side < largest:
                note += f" Images of {largest} pixels are shown at {side}."
            return _arranged(found, note, captions=captions)
    raise InputError(
        f"the pictures of {len(images)} checkpoints, samplers and numbers of steps do not fit into {most >> 20} MB: "
        "give a smaller --num, or fewer --steps"
    )


def _arranged(found: Mapping[Key, Picture], note: str, wide: bool = False, captions: Sequence[str] = ()) -> Gallery:
    """Return the gallery of pictures by sampler, steps and checkpoint."""
    samplers = list(dict.fromkeys(sampler for sampler, _, _ in found))
    steps = sorted({count for _, count, _ in found})
    names = list(dict.fromkeys(name for _, _, name in found))
    frames = [
        Frame(sampler, count, [found[sampler, count, name] for name in names if (sampler, count, name) in found])
        for sampler in samplers
        for count in steps
        if any((sampler, count, name) in found for name in names)
    ]
    return Gallery(frames, samplers, steps, names, note, wide, captions)


def gallery_of_rows(rows: Mapping[Key, NDArray[np.uint8]], note: str) -> Gallery:
    """Return the gallery of pictures that a study made, (H, W) or (H, W, 3), each a row of images.

    Raises:
        InputError: If they have more than :data:`MOST_BYTES`.
    """
    found = {
        key: Picture(
            key[2],
            encode(pixels, lossless=pixels.shape[0] <= 2 * _SMALL),
            f"Samples of {key[2]} by {key[0]} at {key[1]} steps",
            pixels.shape[1],
            pixels.shape[0],
            pixels.shape[0] <= 2 * _SMALL,
        )
        for key, pixels in rows.items()
    }
    if sum(len(picture.uri) for picture in found.values()) > MOST_BYTES:
        raise InputError(
            f"the pictures of the study have more than {MOST_BYTES >> 20} MB: lower measure.pictured, or remove some "
            "from its folder of cells"
        )
    return _arranged(found, note, wide=True)
