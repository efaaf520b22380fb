"""Tar files of a server, with and without ranges, cut off, refused, changed, and fetched by several processes."""

from __future__ import annotations

import errno
import io
import tarfile
import threading
from collections import namedtuple
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from robustdiff.data import load_dataset, remote
from robustdiff.errors import InputError


def shard(value: int) -> bytes:
    file, image = io.BytesIO(), io.BytesIO()
    Image.fromarray(np.random.default_rng(value).integers(0, 256, (64, 64, 3), np.uint8)).save(image, "PNG")
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, data in (("a.png", image.getvalue()), ("a.txt", f"number {value}".encode())):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return file.getvalue()


class Server(ThreadingHTTPServer):
    """A server of files in memory.

    Attributes:
        files: The files by path.
        ranges: Whether ranges are taken.
        cut: The numbers of bytes after which the next transfers break off.
        codes: The codes that the next requests are answered with.
        asked: The requests: method, path and range.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.ranges, self.lengths = True, True
        self.cut: list[int] = []
        self.codes: list[int] = []
        self.asked: list[tuple[str, str, str | None]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def fetched(self) -> list[str | None]:
        """The ranges of the transfers."""
        return [part for method, _, part in self.asked if method == "GET"]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        server, path, part = self.server, self.path.partition("?")[0], self.headers.get("Range")
        server.asked.append((self.command, self.path, part))
        data = server.files.get(path)
        if server.codes or data is None:
            self.send_error(server.codes.pop(0) if server.codes else 404)
            return
        tag, start = f'"{hash(data)}"', 0
        if part is not None and server.ranges and self.headers.get("If-Range") == tag:
            start = int(part.removeprefix("bytes=").partition("-")[0])
        self.send_response(206 if start else 200)
        self.send_header("ETag", tag)
        if server.lengths:
            self.send_header("Content-Length", str(len(data) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if body:
            sent = data[start:]
            self.wfile.write(sent[: server.cut.pop(0)] if server.cut else sent)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    monkeypatch.setenv("ROBUSTDIFF_CACHE", str(tmp_path / "cache"))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(remote, "WAIT", 0.0)
    monkeypatch.setattr(remote, "RESERVE", 0)
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        server.files = {f"/s-{k}.tar": shard(k) for k in range(3)}
        yield server
        server.shutdown()
        thread.join()


def held(tmp_path: Path) -> list[str]:
    """The files of the cache, without the hash in their names."""
    return sorted(path.name[33:] for path in (tmp_path / "cache" / "shards").iterdir())


def test_shards_are_read_as_those_on_disk_and_fetched_once(server: Server, tmp_path: Path) -> None:
    dataset = load_dataset("webdataset", root=f"{server.url}/s-{{0..2}}.tar?download=true", size=8)
    assert [caption for (caption,) in dataset.captions] == ["number 0", "number 1", "number 2"]
    for k, data in enumerate(server.files.values()):
        (tmp_path / f"s-{k}.tar").write_bytes(data)
    local = load_dataset("webdataset", root=tmp_path / "s-*.tar", size=8)
    assert dataset.fingerprint() == local.fingerprint()
    assert (dataset[2][0] == local[2][0]).all()
    assert dataset.name == f"{server.url}/s-{{0..2}}.tar"  # a query may be a key
    assert held(tmp_path) == ["s-0.tar", "s-1.tar", "s-2.tar"]
    server.asked.clear()
    server.files.clear()  # nor is the server asked again
    assert load_dataset("webdataset", root=f"{server.url}/s-{{0..2}}.tar?download=true", size=8).fingerprint()
    assert server.asked == []


@pytest.mark.parametrize("ranges", [True, False])
def test_a_transfer_that_breaks_off_goes_on(server: Server, ranges: bool, tmp_path: Path) -> None:
    server.ranges, server.cut = ranges, [5000, 3000]
    (path,) = remote.fetch([f"{server.url}/s-1.tar"])
    assert Path(path).read_bytes() == server.files["/s-1.tar"]
    assert server.fetched() == [None, "bytes=5000-", f"bytes={8000 if ranges else 3000}-"]
    assert held(tmp_path) == ["s-1.tar"]


def test_a_server_that_never_gives_all_is_left_and_what_arrived_is_kept(server: Server, tmp_path: Path) -> None:
    server.ranges, server.cut = False, [5000] * 20
    with pytest.raises(
        InputError, match=r"s-0\.tar: the connection was lost \d+ bytes before the end, 5 times in a row; "
    ):
        remote.fetch([f"{server.url}/s-0.tar"])
    assert held(tmp_path) == ["s-0.tar.part", "s-0.tar.tag"]
    server.ranges, server.cut = True, []
    (path,) = remote.fetch([f"{server.url}/s-0.tar"])
    assert Path(path).read_bytes() == server.files["/s-0.tar"]
    assert server.fetched()[-1] == "bytes=5000-"


def test_a_part_of_another_version_is_fetched_anew(server: Server, tmp_path: Path) -> None:
    server.cut = [5000] + [0] * 5
    with pytest.raises(InputError, match="5 times in a row"):
        remote.fetch([f"{server.url}/s-0.tar"])
    server.cut, server.files["/s-0.tar"] = [], shard(7)
    (path,) = remote.fetch([f"{server.url}/s-0.tar"])
    assert Path(path).read_bytes() == shard(7)


def test_refusals_that_may_pass_are_tried_again(server: Server) -> None:
    server.codes = [405, 503, 429]  # the first is that of HEAD
    (path,) = remote.fetch([f"{server.url}/s-0.tar"])
    assert Path(path).read_bytes() == server.files["/s-0.tar"]
    assert [method for method, _, _ in server.asked] == ["HEAD", "GET", "GET", "GET"]


def test_a_file_that_is_not_there_is_one_line(robustdiff: Any, server: Server, tmp_path: Path) -> None:
    done = robustdiff(
        "train", "digits", "--cpu", "--set", "data.name=webdataset", "--set", "data.size=8",
        "--set", f"data.root={server.url}/s-{{0..3}}.tar?token=secret", "--set", f"output={tmp_path / 'run'}",
    )  # fmt: skip
    assert done.code == 2
    assert done.err == f"robustdiff: {server.url}/s-3.tar: the server answers 404 Not Found; correct root\n"
    assert not (tmp_path / "run").exists()
    assert held(tmp_path) == []


def test_a_server_that_is_not_there_is_one_line(server: Server) -> None:
    with pytest.raises(InputError, match=r"127\.0\.0\.1:1/a\.tar: .*refused, 5 times in a row; check the connection"):
        remote.fetch(["http://127.0.0.1:1/a.tar"])


def test_a_file_that_is_no_tar_is_named(server: Server) -> None:
    server.files["/page.tar"] = b"<html>Please log in</html>"
    with pytest.raises(InputError, match=r"page\.tar: not a whole tar file"):
        load_dataset("webdataset", root=f"{server.url}/page.tar")


def test_a_redirection_is_followed_to_the_web_alone(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def redirect(self: Handler) -> None:
        self.send_response(302)
        self.send_header("Location", "/s-0.tar" if "web" in self.path else "file:///etc/hostname")
        self.end_headers()

    answer = Handler.answer
    monkeypatch.setattr(
        Handler, "answer", lambda self, body: redirect(self) if "to" in self.path else answer(self, body)
    )
    (path,) = remote.fetch([f"{server.url}/to-web.tar"])
    assert Path(path).read_bytes() == server.files["/s-0.tar"]
    with pytest.raises(InputError, match=r"to-file\.tar: "):
        remote.fetch([f"{server.url}/to-file.tar"])


def test_a_disk_without_space_is_refused_before_and_within(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(remote.shutil, "disk_usage", lambda _: usage(0, 0, 30_000))
    message = r"s-0\.tar and 2 other files of 0\.0 GB: the disk of .* has 0\.0 GB free, .* set ROBUSTDIFF_CACHE"
    with pytest.raises(InputError, match=message):
        remote.fetch([f"{server.url}/s-{k}.tar" for k in range(3)])
    assert server.fetched() == []
    server.lengths = False  # so that the size is not known
    monkeypatch.setattr(remote, "PIECE", 1000)
    left = iter([20_000, 3000, 2000, 0, 0])
    monkeypatch.setattr(remote.shutil, "disk_usage", lambda _: usage(0, 0, next(left)))
    with pytest.raises(InputError, match=r"s-0\.tar: the disk of"):
        remote.fetch([f"{server.url}/s-0.tar"])
    assert held(tmp_path) == ["s-0.tar.part", "s-0.tar.tag"]

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(remote, "_check_space", full)
    with pytest.raises(InputError, match="too little; give fewer files"):
        remote._persist("http://host/a", full, lambda: 0)


def test_several_at_once_fetch_a_file_once(server: Server, tmp_path: Path) -> None:
    paths: list[list[str]] = []
    threads = [threading.Thread(target=lambda: paths.append(remote.fetch([f"{server.url}/s-2.tar"]))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(paths) == 4
    assert Path(paths[0][0]).read_bytes() == server.files["/s-2.tar"]
    assert len(server.fetched()) == 1
    assert held(tmp_path) == ["s-2.tar"]


def test_files_of_the_hub_are_in_its_cache(monkeypatch: pytest.MonkeyPatch, server: Server, tmp_path: Path) -> None:
    import huggingface_hub

    asked: list[Any] = []

    def download(repository: str, path: str, **options: Any) -> str:
        asked.append((repository, path, options))
        if "missing" in path:
            raise OSError("404 Client Error\nwith more")
        (tmp_path / "hub.tar").write_bytes(shard(1))
        return str(tmp_path / "hub.tar")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    dataset = load_dataset("webdataset", root="hf://datasets/owner/name@main/data/{0..0}.tar", size=8)
    assert [caption for (caption,) in dataset.captions] == ["number 1"]
    assert asked == [("owner/name", "data/0.tar", {"repo_type": "dataset", "revision": "main"})]
    with pytest.raises(InputError, match=r"missing\.tar: cannot be fetched \(404 Client Error\); correct root"):
        remote.fetch(["hf://datasets/owner/name/missing.tar"])
