"""The callback of `samrefine task=tune`: passes validation samples to a visitor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from lightning_samrefine.adapters.batch_adapter import RefineInputs
from lightning_samrefine.adapters.forward_hooks import ScoresCapture
from lightning_samrefine.adapters.target_values import (
    DEFAULT_IGNORE_INDEX,
    IgnoreIndex,
    parse_ignore_index,
)
from lightning_samrefine.callbacks.arguments import SharedArguments
from lightning_samrefine.callbacks.base_callback import SAMCallback
from lightning_samrefine.callbacks.repeated_samples import evaluation_dataloaders
from lightning_samrefine.config import RefineConfig
from lightning_samrefine.models import Promptable
from lightning_samrefine.refine.cache.embedding_cache import EmbeddingCache, make_cache
from lightning_samrefine.refine.refiner import Refiner
from lightning_samrefine.tune.counts import Scoring
from lightning_samrefine.utils.validation import check_count

Visitor = Callable[[Refiner, RefineInputs], None]


class TuneCallback(SAMCallback):
    """Passes the samples of a validation set to a visitor, batch by batch.

    With ``cache="memory"`` embeddings are kept for the callback's lifetime, so that the second
    pass of a tuning does not encode the images again.

    Args:
        sam: As for `SAMRefineCallback`, like the following arguments.
        ignore_index: Target value that is not counted.
        cache: Cache of SAM's image embeddings.
        cache_gb: Limit of the cache.
        max_batches: Maximum number of batches per loader.
        trimap_width: Half-width of the band around borders.
        **shared: Other arguments of `SharedArguments.of`.

    Attributes:
        fit_config: The thresholds that a fusion is fitted with: the given ones, or those of the
            preset ``"auto"`` if the given ones are of a fusion that is not fitted.
        visitor: Factory called with the scoring at the start of a pass; returns the function that
            receives the samples of the pass.

    Raises:
        MisconfigurationException: In ``setup``, more than one process.
    """

    _OF_A_RUN: ClassVar[tuple[str, ...]] = ("_attached", "_capture", "_visit")

    visitor: Callable[[Scoring], Visitor] | None = None

    def __init__(
        self,
        sam: str | Promptable = "vit_t",
        *,
        ignore_index: IgnoreIndex = "auto",
        cache: Literal["memory", "disk"] | EmbeddingCache | None = "memory",
        cache_gb: float | None = None,
        max_batches: int | None = None,
        trimap_width: int = 3,
        **shared: Any,
    ) -> None:
        arguments = SharedArguments.of(sam=sam, **shared)
        if arguments.adapter.scores_kind == "multilabel":
            raise ValueError(
                "scores_kind must be of one class a pixel in a tuning, got 'multilabel'"
            )
        given = arguments.refine
        base = RefineConfig.preset("auto") if given.weights is None else given
        self.fit_config = replace(base, weights="auto")
        # Thresholds are tuned for the soft fusion; a fit would change with each of them.
        thresholds = replace(given, weights=None)
        super().__init__(replace(arguments, refine=thresholds))
        self.cache = make_cache(cache, cache_gb)
        self.max_batches = None if max_batches is None else check_count("max_batches", max_batches)
        self.trimap_width = check_count("trimap_width", trimap_width)
        self._given_ignore_index = parse_ignore_index(ignore_index)
        self._capture: ScoresCapture | None = None
        self._visit: Visitor | None = None
        self._loaders = 0

    @property
    def ignore_index(self) -> int | None:
        """Target value that is not counted, or None."""
        given = self._given_ignore_index
        return DEFAULT_IGNORE_INDEX if given == "auto" else given

    @property
    def acting_config(self) -> RefineConfig:
        """The thresholds in use: the user's, less what this SAM cannot do."""
        return self._run_state.refiner.config

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.world_size > 1:
            raise MisconfigurationException(
                f"trainer.devices must be 1 with task=tune, got {trainer.world_size} processes"
            )
        self._attach(trainer, self.cache, self._given_ignore_index)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        state = self._run_state
        state.begin(pl_module)
        assert self.visitor is not None  # `tune` sets it
        self._visit = self.visitor(Scoring(state.num_classes, self.ignore_index, self.trimap_width))
        self._capture = ScoresCapture(pl_module, state.num_classes)
        self._loaders = len(evaluation_dataloaders(trainer))

    @override
    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._capture is not None and self._covers(batch_idx):
            self._capture.arm(batch, dataloader_idx)

    @override
    @torch.no_grad()
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._capture is None or self._visit is None or not self._covers(batch_idx):
            return
        state = self._run_state
        inputs = state.read(
            batch, outputs, self._capture, dataloader_idx, self._loaders, self.ignore_index
        )
        if inputs is not None and len(inputs.parts) > 1:
            raise MisconfigurationException(
                "image must be (B, c, H, W) in a tuning, got volumes of "
                f"{len(inputs.parts)} slices, which it would take for independent images"
            )
        if inputs is not None:
            self._visit(state.refiner, inputs)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end_pass()

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._release()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()

    def _covers(self, batch_idx: int) -> bool:
        return self.max_batches is None or batch_idx < self.max_batches

    def _end_pass(self) -> None:
        if self._capture is not None:
            self._capture.remove()
        self._capture = self._visit = None

    @override
    def _release(self) -> None:
        self._end_pass()
        super()._release()
