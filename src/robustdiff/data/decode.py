"""Decoding of image files.

Pillow is restricted to six formats, because for others it may run external programs, such as Ghostscript for EPS files
of any name. Files that would take minutes or gigabytes to open are refused.

The first frame or page is read, its EXIF orientation is applied, and the largest crop of an aspect ratio is taken, by
default the centred square. Transparent pixels are composed on a background colour before resizing, so that their hidden
colours have no effect.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Annotated, Any, BinaryIO, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageColor, UnidentifiedImageError
from pydantic import BeforeValidator
from torch import Tensor

from robustdiff.data.pixels import Position, crop_box, resize_image
from robustdiff.errors import InputError, first_line, printable
from robustdiff.section import Text

__all__ = [
    "FORMATS",
    "Background",
    "Colour",
    "Header",
    "Source",
    "allow_large",
    "common_channels",
    "common_side",
    "decode_batch",
    "decode_image",
    "file_source",
    "open_image",
    "parse_colour",
    "read_header",
]

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")

Colour = tuple[int, int, int]


def _quoted(value: Any) -> Any:
    if value is None:  # in YAML, a # begins a comment
        raise ValueError("no colour: a code such as '#808080' needs quotes")
    return value


Background = Annotated[Text, BeforeValidator(_quoted)]
"""The type of a dataset's option for a colour: its name or its code."""
Source = Callable[[], BinaryIO]

GREY = ("1", "L", "LA", "La")
SIXTEEN_BITS = ("I;16", "I;16B", "I;16L", "I;16N")
MODES = (*GREY, *SIXTEEN_BITS, "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV")
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
TIFF_BYTES = (1, 2, 6, 7)  # types of tags that may have many values: profiles, thumbnails, text
# Pillow scales grey values of fewer than 8 bits, but not the transparent value among them.
PNG_SCALE = {"L;2": 85, "L;4": 17}
# In a JPEG file, FF and 0 are pixels, and 1 and D0 to D7 have no segment.
JPEG_SEGMENT = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]")
# Opening a pipe would block. Windows has no such flag, and reads text without the other one.
_READ = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
SAMPLE = 4096
UNCOMPRESSED = ("BMP", "TIFF")  # files whose length does not change with their pixels
ORIENTATION = 0x0112  # the EXIF tag
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = (5, 6, 7, 8)  # the orientations that exchange the height and the width
STRIP = 256

# Limits above which a file is refused, because decoding it may take excessive time or memory.
MOST_PIXELS_A_SIDE = 2**16
MOST_TIFF_VALUES = 2**18  # mostly strips or tiles
MOST_PNG_CHUNKS = 10_000  # not counting chunks of pixels and frames
MOST_JPEG_SCANS = 100


@dataclass(frozen=True, slots=True)
class Header:
    """The properties of an image that are known without decoding its pixels.

    Attributes:
        height: The height in pixels, after the EXIF orientation is applied.
        width: The width in pixels.
        grey: Whether the image has one channel.
        transparent: Whether some pixels may be transparent.
        sample: The sha256 of the length of the file in bytes, its first 4 KiB and its last 4 KiB; for BMP and TIFF, of
            its length and the whole file.
    """

    height: int
    width: int
    grey: bool
    transparent: bool
    sample: bytes

    @property
    def side(self) -> int:
        """The side of the centred square in pixels."""
        return min(self.height, self.width)


def parse_colour(text: str) -> Colour:
    """Return the red, green and blue, 0 to 255, of a colour such as `white` or `#808080`.

    Raises:
        InputError: Not an opaque colour.
    """
    try:
        red, green, blue, *alpha = ImageColor.getrgb(text)
    except ValueError:
        alpha = [0]
    if alpha not in ([], [255]):
        raise InputError(f"background {text!r} is not an opaque colour; use one such as white, black or '#808080'")
    return red, green, blue


