"""Confusion matrices of single images, and the figures made of their sums."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.domains.pairs import IGNORED
from lightning_samrefine.metrics import trimap_band

TRIMAP_WIDTH = 3
_RESAMPLES = 1000

# (N, C, C) int64 of N images: rows are true classes, columns predicted ones.
Matrices = NDArray[np.int64]


def count(labels: Tensor, target: Tensor, num_classes: int) -> NDArray[np.int64]:
    """Return (2, C, C) int64: the confusion matrix of the image, and of its trimap."""
    band = trimap_band(target, TRIMAP_WIDTH, num_classes, IGNORED)
    scored = target != IGNORED
    return np.stack([_confusion(labels, target, where, num_classes) for where in (scored, band)])


def _confusion(
    labels: Tensor, target: Tensor, where: Tensor, num_classes: int
) -> NDArray[np.int64]:
    cells = target[where] * num_classes + labels[where]
    counts = torch.bincount(cells, minlength=num_classes**2)
    return counts.view(num_classes, num_classes).numpy()


def ious(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return (..., C) IoU in % of (..., C, C) matrices; NaN for a class on neither side."""
    hits = np.diagonal(matrix, axis1=-2, axis2=-1).astype(np.float64)
    union = matrix.sum(axis=-1) + matrix.sum(axis=-2) - hits
    with np.errstate(invalid="ignore"):
        return 100 * hits / np.where(union > 0, union, np.nan)


def miou(matrices: Matrices) -> float:
    """Return mIoU in % of the summed matrices, over the classes that occur."""
    return float(np.nanmean(ious(matrices.sum(axis=0))))


def interval(refined: Matrices, raw: Matrices) -> tuple[float, float]:
    """Return the 95% interval of the gain in mIoU over paired bootstrap resamples of the images."""
    count = len(raw)
    draws = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), _RESAMPLES)
    gains = []
    for stack in (refined, raw):
        sums = np.tensordot(draws.astype(np.float64), stack.astype(np.float64), axes=1)
        gains.append(np.nanmean(ious(sums), axis=1))
    low, high = np.percentile(gains[0] - gains[1], [2.5, 97.5])
    return float(low), float(high)


def worst_class(refined: Matrices, raw: Matrices) -> tuple[int, float]:
    """Return the class that lost most (or gained least) and its difference in IoU, in points."""
    change = ious(refined.sum(axis=0)) - ious(raw.sum(axis=0))
    worst = int(np.nanargmin(change))
    return worst, float(change[worst])


def share_hurt(refined: Matrices, raw: Matrices) -> float:
    """Return the share of images, in %, whose pixel accuracy falls."""
    right = [np.trace(stack, axis1=1, axis2=2) for stack in (refined, raw)]
    return 100 * float(np.mean(right[0] < right[1]))
