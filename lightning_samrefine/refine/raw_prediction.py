"""The first step: an image and its raw prediction, checked before any work is done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lightning_samrefine.models.transforms import antialiased
from lightning_samrefine.refine.windows import Window
from lightning_samrefine.utils.device import plain


@dataclass(frozen=True)
class RawPrediction:
    """An image and what a segmenter predicted for it.

    Attributes:
        image: (3, H, W) uint8 RGB.
        probs: (C, H, W) float32, L; `check_range` looks at their values.
        given_labels: (H, W) int64; None for the argmax of the probabilities.
    """

    image: Tensor
    probs: Tensor
    given_labels: Tensor | None = None

    @cached_property
    def labels(self) -> Tensor:
        """(H, W) int64, S; values outside [0, C) are unknown."""
        return first_argmax(self.probs) if self.given_labels is None else self.given_labels

    @property
    def image_hw(self) -> tuple[int, int]:
        """(H, W)."""
        return self.probs.shape[1], self.probs.shape[2]

    def part(self, window: Window) -> RawPrediction:
        """Return a window's view of it, whose argmax is computed when it is needed."""
        labels = self.given_labels
        return RawPrediction(
            window.of(self.image),
            window.of(self.probs),
            None if labels is None else window.of(labels),
        )

    def resized(self, hw: tuple[int, int]) -> RawPrediction:
        """Return it at a lower resolution (h, w)."""
        rows, columns = (
            torch.arange(size, device=self.probs.device) * length // size
            for size, length in zip(hw, self.image_hw, strict=True)
        )
        labels = labels_at(self.given_labels, self.probs, rows, columns)
        # A class at a time, for windows of a large image leave its probabilities where they are.
        probs = [antialiased(own[None], hw)[0].clamp(0, 1) for own in self.probs]
        image = antialiased(self.image, hw).round().clamp(0, 255)
        return RawPrediction(image.to(torch.uint8), torch.stack(probs), labels)


def read_predictions(
    images: Sequence[Tensor] | Tensor,
    probs: Sequence[Tensor] | Tensor,
    labels: Sequence[Tensor] | Tensor | None,
    device: torch.device,
) -> list[RawPrediction]:
    """Check B images with their raw predictions, each of its own size.

    Args:
        images: B × (3, H, W) uint8 RGB, on any device.
        probs: B × (C, H, W) float on ``device``.
        labels: B × (H, W) integer; the argmax of ``probs`` if None.
        device: SAM's.

    Raises:
        TypeError: A wrong type or dtype.
        ValueError: A wrong count, shape or device.
    """
    if len(probs) != len(images) or (labels is not None and len(labels) != len(images)):
        raise ValueError(
            f"images, probs and labels must be equally many, got {len(images)}, {len(probs)} and "
            f"{'None' if labels is None else len(labels)}"
        )
    read = []
    for index in range(len(images)):
        check_image_and_probs(images[index], probs[index], device)
        own = plain(probs[index]).float()
        given = None if labels is None else plain(checked_labels(labels[index], own))
        read.append(RawPrediction(plain(images[index]), own, given))
    return read


def check_image_and_probs(image: Tensor, probs: Tensor, device: torch.device) -> None:
    """Refuse an image or probabilities by type, shape or device; `check_range` looks at values."""
    for name, value in (("image", image), ("probs", probs)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch tensor, got {type(value).__name__}")
    if image.dtype != torch.uint8:
        raise TypeError(f"image must be of dtype uint8 (RGB, 0 to 255), got {image.dtype}")
    if image.ndim != 3 or image.shape[0] != 3 or image.numel() == 0:
        raise ValueError(f"image must be of shape (3, H, W), got {tuple(image.shape)}")
    if not probs.is_floating_point():
        raise TypeError(f"probs must be of a floating-point dtype, got {probs.dtype}")
    if probs.ndim != 3 or probs.shape[1:] != image.shape[1:] or probs.shape[0] == 0:
        raise ValueError(
            f"probs must be of shape (C, H, W) with the image's (H, W) = {tuple(image.shape[1:])}, "
            f"got {tuple(probs.shape)}"
        )
    if probs.device != device:
        raise ValueError(f"probs must be on SAM's device, {device}, got {probs.device}")


def checked_labels(labels: Tensor, probs: Tensor) -> Tensor:
    """Return (H, W) labels as int64 on the probabilities' device, or refuse them."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a torch tensor, got {type(labels).__name__}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels must be of an integer dtype, got {labels.dtype}")
    if labels.shape != probs.shape[1:]:
        raise ValueError(
            f"labels must be of shape (H, W) = {tuple(probs.shape[1:])}, that of the "
            f"probabilities, got {tuple(labels.shape)}"
        )
    return labels.to(device=probs.device, dtype=torch.int64)


def labels_at(labels: Tensor | None, probs: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return the labels of the pixels in some rows and columns, (h, w) int64.

    Args:
        labels: (H, W) int64; None for the argmax of ``probs``.
        probs: (C, H, W) float32.
        rows: (h,) int64.
        columns: (w,) int64.
    """
    if labels is None:
        return first_argmax(probs[:, rows[:, None], columns])
    return labels.index_select(0, rows).index_select(1, columns)


def first_argmax(probs: Tensor) -> Tensor:
    """Return the (H, W) int64 first class of the largest of (C, H, W) probabilities, no NaN."""
    if probs.device.type != "cpu":
        return probs.argmax(dim=0)
    # torch's own walks across the planes, which takes several times as long on a CPU.
    # Labels of one byte, which products and maxima write much faster than a masked fill.
    dtype = torch.uint8 if len(probs) <= 256 else torch.int32
    best = probs[0].clone()
    labels = torch.zeros(best.shape, dtype=dtype)
    for c in range(1, len(probs)):
        torch.maximum(labels, (probs[c] > best).to(dtype).mul_(c), out=labels)
        torch.maximum(best, probs[c], out=best)
    return labels.long()
