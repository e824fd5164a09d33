"""SAM and what goes with it, from a Trainer's setup to its teardown."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_prefixed_message
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only

from lightning_samrefine.adapters.batch_adapter import BatchAdapter, RefineInputs
from lightning_samrefine.adapters.candidates import Roles
from lightning_samrefine.adapters.forward_hooks import ScoresCapture
from lightning_samrefine.adapters.nested import describe
from lightning_samrefine.adapters.reading_summary import summarize
from lightning_samrefine.adapters.roles import MissingTargetError
from lightning_samrefine.adapters.scores import BinaryKind
from lightning_samrefine.adapters.targets import IgnoreIndex, TargetCheck
from lightning_samrefine.callbacks.arguments import num_classes_of
from lightning_samrefine.callbacks.safe_refiner import SafeRefiner, isolated_rng
from lightning_samrefine.config import RefineConfig
from lightning_samrefine.models import Promptable, load_sam
from lightning_samrefine.models.base import accepts_masks, drop_derived
from lightning_samrefine.refine.cache.embedding_cache import EmbeddingCache
from lightning_samrefine.refine.class_filter import check_classes
from lightning_samrefine.refine.refiner import Refiner
from lightning_samrefine.utils.validation import WrongValuesError


class RunState:
    """A loaded SAM, the refiner around it, and what a run has learnt about its batches.

    A loaded SAM is moved to the device, a named one loaded there, without a trace in the global
    random states.

    Args:
        owner: What a message begins with.
        counted_in: Where failures are counted, for the warning.
        sam: A name for `load_sam`, or a `Promptable`.
        checkpoint: See `load_sam`.
        config: Thresholds.
        precision: See `Refiner`.
        device: Where SAM is to be.
        cache: Keeps embeddings, None for none.
        ignore_index: Target value that is not counted; of no use where no targets are read.

    Attributes:
        refiner: Holds SAM.
        adapter: With the number of classes settled, None until `bind`.

    Raises:
        ValueError: As `load_sam` and `Refiner` raise it.
        FileNotFoundError: No checkpoint there.
    """

    def __init__(
        self,
        owner: str,
        counted_in: str,
        sam: str | Promptable,
        checkpoint: str | Path | None,
        config: RefineConfig,
        precision: str,
        device: torch.device,
        cache: EmbeddingCache | None = None,
        ignore_index: IgnoreIndex = None,
    ) -> None:
        self._owner = owner
        self._warn_once = _WarnOnce(owner, counted_in)
        self._own_sam, self._home = (None, None) if isinstance(sam, str) else (sam, sam.device)
        with isolated_rng(device):
            if isinstance(sam, str):
                sam = load_sam(sam, checkpoint, device)
            else:
                sam.module.to(device)
            self.refiner = SafeRefiner(Refiner(sam, config, precision, cache), self._warn_once)
        self.adapter: BatchAdapter | None = None
        # One a loader, for each settles the range of its own images.
        self._adapters: dict[int, BatchAdapter] = {}
        self._ignore_index = ignore_index
        self._check_targets: TargetCheck | None = None
        # Loaders of which a batch was read: what fails there later is no set-up error.
        self._understood: dict[int, Roles | None] = {}
        # Loaders without targets, which are left out.
        self._without_targets: set[int] = set()
        self._announced: set[int] = set()
        # Loaders that were read to their end once: a wrong value there later ends no run.
        self._passed: set[int] = set()

    def bind(
        self,
        adapter: BatchAdapter,
        num_classes: int | None,
        pl_module: LightningModule,
        class_names: Sequence[str] | None = None,
    ) -> BatchAdapter:
        """Settle the number of classes, after the module's own setup and before any evaluation.

        Raises:
            MisconfigurationException: Nobody says how many there are, or the default ignore_index
                is one of them.
        """
        self._announced.clear()
        if self.adapter is None:
            num_classes = num_classes or num_classes_of(pl_module)
            try:
                self._check_targets = TargetCheck(num_classes, self._ignore_index)
            except ValueError as error:
                raise MisconfigurationException(f"{self._owner}: {error}") from error
            refiner = self.refiner.refiner
            check_classes(refiner.config, num_classes, class_names)
            self.adapter = replace(adapter, num_classes=num_classes, device=refiner.sam.device)
            masks = "" if accepts_masks(refiner.sam) else ", which takes no mask prompts,"
            rank_zero_info(
                f"{self._owner}: SAM {refiner.sam.name}{masks} on {refiner.sam.device} refines "
                f"{num_classes} classes with {refiner.config}"
            )
        return self.adapter

    @torch.no_grad()
    def read(
        self,
        batch: Any,
        outputs: Any,
        capture: ScoresCapture,
        dataloader_idx: int,
        loaders: int = 1,
        ignore_index: int | None = None,
    ) -> RefineInputs | None:
        """Read a batch, and log at the first of an evaluation what is read.

        Values that no batch may hold, such as a target outside the classes, raise until the whole
        loader was read once, however late they come: the labels of the batches before them are
        likely to mean something else as well, and the figures would be wrong. In a later epoch of
        a loader that was all right the batch is left out, counted and warned of, like any other
        that cannot be read: a training run is not lost for it.

        Args:
            batch: As the dataloader yields it; what the step has taken out of it is put back.
            outputs: What the step returned.
            capture: What left the network.
            dataloader_idx: The loader's number.
            loaders: How many there are; of several, those without targets are left out.
            ignore_index: For the log.

        Returns:
            None for a batch that cannot be read although others of its loader could, and for a
            loader that `is_left_out`.

        Raises:
            ValueError: The first batch of a loader cannot be read.
            WrongValuesError: As described.
        """
        assert self.adapter is not None  # bind comes before any batch
        assert self._check_targets is not None
        if self.is_left_out(dataloader_idx):
            return None
        batch = capture.whole(batch)
        settled = self._understood.get(dataloader_idx)
        try:
            adapter = self._adapters.setdefault(
                dataloader_idx,
                replace(self.adapter, rgb=self.adapter.rgb.fresh(), binary=BinaryKind()),
            )
            captured, seen = capture.take(outputs)
            reading = adapter.read(batch, outputs, captured, seen, settled, capture.given)
            self._check_targets.predictions(reading.inputs.labels, dataloader_idx)
            if reading.inputs.targets is not None:
                self._check_targets(reading.inputs.targets, dataloader_idx)
        except MissingTargetError:
            if dataloader_idx in self._understood or len(self._without_targets) + 1 >= loaders:
                raise
            self._without_targets.add(dataloader_idx)
            message = (
                f"{self._owner}: dataloader {dataloader_idx} has no target under a usual name or "
                f"target_key and is left out; the batch is {describe(batch)}"
            )
            _warn(message)
            return None
        except Exception as error:
            wrong = isinstance(error, WrongValuesError) and dataloader_idx not in self._passed
            if wrong or dataloader_idx not in self._understood:
                raise
            reason = f"{type(error).__name__}: {error}"
            self._warn_once("unread batch", f"a batch could not be read and is left out ({reason})")
            return None
        self._understood[dataloader_idx] = None if reading.roles is None else reading.roles.places()
        if dataloader_idx not in self._announced:
            self._announced.add(dataloader_idx)
            which = f"dataloader {dataloader_idx}: " if loaders > 1 else ""
            rank_zero_info(f"{self._owner}: {which}{summarize(reading, ignore_index)}")
        return reading.inputs

    def is_left_out(self, dataloader_idx: int) -> bool:
        """Whether a loader has no targets, and others have."""
        return dataloader_idx in self._without_targets

    def end_pass(self) -> None:
        """Note that the loaders that batches came from were read to their ends."""
        self._passed.update(self._understood)

    def release(self) -> None:
        """Move a user's own SAM back to where it was; what it keeps on the device is dropped."""
        if self._own_sam is not None:
            drop_derived(self._own_sam)
            self._own_sam.module.to(self._home)


class _WarnOnce:
    """Warns of the first failure of each kind, on whatever process it happens.

    An object of its own: the refiner holds it, and must not hold on to itself through it.
    """

    def __init__(self, owner: str, counted_in: str) -> None:
        self._owner, self._counted_in = owner, counted_in
        self._kinds: set[str] = set()

    def __call__(self, kind: str, reason: str) -> None:
        if kind in self._kinds:
            return
        self._kinds.add(kind)
        message = (
            f"{self._owner}: {reason}. Further failures of this kind are counted in "
            f"{self._counted_in} without a warning."
        )
        _warn(message)


def _warn(message: str) -> None:
    """Warn on whatever process it happens."""
    warnings.warn(rank_prefixed_message(message, rank_zero_only.rank), RuntimeWarning, stacklevel=3)
