"""Ctrl-C and SIGTERM as a flag, so that work stops where it can be resumed."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

__all__ = ["SIGNALS", "Interrupt"]

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupt:
    """A context in which the first SIGTERM or Ctrl-C only sets ``received``, for a loop to check; a second one acts.

    Attributes:
        received: The name of the signal, or None.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        self.__exit__()

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
