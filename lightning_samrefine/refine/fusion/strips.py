"""Fusing an image strip by strip, so that no second copy of its probabilities is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lightning_samrefine.refine.raw_prediction import RawPrediction, first_argmax
from lightning_samrefine.refine.windows import Window

# Of one strip's probabilities; smaller images are one strip. Maps of 32 MB and more are requested
# from the system every time (glibc's mmap threshold), and their page faults cost 1.4 times the time
# at 1080x1920.
_BYTES = 2**23


def strips(probs: Tensor) -> Iterator[slice]:
    """Yield consecutive rows of (C, H, W) float32 maps, as many at once as fit 8 MB."""
    num_classes, height, width = probs.shape
    rows = max(1, _BYTES // (4 * num_classes * width))
    for start in range(0, height, rows):
        yield slice(start, min(start + rows, height))


def fuse_strips(
    raw: RawPrediction,
    fuse_rows: Callable[[slice], tuple[Tensor, Tensor]],
    with_probs: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Fuse an image, a strip at a time.

    A pixel gets the argmax of its fused probabilities, or keeps its raw label if the fusion changes
    nothing there: raw labels need not be the raw probabilities' argmax.

    Args:
        raw: The raw prediction.
        fuse_rows: Returns the fused probabilities of some rows, (C, n, W) float32, and (n, W) bool,
            where an unknown raw label is replaced.
        with_probs: Whether the fused probabilities are kept.

    Returns:
        The labels, (H, W) int64; the fused probabilities, (C, H, W) float32, or None; (H, W) bool,
        as ``fuse_rows`` returns it.
    """
    labels, covered = (
        torch.empty(raw.image_hw, dtype=dtype, device=raw.probs.device)
        for dtype in (torch.int64, torch.bool)
    )
    probs: Tensor | None = None
    for rows in strips(raw.probs):
        fused, covered[rows] = fuse_rows(rows)
        whole = rows == slice(0, raw.image_hw[0])
        part = raw if whole else raw.part(Window(rows.start, 0, fused.shape[1], fused.shape[2]))
        labels[rows] = _labels(part, fused, covered[rows])
        if with_probs:
            if probs is None:
                probs = fused if fused.shape == raw.probs.shape else torch.empty_like(raw.probs)
            if probs is not fused:
                probs[:, rows] = fused
    return labels, probs, covered


def _labels(raw: RawPrediction, fused: Tensor, covered: Tensor) -> Tensor:
    best, labels = first_argmax(fused), raw.labels
    raw_best = labels if raw.given_labels is None else first_argmax(raw.probs)
    unknown = (labels < 0) | (labels >= len(fused))
    return torch.where(torch.where(unknown, covered, best != raw_best), best, labels)
