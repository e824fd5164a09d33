"""Between the GPU and the CPU without a wait where none is needed."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def upload(value: Tensor | np.ndarray, device: torch.device) -> Tensor:
    """Bring a small tensor or array to a device.

    To CUDA from pinned memory, which the CPU does not wait for: torch keeps that memory until the
    copy has ended. Other devices get a blocking copy, for on MPS one that does not block reads
    memory that may have been freed.
    """
    tensor = torch.from_numpy(value) if isinstance(value, np.ndarray) else value
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def synchronize(device: torch.device) -> None:
    """Wait until a device has done all that was enqueued, so that a clock counts it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


class Download:
    """Tensors on their way to the CPU, all of one device.

    From CUDA they travel to pinned memory, behind the work that was enqueued before them and
    beside whatever is enqueued after. Elsewhere they are there at once.

    Args:
        tensors: Of any shapes and dtypes.
    """

    def __init__(self, *tensors: Tensor) -> None:
        device = tensors[0].device
        self._arrived: torch.cuda.Event | None = None
        if device.type != "cuda":
            self._on_cpu = [tensor.cpu() for tensor in tensors]
            return
        self._on_cpu = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors]
        for target, tensor in zip(self._on_cpu, tensors, strict=True):
            target.copy_(tensor, non_blocking=True)
        # On the stream of the copies: the event is reached once they have ended. The sources may
        # be let go before; their memory is only used again by work behind the copies.
        self._arrived = torch.cuda.Event()
        self._arrived.record(torch.cuda.current_stream(device))

    def wait(self) -> list[np.ndarray]:
        """Wait for these tensors, not for what was enqueued after them, and return them."""
        return [tensor.numpy() for tensor in self.tensors()]

    def tensors(self) -> list[Tensor]:
        """Do the same, and return CPU tensors, of any dtype; from CUDA in pinned memory."""
        if self._arrived is not None:
            self._arrived.synchronize()
            self._arrived = None
        return self._on_cpu
