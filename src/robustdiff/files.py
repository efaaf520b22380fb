"""Atomic writes, and safe access to untrusted files.

A process may be killed at any instruction; a reader must then find the old file or the new one, but no partial file.
Files are therefore written under a temporary name in the same folder, flushed to disk by fsync(2), and renamed by
rename(2), which is atomic within a file system.

A downloaded folder can hold symbolic links, hard links and pipes in place of this package's files. Files are opened
only if they are regular, without following links; folders are written to only if they belong to this package, and only
files that it created are removed.

A process that writes where another one must not write meanwhile holds a lock of the operating system (flock, and on
Windows a locked byte), which is released when the process ends, however it ends.

On Windows a file that is open, or mapped to memory, is neither removed nor replaced. Files are therefore closed before
they are renamed or removed, and a rename is tried again while another program, such as a virus scanner, has the file.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, TypeVar

from safetensors import SafetensorError

from robustdiff.errors import InputError, NotFiniteError, RunError, first_line, first_mistake, printable

if TYPE_CHECKING:
    from pydantic import BaseModel

__all__ = [
    "MARKER",
    "STALE",
    "atomic_folder",
    "atomic_write",
    "cache_folder",
    "check_outside",
    "claim_folder",
    "held",
    "make_folder",
    "open_regular",
    "read_json",
    "read_json_lines",
    "read_record",
    "remove_leftovers",
    "remove_unfinished",
    "rename",
    "scratch_folder",
    "user_key",
    "write_json",
    "written_last",
]

logger = logging.getLogger(__name__)

MARKER = ".robustdiff"
"""The name of the file that marks a folder whose contents this package may replace and remove."""

_JSON_BYTES = 2**26
_KEY_BYTES = 32
_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)  # opening a pipe would block
_OWNER = " of robustdiff:"  # in a marker, after the purpose of the folder
_UNLOCKABLE = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
_POLL = 0.1  # seconds between checks of a lock of another process
_WINDOWS = os.name == "nt"
_LOCKED_BYTE = 2**30  # on Windows nobody else could read the byte, and no file with a lock has that many
_PATIENCE = 5.0  # seconds for which another program may have a file that is renamed on Windows

STALE = 86_400.0
"""The age in seconds from which a temporary file is of a killed process, where other processes may write meanwhile."""

_locks: set[BinaryIO] = set()
_unfinished: set[Path] = set()  # temporary files and folders of this process


def _close_locks() -> None:
    for file in _locks:
        file.close()
    _unfinished.clear()


if hasattr(os, "register_at_fork"):
    # A forked process, such as one that loads images, may outlive this one, and would keep its locks; and it may end
    # before it, and must not remove its temporary files.
    os.register_at_fork(after_in_child=_close_locks)


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open `path` for writing; the file appears, complete and on disk, when the block ends without an exception.

    If the block raises, the temporary file is removed and `path` is unchanged. The folder of `path` must exist. The
    temporary file is hidden (`.NAME.RANDOM.tmp`), so that after a kill no glob for the target's suffix finds it.

    Raises:
        OSError: The folder does not exist or cannot be written.
    """
    target = Path(path)
    temporary = _temporary(target)
    _unfinished.add(temporary)
    try:
        # Unlike mkstemp, "x" respects the user's umask.
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        rename(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        _unfinished.discard(temporary)


@contextmanager
def atomic_folder(path: str | os.PathLike[str], *, replace: bool = False) -> Iterator[Path]:
    """Create a folder to fill; it appears at `path`, complete and on disk, when the block ends without an exception.

    If the block raises, the temporary folder is removed and `path` is unchanged. The parent must exist.

    Args:
        path: The folder to create.
        replace: Whether to replace an existing folder at `path`, which must belong to this package.

    Raises:
        InputError: `path` exists and is not to be replaced.
        OSError: The parent does not exist or cannot be written.
    """
    target = Path(path)
    if os.path.lexists(target) and not (replace and target.is_dir() and not target.is_symlink()):
        raise InputError(f"{printable(target)} exists already: give another name, or remove it")
    temporary, previous = _temporary(target), _temporary(target)
    _unfinished.add(temporary)
    temporary.mkdir()
    try:
        yield temporary
        for file in [f for f in temporary.rglob("*") if f.is_file()]:
            with open(file, "r+b" if _WINDOWS else "rb") as opened:  # Windows flushes only what may be written
                os.fsync(opened.fileno())
        # rename(2) does not replace a folder that is not empty, so the old folder is moved away first.
        _unfinished.discard(temporary)  # for a moment it is the only one
        try:
            if target.exists():
                rename(target, previous)
            rename(temporary, target)
        except BaseException:
            if previous.exists() and not target.exists():
                rename(previous, target)
            raise
        _unfinished.add(previous)
        shutil.rmtree(previous, ignore_errors=True)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        # safetensors and torch's zip writer raise errors of their own if a write fails.
        if isinstance(error, SafetensorError) or "inline_container" in str(error):
            if found := re.search(r"\(os error (\d+)\)", str(error)):
                code = int(found[1])
                raise OSError(code, os.strerror(code), str(target)) from error
            raise RunError(f"{printable(target)} cannot be written: {printable(first_line(error))}") from error
        raise
    finally:
        _unfinished.difference_update((temporary, previous))


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Create a folder in the system's folder of temporary files, which is removed when the block ends."""
    with tempfile.TemporaryDirectory(prefix="robustdiff-") as name:
        path = Path(name)
        _unfinished.add(path)
        try:
            yield path
        finally:
            _unfinished.discard(path)


def remove_unfinished() -> None:
    """Remove the temporary files and folders of this process, which ends without leaving the blocks that it is in."""
    for path in list(_unfinished):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink(missing_ok=True)


def _temporary(target: Path) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")


def rename(source: Path, target: Path) -> None:
    """Rename a file or a folder; a file at the target is replaced, and a folder there must be empty.

    Raises:
        OSError: The system refuses it, on Windows also if another program keeps one of them open.
    """
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            os.replace(source, target)
            return
        except PermissionError:
            if not _WINDOWS or time.monotonic() > deadline:
                raise
        time.sleep(_POLL)


def remove_leftovers(folder: Path, names: str, age: float = 0.0) -> None:
    """Remove temporary files and folders left by a killed :func:`atomic_write` or :func:`atomic_folder`.

    Args:
        folder: A folder of this package. Links in it are removed without following them.
        names: A regular expression for the names of the targets.
        age: The time in seconds since the last change of what is removed. Where other processes may write at the same
            time, it is longer than they take.
    """
    leftover = re.compile(rf"\.(?:{names})\.[0-9a-f]{{12}}\.tmp")
    latest = time.time() - age
    for path in folder.iterdir():
        if leftover.fullmatch(path.name) and (not age or _changed(path) < latest):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _changed(path: Path) -> float:
    try:
        return path.lstat().st_mtime
    except FileNotFoundError:  # it has its name by now
        return math.inf


def open_regular(path: str | os.PathLike[str], mode: Literal["rb", "r+b", "ab", "x+b"] = "rb") -> BinaryIO:
    """Open an untrusted file, which must be regular and, for writing, must have no other hard link.

    The file is not truncated. "ab" creates a missing file, as lock files need.

    Args:
        path: The file. Links in the path of its folder are followed.
        mode: The mode, as for :func:`open`.

    Raises:
        InputError: The file is not regular, has another hard link and is to be written, or its name is invalid.
        OSError: The file is missing, exists ("x+b"), or cannot be opened.
    """

    def opener(name: str, flags: int) -> int:
        try:
            if _WINDOWS and os.path.islink(name):  # where no flag of open(2) refuses it
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), name)
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
    """Read an untrusted JSON file.

    Args:
        path: A regular file.
        limit: The maximum size in bytes.

    Returns:
        The value; its numbers are finite.

    Raises:
        InputError: The file is not regular, too large, not JSON, or nested too deeply; the message begins with the
            path.
        OSError: The file is missing or cannot be read.
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


_Record = TypeVar("_Record", bound="BaseModel")


def read_record(path: str | os.PathLike[str], kind: type[_Record], remedy: str, limit: int = _JSON_BYTES) -> _Record:
    """Read an untrusted JSON file into a pydantic model.

    Args:
        path: A regular file.
        kind: The model.
        remedy: The advice for a damaged file, at the end of the message of the error.
        limit: The maximum size in bytes.

    Raises:
        InputError: As of :func:`read_json`, or the contents are not those of the model.
        OSError: The file is missing or cannot be read.
    """
    from pydantic import ValidationError  # imported here, since the command line starts without it

    try:
        return kind.model_validate(read_json(path, limit))
    except ValidationError as error:
        raise InputError(f"{printable(path)} is damaged ({first_mistake(error)}): {remedy}") from None
    except InputError as error:
        raise InputError(f"{error}: {remedy}") from None


def read_json_lines(
    path: str | os.PathLike[str], kind: type[_Record], remedy: str, longest: int
) -> Iterator[tuple[bytes, _Record]]:
    """Yield the lines of an untrusted file of JSON Lines, as they are and as pydantic models.

    A last line without a line break, which a kill left unfinished, is not yielded.

    Args:
        path: A regular file.
        kind: The model.
        remedy: The advice for a damaged line, at the end of the message of the error.
        longest: The maximum length of a line in bytes.

    Raises:
        InputError: A line is too long, or not of the model.
        OSError: The file is missing or cannot be read.
    """
    from pydantic import ValidationError

    with open_regular(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(longest), b""), 1):
            if not line.endswith(b"\n") and len(line) < longest:
                return
            try:
                yield line, kind.model_validate_json(line)
            except ValidationError as error:
                message = f"{printable(path)}, line {number}, is damaged ({first_mistake(error)}): {remedy}"
                raise InputError(message) from None


def write_json(path: Path, record: Any) -> None:
    """Write a result as JSON, and create the folder of the file if it is missing.

    Raises:
        NotFiniteError: A number is not finite; nothing is written.
        OSError: The folder cannot be created or written.
    """
    with written_last(path, record):
        pass


@contextmanager
def written_last(path: Path, record: Any) -> Iterator[None]:
    """Write a result as JSON when the block ends, also by an exception.

    The block writes what goes with the result, such as figures. A folder that holds the result is therefore complete,
    unless something failed, and a killed process leaves none.

    Raises:
        NotFiniteError: A number is not finite; nothing is written, and the block is not entered.
        OSError: The folder cannot be created or written.
    """
    try:
        text = json.dumps(record, indent=1, allow_nan=False)
    except ValueError:
        raise NotFiniteError(f"{printable(path)} is not written: a number in it is not finite") from None
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with atomic_write(path) as file:
            file.write(text.encode())


def check_outside(folder: Path, sources: Iterable[Path], option: str) -> None:
    """Check that a folder to write into is in none of the folders that are read.

    Args:
        folder: The folder to write into.
        sources: The files and folders that are read.
        option: The option by which another folder is chosen, for the message.

    Raises:
        InputError: The folder is a source, or in one.
    """
    for source in sources:
        if source.is_dir() and folder.resolve().is_relative_to(source.resolve()):
            raise InputError(f"output {folder} is in {source}, which is read: choose another {option}")


def make_folder(path: Path) -> None:
    """Create a folder and its parents, or check that it exists and is not a link.

    Raises:
        InputError: The path is not a folder, or the name is invalid.
        OSError: The folder cannot be created.
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
    """Create a folder for this package to write to, marked by the file :data:`MARKER`, or check that it is marked.

    An empty folder is marked, for its purpose. The contents of a marked folder belong to this package.

    Args:
        path: The folder.
        what: The purpose of the folder, in a word or two for messages.

    Returns:
        True if the folder already had contents besides the marker.

    Raises:
        InputError: The folder is neither empty nor marked, it is marked for another purpose, it contains a symbolic
            link, or the path is not a folder.
        OSError: The folder cannot be created or written.
    """
    make_folder(path)
    remove_leftovers(path, re.escape(MARKER))
    entries = list(path.iterdir())
    names = {entry.name for entry in entries}
    if names and not os.path.lexists(path / MARKER):
        raise InputError(
            f"{printable(path)} is not empty, and nothing in it says that it is {what} of robustdiff: give a new folder"
        )
    for entry in entries:
        if entry.is_symlink():
            raise InputError(
                f"{printable(entry)} is a symbolic link, which {what} of robustdiff has none of: remove it"
            )
    if names:
        _check_marker(path, what)
    else:
        # Not by a temporary file, which another process that claims the folder at once would remove.
        with suppress(FileExistsError), open(path / MARKER, "xb") as file:
            file.write(f"{what}{_OWNER} it replaces and removes what is in this folder\n".encode())
            file.flush()
            os.fsync(file.fileno())
    return bool(names - {MARKER})


