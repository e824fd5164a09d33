"""Finds tensors in the nested containers that a dataloader, a step or a network returns."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import PurePath
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

MAX_DEPTH = 3  # such as a tuple of dicts of dicts

# Types that may have attributes or keys, but count as one value.
_OPAQUE = (
    str, bytes, int, float, complex, type(None), Tensor, np.ndarray, np.generic, nn.Module,
    PurePath, type, ModuleType,
)  # fmt: skip

Samples: TypeAlias = "Tensor | list[Tensor]"
"""One batched tensor, or a list with one tensor per image if sizes differ."""


@dataclass(frozen=True)
class Leaf:
    """A tensor, or a list of tensors, and its path of keys and indices."""

    path: tuple[str | int, ...]
    value: Samples


def leaves(container: Any, path: tuple[str | int, ...] = ()) -> Iterator[Leaf]:
    """Yield the tensors of nested mappings, sequences and objects, in their order.

    Below the top level, a list or tuple of only 2-D or 3-D tensors is one leaf: images of
    different sizes.
    """
    if isinstance(container, Tensor):
        yield Leaf(path, container)
    elif path and _is_sample_list(container):
        yield Leaf(path, list(container))
    elif len(path) < MAX_DEPTH:
        for key, value in entries(container):
            yield from leaves(value, (*path, key))


def named(container: Any, names: Sequence[str]) -> list[Leaf]:
    """Return the leaves under one of the names, in the order of the names; case-insensitive."""
    found = [leaf for leaf in leaves(container) if leaf.path]
    return [leaf for name in names for leaf in found if str(leaf.path[-1]).lower() == name]


def at_position(container: Any, index: int) -> Leaf | None:
    """Return entry ``index`` of a tuple or list, if it is a tensor or a list of tensors."""
    if not isinstance(container, Sequence) or isinstance(container, str):
        return None
    return next((leaf for leaf in leaves(container) if leaf.path == (index,)), None)


def at_key(container: Any, key: str) -> Leaf | None:
    """Return the leaf under a user's key, such as ``"mask"``, ``"data.mask"`` or ``"1"``."""
    return next((leaf for leaf in leaves(container) if ".".join(map(str, leaf.path)) == key), None)


def batch_size(container: Any) -> int:
    """Guess the number of samples from the first tensor; 1 without any."""
    sizes = (
        len(leaf.value)
        for leaf in leaves(container)
        if not isinstance(leaf.value, Tensor) or leaf.value.ndim > 0
    )
    return next(sizes, 1)


def describe(value: Any, depth: int = MAX_DEPTH) -> str:
    """Describe a value: type, keys, shapes and dtypes, never its contents."""
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"{dtype} {tuple(value.shape)}" if value.ndim else f"{dtype} scalar"
    if isinstance(value, str | bytes | int | float) or value is None:
        return "None" if value is None else type(value).__name__
    held = entries(value)
    if not held or depth == 0:
        return type(value).__name__
    shown = held[:12]
    inner = ", ".join(f"{key!r}: {describe(entry, depth - 1)}" for key, entry in shown)
    more = f", and {len(held) - len(shown)} more" if len(held) > len(shown) else ""
    return f"{type(value).__name__} of {{{inner}{more}}}"


def entries(container: Any) -> list[tuple[str | int, Any]]:
    """Return a container's keys or indices with their values; empty for other objects."""
    return [(key if isinstance(key, int) else str(key), value) for key, value in _items(container)]


@dataclass(frozen=True)
class Kept:
    """An entry of a container before a step: itself, its own entries, and a copy of its values."""

    value: Any
    held: dict[Any, Kept] | None
    values: Tensor | None


def snapshot(container: Any, depth: int = MAX_DEPTH) -> dict[Any, Kept] | None:
    """Record a container's entries, with copies of its maps' values; see `restore`."""
    if depth == 0:
        return None
    return {
        key: Kept(value, snapshot(value, depth - 1), _values_of_map(value))
        for key, value in _items(container)
    } or None


