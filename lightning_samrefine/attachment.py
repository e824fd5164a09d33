"""SAM and what goes with it, from a Trainer's setup to its teardown."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_prefixed_message
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only

from lightning_samrefine.adapter import BatchAdapter, RefineInputs
from lightning_samrefine.arguments import num_classes_of
from lightning_samrefine.cache import EmbeddingCache
from lightning_samrefine.capture import ScoresCapture
from lightning_samrefine.config import RefineConfig
from lightning_samrefine.models import Promptable, load_sam
from lightning_samrefine.models.protocol import accepts_masks
from lightning_samrefine.refiner import Refiner
from lightning_samrefine.safety import SafeRefiner, isolated_rng


@dataclass
class Attachment:
    """A loaded SAM, the refiner around it, and what a run has learnt about its batches.

    Attributes:
        owner: The class that a message begins with.
        refiner: Holds SAM.
        counted_in: Where a failure is counted, for the warning.
        adapter: With the number of classes settled, None until `bind`.
        own_sam: A user's own `Promptable`, to be moved back.
        home: Where it was.
        understood: Loaders of which a batch was read: what fails there later is no set-up error.
        warned: Whether a failure was reported.
    """

    owner: str
    refiner: SafeRefiner
    counted_in: str
    adapter: BatchAdapter | None = None
    own_sam: Promptable | None = None
    home: torch.device | None = None
    understood: set[int] = field(default_factory=set)
    warned: bool = False

    @classmethod
    def load(
        cls,
        owner: str,
        counted_in: str,
        sam: str | Promptable,
        checkpoint: str | Path | None,
        config: RefineConfig,
        precision: str,
        device: torch.device,
        cache: EmbeddingCache | None = None,
    ) -> Attachment:
        """Load SAM, or move a loaded one, without a trace in the global random states.

        Raises:
            ValueError: As `load_sam` and `Refiner` raise it.
            FileNotFoundError: No checkpoint there.
        """
        own, home = (None, None) if isinstance(sam, str) else (sam, sam.device)
        with isolated_rng(device):
            if isinstance(sam, str):
                sam = load_sam(sam, checkpoint, device)
            else:
                sam.module.to(device)
            refiner = Refiner(sam, config, precision, cache)
        attachment = cls(owner, SafeRefiner(refiner, lambda _: None), counted_in)
        attachment.refiner = SafeRefiner(refiner, attachment.warn_once)
        attachment.own_sam, attachment.home = own, home
        return attachment

    def bind(
        self, adapter: BatchAdapter, num_classes: int | None, pl_module: LightningModule
    ) -> BatchAdapter:
        """Settle the number of classes, after the module's own setup and before any batch.

        Raises:
            MisconfigurationException: Nobody says how many there are.
        """
        if self.adapter is None:
            num_classes = num_classes or num_classes_of(pl_module)
            refiner = self.refiner.refiner
            self.adapter = replace(adapter, num_classes=num_classes, device=refiner.sam.device)
            masks = "" if accepts_masks(refiner.sam) else ", which takes no mask prompts,"
            rank_zero_info(
                f"{self.owner}: SAM {refiner.sam.name}{masks} on {refiner.sam.device} refines "
                f"{num_classes} classes with {refiner.config}"
            )
        return self.adapter

    @torch.no_grad()
    def read(
        self, batch: Any, outputs: Any, capture: ScoresCapture, dataloader_idx: int
    ) -> RefineInputs | None:
        """Read a batch; None for one that cannot be read although others of its loader could."""
        assert self.adapter is not None  # bind comes before any batch
        try:
            inputs = self.adapter(batch, outputs, *capture.take())
        except Exception as error:
            if dataloader_idx not in self.understood:
                raise
            reason = f"{type(error).__name__}: {error}"
            self.warn_once(f"a batch could not be read and is left out ({reason})")
            return None
        self.understood.add(dataloader_idx)
        return inputs

    def warn_once(self, reason: str) -> None:
        """Warn of the first failure, on whatever process it happens."""
        if self.warned:
            return
        self.warned = True
        message = (
            f"{self.owner}: {reason}. Further failures are counted in {self.counted_in} without a "
            "warning."
        )
        warnings.warn(
            rank_prefixed_message(message, rank_zero_only.rank), RuntimeWarning, stacklevel=2
        )

    def release(self) -> None:
        """Move a user's own SAM back to where it was."""
        if self.own_sam is not None:
            self.own_sam.module.to(self.home)
