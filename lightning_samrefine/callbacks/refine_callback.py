"""The Lightning callback: the hooks of validation and test, and what its arguments mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torchmetrics import Metric, MetricCollection
from typing_extensions import override

from lightning_samrefine.adapters.batch_adapter import AdapterFunction
from lightning_samrefine.adapters.scores import ScoresKind
from lightning_samrefine.adapters.target_values import (
    DEFAULT_IGNORE_INDEX,
    IgnoreIndex,
    parse_ignore_index,
)
from lightning_samrefine.callbacks.arguments import (
    SharedArguments,
    Thresholds,
    callbacks_of,
    check_different,
    parse_name,
    parse_patterns,
)
from lightning_samrefine.callbacks.base_callback import SAMCallback
from lightning_samrefine.callbacks.evaluation import Evaluation, EvaluationOptions
from lightning_samrefine.callbacks.logged_figures import (
    DEFAULT_LOG,
    DEFAULT_PROG_BAR,
    show_again,
)
from lightning_samrefine.callbacks.presenter import Presenter
from lightning_samrefine.callbacks.step_outputs import Prediction, parse_key
from lightning_samrefine.config import RefineConfig
from lightning_samrefine.fit.auto_fusion import FittedFusion
from lightning_samrefine.metrics.paired_metrics import parse_metrics
from lightning_samrefine.models import Promptable
from lightning_samrefine.refine.cache.embedding_cache import EmbeddingCache, make_cache
from lightning_samrefine.utils.validation import check_count

# What a resumed fit goes on with, by attribute.
_OF_A_FIT = ("history", "figures", "_history_start", "_validations")


class SAMRefineCallback(SAMCallback):
    """Refines every prediction of an evaluation with SAM and logs raw against refined figures.

    Logs in ``validate`` (alone and inside ``fit``) under ``val/`` and in ``test`` under ``test/``:
    ``miou_raw``, ``miou_refined``, ``miou_gain`` and its 95% interval ``miou_gain_low|high``,
    ``miou_gain_same_classes``, ``trimap_miou_*``, ``refine_accept_rate``, ``refine_ms_per_image``,
    ``refine_failed_images``, and what ``metrics`` and ``log`` add, see
    `lightning_samrefine.metrics.comparison.ComparisonResult.figures`. With ``refine="auto"`` also
    ``miou_without_sam``, the control, and after the fit the cross-validated ``fitted_gain*``. With
    several dataloaders every name ends in ``/dataloader_idx_<i>``, as Lightning's own do. The
    sanity check reads batches without SAM, and warns of monitored figures that may never be logged.

    The user's model is not run again and not changed; of the callback fitted weights and history
    go into checkpoints, and training sees the same random numbers as without the callback. If
    every image of a loader's first batch fails to be refined, the set-up is wrong and the first
    error is raised. An image that fails later keeps its raw prediction, with one warning per kind
    of failure, and is counted in ``refine_failed_images``.

    Args:
        sam: A name for `load_sam`, or a `Promptable`. SAM is moved to the Trainer's device for
            the run and freed (a `Promptable` of yours: moved back) after it.
        checkpoint: The weights: a file, None for those that are published (downloaded once), or
            the hub id or folder of ``"hf"``, see `load_sam`.
        num_classes: C ≥ 2; a one-channel binary model has 2. None takes it from ``class_names``,
            ``pl_module.num_classes`` or ``pl_module.hparams.num_classes`` (where 1 means binary).
        ignore_index: Target value that is not counted, or None. ``"auto"`` is 255, and refused
            if 255 is a class. Any other target outside [0, C) is an error.
        class_names: C names for ``iou_raw/<class>``; "0", "1", … if None.
        refine: ``"auto"`` fits the fusion to your labels: the first validation is refined by the
            preset ``"fast"``; at its end weights are fitted and cross-validated. From then on
            images are refined with weights that were not fitted to them, and nothing is refined, or
            not in some classes, where no gain is certain. The weights are used in test and by
            `SAMRefineWriter`, and written to ``fitted.yaml`` in the log folder. Else a preset's
            name, a `RefineConfig`, the path of a YAML file, or a mapping of fields that replace
            those of ``"auto"`` (or of the preset under the key ``"preset"``).
        precision: SAM's autocast, see `Refiner`; independent of the Trainer's precision.
        cache: Where SAM's image embeddings are kept: ``"memory"`` (of each process, inside
            ``fit``), ``"disk"`` (shared by runs), an `EmbeddingCache` of yours, or None.
        cache_gb: Its limit in 10⁹ bytes; None is 4 in memory and 20 on disk.
        every_n_epochs: Inside ``fit``, measure the first validation and every n-th after it, those
            inside an epoch counted one by one. For the others `ModelCheckpoint` (which then saves
            nothing with ``save_top_k=1``) and `EarlyStopping` see the last measured values again.
        max_batches: Measure the first n batches of each loader (of each process); None for all.
        trimap_width: Half-width in pixels of the band around borders.
        metrics: A torchmetrics `Metric` or `MetricCollection` of yours, for label maps: logged as
            ``<name>_raw``, ``<name>_refined`` and ``<name>_gain`` (positive if refined is better),
            see `lightning_samrefine.metrics.paired_metrics.PairedMetrics`.
        log: Names and glob patterns of the figures that are logged, such as ``"iou_refined/*"``,
            ``"all"`` for everything. Figures that a callback or scheduler monitors are logged, too.
        prog_bar: The same for the progress bar.
        add_to_outputs: A key such as ``"refined"`` under which refined label maps, (B, H, W) int64
            (a list if images differ in size), are added to the dict that a step returns, also in
            ``predict``. The sanity check adds raw ones; batches that are not measured get none.
        panels: Number of images drawn per evaluation, half of those that gained and half of those
            that lost the most, into ``panels/`` of the log folder and, with charts and a table of
            all images, into TensorBoard, W&B (with masks) and MLflow. 0 draws none.
        panels_every_n_epochs: Inside ``fit``, draw the first measured validation and every n-th.
        panels_width: Their width in pixels.
        report: Write a self-contained HTML page after every evaluation, and beside it
            ``images.csv``, a row for each image. True writes ``report.html`` in the log folder
            (``report-v1.html`` if another run has left one), a path replaces the file there.
        image_key: Where the image is in the batch, such as ``"image"``, ``"data.image"`` or
            ``"0"``; None searches, see docs/reading.md.
        target_key: Where the target is.
        scores_key: Where the scores are in what the step returned, or in the batch.
        scores_kind: ``"logits"``, ``"probs"``, ``"labels"``, or ``"auto"`` to decide by the values;
            ``"multilabel"`` for overlapping classes, each refined and measured on its own.
        group_key: Where the batch has each image's scene, patient or video, such as ``"scene"``:
            no image is refined with weights that were fitted to another one of its group. None
            for images that are not neighbors.
        image_mean: The mean of your Normalize transform, undone for SAM.
        image_std: Its deviation.
        image_range: ``"0-1"`` or ``"0-255"``, the range in which the two are given; None infers it.
        image_channels: Indices of the channels that become red, green and blue, or of one, such as
            ``(3, 2, 1)`` for Sentinel-2 and ``(2, 1, 0)`` for BGR.
        image_stretch: Percentiles of each image that become black and white, such as ``(2, 98)``,
            for images of any range.
        padding_key: Where the pad mask or the sizes (h, w) of images padded to one size are; the
            padding is cut off. None searches usual names, see docs/reading.md; False cuts nothing.
        slice_axis: Axis of volumes (B, C, D, H, W) whose slices SAM sees: 2, 3 or 4, such as 4 for
            MONAI's (B, C, H, W, D).
        adapter: A callable ``(batch, outputs, captured)`` that replaces the search and returns
            `lightning_samrefine.adapters.batch_adapter.RefineInputs`, or a mapping with ``image``,
            ``target`` and one of ``logits``, ``probs`` and ``labels``.
        name: Distinguishes the callbacks of one Trainer: with ``"fast"`` figures are
            ``val/fast/miou_refined``, files ``fast_…``. Letters, digits, ``_``, ``-`` and ``.``.
            Equal or missing ones raise Lightning's "Found more than one stateful callback".

    Attributes:
        history: Every figure, logged or not, one dict per evaluation and loader, with ``stage``,
            ``epoch``, ``step``, ``dataloader_idx``. A resumed fit goes on with its checkpoint's.
        figures: Those of the last evaluation of each stage, by their whole names; likewise.

    Raises:
        MisconfigurationException: No number of classes, or one that contradicts ``class_names``;
            in ``setup``, names that differ in case alone, or a Trainer of pytorch_lightning.
        TypeError: An argument of a wrong type.
        ValueError: An argument outside its range, or a batch in which something is missing.
        FileNotFoundError: In ``setup``, no checkpoint, or none that could be downloaded.
    """

    _FAILURES: ClassVar[str] = "refine_failed_images"
    _OF_A_RUN: ClassVar[tuple[str, ...]] = ("_attached", "_evaluation", "_stage")

    def __init__(
        self,
        sam: str | Promptable = "vit_t",
        checkpoint: str | Path | None = None,
        num_classes: int | None = None,
        ignore_index: IgnoreIndex = "auto",
        class_names: Sequence[str] | None = None,
        refine: Thresholds = "auto",
        precision: str = "auto",
        cache: Literal["memory", "disk"] | EmbeddingCache | None = "memory",
        cache_gb: float | None = None,
        every_n_epochs: int = 1,
        max_batches: int | None = None,
        trimap_width: int = 3,
        metrics: Metric | MetricCollection | None = None,
        log: Literal["all"] | Sequence[str] = DEFAULT_LOG,
        prog_bar: Literal["all"] | Sequence[str] = DEFAULT_PROG_BAR,
        add_to_outputs: str | None = None,
        panels: int = 0,
        panels_every_n_epochs: int = 1,
        panels_width: int = 1600,
        report: bool | str | Path = False,
        image_key: str | None = None,
        target_key: str | None = None,
        scores_key: str | None = None,
        scores_kind: ScoresKind = "auto",
        image_mean: Sequence[float] | float | None = None,
        image_std: Sequence[float] | float | None = None,
        image_range: Literal["0-255", "0-1"] | None = None,
        image_channels: Sequence[int] | None = None,
        image_stretch: tuple[float, float] | None = None,
        padding_key: str | Literal[False] | None = None,
        slice_axis: int = 2,
        adapter: AdapterFunction | None = None,
        name: str | None = None,
        group_key: str | None = None,
    ) -> None:
        super().__init__(
            SharedArguments.of(
                sam=sam,
                checkpoint=checkpoint,
                num_classes=num_classes,
                class_names=class_names,
                refine=refine,
                precision=precision,
                image_key=image_key,
                target_key=target_key,
                scores_key=scores_key,
                scores_kind=scores_kind,
                image_mean=image_mean,
                image_std=image_std,
                image_range=image_range,
                image_channels=image_channels,
                image_stretch=image_stretch,
                padding_key=padding_key,
                slice_axis=slice_axis,
                adapter=adapter,
                group_key=group_key,
            )
        )
        make_cache(cache, cache_gb)  # refuses what it cannot make
        self.cache = cache
        self.cache_gb = cache_gb
        self.every_n_epochs = check_count("every_n_epochs", every_n_epochs)
        self.max_batches = None if max_batches is None else check_count("max_batches", max_batches)
        self.trimap_width = check_count("trimap_width", trimap_width)
        self.metrics = parse_metrics(metrics)
        self.log_patterns = parse_patterns("log", log)  # Lightning sets an attribute `log`
        self.prog_bar = parse_patterns("prog_bar", prog_bar)
        self.add_to_outputs = parse_key(add_to_outputs)
        # "auto" is settled against the classes when these are known, see `TargetCheck`.
        self._ignore_index = ignored = parse_ignore_index(ignore_index)
        self.ignore_index = DEFAULT_IGNORE_INDEX if ignored == "auto" else ignored
        self.name = parse_name(name)
        self.presenter = Presenter(panels, panels_every_n_epochs, panels_width, report, self.name)
        self.history: list[dict[str, Any]] = []
        self.figures: dict[str, float] = {}
        self._fitted: FittedFusion | None = None
        self._evaluation: Evaluation | Prediction | None = None
        self._stage: str | None = None
        # Of the running fit: finished validations, and where its part of the history begins.
        self._validations, self._history_start = 0, 0

    @property
    @override
    def state_key(self) -> str:
        return super().state_key if self.name is None else self._generate_state_key(name=self.name)

    @property
    def fitted_config(self) -> RefineConfig | None:
        """The thresholds with the weights that ``refine="auto"`` fitted, None before it has.

        `lightning_samrefine.config_files.write_refine` writes them to a file for ``refine=``.
        """
        fitted = self._fitted
        return None if fitted is None else replace(self.refine_config, weights=fitted.final)

    @override
    def state_dict(self) -> dict[str, Any]:
        fit = {name: getattr(self, name) for name in _OF_A_FIT} if self.history else {}
        return fit if self._fitted is None else {**fit, "fitted": self._fitted.to_mapping()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if "history" in state_dict and self._stage in (None, "fit"):  # not of a test's checkpoint
            vars(self).update({name: state_dict[name] for name in _OF_A_FIT})
        if "fitted" in state_dict:
            self._fitted = FittedFusion.from_mapping(state_dict["fitted"])
            if self._attached is not None:
                self._attached.resume(self._fitted)

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "presenter": self.presenter.emptied()}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        predicts = stage == "predict"
        if predicts and self.add_to_outputs is None:
            rank_zero_info(
                "SAMRefineCallback refines nothing in predict without add_to_outputs (such as "
                "'refined'); SAMRefineWriter writes refined predictions to files"
            )
            return
        check_different(callbacks_of(trainer, SAMRefineCallback))
        if trainer.barebones:
            rank_zero_warn(
                "SAMRefineCallback: Trainer(barebones=True) logs nothing; history has the figures"
            )
        # Without a second epoch nothing is read again from memory.
        once = self.cache == "memory" and stage != "fit"
        cache = None if once else make_cache(self.cache, self.cache_gb)
        self._attach(trainer, cache, self._ignore_index, self._fitted, needs_target=not predicts)
        self._stage = stage
        if stage == "fit":  # here, for a checkpoint is loaded before or after on_fit_start
            self._validations, self._history_start = 0, len(self.history)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._run_state.bind(pl_module)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        fitting = trainer.state.fn == TrainerFn.FITTING
        due = not fitting or self._validations % self.every_n_epochs == 0
        if due or trainer.sanity_checking:
            draws, fits = self.presenter.draws(trainer, self._validations), not trainer.testing
            self._evaluation = Evaluation(
                trainer, pl_module, self._run_state, self._options, self.presenter, draws, fits
            )

    @override
    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._evaluation is not None:
            self._evaluation.arm(batch, batch_idx, dataloader_idx)

    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._evaluation is not None:
            self._evaluation.take(trainer, batch, outputs, batch_idx, dataloader_idx)

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.add_to_outputs is not None:
            self._evaluation = Prediction(pl_module, self._run_state, self.add_to_outputs)

    on_test_start = on_validation_start
    on_test_batch_start = on_predict_batch_start = on_validation_batch_start
    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._finish(trainer, "val")
            self._validations += 1
        elif isinstance(self._evaluation, Evaluation):
            self._evaluation.check_figures(trainer)
        self._end_evaluation()

    @override
    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish(trainer, "test")
        self._end_evaluation()

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._release()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()

    @property
    def _options(self) -> EvaluationOptions:
        return EvaluationOptions(
            ignore_index=self.ignore_index,
            trimap_width=self.trimap_width,
            max_batches=self.max_batches,
            class_names=self.class_names,
            name=self.name,
            refine=self.refine_config,
            metrics=self.metrics,
            log=self.log_patterns,
            prog_bar=self.prog_bar,
            add_to_outputs=self.add_to_outputs,
        )

    def _finish(self, trainer: Trainer, stage: str) -> None:
        if not isinstance(self._evaluation, Evaluation):
            show_again(trainer, self.figures)
            return
        self.history = self.history + self._evaluation.finish(trainer, stage)
        others = {k: v for k, v in self.figures.items() if not k.startswith(f"{stage}/")}
        self.figures = others | self._evaluation.figures
        self._evaluation.present(trainer, self.history[self._history_start :])
        if self._run_state.auto is not None:
            self._fitted = self._run_state.auto.fitted
            self.presenter.write_fitted(trainer, self.fitted_config)

    def _end_evaluation(self) -> None:
        if self._evaluation is not None:
            self._evaluation.close()
            self._evaluation = None

    @override
    def _release(self) -> None:
        self._end_evaluation()
        self._stage = None
        super()._release()
