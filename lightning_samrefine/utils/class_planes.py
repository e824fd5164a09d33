"""Arithmetic on maps of one plane a class."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor


def class_parts(maps: Tensor) -> Iterator[slice]:
    """Yield slices of (C, H, W) maps that are worth computing at once.

    One class at a time stays in a CPU's cache; a GPU takes all of them.
    """
    at_once = 1 if maps.device.type == "cpu" else len(maps)
    for start in range(0, len(maps), at_once):
        yield slice(start, start + at_once)


def normalize_(maps: Tensor) -> Tensor:
    """Divide (C, H, W) maps in place by their sum over the classes, where it is not 0."""
    total = maps.sum(dim=0)
    return maps.div_(total.masked_fill_(total == 0, 1))
