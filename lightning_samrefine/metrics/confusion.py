"""Confusion matrices, and the scores that are read from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor
from torchmetrics.utilities.plot import plot_confusion_matrix

from lightning_samrefine.metrics.counts import Counts
from lightning_samrefine.metrics.trimap import KnownLabels, valid_pixels

# Of `count_values` on a GPU, for all values together.
_COUNTERS = 2**16


class ConfusionMatrix(Counts):
    """Counts pixels by true class and predicted class, with a column for "no class predicted".

    Args:
        num_classes: C.
        ignore_index: Target value that is not counted, inside or outside [0, C), or None. Any
            other target outside [0, C) is not counted either.

    Attributes:
        counts: (C, C + 1) int64, rows the target's class, columns the predicted one. A prediction
            outside [0, C) is in column C: wrong for the target's class, and no other class's
            false positive.
    """

    def __init__(self, num_classes: int, ignore_index: int | None = None) -> None:
        super().__init__(num_classes, num_classes + 1)
        self.num_classes = num_classes
        self.ignore_index = ignore_index

    def update(self, prediction: Tensor, target: Tensor, where: Tensor | None = None) -> None:
        """Add pixels.

        Args:
            prediction: Integer tensor of any shape, the predicted classes.
            target: Integer tensor of the same shape, the true classes.
            where: Bool tensor of the same shape, the pixels to count; all of them where None.

        Raises:
            ValueError: Shapes that differ.
        """
        check_shape("prediction", prediction, target)
        counted = valid_pixels(target, self.num_classes, self.ignore_index)
        if where is not None:
            counted &= where
        columns = self.num_classes + 1
        outside = (prediction < 0) | (prediction >= self.num_classes)
        # int32 halves the memory traffic, which is all that this costs.
        column = prediction.to(torch.int32).masked_fill(outside, self.num_classes)
        cell = target.to(torch.int32) * columns + column
        self.counts += count_cells(cell, counted, self.counts.numel()).view_as(self.counts)

    def plot(
        self,
        val: Tensor | None = None,
        ax: Axes | None = None,
        add_text: bool = True,
        labels: list[str] | None = None,
    ) -> Any:
        """Draw the matrix as torchmetrics draws its own, without the column of no class.

        Args:
            val: What `compute` returned; computed if None.
            ax: Axes to draw on; a new figure's if None.
            add_text: Whether each cell shows its count.
            labels: C names of classes.

        Returns:
            The figure (None beside ``ax``) and its axes.
        """
        matrix = self.compute() if val is None else val
        return plot_confusion_matrix(
            matrix[:, : self.num_classes].cpu(), ax=ax, add_text=add_text, labels=labels
        )


class BandedConfusion(Counts):
    """Confusion matrices of the whole image and of bands around its borders, counted together.

    Bands of growing width lie inside one another. A pixel belongs to one ring: that of the
    narrowest band around it. One count by ring, true class and predicted class holds them all.

    Args:
        num_classes: C.
        widths: W widths of bands in pixels, ascending, see `KnownLabels.rings`.

    Attributes:
        counts: (W + 1, C, C + 1) int64, see `ConfusionMatrix`; the last ring is the rest.
    """

    def __init__(self, num_classes: int, widths: Sequence[int]) -> None:
        super().__init__(len(widths) + 1, num_classes, num_classes + 1)
        self.num_classes = num_classes
        self.widths = list(widths)

    def count(self, prediction: KnownLabels, target: KnownLabels, rings: Tensor) -> Tensor:
        """Return the matrix of each ring, (W + 1, C, C + 1) int64, of one (H, W) image.

        The prediction is known at the same pixels as the target, whose `KnownLabels.rings` for the
        same widths are given.
        """
        cell = rings.to(torch.int32) * self.num_classes + target.labels
        cell = cell * (self.num_classes + 1) + prediction.labels
        return count_cells(cell, target.known, self.counts.numel()).view_as(self.counts)

    def update(self, counts: Tensor) -> None:
        """Add what `count` returned."""
        self.counts += counts

    def compute(self) -> Tensor:
        """Return the matrices of every band and of the whole image, over all processes.

        Returns:
            (W + 1, C, C + 1) int64, in the order of the widths, the whole image last.
        """
        return self.counts.cumsum(dim=0)


def check_shape(name: str, prediction: Tensor, target: Tensor) -> None:
    """Refuse a prediction of another shape than the target's.

    Raises:
        ValueError: As described.
    """
    if prediction.shape != target.shape:
        raise ValueError(
            f"{name} must have the target's shape {tuple(target.shape)}, got shape "
            f"{tuple(prediction.shape)}"
        )


def count_cells(cell: Tensor, counted: Tensor, size: int) -> Tensor:
    """Count how often each of ``size`` values occurs where ``counted``; overwrites ``cell``.

    Returns:
        (size,) int64.
    """
    # A cell past the end takes what is not counted: selecting would make the CPU wait.
    cell.masked_fill_(~counted, size)
    return count_values(cell, size + 1)[:-1]


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
        matrix: (C, C + 1) int64, see `ConfusionMatrix`.
        ignore_index: A class that is not scored, if it is in [0, C).

    Returns:
        (C,) float64 in [0, 1], NaN for a class that is neither in the target nor predicted.
    """
    hits, true, predicted = class_totals(matrix)
    iou = hits.double() / (true + predicted - hits).double()
    return unscored(iou, ignore_index)


def on_same_classes(raw: Tensor, refined: Tensor) -> tuple[Tensor, Tensor]:
    """Return the (C,) scores of two sides, both NaN for a class that either side lacks."""
    absent = raw.isnan() | refined.isnan()
    return raw.masked_fill(absent, math.nan), refined.masked_fill(absent, math.nan)


def matrix_scores(matrix: Tensor, ignore_index: int | None = None) -> dict[str, Tensor]:
    """Return the usual scores of one confusion matrix.

    Args:
        matrix: (C, C + 1) int64, see `ConfusionMatrix`.
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
        ignore_index: See `ConfusionMatrix`.
    """
    if ignore_index is not None and 0 <= ignore_index < len(scores):
        scores[ignore_index] = math.nan
    return scores
