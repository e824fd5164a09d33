"""MapRefinement: from accepted masks to one map (docs/algorithm4.md, steps 9 to 11)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_samrefine.refine.fusion.upscaling import Window


class MapRefinement:
    """Collects accepted masks one at a time into L' and S' (step 10).

    Each mask costs as much as its own window.

    Args:
        probs: (C, H, W) float32 in [0, 1], the raw L.
        labels: (H, W) int64, the raw S.
    """

    def __init__(self, probs: Tensor, labels: Tensor) -> None:
        self._raw = probs
        self._refined = torch.zeros_like(probs, memory_format=torch.contiguous_format)
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

    def finish(self, failed: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Raise L' to the raw probabilities inside rejected regions (step 11) and return the maps.

        As in the published code this changes no label: S' is that of step 10.

        Args:
            failed: (h_d, w_d) bool, the union of the rejected regions on the working grid, or
                None if no region was rejected.

        Returns:
            S' (H, W) int64, L' (C, H, W) float32 and the covered map (H, W) bool.
        """
        covered = self._best > 0
        if failed is not None:
            grid = failed[None, None].to(self._refined.dtype)
            inside = F.interpolate(grid, covered.shape, mode="nearest")[0, 0]
            torch.maximum(self._refined, self._raw * inside, out=self._refined)
        return self._labels, self._refined, covered
