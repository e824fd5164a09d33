"""What every callback of this package does in setup and teardown: it loads SAM and frees it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_samrefine.adapters.target_values import IgnoreIndex
from lightning_samrefine.callbacks.arguments import SharedArguments, check_trainer
from lightning_samrefine.callbacks.run_state import RunState
from lightning_samrefine.config import RefineConfig
from lightning_samrefine.fit.auto_fusion import FittedFusion
from lightning_samrefine.refine.cache.embedding_cache import EmbeddingCache


class SAMCallback(Callback):
    """Base class of the callbacks that read a user's batches and hold a SAM.

    Args:
        shared: The arguments that they have in common.
    """

    _FAILURES: ClassVar[str] = ""
    """Where failed refinements are counted, for the warnings."""

    # What a run creates, by attribute; a pickled or copied callback starts without it.
    _OF_A_RUN: ClassVar[tuple[str, ...]] = ("_attached",)

    def __init__(self, shared: SharedArguments) -> None:
        super().__init__()
        self.shared = shared
        self._attached: RunState | None = None

    @property
    def class_names(self) -> list[str] | None:
        """The names of the classes, None without any."""
        return self.shared.class_names

    @property
    def refine_config(self) -> RefineConfig:
        """The thresholds."""
        return self.shared.refine

    def __getstate__(self) -> dict[str, Any]:
        # Lightning binds the module's log to the callback: pickling it would drag the module along.
        state = {key: value for key, value in vars(self).items() if key not in ("log", "log_dict")}
        return {**state, **dict.fromkeys(self._OF_A_RUN)}

    def _attach(
        self,
        trainer: Trainer,
        cache: EmbeddingCache | None = None,
        ignore_index: IgnoreIndex = None,
        fitted: FittedFusion | None = None,
        with_probs: bool = False,
        needs_target: bool = True,
    ) -> None:
        """Load SAM on the Trainer's device; see `RunState` for the arguments.

        Without ``needs_target`` batches are read without targets, whatever `shared` has.

        Raises:
            MisconfigurationException: A Trainer of pytorch_lightning.
            FileNotFoundError: No checkpoint at the path, or none that could be downloaded.
        """
        name, device = type(self).__name__, trainer.strategy.root_device
        check_trainer(name, trainer)
        self._release()
        shared = self.shared
        if not needs_target:
            shared = replace(shared, adapter=replace(shared.adapter, needs_target=False))
        self._attached = RunState(
            name, self._FAILURES, shared, device, cache, ignore_index, fitted, with_probs
        )

    def _release(self) -> None:
        """Free what a run holds; a second call does nothing."""
        if self._attached is not None:
            self._attached.release()
            self._attached = None

    @property
    def _run_state(self) -> RunState:
        if self._attached is None:
            raise MisconfigurationException(
                f"{type(self).__name__}: SAM is not loaded; the Trainer calls setup before any "
                "batch, and so must whoever calls the hooks without one"
            )
        return self._attached
