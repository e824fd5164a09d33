"""Colors of classes, the same in all figures."""

from __future__ import annotations

import colorsys

import numpy as np
from torch import Tensor

# The golden angle keeps neighboring class indices far apart in hue; class 0 is a calm blue: it is
# often the background.
_FIRST_HUE, _HUE_STEP = 0.6, 0.381966


def class_colors(num_classes: int) -> np.ndarray:
    """Return (C, 3) uint8 RGB colors, which depend on the class index only."""
    colors = [
        colorsys.hsv_to_rgb(
            (_FIRST_HUE + index * _HUE_STEP) % 1, 0.75 - 0.3 * (index % 2), 0.95 - 0.3 * (index % 3)
        )
        for index in range(num_classes)
    ]
    return np.round(np.array(colors).reshape(-1, 3) * 255).astype(np.uint8)


def colorize(labels: Tensor, num_classes: int, valid: Tensor | None = None) -> np.ndarray:
    """Return (H, W, 3) uint8 RGB of a label map; black if unknown or not ``valid``."""
    table = np.concatenate([class_colors(num_classes), np.zeros((1, 3), np.uint8)])
    index = labels.numpy()
    unknown = (index < 0) | (index >= num_classes)
    if valid is not None:
        unknown |= ~valid.numpy()
    return table[np.where(unknown, num_classes, index)]
