"""Counts the pixels changed by every cell of a grid in every image.

A refined label map differs from the raw one in few pixels. Only their number by raw label, refined
label and true class is kept. The exact confusion totals of every cell follow from these counts, as
do those of cells mixed class by class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_samrefine.metrics.confusion import class_totals, confusion_matrix
from lightning_samrefine.metrics.trimap import class_or_none, trimap_band, valid_pixels
from lightning_samrefine.tune.settings import OBJECTIVES, Objective


@dataclass(frozen=True)
class Scoring:
    """The scoring of predictions, the same as in `SAMRefineCallback`."""

    num_classes: int
    ignore_index: int | None
    trimap_width: int


class Truth:
    """One image's raw prediction and target, for comparison with refined predictions.

    Args:
        raw: (H, W) int64, the raw prediction.
        target: (H, W) integer.
        scoring: Classes, ignored value and width of the band.

    Attributes:
        totals: (2, 3, C) int64: over the image and over the trimap band, the pixels of each class,
            those correct in the raw prediction, and those predicted as the class.
    """

    def __init__(self, raw: Tensor, target: Tensor, scoring: Scoring) -> None:
        self._classes = scoring.num_classes
        self._raw = raw
        self._valid = valid_pixels(target, scoring.num_classes, scoring.ignore_index)
        self._target = target
        self._band = trimap_band(
            target, scoring.trimap_width, scoring.num_classes, scoring.ignore_index
        )
        self.totals = np.stack([self._raw_totals(self._valid), self._raw_totals(self._band)])

    def _raw_totals(self, where: Tensor) -> np.ndarray:
        matrix = confusion_matrix(self._raw[where], self._target[where], self._classes)
        hits, true, predicted = class_totals(matrix)
        return torch.stack([true, hits, predicted]).cpu().numpy()

    def changes(self, refined: Tensor) -> np.ndarray:
        """Count the scored pixels changed by a refinement.

        Args:
            refined: (H, W) int64.

        Returns:
            (K, 5) int64, a row per kind of change: the true class, the raw and the refined label
            (C for no class), 1 inside the trimap band, and the number of pixels.
        """
        where = ((refined != self._raw) & self._valid).flatten().nonzero()[:, 0]
        target, near = self._target.flatten()[where], self._band.flatten()[where]
        before, after = (
            class_or_none(labels.flatten()[where], self._classes) for labels in (self._raw, refined)
        )
        sizes = (self._classes, self._classes + 1, self._classes + 1, 2)
        parts = (target.long(), before, after, near.long())
        code = torch.zeros_like(where)
        for part, size in zip(parts, sizes, strict=True):
            code = code * size + part
        codes, counts = np.unique(code.cpu().numpy(), return_counts=True)
        return np.stack([*np.unravel_index(codes, sizes), counts], axis=1).astype(np.int64)


class GridCounts:
    """The counts of N images in every cell of a grid.

    Args:
        scoring: The scoring. A class that is ignored counts as absent.
        cells: Number of cells.
    """

    def __init__(self, scoring: Scoring, cells: int) -> None:
        self.num_classes = scoring.num_classes
        self._ignored = scoring.ignore_index
        self._raw: list[np.ndarray] = []
        self._changes: list[list[np.ndarray]] = [[] for _ in range(cells)]
        self._tables: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self._raw)

    def add(self, raw: np.ndarray, changes: Sequence[np.ndarray]) -> None:
        """Add an image: its `Truth.totals`, and `Truth.changes` for each cell."""
        image = len(self._raw)
        self._raw.append(raw)
        for kept, rows in zip(self._changes, changes, strict=True):
            kept.append(np.insert(rows, 0, image, axis=1))
        self._tables.clear()

    def raw_totals(self) -> np.ndarray:
        """Return (N, 2, 3, C) int64, see `Truth`."""
        return np.array(self._raw, dtype=np.int64)

    def totals(self, cell: int, objective: Objective) -> np.ndarray:
        """Return the totals of every image in one cell.

        Returns:
            (N, 5, C) int64 as in `lightning_samrefine.metrics.ImageTotals`: pixels of a class,
            correct and predicted pixels of the raw prediction, and of the refined one.
        """
        return self._summed(self._rows(cell), objective)

    def mixed_totals(
        self, cell_of_class: Sequence[int], is_open: np.ndarray, objective: Objective
    ) -> np.ndarray:
        """Estimate the totals with thresholds by class and some classes frozen.

        A change counts as in the cell of the class that the pixel changes to, and only between
        refined classes. If masks of several classes compete for a pixel, a run may decide
        otherwise; with one cell and all classes refined this is `totals`.
        """
        # Labels outside the classes are never frozen, and no pixel changes to them.
        opened = np.append(is_open, True)
        cells = np.append(np.asarray(cell_of_class), -1)
        parts = []
        for cell in sorted(set(cell_of_class)):
            rows = self._rows(cell)
            before, after = rows[:, 2], rows[:, 3]
            parts.append(rows[(cells[after] == cell) & opened[before] & opened[after]])
        return self._summed(np.concatenate(parts), objective)

    def _rows(self, cell: int) -> np.ndarray:
        """Return (K, 6) rows: image, true class, raw label, refined label, near, pixels."""
        if cell not in self._tables:
            self._tables[cell] = np.concatenate(self._changes[cell])
        return self._tables[cell]

    def _summed(self, rows: np.ndarray, objective: Objective) -> np.ndarray:
        band = OBJECTIVES.index(objective)
        raw = self.raw_totals()[:, band]
        if band:
            rows = rows[rows[:, 4] == 1]
        image, true, before, after, _, count = rows.T
        # One more class for labels outside the classes.
        hits, predicted = np.zeros((2, len(self), self.num_classes + 1), dtype=np.int64)
        np.add.at(hits, (image, true), count * (after == true) - count * (before == true))
        np.add.at(predicted, (image, after), count)
        np.subtract.at(predicted, (image, before), count)
        refined = raw[:, 1:] + np.stack([hits, predicted], axis=1)[:, :, : self.num_classes]
        totals = np.concatenate([raw, refined], axis=1)
        if self._ignored is not None and 0 <= self._ignored < self.num_classes:
            totals[:, :, self._ignored] = 0
        return totals
