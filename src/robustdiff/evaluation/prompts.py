"""Prompts: the captions for which images are made, and with which they are compared.

They are the first captions of a dataset, which take turns in a fixed pseudo-random order, so that the first of them are
captions of all kinds of its images; or those of a file, which take turns in its order.

A file of prompts has one of two formats:

    NAME.txt     UTF-8, one prompt in each line
    NAME.json    captions as of COCO (Lin et al., ECCV 2014, arXiv 1405.0312),
                 {"images": [{"id": 9, "file_name": "9.jpg"}, …],
                  "annotations": [{"image_id": 9, "id": 1, "caption": "A red shoe."}, …]}

In the second, the first caption of each image is its prompt, in the order of the file, and ``images``, which may be
left out, names the real images.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from robustdiff.data import ImageDataset
from robustdiff.errors import InputError, printable
from robustdiff.files import open_regular, read_json
from robustdiff.loading import shown
from robustdiff.metrics.reservoir import fixed_order

__all__ = ["Prompts", "captions_of", "load_prompts", "prompts_of", "record_of"]

_BYTES = 2**28  # COCO's captions of 118,000 images have 92 MB


@dataclass(frozen=True)
class Prompts:
    """Prompts, of which image i has the one with the number i modulo their number.

    Attributes:
        source: The file, or the name of the dataset, that they are from.
        texts: The prompts.
        files: The prompt of each image file, or None for an image without one; empty if no files are named.
    """

    source: str
    texts: tuple[str, ...]
    files: Mapping[str, str | None] = field(default_factory=dict)

    @property
    def record(self) -> dict[str, Any]:
        """The source, the number and the sha256 of the prompts, as JSON values."""
        return {"source": self.source, **record_of(self.texts)}

    def of(self, dataset: ImageDataset) -> list[str]:
        """Return the caption of each image of a dataset: by the name of its file where files are named, else in turn.

        Images of a folder take turns in the order of their numbers if all their names are numbers, such as 2.png before
        10.png, folder by folder, and otherwise in that of their names.

        Raises:
            InputError: If files are named, and this folder has some of them and others.
        """
        paths = getattr(dataset, "paths", [])
        found = {path: self._caption_of(path) for path in paths if self.files}
        if not any(found.values()):
            turns: Sequence[int] = range(len(dataset))
            if paths and all(path.stem.isascii() and path.stem.isdigit() for path in paths):
                ordered = sorted(paths, key=lambda path: (path.parent, int(path.stem)))
                turn = {path: i for i, path in enumerate(ordered)}
                turns = [turn[path] for path in paths]
            return [self.texts[i % len(self.texts)] for i in turns]
        if without := [path for path, caption in found.items() if caption is None]:
            raise InputError(
                f"{printable(without[0])}: {self.source} has no caption of it, and has captions of others in its "
                "folder: remove it, or add its caption"
            )
        return [str(found[path]) for path in paths]

    def _caption_of(self, path: Path) -> str | None:
        """Return the caption of a file by its name, or by the end of its path where files have paths."""
        ends = ("/".join(path.parts[-k:]) for k in range(1, len(path.parts) + 1))
        return next((self.files[end] for end in ends if end in self.files), None)


def record_of(texts: Sequence[str]) -> dict[str, Any]:
    """Return the number and the sha256 of texts, as JSON values."""
    return {"n": len(texts), "sha256": hashlib.sha256(json.dumps(texts).encode()).hexdigest()}


def prompts_of(dataset: ImageDataset | None) -> Prompts | None:
    """Return the first caption of each image of a dataset as prompts, in a fixed order, or None without captions."""
    if dataset is None:
        return None
    captions = dataset.first_captions(fixed_order(len(dataset)).tolist())
    return None if captions is None else Prompts(dataset.name, tuple(captions))


def captions_of(dataset: ImageDataset | None) -> tuple[str, ...]:
    """Return the texts of :func:`prompts_of`, or none without captions."""
    prompts = prompts_of(dataset)
    return () if prompts is None else prompts.texts


def load_prompts(path: Path) -> Prompts:
    """Read the prompts in a file, by its suffix ``.txt`` or ``.json``, without white space around them.

    Raises:
        InputError: If the file is missing, has another suffix, or is malformed, or a prompt is empty.
    """
    name = printable(path)
    if path.suffix.lower() not in (".txt", ".json"):
        raise InputError(f"--prompts {name}: give a .txt with one prompt in each line, or captions of COCO as a .json")
    try:
        if path.suffix.lower() == ".json":
            return _coco(read_json(path, _BYTES), name)
        with open_regular(path) as file:
            contents = file.read(_BYTES + 1)
    except OSError as error:
        raise InputError(f"--prompts {name} cannot be read: {error.strerror}") from None
    if len(contents) > _BYTES:
        raise InputError(f"--prompts {name} has more than {_BYTES >> 20} MiB: give fewer prompts")
    lines = contents.removeprefix(b"\xef\xbb\xbf").removesuffix(b"\n").split(b"\n")
    if lines == [b""]:
        raise InputError(f"--prompts {name} is empty: write one prompt in each line")
    return Prompts(name, tuple(_line(line, f"{name}, line {i}") for i, line in enumerate(lines, 1)))


def _line(line: bytes, where: str) -> str:
    try:
        text = line.decode().strip()
    except UnicodeDecodeError:
        raise InputError(f"{where} is not UTF-8: write the file as UTF-8") from None
    if not text:
        raise InputError(f"{where} is empty: write a prompt in it, or remove it")
    return text


def _coco(value: Any, name: str) -> Prompts:
    """Return the prompts in captions of COCO."""
    if not isinstance(value, dict) or not isinstance(value.get("annotations"), list):
        raise InputError(
            f"{name} has no list of annotations, as captions of COCO have; or give a .txt, a prompt in each line"
        )
    files: dict[int | str, str] = {}  # by the id of the image
    taken: set[str] = set()
    for where, image in _entries(value, "images", name):
        key, file = _key(image, "id", where), image.get("file_name")
        if not isinstance(file, str) or not file:
            raise InputError(f"{where} has the file_name {shown(file)}, not the name of a file: correct it")
        if key in files or file in taken:
            raise InputError(f"{where} has an id or a file_name that another image has: remove one of them")
        files[key] = file
        taken.add(file)
    prompts: dict[int | str, str] = {}
    for where, annotation in _entries(value, "annotations", name):
        key, caption = _key(annotation, "image_id", where), annotation.get("caption")
        if files and key not in files:
            raise InputError(f"{where} is of the image {shown(key)}, which is not among the images: remove it")
        prompts.setdefault(key, _caption(caption, where))
    if not prompts:
        raise InputError(f"{name} has no annotations: give captions")
    return Prompts(name, tuple(prompts.values()), {file: prompts.get(key) for key, file in files.items()})


def _entries(value: dict[str, Any], field: str, name: str) -> list[tuple[str, dict[str, Any]]]:
    """Return the entries of a list, and the name of each in messages."""
    entries = value.get(field, [])
    if not isinstance(entries, list):
        raise InputError(f"{name}: {field} is {shown(entries)}, not a list: correct it")
    for i, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise InputError(f"{name}: {field}[{i}] is {shown(entry)}, not an object: correct it")
    return [(f"{name}: {field}[{i}]", entry) for i, entry in enumerate(entries)]


def _key(entry: dict[str, Any], field: str, where: str) -> int | str:
    key = entry.get(field)
    if isinstance(key, bool) or not isinstance(key, int | str):
        raise InputError(f"{where} has the {field} {shown(key)}, not a number: correct it")
    return key


def _caption(caption: Any, where: str) -> str:
    text = caption.strip() if isinstance(caption, str) else ""
    if not text:
        raise InputError(f"{where} has the caption {shown(caption)}, not a text: correct it, or remove it")
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        raise InputError(f"{where} has a caption that is not Unicode: correct it, or remove it") from None
    return text
