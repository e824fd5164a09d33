"""Sizes and frames that prompts and masks pass through (docs/algorithm4.md, steps 1, 5, 6)."""

from __future__ import annotations


def get_preprocess_shape(height: int, width: int, long_side: int) -> tuple[int, int]:
    """Return the size of an image whose long side was resized to ``long_side`` (steps 0, 5, 6).

    The rule of segment-anything's ``ResizeLongestSide.get_preprocess_shape``, except that no
    side falls below 1: an image of 1 × 4000 pixels still has a row.

    Args:
        height: H ≥ 1 in pixels.
        width: W ≥ 1 in pixels.
        long_side: Length in pixels of the long side afterwards.
    """
    scale = long_side * 1.0 / max(height, width)
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def grid_shape(height: int, width: int, stride: int) -> tuple[int, int]:
    """Return (h_d, w_d) = (⌊H/r⌋, ⌊W/r⌋), at least 1 each (step 1)."""
    return max(1, height // stride), max(1, width // stride)
