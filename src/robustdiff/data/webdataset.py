"""Tar files of the WebDataset format, read at random.

Members with the same path up to the first dot of the name are one sample:

    KEY.jpg (.png, .webp, …)      the image
    KEY.txt                       its caption, the whole text
    KEY.json                      an object with its caption, or a list of several, under the key text or caption
    KEY.cls                       its class, a number

A tar has no index. The headers of all members are read once when the dataset is loaded, and images are read at their
offsets. Therefore the order is that of any other dataset, a new permutation in every epoch, and a run can be resumed.
Tars are not extracted, and no member is opened by its name. Those of a URL are fetched whole first.
"""

from __future__ import annotations

import glob
import io
import json
import logging
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from torch import Tensor

from robustdiff.data.captions import COLUMNS, Captions, check_captions, warn_of_empty
from robustdiff.data.dataset import check_labels
from robustdiff.data.decode import Background, Header, Source, allow_large, file_source, parse_colour, read_header
from robustdiff.data.encoded import EncodedDataset
from robustdiff.data.registry import DATASETS
from robustdiff.data.remote import fetch, is_url, shown
from robustdiff.errors import InputError, first_line, printable
from robustdiff.section import Text

__all__ = ["WebDataset", "expand", "webdataset"]

logger = logging.getLogger(__name__)

IMAGES = ("bmp", "gif", "jfif", "jpe", "jpeg", "jpg", "png", "tif", "tiff", "webp")
MOST_TARS = 100_000
MOST_IMAGE_BYTES = 2**28
MOST_TEXT_BYTES = 2**20  # of a caption, a class or JSON, and of the extended header of a member
EXTENDED = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)


class Member(NamedTuple):
    """The bytes of a member of a tar."""

    offset: int
    size: int


@dataclass(slots=True)
class Sample:
    """The members of one sample by extension, in lower case."""

    key: str
    members: dict[str, Member] = field(default_factory=dict)


@dataclass(slots=True)
class Indexed:
    """The samples of a tar that have an image, with the image's header, their captions and classes.

    Attributes:
        others: The names of members that are of no sample, and of samples without an image.
    """

    keys: list[str] = field(default_factory=list)
    extensions: list[str] = field(default_factory=list)
    images: list[Member] = field(default_factory=list)
    headers: list[Header] = field(default_factory=list)
    captions: list[tuple[str, ...] | None] = field(default_factory=list)
    classes: list[int | None] = field(default_factory=list)
    others: list[str] = field(default_factory=list)


class _Section(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, file: BinaryIO, member: Member) -> None:
        self._file, self._member, self._position = file, member, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._member.size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(0, self._member.size - self._position)]
        self._file.seek(self._member.offset + self._position)
        count: int = self._file.readinto(view)  # type: ignore[attr-defined]
        self._position += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _open_member(path: str, member: Member) -> BinaryIO:
    return io.BufferedReader(_Section(file_source(path)(), member))


def expand(root: str) -> list[str]:
    """Return the tar files that a pattern names, in order.

    Args:
        root: A path, a pattern such as `train-*.tar` or `train-{000..099}.tar` or `{a,b}/*.tar`, or a folder, of which
            all `.tar` files are taken. Or a URL, with braces or without, whose files are fetched to the cache; see
            :func:`robustdiff.data.remote.fetch`.

    Raises:
        InputError: A command, too many files, a path or a pattern without a file, or a file that cannot be fetched.
    """
    short = shown(root)
    if root.startswith("pipe:"):
        raise InputError(f"{short} is a command, and none is run; give the URL alone, or the path of downloaded files")
    if is_url(root):
        if "*" in root:
            raise InputError(f"{short}: a server does not list its files; name them as in train-{{000..099}}.tar")
        return fetch(list(dict.fromkeys(_braces(root))))
    if "::" in root:
        raise InputError(f"{short} is no path and no URL; download the tar files and give their path as root")
    if os.path.isdir(root):
        patterns = [os.path.join(glob.escape(root), "*.tar")]
    else:  # braces in the path of what is there are those of a name
        patterns = [root] if os.path.exists(root) else _braces(root)
    found: list[str] = []
    for pattern in patterns:
        matching = [pattern] if os.path.isfile(pattern) else sorted(filter(os.path.isfile, glob.glob(pattern)))
        if not matching:
            raise InputError(f"{printable(pattern)}: no such file; give the path of tar files, such as train-*.tar")
        found += matching
        if len(found) > MOST_TARS:
            raise InputError(f"{short} names more than {MOST_TARS} files; give fewer, larger ones")
    return list(dict.fromkeys(found))


