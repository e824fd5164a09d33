"""`samrefine task=tune`: one pass over the validation set for the grid, one for the choice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_samrefine.adapters.batch_adapter import RefineInputs
from lightning_samrefine.callbacks.arguments import callbacks_of
from lightning_samrefine.callbacks.auto_refiner import AutoRefiner
from lightning_samrefine.config import RefineConfig
from lightning_samrefine.fit.auto_fusion import AutoFusion
from lightning_samrefine.fit.verdict import Verdict
from lightning_samrefine.metrics.bootstrap import BootstrapInterval, bootstrap_totals
from lightning_samrefine.refine.refiner import Refiner
from lightning_samrefine.tune.callback import TuneCallback, Visitor
from lightning_samrefine.tune.choice import Choice, best_cell, choose, folds
from lightning_samrefine.tune.counts import GridCounts, Scoring
from lightning_samrefine.tune.settings import RESAMPLES, Grid, Rule
from lightning_samrefine.tune.sweep import Sweep, Trial


@dataclass(frozen=True)
class Tuning:
    """The result of a tuning.

    Attributes:
        grid: The grid of thresholds.
        rule: The rule of the choice.
        base: The configuration with all other thresholds.
        class_names: C names.
        counts: The counts of every cell.
        choice: The choice from all images.
        trial: Counts of a run of the choice on all images (cell 0), and of the choice made without
            the image's fold (cell 1).
        untuned_fold_totals: (N, 5, C), every image in the cell that is best on the other folds,
            with all classes refined.
        folds: Number of folds.
        fitted: The thresholds with the weights of the fitted fusion, None with too few images.
        verdict: What the fit found, cross-validated; None with too few images.
    """

    grid: Grid
    rule: Rule
    base: RefineConfig
    class_names: list[str]
    counts: GridCounts
    choice: Choice
    trial: GridCounts
    untuned_fold_totals: np.ndarray
    folds: int
    fitted: RefineConfig | None
    verdict: Verdict | None

    @property
    def helps(self) -> bool:
        """Whether a class is refined and the expected gain on held-out images is positive."""
        return any(self.choice.is_open) and self.expected.gain > 0

    @property
    def expected(self) -> BootstrapInterval:
        """The gain of images with a choice made without them."""
        return self._interval(self.trial.totals(1, self.rule.objective))

    @property
    def expected_uncalibrated(self) -> BootstrapInterval:
        """The same for the best cell with all classes refined."""
        return self._interval(self.untuned_fold_totals)

    def _interval(self, totals: np.ndarray) -> BootstrapInterval:
        return bootstrap_totals(totals, resamples=RESAMPLES, confidence=self.rule.confidence)

    @property
    def config(self) -> RefineConfig:
        """The configuration to use: the choice, or no refined class if that does not help."""
        if not self.helps:
            return replace(self.cell_config, classes=())
        return self._for_these_classes(self.choice.config(self.grid, self.base))

    @property
    def cell_config(self) -> RefineConfig:
        """The best cell, with all classes refined."""
        return self._for_these_classes(self.grid.cells[self.choice.cell].config(self.base))

    def _for_these_classes(self, config: RefineConfig) -> RefineConfig:
        return replace(config, class_names=tuple(self.class_names))


def tune(
    trainer: Trainer,
    segmenter: LightningModule,
    datamodule: LightningDataModule | None,
    grid: Grid,
    rule: Rule,
    ckpt_path: str | Path | None = None,
) -> Tuning:
    """Try a grid on a validation set and choose.

    Args:
        trainer: Has a `TuneCallback`, whose ``cache`` keeps embeddings between the passes.
        segmenter: The model whose predictions are refined.
        datamodule: Its validation loader must yield the same images in the same order twice.
        grid: The thresholds to try.
        rule: The rule of the choice.
        ckpt_path: Lightning checkpoint of the segmenter.

    Raises:
        MisconfigurationException: Fewer than two images.
        ValueError: Images that differ between the passes.
    """
    (callback,) = callbacks_of(trainer, TuneCallback)

    def visit(visitor: Callable[[Scoring], Visitor]) -> None:
        callback.visitor = visitor
        trainer.validate(segmenter, datamodule=datamodule, ckpt_path=ckpt_path, verbose=False)

    seen: list[tuple[Sweep, AutoFusion]] = []

    def start(scoring: Scoring) -> Visitor:
        base = callback.acting_config
        sweep = Sweep(grid.acting_on(base), base, scoring)
        names = callback.class_names or list(map(str, range(scoring.num_classes)))
        auto = AutoFusion(names, refined=callback.fit_config.classes)
        seen.append((sweep, auto))

        def see(refiner: Refiner, inputs: RefineInputs) -> None:
            sweep(refiner, inputs)
            AutoRefiner(refiner, auto, scoring.ignore_index, callback.fit_config).sample(inputs)

        return see

    visit(start)
    ((sweep, auto),) = seen
    verdict = auto.finish()
    fitted = None
    if auto.fitted is not None:
        fitted = replace(callback.fit_config, weights=auto.fitted.final)
    grid, counts = sweep.grid, sweep.counts
    if len(counts) < 2:
        raise MisconfigurationException(
            f"task=tune: the validation loader must have at least 2 images, got {len(counts)}"
        )
    every = np.arange(len(counts))
    choice = choose(counts, grid, every, rule)
    configs = [[choice.config(grid, sweep.base)] * 2 for _ in every]
    untuned = np.empty_like(counts.totals(0, rule.objective))
    parts = folds(len(counts), rule.folds)
    for part in parts:
        others = np.setdiff1d(every, part)
        without = choose(counts, grid, others, rule).config(grid, sweep.base)
        for image in part:
            configs[image] = [configs[image][0], without]
        cell = best_cell(counts, grid, others, rule.objective)
        untuned[part] = counts.totals(cell, rule.objective)[part]

    trials: list[Trial] = []

    def check(scoring: Scoring) -> Visitor:
        trials.append(Trial(configs, scoring, counts.raw_totals()))
        return trials[-1]

    visit(check)
    return Tuning(
        grid,
        rule,
        sweep.base,
        list(auto.classes),
        counts,
        choice,
        trials[0].counts,
        untuned,
        len(parts),
        fitted,
        verdict,
    )
