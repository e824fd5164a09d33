"""The result of a refinement: new labels and probabilities, and every region with its outcome."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_samrefine.refine.regions import RegionSet
from lightning_samrefine.utils.device import upload


@dataclass(frozen=True)
class Region:
    """One prompted region, in plain Python numbers.

    Attributes:
        class_index: Class in [0, C).
        box: (x_min, y_min, x_max, y_max) in image pixels: the first and last row and column of the
            working grid that the region touches, times the stride.
        point: The positive click, (x, y) in image pixels.
        score: Mean raw probability of the class over the region, in [0, 1].
        pred_iou: SAM's predicted IoU. If regions are not prompted, that of the best mask proposal
            which lies on the point and stands for the region's class; 0 without one.
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
        masks: (N, h, w) bool on SAM's device, SAM's masks at its own low resolution, cropped to the
            part of the frame that the image fills. None without masks.
        left_out: Number of further regions, beyond ``max_regions``.
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

    Attributes:
        labels: (H, W) int64, S'.
        probs: (C, H, W) float32, the probabilities that the labels come from. At refined pixels
            they sum to 1 and the label is their argmax; all other pixels have the raw
            probabilities. Refined are, with an ``unsupported_weight`` (presets ``default`` and
            ``fast``), the pixels that a mask reaches, and in Algorithm 4 the covered ones.
        covered: (H, W) bool, in Algorithm 4 Σ_c L'_c > 0 as step 10 leaves it: an accepted mask
            lies on the pixel, and the raw probability of its class there is above 0. With an
            ``unsupported_weight``: a mask proposal or an accepted region's mask lies on it. With
            fitted ``weights``: everywhere, for every pixel is fused.
        pred_iou: (N,) float32, Q.
        boxes: (N, 4) float32 XYXY in image pixels, B'; see `Region`.
        classes: (N,) int64 in [0, C).
        regions: Every prompted region, accepted or not.
        literal_probs: (C, H, W) float32, L' of Algorithm 4 as published: not normalized, and 0 for
            every class at a pixel that is neither covered nor in a rejected region; the raw
            probabilities if no region was accepted. None with an ``unsupported_weight``.
        control: (H, W) int64, the labels of the fitted fusion without SAM, for comparison; None
            if nothing is fitted.
    """

    labels: Tensor
    probs: Tensor
    covered: Tensor
    pred_iou: Tensor
    boxes: Tensor
    classes: Tensor
    regions: Regions
    literal_probs: Tensor | None = None
    control: Tensor | None = None

    @classmethod
    def of(
        cls,
        regions: Regions,
        labels: Tensor,
        probs: Tensor,
        covered: Tensor | None = None,
        literal_probs: Tensor | None = None,
    ) -> Refinement:
        """Put a result together; the accepted regions are listed once more.

        Args:
            regions: Every prompted region.
            labels: As above.
            probs: As above.
            covered: As above; None if no pixel is.
            literal_probs: As above.
        """
        if covered is None:
            covered = torch.zeros_like(labels, dtype=torch.bool)
        kept = regions.accepted
        return cls(
            labels=labels,
            probs=probs,
            covered=covered,
            pred_iou=upload(regions.pred_iou[kept], probs.device),
            boxes=upload(regions.boxes[kept], probs.device),
            classes=upload(regions.classes[kept], probs.device),
            regions=regions,
            literal_probs=literal_probs,
        )


def region_table(
    regions: RegionSet,
    image_hw: tuple[int, int],
    stride: int,
    pred_iou: Tensor,
    accepted: np.ndarray,
    masks: Tensor | None,
) -> Regions:
    """Bring N regions from the working grid to image pixels (step 12).

    Args:
        regions: On the working grid.
        image_hw: (H, W).
        stride: r.
        pred_iou: (N,) float32 on the CPU.
        accepted: (N,) bool.
        masks: (N, h, w) bool, or None.
    """
    height, width = image_hw
    extents = (regions.boxes + np.array([0, 0, 1, 1])) * stride
    return Regions(
        classes=torch.from_numpy(regions.classes),
        boxes=torch.from_numpy((regions.boxes * stride).astype(np.float32)),
        extents=torch.from_numpy(
            np.minimum(extents, [width, height, width, height]).astype(np.float32)
        ),
        points=torch.from_numpy((regions.points * stride).astype(np.float32)),
        scores=torch.from_numpy(regions.scores),
        pred_iou=pred_iou,
        accepted=torch.from_numpy(accepted),
        masks=masks,
        left_out=regions.left_out,
    )
