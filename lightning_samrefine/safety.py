"""Refining without risk to the run: no failure escapes, no random number is consumed."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

from lightning_samrefine.adapter import RefineInputs
from lightning_samrefine.refinement import Refinement
from lightning_samrefine.refiner import Refiner

_KEPT = "an image could not be refined and keeps its raw prediction"


@contextmanager
def isolated_rng(device: torch.device) -> Iterator[None]:
    """Leave the global random states of torch (CPU and ``device``), NumPy and Python as they were.

    Lightning's ``isolate_rng`` does not restore them after an exception, and touches every GPU.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 - the
    # global state is the one that users' augmentations draw from.
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002 - as above


class SafeRefiner:
    """Refines what can be refined, and says which images could not be.

    Args:
        refiner: Does the work.
        warn: Called with a reason whenever an image fails.
    """

    def __init__(self, refiner: Refiner, warn: Callable[[str], None]) -> None:
        self.refiner = refiner
        self._warn = warn

    def __call__(self, inputs: RefineInputs) -> tuple[list[Refinement | None], float]:
        """Refine a batch, image by image where the batch as a whole fails.

        Args:
            inputs: B samples on SAM's device.

        Returns:
            B refinements, None for an image whose scores are not finite or whose refinement
            raised; and the seconds that it took, the device's pending work included.
        """
        finite = [bool(probs.isfinite().all()) for probs in inputs.probs]
        if not all(finite):
            self._warn(f"{_KEPT} (its scores hold NaN or infinite values)")
        wanted = [index for index, usable in enumerate(finite) if usable]
        refinements: list[Refinement | None] = [None] * len(inputs)
        device = self.refiner.sam.device
        _synchronize(device)
        start = time.perf_counter()
        with isolated_rng(device):
            for index, refinement in zip(wanted, self._refine(inputs, wanted), strict=True):
                refinements[index] = refinement
        _synchronize(device)
        return refinements, time.perf_counter() - start

    def _refine(self, inputs: RefineInputs, wanted: list[int]) -> list[Refinement | None]:
        try:
            return list(
                self.refiner.refine_batch(
                    [inputs.images[index] for index in wanted],
                    [inputs.probs[index] for index in wanted],
                    [inputs.labels[index] for index in wanted],
                )
            )
        except Exception as error:  # whatever a model or a device may raise
            reason = f"{type(error).__name__}: {error}"
        # Out of the handler, so that the error's frames release their tensors before the retry.
        if len(wanted) == 1:
            self._warn(f"{_KEPT} ({reason})")
            return [None]
        return [refinement for index in wanted for refinement in self._refine(inputs, [index])]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
