"""Files that are either whole or absent."""

import errno
import fcntl
import multiprocessing
import os
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors import SafetensorError

from robustdiff import files
from robustdiff.errors import InputError, RunError
from robustdiff.files import (
    MARKER,
    atomic_folder,
    atomic_write,
    claim_folder,
    held,
    open_regular,
    read_json,
    remove_leftovers,
    remove_unfinished,
    user_key,
)


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
    ("error", "raised"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), OSError),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"), RunError),
    ],
)
def test_a_folder_that_failed_leaves_the_old_one(tmp_path, error, raised):
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old").write_text("old")
    with pytest.raises(raised) as caught:
        fill(path, error)
    if raised is OSError:
        assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path)), "as the system says it"
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
    replace, calls = os.replace, []

    def fails(source, target):
        calls.append(source)
        if len(calls) == failing:
            raise OSError("no")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="no"):
        fill(path)
    assert [p.name for p in path.rglob("*")] == ["old"]
    assert list(tmp_path.iterdir()) == [path]


def test_an_end_between_the_renames_loses_no_folder(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    renamed, rename = [], os.replace

    def ended(source: Path, target: Path) -> None:
        remove_unfinished()
        renamed.append(source)
        rename(source, target)

    monkeypatch.setattr(os, "replace", ended)
    with atomic_folder(tmp_path / "a", replace=True) as folder:
        (folder / "new").touch()
    assert len(renamed) == 2
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["a", "a/new"]


def test_a_forked_process_leaves_what_its_parent_writes(tmp_path):
    with atomic_write(tmp_path / "a") as file:
        child = multiprocessing.get_context("fork").Process(target=remove_unfinished)
        child.start()
        child.join(60)
        file.write(b"whole")
    assert (tmp_path / "a").read_bytes() == b"whole"
    remove_unfinished()
    assert (tmp_path / "a").read_bytes() == b"whole"


def test_a_folder_that_is_not_to_be_replaced_stays(tmp_path):
    path = tmp_path / "folder"
    for make in (path.mkdir, path.touch, lambda: path.symlink_to(tmp_path)):
        make()
        with pytest.raises(InputError, match="folder exists already"), atomic_folder(path):
            pass
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    path.symlink_to(tmp_path)
    with pytest.raises(InputError, match="folder exists already"), atomic_folder(path, replace=True):
        pass
    assert list(tmp_path.iterdir()) == [path]


def test_an_empty_folder_is_claimed_once(tmp_path):
    path = tmp_path / "new" / "run"
    assert claim_folder(path, "a run") is False
    assert claim_folder(path, "a run") is False
    (path / "a").touch()
    assert claim_folder(path, "a run") is True
    with pytest.raises(InputError, match="holds a run, and not a study: give another folder"):
        claim_folder(path, "a study")
    (path / MARKER).unlink()
    with pytest.raises(InputError, match="is not empty, and nothing in it says that it is a run of robustdiff"):
        claim_folder(path, "a run")


def _claim(path: Path, barrier: Any, keys: Any) -> None:
    barrier.wait()
    claim_folder(path, "a cache")
    keys.put(user_key())


def test_processes_that_begin_at_once_have_the_same_folder_and_key(tmp_path, monkeypatch):
    context = multiprocessing.get_context("fork")
    for number in range(10):
        monkeypatch.setenv("ROBUSTDIFF_CACHE", str(tmp_path / f"cache{number}"))
        barrier, keys = context.Barrier(3), context.Queue()
        arguments = (tmp_path / f"claimed{number}", barrier, keys)
        processes = [context.Process(target=_claim, args=arguments) for _ in range(3)]
        for process in processes:
            process.start()
        assert len({keys.get(timeout=60) for _ in processes}) == 1
        for process in processes:
            process.join(60)
            assert process.exitcode == 0
        assert [path.name for path in arguments[0].iterdir()] == [MARKER]
        assert [path.name for path in (tmp_path / f"cache{number}").iterdir()] == ["key"]


def test_a_lock_file_is_made_and_not_truncated(tmp_path):
    for _ in range(2):
        with open_regular(tmp_path / "lock", "ab") as file:
            file.write(b"x")
    assert (tmp_path / "lock").read_bytes() == b"xx"
    with pytest.raises(InputError, match="is not a regular file"):
        open_regular(tmp_path)
    with pytest.raises(InputError, match="cannot be the name of a file"):
        open_regular("a\0")


@pytest.mark.parametrize("text", ["{", "NaN", "1e999", "[" * 100_000, "\x00", '"' + "a" * 200 + '"', "1" * 5000])
def test_json_that_is_refused(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(InputError, match=r"a\.json (is damaged|has more than 100 bytes)"):
        read_json(tmp_path / "a.json", 100 if text.startswith('"') else 2**20)


def test_the_users_key_is_made_once_and_is_theirs(tmp_path, monkeypatch):
    monkeypatch.setenv("ROBUSTDIFF_CACHE", str(tmp_path / "cache"))
    key = user_key()
    assert len(key) == 32
    assert user_key() == key
    assert (tmp_path / "cache/key").stat().st_mode & 0o777 == 0o600
    (tmp_path / "cache/key").write_bytes(b"short")
    assert user_key() != key
    monkeypatch.setenv("ROBUSTDIFF_CACHE", "/dev/null/cache")
    assert user_key() != user_key()


def _wait(began: Any, end: Any) -> None:
    began.set()
    end.wait(60)


def test_a_lock_is_held_once_and_is_not_left_to_a_forked_process(tmp_path):
    context = multiprocessing.get_context("fork")
    began, end = context.Event(), context.Event()
    child = context.Process(target=_wait, args=(began, end), daemon=True)
    with held(tmp_path / "lock") as mine:
        assert mine
        with held(tmp_path / "lock") as second:
            assert not second
        child.start()
        assert began.wait(60)
    assert child.is_alive()
    with held(tmp_path / "lock") as after:
        assert after
    end.set()
    child.join(60)


def test_a_lock_on_a_file_that_was_removed_meanwhile_is_not_held(tmp_path, monkeypatch):
    path = tmp_path / "lock"
    monkeypatch.setattr(fcntl, "flock", lambda file, kind: path.unlink())
    with held(path) as mine:
        assert not mine


def test_without_locks_one_line_says_so(tmp_path, monkeypatch, caplog):
    def fail(file: Any, kind: int) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", fail)
    for _ in range(2):
        with held(tmp_path / "lock") as mine:
            assert mine
    assert len(caplog.messages) == 1
    assert "has no locks" in caplog.text


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Locks as Windows has them: of bytes, at the position of the file."""

    def locking(descriptor: int, mode: int, count: int) -> None:
        assert (os.lseek(descriptor, 0, os.SEEK_CUR), count) == (2**30, 1), "not of what others read"
        try:
            fcntl.flock(descriptor, fcntl.LOCK_UN if mode == 0 else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PermissionError(errno.EACCES, "Permission denied") from None

    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(locking=locking, LK_NBLCK=2, LK_UNLCK=0))
    monkeypatch.setattr(files, "_WINDOWS", True)


@pytest.mark.usefixtures("windows")
def test_a_lock_of_windows_is_held_once(tmp_path):
    test_a_lock_is_held_once_and_is_not_left_to_a_forked_process(tmp_path)
    assert (tmp_path / "lock").read_bytes() == b""


@pytest.mark.parametrize("remove", [False, True])
def test_who_waits_for_a_lock_gets_it_also_if_its_file_is_removed(tmp_path, remove):
    order = []

    def wait() -> None:
        with held(tmp_path / "lock", wait=True, remove=remove) as mine:
            order.append(("second", mine))

    with held(tmp_path / "lock", remove=remove) as mine:
        thread = threading.Thread(target=wait)
        thread.start()
        thread.join(0.05)
        order.append(("first", mine))
    thread.join(60)
    assert order == [("first", True), ("second", True)]
    assert (tmp_path / "lock").exists() != remove


@pytest.mark.usefixtures("windows")
def test_a_file_that_another_program_has_for_moments_is_replaced(tmp_path, monkeypatch):
    """As a virus scanner does on Windows; one that stays open is not."""
    replace, left = os.replace, 2

    def busy(source: Any, target: Any) -> None:
        nonlocal left
        left -= 1
        if left >= 0:
            raise PermissionError(errno.EACCES, "The process cannot access the file")
        replace(source, target)

    monkeypatch.setattr(os, "replace", busy)
    monkeypatch.setattr(files, "_POLL", 0.0)
    with atomic_write(tmp_path / "a") as file:
        file.write(b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    left = 10**9
    monkeypatch.setattr(files, "_PATIENCE", 0.0)
    with pytest.raises(PermissionError), atomic_write(tmp_path / "a") as file:
        file.write(b"newer")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.usefixtures("windows")
def test_files_of_a_folder_are_flushed_as_windows_allows_it(tmp_path, monkeypatch):
    fsync = os.fsync

    def writable(descriptor: int) -> None:
        assert fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY, "EBADF on Windows"
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", writable)
    fill(tmp_path / "folder")


@pytest.mark.usefixtures("windows")
def test_a_link_is_refused_where_the_system_has_no_flag_for_it(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_NOFOLLOW", 0)
    (tmp_path / "a").write_text("a")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    with pytest.raises(InputError, match="not a regular file"):
        open_regular(tmp_path / "link")


def test_the_users_key_is_kept_on_a_file_system_without_hard_links(tmp_path, monkeypatch):
    def refuse(source: Any, target: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setenv("ROBUSTDIFF_CACHE", str(tmp_path))
    monkeypatch.setattr(os, "link", refuse)
    assert user_key() == user_key()


def test_leftovers_that_another_process_may_be_writing_stay(tmp_path):
    fresh, old = tmp_path / f".a.{'0' * 12}.tmp", tmp_path / f".a.{'1' * 12}.tmp"
    for path in (fresh, old):
        path.write_text("")
    os.utime(old, (0, 0))
    remove_leftovers(tmp_path, "a", age=3600.0)
    assert list(tmp_path.iterdir()) == [fresh]
    remove_leftovers(tmp_path, "a")
    assert list(tmp_path.iterdir()) == []
