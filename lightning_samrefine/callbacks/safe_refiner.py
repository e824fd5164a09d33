"""Refines without risk to the run: later failures are counted, no random number is consumed."""

from __future__ import annotations

import random
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

from lightning_samrefine.adapters.batch_adapter import RefineInputs
from lightning_samrefine.refine.results import Refinement
from lightning_samrefine.utils.device import synchronize

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
    """Refines a batch, and returns None for the images that fail.

    Args:
        refine: Refines B samples, or raises.
        device: SAM's.
        warn: Called with the kind of a failure and a reason whenever an image fails.
    """

    def __init__(
        self,
        refine: Callable[[RefineInputs], list[Refinement]],
        device: torch.device,
        warn: Callable[[str, str], None],
    ) -> None:
        self._refine_all, self._device, self._warn = refine, device, warn
        # Dataloaders with a refined image: what fails there later is not an error of the set-up.
        self._proven: set[int] = set()

    def __call__(
        self, inputs: RefineInputs, dataloader_idx: int = 0
    ) -> tuple[list[Refinement | None], float]:
        """Refine a batch, image by image if the batch as a whole fails.

        Args:
            inputs: B ≥ 1 samples on SAM's device.
            dataloader_idx: The loader that they come from.

        Returns:
            B refinements, None for an image whose scores are not finite or whose refinement
            raised; and the seconds that it took, the device's pending work included.

        Raises:
            Exception: The first image's error if every image of a loader's first batch fails:
                the set-up is wrong, and "no gain" would be a wrong result.
        """
        outcomes: list[Refinement | Exception] = [
            ValueError("scores must be finite, got NaN or infinite values") for _ in inputs.probs
        ]
        # In one download: each would make the CPU wait for the GPU.
        finite = torch.stack([probs.isfinite().all() for probs in inputs.probs]).tolist()
        wanted = [index for index, is_finite in enumerate(finite) if is_finite]
        device = self._device
        synchronize(device)
        start = time.perf_counter()
        with isolated_rng(device):
            for index, outcome in zip(wanted, self._refine(inputs, wanted), strict=True):
                outcomes[index] = outcome
        synchronize(device)
        seconds = time.perf_counter() - start
        errors = {index: one for index, one in enumerate(outcomes) if isinstance(one, Exception)}
        if len(errors) < len(outcomes):
            self._proven.add(dataloader_idx)
        elif dataloader_idx not in self._proven:
            raise _explained(errors[0], len(errors), dataloader_idx)
        for index, error in errors.items():
            kind = type(error).__name__ if index in wanted else "non-finite scores"
            self._warn(kind, f"{_KEPT} ({type(error).__name__}: {error})")
        return [None if isinstance(one, Exception) else one for one in outcomes], seconds

    def trust(self, dataloader_idx: int) -> None:
        """Note that the same set-up has refined an image of this loader before."""
        self._proven.add(dataloader_idx)

    def _refine(self, inputs: RefineInputs, wanted: list[int]) -> list[Refinement | Exception]:
        if not wanted:
            return []
        try:
            return list(self._refine_all(inputs.take(wanted)))
        except Exception as error:  # of any model or device
            _release_tensors(error)
            if len(wanted) == 1:
                return [error]
        # Out of the handler, so that nothing of the failed call is held during the retry.
        return [outcome for index in wanted for outcome in self._refine(inputs, [index])]


def _release_tensors(error: BaseException | None) -> None:
    """Clear the local variables of an error's frames, and of those of its causes."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _explained(error: Exception, images: int, dataloader_idx: int) -> Exception:
    """Add to an error why it ends the run (from Python 3.11 on)."""
    if hasattr(error, "add_note"):
        error.add_note(
            f"Refinement failed for all {images} images of the first batch of dataloader "
            f"{dataloader_idx}, so the set-up is wrong. Later failures are counted and end no run."
        )
    return error
