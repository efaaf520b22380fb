"""Benchmarks, run in this process: a Python of its own takes seconds to import torch."""

from __future__ import annotations

import runpy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, PartialState

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def no_state_of_accelerate() -> Iterator[None]:
    """Reset accelerate, which keeps the first precision that any test in this process gave it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


@pytest.fixture
def benchmark(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """benchmark(NAME, *ARGUMENTS): run a file of benchmarks/ as its command does, and return what it prints."""
    monkeypatch.syspath_prepend(BENCHMARKS)

    def run(name: str, *arguments: object) -> str:
        runpy.run_path(str(BENCHMARKS / name))["main"]([str(argument) for argument in arguments])
        return capsys.readouterr().out

    return run
