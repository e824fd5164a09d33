"""Volumes: their slices along an axis are the images that SAM sees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_samrefine.adapters.candidates import IMAGE_NAMES
from lightning_samrefine.adapters.nested import (
    MAX_DEPTH,
    Samples,
    at_key,
    at_position,
    entries,
    named,
)
from lightning_samrefine.utils.validation import as_integer


@dataclass(frozen=True)
class Slices:
    """The volumes of a batch and the axis along which they are sliced.

    Attributes:
        volumes: B.
        spatial: Their three sizes.
        axis: Axis of (B, c, D, H, W) that is sliced: 2, 3 or 4.
    """

    volumes: int
    spatial: tuple[int, int, int]
    axis: int

    @property
    def depth(self) -> int:
        """Number of slices of a volume."""
        return self.spatial[self.axis - 2]

    @property
    def names(self) -> tuple[str, ...]:
        """The slices' names, in their order."""
        return tuple(f"slice_{index:03d}" for index in range(self.depth))

    def __str__(self) -> str:
        return f"{self.volumes} volumes of {self.depth} slices along axis {self.axis}"

    def cut(self, container: Any, level: int = 0) -> Any:
        """Return a batch or output with slices in place of volumes, at the same keys.

        Tensors (B, c, D, …) with as many slices as the image become (B · D, c, …), those of the
        image's three sizes without channels (B · D, …); others stay.
        """
        if isinstance(container, Tensor):
            return self._cut(container)
        held = entries(container) if level <= MAX_DEPTH else []
        if not held:
            return container
        values = [self.cut(value, level + 1) for _, value in held]
        if isinstance(container, list | tuple) and not hasattr(container, "_fields"):
            return type(container)(values) if type(container) in (list, tuple) else tuple(values)
        return {key: value for (key, _), value in zip(held, values, strict=True)}

    def _cut(self, value: Tensor) -> Tensor:
        if len(value.shape) == 0 or len(value) != self.volumes:
            return value
        if value.ndim == 5 and value.shape[self.axis] == self.depth:
            return value.movedim(self.axis, 1).flatten(0, 1)
        if value.ndim == 4 and tuple(value.shape[1:]) == self.spatial:
            return value.movedim(self.axis - 1, 1).flatten(0, 1)
        return value


def find_slices(
    container: Any, key: str | None, axis: int, shows: Callable[[Samples], bool]
) -> Slices | None:
    """Find the image of a batch, and return its slices if it is a volume.

    Args:
        container: The batch or the step's output.
        key: The user's key of the image, None for the usual names and the first position.
        axis: Axis of (B, c, D, H, W) that is sliced.
        shows: Whether a tensor has the shape of images, see `Denormalize.shows`.

    Returns:
        None if an image has two dimensions, or if no volume is found.
    """
    if key is not None:
        found = [at_key(container, key)]
    elif isinstance(container, Tensor):
        found = [at_key((container,), "0")]
    else:
        found = [*named(container, IMAGE_NAMES), at_position(container, 0)]
    images = [leaf.value for leaf in found if leaf is not None and isinstance(leaf.value, Tensor)]
    volumes = [one for one in images if one.ndim == 5 and shows(one.select(axis, 0))]
    if not volumes or any(one.ndim == 4 and shows(one) for one in images):
        return None
    size = volumes[0].shape
    return Slices(size[0], (size[2], size[3], size[4]), axis)


def checked_axis(axis: int) -> int:
    """Return the axis as 2, 3 or 4.

    Raises:
        TypeError: Not an integer.
        ValueError: Not an axis of depth, height or width.
    """
    required = "slice_axis must be 2, 3 or 4 of (B, C, D, H, W), or -3, -2 or -1"
    number = as_integer(axis)
    if number is None:
        raise TypeError(f"{required}, got {axis!r}")
    if number not in (2, 3, 4, -3, -2, -1):
        raise ValueError(f"{required}, got {axis!r}")
    return number % 5
