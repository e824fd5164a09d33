"""Which prompts SAM has answered about an image, and with which masks.

A prediction changes from epoch to epoch, yet most of its regions only a little. On the lattice of
`prompts.lattice_prompts` they ask what was asked before, so a cache answers in SAM's place. An
answer depends on the image, the prompt and the model alone: it makes no difference which run or
epoch asked first. On a CPU that holds to the bit, for prompts are decoded in chunks of one size; on
a GPU the last bits depend on the size of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_samrefine.cache import EmbeddingCache
from lightning_samrefine.image_masks import MASKS_VERSION, ImageMasks
from lightning_samrefine.models.protocol import Promptable

# Of an image the answers that were used last: 3 MB where a mask has 256×192 pixels.
_MAX_KNOWN = 256


@dataclass(frozen=True)
class KnownMasks:
    """Answers about one image, on the CPU.

    Attributes:
        prompts: (K, 6) int32, different prompts of `prompts.lattice_prompts`.
        packed: (K, B) uint8, their masks as in `ImageMasks`.
        pred_iou: (K,) float32.
    """

    prompts: np.ndarray
    packed: Tensor
    pred_iou: Tensor

    @classmethod
    def nothing(cls) -> KnownMasks:
        """Know no prompt."""
        packed = torch.empty(0, 0, dtype=torch.uint8)
        return cls(np.empty((0, 6), np.int32), packed, torch.empty(0))

    def rows(self, prompts: np.ndarray) -> np.ndarray:
        """Return (N,) int64, where (N, 6) prompts are among the known ones; -1 for nowhere."""
        row_of = {prompt.tobytes(): row for row, prompt in enumerate(self.prompts)}
        return np.array([row_of.get(prompt.tobytes(), -1) for prompt in prompts], dtype=np.int64)

    def missing(self, prompts: np.ndarray) -> np.ndarray:
        """Return (M, 6) int32, those of (N, 6) prompts that are not known, each once."""
        unknown = prompts[self.rows(prompts) < 0]
        _, first = np.unique(unknown, axis=0, return_index=True)
        return unknown[np.sort(first)]

    def masks(self, prompts: np.ndarray, mask_hw: tuple[int, int]) -> ImageMasks:
        """Return the N masks of (N, 6) prompts, all of them known.

        Args:
            prompts: As `lattice_prompts` returns them.
            mask_hw: (h_n, w_n), the part of the low-resolution logits that the image fills.
        """
        rows = torch.from_numpy(self.rows(prompts))
        return ImageMasks(self.packed[rows], self.pred_iou[rows], mask_hw)

    def extended(self, prompts: np.ndarray, masks: ImageMasks) -> KnownMasks:
        """Add the answers to (M, 6) prompts that are not known yet."""
        if len(self.prompts) == 0:
            return KnownMasks(prompts, masks.packed.cpu(), masks.pred_iou.cpu())
        return KnownMasks(
            np.concatenate([self.prompts, prompts]),
            torch.cat([self.packed, masks.packed.cpu()]),
            torch.cat([self.pred_iou, masks.pred_iou.cpu()]),
        )

    def used_last(self, prompts: np.ndarray) -> KnownMasks:
        """Move (N, 6) known prompts to the front, and forget what is last beyond a limit."""
        used = np.unique(self.rows(prompts))
        order = np.concatenate([used, np.setdiff1d(np.arange(len(self.prompts)), used)])
        order = order[: max(_MAX_KNOWN, len(used))]
        rows = torch.from_numpy(order)
        return KnownMasks(self.prompts[order], self.packed[rows], self.pred_iou[rows])


class PromptMemory:
    """Recalls and keeps `KnownMasks` in an `EmbeddingCache`.

    Args:
        cache: Where they are.
        sam: The model that answers.
        dtype: Of the autocast that it answers under.
        stride: r, which the prompts' grid depends on.
    """

    def __init__(
        self, cache: EmbeddingCache, sam: Promptable, dtype: torch.dtype | None, stride: int
    ) -> None:
        self._cache, self._sam, self._dtype = cache, sam, dtype
        self._derived = f"prompts {MASKS_VERSION} {stride}"

    def recall(self, image: Tensor, prompts: np.ndarray) -> KnownMasks:
        """Return what is known about an image, and count which of (N, 6) prompts are.

        Args:
            image: (3, H, W) uint8.
            prompts: As `lattice_prompts` returns them.
        """
        kept = self._cache.recall(self._sam, image, self._dtype, self._derived)
        known = KnownMasks.nothing()
        if kept is not None:
            asked, packed, pred_iou = kept
            known = KnownMasks(asked.numpy(), packed, pred_iou)
        found = int((known.rows(prompts) >= 0).sum())
        self._cache.count_prompts(found, len(prompts) - found)
        return known

    def keep(self, image: Tensor, known: KnownMasks) -> None:
        """Keep what is known about an image in place of what was kept before."""
        tensors = (torch.from_numpy(known.prompts), known.packed, known.pred_iou)
        self._cache.keep(self._sam, image, self._dtype, self._derived, tensors)
