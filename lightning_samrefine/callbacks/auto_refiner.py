"""Refining with weights that never saw the image, and sampling pixels for the next fit."""

from __future__ import annotations

from dataclasses import replace

import torch

from lightning_samrefine.adapters.batch_adapter import RefineInputs
from lightning_samrefine.config import RefineConfig
from lightning_samrefine.fit.auto_fusion import AutoFusion
from lightning_samrefine.refine.cache.keys import image_digest
from lightning_samrefine.refine.class_filter import restore_frozen_classes
from lightning_samrefine.refine.fusion.features import FeatureMaps
from lightning_samrefine.refine.fusion.fitted import control_labels, feature_maps, fuse_fitted
from lightning_samrefine.refine.mask_predictions import ImagePredictions
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
        config: In place of the refiner's own.
        with_probs: Whether refinements have refined probabilities.

    Attributes:
        auto: As given.
    """

    def __init__(
        self,
        refiner: Refiner,
        auto: AutoFusion,
        ignore_index: int | None,
        config: RefineConfig | None = None,
        with_probs: bool = False,
    ) -> None:
        auto.use_sam(refiner.sam.name)
        self._refiner, self.auto, self._ignore_index = refiner, auto, ignore_index
        self._with_probs = with_probs
        self._config = config or refiner.config
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
        found = self._predict(inputs)
        with autocast(None, self._refiner.sam.device):  # whatever the caller's
            return [self._refine(inputs, index, *own) for index, own in enumerate(found)]

    @torch.no_grad()
    def sample(self, inputs: RefineInputs) -> None:
        """Sample labeled pixels of B samples without refining them; non-finite scores are skipped.

        Args:
            inputs: B samples with targets.
        """
        finite = [i for i, probs in enumerate(inputs.probs) if probs.isfinite().all()]
        inputs = inputs.take(finite)
        found = self._predict(inputs)
        with autocast(None, self._refiner.sam.device):
            for index, (predictions, key) in enumerate(found):
                self._sample(inputs, index, key, feature_maps(predictions, self._config))

    def _predict(self, inputs: RefineInputs) -> list[tuple[ImagePredictions, str]]:
        """Return every image's masks, and the hash that identifies it in any run."""
        predicted = list(
            self._refiner.predict(inputs.images, inputs.probs, inputs.labels, self._config)
        )
        missing = [one.raw.image for one in predicted if one.digest is None]
        hashed = map(image_digest, Download(*missing).wait() if missing else [])
        return [(one, one.digest or next(hashed)) for one in predicted]

    def _sample(self, inputs: RefineInputs, index: int, key: str, maps: FeatureMaps) -> None:
        assert inputs.targets is not None
        target, raw = inputs.targets[index], inputs.labels[index]
        group = None if inputs.groups is None else inputs.groups[index]
        self.auto.sample.add(key, maps, target, raw, group, self._ignore_index)

    def _refine(
        self, inputs: RefineInputs, index: int, predictions: ImagePredictions, key: str
    ) -> Refinement:
        maps = feature_maps(predictions, self._config)
        if self._samples and inputs.targets is not None:
            self._sample(inputs, index, key, maps)
        group = key if inputs.groups is None else inputs.groups[index]
        refined = self._fuse(predictions, group, maps)
        control = control_labels(predictions.raw, maps, self.auto.control_for(group))
        return replace(refined, control=control)

    def _fuse(self, predictions: ImagePredictions, group: str, maps: FeatureMaps) -> Refinement:
        weights = self.auto.weights_for(group)
        if weights is None:
            return self._refiner.fuse(predictions, self._config, self._with_probs)
        config, raw = replace(self._config, weights=weights), predictions.raw
        refined = fuse_fitted(predictions, config, self._refiner.sam, self._with_probs, maps)
        return restore_frozen_classes(refined, raw, config.classes)
