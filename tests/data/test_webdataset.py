"""Tar files of the WebDataset format."""

from __future__ import annotations

import gzip
import io
import json
import logging
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from robustdiff.data import load_dataset
from robustdiff.data.loader import load_batches
from robustdiff.data.webdataset import expand
from robustdiff.errors import InputError


def pixels(value: int, format: str = "PNG", size: tuple[int, int] = (8, 8)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (value, value, 0)).save(file, format)
    return file.getvalue()


def tar(path: Path, *members: tuple[str, bytes | str], **options: Any) -> Path:
    with tarfile.open(path, "w", **options) as archive:
        for name, data in members:
            data = data.encode() if isinstance(data, str) else data
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def load(root: Path | str, **options: Any) -> Any:
    return load_dataset("webdataset", root=root, **options)


def sample(key: str, value: int, caption: str | None = None) -> list[tuple[str, bytes | str]]:
    return [(f"{key}.png", pixels(value)), *([] if caption is None else [(f"{key}.txt", caption)])]


def test_images_captions_and_classes(tmp_path: Path) -> None:
    long = "d" * 150  # longer than a plain header's name
    for k, format in enumerate((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)):
        tar(
            tmp_path / f"train-{k:03d}.tar",
            (f"./{long}/a.jpg", pixels(10 + k, "JPEG", (20, 16))),
            (f"./{long}/a.txt", "a red\nshoe\n"),
            (f"./{long}/a.cls", "1\n"),
            ("b.seg.png", b"no image of ours"),
            ("b.WEBP", pixels(20 + k, "WEBP", (16, 16))),
            ("b.cls", "0"),
            ("b.json", json.dumps({"caption": "a blue shoe", "width": 16})),
            format=format,
        )
    dataset = load(tmp_path / "train-{000..001}.tar")
    assert (len(dataset), dataset.shape, dataset.num_classes) == (4, (3, 16, 16), 2)
    batch = dataset.__getitems__([3, 0, 2])
    assert np.allclose(batch.images[:, 0, 8, 8], [21, 10, 11], atol=3)
    assert batch.labels.tolist() == [0, 1, 1]
    assert batch.captions == [("a blue shoe",), ("a red\nshoe",), ("a red\nshoe",)]
    assert batch.geometry.tolist() == [[16, 16, 0, 0], [16, 20, 0, 2], [16, 20, 0, 2]]


def test_captions_in_json(tmp_path: Path) -> None:
    objects = [{"text": ["a", "b"], "caption": "c", "title": "t"}, {"text": "d", "title": None}]
    members = [m for k, o in enumerate(objects) for m in (*sample(str(k), k), (f"{k}.json", json.dumps(o)))]
    path = tar(tmp_path / "a.tar", *members)
    assert load(path).__getitems__([0, 1]).captions == [("a", "b"), ("d",)]
    with pytest.raises(InputError, match=r"1 of 2 samples have no caption, first .*a\.tar: 1: write KEY\.txt"):
        load(path, caption_column="title")
    with pytest.raises(InputError, match=r"no KEY\.json has x; set data\.caption_column"):
        load(path, caption_column="x")
    path = tar(tmp_path / "b.tar", *members[:2], ("0.txt", "of the text"))
    assert load(path)[0][0].shape == (3, 8, 8)
    assert list(load(path).captions) == [("of the text",)]
    assert list(load(path, caption_column="title").captions) == [("t",)]
    assert not load(tar(tmp_path / "c.tar", *sample("0", 1))).captioned


def test_the_fingerprint_is_of_the_images_and_captions(tmp_path: Path) -> None:
    one = load(tar(tmp_path / "a.tar", *sample("0", 1, "x"), *sample("1", 2, "y")))
    tar(tmp_path / "b0.tar", *sample("other", 1, "x"))
    tar(tmp_path / "b1.tar", *sample("other", 2, "y"))
    two, other = load(tmp_path / "b*.tar"), load(tar(tmp_path / "c.tar", *sample("0", 1, "x"), *sample("1", 2, "z")))
    assert one.fingerprint() == two.fingerprint() != other.fingerprint()
    assert one.fingerprint(captions=False) == other.fingerprint(captions=False)


def test_workers_read_the_same(tmp_path: Path) -> None:
    dataset = load(tar(tmp_path / "a.tar", *(m for k in range(6) for m in sample(f"{k:03d}", 10 * k, f"{k}"))))
    for workers in (0, 2):
        batches = list(load_batches(dataset, [[4, 0], [5, 5]], workers))
        assert [batch.images[:, 0, 0, 0].tolist() for batch in batches] == [[40, 0], [50, 50]]
        assert batches[0].captions == [("4",), ("0",)]
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[3][0], dataset[3][0])


