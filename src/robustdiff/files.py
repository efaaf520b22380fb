"""Files that are either whole or absent.

A process may be killed at any instruction. A reader must then find the previous file or the next one, never
a half of either. POSIX gives exactly one such operation, rename(2) within a file system: write under a
temporary name in the same folder, force the bytes to the disk, rename over the target.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError

__all__ = ["atomic_folder", "atomic_write"]


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
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")
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
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A new empty folder to fill; it appears at `path`, complete and on disk, when the block ends without an exception.

    A folder that was at `path` is replaced. If the block raises, the temporary folder is removed and whatever was at
    `path` stays. The parent must exist.

    Yields:
        The temporary folder, beside `path`.

    Raises:
        OSError: The parent does not exist or cannot be written.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for file in [f for f in temporary.rglob("*") if f.is_file()]:
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())
        # rename(2) replaces no folder that has something in it: the old one steps aside first.
        previous = target.with_name(f".{target.name}.old.tmp")
        shutil.rmtree(previous, ignore_errors=True)
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
