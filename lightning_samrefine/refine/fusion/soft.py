"""Fusion without a hard cut: masks vote for classes, and neighbors of one color agree."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from lightning_samrefine.config import RefineConfig
from lightning_samrefine.models.base import Promptable
from lightning_samrefine.refine.acceptance import accepted_regions
from lightning_samrefine.refine.fusion.color_model import color_ratios, weigh_by_color
from lightning_samrefine.refine.fusion.crf import REACH, smooth
from lightning_samrefine.refine.fusion.looks import (
    image_maps,
    image_regions,
    look_regions,
    looks_at_once,
)
from lightning_samrefine.refine.fusion.mask_votes import (
    MaskVotes,
    class_parts,
    inside_any,
    masks_at,
    on_mask_grid,
    support_factors,
    weigh,
)
from lightning_samrefine.refine.fusion.strips import fuse_strips
from lightning_samrefine.refine.mask_predictions import ImagePredictions, MaskPredictions
from lightning_samrefine.refine.mask_proposals import CompressedMasks, MaskProposals
from lightning_samrefine.refine.results import Refinement, WindowRegions
from lightning_samrefine.utils.device import upload

# Factor of a class without support by regions' masks, in multiples of the ``unsupported_weight``:
# beside mask proposals, these have voted among all masks before.
_SECOND_FLOOR = 10


def fuse_soft(
    predictions: ImagePredictions, config: RefineConfig, sam: Promptable, with_probs: bool = True
) -> Refinement:
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
        with_probs: Whether the refinement has probabilities.

    Raises:
        ValueError: Predictions without the masks of prompted regions, made for another fusion.
    """
    raw = predictions.raw

    @lru_cache(looks_at_once(predictions, REACH))
    def votes(index: int) -> _Votes:
        return _votes(predictions.looks[index], config)

    # Of a large image they are computed again when its strips are fused, for all are too many.
    each = [(own.regions, own.has_masks) for own in map(votes, range(len(predictions.looks)))]
    table = image_regions(predictions, [regions for regions, _ in each])
    if not any(has_masks for _, has_masks in each):
        return Refinement.of(table, raw.labels, raw.probs if with_probs else None)
    probs, image, height = raw.probs, raw.image.to(raw.probs.device), raw.image_hw[0]
    factors = image_maps(predictions, lambda index: votes(index).factors)
    inside = image_maps(predictions, lambda index: votes(index).inside)
    ratios: Tensor | None = None
    if config.color_weight and len(table) > 0:
        ratios = color_ratios(probs, image, config.stride)

    def fuse_rows(rows: slice) -> tuple[Tensor, Tensor]:
        # With the neighbors that smoothing reaches.
        reach = REACH if config.crf_weight else 0
        start = max(0, rows.start - reach)
        wide = slice(start, min(height, rows.stop + reach))
        refined, colors = probs[:, wide], image[:, wide]
        if ratios is not None:
            refined = weigh_by_color(refined, colors, ratios, config.color_weight)
        refined = weigh(refined, factors, wide)
        if config.crf_weight:
            refined = smooth(refined, colors, config.crf_weight)
        refined = refined[:, rows.start - start : rows.stop - start]
        own = inside.rows(rows)[0]
        for part in class_parts(refined):
            torch.where(own > 0, refined[part], probs[part, rows], out=refined[part])
        return refined, own > 0.5

    return Refinement.of(table, *fuse_strips(raw, fuse_rows, with_probs))


@dataclass(frozen=True)
class _Votes:
    """The votes of the masks of one look.

    Attributes:
        regions: The prompted regions.
        factors: (C, h, w) float32, the factor of each class.
        inside: (1, h, w) float32, the largest σ of any mask.
        has_masks: Whether there is any.
    """

    regions: WindowRegions
    factors: Tensor
    inside: Tensor
    has_masks: bool


def _votes(look: MaskPredictions, config: RefineConfig) -> _Votes:
    """Collect the votes of one look's masks."""
    regions, probs = look.regions, look.raw.probs
    votes: list[MaskVotes] = []
    pred_iou, accepted = look.pred_iou, np.zeros(len(regions), dtype=bool)
    masks: MaskProposals | CompressedMasks | None = None
    small: Tensor | None = None
    proposals = look.mask_proposals
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
        masks = look.region_masks
        if masks is None:
            raise ValueError(
                "predictions must have packed masks of their regions for an unsupported_weight "
                "above 0, got None"
            )
        if small is None:
            small = on_mask_grid(probs, masks.mask_hw)
        unpacked, beside = masks.decompressed(), votes[0] if votes else None
        votes.append(MaskVotes.of_regions(unpacked, regions.classes, accepted, small, beside))
    floors = (config.unsupported_weight, _SECOND_FLOOR * config.unsupported_weight)
    table = look_regions(look, config.stride, accepted, pred_iou, masks)
    if not votes:
        return _Votes(
            table, probs.new_full((len(probs), 1, 1), floors[0]), probs.new_zeros(1, 1, 1), False
        )
    factors = support_factors(votes, floors[: len(votes)])
    return _Votes(table, factors, inside_any(votes), True)
