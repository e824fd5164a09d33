"""Downloads published weights once into a folder shared by runs, ranks and jobs.

Not `torch.hub.download_url_to_file` or pooch: neither resumes an interrupted download, retries, or
makes other processes wait for the one that downloads.
"""

from __future__ import annotations

import hashlib
import http.client
import logging
import os
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tqdm import tqdm

from lightning_samrefine.utils.cache_dir import home

_log = logging.getLogger(__name__)

_CHUNK = 1 << 20
_TIMEOUT_S = 30.0  # without receiving a byte
_PAUSES_S = (1.0, 2.0, 4.0, 8.0)  # before retries after attempts without progress
_OFFLINE = ("SAMREFINE_OFFLINE", "HF_HUB_OFFLINE")
_TRUE = ("1", "true", "yes", "on")
_BROKEN = (
    urllib.error.URLError,
    http.client.HTTPException,
    ConnectionError,
    TimeoutError,
    ssl.SSLError,
)
_LASTING = (400, 401, 403, 404, 410, 451)  # permanent status codes: no retry


class DownloadError(FileNotFoundError):
    """Weights are missing and could not be downloaded."""


@dataclass(frozen=True)
class RemoteFile:
    """A file with a known size and hash.

    Attributes:
        url: Its URL.
        sha256: Hash of its content, 64 lowercase hexadecimal digits.
        size: In bytes.
    """

    url: str
    sha256: str
    size: int

    @property
    def name(self) -> str:
        """The file's name, the last part of the URL."""
        return self.url.rsplit("/", 1)[-1]


def fetch(file: RemoteFile, folder: Path | None = None) -> Path:
    """Return the path of a file, after downloading it if it is missing.

    One process downloads and the others wait for it. An interrupted download stays in
    ``<name>.part`` and is resumed. The file is renamed to its name after its sha256 was checked, so
    a file of that name is complete; the size of a file placed there by hand is checked.

    Args:
        file: The file to download.
        folder: Target folder; None for ``weights`` in the package's `home`.

    Raises:
        DownloadError: It cannot be downloaded, or has another size or hash. The message contains
            the URL, the folder and the sha256.
    """
    path = (home() / "weights" if folder is None else folder) / file.name
    if _is_there(file, path):
        return path
    offline = [key for key in _OFFLINE if os.environ.get(key, "").lower() in _TRUE]
    if offline:
        raise _failure(file, path, f"{offline[0]} is set, so it is not downloaded")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _only_process(path):
            if not _is_there(file, path):
                _download(file, path)
    except DownloadError:
        raise
    # A read-only folder, a full disk; a file system without locks.
    except (OSError, NotImplementedError) as error:
        raise _failure(file, path, f"{type(error).__name__}: {error}") from error
    return path


def _is_there(file: RemoteFile, path: Path) -> bool:
    if not path.is_file():
        return False
    if path.stat().st_size == file.size:
        return True
    reason = f"the file there has {path.stat().st_size} bytes instead of {file.size}; remove it"
    raise _failure(file, path, reason)


def _only_process(path: Path) -> AbstractContextManager[Any]:
    """Return an acquired file lock; the system releases the lock of a dead process."""
    lock = FileLock(path.with_name(f"{path.name}.lock"))
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        _log.info("Waiting for another process that downloads %s", path)
        return lock.acquire()


def _download(file: RemoteFile, path: Path) -> None:
    """Download into ``<name>.part`` with retries, check the hash, and rename."""
    part = path.with_name(f"{path.name}.part")
    _log.info("Downloading %s to %s (%.0f MB)", file.url, path.parent, file.size / 1e6)
    if _size(part) > file.size:
        part.unlink()
    resumed = _size(part) > 0
    while True:
        _complete(file, path, part)
        found = _sha256(part)
        if found == file.sha256:
            part.replace(path)
            return
        part.unlink()
        if not resumed:
            raise _failure(file, path, f"what arrived has the sha256 {found}")
        # The part of an earlier run may belong to another file.
        resumed = False


def _complete(file: RemoteFile, path: Path, part: Path) -> None:
    """Download the rest of the partial file, with retries."""
    pauses, furthest = iter(_PAUSES_S), _size(part)
    interval = 0.1 if sys.stderr.isatty() else 30.0  # few lines in a job's log
    with tqdm(
        total=file.size, unit="B", unit_scale=True, desc=file.name, mininterval=interval
    ) as bar:
        while _size(part) < file.size:
            bar.update(_size(part) - bar.n)
            try:
                _receive(file, path, part, bar)
                reason = "the server ended the connection"
            except urllib.error.HTTPError as error:
                reason = f"the server returned {error.code} {error.reason}"
                if error.code in _LASTING:
                    raise _failure(file, path, reason) from error
                if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                    part.unlink(missing_ok=True)
            except _BROKEN as error:
                reason = f"{type(error).__name__}: {getattr(error, 'reason', error)}"
            arrived = _size(part)
            # Only new bytes are progress: the download may restart from the beginning repeatedly.
            if arrived > furthest:
                pauses, furthest = iter(_PAUSES_S), arrived
                continue
            pause = next(pauses, None)
            if pause is None:
                raise _failure(file, path, f"{reason} ({furthest} of {file.size} bytes arrived)")
            _log.warning("%s: %s; trying again in %.0f s", file.url, reason, pause)
            time.sleep(pause)
    if _size(part) > file.size:
        part.unlink()
        raise _failure(file, path, f"more than {file.size} bytes arrived")


def _receive(file: RemoteFile, path: Path, part: Path, bar: Any) -> None:
    """Append the received bytes until the server closes the connection."""
    start = _size(part)
    headers = {"User-Agent": "lightning-samrefine", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    request = urllib.request.Request(file.url, headers=headers)
    with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:
        continues = start > 0 and _continues(response.status, response.headers, start)
        if not continues:
            start = 0
            bar.update(-bar.n)
        rest = response.headers.get("Content-Length", "")
        if rest.isdigit() and start + int(rest) != file.size:
            offered = f"the server's file has {start + int(rest)} bytes instead of {file.size}"
            raise _failure(file, path, offered)
        with part.open("ab" if continues else "wb") as target:
            while chunk := response.read(_CHUNK):
                target.write(chunk)
                bar.update(len(chunk))
                if target.tell() > file.size:
                    return


def _continues(status: int, headers: Mapping[str, str], start: int) -> bool:
    """Whether a server sends the rest only; without range support it sends the whole file."""
    return status == http.HTTPStatus.PARTIAL_CONTENT and headers.get(
        "Content-Range", ""
    ).startswith(f"bytes {start}-")


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _failure(file: RemoteFile, path: Path, reason: str) -> DownloadError:
    return DownloadError(
        f"{path.name} could not be fetched: {reason}. URL: {file.url}; folder: {path.parent} "
        f"(SAMREFINE_HOME moves it); sha256: {file.sha256}. Try again, or put the file there "
        "yourself, or give the path of your copy as checkpoint."
    )