def test_what_has_no_image_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    members = [("README", "x"), *sample("0", 1, ""), ("1.txt", "x"), (".hidden.png", b""), ("__meta__", "{}")]
    assert len(load(tar(tmp_path / "a.tar", *members))) == 1
    passed, empty = (record.getMessage() for record in caplog.records)
    assert "2 members or samples have no image and are passed over, such as README" in passed
    assert "1 of 1 images have an empty caption" in empty


# -- files -----------------------------------------------------------------------------------------------------


def test_patterns(tmp_path: Path) -> None:
    names = [f"train-{k:02d}.tar" for k in range(8, 12)] + ["val-0.tar", "odd[1].tar"]
    for name in names:
        tar(tmp_path / name, *sample("0", 1))

    def named(pattern: str) -> list[str]:
        return [Path(path).name for path in expand(str(tmp_path / pattern))]

    assert named("train-{08..11}.tar") == names[:4]
    assert named("train-{11..09}.tar") == names[3:0:-1]
    assert named("train-*.tar") == names[:4]
    assert named("{val-0,train-1*}.tar") == ["val-0.tar", "train-10.tar", "train-11.tar"]
    assert named("train-0{8,9}.tar") == names[:2]
    assert named("{train-08,train-*}.tar") == names[:4]
    assert named("odd[1].tar") == ["odd[1].tar"]
    assert named("") == sorted(names)


def test_braces_in_the_name_of_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "shards{a,b}"
    folder.mkdir()
    paths = [str(tar(folder / name, *sample("0", 1))) for name in ("x.tar", "{1..2}.tar")]
    assert expand(str(folder)) == paths
    assert expand(paths[1]) == paths[1:]


@pytest.mark.parametrize(
    ("root", "message"),
    [
        ("{folder}/train-{00..09}.tar", r"train-01\.tar: no such file"),
        ("{folder}/x-*.tar", "no such file"),
        ("{folder}/{0..99999}{0..99999}.tar", "more than 100000 files"),
        ("{folder}/{0..999999999999}.tar", "more than 100000 files"),
        ("pipe:cat {folder}/train-00.tar", "is a command, and none is run"),
        ("pipe:curl -L https://host/{000..009}.tar", "give the URL alone"),
        ("https://host/*.tar", r"does not list its files; name them as in train-\{000\.\.099\}\.tar"),
        ("s3://key:secret@bucket/a.tar?token=1", r"^s3://bucket/a\.tar: files are fetched from https://"),
        ("file:///etc/a.tar", "files are fetched from https://"),
        ("hf://datasets/a.tar", "write it as hf://datasets/OWNER/NAME/PATH"),
        ("{folder}/a.tar::{folder}/b.tar", "is no path and no URL"),
    ],
)
def test_a_root_that_names_no_files_is_one_line(tmp_path: Path, root: str, message: str) -> None:
    tar(tmp_path / "train-00.tar", *sample("0", 1))
    with pytest.raises(InputError, match=message) as caught:
        load(root.replace("{folder}", str(tmp_path)))
    assert "\n" not in str(caught.value)


def test_no_root() -> None:
    with pytest.raises(InputError, match="webdataset needs root"):
        load_dataset("webdataset")
    with pytest.raises(InputError, match="no split 'test'"):
        load_dataset("webdataset", root="x", split="test")


