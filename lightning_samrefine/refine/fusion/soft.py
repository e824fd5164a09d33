"""Fusion without a hard cut: masks vote for classes, and neighbors of one color agree."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lightning_samrefine.config import RefineConfig
from lightning_samrefine.models.base import Promptable
from lightning_samrefine.refine.acceptance import accepted_regions
from lightning_samrefine.refine.fusion.color_model import weigh_by_color
from lightning_samrefine.refine.fusion.crf import smooth
from lightning_samrefine.refine.fusion.mask_votes import (
    MaskVotes,
    class_parts,
    inside_any,
    masks_at,
    mean_probs,
    on_mask_grid,
    weigh,
)
from lightning_samrefine.refine.mask_predictions import MaskPredictions
from lightning_samrefine.refine.mask_proposals import MaskProposals
from lightning_samrefine.refine.raw_prediction import first_argmax
from lightning_samrefine.refine.regions import RegionSet
from lightning_samrefine.refine.results import Refinement, region_table
from lightning_samrefine.utils.device import upload

# Factor of a class without support by regions' masks, in multiples of the ``unsupported_weight``:
# beside mask proposals, these have voted among all masks before.
_SECOND_FLOOR = 10


def fuse_soft(predictions: MaskPredictions, config: RefineConfig, sam: Promptable) -> Refinement:
    """Fuse mask proposals, the masks of prompted regions, or both.

    With both, the masks of accepted regions count twice: among all masks, and in a factor of their
    own. A rejected region's mask counts for nothing. A pixel that no mask reaches keeps its raw
    probabilities: colors and smoothing follow masks and change nothing by themselves. So accepting
    a region has an effect under its mask and within the three pixels of smoothing around it only.

    If regions are not prompted, a region's predicted IoU is that of the best mask proposal that
    stands for its class at its most probable pixel, 0 without one; it is reported, not used.

    Args:
        predictions: With packed masks of the regions if these are prompted; they are not changed.
        config: Its ``unsupported_weight`` is above 0.
        sam: Not used; masks stay on the model's low-resolution grid.

    Raises:
        ValueError: Predictions without the masks of prompted regions, made for another fusion.
    """
    raw, regions = predictions.raw, predictions.regions
    probs, labels = raw.probs, raw.labels
    evidence = probs
    if config.color_weight and len(regions) > 0:
        evidence = weigh_by_color(probs, raw.image, config.color_weight, config.stride)
    votes: list[MaskVotes] = []
    pred_iou, masks, accepted = predictions.pred_iou, None, np.zeros(len(regions), dtype=bool)
    small: Tensor | None = None
    proposals = predictions.mask_proposals
    if proposals is not None and len(proposals) > 0:
        small = on_mask_grid(probs, proposals.mask_hw)
        from_image, stands_for = MaskVotes.of_image(proposals, small)
        votes.append(from_image)
        if not config.prompt_regions:
            points = upload(regions.relative_points(), probs.device)
            classes = upload(regions.classes, probs.device)
            found, masks = masks_at(proposals, stands_for, points, classes)
            pred_iou = found.cpu()
    if len(regions) > 0:
        accepted = accepted_regions(config, regions.classes, pred_iou)
    if config.prompt_regions and len(regions) > 0:
        own = predictions.region_masks
        if own is None:
            raise ValueError(
                "predictions must have packed masks of their regions for an unsupported_weight "
                "above 0, got None"
            )
        mask_probs = own.probs()
        masks = mask_probs > 0.5
        if small is None:
            small = on_mask_grid(probs, own.mask_hw)
        votes = _with_regions(votes, regions, own, mask_probs, accepted, small)
    table = region_table(regions, raw.image_hw, config.stride, pred_iou, accepted, masks)
    if not votes:
        return Refinement.of(table, labels, probs)
    floors = (config.unsupported_weight, _SECOND_FLOOR * config.unsupported_weight)
    refined, covered = weigh(evidence, votes, floors[: len(votes)])
    if config.crf_weight:
        refined = smooth(refined, raw.image, config.crf_weight)
    reached = inside_any(votes, labels.shape) > 0
    for part in class_parts(refined):
        torch.where(reached, refined[part], probs[part], out=refined[part])
    best = first_argmax(refined)
    unknown = (labels < 0) | (labels >= len(probs))
    # Labels that are not the probabilities' argmax stay if the refinement changes nothing.
    raw_best = labels if raw.labels_are_argmax else first_argmax(probs)
    changed = torch.where(unknown, covered, best != raw_best)
    return Refinement.of(table, torch.where(changed, best, labels), refined, covered)


def _with_regions(
    votes: list[MaskVotes],
    regions: RegionSet,
    masks: MaskProposals,
    mask_probs: Tensor,
    accepted: np.ndarray,
    small: Tensor,
) -> list[MaskVotes]:
    """Add the votes of accepted regions' masks.

    Args:
        votes: Of the mask proposals, or none.
        regions: N of them.
        masks: Theirs.
        mask_probs: (N, h_n, w_n) float32, σ of all regions' masks.
        accepted: (N,) bool.
        small: (C, h_n, w_n) float32, the raw probabilities on the grid of masks.
    """
    device = mask_probs.device
    classes, pred_iou = upload(regions.classes, device), masks.pred_iou
    # Of all masks, for the rounding of a product depends on their number.
    purity = mean_probs(mask_probs, small).gather(0, classes[None])[0]
    if not accepted.all():
        chosen = upload(np.flatnonzero(accepted), device)
        mask_probs, classes = mask_probs[chosen], classes[chosen]
        pred_iou, purity = pred_iou[chosen], purity[chosen]
    num_classes = len(small)
    own = MaskVotes.of_regions(mask_probs, pred_iou * purity, classes, num_classes)
    together = [others.with_regions(mask_probs, pred_iou, purity, classes) for others in votes]
    return [*together, own]
