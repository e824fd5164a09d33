"""The one interface between the refiner and any promptable model."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, TypeGuard, runtime_checkable

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Prompts:
    """N prompts for one image, in the model's own frames (docs/algorithm4.md, steps 5 and 6).

    Of ``boxes`` and ``points`` at least one is given.

    Attributes:
        boxes: (N, 4) float32 XYXY in the frame of the resized image; None prompts no box.
        points: (N, 2) float32 XY in the same frame, one positive click each; None prompts none.
        masks: (K, m, m) float32 mask-prompt logits, one for each class that has a region; None
            prompts no mask.
        mask_index: (N,) int64 in [0, K), the row of ``masks`` that each prompt uses; None with it.

    Raises:
        ValueError: Neither boxes nor points, or only one of masks and mask_index.
    """

    boxes: Tensor | None
    points: Tensor | None
    masks: Tensor | None = None
    mask_index: Tensor | None = None

    def __post_init__(self) -> None:
        if self.boxes is None and self.points is None:
            raise ValueError("boxes or points must be given, got None twice")
        if (self.masks is None) != (self.mask_index is None):
            raise ValueError("masks and mask_index must be given together, got one of them")

    def __len__(self) -> int:
        if self.boxes is not None:
            return self.boxes.shape[0]
        assert self.points is not None  # by __post_init__
        return self.points.shape[0]

    def chunk(self, start: int, stop: int) -> Prompts:
        """Return prompts start to stop; they keep all K masks."""

        def part(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[start:stop]

        return Prompts(part(self.boxes), part(self.points), self.masks, part(self.mask_index))


# What the backend of a model returns for an image; only that backend reads it.
Embedding: TypeAlias = Any


@runtime_checkable
class Promptable(Protocol):
    """A model that turns an image and prompts into masks and predicted IoUs.

    Optional members:

    - ``accepts_masks = False``: the model takes no mask prompts and gets `Prompts` without masks.
    - ``accepts_points = False``: a single point gets no useful mask; regions are prompted instead
      of a point grid, mask prompts included.
    - ``has_multimask_output = False``: `predict_masks` has one mask a prompt only; regions are
      prompted instead of a point grid, as in preset ``fast``.
    - ``predict_masks_jointly``: see `JointPromptable`.
    - ``encode_images(images, padding=True)``: see `UnpaddedPromptable`.
    - ``drop_derived()``: drops the copies and products of the weights that the model keeps between
      calls; called if the weights may have changed, and at the end of a run.

    Frames differ between models, hence `input_hw`, `mask_hw` and `postprocess_masks`; the two in
    use are in `lightning_samrefine.models.transforms`. `lightning_samrefine.testing` checks a model
    of yours.
    """

    @property
    def name(self) -> str:
        """Short name for logs, such as ``"vit_t"``."""
        ...

    @property
    def module(self) -> nn.Module:
        """The underlying torch module; the refiner never trains it."""
        ...

    @property
    def image_size(self) -> int:
        """Side in pixels of the model's square input."""
        ...

    @property
    def mask_size(self) -> int:
        """Side m of its mask prompts and low-resolution logits."""
        ...

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        ...

    def input_hw(self, image_hw: tuple[int, int]) -> tuple[int, int]:
        """Return (h_in, w_in), the size to which an image of size (H, W) is resized."""
        ...

    def mask_hw(self, image_hw: tuple[int, int]) -> tuple[int, int]:
        """Return (h_n, w_n), the part of a mask prompt that an image of size (H, W) fills."""
        ...

    def encode_images(self, images: Sequence[Tensor]) -> list[Embedding]:
        """Encode images, each uint8 (3, H, W) RGB of its own size (step 0).

        Returns:
            One embedding an image, opaque to the caller. An `EmbeddingCache` keeps tensors and
            tuples of tensors.
        """
        ...

    def predict_masks(
        self, embedding: Embedding, prompts: Prompts, multimask_output: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Predict the masks of N ≥ 1 prompts on one image, all in one batch (step 7).

        Returns:
            Low-resolution logits (N, m, m) float32 and predicted IoU (N,) float32; with
            ``multimask_output`` SAM's three masks for an ambiguous prompt, such as a point:
            (N, 3, m, m) and (N, 3).
        """
        ...

    def postprocess_masks(self, low_res_logits: Tensor, image_hw: tuple[int, int]) -> Tensor:
        """Bring (N, m, m) logits to (N, H, W) float32 (step 9)."""
        ...


@runtime_checkable
class JointPromptable(Promptable, Protocol):
    """A `Promptable` that predicts masks on several images in one batch, for a busier GPU."""

    def predict_masks_jointly(
        self, embeddings: Sequence[Embedding], prompts: Sequence[Prompts]
    ) -> tuple[Tensor, Tensor]:
        """Predict masks on K images, N_k ≥ 1 prompts on each.

        Args:
            embeddings: K of them, as `encode_images` returns them.
            prompts: As many; either all have masks or none has, and the same of boxes and points.

        Returns:
            What `predict_masks` returns for each, one after the other: (Σ N_k, m, m) and (Σ N_k,).
        """
        ...


class UnpaddedPromptable(Promptable, Protocol):
    """A `Promptable` that can encode an image without the padding of its square input.

    Without it the encoder has less work on an image that is not square, and masks differ a little.
    A model whose `encode_images` has no ``padding`` always encodes it.
    """

    def encode_images(self, images: Sequence[Tensor], padding: bool = True) -> list[Embedding]:
        """Encode images, each uint8 (3, H, W) RGB of its own size (step 0).

        Args:
            images: The images.
            padding: Whether the padding is encoded as well, as published.

        Returns:
            One embedding an image, for the same `predict_masks` and with the same frames.
        """
        ...


def can_skip_padding(sam: Promptable) -> TypeGuard[UnpaddedPromptable]:
    """Return whether a model's `encode_images` has the parameter of `UnpaddedPromptable`."""
    return "padding" in inspect.signature(sam.encode_images).parameters


def accepts_masks(sam: Promptable) -> bool:
    """Return whether a model takes mask prompts; True if it does not declare it."""
    return bool(getattr(sam, "accepts_masks", True))


def accepts_points(sam: Promptable) -> bool:
    """Return whether single points get useful masks; True if the model does not declare it."""
    return bool(getattr(sam, "accepts_points", True))


def has_multimask_output(sam: Promptable) -> bool:
    """Return whether a model predicts three masks a prompt; True if it does not declare it."""
    return bool(getattr(sam, "has_multimask_output", True))


def drop_derived(sam: Promptable) -> None:
    """Drop what a model keeps between calls; one without the method keeps nothing."""
    drop = getattr(sam, "drop_derived", None)
    if drop is not None:
        drop()
