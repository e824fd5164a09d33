"""The prediction writer: refined label maps of a predict run, in a folder that survives kills."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.utilities.rank_zero import rank_prefixed_message
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from typing_extensions import override

from lightning_samrefine.adapter import BatchAdapter
from lightning_samrefine.arguments import (
    check_count,
    check_sam,
    check_trainer,
    parse_class_names,
    parse_num_classes,
    parse_refine,
)
from lightning_samrefine.attachment import Attachment
from lightning_samrefine.batch_search import batch_size
from lightning_samrefine.capture import ScoresCapture
from lightning_samrefine.config import RefineConfig
from lightning_samrefine.images import RgbConverter
from lightning_samrefine.models import Promptable
from lightning_samrefine.output_folder import OutputFolder
from lightning_samrefine.precision import autocast_dtype
from lightning_samrefine.prediction_files import MAX_CLASSES, PROBS_KINDS, ProbsKind
from lightning_samrefine.prediction_run import PredictCounts, PredictionRun, image_hash
from lightning_samrefine.provenance import Provenance
from lightning_samrefine.stems import find_stems

_NAME = "SAMRefineWriter"


@dataclass
class _Writing:
    """What lives from the start of prediction to its end."""

    capture: ScoresCapture
    provenance: Provenance
    generation: int
    run: PredictionRun


class SAMRefineWriter(BasePredictionWriter):
    """Refines the predictions of ``Trainer.predict`` with SAM and writes them to a folder.

    For each image a label map ``labels/<stem>.png`` (palette indices up to 255 classes, 16-bit
    above; 255 or 65,535 where the prediction is none of the classes), ``probs/<stem>.safetensors``
    where wanted, and a row of ``manifest.parquet``: stem, size, regions, SAM's predicted IoUs,
    checksums of the files, hashes of thresholds and weights. ``run.json`` holds the settings.

    The run may be killed at any moment. Started again, with any number of processes, it keeps what
    is complete (by size and checksum), writes what is missing, damaged or of an image that has
    changed, and ends in the same bytes as a run that was left alone, as far as segmenter and SAM
    give the same bits whatever else is in their batch. (On a GPU set ``max_prompts_per_batch``, or
    the number of prompts at once follows the free memory.) Results of other thresholds, weights or
    settings are refused.

    Files are written by a thread of their own; where the disk is slower than SAM, SAM waits. Call
    ``trainer.predict(..., return_predictions=False)``, or Lightning keeps all predictions in
    memory. Several processes need a folder that all of them see.

    Args:
        folder: New, empty, or one of an earlier run.
        sam: A name for `load_sam`, or a `Promptable`.
        checkpoint: The weights' file, see `load_sam`.
        num_classes: C ≥ 2, as for `SAMRefineCallback`.
        class_names: C names, for their number.
        refine: Thresholds, as for `SAMRefineCallback`.
        precision: SAM's autocast, see `Refiner`.
        probs: ``"uint8"`` (255 means 1) or ``"float16"`` writes the completed probabilities,
            (C, H, W) under the name ``probs``, see `Refinement.completed_probs`. None writes none.
        overwrite: Whether results that another run left in the folder with other settings are
            removed. Results of the same settings are kept.
        queue_size: How many images may wait to be written.
        stem_key: Where the images' names are in the batch, see `find_stems`. None looks under the
            usual names (``name``, ``path``, ``image_id``, …), else takes the number in the data
            set. With several dataloaders names begin with the loader's number and "/".
        image_key: As for `SAMRefineCallback`, like all that follow.
        scores_key: Where the scores are.
        scores_kind: What they are.
        image_mean: The mean of your Normalize transform.
        image_std: Its deviation.
        image_range: The range before it.
        adapter: Replaces the search for image and scores; no target is needed.

    Attributes:
        counts: What this process did, of type `PredictCounts`.

    Raises:
        MisconfigurationException: No number of classes, a Trainer of pytorch_lightning, or a
            folder that holds something else or results of other settings.
        ModuleNotFoundError: pyarrow is missing; the extra ``predict`` brings it.
        TypeError: An argument of a wrong type.
        ValueError: An argument outside its range, a batch in which something is missing, or one
            name for different images.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> from lightning_samrefine import SAMRefineWriter
        >>> writer = SAMRefineWriter("pseudo", "vit_t", "mobile_sam.pt", num_classes=11)
        >>> trainer = Trainer(callbacks=[writer])
    """

    def __init__(
        self,
        folder: str | Path,
        sam: str | Promptable = "vit_t",
        checkpoint: str | Path | None = None,
        num_classes: int | None = None,
        class_names: Sequence[str] | None = None,
        refine: Mapping[str, Any] | RefineConfig | str = "default",
        precision: str = "auto",
        probs: ProbsKind | None = None,
        overwrite: bool = False,
        queue_size: int = 8,
        stem_key: str | None = None,
        image_key: str | None = None,
        scores_key: str | None = None,
        scores_kind: Literal["auto", "logits", "probs", "labels"] = "auto",
        image_mean: Sequence[float] | float | None = None,
        image_std: Sequence[float] | float | None = None,
        image_range: Literal["0-255", "0-1"] | None = None,
        adapter: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(write_interval="batch")
        check_sam(sam, checkpoint, precision)
        check_count("queue_size", queue_size)
        if probs is not None and probs not in PROBS_KINDS:
            raise ValueError(
                f"probs: got {probs!r}, accepted are {', '.join(map(repr, PROBS_KINDS))} and None"
            )
        if stem_key is not None and not isinstance(stem_key, str):
            raise TypeError(f"stem_key: got {stem_key!r}, accepted is a string or None")
        self.folder = Path(folder)
        self.sam = sam
        self.checkpoint = checkpoint
        self.num_classes = parse_num_classes(num_classes, parse_class_names(class_names))
        if self.num_classes is not None and self.num_classes > MAX_CLASSES:
            raise ValueError(
                f"num_classes: got {self.num_classes}, accepted are at most {MAX_CLASSES}, the "
                "values of a 16-bit PNG but the one for unknown pixels"
            )
        self.refine_config = parse_refine(refine)
        self.precision = precision
        self.probs = probs
        self.overwrite = overwrite
        self.queue_size = queue_size
        self.stem_key = stem_key
        self.adapter = BatchAdapter(
            image_key=image_key,
            scores_key=scores_key,
            scores_kind=scores_kind,
            rgb=RgbConverter(image_mean, image_std, image_range),
            function=adapter,
            needs_target=False,
        )
        self.counts = PredictCounts()
        self._files = OutputFolder(self.folder)
        self._attached: Attachment | None = None
        self._writing: _Writing | None = None

    def __getstate__(self) -> dict[str, Any]:
        state = {key: value for key, value in vars(self).items() if key not in ("log", "log_dict")}
        return {**state, "_attached": None, "_writing": None}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "predict":
            return
        check_trainer(_NAME, trainer)
        super().setup(trainer, pl_module, stage)
        self._release()
        try:
            self._files.check()
        except ValueError as error:
            raise MisconfigurationException(f"{_NAME}: {error}") from error
        self._attached = Attachment(
            _NAME,
            "counts.failed",
            self.sam,
            self.checkpoint,
            self.refine_config,
            self.precision,
            trainer.strategy.root_device,
        )

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        attached = self._attachment
        num_classes = attached.bind(self.adapter, self.num_classes, pl_module).num_classes
        if trainer.predict_loop.return_predictions:
            rank_zero_warn(
                f"{_NAME}: Lightning keeps every prediction in memory; "
                "trainer.predict(..., return_predictions=False) does not"
            )
        provenance = self._provenance(attached, pl_module, num_classes)
        generation = self._prepare(trainer, provenance)
        self.counts = PredictCounts()
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
            self._writing.capture.arm(batch)

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
        attached, writing = self._attachment, self._writing
        assert writing is not None  # on_predict_start comes before any batch
        inputs = attached.read(batch, prediction, writing.capture, dataloader_idx)
        if inputs is None:
            self.counts.unread += batch_size(batch)
            return
        stems = find_stems(batch, len(inputs), self.stem_key, batch_indices)
        if trainer.predict_loop.num_dataloaders > 1:
            stems = [f"{dataloader_idx}/{stem}" for stem in stems]
        images = [image_hash(image) for image in inputs.images]
        missing = [
            index
            for index, (stem, image) in enumerate(zip(stems, images, strict=True))
            if not writing.run.is_done(stem, image)
        ]
        if len(missing) < len(stems):
            attached.refiner.trust(dataloader_idx)
        if not missing:
            return
        wanted = inputs.take(missing)
        refinements, _ = attached.refiner(wanted, dataloader_idx)
        for position, (index, refinement) in enumerate(zip(missing, refinements, strict=True)):
            writing.run.write(stems[index], images[index], wanted, position, refinement)

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        # What is refined already is written; a failing disk is the exception itself.
        try:
            self._close()
        except Exception as error:
            warnings.warn(
                rank_prefixed_message(f"{_NAME}: {error}", trainer.global_rank),
                RuntimeWarning,
                stacklevel=2,
            )
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

    @property
    def _attachment(self) -> Attachment:
        if self._attached is None:
            raise MisconfigurationException(
                f"{_NAME}: SAM is not loaded; the Trainer calls setup before it predicts, and so "
                "must whoever calls the hooks without one"
            )
        return self._attached

    def _provenance(
        self, attached: Attachment, pl_module: LightningModule, num_classes: int | None
    ) -> Provenance:
        sam = attached.refiner.refiner.sam
        adapter, rgb = self.adapter, self.adapter.rgb
        return Provenance.of(
            self.refine_config,
            sam,
            str(autocast_dtype(self.precision, sam.device) or torch.float32),
            pl_module,
            {
                "num_classes": num_classes,
                "probs": self.probs,
                "image_key": adapter.image_key,
                "scores_key": adapter.scores_key,
                "scores_kind": adapter.scores_kind,
                "image_mean": rgb.mean,
                "image_std": rgb.std,
                "image_range": rgb.range,
                "adapter": getattr(adapter.function, "__qualname__", None),
            },
        )

    def _prepare(self, trainer: Trainer, provenance: Provenance) -> int:
        """Let one process prepare the folder, and all of them hear of it."""
        error, generation = None, 0
        if trainer.is_global_zero:
            try:
                generation = self._files.prepare(provenance, self.overwrite)
            except (ValueError, OSError) as refusal:
                error = str(refusal)
        error, generation = trainer.strategy.broadcast((error, generation))
        if error is not None:
            raise MisconfigurationException(f"{_NAME}: {error}")
        return generation

    def _finish(self, trainer: Trainer) -> None:
        """Wait for the files of every process, then list them."""
        writing = self._writing
        if writing is None:
            rank_zero_warn(f"{_NAME}: no batch came, nothing was written")
            return
        self._close()
        if self.counts.unread:
            message = (
                f"{_NAME}: {self.counts.unread} images were in batches that could not be read; "
                "there are no files for them"
            )
            warnings.warn(
                rank_prefixed_message(message, trainer.global_rank), RuntimeWarning, stacklevel=2
            )
        trainer.strategy.barrier(_NAME)
        error = None
        if trainer.is_global_zero:
            try:
                rows = self._files.finish(writing.generation, _hashes(writing.provenance))
                failed = sum(rows["failed"].to_pylist())
                rank_zero_info(
                    f"{_NAME}: {len(rows)} images in {self.folder}"
                    + (f", {failed} of them with the raw prediction" if failed else "")
                )
            except (ValueError, OSError) as refusal:
                error = str(refusal)
        error = trainer.strategy.broadcast(error)
        if error is not None:
            raise ValueError(f"{_NAME}: {error}")

    def _close(self) -> None:
        """Write what waits to be written."""
        if self._writing is None:
            return
        self._writing.capture.remove()
        self._writing.run.close()

    def _release(self) -> None:
        if self._attached is not None:
            self._attached.release()
        self._attached = self._writing = None


def _hashes(provenance: Provenance) -> dict[str, str]:
    return {
        "thresholds_hash": provenance.refine_hash,
        "sam_fingerprint": provenance.sam["weights"],
        "segmenter_fingerprint": provenance.segmenter["weights"] or "",
    }
