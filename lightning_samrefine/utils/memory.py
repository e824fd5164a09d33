"""Number of items that a model processes at once, reduced when memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

Result = TypeVar("Result")

# Plain RuntimeErrors of torch's allocators, and of CUDA's libraries without memory for a handle or
# a workspace. An error with another cause is raised once a single item fails.
_MESSAGES = (
    "out of memory",
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "unable to find an engine",  # cuDNN
    "Invalid buffer size",  # MPS
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on a GPU or on the CPU."""
    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(part in str(error) for part in _MESSAGES)


class ChunkSize:
    """The number of items that a model processes at once: halved whenever memory runs out.

    Attributes:
        limit: The largest size that memory allowed so far, None before it ran out.
    """

    def __init__(self) -> None:
        self.limit: int | None = None

    def run(
        self, count: int, size: int, process: Callable[[int, int], Result]
    ) -> Iterator[tuple[int, int, Result]]:
        """Process items 0 to ``count`` in chunks of ``size``, if memory allows it.

        Yields:
            The start and the end of a chunk, and its result.

        Raises:
            Exception: Whatever ``process`` raises, running out of memory over one item included.
        """
        start = 0
        while start < count:
            stop = min(count, start + min(size, self.limit or size))
            try:
                result = process(start, stop)
            except Exception as error:
                if stop - start == 1 or not is_out_of_memory(error):
                    raise
                self.limit = (stop - start) // 2
            else:
                yield start, stop, result
                start = stop
                continue
            # Out of the handler, so that the error's frames have released their tensors.
            _release_cached()


def _release_cached() -> None:
    """Release the cached memory of torch's allocators, so that blocks of other sizes fit."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()
