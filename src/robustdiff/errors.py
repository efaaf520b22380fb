"""The errors that a user sees as one line: a mistake in the input (exit code 2), a run that failed (1)."""

from __future__ import annotations

__all__ = ["InputError", "RunError"]


class InputError(ValueError):
    """Bad input: the message names the thing and the remedy, in one line."""


class RunError(RuntimeError):
    """A run that cannot go on, such as a loss that is no longer finite: the message says what to do, in one line."""
