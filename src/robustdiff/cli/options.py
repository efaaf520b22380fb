"""Options that several commands take, and parsers of their values."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer

from robustdiff.cli import err, say
from robustdiff.errors import InputError

if TYPE_CHECKING:
    from robustdiff.recipe import DataConfig

_T = TypeVar("_T")


_PACKAGE = Path(__file__).parents[1]


def _shipped_samplers() -> list[str]:
    texts = (path.read_text(encoding="utf-8") for path in (_PACKAGE / "samplers").glob("*.py"))
    return sorted(name for text in texts for name in re.findall(r'^@SAMPLERS\.register\("(.+)"\)', text, re.MULTILINE))


SHIPPED_SAMPLERS = _shipped_samplers()
"""The names of the samplers of this package, from their files: to import them would import torch."""

SHIPPED_RECIPES = sorted(path.stem for path in (_PACKAGE / "recipes").glob("*.yaml"))
"""The names of the recipes of this package, from their files: to import what reads them would import pydantic."""

SHIPPED_EXTRACTORS = sorted(path.stem for path in (_PACKAGE / "metrics" / "weights").glob("*.safetensors"))
"""The names of the feature extractors whose weights are files of this package."""

LARGEST_SEED = 2**63 - 1
"""The largest seed of the generators of torch."""

MOST_IMAGES = 10_000_000
"""The largest --num: 200 times the 50,000 images that FID is commonly measured with."""


def given(**options: Any) -> dict[str, Any]:
    """Return the options that are not None."""
    return {name: value for name, value in options.items() if value is not None}


def parse_counts(text: str | None, option: str = "--steps", example: str = "5,10,20,50") -> list[int]:
    """Return the whole numbers of a comma-separated text; an empty list for None.

    Raises:
        InputError: If a part is not a whole number, or a number is given twice.
    """
    try:
        counts = [] if text is None else [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"{option} {text}: give whole numbers with commas, such as {example}") from None
    return distinct(counts, option)


def parse_names(text: str | None, option: str = "--sampler") -> list[str]:
    """Return the names of a comma-separated text; an empty list for None.

    Raises:
        InputError: If a name is given twice.
    """
    return [] if text is None else distinct(text.split(","), option)


def parse_metrics(text: str | None) -> tuple[list[str], dict[str, str]]:
    """Return the names of metrics in a comma-separated text of NAME or NAME=VALUE, and the values by name.

    Raises:
        InputError: If a name is given twice.
    """
    # By another name, since this module's function of the same name is for the option.
    from robustdiff.metrics import metric

    names, values = metric.parse_metrics([] if text is None else text.split(","))
    return distinct(names, "--metrics"), values


def parse_assignments(
    texts: list[str], option: str, example: str, taken: Collection[str] = (), *, lists: bool = False
) -> dict[str, Any]:
    """Return the values, parsed as YAML, of assignments ``KEY=VALUE`` by key.

    Args:
        texts: The assignments.
        option: The option that they are the values of.
        example: Another assignment, for messages.
        taken: Keys that are given by other options.
        lists: Whether values are lists, ``KEY=VALUE,VALUE,…``.

    Raises:
        InputError: If an assignment is malformed, or a key is given twice or is in ``taken``.
    """
    from robustdiff.yaml_reader import parse_yaml, split_assignment

    values: dict[str, Any] = {}
    for text in texts:
        key, value = split_assignment(text, option, example)
        if key in values or key in taken:
            raise InputError(f"{option} {text}: {key} is given twice: give it once")
        values[key] = parse_yaml(f"[{value}]" if lists else value, f"{option} {text}")
    return values


def distinct(values: list[_T], option: str) -> list[_T]:
    """Return the values of an option.

    Raises:
        InputError: If a value is given twice.
    """
    if twice := [value for value in values if values.count(value) > 1]:
        raise InputError(f"{option} has {twice[0]} twice: give each once")
    return values


def parse_numbers(text: str, option: str, remedy: str) -> list[float]:
    """Return the numbers of a comma-separated text.

    Raises:
        InputError: If a part is not a number, for which the message ends with ``remedy``, or a number is given twice.
    """
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"{option} {text}: {remedy}") from None
    return distinct(numbers, option)


def real_images(
    run: str | None, data: str | None, root: str | None, overrides: list[str], *, workers: bool = False
) -> DataConfig:
    """Return the configuration of the real images, and print the folder that a run's recipe names, if it is read."""
    from robustdiff.evaluation.real_images import choose_real_images

    return choose_real_images(run, data, root, overrides, on_read=lambda message: say(message, err), workers=workers)


def claim(file: Path | None, real: DataConfig | Path | None, sources: Iterable[str] = ()) -> None:
    """Check the file of results, if there is one, before anything is computed for it.

    Raises:
        InputError: As of :func:`~robustdiff.report.results.claim_results`. Sources and the folder of the real images
            are read.
    """
    from robustdiff.report.results import claim_results

    folder = None if real is None or isinstance(real, Path) else real.folder
    if file is not None:
        claim_results(file, [*map(Path, sources), *([] if folder is None else [folder])])


def _native(context: typer.Context, precision: str) -> str:
    if precision != "auto":  # returns before torch is imported
        return precision
    from robustdiff.section import native_precision

    return native_precision(context.params["cpu"])


# Read first, since the precision depends on it.
Cpu = Annotated[bool, typer.Option("--cpu", is_eager=True, help="Use the CPU even on a machine with a GPU.")]
Seed = Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Image i depends on the seed and i alone.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images at a time.")]
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
    str | None,
    typer.Option(
        help=f"{', '.join(SHIPPED_EXTRACTORS)}, inception, clip=FOLDER, dinov2=FOLDER, or a .safetensors file."
    ),
]
Weights = Annotated[Path | None, typer.Option(help="The weights file of Inception.")]
Spacing = Annotated[
    Literal["own", "leading", "trailing", "linspace"] | None,
    typer.Option(help="The spacing of sampling times; by default that of the checkpoint; own: that of the sampler."),
]
Guidance = Annotated[
    float | None,
    typer.Option(
        min=0, help="Scale of guidance, for models of captions or with a null class; 1: none. Flux dev takes it itself."
    ),
]
Negative = Annotated[
    str | None, typer.Option(help="The caption to guide away from, in place of the empty one; needs --guidance.")
]
Precision = Annotated[
    Literal["auto", "fp32", "bf16", "fp16"],
    typer.Option(callback=_native, help="Mixed precision of the network; auto: bf16 if the device computes in it."),
]
