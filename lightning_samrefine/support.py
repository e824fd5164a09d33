"""How much SAM's masks support each class at each pixel, and what that makes of a prediction.

Algorithm 4 keeps a class where a mask covers it and drops it elsewhere. Here a class loses
probability where no mask supports it, but never all of it, so that thin things which no mask caught
survive, and masks may come from anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_samrefine.class_maps import class_parts, normalise_, resized
from lightning_samrefine.looks import PURITY_POWER
from lightning_samrefine.naming import NamedMasks, parts_of
from lightning_samrefine.recycling import MAPS

# A region's mask counts for less beside the masks of the image: its prompt came from the prediction
# that it is to judge.
_OF_REGIONS = 0.3


@dataclass(frozen=True)
class Support:
    """What masks say about C classes on SAM's low-resolution grid.

    Attributes:
        classes: (C, h_n, w_n) float32 in [0, 1].
        inside: (h_n, w_n) float32 in [0, 1], the largest σ of any mask.
    """

    classes: Tensor
    inside: Tensor

    @classmethod
    def of_regions(
        cls, named: NamedMasks, mask_probs: Tensor, classes: Tensor, own: Tensor | None = None
    ) -> Support:
        """Collect the masks of accepted regions: the largest pred_iou · purity · σ of a class.

        A mask supports the class of its region, its purity being what it has of that class, and no
        less the class that it stands for, where that is another: the prediction decides between
        the two.

        Args:
            named: N ≥ 1 masks.
            mask_probs: (N, h_n, w_n) float32, σ of their logits.
            classes: (N,) int64, of their regions.
            own: (C, h_n, w_n) float32 in {0, 1}, regions that stand for themselves because their
                masks were rejected; None for none.
        """
        weight = named.masks.pred_iou * named.purity_of(classes)
        support = mask_probs.new_zeros(len(named.names), *mask_probs.shape[1:])
        _raise_to(support, mask_probs, weight, classes)
        _raise_to(support, mask_probs, weight, named.classes)
        if own is not None:
            torch.maximum(support, own, out=support)
        return cls(support, mask_probs.amax(dim=0))

    @classmethod
    def of_image(cls, named: NamedMasks) -> Support:
        """Let every mask of the image support its class.

        Its support is pred_iou · purity³ · σ; a pixel takes the largest of a class.

        Args:
            named: K ≥ 1 masks.
        """
        masks = named.masks
        support = masks.pred_iou.new_zeros(len(named.names), *masks.mask_hw)
        inside = torch.zeros_like(support[0])
        weight = masks.pred_iou * named.purity**PURITY_POWER
        for part in parts_of(masks):
            mask_probs = masks[part].probs()
            _raise_to(support, mask_probs, weight[part], named.classes[part])
            torch.maximum(inside, mask_probs.amax(dim=0), out=inside)
        return cls(support, inside)

    def with_regions(
        self, named: NamedMasks, mask_probs: Tensor, classes: Tensor, own: Tensor | None = None
    ) -> Support:
        """Add the masks of accepted regions to those of the image, for 0.3 of what these count.

        A region's mask supports the region's class, weighted as in `of_image`.

        Args:
            named: As in `of_regions`.
            mask_probs: As in `of_regions`.
            classes: As in `of_regions`.
            own: As in `of_regions`.
        """
        weight = _OF_REGIONS * named.masks.pred_iou * named.purity_of(classes) ** PURITY_POWER
        support = self.classes.clone()
        _raise_to(support, mask_probs, weight, classes)
        if own is not None:
            support = torch.maximum(support, _OF_REGIONS * own)
        return Support(support, self.inside)


def weigh(
    probs: Tensor, supports: Sequence[Support], floors: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Weigh a prediction by the support of its classes.

    Args:
        probs: (C, H, W) float32 in [0, 1], L.
        supports: At least one, on one grid.
        floors: What a class keeps where no mask of a support supports it, each above 0.

    Returns:
        (C, H, W) float32, L · Π (floor + support), normalised over the classes wherever L is not 0
        for all of them; (H, W) bool, whether some mask lies on the pixel.
    """
    first, *others = supports
    factors, inside = first.classes + floors[0], first.inside
    for other, floor in zip(others, floors[1:], strict=True):
        factors *= other.classes + floor
        inside = torch.maximum(inside, other.inside)
    weighted = MAPS.empty_like(probs)
    for part in class_parts(probs):
        torch.mul(resized(factors[part], probs.shape[1:]), probs[part], out=weighted[part])
    return normalise_(weighted), resized(inside[None], probs.shape[1:])[0] > 0.5


def masks_at(named: NamedMasks, points: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Find the mask of the best predicted IoU that stands for a class at a point.

    Args:
        named: K ≥ 1 masks of the image.
        points: (N, 2) float XY in [0, 1), fractions of the image's sides.
        classes: (N,) int64.

    Returns:
        Its predicted IoU, (N,) float32, and the mask, (N, h_n, w_n) bool; 0 and nothing where there
        is no such mask.
    """
    masks = named.masks
    height, width = masks.mask_hw
    x = (points[:, 0] * width).long().clamp(0, width - 1)
    y = (points[:, 1] * height).long().clamp(0, height - 1)
    holds = masks.inside_at(y, x) & (named.classes[:, None] == classes)
    pred_iou, best = (holds * masks.pred_iou[:, None]).max(dim=0)
    return pred_iou, (masks[best].probs() > 0.5) & (pred_iou > 0)[:, None, None]


def _raise_to(support: Tensor, mask_probs: Tensor, weight: Tensor, classes: Tensor) -> None:
    """Raise (C, h, w) support to weight · σ of each mask, in the mask's class."""
    weighted = torch.empty_like(support[0])
    # One mask at a time stays in a CPU's cache; index_reduce takes ten times as long there.
    for mask, of_mask, c in zip(mask_probs, weight, classes.tolist(), strict=True):
        torch.mul(mask, of_mask, out=weighted)
        torch.maximum(support[c], weighted, out=support[c])
