"""Does refining pay on these images, for which classes, and how much of it is SAM's merit?

The sampled pixels of each image are predicted with weights that were fitted without the image. An
image counts by its number of sampled pixels, not by its size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from lightning_samrefine.fusion_weights import LogLinear
from lightning_samrefine.metrics.bootstrap import (
    BootstrapInterval,
    bootstrap_class_gains,
    paired_bootstrap,
)
from lightning_samrefine.metrics.confusion import confusion_matrix
from lightning_samrefine.metrics.trimap import class_or_none

# Least weight of the raw prediction and of the colors of its classes together: 0.8 to 1.7 on seven
# data sets, 1.1 for a network after one epoch, at most 0.1 with targets shuffled between images.
# Votes of masks keep a weight of up to 0.7 even then.
_MIN_RAW_AND_COLOR = 0.3


@dataclass(frozen=True)
class PixelLabels:
    """Classes of the N sampled pixels of one image or group of images, on the CPU.

    Attributes:
        target: (N,) integer in [0, C), the true classes.
        raw: (N,) integer, the raw prediction; outside [0, C) no class is predicted.
        refined: (N,) integer in [0, C), the refinement with SAM.
        control: (N,) integer in [0, C), the refinement without SAM.
    """

    target: Tensor
    raw: Tensor
    refined: Tensor
    control: Tensor

    @classmethod
    def merged(cls, images: Sequence[PixelLabels]) -> PixelLabels:
        """Return the pixels of several images as those of one."""
        return cls(*(torch.cat([getattr(one, f.name) for one in images]) for f in fields(cls)))

    def with_frozen(self, classes: Sequence[int], num_classes: int) -> PixelLabels:
        """Take back the refinement's changes from or to some classes."""
        if not classes:
            return self
        # One more entry, for pixels without a predicted class.
        frozen = torch.zeros(num_classes + 1, dtype=torch.bool)
        frozen[list(classes)] = True
        kept = (
            frozen[class_or_none(self.raw, num_classes)]
            | frozen[class_or_none(self.refined, num_classes)]
        )
        return replace(self, refined=torch.where(kept, self.raw, self.refined))


@dataclass(frozen=True)
class Verdict:
    """What the cross-validation found.

    Attributes:
        gain: mIoU of the refinement minus that of the raw prediction. Pixels of
            ``frozen_classes`` count with their raw classes.
        control: mIoU of the refinement without SAM minus that of the raw prediction.
        over_control: mIoU of the refinement minus that of the refinement without SAM: the part of
            ``gain`` that SAM's masks bring.
        frozen_classes: Classes that certainly lose, which keep their raw pixels; none if nothing
            is refined.
        refine: Whether the gain's interval lies above 0, and the fit uses the raw prediction.
        unrelated: Whether the fit hardly uses the raw prediction and the colors of its classes.
    """

    gain: BootstrapInterval
    control: BootstrapInterval
    over_control: BootstrapInterval
    frozen_classes: tuple[int, ...]
    refine: bool
    unrelated: bool = False

    def figures(self) -> dict[str, float]:
        """Return the gains by their logged names, fractions in [-1, 1]."""
        return {
            "fitted_gain": self.gain.gain,
            "fitted_gain_low": self.gain.low,
            "fitted_gain_high": self.gain.high,
            "fitted_gain_without_sam": self.control.gain,
            "fitted_gain_by_sam": self.over_control.gain,
            "fitted_gain_by_sam_low": self.over_control.low,
            "fitted_gain_by_sam_high": self.over_control.high,
        }

    def sentence(self, class_names: Sequence[str] | None = None) -> str:
        """Return what was found, in points of mIoU.

        Args:
            class_names: C names; classes are called by their indices if None.
        """
        gain, by_sam = _with_range(self.gain), _with_range(self.over_control)
        control = _points(self.control.gain)
        if self.unrelated:
            return (
                "The raw prediction is hardly related to the targets, which may belong to other "
                "images; every class keeps the raw prediction"
            )
        if not self.refine:
            worse = self.gain.high < 0
            finding = "costs mIoU" if worse else "adds nothing certain to mIoU:"
            return (
                f"Refining {finding} {gain}, and {control} without SAM; "
                "every class keeps the raw prediction"
            )
        parts = f"{control} without SAM, {by_sam} by SAM's masks"
        found = f"Refining adds {gain} to mIoU: {parts}"
        if not self.frozen_classes:
            return found
        names = [str(c) if class_names is None else class_names[c] for c in self.frozen_classes]
        listed = ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else names[0]
        keep = "keep" if len(names) > 1 else "keeps"
        return f"{found}; {listed} {keep} the raw prediction"


def judge(
    images: Sequence[PixelLabels],
    num_classes: int,
    weights: LogLinear | None = None,
) -> Verdict:
    """Decide what to refine.

    Classes whose IoU certainly falls are frozen one at a time, the most certain first, because
    each of them changes the gains of the others. No class is frozen if the others alone do not
    certainly gain, as with two classes, whose pixels only change into each other. The choice is
    made on the images that the gain is then reported for: with many classes and few images the
    reported gain is slightly too high.

    Args:
        images: At least one image, or group of images: what the bootstrap draws.
        num_classes: C.
        weights: The fitted weights. If they hardly use the raw prediction and the colors of its
            classes, its targets belong to other images, or it is of no use: a gain would come from
            the frequencies of the classes, and nothing is refined.
    """

    def confusions(side: str, frozen: Sequence[int] = ()) -> np.ndarray:
        """Return (N, C, C + 1) int64, the matrix of each image."""
        kept = (image.with_frozen(frozen, num_classes) for image in images)
        matrices = [confusion_matrix(getattr(i, side), i.target, num_classes) for i in kept]
        return torch.stack(matrices).numpy()

    raw, control = confusions("raw"), confusions("control")
    unrelated = weights is not None and _raw_and_color(weights) < _MIN_RAW_AND_COLOR
    losers = _certain_losers(lambda frozen: confusions("refined", frozen), raw)
    for frozen in ([] if unrelated else losers, []):
        refined = confusions("refined", frozen)
        gain = paired_bootstrap(raw, refined)
        if gain.low > 0:
            break
    return Verdict(
        gain=gain,
        control=paired_bootstrap(raw, control),
        over_control=paired_bootstrap(control, refined),
        frozen_classes=tuple(sorted(frozen)),
        refine=gain.low > 0 and not unrelated,
        unrelated=unrelated,
    )


def _raw_and_color(weights: LogLinear) -> float:
    pairs = zip(weights.features, weights.weights, strict=True)
    return sum(weight for name, weight in pairs if name in ("raw", "color"))


def _certain_losers(refined: Callable[[list[int]], np.ndarray], raw: np.ndarray) -> list[int]:
    """Return the classes to freeze, so that no other class certainly loses.

    Args:
        refined: Returns the counts of the refinement with some classes frozen.
        raw: The counts of the raw prediction.
    """
    frozen: list[int] = []
    while True:
        _, high = bootstrap_class_gains(raw, refined(frozen))
        high[frozen] = 0.0
        worst = int(high.argmin())
        if not high[worst] < 0:
            return frozen
        frozen.append(worst)


def _points(share: float) -> str:
    return f"{100 * share:+.1f}"


def _with_range(interval: BootstrapInterval) -> str:
    return f"{_points(interval.gain)} ({100 * interval.low:.1f}…{100 * interval.high:.1f})"