def _check_marker(path: Path, what: str) -> None:
    with open_regular(path / MARKER) as file:
        purpose, separator, _ = file.read(1000).decode(errors="replace").partition(_OWNER)
    if separator and purpose != what:  # empty, if another process has just made it
        raise InputError(f"{printable(path)} holds {printable(purpose)}, and not {what}: give another folder")


@contextmanager
def held(path: Path, *, wait: bool = False, remove: bool = False) -> Iterator[bool]:
    """Hold a lock on a file within the block, if no other process holds it. Yields True if the lock is held.

    The file is created if it is missing, and nothing is written into it. Where the file system has no locks, which one
    line says, the lock counts as held.

    Args:
        path: The file.
        wait: Whether to wait until the lock is held.
        remove: Whether to remove the file at the end of the block, if the lock was held.

    Raises:
        InputError: If the file, or its folder, is a link or of another kind.
        OSError: If the file cannot be created or opened for writing.
    """
    make_folder(path.parent)
    while True:
        with open_regular(path, "ab") as file:
            # The process that held the lock before may have removed the file, and a third created another one.
            mine = _lock(file, path.parent) and path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())
            if mine or not wait:
                _locks.add(file)
                try:
                    yield mine
                finally:
                    _locks.discard(file)
                    if mine and _WINDOWS:
                        _unlock(file)
                    if mine and remove:
                        with suppress(OSError):  # on Windows, if another process waits for the lock
                            path.unlink()
                return
        time.sleep(_POLL)


