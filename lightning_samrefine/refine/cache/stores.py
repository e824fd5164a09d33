"""Stores of cached tensors: in memory, or in a folder that processes share.

Both stores forget what was used longest ago once they hold more bytes than their limit. Not
diskcache: its SQLite database needs file locks, which shared file systems of clusters often lack.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

_SUFFIX = ".safetensors"
_TEMPORARY = ".tmp"
# A temporary file that nobody finished within an hour belongs to a process that was killed.
_ABANDONED_SECONDS = 3600.0
# How many of its own writes a process makes before it looks at what others have written.
_WRITES_PER_SCAN = 16


@dataclass(frozen=True)
class Entry:
    """What is kept of one embedding.

    Attributes:
        tensors: On the CPU, in the stored dtype.
        note: Text that the owner needs to rebuild the embedding.
    """

    tensors: tuple[Tensor, ...]
    note: str

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)


class MemoryStore:
    """Entries in this process's memory.

    Args:
        limit: In bytes.

    Attributes:
        nbytes: Bytes held.
        evictions: How many entries were removed, or not taken, for want of room.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._entries: OrderedDict[str, Entry] = OrderedDict()
        self.nbytes = 0
        self.evictions = 0

    def get(self, key: str) -> Entry | None:
        """Return an entry and count it as used."""
        if key not in self._entries:
            return None
        self._entries.move_to_end(key)
        return self._entries[key]

    def put(self, key: str, entry: Entry) -> None:
        """Keep an entry, first removing those that were used longest ago."""
        if entry.nbytes > self._limit:
            self.evictions += 1
            return
        if key in self._entries:
            self.nbytes -= self._entries.pop(key).nbytes
        while self.nbytes + entry.nbytes > self._limit:
            _, oldest = self._entries.popitem(last=False)
            self.nbytes -= oldest.nbytes
            self.evictions += 1
        self._entries[key] = entry
        self.nbytes += entry.nbytes


class _DamagedError(Exception):
    """A file is whole, but holds something else than what was written."""


class DiskStore:
    """One safetensors file an entry, in a folder that any number of processes share.

    A file appears whole or not at all: it is written under a temporary name and then renamed. Its
    modification time is that of its last use. A file that does not hold what was written is
    deleted when it is met. Reading maps the file into memory.

    Args:
        limit: In bytes. Several processes together may exceed it by a few entries each, until
            the next of them looks.
        folder: Made on the first write.

    Attributes:
        nbytes: Bytes held in the folder, as last seen by this process.
        evictions: How many entries this process has removed, or not taken, for want of room.
    """

    def __init__(self, limit: int, folder: Path) -> None:
        self._limit = limit
        self.folder = folder
        self.nbytes = 0
        self.evictions = 0
        self._writes_until_scan = 0

    def get(self, key: str) -> Entry | None:
        """Return an entry and count it as used; a damaged one is deleted.

        Raises:
            OSError: The file could not be read; its content may be sound.
            MemoryError: Likewise.
        """
        path = self._path(key)
        try:
            entry = _read(path, key)
        except (FileNotFoundError, PermissionError):
            return None
        except (SafetensorError, _DamagedError):
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return entry

    def put(self, key: str, entry: Entry) -> None:
        """Write an entry, then remove what was used longest ago.

        Raises:
            OSError: The folder or the file could not be written.
        """
        content = _serialize(key, entry)
        if len(content) > self._limit:
            self.evictions += 1
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        # The room is made first, so that the folder never holds more than the limit.
        if self._writes_until_scan <= 0 or self.nbytes + len(content) > self._limit:
            self._make_room(len(content))
            self._writes_until_scan = _WRITES_PER_SCAN
        temporary = self.folder / f"{key}.{uuid.uuid4().hex}{_TEMPORARY}"
        try:
            temporary.write_bytes(content)
            temporary.replace(self._path(key))
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        self.nbytes += len(content)
        self._writes_until_scan -= 1

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}{_SUFFIX}"

    def _make_room(self, needed: int) -> None:
        """Look at the folder, and delete old entries until ``needed`` bytes fit."""
        files = []
        with os.scandir(self.folder) as scan:
            for file in scan:
                # Another process may delete any file at any time.
                with contextlib.suppress(OSError):
                    status = file.stat()
                    if file.name.endswith(_SUFFIX):
                        files.append((status.st_mtime_ns, status.st_size, file.path))
                    elif (
                        file.name.endswith(_TEMPORARY)
                        and time.time() - status.st_mtime > _ABANDONED_SECONDS
                    ):
                        Path(file.path).unlink()
        self.nbytes = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if self.nbytes + needed <= self._limit:
                break
            with contextlib.suppress(FileNotFoundError):
                Path(path).unlink()
                self.evictions += 1
            self.nbytes -= size


def _serialize(key: str, entry: Entry) -> bytes:
    tensors = {str(index): tensor for index, tensor in enumerate(entry.tensors)}
    metadata = {"key": key, "note": entry.note, "crc32": _checksum(entry.tensors)}
    return save(tensors, metadata)


def _read(path: Path, key: str) -> Entry:
    """Read a file, which stays mapped for as long as the tensors live.

    Raises:
        _DamagedError: The content is not what was written.
        SafetensorError: The file is not whole.
    """
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        tensors = tuple(file.get_tensor(str(index)) for index in range(len(file.keys())))
    sound = metadata.get("key") == key and metadata.get("crc32") == _checksum(tensors)
    if not sound or "note" not in metadata:
        raise _DamagedError(f"{path}: not what was written")
    return Entry(tensors, metadata["note"])


def _checksum(tensors: Sequence[Tensor]) -> str:
    checksum = 0
    for tensor in tensors:
        checksum = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, checksum)
    return str(checksum)
