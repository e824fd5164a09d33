"""MapRefinement and MapFailedRegions: from accepted masks to one map (ALGORITHM.md 9 to 11)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_samrefine.recycling import MAPS
from lightning_samrefine.upscaling import Window


class MapRefinement:
    """Collects accepted masks one at a time into L' and S' (step 10).

    Each mask costs as much as its own window; no step passes over all C × H × W values.

    Args:
        probs: (C, H, W) float32 in [0, 1], the raw L.
        labels: (H, W) int64, the raw S.
    """

    def __init__(self, probs: Tensor, labels: Tensor) -> None:
        self._raw, self._raw_labels = probs, labels
        self._refined = MAPS.zeros_like(probs)
        self._best = torch.zeros_like(probs[0])
        self._labels = labels.clone()
        self._last_class = 0

    def add(self, logits: Tensor, c: int, window: Window | None = None) -> None:
        """Raise L'[c] to σ(logit) · L[c] where the logit is positive and this is larger.

        Args:
            logits: (h, w) float32 logits of an accepted mask.
            c: Its class in [0, C), no smaller than that of the mask before: so the lowest class
                wins a tie without another pass.
            window: Where in the image the logits are; everywhere else they are not positive.
                None for (H, W) logits.

        Raises:
            ValueError: A class smaller than the last.
        """
        if c < self._last_class:
            raise ValueError(f"c: got {c} after {self._last_class}, accepted are ascending classes")
        self._last_class = c
        part = (slice(None), slice(None)) if window is None else window.slices
        # where, not a product: SAM's NaN must not reach the map.
        value = torch.where(logits > 0, logits.sigmoid().mul_(self._raw[c][part]), 0.0)
        refined, best = self._refined[c][part], self._best[part]
        torch.maximum(refined, value, out=refined)
        self._labels[part].masked_fill_(value > best, c)
        torch.maximum(best, value, out=best)

    def finish(
        self, failed: Tensor | None = None, failed_boxes: np.ndarray | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Give rejected regions back their raw prediction (step 11) and return the maps.

        Args:
            failed: (h_d, w_d) bool, the union of the rejected regions on the working grid, or
                None where nothing was rejected.
            failed_boxes: (K, 4) XYXY on the grid, exclusive ends; together they hold the union.
                None searches the whole image.

        Returns:
            S' (H, W) int64, L' (C, H, W) float32 and the covered map (H, W) bool.
        """
        covered = self._best > 0
        if failed is None:
            return self._labels, self._refined, covered
        grid = failed[None, None].to(self._refined.dtype)
        kept = F.interpolate(grid, covered.shape, mode="nearest")[0, 0] > 0
        labels = torch.where(kept, self._raw_labels, self._labels)
        for window in _image_windows(failed_boxes, failed.shape, covered.shape):
            part = (slice(None), *window.slices)
            refined = self._refined[part]
            torch.where(kept[window.slices], self._raw[part], refined, out=refined)
        return labels, self._refined, covered


def _image_windows(
    boxes: np.ndarray | None, grid_hw: Sequence[int], image_hw: Sequence[int]
) -> list[Window]:
    """Return image windows that hold grid boxes, or the whole image where that is less work."""
    whole = Window(0, image_hw[0], 0, image_hw[1])
    if boxes is None:
        return [whole]
    scale = np.array([image_hw[1] / grid_hw[1], image_hw[0] / grid_hw[0]] * 2)
    scaled = boxes * scale
    # A pixel of slack for the float32 in which nearest-neighbour positions are computed.
    starts = np.maximum(np.floor(scaled[:, :2]) - 1, 0).astype(int)
    ends = np.minimum(np.ceil(scaled[:, 2:]) + 1, [image_hw[1], image_hw[0]]).astype(int)
    if (ends - starts).prod(axis=1).sum() >= image_hw[0] * image_hw[1]:
        return [whole]
    return [
        Window(int(y0), int(y1), int(x0), int(x1))
        for (x0, y0), (x1, y1) in zip(starts, ends, strict=True)
    ]
