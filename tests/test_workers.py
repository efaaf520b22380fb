"""One call in several processes: progress, results, errors, signals, kills; with calls that need no torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from robustdiff.errors import InputError, RunError
from robustdiff.workers import available_cores, run_workers

CALLS = '''
import logging, os, time
from pathlib import Path
from robustdiff.errors import InputError

def finish(progress):
    progress.begin("work", 2)
    progress.advance(1, "half")
    progress.advance(1)
    return True

def together(folder, progress):
    """Ends only when another runs at the same time, in a process of one thread."""
    assert os.environ["OMP_NUM_THREADS"] == "1"
    (folder / str(os.getpid())).touch()
    while len(list(folder.glob("[0-9]*"))) < 2:
        time.sleep(0.01)
    return True

def _claim(folder):
    """Return a name that no other process has."""
    for name in "ab":
        try:
            (folder / f"{name}.claimed").touch(exist_ok=False)
            return name
        except FileExistsError:
            pass

def begun(folder, progress):
    """Run until stopped, then save. The file that says that it runs comes when a signal can no longer miss it."""
    return _until_stopped(folder, _claim(folder), progress)

def _until_stopped(folder, name, progress):
    try:
        (folder / name).touch()
        progress.begin(name, 1)
        while True:
            time.sleep(0.01)
    except KeyboardInterrupt:
        (folder / f"{name}.saved").touch()
        return False

def one_fails(folder, how, progress):
    """Fail in the first process when the second has begun, which runs until it is stopped."""
    name = _claim(folder)
    if name == "b":
        return _until_stopped(folder, name, progress)
    while not (folder / "b").exists():
        time.sleep(0.01)
    how(progress)

def signalled_at_its_end(progress):
    """The signal is swallowed, as by a training that is as good as finished."""
    progress.begin("first", 1)
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        pass
    progress.begin("second", 1)
    time.sleep(60)

def refuse(progress):
    raise InputError("no such thing")

def break_down(progress):
    raise ZeroDivisionError

def no_space(progress):
    raise OSError(28, "No space left on device", "file")

def warn(progress):
    logging.getLogger("robustdiff").warning("%d is odd", 3)
    return True

def die(progress):
    os.kill(os.getpid(), 9)

def leave(progress):
    os._exit(3)
'''


class Heard:
    """A progress that keeps what it is told."""

    def __init__(self, at_begin: Callable[[], None] = lambda: None) -> None:
        self.said: list[Any] = []
        self.at_begin = at_begin

    def begin(self, description: str, total: float) -> None:
        self.said.append((description, total))
        self.at_begin()

    def advance(self, amount: float, note: str = "") -> None:
        self.said.append((amount, note))


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """call(NAME, *ARGUMENTS): one of CALLS."""
    (tmp_path / "some_calls.py").write_text(CALLS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "some_calls", raising=False)
    import functools
    import importlib

    calls = importlib.import_module("some_calls")
    return lambda name, *arguments: functools.partial(getattr(calls, name), *arguments)


def wait_for(condition: Callable[[], bool], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.01)


def test_each_process_says_how_far_it_is(call):
    heard = [Heard(), Heard()]
    assert run_workers(call("finish"), heard)
    for progress in heard:
        assert progress.said == [("work", 2), (1, "half"), (1, ""), ("", 0)]
    assert run_workers(call("finish"), []), "there is nothing to do"


def test_they_run_side_by_side_in_processes_that_end(call, tmp_path):
    assert run_workers(call("together", tmp_path), [Heard(), Heard()])
    for path in tmp_path.glob("[0-9]*"):
        assert int(path.name) != os.getpid()
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.name), 0)  # neither running nor a zombie


@pytest.mark.parametrize(
    ("how", "error", "words"),
    [
        ("refuse", InputError, "no such thing"),
        ("no_space", OSError, "No space left"),
        ("break_down", RuntimeError, "ZeroDivisionError"),
        ("die", RunError, "was killed by SIGKILL"),
        ("leave", RunError, "ended with exit code 3"),
    ],
)
def test_an_error_stops_the_others_which_save(call, tmp_path, how, error, words):
    with pytest.raises(error, match=words):
        run_workers(call("one_fails", tmp_path, call(how)), [Heard(), Heard()])
    assert (tmp_path / "b.saved").exists()


def test_warnings_are_said_by_the_parent(call, caplog):
    run_workers(call("warn"), [Heard()])
    assert [record.getMessage() for record in caplog.records] == ["3 is odd"]


def test_a_signal_at_the_end_of_a_piece_of_work_stops_the_next(call):
    heard = Heard(at_begin=lambda: os.kill(os.getpid(), signal.SIGINT))
    assert not run_workers(call("signalled_at_its_end"), [heard])
    assert heard.said == [("first", 1)]


MAIN = """
import functools, sys
from pathlib import Path
import some_calls
from robustdiff.progress import SILENT
from robustdiff.workers import run_workers

print(run_workers(functools.partial(some_calls.begun, Path(sys.argv[1])), [SILENT, SILENT]))
"""


@pytest.mark.parametrize("to_all", [True, False], ids=["to the group, as a terminal does", "to the parent"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_and_saves(call, tmp_path, number, to_all):
    process = started(tmp_path)
    (os.killpg if to_all else os.kill)(process.pid, number)
    out, err = process.communicate(timeout=240)
    assert (process.returncode, out, err) == (0, "False\n", "")
    assert (tmp_path / "a.saved").exists()
    assert (tmp_path / "b.saved").exists()


def test_workers_save_and_end_when_their_parent_is_killed(call, tmp_path):
    process = started(tmp_path)
    process.kill()
    process.communicate(timeout=240)
    wait_for(lambda: (tmp_path / "a.saved").exists() and (tmp_path / "b.saved").exists())


def started(folder: Path) -> subprocess.Popen[str]:
    """A parent in a process group of its own, whose two workers have begun."""
    process = subprocess.Popen(
        [sys.executable, "-c", MAIN, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *sys.path])},
    )
    wait_for(lambda: all((folder / name).exists() for name in "ab"))
    return process


def test_cores_are_those_that_the_process_may_use():
    assert available_cores() >= 1
    if hasattr(os, "sched_getaffinity"):
        assert available_cores() == len(os.sched_getaffinity(0))
