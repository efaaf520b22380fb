"""Captions of images: their form, and the files that hold them in a folder of images.

    metadata.jsonl      an object in each line: {"file_name": "a.png", "text": "a red shoe"}
    metadata.csv        a table with the columns file_name and text
    a.txt               the caption of a.png, in its first line

A list of strings in place of the text holds several captions of one image. Names of files are relative to the folder of
the metadata, as in Hugging Face's imagefolder. Of a text file the first line is read, as in kohya's sd-scripts.
"""

from __future__ import annotations

import csv
import json
import logging
import os
import posixpath
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from robustdiff.data.decode import file_source
from robustdiff.errors import InputError, first_line, printable

__all__ = ["COLUMNS", "Captions", "check_captions", "read_captions", "warn_of_empty"]

logger = logging.getLogger(__name__)

COLUMNS = ("text", "caption")
"""The default names of the column of captions, in order of preference."""

METADATA = ("metadata.jsonl", "metadata.csv")
MOST_CHARACTERS = 2**16  # in one caption
MOST_BYTES = 2**20  # in one line of metadata, and in one text file


class Captions:
    """The captions of all images, one or more of each.

    They are kept in one array of bytes: worker processes share its memory, and do not copy a string for each image.

    Args:
        captions: The captions of each image.
    """

    def __init__(self, captions: Iterable[Sequence[str]]) -> None:
        text, ends, firsts = bytearray(), array("q", [0]), array("q", [0])
        for several in captions:
            for caption in several:
                text += caption.encode("utf-8", "surrogatepass")
                ends.append(len(text))
            firsts.append(len(ends) - 1)
        self._text = np.frombuffer(bytes(text), np.uint8)
        self._ends, self._firsts = np.array(ends, np.int64), np.array(firsts, np.int64)

    def __len__(self) -> int:
        return len(self._firsts) - 1

    def __getitem__(self, index: int) -> tuple[str, ...]:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is out of range for captions of {len(self)} images")
        ends = self._ends[self._firsts[index] : self._firsts[index + 1] + 1].tolist()
        parts = (self._text[start:end].tobytes() for start, end in pairwise(ends))
        return tuple(part.decode("utf-8", "surrogatepass") for part in parts)

    def __iter__(self) -> Iterator[tuple[str, ...]]:
        return (self[index] for index in range(len(self)))


def check_captions(value: Any, where: str) -> tuple[str, ...]:
    """Return the captions that a string or a list of strings holds.

    Args:
        value: The untrusted value.
        where: The name of its place in messages.

    Raises:
        InputError: Another type, an empty list, an invalid character, or a caption that is too long.
    """
    captions = tuple(value) if isinstance(value, list | tuple) else (value,)
    if not captions or not all(isinstance(caption, str) for caption in captions):
        shown = "null" if value is None else f"{type(value).__name__} {printable(str(value)[:100])}"
        raise InputError(f"{where} is {shown}; make it a string, or a list of one or more strings")
    for caption in captions:
        if len(caption) > MOST_CHARACTERS:
            raise InputError(
                f"{where} has {len(caption)} characters; captions have at most {MOST_CHARACTERS}: shorten it"
            )
        if not caption.isascii() and any("\ud800" <= character <= "\udfff" for character in caption):
            raise InputError(f"{where} has half of a surrogate pair, which is no character; write it anew as UTF-8")
    return captions


def warn_of_empty(name: str, captions: Captions, word: Callable[[int], str]) -> None:
    """Log the number of images with an empty caption.

    Args:
        name: The name of the dataset in messages.
        captions: The captions of all images.
        word: A function that returns the name of an image in messages, from its index.
    """
    empty = [index for index, several in enumerate(captions) if not all(map(str.strip, several))]
    if empty:
        logger.warning(
            "%s: %d of %d images have an empty caption, such as %s; they are trained with the empty text",
            name,
            len(empty),
            len(captions),
            word(empty[0]),
        )


def read_captions(
    folder: Path, images: Sequence[Path], others: Sequence[Path], column: str | None
) -> tuple[Captions | None, set[Path]]:
    """Read the captions of the images in a folder.

    Args:
        folder: The folder.
        images: The images in it.
        others: The other files in it.
        column: The name of the column of captions in the metadata; None is the first of `COLUMNS` that it has.

    Returns:
        The captions, or None if there are none, and the files that were read.

    Raises:
        InputError: Images without a caption beside others that have one, both kinds of files, or malformed files.
    """
    tables = [path for path in others if path.name in METADATA]
    have = set(others)
    texts = [path for image in images if (path := image.with_suffix(".txt")) in have]
    if len({path.name for path in tables}) > 1:
        raise InputError(f"{printable(folder)}: holds both {' and '.join(METADATA)}; keep one of them")
    found = _of_tables(folder, images, sorted(tables), column) if tables else None
    if found is not None and texts:
        raise InputError(
            f"{printable(folder)}: captions are in {tables[0].name} and in text files as well, such as "
            f"{printable(texts[0])}; keep one of them"
        )
    if column is not None and found is None:
        raise InputError(
            f"{printable(folder)}: data.caption_column={printable(column)} is for captions in {' or '.join(METADATA)}, "
            "and there is none; leave it out, or write the file"
        )
    if found is None and texts:
        found, tables = _of_texts(folder, images, have), texts
    if found is None:
        return None, set()
    captions = Captions(found)
    warn_of_empty(printable(folder), captions, lambda index: printable(images[index]))
    return captions, set(tables)


def _without(images: Sequence[Path], missing: Sequence[int], remedy: str) -> InputError:
    first = printable(images[missing[0]])
    return InputError(f"{len(missing)} of {len(images)} images have no caption, first {first}: {remedy}")


