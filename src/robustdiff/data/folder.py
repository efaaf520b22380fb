"""Image files in a folder, decoded on access.

    root/a.png, root/b.jpg, …          no labels
    root/CLASS/…/a.png, …              the label is the rank of CLASS among the sorted sub-folder names

Captions are in metadata.jsonl, metadata.csv or in a text file beside each image (:mod:`robustdiff.data.captions`).
All headers are read when the folder is loaded, so that a file that is not an image raises an error at once, with its
name.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from robustdiff.data.captions import read_captions
from robustdiff.data.decode import (
    Background,
    Header,
    Source,
    allow_large,
    file_source,
    parse_colour,
    read_header,
)
from robustdiff.data.encoded import EncodedDataset
from robustdiff.data.registry import DATASETS
from robustdiff.errors import InputError, printable
from robustdiff.section import Text

__all__ = ["FolderDataset", "imagefolder"]

logger = logging.getLogger(__name__)

SUFFIXES = (".apng", ".bmp", ".dib", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")

Identity = tuple[int, int]


def _identity(path: Path) -> Identity:
    status = path.stat()
    return status.st_dev, status.st_ino


def _above(folder: Path) -> frozenset[Identity]:
    """Return the folder and its ancestors, with links resolved: a link to one of them is a cycle."""
    real = folder.resolve()
    return frozenset(_identity(path) for path in (real, *real.parents))


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _files(root: Path) -> Iterator[tuple[Path, bool]]:
    """Yield all files below a folder except hidden ones, following links, and whether each is a regular file.

    Raises:
        InputError: A folder that cannot be read, a broken link, or a link to one of its own ancestors.
    """
    stack = [(root, _above(root))]
    while stack:
        folder, above = stack.pop()
        try:
            with os.scandir(folder) as entries:
                names = [entry.name for entry in entries if not _hidden(entry.name)]
        except OSError as error:
            raise InputError(
                f"{printable(folder)}: cannot be read ({error.strerror}); make it readable or remove it"
            ) from error
        for path in (folder / name for name in names):
            try:
                status = path.stat()
            except OSError as error:
                raise InputError(
                    f"{printable(path)}: cannot be followed ({error.strerror}); repair the link or remove it"
                ) from error
            if not stat.S_ISDIR(status.st_mode):
                yield path, stat.S_ISREG(status.st_mode)
                continue
            if (status.st_dev, status.st_ino) in above:
                raise InputError(f"{printable(path)}: a link to a folder that it lies in, which has no end; remove it")
            inside = _above(path) if path.is_symlink() else frozenset({(status.st_dev, status.st_ino)})
            stack.append((path, above | inside))


def _report_others(name: str, others: list[Path]) -> None:
    """Log the number of files that are skipped."""
    if others:
        is_one = len(others) == 1
        logger.warning(
            "%s: %d %s passed over, such as %s: images are regular files that end in %s",
            name,
            len(others),
            "file is" if is_one else "files are",
            printable(min(others).name),
            ", ".join(SUFFIXES),
        )


def _header(path: Path) -> Header:
    return read_header(file_source(path), printable(path))


class FolderDataset(EncodedDataset):
    """Image files, opened on access.

    Files and folders named `__MACOSX` or with a leading dot are skipped, and links are followed. Other files that are
    not images are counted in the log.

    Args:
        root: The folder, searched recursively for BMP, GIF, JPEG, PNG, TIFF and WebP files.
        size: The side in pixels to which the centred square is resized; None requires images of the same side.
        channels: The number of channels, 1 or 3; None is 1 if every image is grey, otherwise 3.
        background: The colour behind transparent pixels.
        caption_column: The key of captions in metadata.jsonl or metadata.csv: a string, or in JSON also a list of
            strings for several captions of an image. None is `text`, or `caption` if there is no `text`.

    Attributes:
        paths: The image files, sorted.
        classes: The names of the sub-folders, sorted; empty without sub-folders.

    Raises:
        InputError: No such folder, no images in it, a file that is not an image, images of different sides with
            `size` None, a class folder without images, images without captions both in sub-folders and beside
            them, a cycle of links, captions of some images alone, or a malformed file of captions. Later, on access:
            corrupt pixels.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        size: int | None = None,
        channels: int | None = None,
        background: str = "white",
        caption_column: str | None = None,
    ) -> None:
        folder, name = Path(root), printable(root)
        colour = parse_colour(background)
        if not folder.is_dir():
            raise InputError(f"{name}: no such folder; give a folder of images as root")
        images: list[Path] = []
        others: list[Path] = []
        for path, regular in _files(folder):
            (images if regular and path.suffix.lower() in SUFFIXES else others).append(path)
        # The order of a directory listing differs between machines; with a seed, the batches must not.
        self.paths = sorted(images, key=lambda path: path.parts)  # paths of Windows are compared without case
        if not self.paths:
            raise InputError(f"{name}: no images in it; put files in it that end in {', '.join(SUFFIXES)}")
        captions, read = read_captions(folder, self.paths, others, caption_column)
        _report_others(name, [path for path in others if path not in read])
        self.classes = sorted({p.relative_to(folder).parts[0] for p in self.paths if p.parent != folder})
        if captions is not None and any(p.parent == folder for p in self.paths):
            self.classes = []  # captioned images may be anywhere
        else:
            self._check_classes(folder)
        with allow_large(), ThreadPoolExecutor() as pool:
            headers = list(pool.map(_header, self.paths))
        self._folder = folder
        rank = {name: k for k, name in enumerate(self.classes)}
        labels = torch.tensor([rank[p.relative_to(folder).parts[0]] for p in self.paths]) if rank else None
        labelled = len(rank) or None, labels, captions
        super().__init__(name, headers, size, channels, colour, lambda k: printable(self.paths[k].name), *labelled)

    def _check_classes(self, folder: Path) -> None:
        """Check that all images are in class folders or none is, and that every class folder has images."""
        beside = [p for p in self.paths if p.parent == folder]
        if self.classes and beside:
            raise InputError(
                f"{printable(beside[0])}: lies beside class folders ({printable(self.classes[0])}, …); "
                f"move it into one or out of {printable(folder)}"
            )
        if not self.classes:
            return
        with os.scandir(folder) as entries:
            folders = sorted(e.name for e in entries if e.is_dir() and not _hidden(e.name))
        for name in folders:
            if name not in self.classes:
                raise InputError(
                    f"{printable(folder / name)}: a class folder without images; put images into it, or remove it"
                )

    def encoded(self, indices: Sequence[int]) -> list[tuple[Source, str]]:
        paths = [self.paths[int(index)] for index in indices]
        return [(file_source(path), printable(path)) for path in paths]

    def file_names(self) -> list[str]:
        """Return the path of each file in the folder, with "/" between folders."""
        return [path.relative_to(self._folder).as_posix() for path in self.paths]

    def prefix(self, index: int) -> bytes:
        """Return the path of a file in the folder, as bytes that end in 0."""
        return os.fsencode(self.paths[index].relative_to(self._folder).as_posix()) + b"\0"


@DATASETS.register("imagefolder")
def imagefolder(
    *,
    root: str | os.PathLike[str] | None = None,
    size: int | None,
    channels: int | None,
    split: str,
    background: Background = "white",
    caption_column: Text | None = None,
) -> FolderDataset:
    """Load the images under the folder `root`; see `FolderDataset`."""
    if root is None:
        raise InputError("imagefolder needs root, the folder of the images")
    if split != "train":
        raise InputError(f"imagefolder has no split {split!r}; give the folder of that split as root")
    return FolderDataset(root, size, channels, background, caption_column)
