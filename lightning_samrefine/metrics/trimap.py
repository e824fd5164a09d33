"""Bands around the borders of label maps, for all classes at once.

A window of a label map holds a border exactly if its largest and its smallest label differ.
Distances are chessboard distances, those of the 3×3 erosions of the Boundary IoU paper's code, so
windows are squares, which are reduced along one axis after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

# uint8 holds the labels, one value below and one above them.
_MOST_UINT8_CLASSES = 253

Reduce = Callable[[Tensor, Tensor], Tensor]


def valid_pixels(target: Tensor, num_classes: int, ignore_index: int | None) -> Tensor:
    """Return a bool map of the pixels that are scored.

    Args:
        target: Integer tensor of any shape.
        num_classes: C.
        ignore_index: Target value that is not scored, or None. Nor is any outside [0, C).
    """
    valid = (target >= 0) & (target < num_classes)
    if ignore_index is not None and 0 <= ignore_index < num_classes:
        valid &= target != ignore_index
    return valid


def class_or_none(labels: Tensor, num_classes: int) -> Tensor:
    """Return labels as int64, C for any value outside [0, C)."""
    return labels.long().masked_fill((labels < 0) | (labels >= num_classes), num_classes)


class KnownLabels:
    """A label map in the form that bands are computed from.

    Args:
        labels: (…, H, W) integer.
        known: (…, H, W) bool; a pixel that is not known has no label, is in no band and makes no
            border.
        num_classes: C. Known labels outside [0, C) are all one further class.

    Attributes:
        labels: (…, H, W) uint8 or int32 in [0, C], C for any other value.
        known: As given.
    """

    def __init__(self, labels: Tensor, known: Tensor, num_classes: int) -> None:
        small = num_classes <= _MOST_UINT8_CLASSES
        outside = (labels < 0) | (labels >= num_classes)
        self.num_classes = num_classes
        self.known = known
        self.labels = labels.to(torch.uint8 if small else torch.int32)
        self.labels = self.labels.masked_fill(outside, num_classes)
        # Labels move up by one, which leaves a value on either side for pixels without one.
        self._above = self.labels + 1
        self._above.masked_fill_(~known, 0)
        self._below = self.labels + 1
        self._below.masked_fill_(~known, num_classes + 2)

    def near_border(self, distance: int) -> Tensor:
        """Return the pixels with another label within the distance, (…, H, W) bool."""
        return self._windows([distance])[0]

    def rings(self, widths: Sequence[int]) -> Tensor:
        """Sort pixels by the narrowest of bands that they are in, of ascending widths in pixels.

        Returns:
            (…, H, W) uint8 in [0, len(widths)]: the band's index, the last value being none.
        """
        rings = torch.full_like(self.labels, len(widths), dtype=torch.uint8)
        for band in self._windows(widths):
            rings -= band.to(torch.uint8)
        return rings

    def inner_band(self, distance: int) -> Tensor:
        """Return the pixels within the distance of another label or of the image's outside.

        It is what erosion takes away from the mask of each class: the union over classes of
        G_d ∩ G in Cheng et al., *Boundary IoU*, CVPR 2021, eq. 1, as in the authors' code, where
        the frame of the image is a boundary as well.
        """
        band = self.near_border(distance)
        frame = self.known.clone()
        height, width = frame.shape[-2:]
        frame[..., distance : height - distance, distance : width - distance] = False
        return band | frame

    def _windows(self, distances: Sequence[int]) -> list[Tensor]:
        """Return a band for each of ascending distances, a window growing out of the last one."""
        largest, smallest, reached, bands = self._above, self._below, 0, []
        for distance in distances:
            step = distance - reached
            largest = window_reduce(largest, step, 0, torch.maximum)
            smallest = window_reduce(smallest, step, self.num_classes + 2, torch.minimum)
            bands.append(self.known & (largest != smallest))
            reached = distance
        return bands


def trimap_band(
    target: Tensor, width: int, num_classes: int, ignore_index: int | None = None
) -> Tensor:
    """Return the pixels near a border between classes.

    A pixel is in the band if its target is valid and another valid pixel within chessboard
    distance ``width`` has another label (Krähenbühl and Koltun, NIPS 2011, measured around label
    borders; ignored pixels are in no band and make none).

    Args:
        target: (…, H, W) integer.
        width: Distance in pixels, at least 1.
        num_classes: C.
        ignore_index: See `valid_pixels`.

    Returns:
        (…, H, W) bool.
    """
    valid = valid_pixels(target, num_classes, ignore_index)
    return KnownLabels(target, valid, num_classes).near_border(width)


def window_reduce(values: Tensor, width: int, outside: int, reduce: Reduce) -> Tensor:
    """Reduce every (2·width + 1)² window of (…, H, W), one axis after the other.

    Windows grow by doubling, log2 steps instead of the 2·width + 1 of a pooling layer, which on a
    CPU is 15 times faster at a width of 3.
    """
    padded = nn.functional.pad(values, (width,) * 4, value=outside)
    for axis in (-1, -2):
        length = 1
        while length < 2 * width + 1:
            step = min(length, 2 * width + 1 - length)
            size = padded.shape[axis] - step
            padded = reduce(padded.narrow(axis, 0, size), padded.narrow(axis, step, size))
            length += step
    return padded
