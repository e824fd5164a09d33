"""Neighbours of the same colour agree: a small dense CRF by convolution, on the device.

Mean-field inference as in Krähenbühl and Koltun, "Efficient Inference in Fully Connected CRFs with
Gaussian Edge Potentials" (NIPS 2011), with the neighbours restricted to a few fixed offsets as in
Teichmann and Cipolla, "Convolutional CRFs for Semantic Segmentation" (BMVC 2019), and Potts
compatibility.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_RADII = (1, 2, 4, 8)  # of the neighbours above, below, left and right, in grid pixels
_COLOUR_SIGMA = 10.0  # of 0 to 255, as a standard deviation over the three channels together
_ROUNDS = 2
_MIN_PROB = 1e-4
_MAX_EXPONENT = 80.0  # of float32


def smooth(probs: Tensor, image: Tensor, weight: float, stride: int) -> Tensor:
    """Pull each pixel towards its neighbours of similar colour.

    The neighbours' mean is computed on a coarser grid and enlarged; each pixel's own evidence
    stays at full resolution.

    Args:
        probs: (C, H, W) float32 in [0, 1]; it is overwritten, as fresh memory costs more than the
            arithmetic.
        image: (3, H, W) uint8 RGB.
        weight: Of the neighbours' mean probability in the logit, at least 0.
        stride: Pixels of the image per pixel of the grid along each side.

    Returns:
        (C, H, W) float32, summing to 1 over the classes.
    """
    stride = min(stride, *probs.shape[1:])
    colours = _pooled(image.to(probs), stride) / _COLOUR_SIGMA
    unary = _pooled(probs, stride).clamp_(min=_MIN_PROB).log_()
    pairs = _pairs(colours)
    total = torch.full_like(colours[0], 1e-3)
    for here, there, affinity in pairs:
        total[here] += affinity
        total[there] += affinity

    belief = unary.softmax(dim=0)
    for step in range(_ROUNDS):
        message = torch.zeros_like(belief)
        for here, there, affinity in pairs:
            message[here].addcmul_(belief[there], affinity)
            message[there].addcmul_(belief[here], affinity)
        message *= weight / total
        if step < _ROUNDS - 1:
            belief = (unary + message).softmax(dim=0)
    enlarged = F.interpolate(message[None], probs.shape[1:], mode="bilinear", align_corners=False)
    # The softmax of log p + message; messages are at most ``weight``, which is far below.
    smoothed = enlarged[0].clamp_(max=_MAX_EXPONENT).exp_().mul_(probs.clamp_(min=_MIN_PROB))
    return smoothed.div_(smoothed.sum(dim=0))


def _pooled(maps: Tensor, stride: int) -> Tensor:
    """Average (C, H, W) maps over stride × stride pixels; what is left over at the end is dropped.

    On a CPU the same as `avg_pool2d` in a ninth of the time.
    """
    height, width = (side // stride * stride for side in maps.shape[1:])
    rows = sum(maps[:, offset:height:stride] for offset in range(stride))
    return sum(rows[..., offset:width:stride] for offset in range(stride)) / stride**2


# Selects rows and columns, whatever comes before them.
_Part = tuple[Any, slice, slice]


def _pairs(colours: Tensor) -> list[tuple[_Part, _Part, Tensor]]:
    """Return, for every offset, the pixels, their neighbours and the affinity of the two."""
    height, width = colours.shape[1:]
    everything = slice(None)
    pairs = []
    for radius in _RADII:
        start, end = slice(None, -radius), slice(radius, None)
        if radius < height:
            pairs.append(((..., start, everything), (..., end, everything)))
        if radius < width:
            pairs.append(((..., everything, start), (..., everything, end)))
    return [
        (here, there, (colours[here] - colours[there]).square().sum(0).mul(-0.5).exp())
        for here, there in pairs
    ]
