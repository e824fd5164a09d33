"""What a refinement returns: the new labels, and every region with the reason for its fate."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Region:
    """One prompted region, in plain Python numbers.

    Attributes:
        class_index: Class in [0, C).
        box: (x_min, y_min, x_max, y_max) in image pixels, that of the first and last row and column
            of the working grid that the region touches, times the stride.
        point: The positive click, (x, y) in image pixels.
        score: Mean raw probability of the class over the region, in [0, 1].
        pred_iou: SAM's predicted IoU. Where regions are not prompted, that of the best
            image-driven mask which lies on the point and supports the region's class; 0 without
            one.
        accepted: Whether ``pred_iou`` passed the threshold.
    """

    class_index: int
    box: tuple[float, float, float, float]
    point: tuple[float, float]
    score: float
    pred_iou: float
    accepted: bool


@dataclass(frozen=True)
class Regions:
    """All N prompted regions of one image, in the order of docs/algorithm4.md, step 3.

    Everything but the masks is on the CPU.

    Attributes:
        classes: (N,) int64 in [0, C).
        boxes: (N, 4) float32 XYXY in image pixels, see `Region`.
        extents: (N, 4) float32 XYXY in image pixels with exclusive ends, clipped to the image: the
            pixels that the box's grid pixels cover.
        points: (N, 2) float32 XY in image pixels.
        scores: (N,) float32 in [0, 1], mean raw probability over the region.
        pred_iou: (N,) float32, SAM's predicted IoU, see `Region`.
        accepted: (N,) bool, ``pred_iou`` above the threshold.
        masks: (N, h, w) bool on SAM's device, the mask that SAM answered with at its own low
            resolution, cropped to the part of the frame that the image fills. None where SAM was
            not asked, or the masks were let go.
        left_out: How many more regions there were, which ``max_regions`` kept from being prompted.
    """

    classes: Tensor
    boxes: Tensor
    extents: Tensor
    points: Tensor
    scores: Tensor
    pred_iou: Tensor
    accepted: Tensor
    masks: Tensor | None = None
    left_out: int = 0

    def __len__(self) -> int:
        return self.classes.shape[0]

    def __getitem__(self, index: int) -> Region:
        return Region(
            class_index=int(self.classes[index]),
            box=tuple(self.boxes[index].tolist()),
            point=tuple(self.points[index].tolist()),
            score=float(self.scores[index]),
            pred_iou=float(self.pred_iou[index]),
            accepted=bool(self.accepted[index]),
        )

    def __iter__(self) -> Iterator[Region]:
        return (self[index] for index in range(len(self)))


@dataclass(frozen=True)
class Refinement:
    """The refined prediction of one image (docs/algorithm4.md, step 12).

    Tensors are on the device of the raw prediction. N counts the accepted regions.

    With an ``unsupported_weight`` (presets ``default`` and ``fast``) the probabilities of every
    pixel that a mask reaches sum to 1; all others are the raw ones.

    Attributes:
        labels: (H, W) int64, S'.
        probs: (C, H, W) float32, L' to the letter: 0 for every class where a pixel is neither
            covered nor in a rejected region. Equal to the raw probabilities if nothing was
            accepted at all. ``labels`` need not be their argmax.
        covered: (H, W) bool, Σ_c L'_c > 0 as step 10 leaves it: an accepted mask lies on the
            pixel, and the raw probability of its class there is above 0.
            With an ``unsupported_weight``: some mask, of the image or of an accepted region, lies
            on it.
        pred_iou: (N,) float32, Q.
        boxes: (N, 4) float32 XYXY in image pixels, B'; see `Region`.
        classes: (N,) int64 in [0, C).
        regions: Every prompted region, accepted or not.
    """

    labels: Tensor
    probs: Tensor
    covered: Tensor
    pred_iou: Tensor
    boxes: Tensor
    classes: Tensor
    regions: Regions

    def completed_probs(self, raw_probs: Tensor) -> Tensor:
        """Fill the pixels that L' leaves empty with the raw probabilities.

        Args:
            raw_probs: (C, H, W) float in [0, 1], the L that was refined.

        Returns:
            (C, H, W) float32: L' where any class is above 0, L elsewhere. Not renormalized.

        Raises:
            ValueError: A shape other than that of `probs`.
        """
        if raw_probs.shape != self.probs.shape:
            raise ValueError(
                f"raw_probs: got shape {tuple(raw_probs.shape)}, accepted is "
                f"{tuple(self.probs.shape)}, that of the refined probabilities"
            )
        empty = (self.probs <= 0).all(dim=0)
        return torch.where(empty, raw_probs.to(self.probs), self.probs)
