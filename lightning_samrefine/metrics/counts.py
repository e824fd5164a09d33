"""What the metrics of this package have in common: integers that add up exactly."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class Counts(Metric):
    """Integers that are summed over batches and processes, so that no order changes them.

    Attributes:
        counts: int64.
    """

    full_state_update = False
    higher_is_better = None
    is_differentiable = False
    counts: Tensor

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.add_state("counts", torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")

    def compute(self) -> Any:
        """Return the counts, summed over all processes."""
        return self.counts
