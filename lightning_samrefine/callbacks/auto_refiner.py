"""Refining with weights that never saw the image, and sampling pixels for the next fit."""

from __future__ import annotations

from dataclasses import replace

import torch

from lightning_samrefine.adapters.batch_adapter import RefineInputs
from lightning_samrefine.fit.auto import AutoFusion
from lightning_samrefine.refine.cache.keys import image_digest
from lightning_samrefine.refine.class_filter import restore_frozen_classes
from lightning_samrefine.refine.fusion.features import FeatureMaps
from lightning_samrefine.refine.fusion.fitted import control_labels, feature_maps, fuse_fitted
from lightning_samrefine.refine.mask_predictions import MaskPredictions
from lightning_samrefine.refine.refiner import Refiner
from lightning_samrefine.refine.results import Refinement
from lightning_samrefine.utils.device import Download
from lightning_samrefine.utils.precision import autocast


class AutoRefiner:
    """Refines batches for ``refine="auto"``.

    Args:
        refiner: Predicts masks; before the first fit its soft fusion is used.
        auto: The weights, and the sample for the next fit.
        ignore_index: Target value that is not a class, None for none.

    Attributes:
        auto: As given.
    """

    def __init__(self, refiner: Refiner, auto: AutoFusion, ignore_index: int | None) -> None:
        self._refiner, self.auto, self._ignore_index = refiner, auto, ignore_index
        self._samples = False

    def start(self, samples: bool) -> None:
        """Begin an evaluation.

        Args:
            samples: Whether labeled pixels are sampled; not in a test, whose images are not fitted
                to.
        """
        self.auto.start()
        self._samples = samples

    @torch.no_grad()
    def __call__(self, inputs: RefineInputs) -> list[Refinement]:
        """Refine B samples; each has the control's labels as well."""
        # On their way while SAM predicts. Their hashes identify images in any run, whatever their
        # names.
        images = Download(*inputs.images)
        predicted = list(self._refiner.predict(inputs.images, inputs.probs, inputs.labels))
        keys = [image_digest(image) for image in images.wait()]
        with autocast(None, self._refiner.sam.device):  # whatever the caller's
            return [
                self._refine(inputs, index, key, own)
                for index, (key, own) in enumerate(zip(keys, predicted, strict=True))
            ]

    def _refine(
        self, inputs: RefineInputs, index: int, key: str, predictions: MaskPredictions
    ) -> Refinement:
        raw, config = predictions.raw, self._refiner.config
        maps = feature_maps(predictions, config)
        if self._samples and inputs.targets is not None:
            target = inputs.targets[index]
            self.auto.sample.add(key, maps, target, raw.labels, None, self._ignore_index)
        refined = self._fuse(predictions, key, maps)
        control = control_labels(raw, maps, self.auto.control_for(key))
        return replace(refined, control=control)

    def _fuse(self, predictions: MaskPredictions, key: str, maps: FeatureMaps) -> Refinement:
        weights = self.auto.weights_for(key)
        if weights is None:
            return self._refiner.fuse(predictions)
        config, raw = replace(self._refiner.config, weights=weights), predictions.raw
        refined = fuse_fitted(predictions, config, self._refiner.sam, maps)
        return restore_frozen_classes(refined, raw.probs, raw.labels, config.classes)
