"""The settings and the rule of `samrefine task=tune`, checked before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lightning_samrefine.tune.grid import Grid
from lightning_samrefine.utils.validation import check_count

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule, LightningModule, Trainer


Objective = Literal["miou", "trimap_miou"]
OBJECTIVES: tuple[Objective, ...] = ("miou", "trimap_miou")


@dataclass(frozen=True)
class Rule:
    """Objective and required certainty of a choice.

    Attributes:
        objective: The maximized metric: mIoU of the whole images or of the trimap bands.
        margin: Minimum lower bound of a refined class's gain in IoU (exclusive). 0 requires a
            certain gain; -0.01 accepts a class that may lose a point.
        confidence: Confidence of the bounds' two-sided intervals, in (0, 1).
        resamples: Number of times the images are drawn with replacement.
        seed: Seed of the draws.

    Raises:
        TypeError: Not a number.
        ValueError: A value outside its range.
    """

    objective: Objective = "miou"
    margin: float = 0.0
    confidence: float = 0.95
    resamples: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("margin", "confidence"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{name} must be a number, got {value!r}")
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective must be 'miou' or 'trimap_miou', got {self.objective!r}")
        if not -1 <= self.margin <= 1:
            raise ValueError(f"margin must be an IoU in [-1, 1], got {self.margin}")
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence must be in (0, 1), got {self.confidence}")


@dataclass
class TuneSettings:
    """The command's node ``tune``.

    See `Grid` and `Rule`. There are at least 2 folds of the cross-validation.

    Raises:
        TypeError: A value of a wrong type.
        ValueError: A value outside its range.
    """

    score_thresh: Sequence[float]
    mask_prompt_scale: Sequence[float]
    pred_iou_thresh: Sequence[float]
    objective: Objective = "miou"
    margin: float = 0.0
    confidence: float = 0.95
    folds: int = 5

    callback = "lightning_samrefine.tune.callback.TuneCallback"

    def __post_init__(self) -> None:
        self.grid = Grid(self.score_thresh, self.mask_prompt_scale, self.pred_iou_thresh)
        self.rule = Rule(self.objective, self.margin, self.confidence)
        self.folds = check_count("folds", self.folds, least=2)

    def run(
        self,
        trainer: Trainer,
        segmenter: LightningModule,
        datamodule: LightningDataModule,
        ckpt_path: str | None,
        folder: Path,
    ) -> float | None:
        """Tune, write the files and print the result.

        Args:
            trainer: With a `TuneCallback`.
            segmenter: Source of the predictions.
            datamodule: With a validation set.
            ckpt_path: Lightning checkpoint of the segmenter.
            folder: Output folder.

        Returns:
            mIoU of the validation set, refined with the choice; None without a scored pixel.
        """
        from lightning_samrefine.reporting.summary import print_whole, write_metrics
        from lightning_samrefine.tune.report import tuning_metrics, tuning_summary, write_tuning
        from lightning_samrefine.tune.task import tune

        tuning = tune(trainer, segmenter, datamodule, self.grid, self.rule, self.folds, ckpt_path)
        metrics = tuning_metrics(tuning)
        write_tuning(tuning, folder)
        write_metrics(metrics, folder / "metrics.json")
        print_whole(tuning_summary(tuning, folder))
        tuned = metrics["tune/miou_tuned"]
        return None if math.isnan(tuned) else tuned
