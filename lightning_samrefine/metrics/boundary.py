"""Boundary IoU and boundary F1: how well the borders of classes fit."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_samrefine.metrics.confusion import count_values, unscored
from lightning_samrefine.metrics.counts import Counts
from lightning_samrefine.metrics.trimap import KnownLabels, window_reduce

# Cheng et al., Boundary IoU, CVPR 2021, section 5; Csurka et al., BMVC 2013, section 2.
BOUNDARY_IOU_DISTANCE = 0.02
BOUNDARY_F1_DISTANCE = 0.0075
# Bits of an int64 that stand for classes; the sign stays free.
_CLASSES_PER_WORD = 62
# Rows of the counts.
_TRUE_BAND, _BAND, _SHARED, _TRUE_EDGE, _TRUE_FOUND, _EDGE, _EDGE_RIGHT = range(7)


class Borders:
    """The borders of one label map.

    Args:
        known: The label map.
        iou_distance: Width in pixels of the band for Boundary IoU.
        f1_distance: How far from one another, in pixels, boundaries still agree.

    Attributes:
        labels: (H, W) integer in [0, C].
        band: (H, W) bool, see `KnownLabels.inner_band`.
        edge: (K,) int64, flat positions of the pixels next to one (of eight) with another label.
            None, for all pixels, on a GPU: the CPU would have to wait for their number.
        edge_labels: (K,) int64, their labels; C for a pixel that is no edge.
        reach: The classes whose edge is within ``f1_distance``, bit sets (H, W) int64: class c is
            bit c mod 62 of number ⌊c / 62⌋.
    """

    def __init__(self, known: KnownLabels, iou_distance: int, f1_distance: int) -> None:
        self.labels = known.labels
        self.band = known.inner_band(iou_distance)
        near, self._no_class = known.near_border(1).flatten(), known.num_classes
        self.edge: Tensor | None = None
        if near.device.type == "cpu":
            self.edge = near.nonzero()[:, 0]
            self.edge_labels = self.labels.flatten()[self.edge].long()
        else:
            self.edge_labels = self.labels.flatten().long().masked_fill(~near, self._no_class)
        self.reach = []
        for first in range(0, known.num_classes, _CLASSES_PER_WORD):
            local = self.edge_labels - first
            # Bits of other words' classes, and of labels that are no class, are shifted out.
            here = (local >= 0) & (local < min(_CLASSES_PER_WORD, known.num_classes - first))
            bits = here.long() << local.clamp(0, _CLASSES_PER_WORD)
            word = bits
            if self.edge is not None:
                word = torch.zeros(self.labels.numel(), dtype=torch.int64)
                word[self.edge] = bits
            word = word.view(self.labels.shape)
            self.reach.append(window_reduce(word, f1_distance, 0, torch.bitwise_or))

    def met(self, other: Borders) -> Tensor:
        """Return (K,) int64, the label of each edge pixel if ``other`` has an edge of it in reach.

        C for the other edge pixels.
        """
        found = torch.zeros_like(self.edge_labels)
        for number, word in enumerate(other.reach):
            local = self.edge_labels - number * _CLASSES_PER_WORD
            here = (local >= 0) & (local < _CLASSES_PER_WORD)
            at_edge = word.flatten() if self.edge is None else word.flatten()[self.edge]
            found |= here & (at_edge >> local.clamp(0, _CLASSES_PER_WORD)) & 1
        return self.edge_labels.masked_fill(found == 0, self._no_class)


class BorderCounts(Counts):
    """Counts the pixels that Boundary IoU and boundary F1 are computed from, class by class.

    A prediction counts as ignored at the pixels of the target that are ignored: they are in no
    band and make no border, so that a prediction without a wrong pixel scores 1. Counts are summed
    over the data set, as those of mIoU are, and not averaged over images.

    Args:
        num_classes: C.

    Attributes:
        counts: (7, C) int64, pixels of the target's band, of the prediction's band, of both with
            the class in both; of the target's edge, those of them that the prediction has within
            reach; of the prediction's edge, those of them that the target has within reach.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__(7, num_classes)
        self.num_classes = num_classes

    def update(self, prediction: Borders, target: Borders) -> None:
        """Add one image.

        Args:
            prediction: Borders of the prediction, known where the target is.
            target: Borders of the target, of the same distances.
        """
        shared = target.band & prediction.band & (prediction.labels == target.labels)
        for row, labels in (
            (_TRUE_BAND, target.labels.masked_fill(~target.band, self.num_classes)),
            (_BAND, prediction.labels.masked_fill(~prediction.band, self.num_classes)),
            (_SHARED, target.labels.masked_fill(~shared, self.num_classes)),
            (_TRUE_EDGE, target.edge_labels),
            (_TRUE_FOUND, target.met(prediction)),
            (_EDGE, prediction.edge_labels),
            (_EDGE_RIGHT, prediction.met(target)),
        ):
            counts = count_values(labels, self.num_classes + 1)
            self.counts[row] += counts[: self.num_classes]


def border_distances(height: int, width: int) -> tuple[int, int]:
    """Return the distances in pixels for Boundary IoU and boundary F1, each at least 1.

    They are 2% and 0.75% of the image's diagonal, rounded.
    """
    diagonal = math.hypot(height, width)
    return (
        max(1, round(BOUNDARY_IOU_DISTANCE * diagonal)),
        max(1, round(BOUNDARY_F1_DISTANCE * diagonal)),
    )


def boundary_iou(counts: Tensor, ignore_index: int | None = None) -> Tensor:
    """Return |(G_d ∩ G) ∩ (P_d ∩ P)| / |(G_d ∩ G) ∪ (P_d ∩ P)| of every class.

    Cheng et al., *Boundary IoU: Improving Object-Centric Image Segmentation Evaluation*, CVPR 2021,
    eq. 1. For "thing" data sets the paper takes the smaller of this and the mask's IoU; here it
    is reported alone.

    Args:
        counts: (7, C) int64 of `BorderCounts`.
        ignore_index: A class that is not scored, if it is in [0, C).

    Returns:
        (C,) float64 in [0, 1], NaN for a class without a band on either side.
    """
    shared = counts[_SHARED]
    iou = shared.double() / (counts[_TRUE_BAND] + counts[_BAND] - shared).double()
    return unscored(iou, ignore_index)


def boundary_f1(counts: Tensor, ignore_index: int | None = None) -> Tensor:
    """Return the harmonic mean of the precision and the recall of every class's edge.

    Csurka et al., *What is a good evaluation measure for semantic segmentation?*, BMVC 2013: an
    edge pixel is right if the other side has one of the same class within the distance. Two
    differences: counts are summed over the data set, and distances are chessboard distances.

    Args:
        counts: (7, C) int64 of `BorderCounts`.
        ignore_index: A class that is not scored, if it is in [0, C).

    Returns:
        (C,) float64 in [0, 1]; 0 if only one side has an edge, NaN if neither has.
    """
    precision = counts[_EDGE_RIGHT].double() / counts[_EDGE].clamp(min=1)
    recall = counts[_TRUE_FOUND].double() / counts[_TRUE_EDGE].clamp(min=1)
    f1 = 2 * precision * recall / (precision + recall)
    nowhere = (counts[_EDGE] == 0) & (counts[_TRUE_EDGE] == 0)
    return unscored(f1.nan_to_num(0.0).masked_fill(nowhere, math.nan), ignore_index)
