"""What the metrics of this package have in common: integers that add up exactly."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from lightning_samrefine.utils.device import upload


class CountingMetric(Metric):
    """A metric of counts, which are 0 without an update."""

    full_state_update = False
    higher_is_better = None
    is_differentiable = False

    @property
    @override
    def update_called(self) -> bool:
        """Always True: torchmetrics would warn if `compute` is called before `update`.

        A process, or a dataloader without targets, may have no image, and must still take part in
        `compute`, which is a collective call.
        """
        return True


class Counts(CountingMetric):
    """Integers that are summed over batches and processes, so that no order changes them.

    Args:
        shape: Of the counts.

    Attributes:
        counts: int64.
    """

    counts: Tensor

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.add_state("counts", torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")

    def compute(self) -> Any:
        """Return the counts, summed over all processes."""
        return self.counts


class RefinementCounts(Counts):
    """Counts what the refinement did: integers, so that no order of addition changes them.

    Attributes:
        counts: (5,) int64: images, failed images, prompted regions, accepted regions, and
            microseconds spent refining.
    """

    def __init__(self) -> None:
        super().__init__(5)

    def update(
        self,
        images: int = 0,
        failed: int = 0,
        regions: int = 0,
        accepted: int = 0,
        seconds: float = 0.0,
    ) -> None:
        """Add the figures of some images."""
        new = [images, failed, regions, accepted, round(seconds * 1e6)]
        self.counts += upload(torch.tensor(new), self.counts.device)
