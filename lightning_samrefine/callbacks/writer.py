"""The prediction writer: refined label maps of a predict run, in a folder that survives kills."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
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

from lightning_samrefine.adapters.batch_adapter import BatchAdapter
from lightning_samrefine.adapters.denormalize import Denormalize
from lightning_samrefine.adapters.forward_hooks import ScoresCapture
from lightning_samrefine.adapters.nested import batch_size
from lightning_samrefine.adapters.sample_names import Stem, find_stems
from lightning_samrefine.callbacks.arguments import (
    check_sam,
    check_trainer,
    parse_class_names,
    parse_num_classes,
    parse_refine,
)
from lightning_samrefine.callbacks.run_state import RunState
from lightning_samrefine.config import RefineConfig
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
    is complete (by size and checksum), writes what is missing, damaged, or of an image or a raw
    prediction that has changed, and ends in the same bytes as a run that was left alone, as far as
    segmenter and SAM give the same bits whatever else is in their batch. (On a GPU set
    ``max_prompts_per_batch``, or prompts on the images of a batch are decoded together.) Results of
    other thresholds, weights or settings are refused, and so are a second run while one writes to
    the folder, and a second image of one name.

    Files are written by a thread of their own; where the disk is slower than SAM, SAM waits. Call
    ``trainer.predict(..., return_predictions=False)``, or Lightning keeps all predictions in
    memory. Several processes need a folder that all of them see.

    Args:
        folder: New, empty, or one of an earlier run.
        sam: A name for `load_sam`, or a `Promptable`.
        checkpoint: The weights' file, see `load_sam`.
        num_classes: C ≥ 2, as for `SAMRefineCallback`.
        class_names: C names, for their number and to compare with those of tuned thresholds.
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
        self.class_names = parse_class_names(class_names)
        self.num_classes = parse_num_classes(num_classes, self.class_names)
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
            rgb=Denormalize(image_mean, image_std, image_range),
            function=adapter,
            needs_target=False,
        )
        self.counts = PredictCounts()
        self._files = OutputFolder(self.folder)
        self._lock: FolderLock | None = None
        self._attached: RunState | None = None
        self._writing: _Writing | None = None

    def __getstate__(self) -> dict[str, Any]:
        state = {key: value for key, value in vars(self).items() if key not in ("log", "log_dict")}
        return {**state, "_attached": None, "_writing": None, "_lock": None}

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
        self._attached = RunState(
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
        attached = self._run_state
        num_classes = attached.bind(
            self.adapter, self.num_classes, pl_module, self.class_names
        ).num_classes
        if trainer.predict_loop.return_predictions:
            rank_zero_warn(
                f"{_NAME}: Lightning keeps every prediction in memory; "
                "trainer.predict(..., return_predictions=False) does not"
            )
        self.counts = PredictCounts()
        with _Together(trainer, MisconfigurationException):
            provenance = self._provenance(attached, pl_module, num_classes)
            generation = self._prepare(trainer, provenance) if trainer.is_global_zero else 0
        generation = trainer.strategy.broadcast(generation)
        with _Together(trainer, MisconfigurationException):
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
        attached, writing = self._run_state, self._writing
        assert writing is not None  # on_predict_start comes before any batch
        inputs = attached.read(batch, prediction, writing.capture, dataloader_idx)
        if inputs is None:
            self.counts.unread += batch_size(batch)
            return
        stems = find_stems(batch, len(inputs), self.stem_key, batch_indices)
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
            attached.refiner.trust(dataloader_idx)
        if not missing:
            return
        wanted = inputs.take(missing)
        refinements, _ = attached.refiner(wanted, dataloader_idx)
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
    def _run_state(self) -> RunState:
        if self._attached is None:
            raise MisconfigurationException(
                f"{_NAME}: SAM is not loaded; the Trainer calls setup before it predicts, and so "
                "must whoever calls the hooks without one"
            )
        return self._attached

    def _provenance(
        self, attached: RunState, pl_module: LightningModule, num_classes: int | None
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
        """Get the folder ready, on one process; return the run's number."""
        self._files.check()
        self._lock = FolderLock(self._files.locks)
        self._lock.acquire(rank=0)
        generation = self._files.prepare(provenance, self.overwrite)
        spellings = Spellings(self._files)
        for stem in _known_stems(trainer.predict_dataloaders):
            spellings.check(stem)
            self._files.check_stem(stem, self.probs is not None)
        return generation

    def _finish(self, trainer: Trainer) -> None:
        """Wait for the files of every process, then list them."""
        writing = self._writing
        if writing is None:
            rank_zero_warn(f"{_NAME}: no batch came, nothing was written")
            return
        with _Together(trainer, RuntimeError):
            self._close()
        if self.counts.unread:
            message = (
                f"{_NAME}: {self.counts.unread} images were in batches that could not be read; "
                "there are no files for them"
            )
            warnings.warn(
                rank_prefixed_message(message, trainer.global_rank), RuntimeWarning, stacklevel=2
            )
        with _Together(trainer, ValueError):
            if trainer.is_global_zero:
                self._tell(self._files.finish(writing.generation, _hashes(writing.provenance)))

    def _tell(self, done: Finished) -> None:
        failed = sum(done.rows["failed"].to_pylist())
        rank_zero_info(
            f"{_NAME}: {done.kept} images kept, {done.redone} redone, {done.written} new; "
            f"{len(done.rows)} in {self.folder}"
            + (f", {failed} of them with the raw prediction" if failed else "")
        )

    def _close(self) -> None:
        """Write what waits to be written."""
        if self._writing is None:
            return
        self._writing.capture.remove()
        self._writing.run.close()

    def _release(self) -> None:
        if self._attached is not None:
            self._attached.release()
        if self._lock is not None:
            self._lock.release()
        self._attached = self._writing = self._lock = None


