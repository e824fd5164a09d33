"""Overlapping windows of a large image, and low-resolution maps of them as one map of the image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_samrefine.config import RefineConfig
from lightning_samrefine.models.base import Promptable
from lightning_samrefine.utils.device import upload

# "auto": images up to this multiple of SAM's input are seen whole.
_WHOLE_UP_TO = 1.5


class Window(NamedTuple):
    """A part of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int

    @property
    def rows(self) -> slice:
        """The window's rows of the image."""
        return slice(self.top, self.top + self.height)

    @property
    def columns(self) -> slice:
        """The window's columns of the image."""
        return slice(self.left, self.left + self.width)

    def of(self, maps: Tensor) -> Tensor:
        """Return the window's view of (..., H, W) maps."""
        return maps[..., self.rows, self.columns]


def window_side(config: RefineConfig, sam: Promptable, image_hw: tuple[int, int]) -> int | None:
    """Return the side of the windows of an image, None if SAM looks at the whole image."""
    longer = max(image_hw)
    if config.window == "auto":
        return sam.image_size if longer > _WHOLE_UP_TO * sam.image_size else None
    return config.window if config.window is not None and longer > config.window else None


def split_windows(image_hw: tuple[int, int], side: int, overlap: float) -> list[Window]:
    """Cover an image with windows, row by row.

    They start at the multiples of one step; the last window along an axis is moved back into the
    image. So all have one size, and the windows of an image and of its crop at a multiple of the
    step are the same.

    Args:
        image_hw: (H, W).
        side: Of the square windows; an image's shorter side may be below it.
        overlap: Share of the side that neighbors have in common, at least.
    """
    step = max(1, round(side * (1 - overlap)))
    starts = []
    for length in image_hw:
        last = max(0, length - side)
        starts.append([*range(0, last, step), last])
    height, width = (min(side, length) for length in image_hw)
    return [Window(top, left, height, width) for top in starts[0] for left in starts[1]]


@dataclass(frozen=True)
class WindowMaps:
    """Low-resolution maps of windows that cover an image, resized and blended where they overlap.

    Along each axis a window's weight falls as a raised cosine towards the edges that it shares with
    others; the weights of all windows sum to 1 at every pixel.

    Attributes:
        image_hw: (H, W).
        windows: One window of the whole image, or those of `split_windows`.
        maps: Returns the (C, h, w) float32 maps of the window of an index; h and w may differ.
        overlap: Pixels over which a weight falls.
        other: Further maps of the image; the larger value of the two counts.
    """

    image_hw: tuple[int, int]
    windows: Sequence[Window]
    maps: Callable[[int], Tensor]
    overlap: int = 0
    other: WindowMaps | None = None

    @classmethod
    def whole(cls, maps: Tensor, image_hw: tuple[int, int]) -> WindowMaps:
        """Return (C, h, w) maps of the whole image."""
        return cls(image_hw, [Window(0, 0, *image_hw)], lambda index: maps)

    def rows(self, rows: slice, classes: slice = slice(None)) -> Tensor:
        """Return rows of the maps at the image's resolution, (c, n, W) float32.

        Args:
            rows: With start and stop.
            classes: Of the maps.
        """
        if len(self.windows) == 1:
            return _resized_rows(self.maps(0)[classes], self.image_hw, rows)
        blended = self._blended(rows, classes)
        if self.other is not None:
            torch.maximum(blended, self.other.rows(rows, classes), out=blended)
        return blended

    def _blended(self, rows: slice, classes: slice) -> Tensor:
        weights_y, weights_x = self._weights
        blended: Tensor | None = None
        for index, window in enumerate(self.windows):
            start = max(rows.start, window.top)
            stop = min(rows.stop, window.top + window.height)
            if start >= stop:
                continue
            own = slice(start - window.top, stop - window.top)
            resized = _resized_rows(self.maps(index)[classes], (window.height, window.width), own)
            resized *= upload(weights_y[window.top][own, None], resized.device)
            resized *= upload(weights_x[window.left], resized.device)
            if blended is None:
                size = (len(resized), rows.stop - rows.start, self.image_hw[1])
                blended = resized.new_zeros(size)
            inside = slice(start - rows.start, stop - rows.start)
            blended[:, inside, window.columns] += resized
        assert blended is not None, "windows cover the image"
        return blended

    @cached_property
    def _weights(self) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """The windows' weights along the rows and the columns, by their starts, on the CPU."""
        (height, width), size = self.image_hw, self.windows[0]
        tops, lefts = {own.top for own in self.windows}, {own.left for own in self.windows}
        return (
            blend_weights(height, sorted(tops), size.height, self.overlap),
            blend_weights(width, sorted(lefts), size.width, self.overlap),
        )


def blend_weights(length: int, starts: Sequence[int], size: int, overlap: int) -> dict[int, Tensor]:
    """Return the weights of windows along one axis, which sum to 1 at every pixel.

    Args:
        length: Pixels of the axis, which the windows cover.
        starts: Of the windows.
        size: Of each window.
        overlap: Number of pixels from either end of a window over which its weight falls to 0.

    Returns:
        (size,) float32 by the windows' starts.
    """
    position = torch.arange(size, dtype=torch.float64) + 0.5
    from_end = torch.minimum(position, size - position)
    taper = torch.sin((from_end / max(overlap, 1)).clamp(max=1) * (torch.pi / 2)).square()
    total = torch.zeros(length, dtype=torch.float64)
    for start in starts:
        total[start : start + size] += taper
    return {start: (taper / total[start : start + size]).float() for start in starts}


def _resized_rows(maps: Tensor, hw: tuple[int, int], rows: slice) -> Tensor:
    """Resize (C, h, w) maps bilinearly to some rows of the size (H, W)."""
    height, width = hw
    count = rows.stop - rows.start
    if count == height:
        return F.interpolate(maps[None], hw, mode="bilinear", align_corners=False)[0]
    at = (torch.arange(rows.start, rows.stop, device=maps.device) + 0.5) * (len(maps[0]) / height)
    at = (at - 0.5).clamp(min=0)
    above = at.long().clamp(max=len(maps[0]) - 1)
    below = (above + 1).clamp(max=len(maps[0]) - 1)
    between = torch.lerp(maps[:, above], maps[:, below], (at - above)[:, None])
    return F.interpolate(between[None], (count, width), mode="bilinear", align_corners=False)[0]