def _braces(text: str) -> list[str]:
    """Return the texts to which braces expand, as a shell does: `{a,b}` and `{000..099}`, not nested."""
    parts: list[list[str]] = []
    count = 1
    for part in re.split(r"(\{[^{}]*\})", text):
        inner = part[1:-1] if part.startswith("{") and part.endswith("}") else ""
        options = [part]
        if numbers := re.fullmatch(r"(\d{1,18})\.\.(\d{1,18})", inner):
            first, last = numbers.groups()
            width = max(len(first), len(last)) if first.startswith("0") or last.startswith("0") else 0
            step = 1 if int(first) <= int(last) else -1
            if abs(int(last) - int(first)) < MOST_TARS:
                options = [f"{number:0{width}d}" for number in range(int(first), int(last) + step, step)]
            else:
                count = MOST_TARS + 1
        elif "," in inner:
            options = inner.split(",")
        count *= len(options)
        if count > MOST_TARS:
            raise InputError(f"{printable(text[:200])} names more than {MOST_TARS} files; give fewer, larger ones")
        parts.append(options)
    return ["".join(choice) for choice in product(*parts)]


# -- the index -------------------------------------------------------------------------------------------------


class _Header(tarfile.TarInfo):
    """A header whose extension, which is read into memory, is bounded."""

    @classmethod
    def frombuf(cls, *arguments: Any, **options: Any) -> _Header:
        header = super().frombuf(*arguments, **options)
        if header.type in EXTENDED and not 0 <= header.size <= MOST_TEXT_BYTES:
            raise tarfile.ReadError(f"a header of {header.size} bytes")
        return header


def _members(path: str) -> Iterator[tuple[str, Member]]:
    """Yield the names and places of the files in a tar, in order.

    Raises:
        InputError: Not an uncompressed tar, damaged, truncated, or with links or devices in it.
    """
    name = printable(path)
    try:
        with file_source(path)() as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(0)
            if file.read(6)[:2] in (b"\x1f\x8b", b"BZ", b"\xfd7", b"(\xb5"):
                raise InputError(f"{name}: is compressed, and images could not be read at random; decompress it")
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:", tarinfo=_Header, errors="surrogateescape") as tar:
                after = 0
                while (header := tar.next()) is not None:
                    tar.members = []  # type: ignore[attr-defined]  # else all headers stay in memory
                    if header.offset_data < after or header.size < 0 or header.offset_data + header.size > end:
                        raise tarfile.ReadError(f"{header.name[:100]} ends at byte {header.offset_data + header.size}")
                    after = header.offset_data + header.size
                    if header.isdir():
                        continue
                    if not header.isreg() or header.issparse():
                        kind = "a link" if header.issym() or header.islnk() else "no plain file"
                        raise InputError(
                            f"{name}: {printable(header.name[:200])} is {kind}; write the tar again with plain files"
                        )
                    yield header.name, Member(header.offset_data, header.size)
                _check_end(file, tar.offset)
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{name}: cannot be read ({error.strerror or printable(first_line(error))})") from error
    except Exception as error:  # for damaged headers, tarfile may raise any error
        reason = printable(first_line(error)[:200])
        raise InputError(f"{name}: not a whole tar file ({reason}); download or write it again") from error


def _check_end(file: BinaryIO, offset: int) -> None:
    """Check that a tar ends with zeros. tarfile takes any damaged header after the first for the end."""
    file.seek(offset)
    data = file.read(2**20)
    if not data:
        raise tarfile.ReadError(f"it stops at byte {offset} without the mark of its end")
    while data:
        if data.count(0) < len(data):
            raise tarfile.ReadError(f"no header and no end at byte {offset}")
        data = file.read(2**20)


