"""Captions of the images in a folder: metadata, text files, and what a stranger's files may hold."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from robustdiff.data import load_dataset
from robustdiff.data.captions import Captions, _place, check_captions
from robustdiff.errors import InputError


def images(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), "red").save(folder / name)
    return folder


def write(path: Path, *rows: Any) -> None:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


def captions(folder: Path, **options: Any) -> list[tuple[str, ...]]:
    dataset = load_dataset("imagefolder", root=folder, **options)
    return dataset.__getitems__(range(len(dataset))).captions


def row(name: str, text: Any) -> dict[str, Any]:
    return {"file_name": name, "text": text}


def test_captions_in_one_array() -> None:
    given = [("a", "", "ünï 🙂"), ("b",), ("",)]
    held = Captions(given)
    assert (list(held), len(held), held[0], held[2]) == (given, 3, given[0], given[2])
    with pytest.raises(IndexError):
        held[3]


# -- metadata --------------------------------------------------------------------------------------------------


def test_metadata_of_one_caption_and_of_several(tmp_path: Path) -> None:
    images(tmp_path, "b.png", "a.png", "in/c.png")
    write(tmp_path / "metadata.jsonl", row("b.png", "a blue shoe"), "", row("in/c.png", ["x", "y"]), row("a.png", ""))
    dataset = load_dataset("imagefolder", root=tmp_path)
    assert dataset.captioned
    assert dataset.num_classes is None  # captioned images may lie in sub-folders and beside them
    assert dataset.__getitems__([2, 1, 0]).captions == [("x", "y"), ("a blue shoe",), ("",)]


def test_metadata_in_sub_folders_names_files_from_there(tmp_path: Path) -> None:
    images(tmp_path, "cat/1.png", "dog/1.png")
    write(tmp_path / "cat/metadata.jsonl", row("1.png", "a cat"))
    write(tmp_path / "dog/metadata.jsonl", row("../dog/./1.png", "a dog"))
    assert captions(tmp_path) == [("a cat",), ("a dog",)]
    assert load_dataset("imagefolder", root=tmp_path).num_classes == 2


def test_a_table_of_commas(tmp_path: Path) -> None:
    images(tmp_path, "a.png", "b.png", "c.png")
    (tmp_path / "metadata.csv").write_bytes(
        '\ufefffile_name,text,size\r\na.png,"red, with\n a ""bow""",1\r\n\r\nb.png,bleu é,2\r\nc.png,,\r\n'.encode()
    )
    assert captions(tmp_path) == [('red, with\n a "bow"',), ("bleu é",), ("",)]


def test_the_column(tmp_path: Path) -> None:
    images(tmp_path, "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,caption,title\na.png,c,t\n")
    assert captions(tmp_path) == [("c",)]
    assert captions(tmp_path, caption_column="title") == [("t",)]
    (tmp_path / "metadata.csv").write_text("file_name,caption,text\na.png,c,t\n")
    assert captions(tmp_path) == [("t",)]
    with pytest.raises(InputError, match=r"has no x; set data.caption_column to a key it has"):
        captions(tmp_path, caption_column="x")
    (tmp_path / "metadata.csv").unlink()
    with pytest.raises(InputError, match=r"caption_column=x is for captions in metadata\.jsonl"):
        captions(tmp_path, caption_column="x")


def test_metadata_without_captions_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images(tmp_path, "a.png", "b.png")
    write(tmp_path / "metadata.jsonl", {"file_name": "a.png", "label": 3})
    assert captions(tmp_path) is None
    assert "1 file is passed over, such as metadata.jsonl" in caplog.text


