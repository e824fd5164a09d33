"""Checks targets: class indices and the ignored value only, or an error that suggests the fix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from lightning_samrefine.adapters.candidates import Found, items, shares_memory
from lightning_samrefine.adapters.layouts.overlapping import overlaps
from lightning_samrefine.adapters.nested import Samples
from lightning_samrefine.utils.validation import WrongValuesError, as_integer, some_of

DEFAULT_IGNORE_INDEX = 255

IgnoreIndex: TypeAlias = int | Literal["auto"] | None
"""A target value that is not counted, None for none, or ``"auto"``: 255 unless it is a class."""

_CITYSCAPES_IDS = range(-1, 34)
_CITYSCAPES_CLASSES = 19


def parse_ignore_index(value: Any) -> IgnoreIndex:
    """Return an integer, ``"auto"`` or None.

    Raises:
        TypeError: Anything else.
    """
    if value is None:
        return None
    if isinstance(value, str) and value == "auto":
        return "auto"
    number = as_integer(value)
    if number is None:
        raise TypeError(f"ignore_index must be an integer, 'auto' or None, got {value!r}")
    return number


def settle_ignore_index(value: IgnoreIndex, num_classes: int) -> int | None:
    """Return the ignored value that applies to a number of classes.

    Raises:
        TypeError: Not an integer, ``"auto"`` or None.
        ValueError: ``"auto"`` if 255 is a class, which no metric would count.
    """
    value = parse_ignore_index(value)
    if value != "auto":
        return value
    if num_classes > DEFAULT_IGNORE_INDEX:
        raise ValueError(
            f"ignore_index must be set where num_classes={num_classes}, got its default "
            f"{DEFAULT_IGNORE_INDEX}, which is one of the classes: set ignore_index=None if every "
            "pixel is annotated, or to the value of pixels without annotation"
        )
    return DEFAULT_IGNORE_INDEX


class TargetCheck:
    """Raises if targets hold anything but class indices and the ignored value.

    A metric would leave such pixels out or crash on them. The message lists a few of the values,
    their share of the batch's pixels, and the likely fix.

    With the default ignored value 255, masks of 0 and 255 would have no foreground. They raise as
    well, until a pixel of another class occurs in the loader: from then on 255 can only mean "not
    annotated". With more than two classes, so do images without any annotation.

    Args:
        num_classes: C.
        ignore_index: See `IgnoreIndex`.

    Attributes:
        ignore_index: The value that applies.

    Raises:
        ValueError: The default ignored value is one of the classes.
    """

    def __init__(self, num_classes: int, ignore_index: IgnoreIndex) -> None:
        self.num_classes = num_classes
        self.ignore_index = settle_ignore_index(ignore_index, num_classes)
        self._in_doubt = ignore_index == "auto"
        self._with_classes: set[int] = set()
        self._predicted_foreground: set[int] = set()
        self._predicted_background: set[int] = set()

    def __call__(self, targets: Samples, loader: int = 0) -> None:
        """Check the targets of a batch.

        Args:
            targets: B × (H, W) int64.
            loader: Index of the dataloader.

        Raises:
            WrongValuesError: As described.
        """
        maps = [targets] if isinstance(targets, Tensor) else targets
        ignore_index = self.ignore_index
        if self._in_doubt and loader not in self._with_classes:
            both = [torch.stack([one == 0, (one != 0) & (one != 255)]).flatten(1) for one in maps]
            zeros, classes = torch.stack([one.any(dim=1) for one in both]).any(dim=0).tolist()
            if classes:
                self._with_classes.add(loader)
            elif zeros or self.num_classes == 2:
                ignore_index = None
        if any(holds_others(one, self.num_classes, ignore_index) for one in maps):
            values = torch.cat([one.flatten() for one in maps])
            raise WrongValuesError(describe_others(values, self.num_classes, ignore_index))

    def against(self, target: Found, others: Sequence[Found]) -> None:
        """Raise if a step evaluates other classes than those of the target in the batch.

        Args:
            target: The target as the dataloader yields it.
            others: What the step made of it: in place, or among what it returned. Maps of other
                shapes and those with fractions are no class indices.

        Raises:
            WrongValuesError: Annotated pixels have another class.
        """
        for other in others:
            if shares_memory(target.value, other.value):
                continue
            pairs = zip(items(target.value), items(other.value), strict=False)
            share = max((self._share_differing(*pair) for pair in pairs), default=0.0)
            if share > 0:
                mend = f"set target_key={other.key!r}"
                if other.key == target.key:
                    mend = "map the labels in the data set, or return them and set target_key"
                raise WrongValuesError(
                    f"target must be one tensor, got 2 that differ in {100 * share:.3g}% of the "
                    f"annotated pixels: {target} before the step; {other} after it. "
                    f"target_key={target.key!r} takes the former; for the latter {mend}"
                )

    def _share_differing(self, target: Tensor, other: Tensor) -> float:
        """Return the share of a batch's annotated pixels whose class differs, in [0, 1]."""
        if target.numel() != other.numel() or target.shape[-2:] != other.shape[-2:]:
            return 0.0
        try:
            before, after = (
                whole_numbers(one.to(target.device), "target").flatten() for one in (target, other)
            )
        except ValueError:
            return 0.0
        counted = ~_others(before, self.num_classes, None)
        if self.ignore_index is not None:
            counted &= before != self.ignore_index
        differing = counted & (before != after)
        wrong, total = torch.stack([differing.sum(), counted.sum()]).tolist()
        return wrong / max(total, 1)

    def predictions(self, labels: Samples, loader: int = 0) -> None:
        """Check predicted label maps.

        Unknown pixels, which are never counted as correct, have the ignored value or one of
        `without_unknown`. With two classes, 255 may be the foreground and a negative value the
        background, until the class has occurred in a loader.

        Args:
            labels: B × (H, W) int64.
            loader: Index of the dataloader.

        Raises:
            WrongValuesError: Other values; or 255 occurs, and 1 has not occurred so far.
        """
        maps = [labels] if isinstance(labels, Tensor) else labels
        known = torch.cat([without_unknown(one, self.num_classes) for one in maps])
        if holds_others(known, self.num_classes, self.ignore_index):
            raise WrongValuesError(
                describe_others(known, self.num_classes, self.ignore_index, "a predicted label map")
            )
        if self.num_classes != 2:
            return
        if loader not in self._predicted_background:
            if any(bool((one == 0).any()) for one in maps):
                self._predicted_background.add(loader)
            elif any(bool((one == 1).any() & (one < 0).any()) for one in maps):
                raise WrongValuesError(
                    "scores must be 0 and 1 where they are label maps of two classes, got 1 and "
                    "negative values, and no pixel of 0: negative values are unknown pixels"
                )
        if loader in self._predicted_foreground:
            return
        if any(bool((one == 1).any()) for one in maps):
            self._predicted_foreground.add(loader)
        elif any(bool((one == 255).any()) for one in maps):
            raise WrongValuesError(
                "scores must be 0 and 1 where they are label maps of two classes, got 255 and no "
                "pixel of 1: divide masks of 0 and 255 by 255, or call unknown pixels -1"
            )


