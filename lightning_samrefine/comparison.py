"""Raw against refined: streaming confusion matrices, and what is read from them.

Every pixel is counted once, into one int64 matrix per side, so the figures are those of the whole
data set and do not depend on batch sizes or on the number of processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torchmetrics import Metric

SIDES = ("raw", "refined")


class ConfusionMatrix(Metric):
    """Counts pixels by true class and predicted class, with a column for "no class predicted".

    Args:
        num_classes: C.
        ignore_index: Target value that is not counted, inside or outside [0, C), or None. Any
            other target outside [0, C) is not counted either.

    Attributes:
        matrix: (C, C + 1) int64, rows the target's class, columns the predicted one. A prediction
            outside [0, C) is in column C: wrong for the target's class, and no other class's
            false positive.
    """

    full_state_update = False
    higher_is_better = None
    is_differentiable = False
    matrix: Tensor

    def __init__(self, num_classes: int, ignore_index: int | None = None) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        empty = torch.zeros(num_classes, num_classes + 1, dtype=torch.int64)
        self.add_state("matrix", empty, dist_reduce_fx="sum")

    def update(self, prediction: Tensor, target: Tensor, where: Tensor | None = None) -> None:
        """Add pixels.

        Args:
            prediction: Integer tensor of any shape, the predicted classes.
            target: Integer tensor of the same shape, the true classes.
            where: Bool tensor of the same shape, the pixels to count; all of them where None.

        Raises:
            ValueError: Shapes that differ.
        """
        if prediction.shape != target.shape:
            raise ValueError(
                f"prediction: got shape {tuple(prediction.shape)}, accepted is the target's, "
                f"{tuple(target.shape)}"
            )
        counted = valid_pixels(target, self.num_classes, self.ignore_index)
        if where is not None:
            counted &= where
        columns = self.num_classes + 1
        outside = (prediction < 0) | (prediction >= self.num_classes)
        # int32 halves the memory traffic, which is all that this costs.
        column = prediction.to(torch.int32).masked_fill(outside, self.num_classes)
        cell = target.to(torch.int32) * columns + column
        # A cell past the end takes what is not counted: selecting would synchronise the device.
        cell.masked_fill_(~counted, self.matrix.numel())
        counts = torch.bincount(cell.flatten(), minlength=self.matrix.numel() + 1)
        self.matrix += counts[:-1].view_as(self.matrix)

    def compute(self) -> Tensor:
        """Return the (C, C + 1) int64 matrix, summed over all processes."""
        return self.matrix


def valid_pixels(target: Tensor, num_classes: int, ignore_index: int | None) -> Tensor:
    """Return a bool map of the pixels whose target is a class in [0, C) other than the ignored."""
    valid = (target >= 0) & (target < num_classes)
    if ignore_index is not None and 0 <= ignore_index < num_classes:
        valid &= target != ignore_index
    return valid


def class_iou(matrix: Tensor, ignore_index: int | None = None) -> Tensor:
    """Return the intersection over union of every class, the field's Jaccard index.

    Args:
        matrix: (C, C + 1) int64, see `ConfusionMatrix`.
        ignore_index: A class that is not scored, where it is in [0, C).

    Returns:
        (C,) float64 in [0, 1], NaN for a class that is neither in the target nor predicted.
    """
    num_classes = matrix.shape[0]
    hits = matrix.diagonal()
    union = matrix.sum(dim=1) + matrix[:, :num_classes].sum(dim=0) - hits
    iou = hits.double() / union.double()
    if ignore_index is not None and 0 <= ignore_index < num_classes:
        iou[ignore_index] = math.nan
    return iou


def trimap_band(
    target: Tensor, width: int, num_classes: int, ignore_index: int | None = None
) -> Tensor:
    """Return the pixels near a border between classes.

    A pixel is in the band where its target is valid and another valid pixel within chessboard
    distance ``width`` has another label (Krähenbühl and Koltun, NIPS 2011, measured around label
    borders; ignored pixels are in no band and make none).

    Args:
        target: (…, H, W) integer.
        width: Distance in pixels, at least 1.
        num_classes: C.
        ignore_index: See `ConfusionMatrix`.

    Returns:
        (…, H, W) bool.
    """
    valid = valid_pixels(target, num_classes, ignore_index)
    labels = target.to(torch.int32)
    # A window's largest and smallest valid label differ exactly where it holds two labels.
    largest = _window_reduce(labels.masked_fill(~valid, -1), width, -1, torch.maximum)
    smallest = _window_reduce(
        labels.masked_fill(~valid, num_classes), width, num_classes, torch.minimum
    )
    return valid & (largest != smallest)


def _window_reduce(
    values: Tensor, width: int, outside: int, reduce: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Reduce every (2·width + 1)² window of (…, H, W), one axis after the other.

    Windows grow by doubling, log2 steps instead of the 2·width + 1 of a pooling layer, which on a
    CPU is 15 times faster at a width of 3.
    """
    padded = nn.functional.pad(values, (width,) * 4, value=outside)
    for axis in (-1, -2):
        length = 1
        while length < 2 * width + 1:
            step = min(length, 2 * width + 1 - length)
            size = padded.shape[axis] - step
            padded = reduce(padded.narrow(axis, 0, size), padded.narrow(axis, step, size))
            length += step
    return padded


