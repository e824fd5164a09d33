"""Counts of the pixels that refinement changed: fixed, broken, or wrong in another way."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_samrefine.metrics.confusion import count_values
from lightning_samrefine.metrics.counts import Counts
from lightning_samrefine.utils.device import Download

# A changed pixel was wrong and is right, was right and is wrong, or is wrong in another way.
KINDS = ("fixed", "broken", "swapped")


class ChangedPixels:
    """The scored pixels of one image whose label refinement changed.

    Args:
        raw: (H, W) integer.
        refined: (H, W) integer.
        target: (H, W) integer.
        valid: (H, W) bool, the pixels that are scored.

    Attributes:
        rows: (K,) int64.
        columns: (K,) int64.
        kinds: (K,) int64, indices into `KINDS`.
        raw: (K,) integer, what they were.
        refined: (K,) integer, what they are.
        target: (K,) integer, what they should be.
    """

    def __init__(self, raw: Tensor, refined: Tensor, target: Tensor, valid: Tensor) -> None:
        where = ((raw != refined) & valid).flatten().nonzero()[:, 0]
        width = raw.shape[-1]
        self.rows, self.columns = where // width, where % width
        self.raw, self.refined, self.target = (
            labels.flatten()[where] for labels in (raw, refined, target)
        )
        self.kinds = torch.full_like(where, KINDS.index("swapped"))
        self.kinds.masked_fill_(self.refined == self.target, KINDS.index("fixed"))
        self.kinds.masked_fill_(self.raw == self.target, KINDS.index("broken"))

    def __len__(self) -> int:
        return len(self.kinds)

    def totals(self) -> tuple[int, int, int]:
        """Return how many pixels became right, became wrong, and are wrong in another way."""
        fixed, broken, swapped = count_values(self.kinds, len(KINDS)).tolist()
        return fixed, broken, swapped

    def by_class(self, num_classes: int) -> Tensor:
        """Return (3, C) int64, the pixels of each kind by their true class."""
        cell = self.kinds * num_classes + self.target
        return count_values(cell, len(KINDS) * num_classes).view(len(KINDS), num_classes)

    def by_region(self, windows: Tensor, classes: Tensor) -> Tensor:
        """Return what each of N regions did: the pixels in its window that became its class.

        Args:
            windows: (N, 4) float XYXY in image pixels, exclusive ends.
            classes: (N,) int64.

        Returns:
            (N, 3) int64. A pixel in the windows of two regions of its new class counts for both.
        """
        counts = torch.zeros(len(classes), len(KINDS), dtype=torch.int64)
        if len(self) == 0:
            return counts
        # The class first: it leaves few pixels to look at for each region.
        rows, columns, kinds, refined = Download(
            self.rows, self.columns, self.kinds, self.refined
        ).tensors()
        for c in classes.unique().tolist():
            mine = refined == c
            x, y, kind = columns[mine] + 0.5, rows[mine] + 0.5, kinds[mine]
            for index in (classes == c).nonzero()[:, 0].tolist():
                x0, y0, x1, y1 = windows[index].tolist()
                inside = (x > x0) & (x < x1) & (y > y0) & (y < y1)
                counts[index] = torch.bincount(kind[inside], minlength=len(KINDS))
        return counts


class ChangeCounts(Counts):
    """Counts changed pixels by kind and true class.

    Args:
        num_classes: C.

    Attributes:
        counts: (3, C) int64, rows as in `KINDS`.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__(len(KINDS), num_classes)
        self.num_classes = num_classes

    def update(self, changes: ChangedPixels) -> None:
        """Add one image."""
        self.counts += changes.by_class(self.num_classes)