def _of_texts(folder: Path, images: Sequence[Path], have: set[Path]) -> list[tuple[str, ...]]:
    """Return the captions in text files beside the images."""
    paths = [image.with_suffix(".txt") for image in images]
    if missing := [index for index, path in enumerate(paths) if path not in have]:
        raise _without(images, missing, "put a .txt beside each image, or beside none")
    with ThreadPoolExecutor() as pool:
        read = list(pool.map(_text, paths))
    if longer := [path for path, (_, more) in zip(paths, read, strict=True) if more]:
        logger.warning(
            "%s: %d of %d text files have more lines than the caption, such as %s; the first line alone is read: list "
            "several captions of an image in metadata.jsonl",
            printable(folder),
            len(longer),
            len(paths),
            printable(longer[0]),
        )
    return [(caption,) for caption, _ in read]


def _text(path: Path) -> tuple[str, bool]:
    """Return the first line of a text file that is not blank, and whether there are more."""
    name = printable(path)
    try:
        with file_source(path)() as file:
            data = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise InputError(f"{name}: cannot be read ({error.strerror}); make it readable") from error
    if len(data) > MOST_BYTES:
        raise InputError(f"{name} has more than {MOST_BYTES >> 20} MiB, as no caption has; shorten it")
    try:
        lines = re.split(r"\r\n?|\n", data.decode("utf-8-sig").strip())
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    return check_captions(lines[0].strip(), name)[0], len(lines) > 1


# -- metadata --------------------------------------------------------------------------------------------------

Row = dict[str, Any]


def _of_tables(
    folder: Path, images: Sequence[Path], tables: Sequence[Path], column: str | None
) -> list[tuple[str, ...]] | None:
    """Return the captions in the metadata, or None if it has no column of captions."""
    wanted = COLUMNS if column is None else (column,)
    rows = [
        (path, number, row.get("file_name"), {name: row[name] for name in wanted if name in row})
        for path in tables
        for number, row in _rows(path)
    ]
    used = next((name for name in wanted if any(name in values for *_, values in rows)), None)
    if used is None:
        if column is None:
            return None
        raise InputError(f"{printable(tables[0])}: has no {printable(column)}; set data.caption_column to a key it has")
    ranks = {image.relative_to(folder).as_posix(): index for index, image in enumerate(images)}
    found: dict[int, tuple[str, ...]] = {}
    for path, number, file_name, values in rows:
        where = f"{printable(path)}: line {number}"
        place = _place(folder, path, file_name, where)
        shown = printable(place[:200])
        if (index := ranks.get(place)) is None:
            raise InputError(f"{where} names {shown}, which is not among the images there; correct or remove it")
        if index in found:
            raise InputError(f"{where} names {shown} a second time; keep one of the lines")
        if used not in values:
            raise InputError(f"{where} has no {printable(used)}; add it, or remove the line and the image")
        found[index] = check_captions(values[used], f"{where}: {printable(used)}")
    if missing := [index for index in range(len(images)) if index not in found]:
        raise _without(images, missing, f"add it to {printable(tables[0])}, or move the image away")
    return [found[index] for index in range(len(images))]


def _place(folder: Path, table: Path, file_name: Any, where: str) -> str:
    """Return the path, relative to the folder of the images, that a row names; it is not opened."""
    if not isinstance(file_name, str) or not file_name:
        raise InputError(f"{where} has no file_name; write the name of an image, relative to {table.name}")
    name = file_name.replace(os.sep, "/")  # on Windows, "sub\\a.png" is a name as well
    place = posixpath.normpath(posixpath.join(table.parent.relative_to(folder).as_posix(), name))
    if place.startswith(("/", "../")) or place == "..":
        raise InputError(f"{where} names {printable(file_name[:200])}, outside the folder of the images; remove it")
    return place


def _lines(path: Path) -> Iterator[str]:
    """Yield the lines of a file, with their ends."""
    try:
        with file_source(path)() as file:
            number = 0
            while line := file.readline(MOST_BYTES + 1):
                number += 1
                where = f"{printable(path)}: line {number}"
                if len(line) > MOST_BYTES:
                    raise InputError(f"{where} has more than {MOST_BYTES >> 20} MiB; shorten it")
                try:
                    yield line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise InputError(f"{where} is not UTF-8 (byte {error.start} of it); save it as UTF-8") from None
    except OSError as error:
        raise InputError(f"{printable(path)}: cannot be read ({error.strerror}); make it readable") from error


def _rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Yield the rows of a file of metadata, with the numbers of their lines."""
    return _rows_of_csv(path) if path.suffix == ".csv" else _rows_of_json(path)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError("it has a key twice")
    return row


def _rows_of_json(path: Path) -> Iterator[tuple[int, Row]]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_without_duplicates)
            if not isinstance(row, dict):
                raise ValueError(f"it is of type {type(row).__name__}")
        except (ValueError, RecursionError) as error:
            reason = printable(first_line(error)[:200])
            raise InputError(
                f'{printable(path)}: line {number} is not a JSON object ({reason}); write {{"file_name": …, "text": …}}'
            ) from None
        yield number, row


def _rows_of_csv(path: Path) -> Iterator[tuple[int, Row]]:
    reader = csv.reader(_lines(path), strict=True)
    try:
        names = next(reader, [])
        if len(set(names)) < len(names):
            raise csv.Error("the header names a column twice")
        for fields in reader:
            if len(fields) not in (0, len(names)):
                raise csv.Error(f"{len(fields)} fields under a header of {len(names)}")
            if fields:
                yield reader.line_num, dict(zip(names, fields, strict=True))
    except csv.Error as error:
        raise InputError(f"{printable(path)}: line {reader.line_num}: {error}; correct it") from None
