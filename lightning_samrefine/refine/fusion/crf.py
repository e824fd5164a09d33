"""Neighbors of the same color agree: a small dense CRF by convolution, on the device.

One step of mean-field inference as in Krähenbühl and Koltun, "Efficient Inference in Fully
Connected CRFs with Gaussian Edge Potentials" (NIPS 2011), with the neighbors restricted to a few
fixed offsets as in Teichmann and Cipolla, "Convolutional CRFs for Semantic Segmentation" (BMVC
2019), and Potts compatibility.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_samrefine.refine.fusion.mask_votes import class_parts

_RADII = (1, 3)  # of the neighbors above, below, left and right, in pixels
REACH = max(_RADII)  # no pixel depends on others beyond it
_COLOR_SIGMA = 10.0  # of 0 to 255, as a standard deviation over the three channels together
_MIN_PROB = 1e-4
_MAX_EXPONENT = 80.0  # of float32
# Exponentials that underflow take ten times as long on a CPU.
_MIN_EXPONENT = -30.0


def smooth(probs: Tensor, image: Tensor, weight: float) -> Tensor:
    """Pull each pixel towards its neighbors of similar color.

    Args:
        probs: (C, H, W) float32 in [0, 1], summing to 1; values below 1e-4 are overwritten with it.
        image: (3, H, W) uint8 RGB.
        weight: Of the neighbors' mean probability in the logit, at least 0.

    Returns:
        (C, H, W) float32, summing to 1 over the classes.
    """
    pairs = _pairs(image.to(probs) / _COLOR_SIGMA)
    total = torch.full_like(probs[0], 1e-3)
    for here, there, affinity in pairs:
        total[here] += affinity
        total[there] += affinity
    weights = weight / total

    probs.clamp_(min=_MIN_PROB)
    smoothed = torch.empty_like(probs, memory_format=torch.contiguous_format)
    for part in class_parts(probs):
        some = probs[part]
        message = torch.zeros_like(some)
        for here, there, affinity in pairs:
            message[here].addcmul_(some[there], affinity)
            message[there].addcmul_(some[here], affinity)
        # The softmax of log p + message, without a logarithm.
        factor = message.mul_(weights).clamp_(max=_MAX_EXPONENT).exp_()
        torch.mul(factor, some, out=smoothed[part])
    return smoothed.div_(smoothed.sum(dim=0))


# Selects rows and columns, whatever comes before them.
_Part = tuple[Any, slice, slice]


def _pairs(colors: Tensor) -> list[tuple[_Part, _Part, Tensor]]:
    """Return, for every offset, the pixels, their neighbors and the affinity of the two."""
    height, width = colors.shape[1:]
    everything = slice(None)
    pairs = []
    for radius in _RADII:
        start, end = slice(None, -radius), slice(radius, None)
        if radius < height:
            pairs.append(((..., start, everything), (..., end, everything)))
        if radius < width:
            pairs.append(((..., everything, start), (..., everything, end)))
    return [(here, there, _affinity(colors[here], colors[there])) for here, there in pairs]


def _affinity(first: Tensor, second: Tensor) -> Tensor:
    exponent = (first - second).square_().sum(dim=0).mul_(-0.5)
    return exponent.clamp_(min=_MIN_EXPONENT).exp_()
