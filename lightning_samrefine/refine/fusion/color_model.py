"""The probability of each class given a pixel's color, estimated from the image itself.

Most of a prediction is right, so the pixels predicted as sky show the colors of sky in this image.
Masks follow outlines; colors separate the sky between the branches from the tree around it. Each
class has a histogram of the colors in it, as in Boykov and Jolly, "Interactive Graph Cuts for
Optimal Boundary and Region Segmentation of Objects in N-D Images" (ICCV 2001), of soft labels here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_samrefine.refine.fusion.mask_votes import normalize_
from lightning_samrefine.refine.fusion.strips import strips

_BINS = 24  # along each of the three axes of color
_PRIOR_PIXELS = 5  # of the classes' shares in the image, added to every bin
_MIN_SHARE = 1e-4  # of a class in the image, so that a bin's ratio stays below its inverse
_MIN_RATIO = 1e-2
# Integers add up to the same in any order, so a GPU repeats itself.
_FIXED_POINT = 2**16


def weigh_by_color(probs: Tensor, image: Tensor, ratios: Tensor, weight: float) -> Tensor:
    """Weigh a prediction by how usual each pixel's color is in each class.

    The factor of class c at a pixel of color k is (p(k | c) / p(k))^weight, at least 0.01^weight;
    by Bayes' rule that is p(c | k) / p(c). A class is thus favored where it is more frequent among
    the pixels of that color than in the image, however rare it is.

    Args:
        probs: (C, h, W) float32 in [0, 1], L or rows of it; it is not changed.
        image: (3, h, W) uint8 RGB, the same pixels.
        ratios: From `color_ratios` of the whole image.
        weight: Above 0; 1 assumes that colors are independent of L.

    Returns:
        (C, h, W) float32, normalized over the classes unless L is 0 for all of them.
    """
    factors = ratios.clamp(min=_MIN_RATIO).pow_(weight)
    weighted = torch.empty_like(probs, memory_format=torch.contiguous_format)
    bins = color_bins(image.to(probs.device)).flatten()
    torch.index_select(factors, 1, bins, out=weighted.flatten(1))
    weighted *= probs
    return normalize_(weighted)


def color_ratios(probs: Tensor, image: Tensor, stride: int) -> Tensor:
    """Return how usual each color is in each class of an image.

    Only every ``stride``-th row and column is counted.

    Returns:
        (C, B) float32, p(class | color) / p(class) for each color bin, both from sums of ``probs``,
        on their device.
    """
    num_classes, device = len(probs), probs.device
    counts = torch.zeros(_BINS**3, num_classes, dtype=torch.int64, device=device)
    dtype = torch.float32 if device.type == "mps" else torch.float64  # mps has no float64
    sums = torch.zeros(num_classes, dtype=dtype, device=device)
    probs, image = probs[:, ::stride, ::stride], image[:, ::stride, ::stride]
    for rows in strips(probs):
        counted = probs[:, rows].flatten(1)
        bins = color_bins(image[:, rows].to(device)).flatten()
        counts.index_add_(0, bins.long(), (counted.T * _FIXED_POINT).long())
        sums += counted.sum(dim=1, dtype=dtype)
    return _ratios(counts, (sums / probs[0].numel()).float())


def color_bins(image: Tensor) -> Tensor:
    """Return (H, W) int32, each pixel's bin on the axes of brightness, red-blue and green-magenta.

    On these axes, unlike on red, green and blue, the colors of one thing under more or less light
    lie along one axis.

    Args:
        image: (3, H, W) uint8 RGB.
    """
    red, green, blue = image.to(torch.int16)
    # 24 bins of 768, 512 and 1024 values, as shifts: integer division takes several times as long.
    brightness = (red + green + blue) >> 5
    red_blue = (red - blue + 256) * 3 >> 6
    green_magenta = (2 * green - red - blue + 512) * 3 >> 7
    return ((brightness * _BINS + red_blue) * _BINS + green_magenta).to(torch.int32)


def _ratios(counts: Tensor, share: Tensor) -> Tensor:
    """Return (C, bins) float32, p(class | color) / p(class).

    Args:
        counts: (bins, C) int64, sums of probabilities in fixed point.
        share: (C,) float32, each class's mean probability.
    """
    num_classes = len(share)
    counted = (counts.T / _FIXED_POINT).reshape(num_classes, _BINS, _BINS, _BINS)
    for axis in (1, 2, 3):
        counted = _blurred(counted, axis)
    counted = counted.flatten(1)
    share = share[:, None] + _MIN_SHARE
    given_color = (counted + _PRIOR_PIXELS * share) / (counted.sum(dim=0) + _PRIOR_PIXELS)
    return given_color / share


def _blurred(counted: Tensor, axis: int) -> Tensor:
    """Spread a quarter of each bin to either neighbor along an axis; end bins keep theirs."""
    bins = counted.movedim(axis, 0)
    spread = 2 * bins
    spread[1:] += bins[:-1]
    spread[:-1] += bins[1:]
    spread[0] += bins[0]
    spread[-1] += bins[-1]
    return spread.div_(4).movedim(0, axis)
