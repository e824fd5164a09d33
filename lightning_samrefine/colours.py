"""What the colour of a pixel says about its class, learned from the very image.

The segmenter names most of an image rightly, so what it calls sky shows what sky looks like there.
Masks follow outlines; colours tell the sky between the branches from the tree around it. Each class
has a histogram of the colours in it, as in Boykov and Jolly, "Interactive Graph Cuts for Optimal
Boundary and Region Segmentation of Objects in N-D Images" (ICCV 2001), here of soft labels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_samrefine.recycling import MAPS

_BINS = 24  # along each of the three axes of colour
_PRIOR_PIXELS = 5  # of the classes' shares in the image, added to every bin
_MIN_SHARE = 1e-4  # of a class in the image, so that a bin's ratio stays below its inverse
_MIN_RATIO = 1e-2
# Integers add up to the same in any order, so a GPU repeats itself.
_FIXED_POINT = 2**16


class Colours:
    """The colours of each class in one image.

    The factor of class c at a pixel of colour k is (p(k | c) / p(k))^weight, at least 0.01^weight;
    by Bayes' rule that is p(c | k) / p(c), both from sums of probabilities. A class is thus
    favoured where it is more frequent among the pixels of that colour than in the image, however
    rare it is. A weight of 1 takes colours for independent of what the segmenter has seen.

    Args:
        probs: (C, H, W) float32 in [0, 1], L; it is not changed.
        image: (3, H, W) uint8 RGB.
        stride: Only every so manyth row and column is counted.
    """

    def __init__(self, probs: Tensor, image: Tensor, stride: int) -> None:
        bins = _colour_bins(image.to(probs.device))
        self._probs, self._bins = probs, bins
        self._counted = probs[:, ::stride, ::stride].contiguous()
        self._counted_bins = bins[::stride, ::stride].contiguous()
        self._ratios = _ratios(self._counted.flatten(1), self._counted_bins.flatten())
        self._ratios.clamp_(min=_MIN_RATIO)

    def weigh(self, weight: float) -> Tensor:
        """Return (C, H, W) float32, L weighed, normalised wherever not all of L is 0."""
        return self._weighed(self._probs, self._bins, weight)

    def weigh_counted(self, weight: float) -> Tensor:
        """Return the same of the counted pixels alone, (C, ⌈H/stride⌉, ⌈W/stride⌉)."""
        return self._weighed(self._counted, self._counted_bins, weight)

    def _weighed(self, probs: Tensor, bins: Tensor, weight: float) -> Tensor:
        weighted = MAPS.empty_like(probs)
        factors = self._ratios**weight
        torch.index_select(factors, 1, bins.flatten(), out=weighted.flatten(1))
        weighted *= probs
        total = weighted.sum(dim=0)
        return weighted.div_(total.masked_fill_(total == 0, 1))


def _colour_bins(image: Tensor) -> Tensor:
    """Return (H, W) int32, each pixel's bin on the axes of brightness, red-blue and green-magenta.

    On these axes, unlike on red, green and blue, the colours of one thing under more or less light
    lie along one axis.
    """
    red, green, blue = image.to(torch.int16)
    # 24 bins of 768, 512 and 1024 values, as shifts: integer division takes several times as long.
    brightness = (red + green + blue) >> 5
    red_blue = (red - blue + 256) * 3 >> 6
    green_magenta = (2 * green - red - blue + 512) * 3 >> 7
    return ((brightness * _BINS + red_blue) * _BINS + green_magenta).to(torch.int32)


def _ratios(probs: Tensor, bins: Tensor) -> Tensor:
    """Return (C, bins) float32, p(class | colour) / p(class).

    Args:
        probs: (C, N) float32.
        bins: (N,) int32.
    """
    num_classes = len(probs)
    counts = torch.zeros(_BINS**3, num_classes, dtype=torch.int64, device=probs.device)
    counts.index_add_(0, bins.long(), (probs.T * _FIXED_POINT).long())
    counted = (counts.T / _FIXED_POINT).reshape(num_classes, _BINS, _BINS, _BINS)
    for axis in (1, 2, 3):
        counted = _blurred(counted, axis)
    counted = counted.flatten(1)
    share = probs.mean(dim=1, keepdim=True) + _MIN_SHARE
    given_colour = (counted + _PRIOR_PIXELS * share) / (counted.sum(dim=0) + _PRIOR_PIXELS)
    return given_colour / share


def _blurred(counted: Tensor, axis: int) -> Tensor:
    """Spread a quarter of each bin to either neighbour along an axis; ends keep what is theirs."""
    bins = counted.movedim(axis, 0)
    spread = 2 * bins
    spread[1:] += bins[:-1]
    spread[:-1] += bins[1:]
    spread[0] += bins[0]
    spread[-1] += bins[-1]
    return spread.div_(4).movedim(0, axis)
