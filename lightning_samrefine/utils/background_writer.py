"""A thread with a bounded queue, which writes files while the model computes."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

Job = Callable[[], None]


class BackgroundWriter:
    """Runs jobs one after the other in a daemon thread.

    Args:
        capacity: Maximum number of queued jobs; `put` blocks while the queue is full.
    """

    def __init__(self, capacity: int) -> None:
        self._jobs: queue.Queue[Job | None] = queue.Queue(capacity)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="samrefine-writer", daemon=True)
        self._thread.start()

    def put(self, job: Job) -> None:
        """Queue a job; blocks while the queue is full.

        Raises:
            Exception: The error of an earlier job; no job runs after it.
        """
        self._raise()
        self._jobs.put(job)

    def close(self) -> None:
        """Wait for all jobs and end the thread; a second call does nothing.

        Raises:
            Exception: The error of a job.
        """
        if self._thread.is_alive():
            self._jobs.put(None)
            self._thread.join()
        self._raise()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            # After an error the queue is still emptied, so that no `put` blocks.
            if self._error is not None:
                continue
            try:
                job()
            except BaseException as error:  # raised again by `put` and `close`
                self._error = error

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error
