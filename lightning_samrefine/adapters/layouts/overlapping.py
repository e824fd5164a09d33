"""Overlapping classes: every class of an image becomes a binary map of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from lightning_samrefine.adapters.nested import Samples

Item = TypeVar("Item")


def repeated(samples: Sequence[Item] | Tensor, count: int) -> list[Item]:
    """Return each of B samples ``count`` times, without copies."""
    return [one for one in samples for _ in range(count)]


def scores_by_class(scores: Samples) -> Samples:
    """Return (B, C, h, w) scores, or B × (C, h, w), as B · C maps of one channel."""
    if isinstance(scores, Tensor):
        return scores.flatten(0, 1)[:, None]
    return [channel[None] for one in scores for channel in one]


def targets_by_class(target: Samples, num_classes: int) -> Samples:
    """Return multi-hot (B, C, H, W) targets, or B × (C, H, W), as B · C binary maps.

    Raises:
        ValueError: Another shape.
    """
    if not is_multi_hot(target, num_classes):
        shape = tuple(target.shape) if isinstance(target, Tensor) else tuple(target[0].shape)
        raise ValueError(
            f"target must be multi-hot (B, {num_classes}, H, W) with scores_kind='multilabel', got "
            f"shape {shape}"
        )
    if isinstance(target, Tensor):
        return target.flatten(0, 1)
    return [channel for one in target for channel in one]


def is_multi_hot(value: Samples, num_classes: int) -> bool:
    """Whether a value has the shape of a map for each class."""
    if isinstance(value, Tensor):
        return value.ndim == 4 and value.shape[1] == num_classes
    return all(one.ndim == 3 and len(one) == num_classes for one in value)


def overlaps(maps: Tensor) -> bool:
    """Whether maps (B, C, H, W) of 0 and 1 have several ones at a pixel."""
    return bool(((maps == 0) | (maps == 1)).all()) and bool((maps.sum(dim=1) > 1).any())


def labels_as_class(labels: Tensor, index: int) -> Tensor:
    """Return a binary map as labels of one class among many: its index for 1, -1 for 0."""
    return torch.where(labels == 1, index, torch.where(labels == 0, -1, labels))
