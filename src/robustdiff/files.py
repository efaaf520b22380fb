"""Files that are either whole or absent.

A process may be killed at any instruction. A reader must then find the previous file or the next one, never
a half of either. POSIX gives exactly one such operation, rename(2) within a file system: write under a
temporary name in the same folder, force the bytes to the disk, rename over the target.

And files that may have come from somebody else: a folder that was downloaded can hold symbolic links, hard links and
pipes where this package keeps files of its own. They are opened here, as regular files and without following links,
folders are written into only where they are this package's, and only what it made is removed.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal

from safetensors import SafetensorError

from robustdiff.errors import InputError, RunError, printable

__all__ = [
    "atomic_folder",
    "atomic_write",
    "cache_folder",
    "claim_folder",
    "make_folder",
    "open_regular",
    "read_json",
    "remove_leftovers",
    "user_key",
    "write_json",
]

MARKER = ".robustdiff"
"""The file in a folder that says that this package may replace and remove what is in it."""

_JSON_BYTES = 2**26
_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)  # opening a pipe would wait for its other end


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open `path` for writing; it appears, complete and on disk, when the block ends without an exception.

    If the block raises, the temporary file is removed and whatever was at `path` stays. The folder of `path`
    must exist. The temporary file is hidden (`.NAME.RANDOM.tmp`), so that a process killed half-way leaves
    nothing that a glob for the target's suffix would find.

    Args:
        path: The file to create or replace.

    Yields:
        A binary file object.

    Raises:
        OSError: The folder does not exist or cannot be written.
    """
    target = Path(path)
    temporary = _temporary(target)
    try:
        # "x" and not mkstemp: the file gets the permissions the user's umask says, as any other file does.
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_folder(path: str | os.PathLike[str], *, replace: bool = False) -> Iterator[Path]:
    """Make a new folder to fill; it appears at `path`, complete and on disk, when the block ends without an exception.

    If the block raises, the temporary folder is removed and whatever was at `path` stays. The parent must exist.

    Args:
        path: The folder to create.
        replace: Whether a folder at `path` is removed, which the caller knows to be this package's.

    Yields:
        The temporary folder, beside `path`.

    Raises:
        InputError: Something is at `path` that is not replaced.
        OSError: The parent does not exist or cannot be written.
    """
    target = Path(path)
    if os.path.lexists(target) and not (replace and target.is_dir() and not target.is_symlink()):
        raise InputError(f"{printable(target)} exists already: give another name, or remove it")
    temporary, previous = _temporary(target), _temporary(target)
    temporary.mkdir()
    try:
        yield temporary
        for file in [f for f in temporary.rglob("*") if f.is_file()]:
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())
        # rename(2) replaces no folder that has something in it: the old one steps aside first.
        try:
            if target.exists():
                os.rename(target, previous)
            os.rename(temporary, target)
        except BaseException:
            if previous.exists() and not target.exists():
                os.rename(previous, target)
            raise
        shutil.rmtree(previous, ignore_errors=True)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        # A write that failed is an error of their own kind to safetensors and to torch's zip writer.
        if isinstance(error, SafetensorError) or "inline_container" in str(error):
            raise OSError(f"{target} cannot be written, is the disk full? ({error})") from error
        raise


def _temporary(target: Path) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")


def remove_leftovers(folder: Path, names: str) -> None:
    """Remove what a killed :func:`atomic_write` or :func:`atomic_folder` left in a folder of this package.

    Args:
        folder: The folder. Links in it are removed themselves, and not what they point to.
        names: A regular expression for the names of their targets.
    """
    leftover = re.compile(rf"\.(?:{names})\.[0-9a-f]{{12}}\.tmp")
    for path in folder.iterdir():
        if leftover.fullmatch(path.name):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def open_regular(path: str | os.PathLike[str], mode: Literal["rb", "r+b", "ab", "x+b"] = "rb") -> BinaryIO:
    """Open a regular file that may be somebody else's: no link, pipe or device, and nothing that is written is linked.

    Nothing is truncated. "ab" makes the file where it is missing, which is what a lock file needs.

    Args:
        path: The file. Links in the path of its folder are followed.
        mode: As :func:`open` takes it.

    Raises:
        InputError: It is not a regular file, or it is to be written and has another name as well, or no file has such
            a name.
        OSError: It is missing, exists ("x+b"), or cannot be opened.
    """

    def opener(name: str, flags: int) -> int:
        try:
            descriptor = os.open(name, flags | _NOFOLLOW, 0o666)
        except OSError as error:
            if error.errno == errno.ENXIO or os.path.islink(name) or os.path.isdir(name):
                raise InputError(f"{printable(path)} is not a regular file: remove it") from None
            raise
        status = os.fstat(descriptor)
        if stat.S_ISREG(status.st_mode) and (mode == "rb" or status.st_nlink == 1):
            return descriptor
        os.close(descriptor)
        what = "has a second name (a hard link)" if stat.S_ISREG(status.st_mode) else "is not a regular file"
        raise InputError(f"{printable(path)} {what}: remove it")

    try:
        return open(path, mode, opener=opener)
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{printable(path)} cannot be the name of a file ({error})") from None


