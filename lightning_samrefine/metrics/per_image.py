"""The class totals of every single image, so that images can be resampled after the epoch."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lightning_samrefine.metrics.confusion import class_totals
from lightning_samrefine.metrics.counts import CountingMetric

# A row: 1 if a new image starts with it, the class, and five totals, all int32.
_COLUMNS = 7
_MERGE_EVERY = 256


class ImageTotals(CountingMetric):
    """Keeps the totals of the classes that occur in each image: about 200 bytes per image.

    Args:
        num_classes: C.

    Attributes:
        rows: List of flat int32 tensors.
    """

    rows: list[Tensor]

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.add_state("rows", [], dist_reduce_fx="cat")
        self._start()

    def reset(self) -> None:
        """Remove all images."""
        super().reset()
        self._start()

    def _start(self) -> None:
        # Of the image whose parts are being added.
        self._parts: list[Tensor] = []
        # torchmetrics gathers an empty list as float32, which does not fit other processes' int32.
        self.rows.append(torch.empty(0, dtype=torch.int32, device=self.device))

    def update(self, raw: Tensor, refined: Tensor, part: tuple[int, int] = (0, 1)) -> None:
        """Add one image, or a part of it.

        Args:
            raw: (C, C + 1) int64 confusion matrix of the raw prediction.
            refined: The same of the refined one.
            part: Index and number of the image's parts, which are added in their order.
        """
        index, count = part
        added = (raw, refined)
        self._parts = (
            [a + b for a, b in zip(self._parts, added, strict=True)] if index else [*added]
        )
        if index < count - 1:
            return
        hits, true, predicted = class_totals(self._parts[0])
        hits_refined, _, predicted_refined = class_totals(self._parts[1])
        totals = torch.stack([true, hits, predicted, hits_refined, predicted_refined], dim=1)
        classes = torch.arange(self.num_classes, device=raw.device)[:, None]
        rows = torch.cat([classes == 0, classes, totals], dim=1).to(torch.int32)
        # On a GPU this would make the CPU wait for the number of classes: it is done when merging.
        self.rows.append(_compact(rows) if rows.device.type == "cpu" else rows.flatten())
        if len(self.rows) >= _MERGE_EVERY:  # a small tensor is mostly overhead
            self.rows[:] = [_compact(torch.cat(self.rows).view(-1, _COLUMNS))]

    def compute(self) -> np.ndarray:
        """Return the totals of all processes' images, in an order that their content decides.

        Returns:
            (N, 5, C) int64: pixels of a class, hits of the raw prediction, pixels that it calls
            the class, and the last two of the refined prediction. Processes and samplers deal
            images in different orders; sorted, the same images give the same array.
        """
        flat = torch.cat(self.rows) if isinstance(self.rows, list) else self.rows
        rows = flat.cpu().numpy().reshape(-1, _COLUMNS)
        image = np.cumsum(rows[:, 0]) - 1
        images = int(image[-1]) + 1 if len(image) else 0
        totals = np.zeros((images, 5, self.num_classes), dtype=np.int64)
        totals[image, :, rows[:, 1]] = rows[:, 2:]
        order = sorted(range(images), key=lambda index: totals[index].tobytes())
        return totals[order]


def _compact(rows: Tensor) -> Tensor:
    """Drop the (N, 7) rows of classes that do not occur, but for an image's first, and flatten."""
    return rows[(rows[:, 0] == 1) | (rows[:, 2:] > 0).any(dim=1)].flatten()
