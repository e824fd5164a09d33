"""Weights that are fitted evaluation by evaluation, and applied to images they were not fitted to.

Every evaluation with targets samples pixels of its images. At its end the fusion is fitted and
cross-validated; the result decides about the next evaluations, tests and predictions. An image
that is seen again, or a neighbor of its group, is refined with the weights of its fold, which were
fitted without the group. Without groups every image is one of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lightning_samrefine.fit.sample import ImageSample, PixelSample
from lightning_samrefine.fit.solve import FOLDS, cross_validate
from lightning_samrefine.fit.verdict import PixelLabels, Verdict, judge
from lightning_samrefine.fusion_weights import FEATURES, SAM_FEATURES, FusionWeights, LogLinear

MIN_GROUPS = 8
TOO_FEW = (
    f"nothing was fitted to fewer than {MIN_GROUPS} labeled images (or groups, with group_key)"
)

_CONTROL = tuple(name for name in FEATURES if name not in SAM_FEATURES)


@dataclass(frozen=True)
class FittedFusion:
    """Weights for images that are seen again, and for new ones.

    Attributes:
        final: Fitted to all sampled images.
        folds: For each fold, fitted to the images outside it.
        fold_of: The fold of each sampled group of images.
    """

    final: FusionWeights
    folds: tuple[FusionWeights, ...] = ()
    fold_of: Mapping[str, int] = field(default_factory=dict)

    def weights_for(self, group: str) -> FusionWeights:
        """Return weights that were fitted without the images of a group."""
        fold = self.fold_of.get(group)
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
            FusionWeights.from_mapping(values["final"], "a checkpoint"),
            tuple(FusionWeights.from_mapping(fold, "a checkpoint") for fold in values["folds"]),
            values["fold_of"],
        )


class AutoFusion:
    """The fusion of ``refine="auto"`` over the evaluations of a run.

    Args:
        classes: C class names.
        fitted: Weights of an earlier run of the same classes.
        refined: Indices of the classes that the user lets refine, None for all.

    Attributes:
        classes: As given.
        sam: The name of the SAM whose masks are fused, empty until `use_sam`.
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
        self.classes = tuple(classes)
        chosen = range(len(self.classes)) if refined is None else refined
        self._excluded = tuple(c for c in range(len(self.classes)) if c not in chosen)
        self.sam = ""
        self.fitted: FittedFusion | None = None
        if fitted is not None:
            self.resume(fitted)
        self.start()

    def resume(self, fitted: FittedFusion) -> None:
        """Use weights of an earlier run.

        Raises:
            ValueError: Weights of other classes, or fitted with another SAM.
        """
        if fitted.final.classes != self.classes:
            raise ValueError(
                f"classes must be those of the fitted weights, {', '.join(fitted.final.classes)}, "
                f"got {', '.join(self.classes)}"
            )
        self.fitted = fitted
        if self.sam:
            self.use_sam(self.sam)

    def use_sam(self, name: str) -> None:
        """Note the name of the SAM whose masks are fused.

        Raises:
            ValueError: The weights were fitted with another one.
        """
        self.sam = name
        if self.fitted is not None:
            self.fitted.final.check_sam(name)

    def start(self) -> None:
        """Begin an evaluation with an empty sample."""
        self.sample = PixelSample(len(self.classes))

    def weights_for(self, group: str) -> FusionWeights | None:
        """Return weights that were fitted without a group of images, None before the first fit."""
        return None if self.fitted is None else self.fitted.weights_for(group)

    def control_for(self, group: str) -> FusionWeights:
        """Return weights whose control was fitted without a group; the preset's before a fit."""
        fitted = self.weights_for(group)
        if fitted is not None:
            return fitted
        count = len(self.classes)
        return FusionWeights(
            LogLinear.preset(FEATURES, count), LogLinear.preset(_CONTROL, count), self.classes
        )

    def finish(self, others: Iterable[ImageSample] = ()) -> Verdict | None:
        """Fit the weights to the images of the evaluation and judge them.

        Args:
            others: The samples of the other processes.

        Returns:
            What was found, None if the images are of fewer than `MIN_GROUPS` groups; the weights
            then stay as they were.
        """
        self.sample.merge(others)
        images = list(self.sample)
        self.start()
        if len({image.group for image in images}) < MIN_GROUPS:
            return None
        num_classes = len(self.classes)
        fusion = cross_validate(images, FEATURES, num_classes)
        control = cross_validate(images, _CONTROL, num_classes)
        # Images of a group are one draw of the bootstrap, as they are one side of a fold.
        groups: dict[str, list[PixelLabels]] = {}
        for image, *predictions in zip(
            images, fusion.predictions, control.predictions, strict=True
        ):
            labels = PixelLabels(image.target, image.raw, *predictions)
            groups.setdefault(image.group, []).append(
                labels.with_frozen(self._excluded, num_classes)
            )
        verdict = judge(list(map(PixelLabels.merged, groups.values())), num_classes, fusion.weights)
        final = FusionWeights(
            fusion.weights,
            control.weights,
            self.classes,
            refine=verdict.refine,
            frozen_classes=verdict.frozen_classes,
            images=len(images),
            found=verdict.sentence(self.classes),
            sam=self.sam,
        )
        folds = tuple(
            replace(final, fusion=fusion.fold_weights[fold], control=control.fold_weights[fold])
            for fold in range(FOLDS)
        )
        self.fitted = FittedFusion(final, folds, fusion.fold_of)
        return verdict
