"""Weights that are fitted evaluation by evaluation, and applied to images they were not fitted to.

Every evaluation with targets samples pixels of its images. At its end the fusion is fitted and
cross-validated; what was found decides about the next evaluations, tests and predictions. An image
that is seen again is refined with the weights of its fold, which were fitted without it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lightning_samrefine.fit.sample import ImageSample, PixelSample
from lightning_samrefine.fit.solve import FOLDS, MIN_IMAGES, cross_validate
from lightning_samrefine.fit.verdict import PixelLabels, Verdict, judge
from lightning_samrefine.fusion_weights import FEATURES, SAM_FEATURES, FusionWeights, LogLinear

_CONTROL = tuple(name for name in FEATURES if name not in SAM_FEATURES)


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
        fitted: Weights of an earlier run of the same classes.
        refined: Indices of the classes that the user lets refine, None for all.

    Attributes:
        fitted: The weights in use, None until an evaluation was fitted.
        sample: The labeled pixels of the running evaluation.

    Raises:
        ValueError: Weights of other classes.
    """

    def __init__(
        self,
        classes: Sequence[str],
        fitted: FittedFusion | None = None,
        refined: Sequence[int] | None = None,
    ) -> None:
        self._classes = tuple(classes)
        chosen = range(len(self._classes)) if refined is None else refined
        self._excluded = tuple(c for c in range(len(self._classes)) if c not in chosen)
        if fitted is not None and fitted.final.classes != self._classes:
            raise ValueError(
                f"classes must be those of the fitted weights, {', '.join(fitted.final.classes)}, "
                f"got {', '.join(self._classes)}"
            )
        self.fitted = fitted
        self.start()

    def start(self) -> None:
        """Begin an evaluation with an empty sample."""
        self.sample = PixelSample(len(self._classes))

    def weights_for(self, key: str) -> FusionWeights | None:
        """Return weights that were fitted without an image, None before the first fit."""
        return None if self.fitted is None else self.fitted.weights_for(key)

    def control_for(self, key: str) -> FusionWeights:
        """Return weights whose control was fitted without an image; the preset's before a fit."""
        fitted = self.weights_for(key)
        if fitted is not None:
            return fitted
        count = len(self._classes)
        return FusionWeights(
            LogLinear.preset(FEATURES, count), LogLinear.preset(_CONTROL, count), self._classes
        )

    def finish(self, others: Iterable[ImageSample] = ()) -> Verdict | None:
        """Fit the weights to the images of the evaluation and judge them.

        Args:
            others: The samples of the other processes.

        Returns:
            What was found, None if there are fewer than `MIN_IMAGES` images; the weights then stay
            as they were.
        """
        self.sample.merge(others)
        images = list(self.sample)
        self.start()
        if len(images) < MIN_IMAGES:
            return None
        num_classes = len(self._classes)
        fusion = cross_validate(images, FEATURES, num_classes)
        control = cross_validate(images, _CONTROL, num_classes)
        verdict = judge(
            [
                PixelLabels(image.target, image.raw, refined, without_sam).with_frozen(
                    self._excluded, num_classes
                )
                for image, refined, without_sam in zip(
                    images, fusion.predictions, control.predictions, strict=True
                )
            ],
            num_classes,
            fusion.weights,
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
        self.fitted = FittedFusion(final, folds, fold_of)
        return verdict
