"""Finding tensors by role in whatever a dataloader, a step or a network returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

MAX_DEPTH = 3  # such as a tuple of dicts of dicts

Samples: TypeAlias = "Tensor | list[Tensor]"
"""One batched tensor, or a list with one tensor per image where sizes differ."""


@dataclass(frozen=True)
class Leaf:
    """A tensor, or a list of tensors, and the keys and indices that lead to it."""

    path: tuple[str | int, ...]
    value: Samples


def leaves(container: Any, path: tuple[str | int, ...] = ()) -> Iterator[Leaf]:
    """Yield the tensors of nested mappings, dataclasses, tuples and lists, in their order.

    Below the top, a list or tuple of nothing but tensors of 2 or 3 dimensions is one leaf: images
    of different sizes.
    """
    if isinstance(container, Tensor):
        yield Leaf(path, container)
    elif path and _is_sample_list(container):
        yield Leaf(path, list(container))
    elif len(path) < MAX_DEPTH:
        for key, value in entries(container):
            yield from leaves(value, (*path, key))


def find_named(
    container: Any, names: Sequence[str], fits: Callable[[Samples], bool]
) -> Samples | None:
    """Return the first fitting value under one of the names.

    An earlier name wins, then the shallower place, then the earlier one. Case does not matter.
    """
    found = list(leaves(container))
    for name in names:
        named = [leaf for leaf in found if leaf.path and str(leaf.path[-1]).lower() == name]
        for leaf in sorted(named, key=lambda leaf: len(leaf.path)):
            if fits(leaf.value):
                return leaf.value
    return None


def at_position(container: Any, index: int) -> Samples | None:
    """Return entry ``index`` of a tuple or list, where it is a tensor or a list of tensors."""
    if not isinstance(container, Sequence) or isinstance(container, str):
        return None
    return next((leaf.value for leaf in leaves(container) if leaf.path == (index,)), None)


def at_key(container: Any, key: str) -> Samples | None:
    """Return what lies under a user's key, such as ``"mask"``, ``"data.mask"`` or ``"1"``."""
    return next(
        (leaf.value for leaf in leaves(container) if ".".join(map(str, leaf.path)) == key), None
    )


def batch_size(container: Any) -> int:
    """Guess the number of samples from the first tensor; 1 where there is none."""
    sizes = (
        len(leaf.value)
        for leaf in leaves(container)
        if not isinstance(leaf.value, Tensor) or leaf.value.ndim > 0
    )
    return next(sizes, 1)


def describe(value: Any, depth: int = MAX_DEPTH) -> str:
    """Say what a value is: type, keys, shapes and dtypes, never its contents."""
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
    """Return a container's keys or indices with what is under them; none where it is none."""
    if isinstance(container, Mapping):
        return [(key if isinstance(key, int) else str(key), container[key]) for key in container]
    if is_dataclass(container) and not isinstance(container, type):
        return [(field.name, getattr(container, field.name)) for field in fields(container)]
    if isinstance(container, tuple) and hasattr(container, "_fields"):
        return list(zip(container._fields, container, strict=True))
    if isinstance(container, list | tuple):
        return list(enumerate(container))
    return []


def _is_sample_list(container: Any) -> bool:
    return (
        isinstance(container, list | tuple)
        and len(container) > 0
        and all(isinstance(item, torch.Tensor) and item.ndim in (2, 3) for item in container)
    )
