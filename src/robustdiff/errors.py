"""Errors that a user sees as one line: a mistake in the input (exit code 2), a run that failed (1)."""

from __future__ import annotations

import os

__all__ = ["InputError", "RunError", "printable"]


class InputError(ValueError):
    """An error in the input: the message names the thing and the remedy, in one line."""


class RunError(RuntimeError):
    """A failed run, such as one whose loss is no longer finite: the message says the remedy, in one line."""


def printable(name: str | os.PathLike[str]) -> str:
    """Return the name of a file, or other foreign text, with escapes for what a line of text cannot hold.

    Those are bytes that are not UTF-8, control characters, line breaks and marks of direction.
    """
    return "".join(c if c.isprintable() else _escape(c) for c in os.fsdecode(name))


def _escape(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # how Python holds a byte of a name that is not UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()