def file_source(path: str | os.PathLike[str]) -> Source:
    """Return a function that opens a file; it raises OSError for a device or a pipe, which may be endless."""

    def opened() -> BinaryIO:
        descriptor = os.open(path, _READ)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise OSError(errno.EINVAL, "it is not a regular file", os.fspath(path))
        return os.fdopen(descriptor, "rb")

    return opened


def open_image(source: str | os.PathLike[str] | IO[bytes]) -> Image.Image:
    """Open an image of one of `FORMATS`, detected from its content; raises the errors of `PIL.Image.open`."""
    if isinstance(source, str | os.PathLike):
        with file_source(source)() as file:
            _check_structure(file)
    else:
        _check_structure(source)
    image = Image.open(source, formats=FORMATS)
    if max(image.size) > MOST_PIXELS_A_SIDE:
        raise ValueError(f"{image.width}×{image.height} pixels, more than {MOST_PIXELS_A_SIDE} a side")
    return image


def _check_structure(file: IO[bytes]) -> None:
    """Refuse files for which Pillow needs minutes or gigabytes to read the size in pixels."""
    head = file.read(16)
    if head[:8] == b"\x89PNG\r\n\x1a\n":
        _check_png(file)
    elif head[:4] in TIFF:
        _check_tiff(file, head)
    file.seek(0)


def _check_png(file: IO[bytes]) -> None:
    others = 0
    for kind in _png_chunks(file):
        others += kind not in (b"IDAT", b"fdAT", b"fcTL")
        if others > MOST_PNG_CHUNKS:
            raise ValueError(f"more than {MOST_PNG_CHUNKS} chunks beside its pixels")


def _png_chunks(file: IO[bytes]) -> Iterator[bytes]:
    position, end = 8, file.seek(0, os.SEEK_END)
    while position + 8 <= end:
        file.seek(position)
        head = file.read(8)
        yield head[4:]
        position += 12 + int.from_bytes(head[:4], "big")


def _check_tiff(file: IO[bytes], head: bytes) -> None:
    """Check the first directory of a TIFF or BigTIFF file."""
    order: Literal["little", "big"] = "little" if head[:2] == b"II" else "big"
    big = 43 in head[2:4]
    count_bytes, entry, value = (8, 20, 8) if big else (2, 12, 4)
    start = int.from_bytes(head[8:16] if big else head[4:8], order)
    file.seek(min(start, file.seek(0, os.SEEK_END)))
    entries = int.from_bytes(file.read(count_bytes), order)
    for _ in range(min(entries, 2**16)):
        field = file.read(entry)
        kind, count = int.from_bytes(field[2:4], order), int.from_bytes(field[4 : 4 + value], order)
        if kind not in TIFF_BYTES and count > MOST_TIFF_VALUES:
            raise ValueError(
                f"{count} values in its TIFF tag {int.from_bytes(field[:2], order)}, such as strips or tiles"
            )


@contextmanager
def allow_large() -> Iterator[None]:
    """Silence Pillow's warning of images that are large but below its limit. This is not thread-safe."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


@contextmanager
def _reading(name: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        raise InputError(
            f"{name}: over Pillow's limit of pixels ({printable(first_line(error)).partition(',')[0]}); "
            "make it smaller or remove it"
        ) from error
    except UnidentifiedImageError as error:
        raise InputError(
            f"{name}: not an image that can be read as {', '.join(FORMATS[:-1])} or {FORMATS[-1]}; remove or replace it"
        ) from error
    except Exception as error:  # for damaged files, Pillow's decoders may raise almost any error
        if isinstance(error, OSError) and error.errno is not None:
            raise InputError(f"{name}: cannot be read ({error.strerror}); make it readable or remove it") from error
        raise InputError(
            f"{name}: cannot be decoded ({printable(first_line(error))}); remove it or replace it"
        ) from error


def _check(image: Image.Image, name: str) -> None:
    """Refuse images whose pixels have no fixed range."""
    if image.mode not in MODES and not (image.mode == "I" and image.format == "PNG"):
        raise InputError(
            f"{name}: pixels of Pillow's mode {image.mode}, which have no fixed range; convert it to 8 or 16 bits"
        )
    if image.mode == "RGB" and "transparency" in image.info and _raw_mode(image).startswith("RGB;16"):
        raise InputError(
            f"{name}: a transparent colour among colours of 16 bits; convert it to 8 bits or to an alpha channel"
        )


def _raw_mode(image: Image.Image) -> str:
    """Return Pillow's name for the layout of the pixels in the file; "" if they are already decoded."""
    tile = getattr(image, "tile", None)
    arguments = tile[0][3] if tile else ""
    return str(arguments[0] if isinstance(arguments, tuple) else arguments)


