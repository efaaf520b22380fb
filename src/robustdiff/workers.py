"""The same call in several processes of one thread each, which share its work among themselves.

The threads of one process wait for each other in every operation, so another program on one of their cores stalls them
all. Processes that share whole pieces of work do not wait.

A worker is a new interpreter, in a session of its own, so that Ctrl-C in a terminal reaches its parent alone. It reads
the call from a socket and writes progress and the result to it. Whatever comes after the call, or the end of the
socket, which closes when the parent ends, however it ends, stops the call as SIGTERM does. A parent sees in the same
way that a worker was killed.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

from robustdiff.errors import InputError, RunError
from robustdiff.interrupt import Interrupt
from robustdiff.progress import Progress

__all__ = ["available_cores", "run_workers", "serve"]

logger = logging.getLogger(__name__)

ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")

Call = Callable[[Progress], bool]
"""A call that is pickled; it returns whether it was finished, False when SIGTERM stopped it."""


def available_cores() -> int:
    """Return the number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Remote(logging.Handler):
    """The parent, as a worker tells it of progress and of warnings; when it is gone nobody is told."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(logging.WARNING)
        self.connection = connection
        self.stopping = False

    def stop_when_told(self) -> None:
        """Wait for the parent to say something or to end, and stop the main thread's work."""
        with suppress(EOFError, OSError):
            self.connection.recv()
        self.stopping = True
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

    def send(self, *message: Any) -> None:
        with suppress(OSError):
            self.connection.send(message)

    def begin(self, description: str, total: float) -> None:
        if self.stopping:  # the signal came when a piece of work was as good as finished
            raise KeyboardInterrupt
        self.send("begin", description, total)

    def advance(self, amount: float, note: str = "") -> None:
        self.send("advance", amount, note)

    def emit(self, record: logging.LogRecord) -> None:
        if not self.stopping:  # that a stopped training is saved the parent says of the whole
            self.send("warning", record.getMessage())


def serve(handle: int) -> None:
    """Do the call that comes through a socket.

    Arguments:
        handle: The socket's file descriptor.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    connection = Connection(handle)
    remote = _Remote(connection)
    logging.getLogger().addHandler(remote)
    try:
        call: Call = connection.recv()
        threading.Thread(target=remote.stop_when_told, daemon=True).start()
        remote.send("end", call(remote), None)
    except (KeyboardInterrupt, EOFError):
        remote.send("end", False, None)
    except (InputError, RunError, OSError) as error:
        remote.send("end", False, error)
    except Exception:  # a fault of the program: others may not be picklable, and their traceback would stay behind
        remote.send("end", False, RuntimeError(traceback.format_exc()))


class _Worker:
    """A worker as its parent sees it. Attributes: running; finished, error: how it ended; progress: told of it."""

    def __init__(self, call: Call, progress: Progress) -> None:
        ours, theirs = socket.socketpair()
        code = f"import sys; sys.path[:] = {sys.path!r}; from robustdiff.workers import serve; serve({theirs.fileno()})"
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.DEVNULL,
                env={**os.environ, **ONE_THREAD},
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self.connection = Connection(ours.detach())
        self.progress = progress
        self.running, self.finished, self.error = True, False, None
        self.send(call)

    def send(self, what: Call | None) -> None:
        """Begin the call; None has it stop, which it says when it has saved what it can go on from."""
        with suppress(OSError):  # it has ended, and receive says so
            self.connection.send(what)

    def receive(self) -> None:
        """Take its next message."""
        try:
            kind, *values = self.connection.recv()
        except (EOFError, OSError):
            code = self.process.wait()
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            error = RunError(f"a process {how}: is there enough memory? The same command goes on from here")
            kind, values = "end", [False, error]
        if kind == "begin":
            self.progress.begin(*values)
        elif kind == "advance":
            self.progress.advance(*values)
        elif kind == "warning":
            logger.warning("%s", *values)
        else:
            self.running = False
            self.finished, self.error = values

    def end(self) -> None:
        """End its process, whatever it does."""
        self.process.kill()
        self.process.wait()
        self.connection.close()


def run_workers(call: Call, progresses: Sequence[Progress]) -> bool:
    """Make a call in processes of one thread each. A signal, or the first that fails, stops them all.

    Arguments:
        call: The call, which is pickled. SIGTERM stops it.
        progresses: One for each process, told what its call tells. At the end of a finished one a part without name or
            size begins.

    Returns:
        Whether all calls were finished.

    Raises:
        Exception: That of the first call that failed.
        RunError: If a process was killed.
    """
    workers: list[_Worker] = []
    error: Exception | None = None
    stopping = False
    with Interrupt() as interrupt:
        try:
            workers.extend(_Worker(call, progress) for progress in progresses)
            while running := {worker.connection: worker for worker in workers if worker.running}:
                for connection in wait(list(running), timeout=0.5):  # to look at the signal again
                    worker = running[connection]  # type: ignore[index]
                    worker.receive()
                    error = error or worker.error
                    if worker.finished:
                        worker.progress.begin("", 0)
                if not stopping and (error is not None or interrupt.received is not None):
                    stopping = True
                    for worker in workers:
                        worker.send(None)
        finally:
            for worker in workers:
                worker.end()
    if error is not None:
        raise error
    return all(worker.finished for worker in workers)
