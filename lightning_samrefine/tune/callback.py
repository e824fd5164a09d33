"""The callback of `samrefine task=tune`: it reads batches like any other, and hands them on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from lightning_samrefine.adapters.batch_adapter import RefineInputs
from lightning_samrefine.callbacks.evaluation import LoaderEvaluation
from lightning_samrefine.callbacks.refine_callback import SAMRefineCallback
from lightning_samrefine.config import RefineConfig
from lightning_samrefine.refine.refiner import Refiner
from lightning_samrefine.tune.counts import Scoring

Visitor = Callable[[Refiner, RefineInputs], None]


class TuneCallback(SAMRefineCallback):
    """Hands the samples of a validation set to a visitor; nothing is refined or logged here.

    Takes the arguments of `SAMRefineCallback`.

    Attributes:
        visitor: From what is scored to who takes the samples; called when that is known.
    """

    visitor: Callable[[Scoring], Visitor] | None = None

    @property
    def acting_config(self) -> RefineConfig:
        """What refines: ``refine_config``, or what stands in for it with SAM as it is."""
        return self._run_state.refiner.refiner.config

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.world_size > 1:
            raise MisconfigurationException(
                f"task=tune: got {trainer.world_size} processes, accepted is one: trainer.devices=1"
            )
        super().setup(trainer, pl_module, stage)

    @override
    @torch.no_grad()
    def _take(
        self,
        loader: LoaderEvaluation,
        inputs: RefineInputs | None,
        batch: Any,
        label: str,
        dataloader_idx: int,
    ) -> None:
        if inputs is not None:
            self._visit(self._run_state.refiner.refiner, inputs)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_start(trainer, pl_module)
        adapter = self._run_state.bind(self.adapter, self.num_classes, pl_module, self.class_names)
        scoring = Scoring(adapter.num_classes, self.ignore_index, self.trimap_width)
        if self.visitor is None:
            raise MisconfigurationException("TuneCallback: got no visitor to hand samples to")
        self._visit = self.visitor(scoring)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end_evaluation()
