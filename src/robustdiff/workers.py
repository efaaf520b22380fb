"""A call in several single-threaded processes that share its work.

Threads of one process synchronise in every operation, so another program on one of their cores delays them all.
Processes with separate pieces of work do not.

A worker is a new interpreter in its own session, or process group on Windows, so that Ctrl-C in a terminal reaches only
the parent. It reads the call from a pipe, and writes progress and the result to it. A further message, or the end of
the pipe, which closes when the parent ends or is killed, stops the call as SIGTERM does. In the same way, the end of
the pipe tells the parent that a worker was killed.
"""

from __future__ import annotations

import logging
import multiprocessing.connection
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any

from robustdiff.errors import InputError, RunError, out_of_memory
from robustdiff.interrupt import Interrupt
from robustdiff.progress import Progress

__all__ = ["available_cores", "run_workers", "serve"]

logger = logging.getLogger(__name__)

ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")

_PIPE: Any = getattr(multiprocessing.connection, "PipeConnection", Connection)  # the former on Windows

Call = Callable[[Progress], bool]
"""A picklable call. It returns True if it finished, and False if SIGTERM stopped it."""


def available_cores() -> int:
    """Return the number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Remote(logging.Handler):
    """The connection of a worker to its parent, for progress and warnings; ignored once the parent has ended."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(logging.WARNING)
        self.connection = connection
        self.stopping = False

    def stop_when_told(self) -> None:
        """Wait for a message from the parent or for its end, and stop the work of the main thread."""
        with suppress(EOFError, OSError):
            self.connection.recv()
        self.stopping = True
        if sys.platform == "win32":
            signal.raise_signal(signal.SIGTERM)  # its handler runs in the main thread
        else:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)  # ends a wait of it too

    def send(self, *message: Any) -> None:
        with suppress(OSError):
            self.connection.send(message)

    def begin(self, description: str, total: float) -> None:
        if self.stopping:  # the signal came at the end of a piece of work
            raise KeyboardInterrupt
        self.send("begin", description, total)

    def advance(self, amount: float, note: str = "") -> None:
        self.send("advance", amount, note)

    def emit(self, record: logging.LogRecord) -> None:
        if not self.stopping:  # the parent itself warns that a stopped training is saved
            self.send("warning", record.getMessage())


def serve(handle: int) -> None:
    """Run the call that is received from a pipe, given its file descriptor, or its handle on Windows."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    connection = _PIPE(handle)
    remote = _Remote(connection)
    logging.getLogger().addHandler(remote)
    end: tuple[bool, Exception | None] = False, None
    try:
        call: Call = connection.recv()
        threading.Thread(target=remote.stop_when_told, daemon=True).start()
        end = call(remote), None
    except (KeyboardInterrupt, EOFError):
        pass
    except (InputError, RunError, OSError) as error:
        end = False, error
    except Exception as error:  # an unexpected one may not be picklable, and would lose its traceback
        full = out_of_memory(error)
        end = False, RuntimeError(traceback.format_exc()) if full is None else RunError(full)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a late one would interrupt the message, or the interpreter's exit
    remote.send("end", *end)


def _apart(handle: int) -> dict[str, Any]:
    """Return the arguments of Popen for a process that Ctrl-C does not reach, and that inherits a handle."""
    if sys.platform == "win32":
        os.set_handle_inheritable(handle, True)
        startup = subprocess.STARTUPINFO(lpAttributeList={"handle_list": [handle]})
        return {"startupinfo": startup, "creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    return {"pass_fds": [handle], "start_new_session": True}


class _Worker:
    """The parent's side of a worker."""

    def __init__(self, call: Call, progress: Progress) -> None:
        self.connection, theirs = Pipe()
        code = f"import sys; sys.path[:] = {sys.path!r}; from robustdiff.workers import serve; serve({theirs.fileno()})"
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.DEVNULL,
                env={**os.environ, **ONE_THREAD},
                **_apart(theirs.fileno()),
            )
        self.progress = progress
        self.running, self.finished, self.error = True, False, None
        self.send(call)

    def send(self, what: Call | None) -> None:
        """Start a call, or stop it (None); a stopped worker saves its state and then sends its end."""
        with suppress(OSError):  # the worker has ended, which receive reports
            self.connection.send(what)

    def receive(self) -> None:
        """Handle the next message of the worker."""
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
        """Kill the process of the worker."""
        self.process.kill()
        self.process.wait()
        self.connection.close()


def run_workers(call: Call, progresses: Sequence[Progress]) -> bool:
    """Run a call in single-threaded processes. A signal, or the first error, stops all of them.

    Args:
        call: The call, which must be picklable and stop at SIGTERM.
        progresses: The receivers of progress, one for each process. When a process has finished, a part without name
            or size begins.

    Returns:
        Whether all processes finished.

    Raises:
        Exception: The error of the first call that failed.
        RunError: If a process was killed.
    """
    workers: list[_Worker] = []
    error: Exception | None = None
    stopping = False
    with Interrupt() as interrupt:
        try:
            workers.extend(_Worker(call, progress) for progress in progresses)
            while running := {worker.connection: worker for worker in workers if worker.running}:
                for connection in wait(list(running), timeout=0.5):  # to check for signals
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