def _transparent(image: Image.Image) -> bool:
    palette = image.palette.mode if image.mode == "P" and image.palette is not None else ""
    return image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info or palette.endswith("A")


def read_header(source: Source, name: str) -> Header:
    """Read the properties of an image without decoding its pixels.

    Args:
        source: A function that opens the file.
        name: The name of the image in messages.

    Raises:
        InputError: No such file, not an image, too many pixels, or pixels without a fixed range.
    """
    with _reading(name), source() as file:
        image = open_image(file)
        _check(image, name)
        grey = image.mode in GREY or image.mode.startswith("I")
        length = file.seek(0, os.SEEK_END)
        digest = hashlib.sha256(f"{length}\n".encode())
        file.seek(0)
        digest.update(file.read(SAMPLE))
        if length > SAMPLE:
            file.seek(SAMPLE if image.format in UNCOMPRESSED else max(SAMPLE, length - SAMPLE))
            while block := file.read(2**20):
                digest.update(block)
        transparent = _transparent(image)
        width, height = image.size
        if _orientation(image, file) in SIDEWAYS:
            width, height = height, width
        return Header(height, width, grey, transparent, digest.digest())


def _orientation(image: Image.Image, file: BinaryIO) -> Any:
    """Return the EXIF orientation of an image as it is stored, of any type; None for none."""
    if image.format == "TIFF":  # Pillow applies it
        return None
    # For a PNG without EXIF data before its pixels, Pillow's own method decodes the pixels to look behind them.
    late = image.format == "PNG" and _has_late_metadata(file)
    return (image.getexif() if late else Image.Image.getexif(image)).get(ORIENTATION)


def _has_late_metadata(file: BinaryIO) -> bool:
    pixels = False
    for kind in _png_chunks(file):
        if pixels and kind in (b"eXIf", b"iTXt", b"tEXt", b"zTXt"):
            return True
        pixels = pixels or kind == b"IDAT"
    return False


def common_side(name: str, headers: Sequence[Header], word: Callable[[int], str]) -> int:
    """Return the side of images of one size.

    Args:
        name: The name of the dataset in messages.
        headers: The properties of the images.
        word: A function that returns the name of an image in messages, from its index.

    Raises:
        InputError: The images differ in size.
    """
    size = headers[0].side
    for k, header in enumerate(headers):
        if header.side != size:
            raise InputError(
                f"{name}: images differ in size ({word(0)}: {size}, {word(k)}: {header.side} pixels); "
                "give images of one size; data.size=PIXELS resizes those of a recipe or of --data"
            )
    return size


def common_channels(headers: Iterable[Header], background: Colour) -> int:
    """Return 1 if all images are grey, including the background of transparent ones, and otherwise 3."""
    grey_background = len(set(background)) == 1
    return 1 if all(h.grey and (grey_background or not h.transparent) for h in headers) else 3


def decode_image(
    source: Source,
    name: str,
    size: int | tuple[int, int],
    channels: int,
    background: Colour,
    position: Position | None = None,
) -> NDArray[np.uint8]:
    """Decode an image, apply its orientation, crop it, compose it on the background, resize and convert it.

    Args:
        source: A function that opens the file.
        name: The name of the image in messages.
        size: The side of the result in pixels, or its height and width.
        channels: The number of channels: 1 (luma) or 3 (RGB).
        background: The colour behind transparent pixels.
        position: The place of the crop; None is the centre.

    Returns:
        uint8 (height, width, channels).

    Raises:
        InputError: No such file, not an image, damaged, too many pixels, or pixels without a fixed range.
    """
    height, width = (size, size) if isinstance(size, int) else size
    with _reading(name), source() as file:
        image = open_image(file)
        _check(image, name)
        if image.format == "JPEG":
            _check_scans(file)
        return resize_image(_flatten(image, file, background, (height, width), position), height, width, channels)


