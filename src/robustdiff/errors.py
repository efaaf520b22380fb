"""Errors that the command line reports in one line: wrong input (exit code 2) and failed runs (exit code 1)."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError

__all__ = [
    "InputError",
    "NotFiniteError",
    "RunError",
    "first_line",
    "first_mistake",
    "installing",
    "out_of_memory",
    "printable",
]


class InputError(ValueError):
    """An error in the input; the message names the problem and its remedy in one line."""


class RunError(RuntimeError):
    """A failed run, for example a killed process; the message names the problem and its remedy in one line."""


class NotFiniteError(RunError):
    """A number that is not finite, such as a loss: the same run would fail again, where other failures may pass."""


def printable(name: str | os.PathLike[str]) -> str:
    """Return the name of a file, or other untrusted text, in printable form.

    Bytes that are not UTF-8, control characters, line breaks and marks of direction are escaped.
    """
    return "".join(c if c.isprintable() else _escape(c) for c in os.fsdecode(name))


def installing(extra: str) -> str:
    """Return the words by which a message says how an extra of this package is installed, such as `text`."""
    return f"install the extra {extra} (pip install '.[{extra}]' in the clone of robustdiff)"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def out_of_memory(error: BaseException) -> str | None:
    """Return the message, in one line, of an error of torch that a GPU's memory is full; None of other errors."""
    torch = sys.modules.get("torch")  # without it, no error is torch's
    if not isinstance(error, getattr(torch, "OutOfMemoryError", ())):
        return None
    tried = first_line(error).partition(". GPU ")[0].rstrip(".")
    return (
        f"{tried}: in training raise accumulate, or set model.gradient_checkpointing=true or capture=false, with which "
        "a run may be resumed; elsewhere give a smaller --batch-size, or --precision bf16"
    )


def first_mistake(error: ValidationError) -> str:
    """Return the first error that pydantic found, after the place where it is, in one line."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part != "[key]")
    message = first["msg"].removeprefix("Value error, ")[:1000]
    return printable(f"{where[:200]}: {message}" if where else message)


def _escape(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # Python's surrogate for a byte that is not UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()
