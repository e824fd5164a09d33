"""Raw against refined: what one evaluation counts, and the figures computed from the counts.

Pixels and regions are counted in int64, image by image, so the figures are those of the whole
data set and do not depend on batch sizes, on the order of images or on the number of processes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities.plot import plot_single_or_multi_val

from lightning_samrefine.metrics.bootstrap import BootstrapInterval, bootstrap_totals
from lightning_samrefine.metrics.boundary import (
    BorderCounts,
    Borders,
    border_distances,
    boundary_f1,
    boundary_iou,
)
from lightning_samrefine.metrics.calibration import (
    Calibration,
    RegionCalibration,
    RegionScores,
    score_regions,
)
from lightning_samrefine.metrics.changes import KINDS, ChangeCounts, ChangedPixels
from lightning_samrefine.metrics.confusion import (
    BandedConfusion,
    class_iou,
    class_totals,
    matrix_scores,
)
from lightning_samrefine.metrics.counts import RefinementCounts
from lightning_samrefine.metrics.per_image import ImageTotals
from lightning_samrefine.metrics.trimap import KnownLabels, valid_pixels
from lightning_samrefine.refine.results import Regions

SIDES = ("raw", "refined")
TRIMAP_WIDTHS = (1, 3, 5, 10)
# Of `matrix_scores`, beside mIoU, which has a gain and classes of its own.
_SCALARS = ("mdice", "pixel_acc", "class_acc", "fwiou")
_BOUNDARY = ("boundary_iou", "boundary_f1")
_WITH_GAIN = ("miou", "trimap_miou", *_BOUNDARY)
MEANS = (*_WITH_GAIN, *_SCALARS)
# Figures of classes, and what `matrix_scores` calls them. No mean has one of these names: MLflow's
# file store makes a file of a mean, and a folder of classes.
_BY_CLASS = {"iou": "iou", "dice": "dice", **{f"class_{name}": name for name in _BOUNDARY}}
FIGURES_OF_SIDES = {*MEANS, *_BY_CLASS, *(f"trimap_{width}px_miou" for width in TRIMAP_WIDTHS)}


@dataclass(frozen=True)
class ImageComparison:
    """What one image adds to a comparison.

    Attributes:
        matrices: (C, C + 1) int64 confusion matrices, raw and refined; (C + 1, C + 1) of
            overlapping classes.
        changes: The changed pixels.
        valid: (H, W) bool, the pixels that are scored.
        scores: The regions' IoUs, None if regions were not given or have no masks.
        region_changes: (N, 3) int64, see `ChangedPixels.by_region`, None as above.
    """

    matrices: tuple[Tensor, Tensor]
    changes: ChangedPixels
    valid: Tensor
    scores: RegionScores | None
    region_changes: Tensor | None

    def mious(self, ignore_index: int | None) -> tuple[float, float]:
        """Return the image's own mIoU, raw and refined: means over its target's classes.

        They are NaN if no pixel is scored. Pixels of a class that only predictions have lower the
        IoU of the true classes; the class itself is left out, because only one of the two
        predictions may have it.
        """
        raw, refined = (one.cpu() for one in self.matrices)
        true = class_totals(raw)[1] > 0
        before, after = (class_iou(one, ignore_index)[true].nanmean() for one in (raw, refined))
        return before.item(), after.item()


class RefinementComparison(nn.Module):
    """Counts everything that raw and refined predictions are compared by.

    Args:
        num_classes: C.
        ignore_index: Target value that is not counted, or None.
        class_names: C names for the per-class figures; "0", "1", … if None.
        trimap_width: Half-width in pixels of the band around borders that ``trimap_miou_*`` means,
            see `trimap_band`. Bands of 1, 3, 5 and 10 px are counted beside it.

    Raises:
        ValueError: Another number of names, or a width below 1.

    Attributes:
        counts: A `RefinementCounts`; feed it with ``comparison.counts.update(images=…)``.
    """

    def __init__(
        self,
        num_classes: int,
        ignore_index: int | None = None,
        class_names: Sequence[str] | None = None,
        trimap_width: int = 3,
    ) -> None:
        super().__init__()
        if class_names is not None and len(class_names) != num_classes:
            raise ValueError(f"class_names must be {num_classes} names, got {len(class_names)}")
        if trimap_width < 1:
            raise ValueError(f"trimap_width must be at least 1, got {trimap_width}")
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.class_names = list(class_names or map(str, range(num_classes)))
        self.trimap_width = trimap_width
        self.widths = sorted({*TRIMAP_WIDTHS, trimap_width})
        self.pixels = nn.ModuleDict(
            {side: BandedConfusion(num_classes, len(self.widths)) for side in SIDES}
        )
        self.borders = nn.ModuleDict({side: BorderCounts(num_classes) for side in SIDES})
        self.control = BandedConfusion(num_classes, bands=0)
        self.changes = ChangeCounts(num_classes)
        self.images = ImageTotals(num_classes)
        self.calibration = RegionCalibration()
        self.counts = RefinementCounts()

    def update(
        self,
        raw: Tensor,
        refined: Tensor,
        target: Tensor,
        regions: Regions | None = None,
        control: Tensor | None = None,
        part: tuple[int, int] = (0, 1),
    ) -> list[ImageComparison]:
        """Add one image or a batch.

        Args:
            raw: (…, H, W) integer, the raw prediction.
            refined: (…, H, W) integer, the refined one.
            target: (…, H, W) integer.
            regions: The prompted regions of a single image, measured as well.
            control: (H, W) integer, the labels of a single image that are refined without SAM.
            part: Index and number of the parts of one image that are added one by one, as the
                slices of a volume: they are resampled together.

        Returns:
            One entry an image.

        Raises:
            ValueError: Shapes that differ.
        """
        for name, labels in (("raw", raw), ("refined", refined)):
            _check_shape(name, labels, target)
        height, width = target.shape[-2:]
        maps = (labels.reshape(-1, height, width) for labels in (raw, refined, target))
        return [
            self._add(one, other, truth, regions, control, part)
            for one, other, truth in zip(*maps, strict=True)
        ]

    def _add(
        self,
        raw: Tensor,
        refined: Tensor,
        target: Tensor,
        regions: Regions | None,
        control: Tensor | None,
        part: tuple[int, int],
    ) -> ImageComparison:
        valid = valid_pixels(target, self.num_classes, self.ignore_index)
        distances = border_distances(*target.shape)
        true_labels = KnownLabels(target, valid, self.num_classes)
        true_borders = Borders(true_labels, *distances)
        rings = true_labels.rings(self.widths)
        matrices = []
        for side, prediction in zip(SIDES, (raw, refined), strict=True):
            known = KnownLabels(prediction, valid, self.num_classes)
            pixels, borders = self._metrics_of(side)
            counts = pixels.count(known, true_labels, rings)
            pixels.update(counts)
            matrices.append(counts.sum(dim=0))
            borders.update(Borders(known, *distances), true_borders)
        if control is not None:
            _check_shape("control", control, target)
            known = KnownLabels(control, valid, self.num_classes)
            counts = self.control.count(known, true_labels, torch.zeros_like(rings))
            self.control.update(counts)
        self.images.update(matrices[0], matrices[1], part)
        changes = ChangedPixels(raw, refined, target, valid)
        self.changes.update(changes)
        scores = region_changes = None
        if regions is not None and regions.have_masks:
            scores = score_regions(regions, raw, target, valid)
            kept = scores.measured
            true_iou = scores.mask_iou[kept]
            better = true_iou > scores.raw_iou[kept]
            self.calibration.update(regions.pred_iou[kept], true_iou, better)
            region_changes = changes.by_region(scores.windows, regions.classes)
            region_changes[~regions.accepted] = 0
        return ImageComparison((matrices[0], matrices[1]), changes, valid, scores, region_changes)

    def _metrics_of(self, side: str) -> tuple[BandedConfusion, BorderCounts]:
        return cast("tuple[BandedConfusion, BorderCounts]", (self.pixels[side], self.borders[side]))

    def reset(self) -> None:
        """Reset all metrics. Call it at the start of an epoch, not at its end.

        A state created under ``inference_mode`` cannot be updated outside it.
        """
        for module in self.modules():
            if isinstance(module, Metric):
                module.reset()

    def result(self) -> ComparisonResult:
        """Sum over all processes. A collective call: every process must make it."""
        return ComparisonResult(
            class_names=tuple(self.class_names),
            ignore_index=self.ignore_index,
            trimap_width=self.trimap_width,
            widths=tuple(self.widths),
            matrices={side: self._metrics_of(side)[0].compute().cpu() for side in SIDES},
            borders={side: self._metrics_of(side)[1].compute().cpu() for side in SIDES},
            changes=self.changes.compute().cpu(),
            totals=self.images.compute(),
            calibration=Calibration.of(**self.calibration.compute()),
            counts=tuple(self.counts.compute().tolist()),
            control=self.control.compute()[0].cpu(),
        )

    def compute(self) -> dict[str, float]:
        """Return `ComparisonResult.figures`. A collective call: every process must make it."""
        return self.result().figures()

    def plot(
        self,
        val: Mapping[str, float] | Sequence[Mapping[str, float]] | None = None,
        ax: Axes | None = None,
    ) -> Any:
        """Draw mIoU and trimap mIoU, as torchmetrics draws values; return figure and axes.

        ``val`` is what `compute` returned, or several of these, such as a callback's history.
        """
        val = self.compute() if val is None else val
        names = [f"{mean}_{side}" for mean in ("miou", "trimap_miou") for side in SIDES]
        series = [
            {name: torch.tensor(one.get(name, math.nan)) for name in names}
            for one in ([val] if isinstance(val, Mapping) else val)
        ]
        shown = series[0] if isinstance(val, Mapping) else series
        return plot_single_or_multi_val(shown, ax, True, 0.0, 1.0, name=type(self).__name__)


@dataclass(frozen=True)
class ComparisonResult:
    """The counts of a whole evaluation, on the CPU, and the figures computed from them.

    Attributes:
        class_names: C names.
        ignore_index: As given to `RefinementComparison`.
        trimap_width: As given.
        widths: W widths of bands in pixels, ascending.
        matrices: By side, (W + 1, C, C + 1) int64: one a band, the whole image last.
        borders: By side, (7, C) int64, see `BorderCounts`.
        changes: (3, C) int64: fixed, broken and swapped pixels by true class.
        totals: (N, 5, C) int64, each image's own, see `ImageTotals`.
        calibration: Predicted against true IoU of regions.
        counts: Images, failed images, regions, accepted regions, microseconds.
        control: (C, C + 1) int64, the matrix of what is refined without SAM; 0 without a control.
    """

    class_names: tuple[str, ...]
    ignore_index: int | None
    trimap_width: int
    widths: tuple[int, ...]
    matrices: dict[str, Tensor]
    borders: dict[str, Tensor]
    changes: Tensor
    totals: np.ndarray
    calibration: Calibration
    counts: tuple[int, ...]
    control: Tensor

    @cached_property
    def scores(self) -> dict[str, dict[str, Tensor]]:
        """`matrix_scores` of the whole image by side, with ``boundary_iou`` and ``boundary_f1``."""
        scores = {}
        for side in SIDES:
            scores[side] = matrix_scores(self.matrices[side][-1], self.ignore_index)
            scores[side]["boundary_iou"] = boundary_iou(self.borders[side], self.ignore_index)
            scores[side]["boundary_f1"] = boundary_f1(self.borders[side], self.ignore_index)
        return scores

    @cached_property
    def interval(self) -> BootstrapInterval | None:
        """The gain's bootstrap interval, None for less than two images."""
        if len(self.totals) < 2:
            return None
        return bootstrap_totals(self.totals, ignore_index=self.ignore_index)

    @cached_property
    def same_classes_gain(self) -> float:
        """The gain over the classes of both sides' mIoU, NaN if no pixel is scored."""
        raw, refined = (self.scores[side]["iou"] for side in SIDES)
        absent = (refined - raw).isnan()
        before, after = (one.masked_fill(absent, math.nan).nanmean() for one in (raw, refined))
        return (after - before).item()

    def trimap_miou(self, side: str, width: int) -> float:
        """Return the mIoU inside the band of a width; NaN if no pixel is in it."""
        matrix = self.matrices[side][self.widths.index(width)]
        return class_iou(matrix, self.ignore_index).nanmean().item()

    def figures(self) -> dict[str, float]:
        """Return everything that is measured, by name.

        Returns:
            As fractions, for raw and refined: ``miou_*`` and ``trimap_miou_*``, ``boundary_iou_*``
            and ``boundary_f1_*`` (means over classes), each with its ``…_gain``; ``mdice_*``,
            ``pixel_acc_*``, ``class_acc_*``, ``fwiou_*``; ``trimap_<w>px_miou_*`` for every width;
            by class ``iou_*/<class>``, ``dice_*/<class>``, ``class_boundary_iou_*/<class>`` and
            ``class_boundary_f1_*/<class>``.
            ``miou_gain_low`` and ``miou_gain_high``, the 95% interval of the gain;
            ``miou_gain_same_classes``, the gain over the classes of both sides' mIoU;
            ``miou_without_sam`` of a control, if there is one.
            ``refine_fixed_px``, ``refine_broken_px``, ``refine_swapped_px``, by true class
            ``fixed_px/<class>``, ``broken_px/<class>`` and ``swapped_px/<class>``, and
            ``refine_fixed_broken_ratio`` (over at least one broken pixel);
            ``measured_images``; ``refine_accept_rate`` (accepted of the prompted regions, 0
            if none was), ``refine_regions_per_image`` (over the images that were refined),
            ``refine_ms_per_image``, ``refine_failed_images``; ``refine_iou_ece`` and
            ``refine_iou_auroc``, see `Calibration`.
            Means are over the classes of a side: those in a target or in its prediction. Absent
            classes, and means over none, are left out.
        """
        figures: dict[str, float] = {}
        for side in SIDES:
            scores = self.scores[side]
            figures[f"miou_{side}"] = scores["miou"].item()
            figures[f"trimap_miou_{side}"] = self.trimap_miou(side, self.trimap_width)
            for name in _BOUNDARY:
                figures[f"{name}_{side}"] = scores[name].nanmean().item()
            for name in _SCALARS:
                figures[f"{name}_{side}"] = scores[name].item()
            for width in self.widths:
                figures[f"trimap_{width}px_miou_{side}"] = self.trimap_miou(side, width)
            for name, score in _BY_CLASS.items():
                keys = (f"{name}_{side}/{label}" for label in self.class_names)
                figures.update(zip(keys, scores[score].tolist(), strict=True))
        for name in _WITH_GAIN:
            figures[f"{name}_gain"] = figures[f"{name}_refined"] - figures[f"{name}_raw"]
        figures["miou_gain_same_classes"] = self.same_classes_gain
        if self.control.any():
            without_sam = matrix_scores(self.control, self.ignore_index)["miou"]
            figures["miou_without_sam"] = without_sam.item()
        if self.interval is not None:
            figures["miou_gain_low"] = self.interval.low
            figures["miou_gain_high"] = self.interval.high

        for kind, row in zip(KINDS, self.changes.tolist(), strict=True):
            figures[f"refine_{kind}_px"] = float(sum(row))
            keys = (f"{kind}_px/{label}" for label in self.class_names)
            figures.update(zip(keys, map(float, row), strict=True))
        broken = max(figures["refine_broken_px"], 1.0)
        figures["refine_fixed_broken_ratio"] = figures["refine_fixed_px"] / broken
        images, failed, regions, accepted, microseconds = self.counts
        figures["measured_images"] = float(len(self.totals))
        figures["refine_accept_rate"] = accepted / max(regions, 1)
        figures["refine_regions_per_image"] = regions / max(images - failed, 1)
        figures["refine_ms_per_image"] = microseconds / 1000 / max(images, 1)
        figures["refine_failed_images"] = float(failed)
        figures["refine_iou_ece"] = self.calibration.ece
        figures["refine_iou_auroc"] = self.calibration.auroc
        return {name: value for name, value in figures.items() if not math.isnan(value)}


def _check_shape(name: str, labels: Tensor, target: Tensor) -> None:
    if labels.shape != target.shape:
        raise ValueError(
            f"{name} must have the target's shape {tuple(target.shape)}, got shape "
            f"{tuple(labels.shape)}"
        )