def without_unknown(labels: Tensor, num_classes: int) -> Tensor:
    """Return the values of a predicted label map, flattened, without those of unknown pixels.

    These are negative ones, and unless they are classes 255, and 65,535 and above.
    """
    unknown = (labels < 0) | (labels >= max(num_classes, 65_535))
    if num_classes <= 255:
        unknown |= labels == 255
    return labels[~unknown]


def holds_others(labels: Tensor, num_classes: int, ignore_index: int | None) -> bool:
    """Whether an integer label map holds more than class indices and the ignored value."""
    if labels.numel() == 0:
        return False
    low, high = torch.stack(torch.aminmax(labels)).tolist()
    if low >= 0 and high < num_classes:
        return False
    return bool(_others(labels, num_classes, ignore_index).any())


def describe_others(
    labels: Tensor, num_classes: int, ignore_index: int | None, name: str = "target"
) -> str:
    """Describe the values that are neither classes nor ignored, and how to fix them.

    Args:
        labels: Integer tensor of any shape.
        num_classes: C.
        ignore_index: The ignored value, or None.
        name: First word of the sentence.
    """
    others = _others(labels, num_classes, ignore_index)
    share = float(others.double().mean())
    ignored = "" if ignore_index is None else f" and ignore_index={ignore_index}"
    found = labels.unique()
    if ignore_index is not None:
        found = found[found != ignore_index]
    values = found.tolist()
    outside = [value for value in values if not 0 <= value < num_classes]
    return (
        f"{name} must hold class indices 0 to {num_classes - 1}{ignored}, got {some_of(outside)} "
        f"in {100 * share:.3g}% of the pixels. {mend(values, num_classes)}"
    )