class _Together(contextlib.AbstractContextManager[None]):
    """A step that all processes take, and at which all fail where one of them does.

    Without it the others would wait for the one that failed until the process group times out.

    Args:
        trainer: Whose processes all come here.
        refusal: What the other processes raise, and what a `ValueError` or an `OSError` becomes;
            those stay what they are beside a `RuntimeError`.
    """

    def __init__(self, trainer: Trainer, refusal: type[Exception]) -> None:
        self._strategy, self._processes = trainer.strategy, trainer.world_size
        self._refusal = refusal

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if error is not None and not isinstance(error, Exception):
            return  # Lightning ends the other processes
        if self._strategy.reduce_boolean_decision(error is None, all=True):
            return
        own = None if error is None else f"{type(error).__name__}: {error}"
        messages = [self._strategy.broadcast(own, src=rank) for rank in range(self._processes)]
        if error is None:
            raise self._refusal(f"{_NAME}: {next(filter(None, messages))}")
        if isinstance(error, ValueError | OSError) and self._refusal is not RuntimeError:
            raise self._refusal(f"{_NAME}: {error}") from error


def _known_stems(dataloaders: Any) -> Iterator[str]:
    """Return the names that data sets list beforehand; any others are checked as they come."""
    several = dataloaders if isinstance(dataloaders, list | tuple) else [dataloaders]
    for index, dataloader in enumerate(several):
        names = getattr(getattr(dataloader, "dataset", None), "names", None)
        if isinstance(names, list):
            prefix = f"{index}/" if len(several) > 1 else ""
            yield from (f"{prefix}{name}" for name in names if isinstance(name, Stem))


def _hashes(provenance: Provenance) -> dict[str, str]:
    return {
        "thresholds_hash": provenance.refine_hash,
        "sam_fingerprint": provenance.sam["weights"],
        "segmenter_fingerprint": provenance.segmenter["weights"] or "",
    }