def restore(container: Any, kept: dict[Any, Kept] | None) -> Any:
    """Undo removals and in-place changes since `snapshot`; replaced entries stay replaced.

    On an accelerator the CPU waits once, for all tensors together.

    Returns:
        The container itself if nothing was removed or changed, else a shallow copy with the
        recorded entries.
    """
    return _restored(container, kept, _changed(kept))


def _restored(container: Any, kept: dict[Any, Kept] | None, changed: set[int]) -> Any:
    if kept is None:
        return container
    now = dict(_items(container))
    if isinstance(container, list) and len(container) < len(kept):
        now = {}  # the indices of the remaining entries have changed
    missing = {}
    for key, entry in kept.items():
        before = now.get(key, entry.value)
        whole = before
        if before is entry.value:
            whole = entry.values if id(entry) in changed else None
            whole = _restored(before, entry.held, changed) if whole is None else whole
        if key not in now or whole is not before:
            missing[key] = whole
    if not missing:
        return container
    if isinstance(container, list | tuple):
        values = [missing.get(key, now.get(key)) for key in kept]
        make: Any = type(container)
        return make(*values) if hasattr(container, "_fields") else make(values)
    copied = copy.copy(container)
    for key, value in missing.items():
        if hasattr(copied, "__setitem__"):
            copied[key] = value
        else:
            object.__setattr__(copied, key, value)  # dataclasses may be frozen
    return copied


def _values_of_map(value: Any) -> Tensor | None:
    """Return a copy of a tensor that may be an image or a target."""
    is_map = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_nested
    return value.detach().clone() if is_map and value.ndim >= 2 else None


def _changed(kept: dict[Any, Kept] | None) -> set[int]:
    """Return the ids of the entries whose tensors' values have changed."""
    by_device: dict[torch.device, list[tuple[Kept, Tensor]]] = {}
    found = set()
    for entry, values in _with_values(kept):
        if entry.value.shape != values.shape:
            found.add(id(entry))
        else:
            by_device.setdefault(entry.value.device, []).append((entry, values))
    for some in by_device.values():
        differ = torch.stack([_differs(entry.value, values) for entry, values in some]).tolist()
        found.update(id(entry) for (entry, _), differs in zip(some, differ, strict=True) if differs)
    return found


def _differs(now: Tensor, before: Tensor) -> Tensor:
    """Whether any value changed, () bool; NaN equals NaN."""
    return ((now != before) & ~((now != now) & (before != before))).any()


def _with_values(kept: dict[Any, Kept] | None) -> Iterator[tuple[Kept, Tensor]]:
    """Yield the entries with a copy of their values, and that copy."""
    for entry in (kept or {}).values():
        if entry.values is not None:
            yield entry, entry.values
        yield from _with_values(entry.held)


def _items(container: Any) -> list[tuple[Any, Any]]:
    """Return pairs of key and value: of mappings, sequences, and objects by their attributes."""
    if isinstance(container, Mapping):
        return [(key, container[key]) for key in container]
    if isinstance(container, tuple) and hasattr(container, "_fields"):
        return list(zip(container._fields, container, strict=True))
    if isinstance(container, list | tuple):
        return list(enumerate(container))
    if isinstance(container, _OPAQUE) or callable(container):
        return []
    try:
        return _attributes(container)
    except Exception:  # attributes of a foreign object may raise anything
        return []


def _attributes(container: Any) -> list[tuple[Any, Any]]:
    """Return pairs of key and value of an object: its keys, fields or public attributes."""
    if callable(getattr(container, "keys", None)) and hasattr(container, "__getitem__"):
        return [(key, container[key]) for key in container.keys()]  # noqa: SIM118 - no mapping
    if is_dataclass(container):
        names = [field.name for field in fields(container)]
    else:
        slots = getattr(type(container), "__slots__", ())
        attributes = getattr(container, "__dict__", ())
        names = [*([slots] if isinstance(slots, str) else slots), *attributes]
    public = (name for name in names if not name.startswith("_") and hasattr(container, name))
    return [(name, getattr(container, name)) for name in public]


def _is_sample_list(container: Any) -> bool:
    return (
        isinstance(container, list | tuple)
        and len(container) > 0
        and all(isinstance(item, torch.Tensor) and item.ndim in (2, 3) for item in container)
    )
