"""The loaders of an evaluation, and the samples of a process that are not repeats.

DistributedSampler repeats samples so that all ranks have equally many; metrics must not count them
twice.
"""

from __future__ import annotations

from collections.abc import Sized
from typing import Any, cast

from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DistributedSampler


def evaluation_dataloaders(trainer: Trainer) -> list[Any]:
    """Return the loaders of the running evaluation; a single one if batches combine them."""
    if trainer.testing:
        loop = trainer.test_loop
    elif trainer.state.fn == TrainerFn.FITTING:
        loop = trainer.fit_loop.epoch_loop.val_loop
    else:
        loop = trainer.validate_loop
    # trainer.val_dataloaders may be those of an earlier fit, and does not show the mode.
    combined = loop._combined_loader
    if combined is None:
        return []
    return list(combined.flattened) if loop._is_sequential else [combined]


class RealSamples:
    """Counts the samples of one dataloader on one process, without a sampler's repeats.

    Rank r of R yields entries r, r + R, r + 2R, … of a list that repeats its own beginning if
    the data set's N samples do not divide by R. So only the last samples of a rank can be
    repeats: those past its first ⌈(N − r) / R⌉, shuffled or not.

    Args:
        dataloader: Any iterable of batches, in the sampler's order. Repeats are known for
            `torch.utils.data.DistributedSampler` (Lightning's included) alone.
    """

    def __init__(self, dataloader: Any) -> None:
        sampler = _distributed_sampler(dataloader)
        self._left: int | None = None
        if sampler is not None:
            size, ranks = len(cast("Sized", sampler.dataset)), sampler.num_replicas
            self._left = max(0, -((sampler.rank - size) // ranks))

    def take(self, batch_size: int) -> int:
        """Count the next batch, and return how many of its first samples are real."""
        if self._left is None:
            return batch_size
        real = min(batch_size, self._left)
        self._left -= real
        return real


def _distributed_sampler(dataloader: Any) -> DistributedSampler[Any] | None:
    # A loader made with batch_sampler= has a sampler that it does not use.
    batch_sampler = getattr(dataloader, "batch_sampler", None)
    for owner in (batch_sampler, dataloader):
        sampler = getattr(owner, "sampler", None)
        if isinstance(sampler, DistributedSampler):
            return sampler
    return None
