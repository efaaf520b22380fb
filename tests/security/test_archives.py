"""Arrays from strangers: no header and no compression makes a small file fill the memory."""

from __future__ import annotations

import bz2
import gzip
import io
import os
import resource
import struct
import zipfile
import zlib

import numpy as np
import pytest

from robustdiff.data import load_dataset
from robustdiff.data.archive import read_npz
from robustdiff.data.idx import read_idx
from robustdiff.errors import InputError

IMAGES = np.random.default_rng(0).integers(0, 256, (4, 6, 6, 3), dtype=np.uint8)


def member(descr: object, shape: object, values: bytes = b"", fortran: object = False) -> bytes:
    header = f"{{'descr': {descr!r}, 'fortran_order': {fortran}, 'shape': {shape}}}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + values


def archive(path, data: bytes, compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("images.npy", data)


@pytest.mark.parametrize(
    "data",
    [
        member("|u1", (10**12, 2, 2, 1)),
        member("|u1", (2**62, 2**62, 2, 1)),
        member("|u1", (-1, 6, 6, 3), IMAGES.tobytes()),
        member("|u1", (1,) * 64),
        member("|u1", "(" * 5000),
        member("|u1", "10**12,"),
        member("|u1", "__import__('os').system('touch ran'),"),
        member("|O", (4, 6, 6, 3), b"cos\nsystem\n(S'touch ran'\ntR."),
        member([("a", "|u1")], (4, 6, 6, 3), IMAGES.tobytes()),
        member("|V1", (4, 6, 6, 3), IMAGES.tobytes()),
        member("<c8", (1, 1, 1, 1), bytes(8)),
        member("|S1", (4, 6, 6, 3), IMAGES.tobytes()),
        member("|u1", (4, 6, 6, 3), IMAGES.tobytes()[:-1]),
        member("|u1", (4, 6, 6, 3), IMAGES.tobytes() + b"\0"),
        member("|u1", (4, 6, 6, 3), IMAGES.tobytes(), fortran="2"),
        b"\x93NUMPY\x09\x00",
        b"",
    ],
)
def test_headers_are_not_believed(tmp_path, monkeypatch, data):
    monkeypatch.chdir(tmp_path)
    archive(tmp_path / "a.npz", data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError) as caught:
        load_dataset("npz", root=tmp_path / "a.npz")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_what_expands_a_thousand_times_is_refused(tmp_path, compression):
    size = 2**29
    header = member("|u1", (size, 1, 1, 1))
    with zipfile.ZipFile(tmp_path / "a.npz", "w", compression) as file, file.open("images.npy", "w") as images:
        images.write(header)
        for _ in range(8):  # the rest is only declared below
            images.write(bytes(2**16))
    data = (tmp_path / "a.npz").read_bytes()
    true, declared = len(header) + 8 * 2**16, len(header) + size
    (tmp_path / "a.npz").write_bytes(data.replace(struct.pack("<I", true), struct.pack("<I", declared)))
    with pytest.raises(InputError, match="expands"):
        load_dataset("npz", root=tmp_path / "a.npz")


def test_what_is_not_named_is_not_read(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as file:
        buffer = io.BytesIO()
        np.save(buffer, IMAGES)
        file.writestr("images.npy", buffer.getvalue())
        file.writestr("unused.npy", member("|u1", (10**12,)))
        file.writestr("evil.npy", member("|O", (1,), b"cos\nsystem\n(S'touch ran'\ntR."))
    assert len(load_dataset("npz", root=tmp_path / "a.npz")) == 4
    assert list(read_npz(tmp_path / "a.npz", ["nothing"])) == []


def test_orders_are_honoured(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.asfortranarray(IMAGES), labels=np.array([0, 1, 2, 1], ">i8"))
    dataset = load_dataset("npz", root=tmp_path / "a.npz")
    assert np.array_equal(dataset.__getitems__(range(4))[0].permute(0, 2, 3, 1).numpy(), IMAGES)
    assert dataset.labels.tolist() == [0, 1, 2, 1]


def idx(shape: tuple[int, ...], values: bytes = b"") -> bytes:
    return bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + values


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (idx((1,) * 100, b"\0"), "100 dimensions"),
        (idx((2**31, 2**31, 2**31, 0)), "is empty"),
        (idx((2**32 - 1,) * 8), "bytes of values"),
        (gzip.compress(idx((2**32 - 1,) * 4), mtime=0), "expand"),
        (gzip.compress(idx((3,), bytes(10**7)), mtime=0), "more than 3 bytes"),
        (gzip.compress(idx((10**8,), bytes(10)), mtime=0), "10 bytes of values"),
        (gzip.compress(idx((2, 2), b"1234"), mtime=0)[:-8], "cannot be read"),
        (gzip.compress(idx((2, 2), b"1234"), mtime=0) + b"junk", "cannot be read"),
        (b"\x1f\x8b\x08\x08" + b"a" * 10**5, "cannot be read"),
        (bz2.compress(idx((2, 2), b"1234")), "not an IDX file"),
        (zlib.compress(idx((2, 2), b"1234")), "not an IDX file"),
    ],
)
def test_idx_is_read_within_what_its_header_says(tmp_path, data, words):
    (tmp_path / "x").write_bytes(data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match=words) as caught:
        read_idx(tmp_path / "x")
    assert "\n" not in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


@pytest.mark.parametrize("load", [read_idx, lambda path: load_dataset("npz", root=path)])
def test_pipes_devices_and_impossible_names_are_no_files(tmp_path, load):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, "/dev/zero", "a\0b", "x" * 5000):
        with pytest.raises(InputError, match="no such file") as caught:
            load(path)
        assert "\n" not in str(caught.value)
        assert "\0" not in str(caught.value)
