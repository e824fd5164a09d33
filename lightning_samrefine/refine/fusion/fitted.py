"""From SAM's masks of one image to the features of the fitted fusion, and from weights to labels.

The votes are those of the soft fusion, of accepted regions alone. Frozen classes, which keep their
raw pixels, are chosen in `lightning_samrefine.fit.verdict`.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lightning_samrefine.config import RefineConfig
from lightning_samrefine.fusion_weights import FusionWeights
from lightning_samrefine.models.base import Promptable
from lightning_samrefine.refine.acceptance import accepted_regions
from lightning_samrefine.refine.class_filter import restore_frozen_classes
from lightning_samrefine.refine.fusion.color_model import color_ratios
from lightning_samrefine.refine.fusion.features import FeatureMaps
from lightning_samrefine.refine.fusion.mask_votes import MaskVotes, mean_probs, on_mask_grid
from lightning_samrefine.refine.mask_predictions import MaskPredictions
from lightning_samrefine.refine.raw_prediction import RawPrediction, first_argmax
from lightning_samrefine.refine.results import Refinement, region_table
from lightning_samrefine.utils.device import upload


def feature_maps(predictions: MaskPredictions, config: RefineConfig) -> FeatureMaps:
    """Collect what the features of one image are computed from.

    Args:
        predictions: SAM's masks; regions without an accepted mask have no votes.
        config: With ``weights``, and so with region prompts; it decides which masks are accepted.
    """
    probs = predictions.raw.probs
    ratios, bins = color_ratios(probs, predictions.raw.image, config.stride)
    return FeatureMaps(probs, ratios, bins, _region_votes(predictions, config))


def fuse_fitted(
    predictions: MaskPredictions,
    config: RefineConfig,
    sam: Promptable,
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
        maps: From `feature_maps`; computed if None.

    Raises:
        ValueError: Weights of other classes, or of features that the image lacks.
    """
    weights = config.weights
    assert isinstance(weights, FusionWeights)
    raw, regions, found = predictions.raw, predictions.regions, predictions.region_masks
    accepted = accepted_regions(config, regions.classes, predictions.pred_iou)
    masks = None if found is None else found.probs() > 0.5
    table = region_table(
        regions, raw.image_hw, config.stride, predictions.pred_iou, accepted, masks
    )
    if not weights.refine:
        return Refinement.of(table, raw.labels, raw.probs)
    fused = (maps or feature_maps(predictions, config)).fuse(weights.fusion)
    everywhere = torch.ones_like(raw.labels, dtype=torch.bool)
    refined = Refinement.of(table, _labels(raw, fused), fused, everywhere)
    if not weights.frozen_classes:
        return refined
    refined_classes = np.setdiff1d(np.arange(len(fused)), weights.frozen_classes).tolist()
    return restore_frozen_classes(refined, raw.probs, raw.labels, refined_classes)


def control_labels(raw: RawPrediction, maps: FeatureMaps, weights: FusionWeights) -> Tensor:
    """Return the labels of the fusion without SAM, (H, W) int64: what is gained without it.

    Args:
        raw: The raw prediction.
        maps: Its features.
        weights: Their ``control`` is used, for all classes.
    """
    return _labels(raw, maps.fuse(weights.control))


def _labels(raw: RawPrediction, fused: Tensor) -> Tensor:
    """Return the argmax of the fused probabilities, or the raw label if the fusion changes nothing.

    Raw labels need not be the raw probabilities' argmax.
    """
    best = first_argmax(fused)
    raw_best = raw.labels if raw.labels_are_argmax else first_argmax(raw.probs)
    unknown = (raw.labels < 0) | (raw.labels >= len(fused))
    return torch.where(unknown | (best != raw_best), best, raw.labels)


def _region_votes(predictions: MaskPredictions, config: RefineConfig) -> Tensor:
    """Let the mask of every accepted region vote for its class, by predicted IoU and purity.

    Returns:
        (C, h, w) float32 in [0, 1], the largest vote of a class's masks; 0 without a mask.
    """
    probs, found = predictions.raw.probs, predictions.region_masks
    accepted = accepted_regions(config, predictions.regions.classes, predictions.pred_iou)
    if found is None or not accepted.any():
        return probs.new_zeros(len(probs), 1, 1)
    chosen = upload(np.flatnonzero(accepted), probs.device)
    classes = upload(predictions.regions.classes, probs.device)[chosen]
    masks = found[chosen].probs()
    small = on_mask_grid(probs, found.mask_hw)
    purity = mean_probs(masks, small).gather(0, classes[None])[0]
    weight = found.pred_iou[chosen].float() * purity
    return MaskVotes.of_regions(masks, weight, classes, len(probs)).classes