def _samples(path: str) -> Iterator[Sample | str]:
    """Yield the samples of a tar, and the names of members that are of no sample.

    Raises:
        InputError: A key that comes again after another, or an extension of a sample twice.
    """
    sample: Sample | None = None
    seen: set[str] = set()
    for name, member in _members(path):
        base = name.rpartition("/")[2]
        stem, dot, extension = base.partition(".")
        if base.startswith(".") or re.match(r"__[^/]*__($|/)", name):
            continue  # hidden, or metadata of the tar
        if not dot:
            yield name
            continue
        key = name[: len(name) - len(base)] + stem
        if sample is None or sample.key != key:
            if sample is not None:
                yield sample
            if key in seen:
                raise InputError(
                    f"{printable(path)}: the sample {printable(key[:200])} comes twice; write its members one after "
                    "another, and each sample once"
                )
            seen.add(key)
            sample = Sample(key)
        if extension.lower() in sample.members:
            raise InputError(f"{printable(path)}: {printable(name[:200])} comes twice; keep one of them")
        sample.members[extension.lower()] = member
    if sample is not None:
        yield sample


def _index(path: str, column: str | None) -> Indexed:
    """Read the headers, captions and classes of a tar."""
    found = Indexed()
    with file_source(path)() as file:
        for sample in _samples(path):
            if isinstance(sample, str):
                found.others.append(sample)
                continue
            name = f"{printable(path)}: {printable(sample.key[:200])}"
            images = [extension for extension in sample.members if extension in IMAGES]
            if not images:
                found.others.append(sample.key)
                continue
            if len(images) > 1:
                raise InputError(f"{name} has several images, {' and '.join(images)}; keep one of them")
            image = sample.members[images[0]]
            if image.size > MOST_IMAGE_BYTES:
                raise InputError(
                    f"{name}.{images[0]} has {image.size} bytes, and images have at most {MOST_IMAGE_BYTES >> 20} MiB; "
                    "leave it out"
                )
            found.keys.append(sample.key)
            found.extensions.append(images[0])
            found.images.append(image)
            found.headers.append(read_header(partial(_open_member, path, image), f"{name}.{images[0]}"))
            found.captions.append(_caption(file, sample, name, column))
            found.classes.append(_class(file, sample, name))
    return found


def _text(file: BinaryIO, sample: Sample, extension: str, name: str) -> str:
    member = sample.members[extension]
    if member.size > MOST_TEXT_BYTES:
        raise InputError(f"{name}.{extension} has {member.size} bytes, at most {MOST_TEXT_BYTES} are read; shorten it")
    file.seek(member.offset)
    try:
        return file.read(member.size).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{name}.{extension} is not UTF-8 (byte {error.start}); save it as UTF-8") from None


def _caption(file: BinaryIO, sample: Sample, name: str, column: str | None) -> tuple[str, ...] | None:
    """Return the captions of a sample: those in JSON if a key is given or there is no text, otherwise the text."""
    if "txt" in sample.members and column is None:
        return check_captions(_text(file, sample, "txt", name).strip(), f"{name}.txt")
    if "json" not in sample.members:
        return None
    try:
        value = json.loads(_text(file, sample, "json", name))
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{name}.json is not JSON ({printable(first_line(error)[:200])}); correct it") from None
    if not isinstance(value, dict):
        raise InputError(f"{name}.json is of type {type(value).__name__}, not an object; correct it")
    key = next((key for key in (COLUMNS if column is None else (column,)) if value.get(key) is not None), None)
    return None if key is None else check_captions(value[key], f"{name}.json: {printable(key)}")


def _class(file: BinaryIO, sample: Sample, name: str) -> int | None:
    if "cls" not in sample.members:
        return None
    text = _text(file, sample, "cls", name).strip()
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise InputError(f"{name}.cls is {printable(text[:40])!r}; write the number of the class, such as 3")
    return int(text)


