"""What SAM says about one image, between asking it and fusing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_samrefine.refine.mask_proposals import MaskProposals
from lightning_samrefine.refine.regions import GridRegions
from lightning_samrefine.refine.results import Refinement, Regions
from lightning_samrefine.utils.device import upload


@dataclass(frozen=True)
class MaskPredictions:
    """What SAM says about one image, before any of it is accepted.

    Attributes:
        image: (3, H, W) uint8 RGB.
        probs: (C, H, W) float32, the raw L.
        labels: (H, W) int64, the raw S.
        regions: N regions on the working grid.
        low_res_logits: The masks of prompted regions, N maps (m, m) float32; empty where regions
            are not prompted, or under an ``unsupported_weight``.
        pred_iou: (N,) float32 on the CPU; 0 where regions are not prompted.
        extents: (N, 2, m) bool, see `lightning_samrefine.refine.fusion.upscaling.extents`; None on
            a GPU.
        masks: (N, h_n, w_n) bool, the masks themselves; None without any.
        region_masks: The N masks of prompted regions under an ``unsupported_weight``, None
            otherwise.
        mask_proposals: Masks of the image alone, None where none were asked for.
        labels_are_argmax: Whether the labels are known to be the argmax of the probabilities.
    """

    image: Tensor
    probs: Tensor
    labels: Tensor
    regions: GridRegions
    low_res_logits: list[Tensor]
    pred_iou: Tensor
    extents: np.ndarray | None = None
    masks: Tensor | None = None
    region_masks: MaskProposals | None = None
    mask_proposals: MaskProposals | None = None
    labels_are_argmax: bool = False

    @property
    def image_hw(self) -> tuple[int, int]:
        """(H, W)."""
        return self.labels.shape[0], self.labels.shape[1]


def region_table(
    answers: MaskPredictions, pred_iou: Tensor, accepted: np.ndarray, stride: int
) -> Regions:
    """Bring regions from the working grid to image pixels (step 12).

    Args:
        answers: About the image.
        pred_iou: (N,) float32 on the CPU.
        accepted: (N,) bool.
        stride: r.
    """
    regions, (height, width) = answers.regions, answers.image_hw
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
        masks=answers.masks,
        left_out=regions.left_out,
    )


def refinement(
    table: Regions, labels: Tensor, probs: Tensor, covered: Tensor | None = None
) -> Refinement:
    """Put a result together (step 12).

    Args:
        table: The regions, of which the accepted ones are listed once more.
        labels: (H, W) int64, S'.
        probs: (C, H, W) float32, L'.
        covered: (H, W) bool; None where nothing is.
    """
    if covered is None:
        covered = torch.zeros_like(labels, dtype=torch.bool)
    kept = table.accepted
    return Refinement(
        labels=labels,
        probs=probs,
        covered=covered,
        pred_iou=upload(table.pred_iou[kept], probs.device),
        boxes=upload(table.boxes[kept], probs.device),
        classes=upload(table.classes[kept], probs.device),
        regions=table,
    )
