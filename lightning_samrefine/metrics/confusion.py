"""Confusion matrices, and the scores that are read from them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_samrefine.metrics.counts import Counts
from lightning_samrefine.metrics.trimap import KnownLabels, class_or_none

# Of `count_values` on a GPU, for all values together.
_COUNTERS = 2**16


class BandedConfusion(Counts):
    """Confusion matrices of the whole image and of bands around its borders, counted together.

    Bands of growing width lie inside one another. A pixel belongs to one ring: that of the
    narrowest band around it. One count by ring, true class and predicted class holds them all.

    Args:
        num_classes: C.
        bands: W, the number of bands; 0 counts the whole image only.

    Attributes:
        counts: (W + 1, C, C + 1) int64: ring (the last is the rest), true class, predicted class. A
            prediction outside [0, C) is in column C: wrong for the true class, and no other class's
            false positive.
    """

    def __init__(self, num_classes: int, bands: int) -> None:
        super().__init__(bands + 1, num_classes, num_classes + 1)
        self.num_classes = num_classes

    def count(self, prediction: KnownLabels, target: KnownLabels, rings: Tensor) -> Tensor:
        """Return the matrix of each ring, (W + 1, C, C + 1) int64, of one (H, W) image.

        The prediction is known at the same pixels as the target, whose `KnownLabels.rings` for the
        W bands are given.
        """
        size = self.counts.numel()
        # int32 halves the memory traffic, which is all that this costs.
        cell = rings.to(torch.int32) * self.num_classes + target.labels
        cell = cell * (self.num_classes + 1) + prediction.labels
        # A cell past the end takes what is not counted: selecting would make the CPU wait.
        cell.masked_fill_(~target.known, size)
        return count_values(cell, size + 1)[:-1].view_as(self.counts)

    def update(self, counts: Tensor) -> None:
        """Add what `count` returned."""
        self.counts += counts

    def compute(self) -> Tensor:
        """Return the matrices of every band and of the whole image, over all processes.

        Returns:
            (W + 1, C, C + 1) int64, the narrowest band first and the whole image last.
        """
        return self.counts.cumsum(dim=0)


def confusion_matrix(prediction: Tensor, target: Tensor, num_classes: int) -> Tensor:
    """Count pixels by true class and predicted class.

    Args:
        prediction: Integer tensor of any shape; outside [0, C) no class is predicted.
        target: Integer tensor of the same shape, in [0, C).
        num_classes: C.

    Returns:
        (C, C + 1) int64, rows the true class; column C is "no class predicted".
    """
    size = num_classes, num_classes + 1
    cell = target.long() * size[1] + class_or_none(prediction, num_classes)
    return count_values(cell, size[0] * size[1]).view(size)


def count_values(values: Tensor, size: int) -> Tensor:
    """Count integers in [0, size) without making the CPU wait for a GPU.

    `torch.bincount` waits twice there, for the smallest and the largest value.

    Returns:
        (size,) int64.
    """
    values = values.flatten().long()
    if values.device.type == "cpu":
        return torch.bincount(values, minlength=size)
    # Several counters for each value, so that few threads meet at one.
    copies = max(1, _COUNTERS // size)
    positions = torch.arange(len(values), device=values.device).remainder_(copies)
    counts = torch.zeros(size * copies, dtype=torch.int64, device=values.device)
    counts.scatter_add_(0, positions.mul_(size).add_(values), torch.ones_like(values))
    return counts.view(copies, size).sum(dim=0)


def class_iou(matrix: Tensor, ignore_index: int | None = None) -> Tensor:
    """Return the intersection over union (Jaccard index) of every class.

    Args:
        matrix: (C, C + 1) int64, see `BandedConfusion`.
        ignore_index: A class that is not scored, if it is in [0, C).

    Returns:
        (C,) float64 in [0, 1], NaN for a class that is neither in the target nor predicted.
    """
    hits, true, predicted = class_totals(matrix)
    iou = hits.double() / (true + predicted - hits).double()
    return unscored(iou, ignore_index)


def matrix_scores(matrix: Tensor, ignore_index: int | None = None) -> dict[str, Tensor]:
    """Return the usual scores of one confusion matrix.

    Args:
        matrix: (C, C + 1) int64, see `BandedConfusion`.
        ignore_index: A class that is not scored, if it is in [0, C).

    Returns:
        float64 in [0, 1]. Of shape (C,), NaN for a class that does not occur: ``iou``, ``dice``
        (the F1 score) and ``recall`` (a class's accuracy; NaN if it is not in the target).
        Scalars, NaN without a pixel: ``miou``, ``mdice``, ``class_acc`` (means over the classes
        that occur), ``pixel_acc`` (share of the pixels that are right) and ``fwiou`` (IoU weighted
        by a class's share of the target).
    """
    hits, true, predicted = (totals.double() for totals in class_totals(matrix))
    iou = class_iou(matrix, ignore_index)
    dice = unscored(2 * hits / (true + predicted), ignore_index)
    recall = unscored(hits / true, ignore_index)
    return {
        "iou": iou,
        "dice": dice,
        "recall": recall,
        "miou": iou.nanmean(),
        "mdice": dice.nanmean(),
        "class_acc": recall.nanmean(),
        "pixel_acc": matrix.diagonal().sum().double() / matrix.sum(),
        "fwiou": (true * iou.nan_to_num()).sum() / true.sum(),
    }


def class_totals(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the pixels of every class that are right, that are its own, and predicted as it.

    These are three (…, C) int64 tensors, of (…, C, C + 1) matrices or, of overlapping classes,
    (…, C + 1, C + 1).
    """
    num_classes = matrix.shape[-1] - 1
    of_classes = matrix[..., :num_classes, :]
    hits = of_classes.diagonal(dim1=-2, dim2=-1)
    return hits, of_classes.sum(dim=-1), matrix[..., :num_classes].sum(dim=-2)


def unscored(scores: Tensor, ignore_index: int | None) -> Tensor:
    """Set the score of the class that is not scored, if it is in [0, C), to NaN.

    Args:
        scores: (C,) float.
        ignore_index: The class, None for none.
    """
    if ignore_index is not None and 0 <= ignore_index < len(scores):
        scores[ignore_index] = math.nan
    return scores
