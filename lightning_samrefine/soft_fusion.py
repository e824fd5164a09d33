"""Fusion without a hard cut: masks support classes, and neighbours of one colour agree."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from lightning_samrefine.answers import Answers, refinement, region_table
from lightning_samrefine.class_gate import accepted_regions
from lightning_samrefine.config import RefineConfig
from lightning_samrefine.inputs import first_argmax
from lightning_samrefine.refinement import Refinement
from lightning_samrefine.smoothing import smooth
from lightning_samrefine.support import Support


def fuse_softly(answers: Answers, config: RefineConfig) -> Refinement:
    """Fuse image-driven masks, the masks of prompted regions, or both in turn.

    Where regions are not prompted, a region's predicted IoU is that of the best image-driven mask
    that stands for its class at its innermost pixel, 0 without one; it is then told, not used.

    Args:
        answers: About the image; they are not changed.
        config: Its ``soft_floor`` is above 0.
    """
    probs, labels, regions = answers.probs, answers.labels, answers.regions
    refined, covered = probs, torch.zeros_like(labels, dtype=torch.bool)
    pred_iou = answers.pred_iou if config.prompt_regions else torch.zeros(len(regions))
    if answers.image_masks is not None and len(answers.image_masks) > 0:
        support, votes = Support.of_image(answers.image_masks, probs)
        refined, covered = support.apply(refined, config.soft_floor)
        if not config.prompt_regions:
            points, classes = regions.relative_points(), torch.from_numpy(regions.classes)
            found, masks = votes.at(points.to(probs.device), classes.to(probs.device))
            pred_iou, answers = found.cpu(), replace(answers, masks=masks)
    accepted = accepted_regions(config, regions.classes, pred_iou)
    table = region_table(answers, pred_iou, accepted, config.stride)
    if config.prompt_regions and accepted.any():
        support = _support_of_regions(answers, accepted)
        refined, inside = support.apply(refined, config.soft_floor)
        covered = covered | inside
    if refined is probs:
        return refinement(table, labels, probs)
    if config.smoothing:
        refined = smooth(refined, answers.image, config.smoothing, config.stride)
    best = first_argmax(refined)
    unknown = (labels < 0) | (labels >= len(probs))
    # Labels that are not the probabilities' argmax stay where the refinement changes nothing.
    raw_best = labels if answers.labels_are_argmax else first_argmax(probs)
    changed = torch.where(unknown, covered, best != raw_best)
    return refinement(table, torch.where(changed, best, labels), refined, covered)


def _support_of_regions(answers: Answers, accepted: np.ndarray) -> Support:
    """Collect accepted regions' masks; a rejected region stands for itself."""
    regions = answers.regions
    device = regions.probs.device
    height, width = answers.masks.shape[1:]
    chosen = [answers.low_res_logits[index] for index in np.flatnonzero(accepted)]
    mask_probs = torch.stack(chosen)[:, :height, :width].sigmoid()
    own = None
    if not accepted.all():
        own = torch.zeros_like(regions.probs)
        for c in np.unique(regions.classes[~accepted]):
            own[c] = regions.mask_of(~accepted & (regions.classes == c))
    classes = torch.from_numpy(regions.classes[accepted]).to(device)
    return Support.of_regions(mask_probs, classes, len(regions.probs), own)
