"""Fusion without a hard cut: masks support classes, and neighbors of one color agree."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from lightning_samrefine.config import RefineConfig
from lightning_samrefine.refine.checks import first_argmax
from lightning_samrefine.refine.class_filter import accepted_regions
from lightning_samrefine.refine.fusion.color_model import weigh_by_color
from lightning_samrefine.refine.fusion.crf import smooth
from lightning_samrefine.refine.fusion.mask_votes import (
    MaskVotes,
    Planes,
    class_probs,
    inside_any,
    masks_at,
    planes_of,
    weigh,
)
from lightning_samrefine.refine.predictions import MaskPredictions, refinement, region_table
from lightning_samrefine.refine.results import Refinement
from lightning_samrefine.utils.class_planes import class_parts
from lightning_samrefine.utils.device import upload

# What a class keeps where the votes of regions lack it, in multiples of the
# ``unsupported_weight``: beside mask proposals, regions have voted among all of them before.
_SECOND_FLOOR = 10


def fuse_soft(answers: MaskPredictions, config: RefineConfig) -> Refinement:
    """Fuse image-driven masks, the masks of prompted regions, or both.

    With both, the masks of accepted regions count twice: among all masks, and in a term of their
    own. A rejected region's mask counts for nothing. A pixel that no mask reaches keeps its raw
    probabilities: colors and smoothing follow masks and do nothing by themselves.

    So a region's verdict matters under its mask and within the three pixels of smoothing around
    it, and nowhere else.

    Where regions are not prompted, a region's predicted IoU is that of the best image-driven mask
    that stands for its class at its innermost pixel, 0 without one; it is then told, not used.

    Args:
        answers: About the image; they are not changed.
        config: Its ``unsupported_weight`` is above 0.
    """
    probs, labels, regions = answers.probs, answers.labels, answers.regions
    votes: list[MaskVotes] = []
    evidence = probs
    by_image = answers.mask_proposals is not None and len(answers.mask_proposals) > 0
    if config.color_weight:
        evidence = weigh_by_color(probs, answers.image, config.color_weight, config.stride)
    masks = answers.mask_proposals if by_image else answers.region_masks
    planes = planes_of(evidence, masks.mask_hw) if masks is not None else None
    pred_iou = answers.pred_iou if config.prompt_regions else torch.zeros(len(regions))
    if by_image:
        support, stands_for = MaskVotes.of_image(answers.mask_proposals, planes)
        votes.append(support)
        if not config.prompt_regions:
            points = upload(regions.relative_points(), probs.device)
            classes = upload(regions.classes, probs.device)
            found, regions_masks = masks_at(answers.mask_proposals, stands_for, points, classes)
            pred_iou, answers = found.cpu(), replace(answers, masks=regions_masks)
    accepted = accepted_regions(config, regions.classes, pred_iou)
    if config.prompt_regions:
        mask_probs = answers.region_masks.probs()
        answers = replace(answers, masks=mask_probs > 0.5)
        votes = _with_regions(votes, answers, mask_probs, accepted, planes)
    table = region_table(answers, pred_iou, accepted, config.stride)
    if not votes:
        return refinement(table, labels, probs)
    floors = (config.unsupported_weight, _SECOND_FLOOR * config.unsupported_weight)
    refined, covered = weigh(evidence, votes, floors[: len(votes)])
    if config.crf_weight:
        refined = smooth(refined, answers.image, config.crf_weight)
    reached = inside_any(votes, labels.shape) > 0
    for part in class_parts(refined):
        torch.where(reached, refined[part], probs[part], out=refined[part])
    best = first_argmax(refined)
    unknown = (labels < 0) | (labels >= len(probs))
    # Labels that are not the probabilities' argmax stay where the refinement changes nothing.
    raw_best = labels if answers.labels_are_argmax else first_argmax(probs)
    changed = torch.where(unknown, covered, best != raw_best)
    return refinement(table, torch.where(changed, best, labels), refined, covered)


def _with_regions(
    votes: list[MaskVotes],
    answers: MaskPredictions,
    mask_probs: Tensor,
    accepted: np.ndarray,
    planes: Planes,
) -> list[MaskVotes]:
    """Add what the masks of accepted regions support.

    Args:
        votes: That of the image's masks, or nothing.
        answers: About the image.
        mask_probs: (N, h_n, w_n) float32, σ of all regions' masks.
        accepted: (N,) bool.
        planes: From `planes_of`.
    """
    regions, probs = answers.regions, answers.probs
    classes = upload(regions.classes, probs.device)
    pred_iou = upload(answers.region_masks.pred_iou, probs.device)
    # Of all masks, for a product rounds by how many there are.
    purity = class_probs(mask_probs, planes).gather(0, classes[None])[0]
    if not accepted.all():
        chosen = upload(np.flatnonzero(accepted), probs.device)
        mask_probs, classes = mask_probs[chosen], classes[chosen]
        pred_iou, purity = pred_iou[chosen], purity[chosen]
    said = MaskVotes.of_regions(mask_probs, pred_iou * purity, classes, len(probs))
    together = [support.with_regions(mask_probs, pred_iou, purity, classes) for support in votes]
    return [*together, said]
