"""Files of the web, fetched once to the user's cache.

Training reads images at random in every epoch, for which a connection for each image would be too slow. Therefore a
file is fetched whole, in pieces that take no memory, and is read from the disk from then on, without asking the server
again: a run is resumed on the same bytes, and without a connection.

- A file appears under its name when all of it has arrived. Until then it is NAME.part, beside NAME.tag, the version
  that the server gave it. A transfer that broke off, in this process or an earlier one, goes on where it stopped if the
  server takes ranges and still has that version, and otherwise begins again.
- Processes that want the same file wait for the one that fetches it.
- Files of the Hugging Face Hub, ``hf://datasets/OWNER/NAME/PATH``, are in the Hub's own cache.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path
from threading import Event
from typing import Any, BinaryIO, TypeVar
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import (
    HTTPDefaultErrorHandler,
    HTTPErrorProcessor,
    HTTPHandler,
    HTTPRedirectHandler,
    HTTPSHandler,
    OpenerDirector,
    ProxyHandler,
    Request,
    UnknownHandler,
)

from robustdiff.errors import InputError, first_line, printable
from robustdiff.files import cache_folder, held, make_folder, rename

__all__ = ["fetch", "is_url", "shown"]

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

ATTEMPTS = 5  # without progress between them
WAIT = 1.0  # seconds before the second attempt, doubled for each further one
TIMEOUT = 60.0  # seconds without a byte
RESERVE = 2**30  # bytes of the disk that are left free
THREADS = 8
PIECE = 2**20

_LATER = {408, 425, 429}  # codes of refusals that may pass, as those from 500 on may


def is_url(root: str) -> bool:
    """Return whether a path has the form of a URL, such as ``https://host/a.tar``."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", root) is not None  # a drive of Windows has one letter


def shown(url: str) -> str:
    """Return a URL for messages, without a password and a query, which may be a key."""
    return printable(re.sub(r"//[^/]*@", "//", url).partition("?")[0][:300])


def fetch(urls: Sequence[str]) -> list[str]:
    """Fetch files that are not in the cache, and return the paths of all.

    Args:
        urls: URLs of the schemes http and https, or ``hf://datasets/OWNER/NAME/PATH``.

    Raises:
        InputError: If a scheme is another one, a file is not there, the connection fails several times in a row, or the
            disk lacks the space. What has arrived is kept.
    """
    for url in urls:
        if not url.startswith(("http://", "https://", "hf://datasets/")):
            raise InputError(
                f"{shown(url)}: files are fetched from https://, http:// and hf://datasets/OWNER/NAME/PATH; download "
                "them, and give their path as root"
            )
    folder = cache_folder() / "shards"
    make_folder(folder)
    places = {url: folder / _name(url) for url in urls if not url.startswith("hf://")}
    missing = [url for url, place in places.items() if not place.exists()]
    stop = Event()
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            if missing:
                sizes = list(pool.map(_size, missing))
                others = f" and {len(missing) - 1} other files" if len(missing) > 1 else ""
                _check_space(folder, sum(sizes), f"{shown(missing[0])}{others} of {sum(sizes) / 1e9:.1f} GB")
                logger.warning("fetching %d files, %.1f GB, to %s", len(missing), sum(sizes) / 1e9, printable(folder))
                list(pool.map(lambda url: _download(url, places[url], stop), missing))
            of_hub = {url: pool.submit(_of_hub, url) for url in urls if url.startswith("hf://")}
            return [str(places[url]) if url in places else of_hub[url].result() for url in urls]
        except BaseException:  # an interruption too: the other threads keep what they have
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def _name(url: str) -> str:
    last = re.sub(r"[^\w.-]", "_", urlsplit(url).path.rpartition("/")[2])[-80:]
    return f"{hashlib.sha256(url.encode()).hexdigest()[:32]}-{last}"


def _of_hub(url: str) -> str:
    from huggingface_hub import hf_hub_download

    match = re.fullmatch(r"hf://datasets/([\w.-]+/[\w.-]+)(?:@([^/]+))?/(.+)", url)
    if match is None:
        raise InputError(f"{shown(url)}: write it as hf://datasets/OWNER/NAME/PATH, or OWNER/NAME@REVISION/PATH")
    repository, revision, path = match.groups()
    try:
        return str(hf_hub_download(repository, path, repo_type="dataset", revision=revision))
    except Exception as error:  # of the connection, the disk, the names or the access
        reason = printable(first_line(error)[:200])
        raise InputError(f"{shown(url)}: cannot be fetched ({reason}); correct root, or run hf auth login") from None


class _Lost(OSError):
    """A transfer that ended too early."""


