"""A lock that keeps a second run out of a folder of predictions while one writes to it.

Every process of a run locks a file of its own below ``.locks``, so that a new run also waits for
processes that outlive their first one. The locks are the operating system's: they end with their
process, however it ends, and a file that a killed run has left locks nothing.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import time
import warnings
from pathlib import Path

from filelock import FileLock, Timeout
from lightning.pytorch.utilities.rank_zero import rank_zero_info

# SLURM gives processes 30 s between SIGTERM and SIGKILL, and starts a requeued job meanwhile.
WAIT_SECONDS = 45.0

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


class FolderLock:
    """Locks of one process, to be released by the process that acquired them.

    Args:
        folder: The folder of locks; it is removed once the last lock is released.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._owner = folder / "owner.txt"
        self._held: FileLock | None = None
        self._is_first = False

    def acquire(self, rank: int) -> None:
        """Lock as one process of a run; the first process comes before all others.

        Waits up to `WAIT_SECONDS` for the processes of another run to end. A file system without
        locks is warned about.

        Args:
            rank: Number of the process. Process 0 refuses a folder that another run holds.

        Raises:
            ValueError: A process of another run holds the folder.
            OSError: The folder cannot be written.
        """
        deadline = time.monotonic() + WAIT_SECONDS
        self._folder.mkdir(parents=True, exist_ok=True)
        try:
            self._held = self._lock(self._path(rank), deadline)
            if rank == 0:
                self._is_first = True
                # Processes of an earlier run that has lost its first one may still write.
                for path in sorted(self._folder.glob("*.lock")):
                    if path != self._path(rank):
                        self._end(self._lock(path, deadline))
                self._owner.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        except (NotImplementedError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
                raise
            warnings.warn(
                f"The file system of {self._folder.parent} has no locks ({error}): make sure that "
                "only one run at a time writes there.",
                RuntimeWarning,
                stacklevel=2,
            )

    def release(self) -> None:
        """Release what is held; a second call does nothing."""
        if self._held is None:
            return
        if self._is_first:
            with contextlib.suppress(OSError):
                self._owner.unlink()
        self._end(self._held)
        self._held, self._is_first = None, False
        with contextlib.suppress(OSError):  # other processes still hold theirs
            self._folder.rmdir()

    def _path(self, rank: int) -> Path:
        return self._folder / f"{rank:05d}.lock"

    def _lock(self, path: Path, deadline: float) -> FileLock:
        lock, has_waited = FileLock(path), False
        while True:
            self._folder.mkdir(exist_ok=True)
            try:
                lock.acquire(timeout=max(0.0, deadline - time.monotonic()) if has_waited else 0)
            except FileNotFoundError:
                continue  # its last owner has just removed the folder
            except Timeout:
                if has_waited:
                    raise ValueError(
                        "folder must not be in use, got "
                        f"{self._folder.parent}, which another run is writing to "
                        f"({self._owner_text()}): wait for that run, end it, or take another folder"
                    ) from None
                rank_zero_info(
                    f"{self._folder.parent} is held by another run ({self._owner_text()}); "
                    f"waiting up to {WAIT_SECONDS:.0f} s for it to end"
                )
                has_waited = True
                continue
            # A file that its owner removed after it was opened here locks nothing.
            if path.exists():
                return lock
            lock.release()

    def _owner_text(self) -> str:
        try:
            return self._owner.read_text() or "unknown process"
        except OSError:
            return "unknown process"

    @staticmethod
    def _end(lock: FileLock) -> None:
        """Remove a held lock's file and release it."""
        path = Path(lock.lock_file)
        with contextlib.suppress(OSError):  # Windows removes no open file
            path.unlink()
        lock.release()
        if os.name == "nt":
            with contextlib.suppress(OSError):
                path.unlink()
