"""One pass over the validation or test loaders: from batches to figures, history and pictures.

The figures that are logged, and their names, come from `ComparisonResult.figures`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torchmetrics import MetricCollection

from lightning_samrefine.adapters.forward_hooks import ScoresCapture
from lightning_samrefine.adapters.nested import batch_size
from lightning_samrefine.callbacks.collective import gather_on_zero
from lightning_samrefine.callbacks.loader_evaluation import LoaderEvaluation
from lightning_samrefine.callbacks.logged_figures import (
    is_monitored,
    matches,
    warn_copies,
    warn_monitors,
    warn_shifted,
    warn_unmatched,
    warn_unscored,
)
from lightning_samrefine.callbacks.presenter import (
    Evaluated,
    Presenter,
    batch_label,
    logged_step,
    sample_names,
)
from lightning_samrefine.callbacks.repeated_samples import evaluation_dataloaders
from lightning_samrefine.callbacks.run_state import RunState
from lightning_samrefine.callbacks.step_outputs import (
    add_labels,
    check_outputs,
    check_whole,
)
from lightning_samrefine.config import RefineConfig
from lightning_samrefine.fit.auto_fusion import TOO_FEW, AutoFusion
from lightning_samrefine.metrics.comparison import RefinementComparison
from lightning_samrefine.metrics.overlapping import OverlappingComparison
from lightning_samrefine.metrics.paired_metrics import PairedMetrics
from lightning_samrefine.metrics.same_classes import different_classes
from lightning_samrefine.refine.results import Refinement
from lightning_samrefine.reporting.loggers import safe_names


@dataclass(frozen=True)
class EvaluationOptions:
    """What an evaluation measures, and the names of its figures.

    Attributes:
        ignore_index: Target value that is not counted, or None.
        trimap_width: Half-width in pixels of the band around borders.
        max_batches: Number of batches measured of each loader, None for all.
        class_names: C names, None for "0", "1", …
        name: Part of the names of figures and files, None for no such part.
        refine: The thresholds as the user gave them, for the report.
        metrics: The user's metrics, or None; their figures are all logged.
        log: Names and glob patterns of the other figures that are logged.
        prog_bar: The same of those that the progress bar shows.
        add_to_outputs: Where refined label maps go in the step's output, None for nowhere.
    """

    ignore_index: int | None
    trimap_width: int
    max_batches: int | None
    class_names: list[str] | None
    name: str | None
    refine: RefineConfig
    metrics: MetricCollection | None
    log: tuple[str, ...]
    prog_bar: tuple[str, ...]
    add_to_outputs: str | None

    def prefix(self, stage: str) -> str:
        """Return what the names of figures begin with, such as ``"val"`` or ``"val/fast"``."""
        return stage if self.name is None else f"{stage}/{self.name}"

    def covers(self, batch_idx: int) -> bool:
        """Whether a batch is measured."""
        return self.max_batches is None or batch_idx < self.max_batches


class Evaluation:
    """One pass over the validation or test loaders.

    Args:
        trainer: The Trainer that runs it.
        pl_module: The user's module; forward hooks stay on it until `close`.
        state: The run's SAM.
        options: What is measured.
        presenter: Shows the results.
        draws: Whether panels and charts are drawn, see `Presenter.draws`.
        fits: Whether ``refine="auto"`` is fitted to the images at the end.

    Attributes:
        figures: All figures by the names that they are logged under, filled by `finish`.
    """

    def __init__(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        state: RunState,
        options: EvaluationOptions,
        presenter: Presenter,
        draws: bool,
        fits: bool,
    ) -> None:
        state.begin(pl_module, fits)
        self._fusion = state.fusion_in_use  # of its figures; it may be fitted at its end
        self._state, self._options, self._presenter = state, options, presenter
        self._module, self._draws, self._fits = pl_module, draws, fits
        self._evaluated: list[Evaluated] = []
        self.figures: dict[str, float] = {}
        num_classes = state.num_classes
        names = safe_names(options.class_names or map(str, range(num_classes)), trainer.loggers)
        self._capture = ScoresCapture(pl_module, num_classes)
        comparison = OverlappingComparison if state.is_overlapping else RefinementComparison
        # New ones each time: metric states from an epoch under inference_mode could not be
        # updated in a later one under no_grad.
        self._loaders = [
            LoaderEvaluation(
                loader,
                comparison(num_classes, options.ignore_index, names, options.trimap_width).to(
                    trainer.strategy.root_device
                ),
                presenter.panels if draws else 0,
                presenter.gallery(trainer, num_classes, options.ignore_index),
                has_control=state.auto is not None,
                metrics=None
                if options.metrics is None
                else PairedMetrics(options.metrics, names).to(trainer.strategy.root_device),
                lists_images=draws or presenter.writes_report(trainer),
            )
            for loader in evaluation_dataloaders(trainer)
        ]

    def arm(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        """Note a batch before the module's step, and capture the scores of the step."""
        if self._options.covers(batch_idx):
            self._capture.arm(batch, dataloader_idx)

    def take(
        self, trainer: Trainer, batch: Any, outputs: Any, batch_idx: int, dataloader_idx: int
    ) -> None:
        """Read a batch after the module's step, refine it and compare; see `RunState.read`.

        In the sanity check the reading is rehearsed, so that a wrong set-up is reported before an
        epoch was trained, and nothing is refined.

        Args:
            trainer: The Trainer that runs the evaluation.
            batch: As the dataloader yields it.
            outputs: The return value of the step.
            batch_idx: The batch's number.
            dataloader_idx: The loader's number.
        """
        if not self._options.covers(batch_idx):
            return
        if (key := self._options.add_to_outputs) is not None:
            check_outputs(outputs, key)
        inputs = self._state.read(
            batch,
            outputs,
            self._capture,
            dataloader_idx,
            len(self._loaders),
            self._options.ignore_index,
        )
        if self._state.is_left_out(dataloader_idx):
            return
        loader = self._loaders[dataloader_idx]
        if inputs is None:
            if not trainer.sanity_checking:
                loader.lose(batch_size(batch))
            return
        images = len(inputs) // len(inputs.parts)
        names = inputs.named(sample_names(batch, images, batch_label(trainer, batch_idx)))
        check_whole(inputs, key, self._options.metrics)
        real = loader.real(inputs)
        refinements: list[Refinement | None] = [None] * len(real)
        if trainer.sanity_checking:
            loader.rehearse(real)
        elif len(real) > 0:
            refinements, seconds = self._state.refine(real, dataloader_idx)
            loader.add(real, refinements, seconds, names)
        if key is None:
            return
        if len(real) < len(inputs):  # a sampler's repeats are in the output, but not measured
            rest = replace(inputs.take(range(len(real), len(inputs))), targets=None)
            refinements = refinements + self._state.refine(rest, dataloader_idx)[0]
        add_labels(outputs, key, inputs, refinements)

    def check_figures(self, trainer: Trainer) -> None:
        """Warn of figures that may never be logged, before an epoch is trained. Collective."""
        results = [loader.comparison.result() for loader in self._loaders]
        for result in results:
            warn_unscored(result, "of the sanity check")
        warn_monitors(trainer, self._options.prefix("val"), results)

    def finish(self, trainer: Trainer, stage: str) -> list[dict[str, Any]]:
        """Measure every loader, and log the chosen figures. A collective call.

        Args:
            trainer: The Trainer that runs the evaluation.
            stage: ``"val"`` or ``"test"``.

        Returns:
            An entry for the history for each loader with an image.
        """
        self._state.end_pass()
        if self._state.cache is not None:
            self._state.cache.end_epoch(stage)
        entries = []
        for index, loader in enumerate(self._loaders):
            result = loader.comparison.result()  # a collective call, also of a loader left out
            if result.counts[0] == 0 and len(self._loaders) > 1:
                continue
            warn_unscored(result, "of this evaluation")
            warn_shifted(result)
            warn_copies(result, trainer.world_size)
            suffix = f"/dataloader_idx_{index}" if len(self._loaders) > 1 else ""
            figures, own = result.figures(), {}
            if result.counts[0] > 0:
                own = self._own_figures(trainer, loader)
                warn_unmatched(self._options.log, [*figures, *own])
            self._log(trainer, stage, suffix, figures)
            self._log(trainer, stage, suffix, own, always=True)
            where = {"stage": stage, "epoch": trainer.current_epoch, "step": logged_step(trainer)}
            entry = {**where, "dataloader_idx": index, **figures, **own}
            # One string for a name: checkpoints hold the history.
            entries.append({sys.intern(name): value for name, value in entry.items()})
            if self._options.class_names is not None:  # in pictures they are what the user wrote
                result = replace(result, class_names=tuple(self._options.class_names))
            if (different := different_classes(result)) is not None:
                title = f"{self._options.prefix(stage)}{suffix}"
                self._state.warn_of_classes(title, different)
            self._evaluated.append(Evaluated(stage, index, suffix, loader, result, self._fusion))
        if self._state.auto is not None and self._fits:
            figures = self._fit(trainer, self._state.auto)
            self._log(trainer, stage, "", figures)
            for entry in entries:
                entry.update(figures)
        return entries

    def _fit(self, trainer: Trainer, auto: AutoFusion) -> dict[str, float]:
        """Fit the fusion to this evaluation's images. A collective call.

        Returns:
            The cross-validated figures; none if there are too few images.
        """
        others = [image for part in gather_on_zero(list(auto.sample)) for image in part]
        verdict = auto.finish(others) if trainer.is_global_zero else None
        # One process fits: others may round differently.
        auto.fitted, verdict = trainer.strategy.broadcast((auto.fitted, verdict))
        if verdict is None or auto.fitted is None:
            rank_zero_info(f"SAMRefineCallback: {TOO_FEW}")
            return {}
        rank_zero_info(f"SAMRefineCallback: {auto.fitted.final.found}")
        return verdict.figures()

    def present(self, trainer: Trainer, history: Sequence[Mapping[str, Any]]) -> None:
        """Show what `finish` measured in panels, charts and the report. A collective call.

        Args:
            trainer: The Trainer that runs the evaluation.
            history: The running fit's, this evaluation included.
        """
        if not self._evaluated:
            return
        sam, options = self._state.sam, self._options
        about = {"SAM": f"{sam.name} on {sam.device}", "ignore_index": str(options.ignore_index)}
        if options.name is not None:
            about["name"] = options.name
        if self._state.auto is not None and self._state.auto.fitted is not None:
            about["Fit, cross-validated"] = self._state.auto.fitted.final.found
        self._presenter.present(
            trainer, self._evaluated, self._draws, history, options.refine, about
        )

    def close(self) -> None:
        """Take the forward hooks off the module."""
        self._capture.remove()

    def _own_figures(self, trainer: Trainer, loader: LoaderEvaluation) -> dict[str, float]:
        """Return the figures of the user's metrics. A collective call."""
        if loader.metrics is None:
            return {}
        failed = trainer.strategy.reduce_boolean_decision(loader.metrics.failed, all=False)
        return {} if failed else loader.metrics.figures()

    def _log(
        self,
        trainer: Trainer,
        stage: str,
        suffix: str,
        figures: Mapping[str, float],
        always: bool = False,
    ) -> None:
        """Note figures, and log those that the user chose or monitors, or ``always`` all."""
        chosen: dict[bool, dict[str, float]] = {False: {}, True: {}}
        for figure, value in figures.items():
            name = f"{self._options.prefix(stage)}/{figure}{suffix}"
            self.figures[name] = value
            in_bar = matches(figure, self._options.prog_bar)
            logged = always or in_bar or matches(figure, self._options.log)
            if logged or is_monitored(trainer, name):
                chosen[in_bar][name] = value
        if trainer.barebones:  # which forbids logging, see `SAMRefineCallback.setup`
            return
        for in_bar, values in chosen.items():
            self._module.log_dict(
                values,
                prog_bar=in_bar,
                add_dataloader_idx=False,
                # The processes hold equal values already; their maximum changes no bit. Without
                # sync_dist Lightning warns, key by key, that they might differ.
                sync_dist=True,
                reduce_fx="max",
            )
