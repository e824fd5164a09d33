"""How much SAM's masks support each class at each pixel, and what that makes of a prediction.

Algorithm 4 keeps a class where a mask covers it and drops it elsewhere. Here a class loses
probability where no mask supports it, but never all of it, so that thin things which no mask caught
survive, and masks may come from anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_samrefine.image_masks import ImageMasks

# A mask of one class counts for more than a mixed one: weight = pred_iou · purity².
_PURITY_POWER = 2


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
            own: (C, h, w) float in {0, 1}, regions that stand for themselves because their masks
                were rejected, on any grid; None for none.
        """
        mask_probs = mask_probs.nan_to_num(nan=0.0)
        weight = torch.ones_like(classes, dtype=mask_probs.dtype)
        support = _largest_by_class(mask_probs, weight, classes, num_classes)
        inside = support.amax(dim=0)
        if own is not None:
            resized = F.interpolate(own[None].float(), support.shape[1:], mode="nearest")[0]
            support = torch.maximum(support, resized)
        return cls(support, inside)

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
        small = F.interpolate(probs[None], masks.mask_hw, mode="bilinear", align_corners=False)[0]
        # One product gives each class's sum in each mask and, by a plane of ones, its area.
        planes = torch.cat([small, torch.ones_like(small[:1])]).flatten(1)
        sums = planes @ mask_probs.flatten(1).T
        purity, classes = (sums[:-1] / sums[-1].clamp(min=1e-6)).max(dim=0)
        weight = masks.pred_iou * purity**_PURITY_POWER
        support = _largest_by_class(mask_probs, weight, classes, len(probs))
        votes = MaskVotes(mask_probs, classes, masks.pred_iou)
        return cls(support, mask_probs.amax(dim=0)), votes

    def apply(self, probs: Tensor, floor: float) -> tuple[Tensor, Tensor]:
        """Weigh a prediction by the support of its classes.

        Args:
            probs: (C, H, W) float32 in [0, 1], L.
            floor: What a class keeps where no mask supports it, above 0.

        Returns:
            (C, H, W) float32, L · (floor + support), normalised over the classes wherever L is not
            0 for all of them; (H, W) bool, whether some mask lies on the pixel.
        """
        size = probs.shape[1:]
        stacked = torch.cat([self.classes, self.inside[None]])
        enlarged = F.interpolate(stacked[None], size, mode="bilinear", align_corners=False)[0]
        weighted = enlarged[:-1].add_(floor).mul_(probs)
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
