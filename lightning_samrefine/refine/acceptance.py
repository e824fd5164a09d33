"""Which regions are accepted: those whose predicted IoU exceeds their class's threshold."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from lightning_samrefine.config import RefineConfig


def accepted_regions(config: RefineConfig, classes: np.ndarray, pred_iou: Tensor) -> np.ndarray:
    """Return which regions are accepted (step 8).

    Args:
        config: Its ``class_pred_iou_thresh`` replaces ``pred_iou_thresh`` class by class.
        classes: (N,) int64, the regions' classes.
        pred_iou: (N,) float32 on the CPU, SAM's predicted IoUs.

    Returns:
        (N,) bool.
    """
    own = config.class_pred_iou_thresh or {}
    thresholds = [own.get(int(c), config.pred_iou_thresh) for c in classes]
    return pred_iou.numpy() > np.array(thresholds, dtype=np.float32)