def read_json(path: str | os.PathLike[str], limit: int = _JSON_BYTES) -> Any:
    """Read a JSON file that may be somebody else's.

    Args:
        path: A regular file.
        limit: The most bytes that it may have.

    Returns:
        What it holds; its numbers are finite.

    Raises:
        InputError: It is not a regular file, too large, not JSON, or nested too deeply; the message begins with the
            path.
        OSError: It is missing or cannot be read.
    """

    def finite(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            raise ValueError(f"{text} is not a finite number")
        return value

    with open_regular(path) as file:
        contents = file.read(limit + 1)
    if len(contents) > limit:
        raise InputError(f"{printable(path)} has more than {limit} bytes, which no file of its kind has")
    try:
        return json.loads(contents, parse_constant=finite, parse_float=finite)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{printable(path)} is damaged: it cannot be read as JSON ({printable(str(error))})") from None


def write_json(path: Path, record: Any) -> None:
    """Write a result as JSON, and make the folder of the file if there is none.

    Raises:
        RunError: A number in it is not finite; nothing is written.
        OSError: The folder cannot be made or written.
    """
    try:
        text = json.dumps(record, indent=1, allow_nan=False)
    except ValueError:
        raise RunError(f"{printable(path)} is not written: a number in it is not finite") from None
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(text.encode())


def make_folder(path: Path) -> None:
    """Make a folder and its parents, or check that there is one and that it is no link.

    Raises:
        InputError: It is something else, or no folder can have such a name.
        OSError: It cannot be made.
    """
    try:
        if path.is_symlink():
            raise InputError(f"{printable(path)} is a symbolic link: give the folder that it points to, or remove it")
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"{printable(path)} is, or is in, a file and not a folder: give another one") from None
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{printable(path)} cannot be the name of a folder ({error})") from None
    except OSError as error:
        if error.errno not in (errno.ENAMETOOLONG, errno.EINVAL, errno.ELOOP):
            raise
        raise InputError(f"{printable(path)} cannot be the name of a folder ({error.strerror})") from None


def claim_folder(path: Path, what: str) -> bool:
    """Make a folder that is this package's to write in, or check that it is one, by the file :data:`MARKER` in it.

    An empty folder becomes one. What is in it belongs to this package from then on.

    Args:
        path: The folder.
        what: What it is for, in a word or two for messages.

    Returns:
        Whether there was anything in it.

    Raises:
        InputError: It is not empty and not this package's, or something in it is a symbolic link, or it is no folder.
        OSError: It cannot be made or written.
    """
    make_folder(path)
    remove_leftovers(path, re.escape(MARKER))
    entries = list(path.iterdir())
    names = {entry.name for entry in entries}
    if names and MARKER not in names:
        raise InputError(
            f"{printable(path)} is not empty, and nothing in it says that it is {what} of robustdiff: give a new folder"
        )
    for entry in entries:
        if entry.is_symlink():
            raise InputError(
                f"{printable(entry)} is a symbolic link, which {what} of robustdiff has none of: remove it"
            )
    if not names:
        with atomic_write(path / MARKER) as file:
            file.write(f"{what} of robustdiff: it replaces and removes what is in this folder\n".encode())
    return bool(names - {MARKER})


def cache_folder() -> Path:
    """Return the folder for files of this user alone: `$ROBUSTDIFF_CACHE`, or else `~/.cache/robustdiff`."""
    return Path(os.environ.get("ROBUSTDIFF_CACHE") or Path.home() / ".cache" / "robustdiff")


def user_key() -> bytes:
    """Return 32 random bytes that only this user has, to sign files that their own later calls reuse.

    They are made at the first call and kept in the cache; if it cannot be written, each process has others.
    """
    path = cache_folder() / "key"
    key = secrets.token_bytes(32)
    try:
        if path.exists():
            with open_regular(path) as kept:
                found = kept.read(len(key) + 1)
            if len(found) == len(key):
                return found
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            os.chmod(file.fileno(), 0o600)
            file.write(key)
    except (InputError, OSError):
        pass
    return key
