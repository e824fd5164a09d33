"""Steps that the processes of a run take together, and warnings of one of them."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_prefixed_message
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import distributed
from typing_extensions import override


class Together(contextlib.AbstractContextManager[None]):
    """A step that all processes take, and that fails on all of them if it fails on one.

    Without it the others would wait for the failed one until the process group times out.

    Args:
        owner: What the messages begin with.
        trainer: Its processes all take the step.
        refusal: The type of error on the other processes. A `ValueError` or an `OSError` becomes
            one, too, unless the type is `RuntimeError`.
    """

    def __init__(self, owner: str, trainer: Trainer, refusal: type[Exception]) -> None:
        self._owner = owner
        self._strategy, self._processes = trainer.strategy, trainer.world_size
        self._refusal = refusal

    @override
    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if error is not None and not isinstance(error, Exception):
            return  # Lightning ends the other processes
        if self._strategy.reduce_boolean_decision(error is None, all=True):
            return
        own = None if error is None else f"{type(error).__name__}: {error}"
        messages = [self._strategy.broadcast(own, src=rank) for rank in range(self._processes)]
        if error is None:
            raise self._refusal(f"{self._owner}: {next(filter(None, messages))}")
        if isinstance(error, ValueError | OSError) and self._refusal is not RuntimeError:
            raise self._refusal(f"{self._owner}: {error}") from error


def is_distributed() -> bool:
    """Whether this process belongs to a process group."""
    return distributed.is_available() and distributed.is_initialized()


def gather_on_zero(value: Any) -> list[Any]:
    """Return the other processes' values on rank zero, and nothing elsewhere. Collective."""
    if not is_distributed() or distributed.get_world_size() == 1:
        return []
    zero = distributed.get_rank() == 0
    values: list[Any] | None = [None] * distributed.get_world_size() if zero else None
    distributed.gather_object(value, values)
    return values[1:] if values is not None else []


def warn_on_this_process(message: str) -> None:
    """Warn on whichever process it is, with its rank."""
    rank: int | None = rank_zero_only.rank  # type: ignore[attr-defined]  # set by Lightning
    warnings.warn(rank_prefixed_message(message, rank), RuntimeWarning, stacklevel=3)
