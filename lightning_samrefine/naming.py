"""Which class a mask stands for, from what the segmenter says inside it, around it and elsewhere.

SAM's masks have no classes. A mask gets the probabilities of the prediction inside it, against
those around it, and then hears what similar masks are called (`looks`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_samrefine.class_maps import resized
from lightning_samrefine.image_masks import ImageMasks
from lightning_samrefine.looks import by_likeness

# Of a probability before its logarithm: a single pixel must not forbid a class.
_MIN_PROB = 1e-3
# What lies around a mask is looked up at every so manyth pixel, within so many of these steps.
_AROUND_STEP, _AROUND_REACH = 2, 2
_MIN_AROUND = 1e-2  # of a class around a mask, which its probability inside is divided by
# So many unpacked masks stay in a core's cache.
_CPU_MASKS = 16


class Planes(NamedTuple):
    """A prediction of C classes on half of the low-resolution grid, for products with masks.

    Attributes:
        sums: (C + 3, h, w) float32, logarithms of the probabilities, then 1, y and x in [0, 1]. One
            product with masks gives each class's sum in each mask, its area and its middle.
        coarse: (C, h_c, w_c) float32, the probabilities themselves at every second row and column.
    """

    sums: Tensor
    coarse: Tensor


@dataclass(frozen=True)
class NamedMasks:
    """K masks and the classes they stand for.

    Attributes:
        masks: The masks.
        names: (C, K) float32, the probability of each class for each mask.
    """

    masks: ImageMasks
    names: Tensor

    def __getitem__(self, chosen: slice) -> NamedMasks:
        return NamedMasks(self.masks[chosen], self.names[:, chosen])

    @property
    def purity(self) -> Tensor:
        """(K,) float32 in [0, 1], the probability of the class that a mask stands for."""
        return self.names.amax(dim=0)

    @property
    def classes(self) -> Tensor:
        """(K,) int64, that class."""
        return self.names.argmax(dim=0)

    def purity_of(self, classes: Tensor) -> Tensor:
        """Return (K,) float32 in [0, 1], the probability of one class for each mask.

        Args:
            classes: (K,) int64.
        """
        return self.names.gather(0, classes[None])[0]


def name_masks(masks: ImageMasks, planes: Planes) -> NamedMasks:
    """Find out which classes masks stand for.

    Args:
        masks: K ≥ 1 masks of one image. They hear one another where the model shows features.
        planes: From `planes_of`, on the grid of the masks.
    """
    parts = [class_probs(masks[part].halved(), planes) for part in parts_of(masks)]
    names = torch.cat([alone for alone, _ in parts], dim=1)
    if masks.looks.shape[1] > 0:
        middles = torch.cat([of_part for _, of_part in parts])
        names = by_likeness(names, masks.looks, middles, masks.pred_iou)
    return NamedMasks(masks, names)


def parts_of(masks: ImageMasks) -> Iterator[slice]:
    """Yield slices of masks that are worth unpacking at once; a GPU takes all of them."""
    at_once = _CPU_MASKS if masks.packed.device.type == "cpu" else len(masks)
    for start in range(0, len(masks), at_once):
        yield slice(start, start + at_once)


def planes_of(probs: Tensor, mask_hw: Sequence[int]) -> Planes:
    """Bring (C, H, W) probabilities to half of the grid of masks, (h_n, w_n)."""
    height, width = ((side + 1) // 2 for side in mask_hw)
    small = resized(probs, (height, width))
    coarse = _coarse(small).contiguous()
    ones = torch.ones_like(small[0])
    y, x = (
        (torch.arange(side, dtype=small.dtype, device=small.device) + 0.5) / side
        for side in (height, width)
    )
    logs = small.clamp_(min=_MIN_PROB).log_()
    return Planes(torch.cat([logs, torch.stack([ones, ones * y[:, None], ones * x])]), coarse)


def class_probs(halved: Tensor, planes: Planes) -> tuple[Tensor, Tensor]:
    """Find the probability of each class for each of K masks by itself.

    Inside a mask it is the geometric mean of the pixels' probabilities, weighted by σ and
    normalised over the classes: a class that is certain at a few pixels and excluded at the others
    has thus less of it than one that is possible everywhere. It is then multiplied by how much
    larger it is than around the mask, inside² / (around + 0.01): inside a thing that a blurred
    prediction nearly missed, its class is rarer than that of the background, yet more frequent
    than around it.

    Args:
        halved: (K, h, w) float32 in [0, 1], of `ImageMasks.halved`.
        planes: Of `planes_of`.

    Returns:
        (C, K) float32; (K, 2) float32, YX of the masks' middles in sides of the image.
    """
    sums = planes.sums.flatten(1) @ halved.flatten(1).T
    area = sums[-3].clamp(min=1e-6)
    inside = (sums[:-3] / area).softmax(dim=0)
    masks = _coarse(halved).contiguous()
    ring = (_dilated(masks) - masks).flatten(1)
    size = ring.sum(dim=1)
    around = (planes.coarse.flatten(1) @ ring.T) / size.clamp(min=1e-6)
    # A mask that fills the image, or falls between the pixels of the coarse grid, has no ring.
    around = torch.where(size > 1e-3, around, inside)
    lifted = inside.square() / (around + _MIN_AROUND)
    return lifted / lifted.sum(dim=0), (sums[-2:] / area).T


def _coarse(maps: Tensor) -> Tensor:
    return maps[..., _AROUND_STEP // 2 :: _AROUND_STEP, _AROUND_STEP // 2 :: _AROUND_STEP]


def _dilated(masks: Tensor) -> Tensor:
    """Return the largest value of (K, h, w) maps within a square of `_AROUND_REACH` on each side.

    By shifted copies: a CPU takes nine times as long for a maximum pooling.
    """
    for axis in (1, 2):
        widened = masks.clone()
        length = masks.shape[axis]
        for shift in range(1, min(_AROUND_REACH, length - 1) + 1):
            for start, other in ((0, shift), (shift, 0)):
                part = widened.narrow(axis, start, length - shift)
                torch.maximum(part, masks.narrow(axis, other, length - shift), out=part)
        masks = widened
    return masks