class WebDataset(EncodedDataset):
    """Images in tar files, decoded on access.

    Args:
        root: The tar files; see :func:`expand`.
        size: The side in pixels to which the centred square is resized; None requires images of the same side.
        channels: The number of channels, 1 or 3; None is 1 if every image is grey, otherwise 3.
        background: The colour behind transparent pixels.
        caption_column: The key of captions in `KEY.json`; None takes `KEY.txt`, or, in a sample without it, the key
            `text` or `caption` in `KEY.json`.

    Raises:
        InputError: No such file; a file that is not an uncompressed tar, damaged or truncated; links or several images
            of a sample in it; a sample that comes twice; captions or classes of some samples alone; images of different
            sides with `size` None. Later, on access: corrupt pixels.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        size: int | None = None,
        channels: int | None = None,
        background: str = "white",
        caption_column: str | None = None,
    ) -> None:
        given = os.fspath(root)
        name = shown(given) if is_url(given) else printable(given)
        colour = parse_colour(background)
        self.paths = expand(given)
        with allow_large(), ThreadPoolExecutor() as pool:
            found = list(pool.map(partial(_index, column=caption_column), self.paths))
        self._keys = [key for indexed in found for key in indexed.keys]
        self._extensions = [extension for indexed in found for extension in indexed.extensions]
        if not self._keys:
            raise InputError(f"{name}: no images in it; write them as KEY.jpg, KEY.png or KEY.webp")
        self._tars = np.repeat(np.arange(len(found)), [len(indexed.keys) for indexed in found])
        self._places = np.array([image for indexed in found for image in indexed.images], np.int64)
        if others := [other for indexed in found for other in indexed.others]:
            logger.warning(
                "%s: %d members or samples have no image and are passed over, such as %s",
                name,
                len(others),
                printable(others[0]),
            )
        headers = [header for indexed in found for header in indexed.headers]
        captions = self._captions(name, [texts for indexed in found for texts in indexed.captions], caption_column)
        labels, num_classes = self._labels(name, [label for indexed in found for label in indexed.classes])
        super().__init__(name, headers, size, channels, colour, self._word, num_classes, labels, captions)

    def _word(self, index: int) -> str:
        return f"{printable(self.paths[self._tars[index]])}: {printable(self._keys[index])}"

    def _complete(self, values: Sequence[Any], what: str, remedy: str) -> bool:
        """Return whether all samples have a value; refuses values of some alone."""
        missing = [index for index, value in enumerate(values) if value is None]
        if missing and len(missing) < len(values):
            raise InputError(
                f"{len(missing)} of {len(values)} samples have no {what}, first {self._word(missing[0])}: {remedy}"
            )
        return not missing

    def _captions(self, name: str, values: list[tuple[str, ...] | None], column: str | None) -> Captions | None:
        if not self._complete(values, "caption", "write KEY.txt for all of them, or leave them out"):
            if column is not None:
                key = printable(column)
                raise InputError(f"{name}: no KEY.json has {key}; set data.caption_column to a key that they have")
            return None
        captions = Captions(texts for texts in values if texts is not None)
        warn_of_empty(name, captions, self._word)
        return captions

    def _labels(self, name: str, values: list[int | None]) -> tuple[Tensor | None, int | None]:
        if not self._complete(values, "class", "write KEY.cls for all of them, or for none"):
            return None, None
        return check_labels(name, "sample", np.array(values, np.int64), None)

    def encoded(self, indices: Sequence[int]) -> list[tuple[Source, str]]:
        return [(partial(_open_member, *self._place(index)), self._word(index)) for index in map(int, indices)]

    def file_names(self) -> list[str]:
        """Return the name of each image in its tar, ``KEY.jpg``, with the extension in lower case."""
        return [
            f"{key.removeprefix('./')}.{extension}" for key, extension in zip(self._keys, self._extensions, strict=True)
        ]

    def _place(self, index: int) -> tuple[str, Member]:
        return self.paths[self._tars[index]], Member(*self._places[index].tolist())


@DATASETS.register("webdataset")
def webdataset(
    *,
    root: str | os.PathLike[str] | None = None,
    size: int | None,
    channels: int | None,
    split: str,
    background: Background = "white",
    caption_column: Text | None = None,
) -> WebDataset:
    """Load the tar files `root`, a path, a pattern such as `train-{000..099}.tar`, a folder or a URL; see `expand`."""
    if root is None:
        raise InputError("webdataset needs root, the path of tar files, such as 'train-{000..099}.tar'")
    if split != "train":
        raise InputError(f"webdataset has no split {split!r}; give the tar files of that split as root")
    return WebDataset(root, size, channels, background, caption_column)
