"""Tasks shared by processes: order, results, errors, signals, kills; with tasks that need no torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from robustdiff.errors import InputError, RunError
from robustdiff.workers import Task, available_cores, run_tasks

TASKS = '''
import logging, os, time
from pathlib import Path
from robustdiff.errors import InputError
from robustdiff.workers import Stopped

def square(number, report):
    report(0.5)
    return number**2

def environment(report):
    return os.getpid(), os.environ["OMP_NUM_THREADS"]

def together(folder, name, other, report):
    """Ends only when the other runs at the same time."""
    (folder / name).touch()
    while not (folder / other).exists():
        time.sleep(0.01)

def begun(folder, name, report):
    """Runs until it is stopped, and saves."""
    (folder / name).write_text(str(os.getpid()))
    while not report(0.5):
        time.sleep(0.01)
    (folder / f"{name}.saved").touch()
    raise Stopped

def refuse(report):
    raise InputError("no such thing")

def break_down(report):
    raise ZeroDivisionError

def no_space(report):
    raise OSError(28, "No space left on device", "file")

def warn(report):
    logging.getLogger("robustdiff").warning("%d is odd", 3)

def die(report):
    os.kill(os.getpid(), 9)

def leave(report):
    os._exit(3)
'''


@pytest.fixture
def do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Task]:
    """do(NAME, *ARGUMENTS, …): a task that calls a function of TASKS."""
    (tmp_path / "some_tasks.py").write_text(TASKS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "some_tasks", raising=False)
    import functools
    import importlib

    tasks = importlib.import_module("some_tasks")

    def make(function: str, *arguments: object, name: str = "", **fields: object) -> Task:
        return Task(name or function, functools.partial(getattr(tasks, function), *arguments), **fields)

    return make


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.01)


@pytest.mark.parametrize("processes", [1, 2])
def test_results_by_name_in_the_order_of_what_they_need(do, processes):
    seen = []
    tasks = [
        do("square", 3, name="last", weight=3, needs=("first", "second")),
        do("square", 1, name="first"),
        do("square", 2, name="second", needs=("first",)),
    ]
    results = run_tasks(tasks, processes, lambda done, note: seen.append((done, note)))
    assert results == {"first": 1, "second": 4, "last": 9}
    assert list(results) == ["first", "second", "last"]
    parts = [done for done, _ in seen]
    assert parts == sorted(parts)
    assert parts[-1] == 1
    assert (0.1, "first 50%") in seen
    assert (0.7, "last 50%") in seen


def test_they_run_side_by_side_in_processes_of_one_thread(do, tmp_path):
    assert run_tasks([do("together", tmp_path, "a", "b", name="a"), do("together", tmp_path, "b", "a", name="b")], 2)
    (pid, threads), *_ = run_tasks([do("environment")], 2).values()
    assert pid != os.getpid()
    assert threads == "1"
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)  # neither running nor a zombie


@pytest.mark.parametrize(
    ("function", "error", "words"),
    [
        ("refuse", InputError, "no such thing"),
        ("no_space", OSError, "No space left"),
        ("break_down", RuntimeError, "ZeroDivisionError"),
        ("die", RunError, "die: its process was killed by SIGKILL"),
        ("leave", RunError, "leave: its process ended with exit code 3"),
    ],
)
def test_an_error_stops_the_others_which_save_and_nothing_more_begins(do, tmp_path, function, error, words):
    tasks = [
        do("begun", tmp_path, "other"),
        do("together", tmp_path, "x", "other", name="ready"),
        do(function, needs=("ready",)),
        do("begun", tmp_path, "later"),
    ]
    with pytest.raises(error, match=words):
        run_tasks(tasks, 2)
    assert (tmp_path / "other.saved").exists()
    assert not (tmp_path / "later").exists()


def test_a_worker_that_is_killed_from_outside_is_an_error_and_no_hang(do, tmp_path):
    killed = False

    def on_progress(done: float, note: str) -> None:
        nonlocal killed
        path = tmp_path / "other"
        if not killed and path.exists() and path.read_text():
            killed = True
            os.kill(int(path.read_text()), signal.SIGKILL)

    with pytest.raises(RunError, match="SIGKILL"):
        run_tasks([do("begun", tmp_path, "other")], 1, on_progress)


def test_warnings_are_said_by_the_parent(do, caplog):
    run_tasks([do("warn")], 1)
    assert [record.getMessage() for record in caplog.records] == ["3 is odd"]


MAIN = """
import functools, sys
from pathlib import Path
import some_tasks
from robustdiff.workers import Task, run_tasks

folder = Path(sys.argv[1])
print(run_tasks([Task(n, functools.partial(some_tasks.begun, folder, n)) for n in ("a", "b", "c")], 2))
"""


@pytest.mark.parametrize("to_all", [True, False], ids=["to the group, as a terminal does", "to the parent"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_and_saves(do, tmp_path, number, to_all):
    process = started(tmp_path)
    (os.killpg if to_all else os.kill)(process.pid, number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "None\n", "")
    assert (tmp_path / "a.saved").exists()
    assert (tmp_path / "b.saved").exists()
    assert not (tmp_path / "c").exists()


def test_workers_save_and_end_when_their_parent_is_killed(do, tmp_path):
    process = started(tmp_path)
    process.kill()
    process.communicate(timeout=60)
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
