"""Mask votes: how much SAM's masks support each class at each pixel, and the weighing by them.

Algorithm 4 keeps a class under its masks and drops it elsewhere. Here a class loses
probability at pixels without a mask of it, but never all of it, so that thin things without a mask
survive, and masks may come from any prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_samrefine.refine.mask_proposals import MaskProposals
from lightning_samrefine.refine.windows import WindowMaps
from lightning_samrefine.utils.device import upload

# A mask of one class counts for more than a mixed one: weight = pred_iou · purity³.
_PURITY_POWER = 3
# Weight of a region's mask beside mask proposals: its prompt came from the prediction that it is to
# judge.
_OF_REGIONS = 0.3
# Number of unpacked masks that stay in a core's cache.
_CPU_MASKS = 16


@dataclass(frozen=True)
class MaskVotes:
    """Support of C classes by masks, on SAM's low-resolution grid.

    Attributes:
        classes: (C, h_n, w_n) float32 in [0, 1].
        inside: (h_n, w_n) float32 in [0, 1], the largest σ of any mask.
    """

    classes: Tensor
    inside: Tensor

    @classmethod
    def none(cls, small: Tensor) -> MaskVotes:
        """Return votes for nothing, on the grid of (C, h_n, w_n) probabilities."""
        return cls(torch.zeros_like(small), torch.zeros_like(small[0]))

    def add_(self, mask_probs: Tensor, weight: Tensor, classes: Tensor) -> None:
        """Raise the support of N classes to weight · σ of their masks, in place.

        Args:
            mask_probs: (N, h_n, w_n) float32 in [0, 1], σ of the logits.
            weight: (N,) float32 in [0, 1].
            classes: (N,) int64.
        """
        _raise_to(self.classes, mask_probs, weight, classes)
        if len(mask_probs) > 0:
            torch.maximum(self.inside, mask_probs.amax(dim=0), out=self.inside)

    @classmethod
    def of_image(cls, masks: MaskProposals, small: Tensor) -> tuple[MaskVotes, Tensor]:
        """Collect mask proposals: each supports the class that is most probable inside it.

        A mask's purity is the mean probability of that class inside it. Its support is
        pred_iou · purity³ · σ; a pixel takes the largest of a class.

        Args:
            masks: K masks of the image.
            small: (C, h_n, w_n) float32, the raw probabilities on the grid of the masks.

        Returns:
            The support, and (K,) int64, the class that each mask stands for.
        """
        votes = cls.none(small)
        stands_for = []
        for part in _mask_parts(masks):
            mask_probs = masks[part].probs()
            purity, classes = mean_probs(mask_probs, small).max(dim=0)
            votes.add_(mask_probs, masks.pred_iou[part] * purity**_PURITY_POWER, classes)
            stands_for.append(classes)
        return votes, torch.cat(stands_for)

    @classmethod
    def of_regions(
        cls,
        masks: MaskProposals,
        classes: np.ndarray,
        accepted: np.ndarray,
        small: Tensor,
        of_image: MaskVotes | None = None,
    ) -> MaskVotes:
        """Collect the masks of accepted regions: each supports its region's class.

        A mask's purity is the mean probability of that class inside it. Its support is
        pred_iou · purity · σ; a pixel takes the largest of a class.

        Args:
            masks: N masks, one a region.
            classes: (N,) int64, the regions' classes.
            accepted: (N,) bool.
            small: (C, h_n, w_n) float32, the raw probabilities on the grid of the masks.
            of_image: Votes of mask proposals, to whose support the same masks are added in place,
                with 0.3 · pred_iou · purity³ · σ; a region's mask proposes nothing by itself.
        """
        votes, device = cls.none(small), small.device
        for part in _mask_parts(masks):
            own, mask_probs = upload(classes[part], device), masks[part].probs()
            # Of all masks, for the rounding of a product depends on their number.
            purity = mean_probs(mask_probs, small).gather(0, own[None])[0]
            pred_iou = masks.pred_iou[part]
            if not accepted[part].all():
                chosen = upload(np.flatnonzero(accepted[part]), device)
                mask_probs, own = mask_probs[chosen], own[chosen]
                pred_iou, purity = pred_iou[chosen], purity[chosen]
            votes.add_(mask_probs, pred_iou * purity, own)
            if of_image is not None:
                weight = _OF_REGIONS * pred_iou * purity**_PURITY_POWER
                _raise_to(of_image.classes, mask_probs, weight, own)
        return votes


def _mask_parts(masks: MaskProposals) -> Iterator[slice]:
    """Yield slices of masks to unpack at once: few on a CPU, all of them on a GPU."""
    at_once = _CPU_MASKS if masks.packed.device.type == "cpu" else max(1, len(masks))
    for start in range(0, len(masks), at_once):
        yield slice(start, start + at_once)


def class_parts(maps: Tensor) -> Iterator[slice]:
    """Yield slices of (C, H, W) maps that are worth computing at once.

    One class at a time stays in a CPU's cache; a GPU takes all of them.
    """
    at_once = 1 if maps.device.type == "cpu" else len(maps)
    for start in range(0, len(maps), at_once):
        yield slice(start, start + at_once)


def normalize_(maps: Tensor) -> Tensor:
    """Divide (C, H, W) maps in place by their sum over the classes unless it is 0."""
    total = maps.sum(dim=0)
    return maps.div_(total.masked_fill_(total == 0, 1))


def support_factors(votes: Sequence[MaskVotes], floors: Sequence[float]) -> Tensor:
    """Return (C, h_n, w_n) float32, Π (floor + support): a class without support keeps the floors.

    Args:
        votes: At least one, on one grid.
        floors: One for each of ``votes``, above 0.
    """
    first, *others = votes
    factors = first.classes + floors[0]
    for other, floor in zip(others, floors[1:], strict=True):
        factors *= other.classes + floor
    return factors


def inside_any(votes: Sequence[MaskVotes]) -> Tensor:
    """Return (1, h_n, w_n) float32 in [0, 1], the largest σ of any mask."""
    return torch.stack([support.inside for support in votes]).amax(dim=0, keepdim=True)


def weigh(probs: Tensor, factors: WindowMaps, rows: slice) -> Tensor:
    """Weigh rows of a prediction by the support of its classes.

    Args:
        probs: (C, n, W) float32 in [0, 1], rows of L.
        factors: Maps of `support_factors`.
        rows: Which rows they are, with start and stop.

    Returns:
        (C, n, W) float32, L · factor, normalized over the classes unless L is 0 for all of them.
    """
    weighted = torch.empty_like(probs, memory_format=torch.contiguous_format)
    for part in class_parts(probs):
        torch.mul(factors.rows(rows, part), probs[part], out=weighted[part])
    return normalize_(weighted)


def masks_at(
    masks: MaskProposals, stands_for: Tensor, points: Tensor, classes: Tensor
) -> tuple[Tensor, MaskProposals]:
    """Find the mask of the best predicted IoU that stands for a class at a point.

    There are K ≥ 1 masks of the classes ``stands_for``, and N points, XY in [0, 1) as fractions of
    the image's sides, with a class each.

    Returns:
        Its predicted IoU, (N,) float32, and the mask; 0 and an empty mask without such a mask.
    """
    height, width = masks.mask_hw
    x = (points[:, 0] * width).long().clamp(0, width - 1)
    y = (points[:, 1] * height).long().clamp(0, height - 1)
    holds = masks.inside_at(y, x) & (stands_for[:, None] == classes)
    pred_iou, best = (holds * masks.pred_iou[:, None]).max(dim=0)
    found = masks[best]
    return pred_iou, replace(found, packed=found.packed * (pred_iou > 0)[:, None])


def on_mask_grid(probs: Tensor, mask_hw: tuple[int, int]) -> Tensor:
    """Bring (C, H, W) probabilities to the grid of masks, (C, h_n, w_n)."""
    return F.interpolate(probs[None], mask_hw, mode="bilinear", align_corners=False)[0]


def mean_probs(mask_probs: Tensor, small: Tensor) -> Tensor:
    """Return (C, K), the mean probability of each class inside each of K masks.

    Args:
        mask_probs: (K, h_n, w_n) float32 in [0, 1], the weight of each pixel.
        small: (C, h_n, w_n) float32 in [0, 1].
    """
    sums = small.flatten(1) @ mask_probs.flatten(1).T
    return sums / sums.sum(dim=0).clamp(min=1e-6)


def _raise_to(support: Tensor, mask_probs: Tensor, weight: Tensor, classes: Tensor) -> None:
    """Raise (C, h, w) support to weight · σ of each mask, in the mask's class."""
    if support.device.type != "cpu":  # in one launch, without waiting for the classes
        weighted = (mask_probs * weight[:, None, None]).flatten(1)
        rows = classes[:, None].expand_as(weighted)
        support.flatten(1).scatter_reduce_(0, rows, weighted, "amax")
        return
    weighted = torch.empty_like(support[0])
    # One mask at a time stays in a CPU's cache; scatter_reduce takes ten times as long.
    for mask, of_mask, c in zip(mask_probs, weight, classes.tolist(), strict=True):
        torch.mul(mask, of_mask, out=weighted)
        torch.maximum(support[c], weighted, out=support[c])
