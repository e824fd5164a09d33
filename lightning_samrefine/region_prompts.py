"""Prompts SAM with regions and collects its masks (docs/algorithm4.md, steps 5 to 7)."""

from __future__ import annotations

from dataclasses import replace

import torch

from lightning_samrefine.answers import Answers
from lightning_samrefine.config import RefineConfig
from lightning_samrefine.decoding import Decoded
from lightning_samrefine.image_masks import ImageMasks
from lightning_samrefine.models.protocol import Promptable, Prompts
from lightning_samrefine.prompts import build_prompts


def prompts_of(answers: Answers, config: RefineConfig, sam: Promptable) -> Prompts:
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
    answers: Answers, decoded: Decoded, config: RefineConfig, sam: Promptable
) -> Answers:
    """Add the masks that SAM predicted for an image's regions.

    Args:
        answers: Those about the image, without its regions' masks; they are not changed.
        decoded: The model's output for `prompts_of`.
        config: A ``soft_floor`` keeps the masks packed.
        sam: The model.
    """
    rows, columns = sam.mask_hw(answers.image_hw)
    if config.soft_floor:
        masks = ImageMasks(decoded.packed, decoded.pred_iou, (rows, columns))
        return replace(answers, pred_iou=decoded.pred_iou, region_masks=masks)
    inside = torch.stack([logits[:rows, :columns] > 0 for logits in decoded.low_res_logits])
    return replace(
        answers,
        low_res_logits=decoded.low_res_logits,
        pred_iou=decoded.pred_iou,
        extents=decoded.extents,
        masks=inside,
    )