def decode_batch(
    files: Sequence[tuple[Source, str]],
    shape: tuple[int, int, int],
    background: Colour,
    positions: Sequence[Position] | None = None,
) -> Tensor:
    """Decode images as :func:`decode_image`, from their sources and names, to uint8 (B, C, H, W)."""
    channels, size = shape[0], shape[1:]
    images = np.empty((len(files), *shape), np.uint8)
    with allow_large():
        for k, (source, name) in enumerate(files):
            position = None if positions is None else positions[k]
            images[k] = decode_image(source, name, size, channels, background, position).transpose(2, 0, 1)
    return torch.from_numpy(images)


def _check_scans(file: BinaryIO) -> None:
    """Refuse a JPEG file with many scans, because each scan covers all pixels. Data after the image do not count."""
    start = file.tell()
    file.seek(0)
    data, place, scans = file.read(), 2, 0
    while (segment := JPEG_SEGMENT.search(data, place)) and segment[0] != b"\xff\xd9":
        scans += segment[0] == b"\xff\xda"
        if scans > MOST_JPEG_SCANS:
            raise ValueError(f"more than {MOST_JPEG_SCANS} scans")
        place = segment.end() + max(2, int.from_bytes(data[segment.end() : segment.end() + 2], "big"))
    file.seek(start)


def _flatten(
    image: Image.Image, file: BinaryIO, background: Colour, size: tuple[int, int], position: Position | None
) -> Image.Image:
    """Return the crop of an aspect ratio in 8 bits, without transparency: mode L or RGB."""
    key = image.info.get("transparency") if image.mode not in ("P", "PA") else None
    if isinstance(key, int):
        key *= PNG_SCALE.get(_raw_mode(image), 1)
    grey = image.mode in GREY or image.mode.startswith("I")
    transparent = _transparent(image)
    tags = getattr(image, "tag_v2", {})  # TIFF only
    bits, inverted = tags.get(258, (16,))[0], tags.get(262) == 0
    # ImageOps.exif_transpose writes the EXIF data again as well, and fails if a tag in it is of an unusual type.
    if (method := UPRIGHT.get(_orientation(image, file))) is not None:
        image = image.transpose(method)
    top, left, height, width = crop_box((image.height, image.width), size, position)
    if (width, height) != image.size:
        image = image.crop((left, top, left + width, top + height))
    if image.mode == "1":
        image = image.convert("L")
    pixels = np.asarray(image) if key is not None or image.mode.startswith("I") else None
    if pixels is not None and image.mode.startswith("I"):  # Pillow's own conversion clips at 255 instead of scaling
        high = pixels.astype(np.uint32) >> (bits - 8)
        image = Image.fromarray((255 - high if inverted else high).astype(np.uint8))
    if not transparent:
        return image.convert("L" if grey else "RGB")
    if pixels is not None:  # one value or colour is transparent
        hidden = (pixels == np.asarray(key)).reshape(*pixels.shape[:2], -1).all(-1)
        image = image.convert("RGB")
        image.putalpha(Image.fromarray(np.where(hidden, 0, 255).astype(np.uint8)))
    for premultiplied, straight in (("La", "LA"), ("RGBa", "RGBA")):
        if image.mode == premultiplied:
            image = image.convert(straight)
    result = Image.new("RGB", image.size)
    for top in range(0, image.height, STRIP):  # in strips, because a copy of a large image takes gigabytes
        strip = image.crop((0, top, image.width, min(top + STRIP, image.height))).convert("RGBA")
        canvas = Image.new("RGBA", strip.size, (*background, 255))
        result.paste(Image.alpha_composite(canvas, strip).convert("RGB"), (0, top))
    return result
