"""What several test modules share: the command line in process, and a small finished run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from robustdiff import cli

TINY = [
    "model.channels=[8,16]",
    "model.groups=4",
    "steps=6",
    "batch_size=8",
    "checkpoint_every=2",
    "log_every=2",
    "threads=1",
    "warmup=0",
]
"""Overrides that make the recipe `digits` take a second."""


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    code: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or fills the user's cache."""
    monkeypatch.setenv("ROBUSTDIFF_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Two workers with two threads each would stand in each other's way on two cores."""
    torch.set_num_threads(1)


@pytest.fixture
def robustdiff(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """The command line, called in this process."""

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr("sys.argv", ["robustdiff", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        return Outcome(int(stop.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def tiny() -> list[str]:
    """Arguments for `robustdiff train digits` that make it take a second."""
    return [argument for override in TINY for argument in ("--set", override)]


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a tiny network on the digits."""
    from robustdiff.recipe import load_recipe
    from robustdiff.training.trainer import train

    folder = tmp_path_factory.mktemp("runs") / "digits"
    train(load_recipe("digits", [*TINY, f"output={folder}"]))
    return folder