class RefinementCounts(Metric):
    """Counts what the refinement did: integers, so that no order of addition changes them.

    Attributes:
        counts: (5,) int64: images, failed images, prompted regions, accepted regions, and
            microseconds spent refining.
    """

    full_state_update = False
    higher_is_better = None
    is_differentiable = False
    counts: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("counts", torch.zeros(5, dtype=torch.int64), dist_reduce_fx="sum")

    def update(
        self,
        images: int = 0,
        failed: int = 0,
        regions: int = 0,
        accepted: int = 0,
        seconds: float = 0.0,
    ) -> None:
        """Add the figures of some images."""
        new = [images, failed, regions, accepted, round(seconds * 1e6)]
        self.counts += torch.tensor(new, device=self.counts.device)

    def compute(self) -> Tensor:
        """Return the (5,) int64 counts, summed over all processes."""
        return self.counts


class RefinementComparison(nn.Module):
    """Everything that one evaluation says about raw against refined.

    Args:
        num_classes: C.
        ignore_index: Target value that is not counted, or None.
        class_names: C names for the per-class figures; "0", "1", … where None.
        trimap_width: Half-width in pixels of the band around borders, see `trimap_band`.

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
            raise ValueError(
                f"class_names: got {len(class_names)} names, accepted are {num_classes}"
            )
        if trimap_width < 1:
            raise ValueError(f"trimap_width: got {trimap_width}, accepted is at least 1")
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.class_names = list(class_names or map(str, range(num_classes)))
        self.trimap_width = trimap_width
        self.full = nn.ModuleDict({side: self._matrix() for side in SIDES})
        self.trimap = nn.ModuleDict({side: self._matrix() for side in SIDES})
        self.counts = RefinementCounts()

    def _matrix(self) -> ConfusionMatrix:
        return ConfusionMatrix(self.num_classes, self.ignore_index)

    def update(self, raw: Tensor, refined: Tensor, target: Tensor) -> None:
        """Add one image or a batch.

        Args:
            raw: (…, H, W) integer, the raw prediction.
            refined: (…, H, W) integer, the refined one.
            target: (…, H, W) integer.

        Raises:
            ValueError: Shapes that differ.
        """
        band = trimap_band(target, self.trimap_width, self.num_classes, self.ignore_index)
        for side, prediction in zip(SIDES, (raw, refined), strict=True):
            self.full[side].update(prediction, target)
            self.trimap[side].update(prediction, target, where=band)

    def reset(self) -> None:
        """Forget everything. Do so where an epoch starts, not where it ends.

        A state made under ``inference_mode`` cannot be updated outside it.
        """
        for metric in self._metrics():
            metric.reset()

    def _metrics(self) -> list[Metric]:
        return [*self.full.values(), *self.trimap.values(), self.counts]

    def compute(self) -> dict[str, float]:
        """Read the figures. A collective call: every process must make it.

        Returns:
            ``miou_raw``, ``miou_refined``, ``miou_gain``, ``iou_raw/<class>``,
            ``iou_refined/<class>``, ``trimap_miou_raw``, ``trimap_miou_refined``,
            ``trimap_miou_gain`` as fractions; ``refine_accept_rate`` (accepted of the prompted
            regions, 0 where none was), ``refine_regions_per_image`` (over the images that were
            refined), ``refine_ms_per_image``, ``refine_failed_images``. Means are over the
            classes present; absent classes, and means over none, are left out.
        """
        figures: dict[str, float] = {}
        for prefix, matrices in (("", self.full), ("trimap_", self.trimap)):
            for side in SIDES:
                iou = class_iou(matrices[side].compute().cpu(), self.ignore_index)
                figures[f"{prefix}miou_{side}"] = iou.nanmean().item()
                if matrices is self.full:
                    names = (f"iou_{side}/{name}" for name in self.class_names)
                    figures.update(zip(names, iou.tolist(), strict=True))
            figures[f"{prefix}miou_gain"] = (
                figures[f"{prefix}miou_refined"] - figures[f"{prefix}miou_raw"]
            )
        figures = {name: value for name, value in figures.items() if not math.isnan(value)}

        images, failed, regions, accepted, microseconds = self.counts.compute().tolist()
        figures["refine_accept_rate"] = accepted / max(regions, 1)
        figures["refine_regions_per_image"] = regions / max(images - failed, 1)
        figures["refine_ms_per_image"] = microseconds / 1000 / max(images, 1)
        figures["refine_failed_images"] = float(failed)
        return figures
