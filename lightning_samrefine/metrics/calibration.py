"""Predicted against true IoU of every region: is SAM's predicted IoU a good threshold?

Not torchmetrics' calibration error and AUROC: these keep every region, in floats whose sums depend
on batches and processes; whole numbers take constant memory and add up exactly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_samrefine.metrics.counts import CountingMetric
from lightning_samrefine.refine.results import Regions
from lightning_samrefine.utils.device import Download, upload

BINS = 10
# Levels of predicted IoU that AUROC distinguishes.
_RANKS = 4096
# Sums of fractions are kept as whole millionths, which add up to the same in any order.
_UNIT = 1_000_000


@dataclass(frozen=True)
class RegionScores:
    """The true IoUs of N regions, measured on the grid of SAM's low-resolution masks.

    A region's ground truth is the target's pixels of its class inside its box, and those outside it
    that the measured mask covers. Pixels that are not scored are left out.

    Attributes:
        raw_iou: (N,) float64, IoU of the raw prediction inside the box.
        mask_iou: (N,) float64, IoU of SAM's mask. Both are NaN without a scored pixel to measure.
        windows: (N, 4) float32 XYXY in image pixels, where SAM's mask is, its rim included; all 0
            for an empty mask.
    """

    raw_iou: Tensor
    mask_iou: Tensor
    windows: Tensor

    @property
    def measured(self) -> Tensor:
        """(N,) bool, the regions with ground truth."""
        return self.raw_iou.isfinite() & self.mask_iou.isfinite()


def score_regions(regions: Regions, raw: Tensor, target: Tensor, valid: Tensor) -> RegionScores:
    """Measure SAM's masks and the regions that they would replace against the target.

    Args:
        regions: N regions with their masks.
        raw: (H, W) integer, the raw prediction.
        target: (H, W) integer.
        valid: (H, W) bool, the pixels that are scored.

    Returns:
        Scores on the CPU.
    """
    if regions.windows:
        return _score_windows(regions, raw, target, valid)
    assert regions.masks is not None
    (height, width), (rows, columns) = target.shape, regions.masks.shape[1:]
    y = (torch.arange(rows) + 0.5) * (height / rows)
    x = (torch.arange(columns) + 0.5) * (width / columns)
    cells = upload(y.long()[:, None] * width + x.long()[None], target.device)
    # numpy counts bools an order of magnitude faster than torch does on the CPU.
    at_cells = [values.flatten()[cells] for values in (raw, target, valid)]
    at_raw, at_true, known, masks = Download(*at_cells, regions.masks).wait()
    boxes = regions.extents.numpy()
    row_ends = np.searchsorted(y.numpy(), boxes[:, 1::2])
    column_ends = np.searchsorted(x.numpy(), boxes[:, 0::2])
    iou = np.full((len(regions), 2), np.nan)
    of_class = {
        c: ((at_true == c) & known, (at_raw == c) & known)
        for c in regions.classes.unique().tolist()
    }
    for index, c in enumerate(regions.classes.tolist()):
        truth, found = of_class[c]
        box = slice(*row_ends[index]), slice(*column_ends[index])
        mask = masks[index] & known
        raw_hits = np.count_nonzero(found[box] & truth[box])
        raw_union = np.count_nonzero(found[box] | truth[box])
        mask_hits = np.count_nonzero(mask & truth)
        mask_union = np.count_nonzero(mask) + np.count_nonzero(truth[box] & ~mask[box])
        if raw_union > 0:
            iou[index, 0] = raw_hits / raw_union
        if mask_union > 0:
            iou[index, 1] = mask_hits / mask_union
    raw_iou, mask_iou = torch.from_numpy(iou).T
    return RegionScores(raw_iou, mask_iou, _windows(masks, height, width))


def _score_windows(regions: Regions, raw: Tensor, target: Tensor, valid: Tensor) -> RegionScores:
    """Measure the regions of every window inside it."""
    iou, windows = [torch.empty(2, 0, dtype=torch.float64)], [torch.empty(0, 4)]
    for own in regions.windows:
        if len(own.table) == 0:
            continue
        scores = score_regions(own.regions, *(own.window.of(maps) for maps in (raw, target, valid)))
        iou.append(torch.stack([scores.raw_iou, scores.mask_iou]))
        offset = torch.tensor([own.window.left, own.window.top] * 2)
        found = scores.windows.any(dim=1, keepdim=True)
        windows.append(torch.where(found, scores.windows + offset, 0.0))
    raw_iou, mask_iou = torch.cat(iou, dim=1)
    return RegionScores(raw_iou, mask_iou, torch.cat(windows))


@dataclass(frozen=True)
class Calibration:
    """Predicted IoU against true IoU.

    Attributes:
        regions: Number of regions with ground truth.
        better: Number of them that SAM's mask fits better than the raw prediction does.
        bin_regions: (10,) int64, regions by predicted IoU in tenths.
        bin_pred_iou: (10,) float64, their mean predicted IoU, NaN in an empty bin.
        bin_true_iou: (10,) float64, their mean true IoU.
        ece: Expected calibration error: mean distance of the two, weighted by regions.
        auroc: Probability that a region that got better has a larger predicted IoU than one that
            did not: 0.5 is chance, NaN if all or none got better.
    """

    regions: int
    better: int
    bin_regions: Tensor
    bin_pred_iou: Tensor
    bin_true_iou: Tensor
    ece: float
    auroc: float

    @classmethod
    def of(cls, bins: Tensor, ranks: Tensor) -> Calibration:
        """Compute it from the counts of a `RegionCalibration`."""
        regions, pred_sum, true_sum = bins.cpu()
        worse, better = ranks.cpu()
        total = int(regions.sum())
        gaps = (pred_sum - true_sum).abs().sum().item() / _UNIT
        return cls(
            regions=total,
            better=int(better.sum()),
            bin_regions=regions,
            bin_pred_iou=pred_sum.double() / _UNIT / regions,
            bin_true_iou=true_sum.double() / _UNIT / regions,
            ece=gaps / total if total else math.nan,
            auroc=_auroc(worse, better),
        )


class RegionCalibration(CountingMetric):
    """Counts regions by predicted IoU, accepted and rejected ones.

    Guo et al., *On Calibration of Modern Neural Networks*, ICML 2017, with IoU for accuracy.
    Everything is counted in whole numbers: predicted IoUs closer than 1/4096 are ties for AUROC.

    Attributes:
        bins: (3, 10) int64: regions, and the sums of predicted and of true IoU in millionths.
        ranks: (2, 4096) int64: regions that did not get better, and that did, by predicted IoU.
    """

    bins: Tensor
    ranks: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("bins", torch.zeros(3, BINS, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("ranks", torch.zeros(2, _RANKS, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, pred_iou: Tensor, true_iou: Tensor, better: Tensor) -> None:
        """Add N regions.

        Args:
            pred_iou: (N,) float; values outside [0, 1] are clipped.
            true_iou: (N,) float in [0, 1].
            better: (N,) bool, whether the region's mask is better than what it would replace.
        """
        pred_iou = pred_iou.double().clamp(0, 1)
        bins = torch.zeros(3, BINS, dtype=torch.int64)
        ranks = torch.zeros(2, _RANKS, dtype=torch.int64)
        which = (pred_iou * BINS).long().clamp(max=BINS - 1)
        amounts = (torch.ones_like(which), _millionths(pred_iou), _millionths(true_iou))
        for row, amount in zip(bins, amounts, strict=True):
            row.index_add_(0, which, amount)
        rank = (pred_iou * _RANKS).long().clamp(max=_RANKS - 1)
        cell = better.long() * _RANKS + rank
        ranks += torch.bincount(cell, minlength=2 * _RANKS).view(2, _RANKS)
        self.bins += upload(bins, self.bins.device)
        self.ranks += upload(ranks, self.ranks.device)

    def compute(self) -> dict[str, Tensor]:
        """Return ``bins`` and ``ranks`` over all processes, for `Calibration.of`."""
        return {"bins": self.bins, "ranks": self.ranks}


def _windows(masks: np.ndarray, height: int, width: int) -> Tensor:
    """Return the (N, 4) float32 boxes of (N, h, w) masks in image pixels, one cell wider."""
    sides = []
    for axis, size in ((1, width), (2, height)):  # columns that hold any of the mask, then rows
        used: np.ndarray = np.any(masks, axis=axis)
        cells = used.shape[1]
        first, last = used.argmax(axis=1), cells - used[:, ::-1].argmax(axis=1)
        some = np.any(used, axis=1)
        scale = size / cells
        sides.append((np.where(some, first - 1, 0) * scale, np.where(some, last + 1, 0) * scale))
    (x0, x1), (y0, y1) = sides
    return torch.from_numpy(np.stack([x0, y0, x1, y1], axis=1)).float()


def _millionths(fractions: Tensor) -> Tensor:
    return (fractions.double() * _UNIT).round().long()


def _auroc(worse: Tensor, better: Tensor) -> float:
    """Return P(rank of a better one > rank of a worse one), ties as a half, from counts by rank."""
    pairs = int(worse.sum()) * int(better.sum())
    if pairs == 0:
        return math.nan
    below = worse.cumsum(dim=0) - worse
    return int((better * (2 * below + worse)).sum()) / (2 * pairs)
