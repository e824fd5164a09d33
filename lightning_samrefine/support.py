"""How much SAM's masks support each class at each pixel, and what that makes of a prediction.

Algorithm 4 keeps a class where a mask covers it and drops it elsewhere. Here a class loses
probability where no mask supports it, but never all of it, so that thin things which no mask caught
survive, and masks may come from anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_samrefine.image_masks import ImageMasks

# A mask of one class counts for more than a mixed one: weight = pred_iou · purity².
_PURITY_POWER = 2
# A region's mask counts for half beside the masks of the image: its prompt came from the prediction
# that it is to judge.
_OF_REGIONS = 0.5


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
        cls, mask_probs: Tensor, classes: Tensor, num_classes: int, own: Tensor | None = None
    ) -> Support:
        """Collect the masks of accepted regions: the largest σ over the regions of a class.

        Args:
            mask_probs: (N, h_n, w_n) float32, σ of the logits.
            classes: (N,) int64.
            num_classes: C.
            own: (C, h_n, w_n) float32 in {0, 1}, regions that stand for themselves because their
                masks were rejected; None for none.
        """
        weight = torch.ones_like(classes, dtype=mask_probs.dtype)
        support = _largest_by_class(mask_probs, weight, classes, num_classes)
        inside = support.amax(dim=0)
        return cls(support if own is None else torch.maximum(support, own), inside)

    @classmethod
    def of_image(cls, masks: ImageMasks, probs: Tensor) -> tuple[Support, MaskVotes]:
        """Let every mask support the class that is most probable inside it.

        A mask's purity is the mean probability of that class inside the mask, weighted by σ. Its
        support is pred_iou · purity² · σ; a pixel takes the largest of a class.

        Args:
            masks: K masks of the image.
            probs: (C, H, W) float32 in [0, 1], L.

        Returns:
            The support, and what each mask stands for.
        """
        mask_probs = masks.probs()
        purity, classes = mean_probs(mask_probs, probs).max(dim=0)
        weight = masks.pred_iou * purity**_PURITY_POWER
        support = _largest_by_class(mask_probs, weight, classes, len(probs))
        votes = MaskVotes(mask_probs, classes, masks.pred_iou)
        return cls(support, mask_probs.amax(dim=0)), votes

    def with_regions(
        self,
        mask_probs: Tensor,
        pred_iou: Tensor,
        classes: Tensor,
        probs: Tensor,
        own: Tensor | None = None,
    ) -> Support:
        """Add the masks of accepted regions to those of the image, for half of what these count.

        A region's mask supports the region's class, weighted as in `of_image`.

        Args:
            mask_probs: (N, h_n, w_n) float32, σ of the logits.
            pred_iou: (N,) float32.
            classes: (N,) int64.
            probs: (C, H, W) float32 in [0, 1], L.
            own: As in `of_regions`.
        """
        purity = mean_probs(mask_probs, probs).gather(0, classes[None])[0]
        weight = _OF_REGIONS * pred_iou * purity**_PURITY_POWER
        support = _largest_by_class(mask_probs, weight, classes, len(probs))
        support = torch.maximum(support, self.classes)
        if own is not None:
            support = torch.maximum(support, _OF_REGIONS * own)
        return Support(support, self.inside)


def weigh(probs: Tensor, supports: Sequence[Support], floor: float) -> tuple[Tensor, Tensor]:
    """Weigh a prediction by the support of its classes.

    Args:
        probs: (C, H, W) float32 in [0, 1], L.
        supports: At least one, on one grid.
        floor: What a class keeps where no mask supports it, above 0.

    Returns:
        (C, H, W) float32, L · Π (floor + support), normalised over the classes wherever L is not 0
        for all of them; (H, W) bool, whether some mask lies on the pixel.
    """
    first, *others = supports
    factors, inside = first.classes + floor, first.inside
    for other in others:
        factors *= other.classes + floor
        inside = torch.maximum(inside, other.inside)
    stacked = torch.cat([factors, inside[None]])
    size = probs.shape[1:]
    enlarged = F.interpolate(stacked[None], size, mode="bilinear", align_corners=False)[0]
    weighted = enlarged[:-1].mul_(probs)
    total = weighted.sum(dim=0)
    weighted /= total.masked_fill(total == 0, 1)
    return weighted, enlarged[-1] > 0.5


@dataclass(frozen=True)
class MaskVotes:
    """What each of K masks stands for.

    Attributes:
        mask_probs: (K, h_n, w_n) float32, σ.
        classes: (K,) int64, the class a mask supports.
        pred_iou: (K,) float32.
    """

    mask_probs: Tensor
    classes: Tensor
    pred_iou: Tensor

    def at(self, points: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Find the mask of the best predicted IoU that supports a class at a point.

        Args:
            points: (N, 2) float XY in [0, 1), fractions of the image's sides.
            classes: (N,) int64.

        Returns:
            Its predicted IoU, (N,) float32, and the mask, (N, h_n, w_n) bool; 0 and nothing where
            there is no such mask.
        """
        height, width = self.mask_probs.shape[1:]
        x = (points[:, 0] * width).long().clamp(0, width - 1)
        y = (points[:, 1] * height).long().clamp(0, height - 1)
        holds = (self.mask_probs[:, y, x] > 0.5) & (self.classes[:, None] == classes)
        pred_iou, best = (holds * self.pred_iou[:, None]).max(dim=0)
        masks = self.mask_probs[best] > 0.5
        return pred_iou, masks & (pred_iou > 0)[:, None, None]


def mean_probs(mask_probs: Tensor, probs: Tensor) -> Tensor:
    """Return (C, K), the mean probability of each class in each of K masks, weighted by σ.

    Args:
        mask_probs: (K, h_n, w_n) float32 in [0, 1].
        probs: (C, H, W) float32 in [0, 1].
    """
    size = mask_probs.shape[1:]
    small = F.interpolate(probs[None], size, mode="bilinear", align_corners=False)[0]
    # One product gives each class's sum in each mask and, by a plane of ones, its area.
    planes = torch.cat([small, torch.ones_like(small[:1])]).flatten(1)
    sums = planes @ mask_probs.flatten(1).T
    return sums[:-1] / sums[-1].clamp(min=1e-6)


def _largest_by_class(
    mask_probs: Tensor, weight: Tensor, classes: Tensor, num_classes: int
) -> Tensor:
    """Return (C, h, w), the largest weight · σ over the masks of each class, 0 without one."""
    largest = mask_probs.new_zeros(num_classes, *mask_probs.shape[1:])
    weighted = torch.empty_like(largest[0])
    # One mask at a time stays in a CPU's cache; index_reduce takes ten times as long there.
    for mask, of_mask, c in zip(mask_probs, weight, classes.tolist(), strict=True):
        torch.mul(mask, of_mask, out=weighted)
        torch.maximum(largest[c], weighted, out=largest[c])
    return largest
