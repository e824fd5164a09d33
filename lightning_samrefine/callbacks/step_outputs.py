"""Refined label maps in what a step returns, in evaluations and in predict runs."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_samrefine.adapters.batch_adapter import RefineInputs
from lightning_samrefine.adapters.forward_hooks import ScoresCapture
from lightning_samrefine.callbacks.run_state import RunState
from lightning_samrefine.refine.results import Refinement


def parse_key(add_to_outputs: str | None) -> str | None:
    """Return the key.

    Raises:
        TypeError: Not a string.
    """
    if add_to_outputs is not None and not isinstance(add_to_outputs, str):
        raise TypeError(f"add_to_outputs must be a string or None, got {add_to_outputs!r}")
    return add_to_outputs


def check_outputs(outputs: Any, key: str) -> None:
    """Refuse a step's output that the key cannot be added to.

    Raises:
        MisconfigurationException: Not a dict, or one that has the key already.
    """
    if not isinstance(outputs, MutableMapping):
        raise MisconfigurationException(
            f"add_to_outputs={key!r}: the step must return a dict such as {{'logits': logits}}, "
            f"got {type(outputs).__name__}"
        )
    if key in outputs:
        raise MisconfigurationException(
            f"add_to_outputs must be a key that the step does not return, got {key!r}"
        )


def check_whole(inputs: RefineInputs, key: str | None, metrics: Any) -> None:
    """Refuse volumes and overlapping classes where a label map is needed for each image.

    Raises:
        MisconfigurationException: As described.
    """
    for name, value in (("add_to_outputs", key), ("metrics", metrics)):
        if value is not None and len(inputs.parts) > 1:
            raise MisconfigurationException(
                f"{name} must be None for volumes and overlapping classes, got {value!r}"
            )


def add_labels(
    outputs: Any, key: str, inputs: RefineInputs, refinements: Sequence[Refinement | None]
) -> None:
    """Add label maps to a step's output, in place.

    They are (B, H, W) int64, or a list of B maps (H, W) if images differ in size.

    Args:
        outputs: A dict, see `check_outputs`.
        key: Where they go.
        inputs: B samples.
        refinements: B refinements, None for a sample that keeps its raw labels.
    """
    labels: list[Tensor] = [
        raw if refinement is None else refinement.labels
        for raw, refinement in zip(inputs.labels, refinements, strict=True)
    ]
    one_size = len({tuple(one.shape) for one in labels}) == 1
    outputs[key] = torch.stack(labels) if one_size else labels


class Prediction:
    """A predict run: batches are refined, without targets, and nothing is measured.

    Args:
        pl_module: The user's module; forward hooks stay on it until `close`.
        state: The run's SAM.
        key: Where the refined label maps go in the step's output.
    """

    def __init__(self, pl_module: LightningModule, state: RunState, key: str) -> None:
        state.begin(pl_module)
        self._state, self._key = state, key
        self._capture = ScoresCapture(pl_module, state.num_classes)

    def arm(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        """Note a batch before the module's step, and capture the scores of the step."""
        self._capture.arm(batch, dataloader_idx)

    def take(
        self, trainer: Trainer, batch: Any, outputs: Any, batch_idx: int, dataloader_idx: int
    ) -> None:
        """Refine a batch after the module's step; one that cannot be read gets no label maps.

        Raises:
            MisconfigurationException: See `check_outputs`.
        """
        check_outputs(outputs, self._key)
        inputs = self._state.read(batch, outputs, self._capture, dataloader_idx)
        if inputs is not None:
            check_whole(inputs, self._key, None)
            refinements, _ = self._state.refine(inputs, dataloader_idx)
            add_labels(outputs, self._key, inputs, refinements)

    def close(self) -> None:
        """Take the forward hooks off the module."""
        self._capture.remove()
