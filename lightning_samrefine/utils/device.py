"""Plain tensors, and their copies between GPU and CPU without unnecessary synchronization."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def upload(value: Tensor | np.ndarray, device: torch.device) -> Tensor:
    """Copy a small tensor or array to a device.

    To CUDA the copy is asynchronous, from pinned memory that torch keeps until the copy has ended.
    To other devices it is blocking: on MPS a non-blocking copy may read freed memory.
    """
    tensor = torch.from_numpy(value) if isinstance(value, np.ndarray) else value
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def plain(tensor: Tensor) -> Tensor:
    """Return a tensor without its subclass, whose methods may differ (MONAI's ``MetaTensor``).

    A subclass that holds its data elsewhere (``DTensor``) stays, because its data would be lost.
    """
    if type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__ and type(tensor) is not Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            return tensor.as_subclass(Tensor)
    return tensor


def synchronize(device: torch.device) -> None:
    """Wait until a device has finished all enqueued work, for exact timing."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


class Download:
    """An asynchronous copy of tensors of one device to the CPU.

    From CUDA they are copied to pinned memory, after the work enqueued before and in parallel to
    the CPU. From other devices they are copied at once.

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
        # be freed before; their memory is reused only by work enqueued after the copies.
        self._arrived = torch.cuda.Event()
        self._arrived.record(torch.cuda.current_stream(device))

    def wait(self) -> list[np.ndarray]:
        """Wait for these tensors only, not for work enqueued later, and return them."""
        return [tensor.numpy() for tensor in self.tensors()]

    def tensors(self) -> list[Tensor]:
        """Same as `wait`, but return CPU tensors of any dtype; from CUDA in pinned memory."""
        if self._arrived is not None:
            self._arrived.synchronize()
            self._arrived = None
        return self._on_cpu
