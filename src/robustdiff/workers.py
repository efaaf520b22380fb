"""Tasks shared by processes of one thread each.

The threads of one process wait for each other in every operation, so another program on one of their cores stalls them
all. Processes that share whole tasks do not wait, and a task's result does not depend on how many of them there are.

A worker is a new interpreter that reads tasks from a socket and writes progress and results to it. The socket closes
when either side ends, however it ends: a worker whose parent is gone stops, and a parent sees that a worker was killed.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from robustdiff.errors import InputError, RunError
from robustdiff.interrupt import SIGNALS, Interrupt

__all__ = ["Report", "Stopped", "Task", "available_cores", "run_tasks", "serve"]

logger = logging.getLogger(__name__)

ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")

Report = Callable[[float], bool]
"""A function that a task calls with the share that is done, in [0, 1]; it returns whether the task has to stop."""


class Stopped(Exception):
    """Raised by a task that stops because it has to."""


@dataclass(frozen=True)
class Task:
    """One piece of work.

    Attributes:
        name: What it is, unique among the tasks.
        call: What is called, with a :data:`Report`. It and what it returns are pickled.
        weight: How long it takes, in any unit that all tasks share.
        needs: The names of the tasks that have to be done before.
    """

    name: str
    call: Callable[[Report], Any]
    weight: float = 1.0
    needs: tuple[str, ...] = ()


def available_cores() -> int:
    """Return the number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# -- a worker -------------------------------------------------------------------------------------------------


class _Forward(logging.Handler):
    """Gives warnings to the parent, which has the terminal."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(logging.WARNING)
        self.connection = connection

    def emit(self, record: logging.LogRecord) -> None:
        self.connection.send(("warning", record.getMessage()))


def serve(handle: int) -> None:
    """Do the tasks that come through a socket, until it closes or None comes.

    Ctrl-C reaches all processes of a terminal; a worker leaves it to its parent to say what stops.

    Arguments:
        handle: The socket's file descriptor.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    connection = Connection(handle)
    logging.getLogger().addHandler(_Forward(connection))
    stop = False

    def report(done: float) -> bool:
        nonlocal stop
        try:
            connection.send(("progress", done))
            stop = stop or (connection.poll() and connection.recv() is None)
        except (EOFError, OSError):  # the parent is gone
            stop = True
        return stop

    with suppress(EOFError, OSError):
        while not stop and (task := connection.recv()) is not None:
            connection.send(_outcome(task, report))


def _outcome(task: Task, report: Report) -> tuple[str, Any]:
    """Do a task, and return the message that says how it went."""
    try:
        if report(0.0):
            raise Stopped
        return "done", task.call(report)
    except Stopped:
        return "stopped", None
    except (InputError, RunError, OSError) as error:
        return "error", error
    except Exception:  # a fault of the program: others may not be picklable, and their traceback would stay behind
        return "error", RuntimeError(f"{task.name}: {traceback.format_exc()}")


class _Worker:
    """A worker as its parent sees it. Attributes: task: what it does; done: the part of it that is done."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        code = f"import sys; sys.path[:] = {sys.path!r}; from robustdiff.workers import serve; serve({theirs.fileno()})"
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # a worker begins with them blocked
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.DEVNULL,
                env={**os.environ, **ONE_THREAD},
                pass_fds=[theirs.fileno()],
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()
        self.connection = Connection(ours.detach())
        self.task: Task | None = None
        self.done = 0.0

    def send(self, task: Task | None) -> None:
        """Begin a task; None stops the present one."""
        with suppress(OSError):  # it has ended, and receive says so
            self.connection.send(task)
        if task is not None:
            self.task, self.done = task, 0.0

    def receive(self) -> tuple[str, Any]:
        """Return the next message.

        Raises:
            RunError: If the process has ended.
        """
        assert self.task is not None
        try:
            message: tuple[str, Any] = self.connection.recv()
        except (EOFError, OSError):
            code = self.process.wait()
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            raise RunError(
                f"{self.task.name}: its process {how}: is there enough memory? The same command goes on from here"
            ) from None
        return message

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.connection.close()


# -- their parent ---------------------------------------------------------------------------------------------


class _Schedule:
    """The finished tasks, and the workers of the others."""

    def __init__(self, tasks: Sequence[Task], on_progress: Callable[[float, str], None]) -> None:
        self.tasks = list(tasks)
        self.waiting = list(tasks)
        self.on_progress = on_progress
        self.results: dict[str, Any] = {}
        self.error: Exception | None = None
        self.stopping = False

    def stop(self, workers: Sequence[_Worker]) -> None:
        """Begin nothing more, and have what is begun stop."""
        if not self.stopping:
            self.stopping = True
            self.waiting.clear()
            for worker in workers:
                worker.send(None)

    def begin(self, worker: _Worker) -> None:
        """Give an idle worker the first task that can be begun, if there is one."""
        for task in self.waiting:
            if all(name in self.results for name in task.needs):
                self.waiting.remove(task)
                worker.send(task)
                return

    def receive(self, worker: _Worker, workers: Sequence[_Worker]) -> None:
        """Take a worker's message."""
        assert worker.task is not None
        try:
            kind, value = worker.receive()
        except RunError as error:
            kind, value = "error", error
        if kind == "progress":
            worker.done = value
        elif kind == "warning":
            logger.warning("%s", value)
        else:
            if kind == "done":
                self.results[worker.task.name] = value
            elif kind == "error":
                self.error = self.error or value
            worker.task = None
            if kind != "done":
                self.stop(workers)
        busy = {w.task.name: w.done for w in workers if w.task is not None}
        done = sum(t.weight * (t.name in self.results or busy.get(t.name, 0.0)) for t in self.tasks)
        note = ", ".join(f"{name} {part:.0%}" for name, part in busy.items())
        self.on_progress(done / sum(t.weight for t in self.tasks), note)


def run_tasks(
    tasks: Sequence[Task],
    processes: int,
    on_progress: Callable[[float, str], None] = lambda done, note: None,
) -> dict[str, Any] | None:
    """Do tasks in processes of one thread each: in their order, as far as what they need is done.

    When a signal comes or a task fails, what is begun is stopped by its :data:`Report`, and nothing more is begun.

    Arguments:
        tasks: The tasks.
        processes: How many processes, ≥ 1.
        on_progress: Called with the part of all the work that is done, in [0, 1], and what is being done.

    Returns:
        What each returned, by name; None when a signal stopped it.

    Raises:
        Exception: That of the first task that failed.
        RunError: If a process was killed.
    """
    schedule = _Schedule(tasks, on_progress)
    workers: list[_Worker] = []
    with Interrupt() as interrupt:
        try:
            workers.extend(_Worker() for _ in range(min(processes, len(tasks))))
            while True:
                if interrupt.received is not None:
                    schedule.stop(workers)
                for worker in workers:
                    if worker.task is None:
                        schedule.begin(worker)
                busy = {worker.connection: worker for worker in workers if worker.task is not None}
                if not busy:
                    break
                for connection in wait(list(busy), timeout=0.5):  # to look at the signal again
                    schedule.receive(busy[connection], workers)  # type: ignore[index]
        finally:
            for worker in workers:
                worker.end()
    if schedule.error is not None:
        raise schedule.error
    return schedule.results if len(schedule.results) == len(schedule.tasks) else None
