"""From SAM's masks of one image to the features of the fitted fusion, and from weights to labels.

The votes are those of the soft fusion, of accepted regions alone. Frozen classes, which keep their
raw pixels, are chosen in `lightning_samrefine.fit.verdict`.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lightning_samrefine.config import RefineConfig
from lightning_samrefine.fusion_weights import FusionWeights, LogLinear
from lightning_samrefine.models.base import Promptable
from lightning_samrefine.refine.acceptance import accepted_regions
from lightning_samrefine.refine.class_filter import restore_frozen_classes
from lightning_samrefine.refine.fusion.color_model import color_bins, color_ratios
from lightning_samrefine.refine.fusion.features import FeatureMaps
from lightning_samrefine.refine.fusion.looks import image_maps, image_regions, look_regions
from lightning_samrefine.refine.fusion.mask_votes import MaskVotes, on_mask_grid
from lightning_samrefine.refine.fusion.strips import fuse_strips, strips
from lightning_samrefine.refine.mask_predictions import ImagePredictions, MaskPredictions
from lightning_samrefine.refine.raw_prediction import RawPrediction
from lightning_samrefine.refine.results import Refinement


def feature_maps(predictions: ImagePredictions, config: RefineConfig) -> FeatureMaps:
    """Collect what the features of one image are computed from.

    Args:
        predictions: SAM's masks; regions without an accepted mask have no votes.
        config: With ``weights``, and so with region prompts; it decides which masks are accepted.
    """
    probs, image = predictions.raw.probs, predictions.raw.image.to(predictions.raw.probs.device)
    ratios = color_ratios(probs, image, config.stride)
    bins = torch.empty(probs.shape[1:], dtype=torch.int16, device=probs.device)
    for rows in strips(probs):
        bins[rows] = color_bins(image[:, rows])
    votes = [_region_votes(look, config) for look in predictions.looks]
    return FeatureMaps(probs, ratios, bins, image_maps(predictions, votes.__getitem__))


def fuse_fitted(
    predictions: ImagePredictions,
    config: RefineConfig,
    sam: Promptable,
    with_probs: bool = True,
    maps: FeatureMaps | None = None,
) -> Refinement:
    """Fuse one image's masks by fitted weights.

    Every pixel is fused, whether a mask reaches it or not, and an unknown raw label is replaced.
    If the weights refine nothing, or only some classes, the other pixels keep their raw labels and
    probabilities.

    Args:
        predictions: With packed masks of the regions; they are not changed.
        config: Its ``weights`` are of the same classes.
        sam: Not used; masks stay on the model's low-resolution grid.
        with_probs: Whether the refinement has probabilities.
        maps: From `feature_maps`; computed if None.

    Raises:
        ValueError: Weights of other classes.
    """
    weights = config.weights
    assert isinstance(weights, FusionWeights)
    raw = predictions.raw
    looks = []
    for look in predictions.looks:
        accepted = accepted_regions(config, look.classes, look.pred_iou)
        looks.append(look_regions(look, config.stride, accepted, look.pred_iou, look.region_masks))
    table = image_regions(predictions, looks)
    if not weights.refine:
        return Refinement.of(table, raw.labels, raw.probs if with_probs else None)
    maps = maps or feature_maps(predictions, config)
    refined = Refinement.of(table, *_fuse(raw, maps, weights.fusion, with_probs))
    if not weights.frozen_classes:
        return refined
    refined_classes = np.setdiff1d(np.arange(len(raw.probs)), weights.frozen_classes).tolist()
    return restore_frozen_classes(refined, raw, refined_classes)


def control_labels(raw: RawPrediction, maps: FeatureMaps, weights: FusionWeights) -> Tensor:
    """Return the labels of the fusion without SAM, (H, W) int64: what is gained without it.

    Args:
        raw: The raw prediction.
        maps: Its features.
        weights: Their ``control`` is used, for all classes.
    """
    return _fuse(raw, maps, weights.control, with_probs=False)[0]


def _fuse(
    raw: RawPrediction, maps: FeatureMaps, weights: LogLinear, with_probs: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    def fuse_rows(rows: slice) -> tuple[Tensor, Tensor]:
        fused = maps.fuse(weights, rows)
        return fused, torch.ones_like(fused[0], dtype=torch.bool)

    return fuse_strips(raw, fuse_rows, with_probs)


def _region_votes(look: MaskPredictions, config: RefineConfig) -> Tensor:
    """Let the mask of every accepted region vote for its class, by predicted IoU and purity.

    Returns:
        (C, h, w) float32 in [0, 1], the largest vote of a class's masks; 0 without a mask.
    """
    probs, found = look.raw.probs, look.region_masks
    accepted = accepted_regions(config, look.classes, look.pred_iou)
    if found is None or not accepted.any():
        return probs.new_zeros(len(probs), 1, 1)
    small = on_mask_grid(probs, found.mask_hw)
    masks = found.decompressed()
    return MaskVotes.of_regions(masks, look.classes, accepted, small).classes
