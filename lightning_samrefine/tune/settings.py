"""The settings of `samrefine task=tune`, checked before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_samrefine.tune.grid import Grid
from lightning_samrefine.tune.rule import Objective, Rule
from lightning_samrefine.utils.validation import check_count

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule, LightningModule, Trainer


@dataclass
class TuneSettings:
    """The command's node ``tune``.

    Attributes:
        score_thresh: See `Grid`, as the next two.
        mask_prompt_scale: Its values.
        pred_iou_thresh: Its values.
        objective: See `Rule`, as the next two.
        margin: Of a class's certain gain.
        confidence: Of the intervals.
        folds: Of the cross-validation, at least 2.

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
            segmenter: Makes the predictions.
            datamodule: Has the validation set.
            ckpt_path: Lightning checkpoint of the segmenter.
            folder: Where the files go.

        Returns:
            mIoU of the validation set, refined with the choice; None without a scored pixel.
        """
        from lightning_samrefine.reporting.summary import write_metrics
        from lightning_samrefine.tune.report import print_tuning, tuning_metrics, write_tuning
        from lightning_samrefine.tune.task import tune

        tuning = tune(trainer, segmenter, datamodule, self.grid, self.rule, self.folds, ckpt_path)
        metrics = tuning_metrics(tuning)
        write_tuning(tuning, folder)
        write_metrics(metrics, folder / "metrics.json")
        print_tuning(tuning, folder)
        tuned = metrics["tune/miou_tuned"]
        return None if math.isnan(tuned) else tuned
