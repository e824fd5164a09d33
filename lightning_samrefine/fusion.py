"""MapRefinement and MapFailedRegions: from accepted masks to one map (ALGORITHM.md 9 to 11)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class MapRefinement:
    """Collects accepted masks one chunk at a time into L' (step 10).

    Only the C × H × W map is kept; a chunk's full-resolution masks are gone after `add`.

    Args:
        probs: (C, H, W) float32 in [0, 1], the raw L.
    """

    def __init__(self, probs: Tensor) -> None:
        self._raw = probs
        self._refined = torch.zeros_like(probs)

    def add(self, logits: Tensor, classes: list[int]) -> None:
        """Raise L'[c] to σ(logit) · L[c] where the logit is positive and this is larger.

        Args:
            logits: (N, H, W) float32 mask logits of accepted regions.
            classes: N classes in [0, C).
        """
        for mask_logits, c in zip(logits, classes, strict=True):
            # where, not a product: SAM's NaN must not reach the map.
            value = torch.where(mask_logits > 0, mask_logits.sigmoid() * self._raw[c], 0.0)
            torch.maximum(self._refined[c], value, out=self._refined[c])

    def finish(self, labels: Tensor, failed: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Decide the labels and give rejected regions back their raw prediction (10, 11).

        Args:
            labels: (H, W) int64, the raw S.
            failed: (h_d, w_d) bool, the union of the rejected regions on the working grid, or
                None where nothing was rejected.

        Returns:
            S' (H, W) int64, L' (C, H, W) float32 and the covered map (H, W) bool.
        """
        refined = self._refined
        covered = refined.sum(dim=0) > 0
        new_labels = torch.where(covered, refined.argmax(dim=0), labels)
        if failed is not None:
            grid = failed[None, None].to(refined.dtype)
            kept = F.interpolate(grid, labels.shape, mode="nearest")[0, 0] > 0
            new_labels = torch.where(kept, labels, new_labels)
            refined = torch.where(kept, self._raw, refined)
        return new_labels, refined, covered
