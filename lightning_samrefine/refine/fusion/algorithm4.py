"""The fusion of the published algorithm (docs/algorithm4.md, steps 8 to 12).

Algorithm 4, "Optimized SAM Refinement", is `sam_refinement` of Trident with its prompts in batches:
Shi et al., "Harnessing Vision Foundation Models for High-Performance, Training-Free Open Vocabulary
Segmentation" (ICCV 2025, arXiv 2411.09219).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_samrefine.config import RefineConfig
from lightning_samrefine.models.base import Promptable
from lightning_samrefine.refine.acceptance import accepted_regions
from lightning_samrefine.refine.mask_predictions import MaskPredictions
from lightning_samrefine.refine.results import Refinement, region_table

# Pixels of masks brought to full resolution at once, counted in the larger of image and input.
_PIXELS_AT_ONCE = 2**22


def fuse_by_algorithm4(
    predictions: MaskPredictions, config: RefineConfig, sam: Promptable, with_probs: bool = True
) -> Refinement:
    """Accept masks by their predicted IoU and let them compete pixel by pixel.

    Args:
        predictions: With the logits of every region; they are not changed.
        config: τ_iou and the stride.
        sam: Brings masks to full resolution.
        with_probs: Whether the refinement has probabilities.

    Raises:
        ValueError: Predictions without logits, made for another fusion.
    """
    raw, regions = predictions.raw, predictions.regions
    logits = predictions.low_res_logits
    if len(logits) != len(regions):
        raise ValueError(
            f"predictions must have logits of all {len(regions)} regions for unsupported_weight 0, "
            f"got {len(logits)}"
        )
    accepted = accepted_regions(config, regions.classes, predictions.pred_iou)
    rows, columns = sam.mask_hw(raw.image_hw)
    masks = torch.stack([own[:rows, :columns] > 0 for own in logits]) if len(logits) else None
    table = region_table(regions, raw.image_hw, config.stride, predictions.pred_iou, accepted)
    table = replace(table, masks=masks)
    if not accepted.any():  # steps 4 and 8
        return Refinement.of(table, raw.labels, raw.probs, literal_probs=raw.probs)

    fused = MapRefinement(raw.probs, raw.labels)
    chosen = np.flatnonzero(accepted).tolist()
    at_once = max(1, _PIXELS_AT_ONCE // max(raw.labels.numel(), sam.image_size**2))
    for start in range(0, len(chosen), at_once):
        part = chosen[start : start + at_once]
        upscaled = sam.postprocess_masks(torch.stack([logits[i] for i in part]), raw.image_hw)
        for index, own in zip(part, upscaled, strict=True):
            fused.add(own, int(regions.classes[index]))
    failed = None if accepted.all() else regions.mask_of(~accepted)
    labels, literal_probs, covered = fused.finish(failed)
    if not with_probs:
        return Refinement.of(table, labels, None, covered)
    return Refinement.of(table, labels, fused.probs(), covered, literal_probs)


class MapRefinement:
    """Collects accepted masks one at a time into L' and S' (step 10).

    Args:
        probs: (C, H, W) float32 in [0, 1], the raw L.
        labels: (H, W) int64, the raw S.
    """

    def __init__(self, probs: Tensor, labels: Tensor) -> None:
        self._raw = probs
        self._refined = torch.zeros_like(probs, memory_format=torch.contiguous_format)
        self._best = torch.zeros_like(probs[0])
        self._labels = labels.clone()
        self._last_class = 0

    def add(self, logits: Tensor, c: int) -> None:
        """Raise L'[c] to σ(logit) · L[c] where the (H, W) logit is positive and this is larger.

        Masks come in the order of their classes: so the lowest class wins a tie.

        Raises:
            ValueError: A class smaller than the last.
        """
        if c < self._last_class:
            raise ValueError(f"c must not be below {self._last_class}, the class before, got {c}")
        self._last_class = c
        # torch.where, not a product: a NaN of SAM must not reach the map.
        value = torch.where(logits > 0, logits.sigmoid() * self._raw[c], 0.0)
        torch.maximum(self._refined[c], value, out=self._refined[c])
        self._labels.masked_fill_(value > self._best, c)
        torch.maximum(self._best, value, out=self._best)

    def probs(self) -> Tensor:
        """Return (C, H, W) float32, L' of step 10 normalized where covered, and L elsewhere."""
        total = self._refined.sum(dim=0)
        normalized = self._refined / torch.where(total > 0, total, 1.0)
        return torch.where(self._best > 0, normalized, self._raw)

    def finish(self, failed: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the maps, L' raised to the raw probabilities inside rejected regions (step 11).

        As in the published code this changes no label: S' is that of step 10. ``failed`` is the
        union of the rejected regions on the working grid, (h_d, w_d) bool, or None without any.

        Returns:
            S' (H, W) int64, L' (C, H, W) float32 and the covered map (H, W) bool.
        """
        covered = self._best > 0
        if failed is None:
            return self._labels, self._refined, covered
        grid = failed[None, None].to(self._refined.dtype)
        inside = F.interpolate(grid, covered.shape, mode="nearest")[0, 0]
        return self._labels, torch.maximum(self._refined, self._raw * inside), covered
