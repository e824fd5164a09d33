"""Checks the output of a custom adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_samrefine.adapters.candidates import Found, Roles
from lightning_samrefine.adapters.nested import Samples, describe
from lightning_samrefine.adapters.scores import ScoresKind

# Rounding of a softmax in half precision.
_PROBS_TOLERANCE = 1e-3


def unpack(found: Any) -> tuple[Roles, ScoresKind]:
    """Return the roles and the kind of scores in a custom adapter's mapping.

    Raises:
        TypeError: Another object, or not exactly one of logits, probs and labels.
    """
    kinds: tuple[Literal["logits", "probs", "labels"], ...] = ("logits", "probs", "labels")
    given = [kind for kind in kinds if isinstance(found, Mapping) and found.get(kind) is not None]
    if len(given) != 1 or "image" not in found:
        raise TypeError(
            "adapter must return RefineInputs or a mapping with image, target and one of logits, "
            f"probs and labels, got {describe(found)}"
        )

    def at(key: str) -> Found | None:
        value = found.get(key)
        return None if value is None else Found("adapter", (key,), value)

    return Roles(at("image"), at("target"), at(given[0])), given[0]


def check_shapes(
    images: Samples, probs: Samples, labels: Samples, targets: Samples | None, num_classes: int
) -> None:
    """Raise if samples are of different numbers or sizes.

    Args:
        images: B × (3, H, W).
        probs: B × (C, H, W).
        labels: B × (H, W).
        targets: B × (H, W), or None.
        num_classes: C.

    Raises:
        ValueError: As described.
    """
    numbers = [len(one) for one in (images, probs, labels, targets) if one is not None]
    if len(set(numbers)) > 1:
        raise ValueError(
            "adapter: images, probs, labels and targets must have equal numbers of samples, got "
            f"{', '.join(map(str, numbers))}"
        )
    for index in range(len(images)):
        own_probs, own_labels = probs[index], labels[index]
        expected = (num_classes, *images[index].shape[-2:])
        if tuple(own_probs.shape) != expected or tuple(own_labels.shape) != expected[1:]:
            raise ValueError(
                f"adapter: probs and labels of sample {index} must be {expected} and "
                f"{expected[1:]}, got {tuple(own_probs.shape)} and {tuple(own_labels.shape)}"
            )
        if targets is not None and targets[index].shape != own_labels.shape:
            raise ValueError(
                f"adapter: the target of sample {index} must be {expected[1:]}, got "
                f"{tuple(targets[index].shape)}"
            )


def checked_image(image: Tensor) -> Tensor:
    """Return an image unchanged.

    Raises:
        ValueError: Not uint8 RGB, (..., 3, H, W).
    """
    if image.dtype != torch.uint8 or image.shape[-3] != 3:
        raise ValueError(
            f"adapter: images must be uint8 RGB (3, H, W), 0 to 255, got {image.dtype} "
            f"{tuple(image.shape)}; an adapter that returns a mapping with 'image' has it converted"
        )
    return image


def checked_probs(probs: Tensor) -> Tensor:
    """Return probabilities as float32 in [0, 1].

    Raises:
        ValueError: Not floats, or values outside [0, 1] by more than rounding.
    """
    if not probs.is_floating_point():
        raise ValueError(f"adapter: probs must be floats in [0, 1], got {probs.dtype}")
    probs = probs.float()
    # NaN and infinity concern single images, which keep their raw prediction.
    low, high = torch.stack(torch.aminmax(probs.nan_to_num(0, 0, 0))).tolist()
    if low < -_PROBS_TOLERANCE or high > 1 + _PROBS_TOLERANCE:
        raise ValueError(
            f"adapter: probs must be in [0, 1], got {low:.4g} to {high:.4g}; an adapter that "
            "returns a mapping with 'logits' has them converted"
        )
    return probs.clamp(0, 1)
