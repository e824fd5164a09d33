"""The Lightning callback: hooks only, from an evaluation's batches to its logged figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from typing_extensions import override

from lightning_samrefine.adapters.batch_adapter import BatchAdapter, RefineInputs
from lightning_samrefine.adapters.denormalize import Denormalize
from lightning_samrefine.adapters.forward_hooks import ScoresCapture
from lightning_samrefine.adapters.nested import batch_size
from lightning_samrefine.adapters.targets import (
    DEFAULT_IGNORE_INDEX,
    IgnoreIndex,
    parse_ignore_index,
)
from lightning_samrefine.callbacks.arguments import (
    check_sam,
    check_trainer,
    parse_class_names,
    parse_name,
    parse_num_classes,
    parse_refine,
)
from lightning_samrefine.callbacks.evaluation import LoaderEvaluation
from lightning_samrefine.callbacks.monitors import warn_monitors, warn_unscored
from lightning_samrefine.callbacks.presenter import (
    Evaluated,
    Presenter,
    batch_label,
    logged_step,
    sample_names,
)
from lightning_samrefine.callbacks.real_samples import evaluation_dataloaders
from lightning_samrefine.callbacks.run_state import RunState
from lightning_samrefine.config import RefineConfig
from lightning_samrefine.metrics.comparison import RefinementComparison
from lightning_samrefine.models import Promptable
from lightning_samrefine.refine.cache.embedding_cache import EmbeddingCache, make_cache
from lightning_samrefine.reporting.loggers import safe_names
from lightning_samrefine.utils.validation import check_count

_STAGES = ("fit", "validate", "test")


@dataclass
class _Evaluation:
    """One pass over the validation or test loaders, with one entry per loader."""

    capture: ScoresCapture
    loaders: list[LoaderEvaluation]


class SAMRefineCallback(Callback):
    """Refines every prediction of an evaluation with SAM and logs raw against refined figures.

    Logs in ``validate`` (alone and inside ``fit``) under ``val/`` and in ``test`` under ``test/``:
    ``miou_raw``, ``miou_refined``, ``miou_gain`` and its 95% interval ``miou_gain_low|high``,
    ``iou_raw/<class>``, ``iou_refined/<class>``, ``trimap_miou_*``, ``boundary_iou_*``,
    ``refine_fixed_px``, ``refine_broken_px``, ``refine_accept_rate``, ``refine_ms_per_image`` and
    more, see `lightning_samrefine.metrics.comparison.ComparisonResult.figures`. With several
    dataloaders every name ends in ``/dataloader_idx_<i>``, as Lightning's own do. The sanity check
    reads batches without SAM, and warns of monitored figures that may never be logged.

    The user's model is not run again and not changed; nothing goes into checkpoints, and training
    sees the same random numbers as without the callback. Where every image of a loader's first
    batch fails to be refined, the set-up is wrong and the first error is raised. An image that
    fails later keeps its raw prediction, with one warning a kind of failure, and is counted in
    ``refine_failed_images``.

    Args:
        sam: A name for `load_sam`, or a `Promptable`. SAM is moved to the Trainer's device for
            the run and freed (a `Promptable` of yours: moved back) after it.
        checkpoint: The weights: a file, None for those that are published (downloaded once), or
            the hub id or folder of ``"hf"``, see `load_sam`.
        num_classes: C ≥ 2; a one-channel binary model has 2. None takes it from ``class_names``,
            ``pl_module.num_classes`` or ``pl_module.hparams.num_classes`` (where 1 means binary).
        ignore_index: Target value that is not counted, or None. ``"auto"`` is 255, and refused
            where 255 is a class. Any other target outside [0, C) is an error.
        class_names: C names for ``iou_raw/<class>``; "0", "1", … where None.
        refine: Thresholds: a `RefineConfig`, a preset's name, the path of a YAML file such as
            ``tuned.yaml``, or a mapping of fields that replace those of ``"default"`` (or of the
            preset under the key ``"preset"``).
        precision: SAM's autocast, see `Refiner`; independent of the Trainer's precision.
        cache: Where SAM's image embeddings are kept, so that the validation images of the next
            epoch are not encoded again: ``"memory"`` (of each process, inside ``fit``),
            ``"disk"`` (a folder that processes and later runs share, see `EmbeddingCache`), an
            `EmbeddingCache` of yours, or None.
        cache_gb: Its limit in 10⁹ bytes; None is 4 in memory and 20 on disk.
        every_n_epochs: Inside ``fit``, measure the first validation and every n-th after it, those
            inside an epoch counted one by one. Nothing is logged for the others, where Lightning
            shows the last measured values to `ModelCheckpoint` and `EarlyStopping`: with the
            default ``save_top_k=1`` an equal value saves nothing, with more the weights of a
            skipped validation may be saved under the last measured value; ``patience`` counts
            skipped validations, too.
        max_batches: Measure the first n batches of each loader (of each process), raw and refined
            alike; None for all.
        trimap_width: Half-width in pixels of the band around borders.
        panels: So many images an evaluation, those that gained and those that lost the most, are
            drawn as image | raw | refined | truth | changed pixels, with every region's box and
            predicted IoU: into ``panels/`` of the Trainer's log folder, and into TensorBoard, W&B
            and MLflow, along with charts of classes and of predicted IoU. 0 draws none.
        panels_every_n_epochs: Inside ``fit``, draw the first validation and every n-th after it, of
            those that are measured. Pictures are filed under the step of Lightning's figures.
        panels_width: Width of the panels in pixels.
        report: Write a self-contained page to look at after every evaluation: ``report.html`` in
            the log folder where True (``report-v1.html`` where another run has left one), or the
            path given, which is replaced. ``Trainer(fast_dev_run=True)`` writes neither panels nor
            report.
        image_key: Where the image is in the batch, such as ``"image"``, ``"data.image"`` or
            ``"0"``; None searches, see `lightning_samrefine.adapters.batch_adapter.BatchAdapter`.
        target_key: Where the target is.
        scores_key: Where the scores are in what the step returned, or in the batch.
        scores_kind: ``"logits"``, ``"probs"``, ``"labels"``, or ``"auto"`` to tell by values.
        image_mean: The mean of your Normalize transform, undone for SAM.
        image_std: Its deviation.
        image_range: ``"0-1"`` or ``"0-255"``, the range before it; None guesses.
        adapter: A callable ``(batch, outputs, captured)`` that replaces the search and returns
            `lightning_samrefine.adapters.batch_adapter.RefineInputs`, or a mapping with ``image``,
            ``target`` and one of ``logits``, ``probs`` and ``labels``.
        name: Tells the callbacks of one Trainer apart, such as ``"fast"`` beside one with the
            preset ``"default"``: figures are ``val/fast/miou_refined``, panels and the report of
            the log folder begin with ``fast_``. Letters, digits, ``_``, ``-`` and ``.``.

    Attributes:
        history: What was logged (under ``Trainer(barebones=True)``, which forbids logging, what
            would have been), one dict an evaluation and loader: ``stage``, ``epoch``, ``step`` (as
            loggers count), ``dataloader_idx``, and the names above without their prefix; also what
            is not logged, see `lightning_samrefine.metrics.comparison.ComparisonResult.details`.

    Raises:
        MisconfigurationException: No number of classes, or one that contradicts ``class_names``;
            in ``setup``, two callbacks of one name in one Trainer, or a Trainer of
            pytorch_lightning instead of lightning.pytorch.
        TypeError: An argument of a wrong type.
        ValueError: An argument outside its range, or a batch in which something is missing.
        FileNotFoundError: No checkpoint at that path, or none that could be downloaded, in
            ``setup``.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> from lightning_samrefine import SAMRefineCallback
        >>> callback = SAMRefineCallback("vit_t", "mobile_sam.pt", num_classes=11)
        >>> trainer = Trainer(callbacks=[callback])
    """

    def __init__(
        self,
        sam: str | Promptable = "vit_t",
        checkpoint: str | Path | None = None,
        num_classes: int | None = None,
        ignore_index: IgnoreIndex = "auto",
        class_names: Sequence[str] | None = None,
        refine: Mapping[str, Any] | RefineConfig | str = "default",
        precision: str = "auto",
        cache: Literal["memory", "disk"] | EmbeddingCache | None = "memory",
        cache_gb: float | None = None,
        every_n_epochs: int = 1,
        max_batches: int | None = None,
        trimap_width: int = 3,
        panels: int = 0,
        panels_every_n_epochs: int = 1,
        panels_width: int = 1600,
        report: bool | str | Path = False,
        image_key: str | None = None,
        target_key: str | None = None,
        scores_key: str | None = None,
        scores_kind: Literal["auto", "logits", "probs", "labels"] = "auto",
        image_mean: Sequence[float] | float | None = None,
        image_std: Sequence[float] | float | None = None,
        image_range: Literal["0-255", "0-1"] | None = None,
        adapter: Callable[..., Any] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__()
        check_sam(sam, checkpoint, precision)
        make_cache(cache, cache_gb)  # refuses what it cannot make
        every_n_epochs = check_count("every_n_epochs", every_n_epochs)
        trimap_width = check_count("trimap_width", trimap_width)
        if max_batches is not None:
            max_batches = check_count("max_batches", max_batches)
        ignore_index = parse_ignore_index(ignore_index)
        self.sam = sam
        self.checkpoint = checkpoint
        self.class_names = parse_class_names(class_names)
        self.num_classes = parse_num_classes(num_classes, self.class_names)
        # "auto" is settled against the classes when these are known, see `TargetCheck`.
        self.ignore_index = DEFAULT_IGNORE_INDEX if ignore_index == "auto" else ignore_index
        self._ignore_index = ignore_index
        self.refine_config = parse_refine(refine)
        self.precision = precision
        self.cache = cache
        self.cache_gb = cache_gb
        self.every_n_epochs = every_n_epochs
        self.max_batches = max_batches
        self.trimap_width = trimap_width
        self.name = parse_name(name)
        self.presenter = Presenter(panels, panels_every_n_epochs, panels_width, report, self.name)
        self.history: list[dict[str, Any]] = []
        self.adapter = BatchAdapter(
            image_key=image_key,
            target_key=target_key,
            scores_key=scores_key,
            scores_kind=scores_kind,
            rgb=Denormalize(image_mean, image_std, image_range),
            function=adapter,
        )
        self._attached: RunState | None = None
        self._evaluation: _Evaluation | None = None
        # Of the running fit: finished validations, and where its part of the history begins.
        self._validations = 0
        self._history_start = 0

    @property
    @override
    def state_key(self) -> str:
        return super().state_key if self.name is None else self._generate_state_key(name=self.name)

    def __getstate__(self) -> dict[str, Any]:
        # Lightning binds the module's log to the callback: pickling it would drag the module along.
        state = {key: value for key, value in vars(self).items() if key not in ("log", "log_dict")}
        return {
            **state,
            "_attached": None,
            "_evaluation": None,
            "presenter": self.presenter.emptied(),
        }

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage not in _STAGES:
            return
        check_trainer(type(self).__name__, trainer)
        self._release()
        _check_different(trainer)
        if trainer.barebones:
            rank_zero_warn(
                "SAMRefineCallback: Trainer(barebones=True) logs nothing; the figures are in the "
                "callback's history alone"
            )
        # Without a second epoch nothing in memory would be asked for again.
        once = self.cache == "memory" and stage != "fit"
        self._attached = RunState(
            type(self).__name__,
            "refine_failed_images",
            self.sam,
            self.checkpoint,
            self.refine_config,
            self.precision,
            trainer.strategy.root_device,
            None if once else make_cache(self.cache, self.cache_gb),
            self._ignore_index,
        )

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._run_state.bind(self.adapter, self.num_classes, pl_module, self.class_names)
        self._validations = 0
        self._history_start = len(self.history)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The sanity check rehearses the reading of batches, so that a wrong set-up is reported
        # before an epoch was trained; SAM has no part in it.
        if trainer.sanity_checking or self._is_due(trainer):
            self._start(trainer, pl_module)

    @override
    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._evaluation is not None and self._is_measured(batch_idx):
            self._evaluation.capture.arm(batch, dataloader_idx)

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
        evaluation = self._evaluation
        if evaluation is None or not self._is_measured(batch_idx):
            return
        inputs = self._run_state.read(
            batch,
            outputs,
            evaluation.capture,
            dataloader_idx,
            len(evaluation.loaders),
            self.ignore_index,
        )
        if self._run_state.is_left_out(dataloader_idx):
            return
        if trainer.sanity_checking:
            self._rehearse(evaluation.loaders[dataloader_idx], inputs)
        else:
            label = batch_label(trainer, batch_idx)
            self._take(evaluation.loaders[dataloader_idx], inputs, batch, label, dataloader_idx)

    on_test_start = on_validation_start
    on_test_batch_start = on_validation_batch_start
    on_test_batch_end = on_validation_batch_end

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            self._check_figures(trainer)
        else:
            self._report(trainer, "val")
            self._validations += 1
        self._end_evaluation()

    @override
    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._report(trainer, "test")
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
    def _run_state(self) -> RunState:
        if self._attached is None:
            raise MisconfigurationException(
                "SAMRefineCallback: SAM is not loaded; the Trainer calls setup before any "
                "evaluation, and so must whoever calls the hooks without one"
            )
        return self._attached

    def _is_due(self, trainer: Trainer) -> bool:
        fitting = trainer.state.fn == TrainerFn.FITTING
        return not fitting or self._validations % self.every_n_epochs == 0

    def _is_measured(self, batch_idx: int) -> bool:
        return self.max_batches is None or batch_idx < self.max_batches

    def _start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        adapter = self._run_state.bind(self.adapter, self.num_classes, pl_module, self.class_names)
        self._run_state.refiner.refiner.recheck_weights()
        num_classes = adapter.num_classes
        device = trainer.strategy.root_device
        names = safe_names(self.class_names or map(str, range(num_classes)), trainer.loggers)
        panels = self.presenter.panels if self.presenter.draws(trainer, self._validations) else 0
        self._evaluation = _Evaluation(
            ScoresCapture(pl_module, num_classes),
            # New ones each time: metric states from an epoch under inference_mode could not be
            # updated in a later one under no_grad.
            [
                LoaderEvaluation(
                    loader,
                    RefinementComparison(
                        num_classes, self.ignore_index, names, self.trimap_width
                    ).to(device),
                    panels,
                    self.presenter.gallery(trainer, num_classes, self.ignore_index),
                )
                for loader in evaluation_dataloaders(trainer)
            ],
        )

    def _take(
        self,
        loader: LoaderEvaluation,
        inputs: RefineInputs | None,
        batch: Any,
        label: str,
        dataloader_idx: int,
    ) -> None:
        """Refine and compare a batch; None for one that could not be read."""
        if inputs is None:
            loader.lose(batch_size(batch))
            return
        inputs = loader.real(inputs)
        if len(inputs) > 0:
            names = sample_names(batch, len(inputs), label)
            loader.add(inputs, *self._run_state.refiner(inputs, dataloader_idx), names)

    def _rehearse(self, loader: LoaderEvaluation, inputs: RefineInputs | None) -> None:
        """Count the targets of the sanity check, with raw predictions alone."""
        if inputs is None:
            return
        inputs = loader.real(inputs)
        loader.comparison.counts.update(images=len(inputs))
        for labels, target in zip(inputs.labels, inputs.targets, strict=True):
            loader.comparison.update(labels, labels, target)

    def _check_figures(self, trainer: Trainer) -> None:
        """Warn of figures that may never come, before an epoch is trained. A collective call."""
        loaders = [] if self._evaluation is None else self._evaluation.loaders
        results = [loader.comparison.result() for loader in loaders]
        for result in results:
            warn_unscored(result, "of the sanity check")
        warn_monitors(trainer, "val" if self.name is None else f"val/{self.name}", results)

    def _report(self, trainer: Trainer, stage: str) -> None:
        """Log the figures of every loader, remember them, and show what they come from."""
        loaders = [] if self._evaluation is None else self._evaluation.loaders
        if loaders:
            self._run_state.end_pass()
        if loaders and (cache := self._run_state.refiner.refiner.cache) is not None:
            cache.end_epoch(stage)
        evaluated: list[Evaluated] = []
        for index, loader in enumerate(loaders):
            result = loader.comparison.result()  # a collective call, also of a loader left out
            if result.counts[0] == 0 and len(loaders) > 1:
                continue
            figures = result.figures()
            warn_unscored(result, "of this evaluation")
            suffix = f"/dataloader_idx_{index}" if len(loaders) > 1 else ""
            prefix = stage if self.name is None else f"{stage}/{self.name}"
            if not trainer.barebones:  # which forbids to log, see `setup`
                self.log_dict(
                    {f"{prefix}/{key}{suffix}": value for key, value in figures.items()},
                    add_dataloader_idx=False,
                    # The processes hold equal values already, of which the maximum changes no bit;
                    # without sync_dist Lightning warns, key by key, that they might differ.
                    sync_dist=True,
                    reduce_fx="max",
                )
            where = {"stage": stage, "epoch": trainer.current_epoch, "step": logged_step(trainer)}
            where["dataloader_idx"] = index
            self.history.append({**where, **figures, **result.details()})
            if self.class_names is not None:  # in pictures they are what the user wrote
                result = replace(result, class_names=tuple(self.class_names))
            evaluated.append(Evaluated(stage, index, suffix, loader, result))
        if evaluated:
            sam = self._run_state.refiner.refiner.sam
            about = {"SAM": f"{sam.name} on {sam.device}", "ignore_index": str(self.ignore_index)}
            if self.name is not None:
                about["name"] = self.name
            draws = self.presenter.draws(trainer, self._validations)
            history = self.history[self._history_start :]
            self.presenter.present(trainer, evaluated, draws, history, self.refine_config, about)

    def _end_evaluation(self) -> None:
        if self._evaluation is not None:
            self._evaluation.capture.remove()
            self._evaluation = None

    def _release(self) -> None:
        self._end_evaluation()
        if self._attached is not None:
            self._attached.release()
            self._attached = None


def _check_different(trainer: Trainer) -> None:
    """Refuse callbacks that would overwrite each other's figures, panels or report.

    Raises:
        MisconfigurationException: Two of one name, or with one report.
    """
    found = [part for part in trainer.callbacks if isinstance(part, SAMRefineCallback)]
    # Some file systems do not tell upper from lower case.
    names = [None if part.name is None else part.name.casefold() for part in found]
    for part, name in zip(found, names, strict=True):
        if names.count(name) > 1:
            raise MisconfigurationException(
                f"SAMRefineCallback: name must differ between the {len(found)} callbacks of one "
                f"Trainer, got {part.name!r} more than once; figures are logged under it, as in "
                "SAMRefineCallback(name='fast')"
            )
    reports = [part.presenter.report for part in found]
    for report in reports:
        if isinstance(report, Path) and reports.count(report) > 1:
            raise MisconfigurationException(
                f"SAMRefineCallback: report must differ between the callbacks of one Trainer, got "
                f"{str(report)!r} more than once"
            )
