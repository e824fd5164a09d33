"""Candidate tensors with their places, and checks of their shapes and values."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from lightning_samrefine.adapters.nested import Leaf, Samples, describe, leaves, named

HOOK_KEY = "forward"
IMAGE_NAMES = (
    "image", "images", "img", "imgs", "pixel_values", "input", "inputs", "x",
)  # fmt: skip
TARGET_NAMES = (
    "mask", "masks", "target", "targets", "label", "labels", "gt", "ground_truth", "seg",
    "segmentation", "semantic", "semantic_mask", "semantic_seg", "seg_mask", "annotation", "y",
)  # fmt: skip
# In a step's output the other names are as likely to hold a prediction.
TARGET_NAMES_IN_OUTPUTS = ("target", "targets", "gt", "ground_truth", "y", "y_true")


@dataclass(frozen=True)
class Found:
    """A tensor, or a list of them, and its place.

    Attributes:
        source: ``"batch"``, ``"outputs"`` (of the step), ``"forward"`` (a hook), ``"adapter"``, or
            the call of a module, such as ``"self.teacher(…)"``.
        path: Its keys and indices in the source.
        value: The tensor or list.
    """

    source: str
    path: tuple[str | int, ...]
    value: Samples

    @property
    def place(self) -> str:
        """Its place in words, such as ``batch['image']``."""
        if self.source == "forward":
            return "forward hook"
        return self.source + "".join(f"[{part!r}]" for part in self.path)

    @property
    def key(self) -> str:
        """The value of ``image_key``, ``target_key`` or ``scores_key`` that selects it, if any."""
        if self.source.startswith("self"):
            return ""
        return HOOK_KEY if self.source == "forward" else ".".join(map(str, self.path))

    def __str__(self) -> str:
        return f"{self.place} {describe(self.value)}"


@dataclass(frozen=True)
class Roles:
    """The tensors found for each role, None for none."""

    image: Found | None
    target: Found | None
    scores: Found | None

    def places(self) -> Roles:
        """Return the places without the tensors."""
        found = (self.image, self.target, self.scores)
        return Roles(*(one and replace(one, value=[]) for one in found))


def of(source: str, found: Iterable[Leaf | None]) -> list[Found]:
    """Attach the source to tensors; None is left out."""
    return [Found(source, leaf.path, leaf.value) for leaf in found if leaf is not None]


def after_step(target: Found, batch: Any, outputs: Any) -> list[Found]:
    """Return what a step made of the batch's target: at its place, and in what it returned.

    Args:
        target: The target as the dataloader yields it.
        batch: The batch after the step.
        outputs: The step's output.
    """
    if target.source != "batch":
        return []
    here = [leaf for leaf in leaves(batch) if leaf.path == target.path]
    return [*of("batch", here), *of("outputs", named(outputs, TARGET_NAMES_IN_OUTPUTS))]


def ambiguous(role: str, candidates: Sequence[Found]) -> NoReturn:
    """Raise an error that lists the candidates and the arguments that select one."""
    listed = "; ".join(map(str, candidates))
    keys = " or ".join(f"{role}_key={one.key!r}" for one in candidates if one.key)
    different = " that give different labels" if role == "scores" else ""
    bare = any(not one.key for one in candidates)
    raise ValueError(
        f"{role} must be one tensor, got {len(candidates)}{different}: {listed}. Name the right "
        f"one with {keys}" + (", or return it under a name, such as {'logits': …}" if bare else "")
    )


def distinct(candidates: Iterable[Found]) -> list[Found]:
    """Remove candidates with the same values as an earlier one."""
    kept: list[Found] = []
    for one in candidates:
        if not any(equal(one.value, other.value) for other in kept):
            kept.append(one)
    return kept


def equal(one: Samples, other: Samples) -> bool:
    """Whether shapes, dtypes and values are equal."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one is other or (
            one.shape == other.shape
            and one.dtype == other.dtype
            and one.device == other.device
            and torch.equal(one, other)
        )
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return False
    return len(one) == len(other) and all(map(equal, one, other))


def is_copy(value: Samples, original: Samples) -> bool:
    """Whether values equal another tensor's, ignoring dtype and a channel dimension of 1."""
    if not isinstance(value, Tensor) or not isinstance(original, Tensor):
        return equal(value, original)
    flat = [item.squeeze(1) if item.ndim == 4 else item for item in (value, original)]
    if flat[0].shape != flat[1].shape:
        return False
    return torch.equal(flat[0].detach().float(), flat[1].detach().to(value.device).float())


def shares_memory(one: Samples, other: Samples) -> bool:
    """Whether tensors start at the same memory address."""
    return any(
        first.numel() > 0
        and first.device == second.device
        and first.data_ptr() == second.data_ptr()
        for first, second in zip(items(one), items(other), strict=False)
    )


def same_size(one: Found, other: Found) -> bool:
    """Whether numbers of samples, heights and widths are equal."""
    if len(one.value) != len(other.value):
        return False
    pairs = zip(one.value, other.value, strict=True)
    return all(first.shape[-2:] == second.shape[-2:] for first, second in pairs)


def is_image(value: Samples) -> bool:
    """Whether a value has the shape of RGB or gray images."""
    if isinstance(value, Tensor):
        return value.ndim == 4 and value.shape[1] in (1, 3)
    return all(item.ndim == 3 and item.shape[0] in (1, 3) for item in value)


def is_single(image: Tensor) -> bool:
    """Whether a tensor has the shape of one RGB or gray image, and a dtype unusual for labels."""
    is_typed = image.is_floating_point() or image.dtype == torch.uint8
    return is_typed and image.ndim == 3 and image.shape[0] in (1, 3) and min(image.shape[1:]) > 3


def is_target(value: Samples) -> bool:
    """Whether a value has the shape of label maps."""
    if isinstance(value, Tensor):
        return value.ndim == 3 or (value.ndim == 4 and value.shape[1] == 1)
    return all(item.ndim == 2 or item.shape[0] == 1 for item in value)


def has_pixels(value: Samples) -> bool:
    """Whether a value has enough dimensions for a batch of maps."""
    return not isinstance(value, Tensor) or value.ndim >= 3


def items(value: Samples) -> list[Tensor]:
    """Return batches: the tensor itself, or each list entry as a batch of one."""
    return [value] if isinstance(value, Tensor) else [item[None] for item in value]


def hint_at_missing(missing: Sequence[str], batch: Any) -> str:
    """Return a sentence about mistakes that are visible in a batch's shapes, else ``""``."""
    found = of("batch", leaves(batch))
    images = [one for one in found if is_image(one.value)]
    if "image" in missing and len(images) > 1:
        keys = " or ".join(f"image_key={one.key!r}" for one in images)
        return f"The batch has {len(images)} images: name the one that SAM sees, with {keys}. "
    if not images and any(isinstance(one.value, Tensor) and is_single(one.value) for one in found):
        return (
            "Tensors must have a batch dimension, got what looks like one sample: a DataLoader "
            "with batch_size=None yields these, one with batch_size=1 batches of one. "
        )
    return ""