# -- a stranger's tar ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([*sample("0", 1), *sample("0", 2)], r"0\.png comes twice"),
        ([*sample("0", 1), *sample("1", 2), *sample("0", 3)], "sample 0 comes twice"),
        ([*sample("0", 1), ("0.jpg", b"x")], "0 has several images, png and jpg"),
        ([("0.png", b"no image")], r"a\.tar: 0\.png: not an image"),
        ([("0.txt", "x")], "no images in it"),
        ([], "no images in it"),
        ([*sample("0", 1, "x"), *sample("1", 1)], r"1 of 2 samples have no caption, first .*a\.tar: 1"),
        ([*sample("0", 1), ("0.cls", "2"), *sample("1", 1)], "1 of 2 samples have no class"),
        ([*sample("0", 1), ("0.cls", "dog")], r"0\.cls is 'dog'; write the number"),
        ([*sample("0", 1), ("0.cls", "9" * 30)], r"0\.cls is '9+'; write the number"),
        ([*sample("0", 1), ("0.cls", "99999999")], "the label of sample 0 is 99999999"),
        ([*sample("0", 1), ("0.json", "{")], r"0\.json is not JSON"),
        ([*sample("0", 1), ("0.json", "[" * 100_000)], r"0\.json is not JSON"),
        ([*sample("0", 1), ("0.json", "[]")], r"0\.json is of type list"),
        ([*sample("0", 1), ("0.json", '{"text": 3}')], r"0\.json: text is int 3"),
        ([*sample("0", 1), ("0.txt", b"\xff")], r"0\.txt is not UTF-8"),
        ([*sample("0", 1), ("0.txt", "x" * (2**20 + 1))], r"0\.txt has 1048577 bytes"),
        ([*sample("0", 1), ("1.png", pixels(1, size=(9, 9)))], "images differ in size"),
        ([*sample("a\n\x1b[0m\udcff", 1), *sample("a\n\x1b[0m\udcff", 1)], r"a\\n\\x1b\[0m\\xff\.png comes twice"),
    ],
)
def test_wrong_members_are_named(tmp_path: Path, members: list[Any], message: str) -> None:
    path = tar(tmp_path / "a.tar", *members, encoding="utf-8", errors="surrogateescape", format=tarfile.GNU_FORMAT)
    with pytest.raises(InputError, match=message) as caught:
        load(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        member = tarfile.TarInfo("0.png")
        member.type, member.linkname = kind, "/etc/passwd"
        archive.addfile(member)
    with pytest.raises(InputError, match=r"a\.tar: 0\.png is (a link|no plain file); write the tar again"):
        load(path)


def test_a_huge_image_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    header = tarfile.TarInfo("0.png")
    header.size = 2**28 + 512
    with path.open("wb") as file:
        file.write(header.tobuf())
        file.truncate(512 + header.size + 1024)
    with pytest.raises(InputError, match=r"0\.png has 268435968 bytes, and images have at most 256 MiB"):
        load(path)


def whole(tmp_path: Path) -> bytes:
    path = tar(
        tmp_path / "whole.tar", *(m for k in range(3) for m in sample(str(k), k, "x")), format=tarfile.GNU_FORMAT
    )
    return path.read_bytes().rstrip(b"\0") + bytes(512 * 3)


@pytest.mark.parametrize("keep", [100, 512, 600, 1024, 2000, 2048, 2560, 3072])
def test_a_truncated_tar_is_refused(tmp_path: Path, keep: int) -> None:
    data = whole(tmp_path)
    (tmp_path / "a.tar").write_bytes(data[:keep])
    with pytest.raises(InputError, match=r"a\.tar: not a whole tar file") as caught:
        load(tmp_path / "a.tar")
    assert "\n" not in str(caught.value)


def test_damaged_headers_are_refused(tmp_path: Path) -> None:
    data = whole(tmp_path)
    for start in (0, 1024, 2048, 3072):
        for place, bytes_ in ((124, b"\xff" * 12), (124, b"77777777777\0"), (148, b"0000000\0"), (0, bytes(512))):
            broken = bytearray(data)
            broken[start + place : start + place + len(bytes_)] = bytes_
            if place == 124:  # with a checksum that fits
                header = bytes(broken[start : start + 148]) + b" " * 8 + bytes(broken[start + 156 : start + 512])
                broken[start + 148 : start + 156] = b"%06o\0 " % sum(header)
            (tmp_path / "a.tar").write_bytes(broken)
            with pytest.raises(InputError, match=r"a\.tar: not a whole tar file|no images in it"):
                load(tmp_path / "a.tar")


def test_what_follows_the_end_is_not_passed_over(tmp_path: Path) -> None:
    data = whole(tmp_path)
    (tmp_path / "a.tar").write_bytes(data + data)  # cat a.tar b.tar
    with pytest.raises(InputError, match="no header and no end at byte"):
        load(tmp_path / "a.tar")


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(gzip.compress(whole(tmp_path)))
    with pytest.raises(InputError, match=r"is compressed.*decompress it"):
        load(tmp_path / "a.tar")
    (tmp_path / "a.tar").write_bytes(b"hello, world" * 100)
    with pytest.raises(InputError, match="not a whole tar file"):
        load(tmp_path / "a.tar")
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 2**30
    (tmp_path / "a.tar").write_bytes(header.tobuf() + bytes(2**16))
    with pytest.raises(InputError, match="a header of 1073741824 bytes"):
        load(tmp_path / "a.tar")


def test_a_tar_that_goes_away_or_is_cut_is_named_on_access(tmp_path: Path) -> None:
    path = tar(tmp_path / "a.tar", *sample("0", 1))
    dataset = load(path)
    path.write_bytes(path.read_bytes()[:530])
    with pytest.raises(InputError, match=r"a\.tar: 0: (not an image|cannot be decoded)"):
        dataset[0]
    path.unlink()
    with pytest.raises(InputError, match=r"a\.tar: 0: cannot be read \(No such file"):
        dataset[0]


def test_file_names(tmp_path: Path) -> None:
    tar(tmp_path / "a.tar", ("./x/a.JPG", pixels(1, "JPEG")), ("b.c.txt", "seen"), *sample("b", 2))
    assert load(tmp_path / "a.tar").file_names() == ["x/a.jpg", "b.png"]
