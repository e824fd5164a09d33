"""The result of a refinement: new labels and probabilities, and every region with its outcome."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lightning_samrefine.refine.mask_proposals import CompressedMasks, MaskProposals
from lightning_samrefine.refine.regions import RegionSet
from lightning_samrefine.refine.windows import Window
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

    Everything but the masks is on the CPU. With windows they come window by window; what several
    windows see of a region is a region in each of them.

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
            part of the frame that the image fills. None without masks, and with windows.
        left_out: Number of further regions, beyond ``max_regions``.
        windows: The same regions with their masks, window by window; empty without windows.
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
    windows: tuple[WindowRegions, ...] = ()

    @property
    def have_masks(self) -> bool:
        """Whether the masks are known, here or window by window."""
        return self.masks is not None or any(own.packed is not None for own in self.windows)

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
class WindowRegions:
    """The regions that were prompted in one window.

    Attributes:
        window: The part of the image.
        table: The regions in the window's pixels, without their masks.
        packed: Their masks; None without masks.
    """

    window: Window
    table: Regions
    packed: MaskProposals | CompressedMasks | None

    @property
    def regions(self) -> Regions:
        """The regions in the window's pixels, with their masks."""
        if self.packed is None:
            return self.table
        return replace(self.table, masks=self.packed.decompressed().inside())


@dataclass(frozen=True)
class Refinement:
    """The refined prediction of one image (docs/algorithm4.md, step 12).

    Tensors are on the device of the raw prediction. N counts the accepted regions.

    Attributes:
        labels: (H, W) int64, S'.
        probs: (C, H, W) float32, the probabilities that the labels come from; None if they were not
            wanted. At refined pixels they sum to 1 and the label is their argmax; all other pixels
            have the raw probabilities. Refined are, with an ``unsupported_weight`` (presets
            ``default`` and ``fast``), the pixels that a mask reaches, and in Algorithm 4 the
            covered ones.
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
    probs: Tensor | None
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
        probs: Tensor | None,
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
            pred_iou=upload(regions.pred_iou[kept], labels.device),
            boxes=upload(regions.boxes[kept], labels.device),
            classes=upload(regions.classes[kept], labels.device),
            regions=regions,
            literal_probs=literal_probs,
        )


def region_table(
    regions: RegionSet,
    image_hw: tuple[int, int],
    stride: int,
    pred_iou: Tensor,
    accepted: np.ndarray,
) -> Regions:
    """Bring N regions from the working grid to image pixels (step 12).

    Args:
        regions: On the working grid.
        image_hw: (H, W).
        stride: r.
        pred_iou: (N,) float32 on the CPU.
        accepted: (N,) bool.
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
        left_out=regions.left_out,
    )


def join_windows(windows: Sequence[WindowRegions]) -> Regions:
    """List the regions of all windows in the image's pixels."""

    def joined(name: str, of_xy: int = 0) -> Tensor:
        parts = []
        for own in windows:
            values = getattr(own.table, name)
            offset = torch.tensor([own.window.left, own.window.top] * of_xy)
            parts.append(values + offset if of_xy else values)
        return torch.cat(parts)

    return Regions(
        classes=joined("classes"),
        boxes=joined("boxes", of_xy=2),
        extents=joined("extents", of_xy=2),
        points=joined("points", of_xy=1),
        scores=joined("scores"),
        pred_iou=joined("pred_iou"),
        accepted=joined("accepted"),
        left_out=sum(own.table.left_out for own in windows),
        windows=tuple(windows),
    )


def scaled(table: Regions, source_hw: tuple[int, int], target_hw: tuple[int, int]) -> Regions:
    """Bring regions that were found at another resolution to that of the image."""
    if source_hw == target_hw:
        return table
    x, y = target_hw[1] / source_hw[1], target_hw[0] / source_hw[0]
    # In float64, so that the image's last row stays inside it.
    factors = torch.tensor([x, y], dtype=torch.float64)
    return replace(
        table,
        boxes=(table.boxes * factors.repeat(2)).float(),
        extents=(table.extents * factors.repeat(2)).float(),
        points=(table.points * factors).float(),
    )
