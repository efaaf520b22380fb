"""A flag for Ctrl-C and SIGTERM, so that work stops at a point from which it can be resumed."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

__all__ = ["SIGNALS", "Interrupt"]

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupt:
    """A context manager in which the first SIGTERM or Ctrl-C only sets ``received``; a second one has its usual effect.

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
