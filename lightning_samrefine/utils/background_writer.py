"""A thread that writes while the model computes, and never falls behind without bound."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

Job = Callable[[], None]


class BackgroundWriter:
    """Runs jobs one after the other in a daemon thread.

    Args:
        capacity: How many jobs may wait. Where the disk is slower than the model, `put` waits.
    """

    def __init__(self, capacity: int) -> None:
        self._jobs: queue.Queue[Job | None] = queue.Queue(capacity)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="samrefine-writer", daemon=True)
        self._thread.start()

    def put(self, job: Job) -> None:
        """Hand over a job, once there is room for it.

        Raises:
            Exception: What an earlier job raised; no job runs after it.
        """
        self._raise()
        self._jobs.put(job)

    def close(self) -> None:
        """Wait for every job and end the thread; a second call does nothing.

        Raises:
            Exception: What a job raised.
        """
        if self._thread.is_alive():
            self._jobs.put(None)
            self._thread.join()
        self._raise()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            # After an error the queue is still emptied, so that nobody waits for room in it.
            if self._error is not None:
                continue
            try:
                job()
            except BaseException as error:  # it is raised in the thread that hands over jobs
                self._error = error

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error
