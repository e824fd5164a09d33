"""Chooses thresholds, and the classes that certainly gain from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from lightning_samrefine.config import RefineConfig
from lightning_samrefine.metrics.bootstrap import class_gains, mean_gain
from lightning_samrefine.tune.counts import GridCounts
from lightning_samrefine.tune.settings import RESAMPLES, Grid, Objective, Rule

Statistic = Callable[[np.ndarray], np.ndarray]
"""From (R, 5, C) summed totals to R values, or to (R, C)."""


@dataclass(frozen=True)
class Choice:
    """The chosen thresholds and classes.

    Attributes:
        cell: The best cell of the grid, with all classes refined.
        cell_of_class: C cells, of the same pair of τ_c and τ_m.
        is_open: C flags, True for a refined class.
        low: C lower bounds of the gain in IoU: final for a refined class, at the time of freezing
            for a frozen one.
    """

    cell: int
    cell_of_class: tuple[int, ...]
    is_open: tuple[bool, ...]
    low: tuple[float, ...]

    def config(self, grid: Grid, base: RefineConfig) -> RefineConfig:
        """Return the configuration with the chosen thresholds and classes."""
        cell = grid.cells[self.cell]
        opened = [c for c, is_open in enumerate(self.is_open) if is_open]
        own = {
            c: grid.cells[self.cell_of_class[c]].pred_iou_thresh
            for c in opened
            if self.cell_of_class[c] != self.cell
        }
        return replace(
            cell.config(base),
            classes=None if len(opened) == len(self.is_open) else tuple(opened),
            class_pred_iou_thresh=own or None,
        )


def choose(counts: GridCounts, grid: Grid, images: np.ndarray, rule: Rule) -> Choice:
    """Choose from the images of a sweep.

    First, the best cell is chosen. Then a class gets its own τ_iou if this certainly increases the
    objective. Last, classes are frozen one at a time, the least certain first, until the gain of
    every refined class has a lower bound above the margin; freezing one changes the others'.

    Args:
        counts: The counts of all images.
        grid: The grid of the sweep.
        images: (n,) integer, the images to choose from.
        rule: The definition of certain.
    """
    cell = best_cell(counts, grid, images, rule.objective)
    resample = _Resamples(len(images), rule.confidence)
    cells = [cell] * counts.num_classes
    for c in range(counts.num_classes):
        cells = _own_threshold(c, cells, counts, grid, images, rule, resample)

    is_open = np.ones(counts.num_classes, dtype=bool)
    low = np.zeros(counts.num_classes)
    while is_open.any():
        totals = counts.mixed_totals(cells, is_open, rule.objective)[images]
        bounds = resample.low(totals, class_gains)
        low = np.where(is_open, bounds, low)
        worst = int(np.where(is_open, bounds, np.inf).argmin())
        if bounds[worst] > rule.margin:
            break
        is_open = is_open & (np.arange(counts.num_classes) != worst)
    return Choice(cell, tuple(cells), tuple(is_open.tolist()), tuple(low.tolist()))


def best_cell(counts: GridCounts, grid: Grid, images: np.ndarray, objective: Objective) -> int:
    """Return the cell with the largest objective; among equal ones, with the largest τ_iou."""
    gains = np.array(
        [gain(counts.totals(cell, objective)[images]) for cell in range(len(grid.cells))]
    )
    best = np.flatnonzero(gains >= gains.max())
    return int(max(best, key=lambda cell: (grid.cells[cell].pred_iou_thresh, -cell)))


def gain(totals: np.ndarray) -> float:
    """Return refined − raw mIoU of (N, 5, C) totals; 0 without a scored pixel."""
    return float(_mean_gain(totals.sum(axis=0)))


def folds(images: int, count: int) -> list[np.ndarray]:
    """Split indices 0 … N − 1 into runs of neighbors, so that frames of one video stay together."""
    return np.array_split(np.arange(images), min(count, images))


def _own_threshold(
    c: int,
    cells: list[int],
    counts: GridCounts,
    grid: Grid,
    images: np.ndarray,
    rule: Rule,
    resample: _Resamples,
) -> list[int]:
    """Give one class the τ_iou with the largest objective, if the gain is certain."""
    every = np.ones(counts.num_classes, dtype=bool)
    first = cells[c] - cells[c] % len(grid.pred_iou_thresh)
    here = counts.mixed_totals(cells, every, rule.objective)[images]
    best, best_totals = cells, here
    for cell in range(first, first + len(grid.pred_iou_thresh)):
        moved = [*cells[:c], cell, *cells[c + 1 :]]
        totals = counts.mixed_totals(moved, every, rule.objective)[images]
        if gain(totals) > gain(best_totals):
            best, best_totals = moved, totals
    # The prediction to improve on replaces the raw one.
    against = np.concatenate([here[:, :1], here[:, 3:], best_totals[:, 3:]], axis=1)
    return best if best is not cells and resample.low(against, _mean_gain) > 0 else cells


class _Resamples:
    """Images drawn with replacement, the same draws for every statistic.

    Not `bootstrap_totals`: bounds of several statistics need the same draws, and these reproduce
    the published thresholds.

    Efron and Tibshirani, *An Introduction to the Bootstrap*, 1993, chapter 13.
    """

    def __init__(self, images: int, confidence: float) -> None:
        rng = np.random.default_rng(0)
        weights = rng.multinomial(images, np.full(images, 1 / images), size=RESAMPLES)
        self._weights = weights.astype(np.float64)  # exact, and multiplied by BLAS
        self._tail = (1 - confidence) / 2

    def low(self, totals: np.ndarray, statistic: Statistic) -> np.ndarray:
        """Return the lower bound of a statistic of summed totals."""
        sums = self._weights @ totals.reshape(len(totals), -1).astype(np.float64)
        values = statistic(sums.reshape(-1, *totals.shape[1:]))
        return np.quantile(values, self._tail, axis=0)


def _mean_gain(sums: np.ndarray) -> np.ndarray:
    """Return gains in mIoU, (…), of (…, 5, C) sums; 0 without a scored pixel."""
    return np.nan_to_num(mean_gain(sums))