A = row("a.png", "x")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([A], "1 of 2 images have no caption, first .*b.png: add it to .*metadata.jsonl"),
        ([A, row("a.png", "y")], "line 2 names a.png a second time"),
        ([A, row("./a.png", "y")], "line 2 names a.png a second time"),
        ([A, row("c.png", "y")], "line 2 names c.png, which is not among the images"),
        ([A, row("../a.png", "y")], r"line 2 names \.\./a\.png, outside the folder"),
        ([A, row("/etc/passwd", "y")], "line 2 names /etc/passwd, outside the folder"),
        ([A, row("..", "y")], r"line 2 names \.\., outside"),
        ([A, {"text": "y"}], "line 2 has no file_name"),
        ([A, row("", "y")], "line 2 has no file_name"),
        ([A, {"file_name": 3, "text": "y"}], "line 2 has no file_name"),
        ([A, {"file_name": "b.png"}], "line 2 has no text"),
        ([A, row("b.png", None)], "line 2: text is null; make it a string"),
        ([A, row("b.png", 3)], "line 2: text is int 3"),
        ([A, row("b.png", [])], r"line 2: text is list \[\]"),
        ([A, row("b.png", ["x", 3])], "line 2: text is list"),
        ([A, row("b.png", {"x": 1})], "line 2: text is dict"),
        ([A, row("b.png", "x" * 70_000)], "line 2: text has 70000 characters"),
        ([A, row("b.png", "\ud800")], "line 2: text has half of a surrogate pair"),
        ([A, "[1]"], "line 2 is not a JSON object .it is of type list"),
        ([A, "{"], "line 2 is not a JSON object"),
        ([A, '{"text": "x", "text": "y"}'], "a key twice"),
        ([A, "[" * 100_000], "line 2 is not a JSON object"),
        ([A, "1" * 100_000], "line 2 is not a JSON object"),
        ([A, " " * 2**20 + "x"], "line 2 has more than 1 MiB"),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, rows: list[Any], message: str) -> None:
    images(tmp_path, "a.png", "b.png")
    write(tmp_path / "metadata.jsonl", *rows)
    with pytest.raises(InputError, match=message) as caught:
        captions(tmp_path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"file_name,text\na.png,x\nb.png\n", "line 3: 1 fields under a header of 2"),
        (b"file_name,text,text\na.png,x,y\n", "names a column twice"),
        (b'file_name,text\na.png,"x\n', "unexpected end"),
        (b"file_name,text\na.png,x\xff\n", r"line 2 is not UTF-8"),
        (b"file_name,text\n,x\n", "line 2 has no file_name"),
        (b"file_name,text\na.png," + b"x" * 200_000 + b"\n", "field larger than field limit"),
    ],
)
def test_a_wrong_table_is_named(tmp_path: Path, data: bytes, message: str) -> None:
    images(tmp_path, "a.png")
    (tmp_path / "metadata.csv").write_bytes(data)
    with pytest.raises(InputError, match=message) as caught:
        captions(tmp_path)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    images(tmp_path, "a.png")
    (tmp_path / "metadata.jsonl").write_bytes(b'{"file_name": "a.png", "text": "\xe9"}\n')
    with pytest.raises(InputError, match=r"metadata\.jsonl: line 1 is not UTF-8"):
        captions(tmp_path)
    (tmp_path / "metadata.jsonl").unlink()
    os.mkfifo(tmp_path / "metadata.jsonl")  # opening it would wait for a writer
    with pytest.raises(InputError, match="not a regular file"):
        captions(tmp_path)


# -- text files ------------------------------------------------------------------------------------------------


def test_text_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images(tmp_path, "10_dog/a.png", "10_dog/b.jpg", "10_dog/c.v2.webp")
    for name, text in (("a.txt", " a dog, brown \n"), ("b.txt", "\ufeffein Hund\nzwei\n"), ("c.v2.txt", "\n\n")):
        (tmp_path / "10_dog" / name).write_text(text, encoding="utf-8")
    (tmp_path / "10_dog/notes.txt").write_text("of nothing")
    assert captions(tmp_path) == [("a dog, brown",), ("ein Hund",), ("",)]
    (longer, empty, others) = (record.getMessage() for record in caplog.records)
    assert "1 of 3 text files have more lines than the caption, such as" in longer
    assert "b.txt" in longer
    assert "1 of 3 images have an empty caption, such as" in empty
    assert "1 file is passed over, such as notes.txt" in others


def test_images_without_a_text_file_are_counted(tmp_path: Path) -> None:
    images(tmp_path, *(f"{k}.png" for k in range(5)))
    for k in (0, 2, 3):
        (tmp_path / f"{k}.txt").write_text("x")
    with pytest.raises(InputError, match=r"2 of 5 images have no caption, first .*/1\.png: put a \.txt beside each"):
        captions(tmp_path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"caf\xe9", "is not UTF-8"),
        ("a dog".encode("utf-16"), "is not UTF-8"),
        (b"x" * (2**20 + 1), "has more than 1 MiB"),
        (b"x" * (2**16 + 1), "has 65537 characters"),
    ],
)
def test_a_wrong_text_file_is_named(tmp_path: Path, data: bytes, message: str) -> None:
    images(tmp_path, "a.png")
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(InputError, match=rf"a\.txt {message}"):
        captions(tmp_path)


def test_two_kinds_of_captions_are_refused(tmp_path: Path) -> None:
    images(tmp_path, "a.png")
    (tmp_path / "a.txt").write_text("x")
    write(tmp_path / "metadata.jsonl", A)
    with pytest.raises(InputError, match=r"in metadata\.jsonl and in text files as well, such as .*a\.txt; keep one"):
        captions(tmp_path)
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,x\n")
    with pytest.raises(InputError, match=r"both metadata\.jsonl and metadata\.csv"):
        captions(tmp_path)


def test_another_caption_is_other_data(tmp_path: Path) -> None:
    images(tmp_path, "a.png")
    prints = set()
    for text in (None, "x", "y", ["x", "y"]):
        if text is not None:
            write(tmp_path / "metadata.jsonl", row("a.png", text))
        prints.add(load_dataset("imagefolder", root=tmp_path).fingerprint())
    assert len(prints) == 4


def test_a_caption_is_of_any_language(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    assert check_captions("狗 🐕", "x") == ("狗 🐕",)
    assert check_captions(["a", "b"], "x") == ("a", "b")


def test_names_of_files_may_be_written_as_the_system_does(monkeypatch):
    monkeypatch.setattr(os, "sep", "\\")
    assert _place(Path("images"), Path("images/sub/metadata.csv"), "deep\\a.png", "line 1") == "sub/deep/a.png"
