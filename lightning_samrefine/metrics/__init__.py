"""Metrics that compare two predictions of a data set: integers that stream, add up and sync."""

from lightning_samrefine.metrics.bootstrap import BootstrapInterval, paired_bootstrap
from lightning_samrefine.metrics.boundary import BorderCounts
from lightning_samrefine.metrics.calibration import Calibration, RegionCalibration
from lightning_samrefine.metrics.changes import ChangeCounts
from lightning_samrefine.metrics.confusion import (
    BandedConfusion,
    class_iou,
    matrix_scores,
)
from lightning_samrefine.metrics.per_image import ImageTotals
from lightning_samrefine.metrics.trimap import KnownLabels, trimap_band, valid_pixels

__all__ = [
    "BandedConfusion",
    "BootstrapInterval",
    "BorderCounts",
    "Calibration",
    "ChangeCounts",
    "ImageTotals",
    "KnownLabels",
    "RegionCalibration",
    "class_iou",
    "matrix_scores",
    "paired_bootstrap",
    "trimap_band",
    "valid_pixels",
]
