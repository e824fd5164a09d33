"""How alike masks look to SAM, and what that says about their classes.

Two masks that look alike and lie close together are mostly two of a kind: the wheels of a car, the
panes of a facade. Where the segmenter is unsure about one of them, the others say what it is. SAM's
image embedding tells how a mask looks; it is pooled when the mask is made, so that a cached mask
needs no embedding. As `colours` does for pixels, this learns from the very image, without labels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_samrefine.models.protocol import Promptable
from lightning_samrefine.precision import autocast

_SCALE = 127  # of int8

_COSINE_DROP = 0.1  # so much less alike, and a mask counts for e times less
_DISTANCE = 0.1  # standard deviation between the middles of masks, in sides of the image
_PRIOR = 1.0  # weight of the image's masks as a whole, beside those that look alike
_MIN_SHARE = 1e-2  # of a class among masks, which a share is divided by
_ROUNDS = 3
# A mask of one class counts for more than a mixed one: weight = pred_iou · purity³.
PURITY_POWER = 3


def image_features(sam: Promptable, embedding: Any, mask_hw: tuple[int, int]) -> Tensor | None:
    """Return (D, h, w) float32, the embedding of the part that an image fills.

    Args:
        sam: Shows them by its ``features``; None comes back where it has no such method.
        embedding: Of the image.
        mask_hw: (h_n, w_n), the part of a low-resolution mask that the image fills.
    """
    features = getattr(sam, "features", None)
    if features is None:
        return None
    shown = features(embedding).float()
    rows, columns = (
        max(1, round(side * filled / sam.mask_size))
        for side, filled in zip(shown.shape[1:], mask_hw, strict=True)
    )
    return shown[:, :rows, :columns]


def looks_of(mask_probs: Tensor, features: Tensor) -> Tensor:
    """Say how each mask differs from the whole image, on average inside it.

    Args:
        mask_probs: (K, h, w) float32 in [0, 1].
        features: (D, h_e, w_e) float32 of `image_features`.

    Returns:
        (K, D) int8, directions: their lengths mean nothing. Integers, for a cache rounds floats.
    """
    if len(mask_probs) == 0:
        return features.new_zeros(0, len(features), dtype=torch.int8)
    with autocast(None, features.device):
        pooled = F.adaptive_avg_pool2d(mask_probs[None], features.shape[1:])[0].flatten(1)
        vectors = features.flatten(1)
        mean = (pooled @ vectors.T) / pooled.sum(dim=1, keepdim=True).clamp(min=1e-6)
        off = mean - vectors.mean(dim=1)
        longest = off.abs().amax(dim=1, keepdim=True).clamp(min=1e-6)
        return (off * (_SCALE / longest)).round().to(torch.int8)


def by_likeness(alone: Tensor, looks: Tensor, middles: Tensor, pred_iou: Tensor) -> Tensor:
    """Weigh the classes of masks by what masks that look alike and lie close are called.

    Mask j counts for mask i as its own weight, pred_iou · purity³, times
    exp((cos - 1) / 0.1 - d² / (2 · 0.1²)), cos of the angle between their looks and d the distance
    of their middles. The share of a class among all that counts, beside all masks alike with the
    weight of one, is divided by its share among all masks; so a class that is frequent in the image
    gains nothing from that. Three times, each with the names of the time before.

    Args:
        alone: (C, K) float32, the probability of each class for each mask by itself.
        looks: (K, D) int8 of `looks_of`.
        middles: (K, 2) float32, YX of their centres of mass, in sides of the image.
        pred_iou: (K,) float32.

    Returns:
        (C, K) float32, alone · (share among the alike + 0.01) / (share among all + 0.01),
        normalised over the classes.
    """
    directions = F.normalize(looks.float(), dim=1)
    distance = torch.cdist(middles, middles)
    alike = (directions @ directions.T - 1) / _COSINE_DROP - distance**2 / (2 * _DISTANCE**2)
    alike = alike.exp_().fill_diagonal_(0)
    names = alone
    for _ in range(_ROUNDS):
        weight = pred_iou * names.amax(dim=0) ** PURITY_POWER
        counts = alike * weight
        share = (names @ weight / weight.sum().clamp(min=1e-6))[:, None]
        among = (names @ counts.T + _PRIOR * share) / (counts.sum(dim=1) + _PRIOR)
        names = alone * (among + _MIN_SHARE) / (share + _MIN_SHARE)
        names = names / names.sum(dim=0)
    return names
