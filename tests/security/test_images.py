"""Pictures from strangers: no other program is started for them, and a small file takes little time and memory."""

from __future__ import annotations

import io
import json
import os
import resource
import struct
import zlib
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pytest
from PIL import Image

from robustdiff.data import load_dataset
from robustdiff.data.decode import decode_image, open_image
from robustdiff.data.huggingface import HuggingFaceDataset
from robustdiff.errors import InputError

EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 8 8
%%EndComments
0 0 8 8 rectfill
%%EOF
"""
GREY = np.arange(64, dtype=np.uint8).reshape(8, 8)


def encoded(kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(GREY).convert("RGB").save(file, kind)
    return file.getvalue()


OTHERS = {
    "EPS": EPS,
    "EPS in DOS": b"\xc5\xd0\xd3\xc6" + struct.pack("<II", 30, len(EPS)) + bytes(18) + EPS,
    "PS": EPS.replace(b" EPSF-3.0", b""),
    "PDF": b"%PDF-1.4\n1 0 obj\n<<>>\nendobj\n",
    "FITS": b"SIMPLE  =                    T".ljust(80)
    + b"BITPIX  =                    8".ljust(80)
    + b"END".ljust(2720),
    "PSD": b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 8, 8, 8, 3) + bytes(400),
    "WMF": b"\xd7\xcd\xc6\x9a" + bytes(100),
    "EMF": b"\x01\0\0\0" + bytes(36) + b" EMF" + bytes(100),
    "FLI": bytes(4) + b"\x11\xaf" + bytes(200),
    "XPM": b'/* XPM */\nstatic char *a[] = {"1 1 1 1", "a c #000000", "a"};',
    **{kind: encoded(kind) for kind in ("DDS", "ICO", "IM", "PCX", "PPM", "SGI", "TGA")},
}


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return what appears if anything starts Ghostscript or another program that Pillow knows."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("gs", "gswin32c", "gswin64c", "convert", "latex", "dvipng"):
        (programs / name).write_text(f"#!/bin/sh\ntouch {tmp_path / 'ran'}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    return tmp_path / "ran"


def test_pillow_starts_ghostscript_where_it_is_not_restricted(mark):
    with pytest.raises(OSError):  # noqa: PT011  (the fake writes no picture)
        Image.open(io.BytesIO(EPS)).load()
    assert mark.exists()


@pytest.mark.parametrize("kind", OTHERS)
def test_other_formats_are_not_opened(tmp_path, mark, kind):
    (tmp_path / "d").mkdir()
    path = tmp_path / "d/a.png"
    path.write_bytes(OTHERS[kind])
    with pytest.raises(InputError, match=r"a\.png: not an image that can be read as|a\.png: cannot be decoded"):
        load_dataset("imagefolder", root=tmp_path / "d")
    rows = {"image": [{"bytes": OTHERS[kind], "path": "a.png"}]}
    table = datasets.Dataset.from_dict(rows, features=datasets.Features({"image": datasets.Image()}))
    with pytest.raises(InputError, match="row 0"):
        HuggingFaceDataset("rows", table)
    with pytest.raises(Exception):  # noqa: B017, PT011  (a report's picture: the caller tells what it was)
        open_image(path)
    assert not mark.exists()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(*chunks: bytes, size: tuple[int, int] = (8, 8)) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, 8, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(9 * 8)))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + pixels + chunk(b"IEND", b"")


def tiff(width: int, height: int, bits: int, tags: list[tuple[int, int]]) -> bytes:
    """A TIFF file whose tags of several values all lie behind the directory, as zeros."""
    fields = [(256, 1, width), (257, 1, height), (258, 1, bits), (259, 1, 1), (262, 1, 1), (277, 1, 1)]
    fields += [(tag, count, 200) for tag, count in tags]
    entries = b"".join(struct.pack("<HHII", tag, 4, count, value) for tag, count, value in sorted(fields))
    return b"II*\0" + struct.pack("<IH", 8, len(fields)) + entries + bytes(4 + 4 * max(count for _, count in tags))


BOMB = zlib.compress(bytes(2**27), 9)
GIF = b"GIF89a\2\0\2\0\x80\0\0\0\0\0\xff\xff\xff"
FRAME = b"\x2c\0\0\0\0\2\0\2\0\0\2\3\x44\2\5\0"


@pytest.mark.parametrize(
    "data",
    [
        png(chunk(b"zTXt", b"a\0\0" + BOMB)),
        png(chunk(b"iTXt", b"a\0\1\0\0\0" + BOMB)),
        png(chunk(b"iCCP", b"a\0\0" + BOMB)),
        png(chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**6))) * 100),
        png(chunk(b"abCd", b"") * 20_000),
        png(size=(60_000, 60_000)),
        png(size=(1, 170_000_000)),
        png(size=(2**31 - 1, 1)),
        tiff(8, 300_000, 8, [(273, 300_000), (279, 300_000)]),
        tiff(3000, 3000, 8, [(322, 1), (323, 1), (324, 300_000), (325, 300_000)]),
        tiff(8, 8, 8, [(273, 1), (279, 1), (65000, 2**28)]),
        tiff(100_000, 100_000, 1, [(273, 1), (279, 1)]),
        tiff(13_000, 13_000, 1, [(273, 1), (279, 1)]),
        b"BM" + struct.pack("<IHHI", 100, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, 13000, -13000, 1, 24, *[0] * 6),
        encoded("JPEG")[:-2] + b"\xff\xda\0\x08\1\1\0\0\x3f\0\0" * 1000 + b"\xff\xd9",
    ],
)
def test_small_files_that_grow_are_one_line(data):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError) as caught:
        decode_image(lambda: io.BytesIO(data), "bomb", 8, 1, (0, 0, 0))
    assert str(caught.value).startswith("bomb: ")
    assert "\n" not in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000


@pytest.mark.parametrize("data", [GIF + FRAME * 10**5 + b";", png(chunk(b"tEXt", b"a\0" + b"b" * 10**6))])
def test_only_the_first_frame_is_read(data):
    assert decode_image(lambda: io.BytesIO(data), "film", 2, 1, (0, 0, 0)).shape == (2, 2, 1)


def test_large_pictures_are_composed_in_strips():
    pixels = np.random.default_rng(0).integers(0, 256, (600, 600, 4), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    canvas = Image.new("RGBA", (600, 600), (9, 8, 7, 255))
    expected = np.asarray(Image.alpha_composite(canvas, Image.fromarray(pixels)).convert("RGB"))
    got = decode_image(lambda: io.BytesIO(file.getvalue()), "a", 600, 3, (9, 8, 7))
    assert np.array_equal(got, expected)


# ------------------------------------------------------------------------------------------------ rows


def save_rows(folder: Path, path: str) -> None:
    """Save a table without embedding the file that it names, as a stranger would."""
    features = datasets.Features({"image": datasets.Image()})
    table = datasets.Dataset.from_dict({"image": [{"bytes": None, "path": path}]}, features=features).data.table
    folder.mkdir(parents=True)
    with pyarrow.ipc.new_stream(str(folder / "data.arrow"), table.schema) as writer:
        writer.write_table(table)
    state = {"_data_files": [{"filename": "data.arrow"}], "_fingerprint": "0", "_format_columns": None}
    state |= {"_format_kwargs": {}, "_format_type": None, "_output_all_columns": False, "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text(json.dumps({"features": {"image": {"_type": "Image"}}}))


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/etc/passwd", "outside the folder"),
        ("../secret.png", "outside the folder"),
        ("link/secret.png", "outside the folder"),
        ("http://127.0.0.1:9/a.png", "not fetched"),
        ("hf://datasets/a/b/c.png", "not fetched"),
        ("zip://a.png::http://127.0.0.1:9/a.zip", "not fetched"),
        ("file:///etc/passwd", "not fetched"),
        ("a\0b", "not fetched"),
        ("pipe", "cannot be read"),
    ],
)
def test_rows_stay_inside_their_dataset(tmp_path, path, words):
    (tmp_path / "secret.png").write_bytes(encoded("PNG"))
    save_rows(tmp_path / "set", path)
    (tmp_path / "set/link").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "set/pipe")
    with pytest.raises(InputError) as caught:
        load_dataset(f"hf:{tmp_path / 'set'}")
    assert "row 0" in str(caught.value)
    assert words in str(caught.value)
    assert "\0" not in str(caught.value)


def test_rows_may_name_files_in_the_folder(tmp_path):
    save_rows(tmp_path / "set", "own.png")
    (tmp_path / "set/own.png").write_bytes(encoded("PNG"))
    assert len(load_dataset(f"hf:{tmp_path / 'set'}")) == 1


@pytest.mark.parametrize(
    "files",
    [
        "https://127.0.0.1:9/evil.csv",
        "/etc/*",
        "../*.png",
        r"..\*.png",
        r"\\host\x",
        "~/x",
        "hf://datasets/a/b/c.parquet",
    ],
)
@pytest.mark.parametrize("card", ["README.md", ".huggingface.yaml"])
def test_a_card_does_not_lead_out_of_the_folder(tmp_path, files, card):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/a.png").write_bytes(encoded("PNG"))
    text = f"configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: '{files}'\n"
    (tmp_path / "set" / card).write_text(f"---\n{text}---\nA set.\n" if card.endswith("md") else text)
    with pytest.raises(InputError, match="names data outside the folder"):
        load_dataset(f"hf:{tmp_path / 'set'}")


@pytest.mark.parametrize("name", ["pandas", "pickle", "json", "csv", "text", "imagefolder", "hf://datasets/pandas"])
def test_readers_of_datasets_are_no_datasets(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.pkl").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(InputError):
        load_dataset(f"hf:{name}")
    assert not (tmp_path / "ran").exists()
