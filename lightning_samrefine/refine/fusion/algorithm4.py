"""Acceptance and fusion of the published algorithm: steps 8 to 12.

Algorithm 4, "Optimized SAM Refinement", is `sam_refinement` of Trident with its prompts in batches:
Shi et al., "Harnessing Vision Foundation Models for High-Performance, Training-Free Open Vocabulary
Segmentation" (ICCV 2025, arXiv 2411.09219). The steps are numbered in docs/algorithm4.md.
"""

from __future__ import annotations

import numpy as np

from lightning_samrefine.config import RefineConfig
from lightning_samrefine.models.base import Promptable
from lightning_samrefine.refine.class_filter import accepted_regions
from lightning_samrefine.refine.fusion.map_refinement import MapRefinement
from lightning_samrefine.refine.fusion.upscaling import WindowedUpscale
from lightning_samrefine.refine.predictions import MaskPredictions, refinement, region_table
from lightning_samrefine.refine.results import Refinement


def fuse_by_algorithm4(
    answers: MaskPredictions, config: RefineConfig, sam: Promptable
) -> Refinement:
    """Accept masks by their predicted IoU and let them compete pixel by pixel.

    Args:
        answers: About every region of the image; they are not changed.
        config: τ_iou and the stride.
        sam: Brings masks to full resolution.
    """
    probs, labels, regions = answers.probs, answers.labels, answers.regions
    accepted = accepted_regions(config, regions.classes, answers.pred_iou)
    table = region_table(answers, answers.pred_iou, accepted, config.stride)
    if not accepted.any():  # steps 4 and 8
        return refinement(table, labels, probs)

    fused = MapRefinement(probs, labels)
    windowed = None if answers.extents is None else WindowedUpscale.of(sam, answers.image_hw)
    for index in np.flatnonzero(accepted):
        c, mask = int(regions.classes[index]), answers.low_res_logits[index]
        if windowed is None:
            fused.add(sam.postprocess_masks(mask[None], answers.image_hw)[0], c)
        else:
            logits, window = windowed(mask, answers.extents[index])
            if window:
                fused.add(logits, c, window)
    failed = None if accepted.all() else regions.mask_of(~accepted)
    return refinement(table, *fused.finish(failed))
