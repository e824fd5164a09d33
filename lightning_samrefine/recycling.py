"""Memory for large maps on the CPU that is used again once nobody holds the map any more."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class RecycledMemory:
    """Hands out tensors in memory that earlier ones have given back.

    What exceeds 32 MiB comes from the system anew every time (glibc's mmap threshold ends there),
    and its pages are filled in when they are first written to. In a virtual machine that returns
    free pages to its host, this took several times as long as everything else that happens to a
    map of 1440 × 1920 pixels and 12 classes; zeros written over old pages hardly show.

    A tensor is its holder's for as long as it, a view or a NumPy array of it is alive. Memory that
    does not come back is never missed: the next tensor takes new memory.

    Args:
        idle_bytes: How much may lie idle; beyond it the memory that has done so longest is freed.
    """

    def __init__(self, idle_bytes: int) -> None:
        self._idle_bytes = idle_bytes
        # By id. Single operations on it only: tensors die in any thread, even amid such a call.
        self._idle: dict[int, np.ndarray] = {}

    def zeros_like(self, tensor: Tensor) -> Tensor:
        """Return contiguous float32 zeros for a float32 tensor; a GPU's are its own."""
        if tensor.device.type != "cpu":
            return torch.zeros_like(tensor)
        return self._lend(tensor.shape, clean=True)

    def empty_like(self, tensor: Tensor) -> Tensor:
        """Return contiguous memory of unknown content for a float32 tensor; a GPU's is its own."""
        if tensor.device.type != "cpu":
            return torch.empty(tensor.shape, dtype=torch.float32, device=tensor.device)
        return self._lend(tensor.shape, clean=False)

    def _lend(self, shape: Sequence[int], clean: bool) -> Tensor:
        count = math.prod(shape)
        memory = self._take(count)
        if memory is None:
            # NumPy asks for huge pages, and for zeros that the system makes where they are used.
            memory = np.zeros(count, np.float32)
        elif clean:
            memory[:count].fill(0)
        # torch keeps this very object for as long as any tensor uses the memory.
        lent = memory[:count]
        weakref.finalize(lent, self._give_back, memory).atexit = False
        return torch.from_numpy(lent).view(tuple(shape))

    def _take(self, count: int) -> np.ndarray | None:
        for key, memory in list(self._idle.items()):
            # A small map that is kept must not hold on to the memory of a large one.
            fits = count <= memory.size <= 2 * count
            if fits and self._idle.pop(key, None) is not None:
                return memory
        return None

    def _give_back(self, memory: np.ndarray) -> None:
        self._idle[id(memory)] = memory
        idle = list(self._idle.items())
        excess = sum(array.nbytes for _, array in idle) - self._idle_bytes
        for key, array in idle:
            if excess <= 0:
                break
            self._idle.pop(key, None)
            excess -= array.nbytes


# Three maps of 1440 × 1920 pixels and 12 classes.
MAPS = RecycledMemory(idle_bytes=400_000_000)
