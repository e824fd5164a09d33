"""Metrics that compare two predictions of a data set: integers that stream, add up and sync."""

from lightning_samrefine.metrics.bands import KnownLabels, trimap_band, valid_pixels
from lightning_samrefine.metrics.bootstrap import BootstrapInterval, paired_bootstrap
from lightning_samrefine.metrics.borders import BorderCounts
from lightning_samrefine.metrics.calibration import Calibration, RegionCalibration
from lightning_samrefine.metrics.changes import ChangeCounts
from lightning_samrefine.metrics.confusion import (
    BandedConfusion,
    ConfusionMatrix,
    class_iou,
    matrix_scores,
)
from lightning_samrefine.metrics.image_totals import ImageTotals

__all__ = [
    "BandedConfusion",
    "BootstrapInterval",
    "BorderCounts",
    "Calibration",
    "ChangeCounts",
    "ConfusionMatrix",
    "ImageTotals",
    "KnownLabels",
    "RegionCalibration",
    "class_iou",
    "matrix_scores",
    "paired_bootstrap",
    "trimap_band",
    "valid_pixels",
]