def mend(values: Sequence[int], num_classes: int) -> str:
    """Return the likely fix for label values that include some outside the classes.

    Args:
        values: The distinct values, ascending, without the ignored one.
        num_classes: C ≥ 2.
    """
    low, high = values[0], values[-1]
    outside = [value for value in values if not 0 <= value < num_classes]
    step = 255 // (num_classes - 1)
    if step > 1 and all(value in range(0, 256, step) for value in values):
        what = "masks of 0 and 255" if num_classes == 2 else f"gray levels {step} apart"
        return (
            f"These look like {what}: divide them by {step}, or set ignore_index={outside[0]} if "
            "that marks pixels without annotation"
        )
    if low == 1 and high == num_classes:
        return (
            f"These look like labels 1 to {num_classes}: subtract 1 (reduce_labels in "
            "transformers and MMSegmentation)"
        )
    if low == 0 and high == num_classes:
        return (
            f"0 to {num_classes} are {num_classes + 1} values: set num_classes={num_classes + 1}, "
            f"or ignore_index={num_classes} if that marks pixels without annotation, or subtract 1 "
            "and ignore what was 0 (reduce_labels)"
        )
    if num_classes == _CITYSCAPES_CLASSES and low in _CITYSCAPES_IDS and high in _CITYSCAPES_IDS:
        return (
            "These look like the raw ids of Cityscapes: use the labelTrainIds files, or map "
            "labelIds to train ids"
        )
    if len(outside) == 1:
        return (
            f"Set ignore_index={outside[0]} if that marks pixels without annotation; otherwise map "
            "the labels to class indices, or set num_classes to their number"
        )
    return (
        "Map the labels to class indices; set ignore_index to the value of pixels without "
        "annotation, and num_classes to the number of classes"
    )


def to_labels(target: Tensor, labels: Tensor) -> Tensor:
    """Convert a target to (B, H, W) int64.

    Args:
        target: (B, H, W) or (B, 1, H, W): integer, bool, or float that holds whole numbers.
        labels: (B, H, W), the prediction, whose shape it must have.

    Raises:
        ValueError: Another shape, fractions, NaN or infinity.
    """
    maps = target[:, 0] if target.ndim == 4 and target.shape[1] == 1 else target
    if maps.shape != labels.shape:
        raise ValueError(
            "target must be (B, H, W) or (B, 1, H, W) with the image's "
            f"{tuple(labels.shape)}, got shape {tuple(target.shape)}{_shape_hint(target, labels)}"
        )
    return whole_numbers(maps, "target")


def _shape_hint(target: Tensor, labels: Tensor) -> str:
    if target.ndim == 4 and target.shape[0] == len(labels) and target.shape[2:] == labels.shape[1:]:
        if overlaps(target):
            return (
                f". These look like multi-hot targets of {target.shape[1]} classes that overlap: "
                "set scores_kind='multilabel'"
            )
        return (
            f". These look like {target.shape[1]} channels of one-hot targets: argmax them over "
            "dim 1, in the dataset or an adapter, or set scores_kind='multilabel' if classes may "
            "overlap"
        )
    return "; targets of another size need an adapter"


def whole_numbers(labels: Tensor, name: str) -> Tensor:
    """Convert a label map of any dtype to int64, if that is exact.

    Args:
        labels: Integer, bool, or float that holds whole numbers, of any shape.
        name: First word of the error.

    Raises:
        ValueError: Fractions, NaN or infinity, or complex numbers.
    """
    if labels.is_complex():
        raise ValueError(f"{name} must be integers, got dtype {labels.dtype}")
    if not labels.is_floating_point():
        return labels.to(torch.int64)
    # Infinity equals itself rounded, and its conversion to an integer is undefined.
    if not bool(((labels == labels.round()) & labels.isfinite()).all()):
        low, high = torch.stack(torch.aminmax(labels.float())).tolist()
        raise ValueError(
            f"{name} must be whole numbers (class indices), got {labels.dtype} with fractions, NaN "
            f"or infinity ({low:.4g} to {high:.4g}){_hint(labels.float())}"
        )
    return labels.to(torch.int64)


def _hint(labels: Tensor) -> str:
    """Return how the class indices may have been lost."""
    scaled = labels * 255
    if bool(((scaled - scaled.round()).abs() < 1e-3).all()) and bool((labels.abs() <= 1).all()):
        return (
            ". These look like indices divided by 255, as ToTensor does: multiply by 255 and "
            "round, or use PILToTensor for masks"
        )
    return " (a mask that was resized bilinearly or scaled to [0, 1] has lost them)"


def _others(labels: Tensor, num_classes: int, ignore_index: int | None) -> Tensor:
    others = (labels < 0) | (labels >= num_classes)
    if ignore_index is not None:
        others &= labels != ignore_index
    return others
