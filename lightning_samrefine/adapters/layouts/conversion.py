"""Converts what was found: images to RGB, scores to probabilities, targets to labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from lightning_samrefine.adapters.denormalize import Denormalize
from lightning_samrefine.adapters.layouts.overlapping import (
    repeated,
    scores_by_class,
    targets_by_class,
)
from lightning_samrefine.adapters.layouts.padding import RealParts
from lightning_samrefine.adapters.nested import Samples
from lightning_samrefine.adapters.scores import ScoresKind, probs_behind_labels, to_probs
from lightning_samrefine.adapters.target_values import to_labels


@dataclass(frozen=True)
class FoundTensors:
    """The tensors of each role, on one device.

    Attributes:
        image: (B, c, H, W), or B × (c, H, W).
        scores: (B, C, h, w) and the like, or a list.
        target: (B, H, W) and the like, a list, or None.
        captured: Scores of the network behind label maps, or None.
    """

    image: Samples
    scores: Samples
    target: Samples | None
    captured: Tensor | None

    def by_class(self, num_classes: int) -> FoundTensors:
        """Return the B · C binary maps of overlapping classes."""
        captured = None if self.captured is None else scores_by_class(self.captured)
        return FoundTensors(
            repeated(self.image, num_classes),
            scores_by_class(self.scores),
            None if self.target is None else targets_by_class(self.target, num_classes),
            captured if isinstance(captured, Tensor) else None,
        )


@dataclass(frozen=True)
class Converted:
    """Converted tensors, see `RefineInputs`.

    Attributes:
        images: (B, 3, H, W) uint8 RGB.
        probs: (B, C, H, W) float32.
        labels: (B, H, W) int64.
        targets: (B, H, W) int64, or None.
        has_network_probs: (B,) bool, label maps with the network's probabilities, or None.
    """

    images: Samples
    probs: Samples
    labels: Samples
    targets: Samples | None
    has_network_probs: Tensor | None


def convert(
    found: FoundTensors,
    kind: ScoresKind,
    num_classes: int,
    rgb: Denormalize,
    padding: RealParts | None = None,
    overlapping: bool = False,
) -> Converted:
    """Convert tensors, and cut the padding off.

    Args:
        found: The tensors.
        kind: Kind of scores; of one map with overlapping classes.
        num_classes: C.
        rgb: Converts images.
        padding: The real parts of a padded batch.
        overlapping: Whether each class is a binary map of its own.

    Raises:
        ValueError: Shapes, numbers or values that do not fit.
    """
    real = found.image if padding is None else padding.cut(found.image)
    images = _to_rgb(real, rgb)
    if overlapping:
        found = found.by_class(num_classes)
        images, real = repeated(images, num_classes), repeated(real, num_classes)
        if padding is not None:
            padding = replace(padding, boxes=repeated(padding.boxes, num_classes))
        num_classes = 2
    _check_numbers(found, len(images))
    probs, labels = _to_probs(found, real, kind, num_classes)
    if len(probs) != len(images):
        copies = (
            ": copies along the batch, as of test-time augmentation, must be merged into one, "
            "for example by a step that returns {'logits': merged}"
        )
        raise ValueError(
            f"scores must be of the image's {len(images)} samples, got {len(probs)}"
            + (copies if len(images) and len(probs) % len(images) == 0 else "")
        )
    target, has_network_probs = found.target, None
    if found.captured is not None:
        probs, has_network_probs = probs_behind_labels(
            probs, labels, found.scores, kind, found.captured
        )
    if padding is not None:
        probs, labels = padding.cut(probs), padding.cut(labels)
        target = None if target is None else padding.cut(target)
    targets: Samples | None = None
    if isinstance(target, Tensor) and isinstance(labels, Tensor):
        targets = to_labels(target, labels)
    elif target is not None:
        pairs = zip(target, labels, strict=True)
        targets = [to_labels(one[None], own[None])[0] for one, own in pairs]
    return Converted(images, probs, labels, targets, has_network_probs)


def _check_numbers(found: FoundTensors, images: int) -> None:
    given = [one for one in (found.image, found.scores, found.target) if one is not None]
    numbers = [images, *(len(one) for one in given[1:])]
    if not all(isinstance(one, Tensor) for one in given) and len(set(numbers)) > 1:
        raise ValueError(
            "image, scores and target must have equal numbers of samples, got "
            f"{', '.join(map(str, numbers))}"
        )


def _to_rgb(image: Samples, rgb: Denormalize) -> Samples:
    if isinstance(image, Tensor):
        return rgb(image)
    rgb.settle(image)
    return [rgb(one[None])[0] for one in image]


def _to_probs(
    found: FoundTensors, real: Sequence[Tensor] | Tensor, kind: ScoresKind, num_classes: int
) -> tuple[Samples, Samples]:
    """Convert scores of the padded images, or in a list those of the real parts."""
    scores = found.scores
    if isinstance(scores, Tensor):
        sizes = {tuple(one.shape[-2:]) for one in found.image}
        if len(sizes) <= 1:
            height, width = next(iter(sizes), tuple(scores.shape[-2:]))
            return to_probs(scores.detach(), kind, num_classes, (height, width))
    parts = []
    for one, padded, own in zip(scores, found.image, real, strict=True):
        of = padded if one.shape[-2:] == padded.shape[-2:] else own
        hw = (of.shape[-2], of.shape[-1])
        parts.append(to_probs(one.detach()[None], kind, num_classes, hw))
    return [probs[0] for probs, _ in parts], [labels[0] for _, labels in parts]