def _opener() -> OpenerDirector:
    opener = OpenerDirector()  # unlike build_opener's, it opens neither files nor FTP, also after a redirection
    for handler in (ProxyHandler, UnknownHandler, HTTPHandler, HTTPSHandler, HTTPDefaultErrorHandler):
        opener.add_handler(handler())
    opener.add_handler(HTTPRedirectHandler())
    opener.add_handler(HTTPErrorProcessor())
    return opener


def _request(url: str, method: str = "GET", **headers: str) -> Any:
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    request = Request(url, headers={"User-Agent": "robustdiff", "Accept-Encoding": "identity", **fields}, method=method)
    return _opener().open(request, timeout=TIMEOUT)


def _persist(url: str, action: Callable[[], _T], progress: Callable[[], int]) -> _T:
    """Repeat an action while it fails for reasons that may pass, until it has failed too often without progress.

    Raises:
        InputError: If it has, or fails for another reason.
    """
    failures, furthest = 0, progress()
    while True:
        try:
            return action()
        except InputError:
            raise
        except HTTPError as error:
            reason = f"the server answers {error.code} {printable(str(error.reason)[:100])}"
            if error.code < 500 and error.code not in _LATER:
                raise InputError(f"{shown(url)}: {reason}; correct root") from None
        except (OSError, HTTPException, ValueError) as error:
            cause = error.reason if isinstance(error, URLError) and isinstance(error.reason, OSError) else error
            if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
                raise _full(cache_folder(), shown(url), 0) from None
            reason = printable(first_line(cause)[:200])
        failures = 1 if progress() > furthest else failures + 1
        furthest = max(furthest, progress())
        if failures >= ATTEMPTS:
            raise InputError(
                f"{shown(url)}: {reason}, {ATTEMPTS} times in a row; check the connection and start again, what has "
                "arrived is kept"
            )
        time.sleep(WAIT * 2 ** (failures - 1))


def _size(url: str) -> int:
    """Return the number of bytes of a file, or 0 if the server does not say."""

    def ask() -> int:
        try:
            with _request(url, "HEAD") as response:
                return max(0, int(response.headers.get("Content-Length") or 0))
        except HTTPError as error:
            if error.code in (403, 405, 501):  # servers without HEAD, and URLs signed for GET
                return 0
            raise

    return _persist(url, ask, lambda: 0)


def _full(folder: Path, what: str, free: int) -> InputError:
    return InputError(
        f"{what}: the disk of {printable(folder)} has {free / 1e9:.1f} GB free, too little; give fewer files, or set "
        "ROBUSTDIFF_CACHE to a folder of a larger disk"
    )


def _check_space(folder: Path, size: int, what: str) -> None:
    """Check that a number of bytes more leaves some of the disk free."""
    free = shutil.disk_usage(folder).free
    if size + RESERVE > free:
        raise _full(folder, what, free)


def _download(url: str, place: Path, stop: Event) -> None:
    """Fetch one file to a place, or wait for another process that does."""
    part, tag, lock = (place.with_name(f"{place.name}.{ending}") for ending in ("part", "tag", "lock"))
    with held(lock, wait=True, remove=True):
        if place.exists():  # the other process has fetched it
            return
        with part.open("a+b") as file:

            def progress() -> int:
                return os.fstat(file.fileno()).st_size

            _persist(url, lambda: _continue(url, file, tag, stop), progress)
            os.fsync(file.fileno())
        rename(part, place)
        tag.unlink(missing_ok=True)


def _continue(url: str, file: BinaryIO, tag: Path, stop: Event) -> None:
    """Append to a file what it lacks, or write it anew."""
    start = os.fstat(file.fileno()).st_size
    version = tag.read_text(encoding="utf-8") if start and tag.exists() else ""
    ranged = {"Range": f"bytes={start}-", "If_Range": version} if version else {}
    try:
        response = _request(url, **ranged)
    except HTTPError as error:
        if error.code == 416:  # all of it is there already, or it is another file by now
            file.truncate(0)
            raise _Lost("the range that was left is not there") from None
        raise
    with response:
        whole = response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
        if not (response.status == 206 and version and whole):
            file.truncate(0)
            version = response.headers.get("ETag") or ""
            if version.startswith("W/") or not version:
                version = response.headers.get("Last-Modified") or ""
            tag.write_text(version, encoding="utf-8")
        length, received = response.headers.get("Content-Length"), 0
        while data := response.read(PIECE):
            if stop.is_set():
                raise InputError(f"{shown(url)}: stopped; start again, what has arrived is kept")
            _check_space(tag.parent, len(data), shown(url))
            file.write(data)
            received += len(data)
        file.flush()
        if length is not None and received != int(length):
            raise _Lost(f"the connection was lost {int(length) - received} bytes before the end")
