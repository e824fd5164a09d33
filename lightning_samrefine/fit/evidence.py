"""From SAM's masks of one image to the features of the fitted fusion, and from weights to labels.

A mask's names are the mean raw probabilities inside it: fitted weights gain as much by them as by
the names of the soft fusion, which compare a mask to its surroundings.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_samrefine.config import RefineConfig
from lightning_samrefine.fit.features import FeatureMaps
from lightning_samrefine.fit.weights import FusionWeights
from lightning_samrefine.refine.checks import first_argmax
from lightning_samrefine.refine.class_filter import accepted_regions, restore_frozen_classes
from lightning_samrefine.refine.fusion.color_model import color_ratios
from lightning_samrefine.refine.fusion.mask_votes import MaskVotes
from lightning_samrefine.refine.mask_proposals import MaskProposals
from lightning_samrefine.refine.predictions import MaskPredictions, refinement, region_table
from lightning_samrefine.refine.results import Refinement
from lightning_samrefine.utils.device import upload

# A mask of one class counts for more than a mixed one, and the mask of a region for less among the
# masks of the point grid: as in the soft fusion, whose weights the fit starts from.
_PURITY_POWER = 3
_OF_REGIONS = 0.3
_CPU_MASKS = 16  # unpacked at once, so that they stay in a core's cache


def feature_maps(predictions: MaskPredictions, config: RefineConfig) -> FeatureMaps:
    """Collect what the features of one image are computed from.

    Args:
        predictions: SAM's masks; regions without an accepted mask have no votes.
        config: Tells if regions and the point grid were prompted, and which masks are accepted.

    Returns:
        The features: region votes if regions are prompted, mask votes if the point grid is. An
        image without masks has votes of 0.
    """
    probs = predictions.probs
    ratios, bins = color_ratios(probs, predictions.image, config.stride)
    regions = _regions(predictions, config) if config.prompt_regions else None
    nothing = probs.new_zeros(len(probs), 1, 1)
    region_votes = mask_votes = None
    if regions is not None:
        masks, pred_iou, purity, classes = regions
        region_votes = nothing
        if len(masks):
            region_votes = _votes(masks, pred_iou * purity, classes, len(probs))
    if config.points_per_side:
        mask_votes = nothing
        proposals = predictions.mask_proposals
        if proposals is not None and len(proposals):
            mask_votes = _proposal_votes(proposals, probs)
        if regions is not None and len(regions[0]):
            masks, pred_iou, purity, classes = regions
            weight = _OF_REGIONS * pred_iou * purity**_PURITY_POWER
            among = _votes(masks, weight, classes, len(probs))
            mask_votes = torch.maximum(among, mask_votes)
    return FeatureMaps(probs, ratios, bins, mask_votes, region_votes)


def fuse_fitted(
    predictions: MaskPredictions,
    config: RefineConfig,
    weights: FusionWeights,
    maps: FeatureMaps | None = None,
    control: bool = False,
) -> Refinement:
    """Fuse one image's masks by fitted weights.

    Every pixel is fused, whether a mask reaches it or not, and an unknown raw label is replaced.
    If the weights refine nothing, or only some classes, the other pixels keep their raw labels and
    probabilities.

    Args:
        predictions: SAM's masks of the image.
        config: As for `feature_maps`.
        weights: Of the same classes.
        maps: From `feature_maps`; computed if None.
        control: Whether to use the weights without SAM, for all classes, instead.

    Raises:
        ValueError: Weights of other classes, or of features that the image lacks.
    """
    probs, labels = predictions.probs, predictions.labels
    accepted = accepted_regions(config, predictions.regions.classes, predictions.pred_iou)
    table = region_table(predictions, predictions.pred_iou, accepted, config.stride)
    if not weights.refine and not control:
        return refinement(table, labels, probs)
    maps = maps or feature_maps(predictions, config)
    fused = maps.fuse(weights.control if control else weights.fusion)
    best = first_argmax(fused)
    # Labels that are not the probabilities' argmax stay if the fusion changes nothing.
    raw_best = labels if predictions.labels_are_argmax else first_argmax(probs)
    unknown = (labels < 0) | (labels >= len(probs))
    refined = refinement(
        table,
        torch.where(unknown | (best != raw_best), best, labels),
        fused,
        torch.ones_like(labels, dtype=torch.bool),
    )
    if control or not weights.frozen_classes:
        return refined
    open_classes = np.setdiff1d(np.arange(len(probs)), weights.frozen_classes).tolist()
    return restore_frozen_classes(refined, probs, labels, open_classes)


def _regions(
    predictions: MaskPredictions, config: RefineConfig
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return masks, predicted IoUs, purities and classes of the accepted regions."""
    probs, found = predictions.probs, predictions.region_masks
    if found is None or len(found) == 0:
        none = probs.new_zeros(0)
        return probs.new_zeros(0, 1, 1), none, none, none.long()
    accepted = accepted_regions(config, predictions.regions.classes, predictions.pred_iou)
    chosen = upload(np.flatnonzero(accepted), probs.device)
    classes = upload(predictions.regions.classes, probs.device)[chosen]
    masks = found[chosen].probs()
    inside = mean_probs(masks, _small(probs, found.mask_hw))
    purity = inside.gather(0, classes[None])[0]
    return masks, found.pred_iou[chosen].float(), purity, classes


def _proposal_votes(proposals: MaskProposals, probs: Tensor) -> Tensor:
    """Let every mask of the point grid vote for the class that is most probable inside it."""
    small = _small(probs, proposals.mask_hw)
    votes = torch.zeros_like(small)
    at_once = _CPU_MASKS if probs.device.type == "cpu" else len(proposals)
    for start in range(0, len(proposals), at_once):
        some = proposals[start : start + at_once]
        masks = some.probs()
        purity, classes = mean_probs(masks, small).max(dim=0)
        weight = some.pred_iou * purity**_PURITY_POWER
        torch.maximum(votes, _votes(masks, weight, classes, len(probs)), out=votes)
    return votes


def mean_probs(masks: Tensor, probs: Tensor) -> Tensor:
    """Return (C, K), the mean probability of each class inside each mask.

    Args:
        masks: (K, h, w) float32 in [0, 1], the weight of each pixel.
        probs: (C, h, w) float32 in [0, 1].
    """
    sums = probs.flatten(1) @ masks.flatten(1).T
    return sums / sums.sum(dim=0).clamp(min=1e-6)


def _votes(masks: Tensor, weight: Tensor, classes: Tensor, num_classes: int) -> Tensor:
    return MaskVotes.of_regions(masks, weight, classes, num_classes).classes


def _small(probs: Tensor, mask_hw: tuple[int, int]) -> Tensor:
    """Bring (C, H, W) probabilities to the grid of masks."""
    return F.interpolate(probs[None], mask_hw, mode="bilinear", align_corners=False)[0]
