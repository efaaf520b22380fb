"""Files that are either whole or absent."""

import os

import pytest
from safetensors import SafetensorError

from robustdiff.files import atomic_folder, atomic_write


def test_write_and_replace(tmp_path):
    path = tmp_path / "a.bin"
    for content in (b"one", b"two"):
        with atomic_write(path) as file:
            file.write(content)
            assert not path.exists() or path.read_bytes() == b"one"
        assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_what_was_there(tmp_path, error):
    path = tmp_path / "a.bin"
    path.write_bytes(b"one")

    def fail() -> None:
        with atomic_write(path) as file:
            file.write(b"tw")
            raise error

    with pytest.raises(error):
        fail()
    assert path.read_bytes() == b"one"
    assert list(tmp_path.iterdir()) == [path]


def test_permissions_follow_the_umask(tmp_path):
    old = os.umask(0o022)
    try:
        with atomic_write(str(tmp_path / "a.bin")) as file:
            file.write(b"x")
    finally:
        os.umask(old)
    assert (tmp_path / "a.bin").stat().st_mode & 0o777 == 0o644


def test_a_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "nowhere/a.bin"):
        pass


def fill(path, error=None):
    with atomic_folder(path, replace=True) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_text("new")
        if error is not None:
            raise error


def test_a_folder_appears_whole_and_replaces(tmp_path):
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old").write_text("old")
    fill(path)
    assert [p.name for p in path.rglob("*")] == ["sub", "a"]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("error", "raised"), [(KeyboardInterrupt(), KeyboardInterrupt), (SafetensorError("no space"), OSError)]
)
def test_a_folder_that_failed_leaves_the_old_one(tmp_path, error, raised):
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old").write_text("old")
    with pytest.raises(raised):
        fill(path, error)
    assert [p.name for p in path.rglob("*")] == ["old"]
    assert list(tmp_path.iterdir()) == [path]


def test_what_failed_where_nothing_was_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError):
        fill(tmp_path / "folder", RuntimeError())
    with pytest.raises(RuntimeError), atomic_write(tmp_path / "a.bin"):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failing", [1, 2])
def test_a_folder_that_cannot_be_renamed_leaves_the_old_one(tmp_path, monkeypatch, failing):
    """The old folder steps aside by the first rename; when the second fails it has to come back."""
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old").write_text("old")
    rename, calls = os.rename, []

    def fails(source, target):
        calls.append(source)
        if len(calls) == failing:
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fails)
    with pytest.raises(OSError, match="no"):
        fill(path)
    assert [p.name for p in path.rglob("*")] == ["old"]
    assert list(tmp_path.iterdir()) == [path]
