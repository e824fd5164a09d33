"""What one pass over one dataloader adds up to: figures, and the panels worth looking at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lightning_samrefine.adapter import RefineInputs
from lightning_samrefine.comparison import RefinementComparison, valid_pixels
from lightning_samrefine.panels import PanelPicker, draw_panels, save_figure
from lightning_samrefine.refinement import Refinement
from lightning_samrefine.sampling import RealSamples


class LoaderEvaluation:
    """Collects raw and refined predictions of one dataloader on one process.

    Args:
        dataloader: The loader, to tell its real samples from a sampler's repeats.
        comparison: Takes the figures.
        panels: How many images to keep for panels.
    """

    def __init__(self, dataloader: Any, comparison: RefinementComparison, panels: int) -> None:
        self._samples = RealSamples(dataloader)
        self.comparison = comparison
        self._picker = PanelPicker(panels)

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
        batch_idx: int,
    ) -> None:
        """Add the B real samples of a batch.

        Args:
            inputs: B samples with targets.
            refinements: B refinements, None where refining failed: the raw prediction stands.
            seconds: What refining took.
            batch_idx: Number of the batch, to name its images in panels.
        """
        counts = self.comparison.counts
        counts.update(images=len(inputs), seconds=seconds)
        for index, refinement in enumerate(refinements):
            raw, target = inputs.labels[index], inputs.targets[index]
            refined = raw if refinement is None else refinement.labels
            self.comparison.update(raw, refined, target)
            if refinement is None:
                counts.update(failed=1)
                continue
            counts.update(regions=len(refinement.regions), accepted=len(refinement.pred_iou))
            self._offer(f"batch {batch_idx}, image {index}", inputs, index, refinement)

    def draw(self, path: Path) -> None:
        """Draw the images of this process that gained and lost the most; nothing without any.

        Args:
            path: The PNG to write; its stem becomes the headline.
        """
        panels = self._picker.panels()
        if panels:
            headline = path.stem.replace("_", " ")
            save_figure(draw_panels(panels, self.comparison.class_names, headline), path)

    def _offer(self, name: str, inputs: RefineInputs, index: int, refinement: Refinement) -> None:
        if self._picker.count == 0:
            return
        target = inputs.targets[index]
        comparison = self.comparison
        self._picker.offer(
            name,
            inputs.images[index],
            inputs.labels[index],
            refinement.labels,
            target,
            valid_pixels(target, comparison.num_classes, comparison.ignore_index),
            refinement.regions,
        )
