"""Encoded pictures: transparency, depth, Pillow's limit, damage."""

import hashlib
import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from robustdiff.data.decode import decode_image, parse_colour, read_header
from robustdiff.errors import InputError

GREEN = (0, 255, 0)


def decode(data, size=None, channels=3, background=GREEN):
    def source():
        return io.BytesIO(data)

    return decode_image(source, "mine", size or read_header(source, "mine").side, channels, background)


def encode(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def png(depth, colour, row, transparency, width=2):
    """A PNG of one row, its bytes as they are in the file."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, width, depth, colour, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress((b"\0" + row) * width))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"tRNS", transparency) + pixels + chunk(b"IEND", b"")


def tiff(bits, photometric, data, sample_format=1):
    """A TIFF of one pixel."""
    tags = [(256, 1), (257, 1), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1), (278, 1)]
    tags += [(279, len(data)), (339, sample_format)]
    data += b"\0" * (len(data) % 2)
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)


def hidden_and_shown(mode):
    """Two pixels of one colour, the first transparent."""
    image = Image.new("RGBA", (2, 2), (200, 200, 200, 255))
    image.paste((200, 200, 200, 0), (0, 0, 1, 2))
    if mode == "P":  # an alpha for each index
        image = Image.new("P", (2, 2), 1)
        image.putpalette([200] * 6)
        image.paste(0, (0, 0, 1, 2))
        return encode(image, transparency=bytes([0, 255]))
    if mode == "P index":
        image = Image.new("P", (2, 2), 1)
        image.putpalette([10] * 3 + [200] * 3)
        image.paste(0, (0, 0, 1, 2))
        return encode(image, transparency=0)
    if mode == "PA":
        alpha = image.getchannel("A")
        image = Image.new("P", (2, 2), 0)
        image.putpalette([200] * 3)
        image = image.convert("PA")
        image.putalpha(alpha)
        return encode(image, "TIFF")
    if mode == "GIF":
        image = Image.new("P", (2, 2), 1)
        image.putpalette([10, 20, 30, 200, 200, 200])
        image.paste(0, (0, 0, 1, 2))
        return encode(image, "GIF", transparency=0)
    if mode == "WEBP":
        return encode(image, "WEBP", lossless=True)
    return encode(image.convert(mode))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "P index", "PA", "GIF", "WEBP"])
def test_transparency_shows_the_background(mode):
    pixels = decode(hidden_and_shown(mode))
    assert pixels[0].tolist() == [list(GREEN), [200, 200, 200]]
    assert decode(hidden_and_shown(mode), channels=1, background=(9, 9, 9)).ravel().tolist() == [9, 200, 9, 200]


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        (png(1, 0, b"\x40", struct.pack(">H", 0)), 255),
        (png(2, 0, b"\x60", struct.pack(">H", 1)), 170),
        (png(4, 0, b"\x78", struct.pack(">H", 7)), 136),
        (png(8, 0, b"\x70\x71", struct.pack(">H", 0x70)), 0x71),
        (png(16, 0, struct.pack(">HH", 0x7001, 0x7002), struct.pack(">H", 0x7001)), 0x70),
        (png(8, 2, bytes([9, 8, 7, 9, 9, 9]), struct.pack(">HHH", 9, 8, 7)), 9),
    ],
    ids=["1 bit", "2 bits", "4 bits", "8 bits", "16 bits", "colour"],
)
def test_a_transparent_value_shows_the_background(data, shown):
    assert decode(data)[0].tolist() == [list(GREEN), [shown] * 3]


def test_a_transparent_colour_of_16_bits_is_refused():
    data = png(16, 2, bytes(12), bytes(6))
    with pytest.raises(InputError, match="mine: a transparent colour among colours of 16 bits"):
        decode(data)


def test_half_transparent_is_mixed():
    data = encode(Image.new("RGBA", (1, 1), (255, 0, 0, 51)))
    assert decode(data, background=(0, 0, 255)).ravel().tolist() == [51, 0, 204]


def test_hidden_colours_do_not_bleed_when_resized():
    image = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    image.paste((0, 0, 0, 255), (16, 16, 48, 48))
    pixels = decode(encode(image), size=12, background=(0, 0, 0))
    assert pixels.max() == 0


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (tiff(12, 1, b"\x80\x00"), 128),
        (tiff(16, 1, b"\x00\x80"), 128),
        (tiff(16, 0, b"\x00\x20"), 255 - 32),
        (tiff(8, 0, b"\x20"), 255 - 32),
        (encode(Image.fromarray(np.full((1, 1), 65535, np.uint16))), 255),
        (encode(Image.fromarray(np.full((1, 1), 0x1234, np.uint16)), "TIFF"), 0x12),
        (encode(Image.new("1", (1, 1), 1)), 255),
        (encode(Image.new("CMYK", (1, 1), (0, 0, 0, 55)), "TIFF"), 200),
    ],
)
def test_depths_are_scaled(data, value):
    assert decode(data, channels=1).ravel().tolist() == [value]


@pytest.mark.parametrize(
    ("data", "mode"),
    [
        (tiff(16, 1, struct.pack("<h", -5), 2), "I"),
        (tiff(32, 1, struct.pack("<I", 5)), "I"),
        (tiff(32, 1, struct.pack("<f", 0.5), 3), "F"),
        (encode(Image.new("LAB", (1, 1)), "TIFF"), "LAB"),
    ],
)
def test_pixels_without_a_range_are_refused_by_their_header(data, mode):
    with pytest.raises(InputError, match=f"mine: pixels of Pillow's mode {mode}, .*convert it to 8 or 16 bits"):
        read_header(lambda: io.BytesIO(data), "mine")


def test_the_limit_of_pixels(monkeypatch):
    data = encode(Image.new("L", (10, 10)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 49)
    with pytest.raises(
        InputError, match=r"mine: over Pillow's limit of pixels \(.*100 pixels.*98 pixels\); make it smaller"
    ):
        decode(data)


def test_large_pictures_below_the_limit_are_read_without_a_warning(monkeypatch, tmp_path):
    from robustdiff.data import load_dataset

    for k in range(4):
        Image.new("L", (10, 10)).save(tmp_path / f"{k}.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images, _ = load_dataset("imagefolder", root=tmp_path).__getitems__(range(4))[:2]
    assert images.shape == (4, 1, 10, 10)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP"])
@pytest.mark.filterwarnings("ignore")  # Pillow's own words on damaged metadata
def test_damage_is_one_line(format):
    generator = np.random.default_rng(0)
    whole = encode(Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)), format)
    refused = 0
    for _ in range(100):
        damaged = bytearray(whole)
        for position in generator.integers(0, len(whole), 4):
            damaged[position] = generator.integers(0, 256)
        try:
            decode(bytes(damaged[: generator.integers(1, len(whole) + 1)]), size=8)
        except InputError as error:
            refused += 1
            assert str(error).startswith("mine: ")
            assert str(error).isprintable()
    assert refused > 30


def test_a_video_behind_a_photo_is_no_scan_of_it():
    photo = encode(Image.new("RGB", (8, 8), (200, 100, 50)), "JPEG", progressive=True)
    thumbnail = b"\xff\xe1" + struct.pack(">H", 602) + b"\xff\xda" * 300
    with_video = photo[:2] + thumbnail + photo[2:] + b"ftypmp42" + b"\xff\xda" * 1000
    assert np.array_equal(decode(with_video), decode(photo))


@pytest.mark.parametrize(
    "tag",
    [
        struct.pack("<HHI4s", 282, 2, 3, b"72"),  # the resolution as text
        struct.pack("<HHII", 296, 5, 1, 38),  # its unit as a fraction
        struct.pack("<HHII", 271, 5, 1, 38),  # the maker as a fraction
    ],
    ids=["resolution", "unit", "maker"],
)
def test_a_rotated_photo_with_an_unusual_tag(tag):
    """Decode images with tags that Pillow reads and cannot write."""
    tags = [struct.pack("<HHII", 274, 3, 1, 6), tag]
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + b"".join(sorted(tags)) + bytes(4) + struct.pack("<II", 1, 3)
    photo = Image.fromarray(np.arange(0, 240, 20, dtype=np.uint8).reshape(3, 4))
    data = encode(photo, "WEBP", lossless=True, exif=exif)
    header = read_header(lambda: io.BytesIO(data), "mine")
    assert (header.height, header.width) == (4, 3)
    assert np.array_equal(decode(data, (4, 3), 1)[..., 0], np.rot90(np.asarray(photo), -1))


@pytest.mark.parametrize(("format", "whole"), [("BMP", True), ("TIFF", True), ("JPEG", False), ("PNG", False)])
def test_the_sample_of_an_uncompressed_file_is_of_all_its_pixels(format, whole):
    def sample(data):
        return read_header(lambda: io.BytesIO(data), "mine").sample

    data = encode(Image.fromarray(np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)), format)
    middle = len(data) // 2
    edited = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
    assert (sample(data) != sample(edited)) == whole
    expected = data if whole else data[:4096] + data[-4096:]
    assert sample(data) == hashlib.sha256(f"{len(data)}\n".encode() + expected).digest()


@pytest.mark.parametrize(
    ("text", "colour"), [("white", (255, 255, 255)), ("#808080", (128,) * 3), ("#00f", (0, 0, 255))]
)
def test_colours(text, colour):
    assert parse_colour(text) == colour


@pytest.mark.parametrize("text", ["", "whit", "#80808080", "808080", "transparent"])
def test_what_is_no_colour(text):
    with pytest.raises(InputError, match="is not an opaque colour; use one such as white"):
        parse_colour(text)
