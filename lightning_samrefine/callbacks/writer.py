"""The prediction writer: refined label maps of a predict run, in a folder that survives kills."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from typing_extensions import override

from lightning_samrefine.adapters.batch_adapter import AdapterFunction
from lightning_samrefine.adapters.forward_hooks import ScoresCapture
from lightning_samrefine.adapters.nested import batch_size
from lightning_samrefine.adapters.sample_names import find_stems, known_stems
from lightning_samrefine.adapters.scores import ScoresKind
from lightning_samrefine.callbacks.arguments import SharedArguments, Thresholds, fitted_config
from lightning_samrefine.callbacks.base_callback import SAMCallback
from lightning_samrefine.callbacks.collective import Together, warn_on_this_process
from lightning_samrefine.models import Promptable
from lightning_samrefine.predictions.encoding import MAX_CLASSES, PROBS_KINDS, ProbsKind
from lightning_samrefine.predictions.fingerprints import Fingerprint
from lightning_samrefine.predictions.folder_lock import FolderLock
from lightning_samrefine.predictions.provenance import Provenance
from lightning_samrefine.predictions.run import PredictCounts, PredictionRun
from lightning_samrefine.predictions.store import Finished, OutputFolder, Spellings
from lightning_samrefine.utils.precision import autocast_dtype
from lightning_samrefine.utils.validation import check_count

_NAME = "SAMRefineWriter"


@dataclass
class _Writing:
    """What a prediction holds from its start to its end."""

    capture: ScoresCapture
    provenance: Provenance
    generation: int
    run: PredictionRun


class SAMRefineWriter(SAMCallback, BasePredictionWriter):
    """Refines the predictions of ``Trainer.predict`` with SAM and writes them to a folder.

    For each image a label map ``labels/<stem>.png`` (palette indices up to 255 classes, 16-bit
    above; 255 or 65,535 if the prediction is none of the classes), ``probs/<stem>.safetensors``
    if wanted, and a row of ``manifest.parquet``: stem, size, regions, SAM's predicted IoUs,
    checksums of the files, hashes of thresholds and weights. ``run.json`` holds the settings.

    The run may be killed at any moment. Started again, with any number of processes, it keeps
    complete files (by size and checksum) and writes those that are missing, damaged, or of a
    changed image or raw prediction. It ends with the same bytes as an uninterrupted run, if the
    bits of segmenter and SAM do not depend on the other images of a batch. (On a GPU set
    ``max_prompts_per_batch``, or prompts on the images of a batch are decoded together.) Results of
    other thresholds, weights or settings are refused, and so are a second run while one writes to
    the folder, and a second image of one name.

    A thread writes the files; if the disk is slower than SAM, SAM waits. Call
    ``trainer.predict(..., return_predictions=False)``, or Lightning keeps all predictions in
    memory. Several processes need a folder that all of them see.

    Args:
        folder: New, empty, or one of an earlier run.
        sam: A name for `load_sam`, or a `Promptable`.
        checkpoint: The weights' file, see `load_sam`.
        num_classes: C ≥ 2, as for `SAMRefineCallback`.
        class_names: C names, for their number and to compare with those of tuned thresholds.
        refine: As for `SAMRefineCallback`. ``"auto"`` uses the weights that the Trainer's
            `SAMRefineCallback` has fitted; without one, the preset ``"fast"``.
        precision: SAM's autocast, see `Refiner`.
        probs: ``"uint8"`` (255 means 1) or ``"float16"`` writes the refined probabilities,
            (C, H, W) under the name ``probs``, see `Refinement.probs`. None writes none.
        overwrite: Whether results that another run left in the folder with other settings are
            removed. Results of the same settings are kept.
        queue_size: Maximum number of images waiting to be written.
        stem_key: Where the images' names are in the batch, see `find_stems`. None looks under the
            usual names (``name``, ``path``, ``image_id``, …), else takes the number in the data
            set. With several dataloaders names begin with the loader's number and "/".
        image_key: As for `SAMRefineCallback`, like all that follow.
        scores_key: Where the scores are.
        scores_kind: The kind of scores.
        image_mean: The mean of your Normalize transform.
        image_std: Its deviation.
        image_range: The range in which they are given.
        image_channels: The channels that become RGB.
        image_stretch: The percentiles that become black and white.
        padding_key: Where the pad mask or the sizes of padded images are.
        slice_axis: The axis along which volumes are sliced.
        adapter: Replaces the search for image and scores; no target is needed.

    Attributes:
        counts: This process's images by outcome, a `PredictCounts`.

    Raises:
        MisconfigurationException: No number of classes, a Trainer of pytorch_lightning, or a
            folder that holds something else or results of other settings, or that another run is
            writing to.
        ModuleNotFoundError: pyarrow is missing; the extra ``predict`` brings it.
        TypeError: An argument of a wrong type.
        ValueError: An argument outside its range, a batch in which something is missing, one name
            for different images, or one that no file can have.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> from lightning_samrefine import SAMRefineWriter
        >>> writer = SAMRefineWriter("pseudo", "vit_t", "mobile_sam.pt", num_classes=11)
        >>> trainer = Trainer(callbacks=[writer])
    """

    _FAILURES: ClassVar[str] = "counts.failed"
    _OF_A_RUN: ClassVar[tuple[str, ...]] = ("_attached", "_writing", "_lock")

    def __init__(
        self,
        folder: str | Path,
        sam: str | Promptable = "vit_t",
        checkpoint: str | Path | None = None,
        num_classes: int | None = None,
        class_names: Sequence[str] | None = None,
        refine: Thresholds = "auto",
        precision: str = "auto",
        probs: ProbsKind | None = None,
        overwrite: bool = False,
        queue_size: int = 8,
        stem_key: str | None = None,
        image_key: str | None = None,
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
    ) -> None:
        shared = SharedArguments.of(
            sam=sam,
            checkpoint=checkpoint,
            num_classes=num_classes,
            class_names=class_names,
            refine=refine,
            precision=precision,
            image_key=image_key,
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
            needs_target=False,
        )
        super().__init__(shared)
        self._given = shared
        check_count("queue_size", queue_size)
        if probs is not None and probs not in PROBS_KINDS:
            raise ValueError(
                f"probs must be {', '.join(map(repr, PROBS_KINDS))} or None, got {probs!r}"
            )
        if stem_key is not None and not isinstance(stem_key, str):
            raise TypeError(f"stem_key must be a string or None, got {stem_key!r}")
        if shared.num_classes is not None and shared.num_classes > MAX_CLASSES:
            raise ValueError(
                f"num_classes must be at most {MAX_CLASSES}, the values of a 16-bit PNG but the "
                f"one for unknown pixels, got {shared.num_classes}"
            )
        self.folder = Path(folder)
        self.probs = probs
        self.overwrite = overwrite
        self.queue_size = queue_size
        self.stem_key = stem_key
        self.counts = PredictCounts()
        self._files = OutputFolder(self.folder)
        self._lock: FolderLock | None = None
        self._writing: _Writing | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "predict":
            return
        super().setup(trainer, pl_module, stage)
        self._release()
        try:
            self._files.check()
        except ValueError as error:
            raise MisconfigurationException(f"{_NAME}: {error}") from error
        self._attach(trainer, with_probs=self.probs is not None)

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Here, for Lightning loads checkpoints after setup.
        if self._given.refine.weights == "auto":
            self.shared = replace(self._given, refine=fitted_config(trainer, self._given.refine))
            self._run_state.refine_with(self._run_state.sam, self.refine_config)
        self._run_state.bind(pl_module)
        num_classes = self._run_state.num_classes
        if trainer.predict_loop.return_predictions:
            rank_zero_warn(
                f"{_NAME}: Lightning keeps every prediction in memory; "
                "trainer.predict(..., return_predictions=False) does not"
            )
        self.counts = PredictCounts()
        with Together(_NAME, trainer, MisconfigurationException):
            provenance = self._provenance(pl_module)
            generation = self._prepare(trainer, provenance) if trainer.is_global_zero else 0
        generation = trainer.strategy.broadcast(generation)
        with Together(_NAME, trainer, MisconfigurationException):
            if not trainer.is_global_zero:
                self._lock = FolderLock(self._files.locks)
                self._lock.acquire(trainer.global_rank)
            self._writing = _Writing(
                capture=ScoresCapture(pl_module, num_classes),
                provenance=provenance,
                generation=generation,
                run=PredictionRun(
                    self._files,
                    generation,
                    trainer.global_rank,
                    self.probs,
                    self.queue_size,
                    self.counts,
                ),
            )

    @override
    def on_predict_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._writing is not None:
            self._writing.capture.arm(batch, dataloader_idx)

    @override
    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        state, writing = self._run_state, self._writing
        assert writing is not None  # on_predict_start comes before any batch
        inputs = state.read(batch, prediction, writing.capture, dataloader_idx)
        if inputs is None:
            self.counts.unread += batch_size(batch)
            return
        images = len(inputs) // len(inputs.parts)
        stems = inputs.named(find_stems(batch, images, self.stem_key, batch_indices), "/")
        if trainer.predict_loop.num_dataloaders > 1:
            stems = [f"{dataloader_idx}/{stem}" for stem in stems]
        samples = zip(inputs.images, inputs.labels, inputs.probs, strict=True)
        found = [Fingerprint.of(*sample) for sample in samples]
        missing = [
            index
            for index, named in enumerate(zip(stems, found, strict=True))
            if not writing.run.is_done(*named)
        ]
        if len(missing) < len(stems):
            state.trust(dataloader_idx)
        if not missing:
            return
        wanted = inputs.take(missing)
        refinements, _ = state.refine(wanted, dataloader_idx)
        for position, (index, refinement) in enumerate(zip(missing, refinements, strict=True)):
            writing.run.write(stems[index], found[index], wanted, position, refinement)

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        # What is refined already is written; a failing disk is the exception itself.
        try:
            self._close()
        except Exception as error:
            warn_on_this_process(f"{_NAME}: {error}")
        finally:
            self._release()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Here, for the loop's own last hook is left out on a process without a batch.
        try:
            if stage == "predict":
                self._finish(trainer)
        finally:
            self._release()

    def _provenance(self, pl_module: LightningModule) -> Provenance:
        state, adapter = self._run_state, self.shared.adapter
        rgb, precision = adapter.rgb, self.shared.precision
        return Provenance.of(
            self.refine_config,
            state.sam,
            str(autocast_dtype(precision, state.sam.device) or torch.float32),
            pl_module,
            {
                "num_classes": state.num_classes,
                "probs": self.probs,
                "image_key": adapter.image_key,
                "scores_key": adapter.scores_key,
                "scores_kind": adapter.scores_kind,
                "image_mean": rgb.mean,
                "image_std": rgb.std,
                "image_range": rgb.range,
                "image_channels": rgb.channels,
                "image_stretch": rgb.stretch,
                "padding_key": adapter.padding.key,
                "slice_axis": None if adapter.slice_axis == 2 else adapter.slice_axis,
                "adapter": getattr(adapter.function, "__qualname__", None),
            },
        )

    def _prepare(self, trainer: Trainer, provenance: Provenance) -> int:
        """Prepare the folder, on one process; return the run's number."""
        self._files.check()
        self._lock = FolderLock(self._files.locks)
        self._lock.acquire(rank=0)
        generation = self._files.prepare(provenance, self.overwrite)
        spellings = Spellings(self._files)
        for stem in known_stems(trainer.predict_dataloaders):
            spellings.check(stem)
            self._files.check_stem(stem, self.probs is not None)
        return generation

    def _finish(self, trainer: Trainer) -> None:
        """Wait for the files of every process, then list them."""
        writing = self._writing
        if writing is None:
            rank_zero_warn(f"{_NAME}: no batch came, nothing was written")
            return
        with Together(_NAME, trainer, RuntimeError):
            self._close()
        if self.counts.unread:
            warn_on_this_process(
                f"{_NAME}: {self.counts.unread} images were in batches that could not be read; "
                "there are no files for them"
            )
        with Together(_NAME, trainer, ValueError):
            if trainer.is_global_zero:
                self._log_counts(
                    self._files.finish(writing.generation, _hashes(writing.provenance))
                )

    def _log_counts(self, done: Finished) -> None:
        failed = sum(done.rows["failed"].to_pylist())
        rank_zero_info(
            f"{_NAME}: {done.kept} images kept, {done.redone} redone, {done.written} new; "
            f"{len(done.rows)} in {self.folder}"
            + (f", {failed} of them with the raw prediction" if failed else "")
        )

    def _close(self) -> None:
        """Write what is still in the queue."""
        if self._writing is None:
            return
        self._writing.capture.remove()
        self._writing.run.close()

    @override
    def _release(self) -> None:
        super()._release()
        if self._lock is not None:
            self._lock.release()
        self._writing = self._lock = None


def _hashes(provenance: Provenance) -> dict[str, str]:
    return {
        "thresholds_hash": provenance.refine_hash,
        "sam_fingerprint": provenance.sam["weights"],
        "segmenter_fingerprint": provenance.segmenter["weights"] or "",
    }
