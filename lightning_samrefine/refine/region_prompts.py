"""Prompts SAM with regions and collects its masks (docs/algorithm4.md, steps 5 to 7)."""

from __future__ import annotations

from dataclasses import replace

import torch

from lightning_samrefine.config import RefineConfig
from lightning_samrefine.models.base import Promptable, Prompts
from lightning_samrefine.refine.decode import Decoded
from lightning_samrefine.refine.mask_proposals import MaskProposals
from lightning_samrefine.refine.predictions import MaskPredictions
from lightning_samrefine.refine.prompts import build_prompts


def prompts_of(answers: MaskPredictions, config: RefineConfig, sam: Promptable) -> Prompts:
    """Build the prompts of an image's N ≥ 1 regions."""
    return build_prompts(
        answers.regions,
        sam,
        answers.image_hw,
        config.score_thresh,
        config.mask_prompt_scale,
        config.mask_prompts,
    )


def with_masks(
    answers: MaskPredictions, decoded: Decoded, config: RefineConfig, sam: Promptable
) -> MaskPredictions:
    """Add the masks that SAM predicted for an image's regions.

    Args:
        answers: Those about the image, without its regions' masks; they are not changed.
        decoded: The model's output for `prompts_of`.
        config: An ``unsupported_weight`` keeps the masks packed.
        sam: The model.
    """
    rows, columns = sam.mask_hw(answers.image_hw)
    if config.unsupported_weight:
        masks = MaskProposals(decoded.packed, decoded.pred_iou, (rows, columns))
        return replace(answers, pred_iou=decoded.pred_iou, region_masks=masks)
    inside = torch.stack([logits[:rows, :columns] > 0 for logits in decoded.low_res_logits])
    return replace(
        answers,
        low_res_logits=decoded.low_res_logits,
        pred_iou=decoded.pred_iou,
        extents=decoded.extents,
        masks=inside,
    )
