"""What one pass over one dataloader adds up to: figures, and the images worth looking at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lightning_samrefine.adapters.batch_adapter import RefineInputs
from lightning_samrefine.callbacks.real_samples import RealSamples
from lightning_samrefine.metrics.comparison import RefinementComparison
from lightning_samrefine.refine.results import Refinement
from lightning_samrefine.reporting.panels import PanelPicker
from lightning_samrefine.reporting.report.gallery import Gallery


class LoaderEvaluation:
    """Collects raw and refined predictions of one dataloader on one process.

    Args:
        dataloader: The loader, to tell its real samples from a sampler's repeats.
        comparison: Takes the figures.
        panels: How many images to keep for panels.
        gallery: Keeps images and regions for the report, None without one.

    Attributes:
        picker: The images for panels.
    """

    def __init__(
        self,
        dataloader: Any,
        comparison: RefinementComparison,
        panels: int,
        gallery: Gallery | None = None,
    ) -> None:
        self._samples = RealSamples(dataloader)
        self.comparison = comparison
        self.picker = PanelPicker(panels)
        self.gallery = gallery

    def real(self, inputs: RefineInputs) -> RefineInputs:
        """Count the next batch, and return its samples without a sampler's repeats."""
        return inputs.first(self._samples.take(len(inputs)))

    def lose(self, count: int) -> None:
        """Count a batch of so many samples that could not be read."""
        lost = self._samples.take(count)
        self.comparison.counts.update(images=lost, failed=lost)

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
            refinements: B refinements, None where refining failed: the raw prediction stands.
            seconds: What refining took.
            names: What to call the samples in panels and report.
        """
        counts = self.comparison.counts
        counts.update(images=len(inputs), seconds=seconds)
        for index, refinement in enumerate(refinements):
            raw, target = inputs.labels[index], inputs.targets[index]
            if refinement is None:
                self.comparison.update(raw, raw, target)
                counts.update(failed=1)
                continue
            refined, regions = refinement.labels, refinement.regions
            counts.update(regions=len(regions), accepted=len(refinement.pred_iou))
            (found,) = self.comparison.update(raw, refined, target, regions)
            image, name = inputs.images[index], names[index]
            self.picker.offer(name, image, raw, refined, target, found.valid, regions)
            if self.gallery is not None:
                self.gallery.add(name, image, raw, refined, target, regions, found)
