"""Refines images with every cell of a grid: encoded once, decoded once per pair of thresholds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from lightning_samrefine.adapters.batch_adapter import RefineInputs
from lightning_samrefine.config import RefineConfig
from lightning_samrefine.refine.acceptance import accepted_regions
from lightning_samrefine.refine.refiner import Refiner
from lightning_samrefine.tune.counts import GridCounts, Scoring, Truth
from lightning_samrefine.tune.settings import Grid


class Sweep:
    """Counts the changes of images by every cell of a grid.

    Args:
        grid: The thresholds to try.
        base: All other settings; its classes and thresholds of single classes are ignored.
        scoring: The scoring.

    Attributes:
        counts: Counts of the changes, cell by cell in the order of ``grid.cells``.
    """

    def __init__(self, grid: Grid, base: RefineConfig, scoring: Scoring) -> None:
        self.grid, self.scoring = grid, scoring
        self.base = replace(base, classes=None, class_pred_iou_thresh=None)
        self.counts = GridCounts(scoring, len(grid.cells))

    def __call__(self, refiner: Refiner, inputs: RefineInputs) -> None:
        """Sweep B samples.

        Args:
            refiner: Its model, precision and cache are used. Without a cache, images are encoded
                once per pair of the grid.
            inputs: B samples with targets.
        """
        assert inputs.targets is not None  # the callback needs them
        for index in range(len(inputs)):
            truth = Truth(inputs.labels[index], inputs.targets[index], self.scoring)
            refined = self.labels(
                refiner, inputs.images[index], inputs.probs[index], inputs.labels[index]
            )
            self.counts.add(truth.totals, [truth.changes(labels) for labels in refined])

    @torch.no_grad()
    def labels(self, refiner: Refiner, image: Tensor, probs: Tensor, raw: Tensor) -> list[Tensor]:
        """Return one image's refined labels in every cell, (H, W) int64 each.

        Args:
            refiner: As above.
            image: (3, H, W) uint8.
            probs: (C, H, W) float in [0, 1]; if not finite, nothing is refined.
            raw: (H, W) int64.
        """
        if not probs.isfinite().all():
            return [raw] * len(self.grid.cells)
        found = []
        for score_thresh, scale in self.grid.pairs:
            config = replace(self.base, score_thresh=score_thresh, mask_prompt_scale=scale)
            (predictions,) = refiner.predict([image], [probs], [raw], config)
            # The threshold affects the fusion only through the accepted regions.
            fused: dict[bytes, Tensor] = {}
            for iou in self.grid.pred_iou_thresh:
                fusing = replace(config, pred_iou_thresh=iou)
                accepted = accepted_regions(fusing, predictions.classes, predictions.pred_iou)
                if (key := accepted.tobytes()) not in fused:
                    fused[key] = refiner.fuse(predictions, fusing, with_probs=False).labels
                found.append(fused[key])
        return found


class Trial:
    """Runs chosen configurations, each image under several of them.

    Args:
        configs: The configurations of each image, in the order of the loader.
        scoring: The scoring.
        raw: (N, 2, 3, C) int64, the images' `Truth.totals` in the sweep.

    It has one cell per configuration.
    """

    def __init__(
        self, configs: Sequence[Sequence[RefineConfig]], scoring: Scoring, raw: np.ndarray
    ) -> None:
        self._configs, self._scoring, self._raw = configs, scoring, raw
        self.counts = GridCounts(scoring, len(configs[0]))

    def __call__(self, refiner: Refiner, inputs: RefineInputs) -> None:
        """Run B samples.

        Raises:
            ValueError: Other images than in the sweep, or in another order.
        """
        assert inputs.targets is not None  # the callback needs them
        for index in range(len(inputs)):
            number = len(self.counts)
            raw = inputs.labels[index]
            truth = Truth(raw, inputs.targets[index], self._scoring)
            if number >= len(self._raw) or not np.array_equal(truth.totals, self._raw[number]):
                raise ValueError(
                    "task=tune: the validation loader must yield the same images on both passes, "
                    f"got another image at index {number}: switch off its shuffling and random "
                    "augmentation"
                )
            configs = self._configs[number]
            # Images are refined once with equal configurations.
            found = {
                config: truth.changes(_refined(refiner, config, inputs, index))
                for config in dict.fromkeys(configs)
            }
            self.counts.add(truth.totals, [found[config] for config in configs])


def _refined(refiner: Refiner, config: RefineConfig, inputs: RefineInputs, index: int) -> Tensor:
    image, probs, raw = inputs.images[index], inputs.probs[index], inputs.labels[index]
    if not probs.isfinite().all():
        return raw
    (predictions,) = refiner.predict([image], [probs], [raw], config)
    return refiner.fuse(predictions, config, with_probs=False).labels