def _lock(file: BinaryIO, folder: Path) -> bool:
    """Lock a file until it is closed, and return False if another process has locked it."""
    try:
        if _WINDOWS:
            msvcrt: Any = import_module("msvcrt")
            file.seek(_LOCKED_BYTE)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if isinstance(error, PermissionError if _WINDOWS else BlockingIOError):
            return False
        if error.errno not in _UNLOCKABLE:
            raise
        _warn_of_no_locks(folder)
    return True


def _unlock(file: BinaryIO) -> None:
    """Unlock and close a file on Windows, which may take its time to unlock files that are closed."""
    msvcrt: Any = import_module("msvcrt")
    with file, suppress(OSError):  # of a file system without locks
        msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)


@cache
def _warn_of_no_locks(folder: Path) -> None:
    logger.warning("%s: this file system has no locks: start no second process that writes here", printable(folder))


def cache_folder() -> Path:
    """Return the user's cache folder: `$ROBUSTDIFF_CACHE`, or else `~/.cache/robustdiff`."""
    return Path(os.environ.get("ROBUSTDIFF_CACHE") or Path.home() / ".cache" / "robustdiff")


def user_key() -> bytes:
    """Return the user's secret key of 32 random bytes, which authenticates files that later calls reuse.

    The key is created at the first call and stored in the cache; if that is not writable, each process has its own.
    """
    path = cache_folder() / "key"
    key = secrets.token_bytes(_KEY_BYTES)
    try:
        if _read_key(path) is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            _write_key(path, key)
        return _read_key(path) or key
    except (InputError, OSError):
        return key


def _read_key(path: Path) -> bytes | None:
    try:
        with open_regular(path) as file:
            found = file.read(_KEY_BYTES + 1)
    except FileNotFoundError:
        return None
    return found if len(found) == _KEY_BYTES else None


def _write_key(path: Path, key: bytes) -> None:
    """Write a key, unless another process wrote one in the meantime."""
    temporary = _temporary(path)
    _unfinished.add(temporary)
    try:
        with open(temporary, "xb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            file.write(key)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)  # unlike rename(2), this does not replace a file
        except FileExistsError:
            if _read_key(path) is None:  # a damaged one
                rename(temporary, path)
        except OSError:  # a file system without hard links
            rename(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
        _unfinished.discard(temporary)
