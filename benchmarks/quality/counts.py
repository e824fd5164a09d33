"""Confusion matrices of single frames, and the figures made of their sums."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from benchmarks.camvid.data import VOID
from lightning_samrefine.metrics import ConfusionMatrix, class_iou, trimap_band

TRIMAP_WIDTH = 3
_RESAMPLES = 2000
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class FrameCounts:
    """One method on one frame.

    Attributes:
        whole: (C, C + 1) int64, all pixels.
        trimap: (C, C + 1) int64, those near a border of the ground truth.
        seconds: Wall time, without the image encoder.
    """

    whole: Tensor
    trimap: Tensor
    seconds: float


def count(labels: Tensor, target: Tensor, seconds: float) -> FrameCounts:
    """Compare a label map with its ground truth."""
    band = trimap_band(target, TRIMAP_WIDTH, VOID, VOID)
    matrices = []
    for where in (None, band):
        confusion = ConfusionMatrix(num_classes=VOID, ignore_index=VOID)
        confusion.update(labels, target, where)
        matrices.append(confusion.compute())
    return FrameCounts(matrices[0], matrices[1], seconds)


Frames = Mapping[int, FrameCounts]


def ious(frames: Frames, what: str = "whole") -> Tensor:
    """Return (C,) IoU of the summed matrices."""
    return class_iou(sum(getattr(frame, what) for frame in frames.values()))


def miou(frames: Frames, what: str = "whole") -> float:
    """Return mIoU in [0, 1] of the summed matrices."""
    return ious(frames, what).nanmean().item()


def shared(frames: Frames, others: Frames) -> tuple[dict[int, FrameCounts], dict[int, FrameCounts]]:
    """Return both on the frames that both have."""
    both = sorted(frames.keys() & others.keys())
    return {key: frames[key] for key in both}, {key: others[key] for key in both}


def interval(frames: Frames, others: Frames, what: str = "whole") -> tuple[float, float]:
    """Return the 95% interval of the difference in mIoU over paired bootstrap resamples.

    Args:
        frames: A method's, the same frames as ``others``.
        others: What it is compared with.
        what: Which matrices.
    """
    stacks = [
        torch.stack([getattr(of[key], what) for key in sorted(of)]).double().numpy()
        for of in (frames, others)
    ]
    rng = np.random.default_rng(0)
    draws = rng.multinomial(
        len(stacks[0]), np.full(len(stacks[0]), 1 / len(stacks[0])), _RESAMPLES
    ).astype(np.float64)
    values = [
        np.nanmean(
            [
                class_iou(torch.from_numpy(matrix)).numpy()
                for matrix in np.tensordot(draws, stack, axes=1)
            ],
            axis=1,
        )
        for stack in stacks
    ]
    tail = 50 * (1 - _CONFIDENCE)
    low, high = np.percentile(values[0] - values[1], [tail, 100 - tail])
    return float(low), float(high)
