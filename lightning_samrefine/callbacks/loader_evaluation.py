"""What one pass over one dataloader collects: counts, and the images worth a look."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_samrefine.adapters.batch_adapter import RefineInputs
from lightning_samrefine.adapters.layouts.overlapping import labels_as_class
from lightning_samrefine.callbacks.repeated_samples import RealSamples
from lightning_samrefine.metrics.comparison import ImageComparison, RefinementComparison
from lightning_samrefine.metrics.overlapping import OverlappingComparison, foreground
from lightning_samrefine.metrics.paired_metrics import PairedMetrics
from lightning_samrefine.refine.results import Refinement
from lightning_samrefine.reporting.image_table import ImageRow
from lightning_samrefine.reporting.panels import PanelPicker
from lightning_samrefine.reporting.report.gallery_entries import Gallery


class LoaderEvaluation:
    """Collects raw and refined predictions of one dataloader on one process.

    Args:
        dataloader: The loader; its sampler decides which samples are repeats.
        comparison: Counts pixels and regions.
        panels: Number of images kept for panels.
        gallery: Keeps images and regions for the report, None without one.
        has_control: Whether refinements have the labels of a control without SAM.
        metrics: The user's metrics, None without any.
        lists_images: Whether a row is kept for each image.

    Attributes:
        picker: The images for panels.
        rows: The images that were measured, empty without ``lists_images``.
    """

    def __init__(
        self,
        dataloader: Any,
        comparison: RefinementComparison | OverlappingComparison,
        panels: int,
        gallery: Gallery | None = None,
        has_control: bool = False,
        metrics: PairedMetrics | None = None,
        lists_images: bool = False,
    ) -> None:
        self._samples = RealSamples(dataloader)
        self.comparison = comparison
        self.picker = PanelPicker(panels)
        self.gallery = gallery
        self._has_control = has_control
        self._parts = 1  # of an image of the batches before
        self.metrics = metrics
        self._lists_images = lists_images
        self.rows: list[ImageRow] = []

    def real(self, inputs: RefineInputs) -> RefineInputs:
        """Count the next batch, and return it without the samples that the sampler repeats."""
        self._parts = len(inputs.parts)
        return inputs.first(self._samples.take(len(inputs) // self._parts))

    def lose(self, count: int) -> None:
        """Count a batch of ``count`` samples that could not be read."""
        lost = self._samples.take(count) * self._parts
        self.comparison.counts.update(images=lost, failed=lost)

    def rehearse(self, inputs: RefineInputs) -> None:
        """Add the B real samples of a sanity check: the raw predictions alone, without SAM."""
        assert inputs.targets is not None
        self.comparison.counts.update(images=len(inputs))
        for index, labels in enumerate(inputs.labels):
            part = inputs.part(index)
            self.comparison.update(labels, labels, inputs.targets[index], part=part)
            self._measure(labels, labels, inputs.targets[index])

    @torch.no_grad()
    def add(
        self,
        inputs: RefineInputs,
        refinements: Sequence[Refinement | None],
        seconds: float,
        names: Sequence[str],
    ) -> None:
        """Add the B real samples of a batch.

        Args:
            inputs: B samples with targets.
            refinements: B refinements, None if refining failed: the raw prediction stands.
            seconds: Time that refining took.
            names: At least B names of the samples in panels and report.
        """
        assert inputs.targets is not None
        counts = self.comparison.counts
        counts.update(images=len(inputs), seconds=seconds)
        share = seconds / max(len(inputs), 1)
        for index, refinement in enumerate(refinements):
            raw, target, part = inputs.labels[index], inputs.targets[index], inputs.part(index)
            if refinement is None:
                control = raw if self._has_control else None
                (found,) = self.comparison.update(raw, raw, target, control=control, part=part)
                self._measure(raw, raw, target)
                self._list(names[index], found, 0, 0, share, failed=True)
                counts.update(failed=1)
                continue
            refined, regions = refinement.labels, refinement.regions
            accepted = len(refinement.pred_iou)
            counts.update(regions=len(regions), accepted=accepted)
            control = refinement.control
            (found,) = self.comparison.update(raw, refined, target, regions, control, part)
            self._measure(raw, refined, target)
            if isinstance(self.comparison, OverlappingComparison):
                c = part[0] % self.comparison.num_classes
                raw, refined, target = (labels_as_class(x, c) for x in (raw, refined, target))
                regions, found = foreground(regions, found, c)
            image, name = inputs.images[index], names[index]
            self._list(name, found, len(regions), accepted, share)
            self.picker.offer(name, image, raw, refined, target, found.valid, regions)
            if self.gallery is not None:
                self.gallery.add(name, image, raw, refined, target, regions, found)

    def _list(
        self,
        name: str,
        found: ImageComparison,
        regions: int,
        accepted: int,
        seconds: float,
        failed: bool = False,
    ) -> None:
        if self._lists_images:
            raw, refined = found.mious(self.comparison.ignore_index)
            figures = (refined - raw, raw, refined, *found.changes.totals())
            self.rows.append(ImageRow(name, *figures, regions, accepted, seconds, failed))

    def _measure(self, raw: Tensor, refined: Tensor, target: Tensor) -> None:
        if self.metrics is not None:
            self.metrics.update(raw, refined, target)
