"""Detects whether tensors have changed, if possible without reading them."""

from __future__ import annotations

import weakref
import zlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class Identity:
    """Equal for one and the same tensor, alive and not written to since."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = weakref.ref(tensor)
        self._version = _version(tensor)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Identity) or self._version != other._version:
            return False
        tensor = self._tensor()
        return tensor is not None and tensor is other._tensor()


def all_weights(*modules: nn.Module) -> list[Tensor]:
    """Return all parameters and buffers, those that modules share as often as they do.

    Called for every image; torch's own walk, which makes names, takes ten times as long.
    """
    found: list[Tensor | None] = []
    waiting: list[nn.Module | None] = list(modules)
    seen: set[nn.Module] = set()
    while waiting:
        module = waiting.pop()
        if module is None or module in seen:
            continue
        seen.add(module)
        found.extend(module._parameters.values())
        found.extend(module._buffers.values())
        waiting.extend(module._modules.values())
    return [tensor for tensor in found if tensor is not None]


def stamp(tensors: Iterable[Tensor]) -> tuple[tuple[Any, ...], ...]:
    """Return a value that changes when one of them is replaced, moved or written to.

    Torch counts what is written to a tensor, but not what is written through its ``.data``, as some
    averages of weights do: `checksums` sees that too.
    """
    return tuple((t.data_ptr(), t.device, _version(t)) for t in tensors)


def checksums(tensors: Iterable[Tensor]) -> tuple[int, ...]:
    """Return a CRC-32 of each tensor's content: 4 GB/s on a CPU core."""
    return tuple(zlib.crc32(raw_bytes(tensor)) for tensor in tensors)


def raw_bytes(tensor: Tensor) -> memoryview:
    """Return the content of a tensor on any device, row by row."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _version(tensor: Tensor) -> int:
    try:
        return tensor._version
    except RuntimeError:  # Inference tensors keep no count, nor can others write to them.
        return 0
