"""The command line: each file of this folder is a command, which parses, calls a function of the library, and prints.

The exit code is 0 for success, 2 for bad input, and 1 for a failed run. Errors are one line on stderr that names the
cause and the remedy.
"""

from __future__ import annotations

import codecs
import errno
import io
import os
import signal
import sys
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from types import FrameType
from typing import Annotated, Any, get_args, get_type_hints

import typer
from rich.console import Console

from robustdiff.errors import InputError, RunError, out_of_memory, printable
from robustdiff.files import remove_unfinished

__all__ = ["INTERRUPTED", "app", "err", "main", "out", "say"]

app = typer.Typer(
    name="robustdiff",
    help="Adversarial training of diffusion and consistency models, and measurements of whether it helped.",
    epilog="Start with: robustdiff demo",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
# click's UsageError; newer versions of typer hold a copy of click and export only its subclass.
_UsageError: Any = typer.BadParameter.__base__

_PLAIN = {
    **dict.fromkeys("−–—─━", "-"),
    **{"…": "...", "×": "x", "±": "+-", "→": "->", "≤": "<=", "≥": ">=", "‖": "||", "δ": "delta", "σ": "sigma"},
}

INTERRUPTED = 130
"""The exit code after Ctrl-C or SIGTERM, by which shells and schedulers tell what can go on from what is finished."""

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def say(message: str, console: Console = out) -> None:
    """Print a line without wrapping it to the width of the terminal, and without interpreting markup or escapes."""
    console.print(printable(message), markup=False, emoji=False, soft_wrap=True)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        from robustdiff import __version__

        say(__version__)
        raise typer.Exit


for _module in iter_modules(__path__):  # the commands import the names above
    import_module(f"{__name__}.{_module.name}")


def _name_values(function: Any) -> None:
    """Name the values of a command's options "N" or "TEXT" in its help, in place of the names of Python's types."""
    names = {int: "N", float: "X", str: "TEXT", Path: "PATH"}
    # Evaluated once, so that typer reads the objects that are changed here.
    function.__annotations__ = get_type_hints(function, include_extras=True)
    for name, hint in function.__annotations__.items():
        for info in getattr(hint, "__metadata__", ()):
            kind = get_args(hint)[0]  # a type, list[str], or a union with None
            types = [kind, *get_args(kind)]
            if isinstance(info, typer.models.ArgumentInfo):
                info.metavar = name.upper()
            elif info.metavar is None:
                info.metavar = next((text for one, text in names.items() if one in types), None)


for _command in app.registered_commands:
    _name_values(_command.callback)


def main() -> None:
    """Run the command line and exit."""
    # logging is not configured: its last resort writes warnings to the current sys.stderr, so above a progress bar.
    if isinstance(sys.stdout, io.TextIOWrapper):
        codecs.register_error("robustdiff", _plainly)
        sys.stdout.reconfigure(errors="robustdiff")
    before = signal.signal(signal.SIGTERM, _terminate)  # from the start: what comes before a training can take hours
    arguments = sys.argv[1:] or ["--help"]
    try:
        _check_values(arguments)
        # Not by calling app, which makes an exit of each KeyboardInterrupt and of each closed pipe.
        with typer.main.get_command(app).make_context("robustdiff", arguments) as context:
            context.command.invoke(context)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except InputError as error:
        sys.exit(_fail(str(error), 2))
    except _UsageError as error:
        message = error.format_message().replace("Value error, ", "")  # pydantic's prefix, in newer typers
        sys.exit(_fail(f"{message} (robustdiff --help)", 2))
    except KeyboardInterrupt:
        sys.exit(_fail("interrupted", INTERRUPTED))
    except RunError as error:
        sys.exit(_fail(str(error), 1))
    except RuntimeError as error:
        if (full := out_of_memory(error)) is None:
            raise
        sys.exit(_fail(full, 1))
    except OSError as error:
        closed = os.name == "nt" and error.errno == errno.EINVAL and error.filename is None  # a closed pipe on Windows
        if closed or isinstance(error, BrokenPipeError):  # its reader, such as head, has ended and needs no message
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python, which flushes it on exit
            sys.exit(1)
        full, free = "the disk is full", "free some space"
        if error.errno == errno.EFBIG:
            full, free = "the limit of the size of a file is reached", "raise it (ulimit -f)"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            where = error.filename or error
            sys.exit(_fail(f"{full} ({where}): {free}, and start again as after an interruption", 1))
        if error.filename is None or error.errno == errno.EIO:
            raise
        sys.exit(_fail(f"{os.fsdecode(error.filename)}: {error.strerror}: give another path", 2))
    except ValueError as error:  # raised by Python for file names that the system does not allow
        if isinstance(error, UnicodeEncodeError) and error.reason == "surrogates not allowed":
            sys.exit(_fail(f"{error.object!r} holds a character that no text has: correct the path or the name", 2))
        if "embedded null" not in str(error):
            raise
        sys.exit(_fail("a path holds a null byte: correct it", 2))
    finally:
        signal.signal(signal.SIGTERM, before)
    sys.exit(0)


def _plainly(error: UnicodeError) -> tuple[str, int]:
    """Replace characters that the encoding of stdout lacks, as that of a file does on Windows."""
    assert isinstance(error, UnicodeEncodeError)
    text = error.object[error.start : error.end]
    return "".join(_PLAIN.get(c) or c.encode("ascii", "backslashreplace").decode() for c in text), error.end


def _terminate(number: int, frame: FrameType | None) -> None:
    """End the process at once. An exception would be lost in a destructor, or break the import of a module."""
    remove_unfinished()
    os.write(2, b"robustdiff: interrupted\n")
    os._exit(INTERRUPTED)


def _check_values(arguments: list[str]) -> None:
    """Refuse an empty value, as of a variable of the shell that is not set; an empty path would be this folder."""
    for option, value in zip(["", *arguments], arguments, strict=False):
        if value.startswith("--") and value.endswith("=") and value.count("=") == 1:
            option, value = value[:-1], ""
        if not value and option not in ("--prompt", "--negative"):  # the empty caption
            name = option if option.startswith("--") and "=" not in option else "an argument"
            raise InputError(f"{name} is empty: give a value, or leave it out")


def _fail(message: str, code: int) -> int:
    """Print one line on stderr, without control characters, and return the exit code."""
    print("robustdiff: " + printable(" ".join(message.split())), file=sys.stderr)
    return code
