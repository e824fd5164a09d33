"""The looks at one image as one: the regions in a table, the maps blended."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from lightning_samrefine.refine.fusion.strips import strips
from lightning_samrefine.refine.mask_predictions import ImagePredictions, MaskPredictions
from lightning_samrefine.refine.mask_proposals import CompressedMasks, MaskProposals
from lightning_samrefine.refine.results import (
    Regions,
    WindowRegions,
    join_windows,
    region_table,
    scaled,
)
from lightning_samrefine.refine.windows import WindowMaps


def look_regions(
    look: MaskPredictions,
    stride: int,
    accepted: np.ndarray,
    pred_iou: Tensor,
    masks: MaskProposals | CompressedMasks | None,
) -> WindowRegions:
    """List the regions of one look.

    Args:
        look: Its predictions.
        stride: r.
        accepted: (N,) bool.
        pred_iou: (N,) float32 on the CPU.
        masks: N of them, or None.
    """
    seen = look.in_image
    table = region_table(look.regions, look.raw.image_hw, stride, pred_iou, accepted)
    table = scaled(table, look.raw.image_hw, (seen.height, seen.width))
    return WindowRegions(seen, table, masks)


def image_regions(predictions: ImagePredictions, looks: Sequence[WindowRegions]) -> Regions:
    """List the regions of all looks in the image's pixels; of one look with their masks."""
    return looks[0].regions if isinstance(predictions, MaskPredictions) else join_windows(looks)


def image_maps(predictions: ImagePredictions, maps: Callable[[int], Tensor]) -> WindowMaps:
    """Blend the looks' maps; beside windows, those of the whole image count if they are larger.

    Args:
        predictions: With looks.
        maps: Returns the (C, h, w) maps of the look of an index.
    """
    image_hw, looks = predictions.raw.image_hw, predictions.looks
    if isinstance(predictions, MaskPredictions):
        return WindowMaps.whole(maps(0), image_hw)
    count = predictions.windows
    other = WindowMaps.whole(maps(count), image_hw) if len(looks) > count else None
    windows = [look.in_image for look in looks[:count]]
    return WindowMaps(image_hw, windows, maps, predictions.overlap, other)


def looks_at_once(predictions: ImagePredictions, reach: int) -> int:
    """Return the largest number of looks that a strip of the image and ``reach`` rows need."""
    seen = [look.in_image.rows for look in predictions.looks]
    return max(
        sum(own.start < rows.stop + reach and rows.start - reach < own.stop for own in seen)
        for rows in strips(predictions.raw.probs)
    )
