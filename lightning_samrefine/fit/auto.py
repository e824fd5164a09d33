"""Weights that are fitted evaluation by evaluation, and applied to images they were not fitted to.

Every evaluation with targets samples pixels of its images. At its end the fusion is fitted and
cross-validated; what was found decides about the next evaluations, tests and predictions. An image
that is seen again is refined with the weights of its fold, which were fitted without it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lightning_samrefine.fit.features import LogLinear
from lightning_samrefine.fit.sample import ImageSample, PixelSample, priority
from lightning_samrefine.fit.solve import FOLDS, MIN_IMAGES, CrossValidation, cross_validate
from lightning_samrefine.fit.verdict import PixelLabels, Verdict, certain_gain, judge
from lightning_samrefine.fit.weights import FusionWeights

# Mean number of images on which the point grid is tried; most of its cost is the first look.
TRIAL_IMAGES = 24

_REGIONS = ("raw", "color", "presence", "region_votes")
_WITH_GRID = ("raw", "color", "presence", "mask_votes", "region_votes")
_CONTROL = ("raw", "color", "presence")


@dataclass(frozen=True)
class FittedFusion:
    """Weights for images that are seen again, and for new ones.

    Attributes:
        final: Fitted to all sampled images.
        folds: For each fold, fitted to the images outside it.
        fold_of: The fold of each sampled image by its key.
    """

    final: FusionWeights
    folds: tuple[FusionWeights, ...] = ()
    fold_of: Mapping[str, int] = field(default_factory=dict)

    def weights_for(self, key: str) -> FusionWeights:
        """Return weights that were fitted without an image."""
        fold = self.fold_of.get(key)
        return self.final if fold is None else self.folds[fold]

    def to_mapping(self) -> dict[str, Any]:
        """Return plain values for a checkpoint, as `from_mapping` reads them."""
        return {
            "final": self.final.to_mapping(),
            "folds": [weights.to_mapping() for weights in self.folds],
            "fold_of": dict(self.fold_of),
        }

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> FittedFusion:
        """Build the weights from plain values.

        Raises:
            TypeError: A value of the wrong type.
            ValueError: As `FusionWeights.from_mapping`.
        """
        return cls(
            FusionWeights.from_mapping(values["final"]),
            tuple(FusionWeights.from_mapping(fold) for fold in values["folds"]),
            values["fold_of"],
        )


class AutoFusion:
    """The fusion of ``refine="auto"`` over the evaluations of a run.

    Args:
        classes: C class names.
        ignore_index: Target value that is not a class, None for none.
        grid: Whether the point grid may be tried; a model without point prompts has none.

    Attributes:
        fitted: The weights in use; the preset's until an evaluation was fitted.
        verdict: What the latest fit found, None before it.
    """

    def __init__(
        self, classes: Sequence[str], ignore_index: int | None = None, grid: bool = True
    ) -> None:
        self._classes = tuple(classes)
        self._ignore_index = ignore_index
        self._grid = grid
        self.fitted = FittedFusion(self._preset())
        self.verdict: Verdict | None = None
        self._share = 1.0
        self._sample = self._empty()

    @property
    def is_fitted(self) -> bool:
        """Whether the weights were fitted to images rather than being the preset's."""
        return self.fitted.final.images > 0

    def start(self, images: int | None) -> None:
        """Begin an evaluation.

        Args:
            images: Number of images of the whole evaluation over all processes, None if unknown.
        """
        self._share = TRIAL_IMAGES / images if images else 0.25
        self._sample = self._empty()

    def prompts_grid(self, key: str) -> bool:
        """Tell if the point grid is prompted for an image.

        It is for every image once what it adds is certain; until then for a few, which their keys
        choose whatever the order, the batch size and the number of processes.
        """
        if not self._grid:
            return False
        if self.is_fitted:
            return "mask_votes" in self.fitted.final.fusion.features
        return priority(key) < self._share * 2**128

    def weights_for(self, key: str) -> FusionWeights:
        """Return weights that were fitted without an image."""
        return self.fitted.weights_for(key)

    @property
    def sample(self) -> PixelSample:
        """The labeled pixels of this evaluation so far."""
        return self._sample

    def finish(self, others: Iterable[ImageSample] = ()) -> Verdict | None:
        """Fit the weights to the images of the evaluation and judge them.

        Args:
            others: What the other processes sampled.

        Returns:
            What was found, None if there are fewer than `MIN_IMAGES` images; the weights then stay
            as they were.
        """
        self._sample.merge(others)
        images = list(self._sample)
        self._sample = self._empty()
        if len(images) < MIN_IMAGES:
            return None
        best = self._candidate(images, _REGIONS)
        with_grid = [image for image in images if "mask_votes" in image.names]
        if len(with_grid) >= MIN_IMAGES:
            candidate = self._candidate(with_grid, _WITH_GRID)
            if self._grid_adds(with_grid, candidate) and candidate.verdict.refine:
                best = candidate
        self.fitted, self.verdict = best.fitted, best.verdict
        return self.verdict

    def _grid_adds(self, images: Sequence[ImageSample], candidate: _Candidate) -> bool:
        """Tell if the point grid certainly gains over region prompts on the same images."""
        without = cross_validate(images, _REGIONS, len(self._classes))
        gain = certain_gain(
            [image.target for image in images],
            list(without.predictions),
            list(candidate.cross_validation.predictions),
            len(self._classes),
        )
        return gain.low > 0

    def _candidate(self, images: Sequence[ImageSample], features: Sequence[str]) -> _Candidate:
        num_classes = len(self._classes)
        fusion = cross_validate(images, features, num_classes)
        control = cross_validate(images, _CONTROL, num_classes)
        verdict = judge(
            [
                PixelLabels(image.target, image.raw, refined, without_sam)
                for image, refined, without_sam in zip(
                    images, fusion.predictions, control.predictions, strict=True
                )
            ],
            num_classes,
        )
        final = FusionWeights(
            fusion.weights,
            control.weights,
            self._classes,
            refine=verdict.refine,
            frozen_classes=verdict.frozen_classes,
            images=len(images),
            found=verdict.sentence(self._classes),
        )
        folds = tuple(
            replace(final, fusion=fusion.fold_weights[fold], control=control.fold_weights[fold])
            for fold in range(FOLDS)
        )
        fold_of = {image.key: fusion.fold_of[image.group] for image in images}
        return _Candidate(FittedFusion(final, folds, fold_of), verdict, fusion)

    def _preset(self) -> FusionWeights:
        count = len(self._classes)
        return FusionWeights(
            LogLinear.preset(_REGIONS, count), LogLinear.preset(_CONTROL, count), self._classes
        )

    def _empty(self) -> PixelSample:
        return PixelSample(len(self._classes))


@dataclass(frozen=True)
class _Candidate:
    """One choice of features, fitted and judged."""

    fitted: FittedFusion
    verdict: Verdict
    cross_validation: CrossValidation
