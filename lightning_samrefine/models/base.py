"""The one interface between the refiner and any promptable model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

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
            raise ValueError("boxes, points: got None twice, accepted is at least one of them")
        if (self.masks is None) != (self.mask_index is None):
            raise ValueError("masks, mask_index: got one without the other, accepted is both")

    def __len__(self) -> int:
        given = self.points if self.boxes is None else self.boxes
        return given.shape[0]

    def chunk(self, start: int, stop: int) -> Prompts:
        """Return prompts start to stop; they keep all K masks."""

        def part(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[start:stop]

        return Prompts(part(self.boxes), part(self.points), self.masks, part(self.mask_index))


def join(prompts: Sequence[Prompts]) -> Prompts:
    """Return boxes and points of several images' prompts as those of one; masks are left out.

    Args:
        prompts: All with boxes or all without, and the same of points.
    """

    def joined(name: str) -> Tensor | None:
        parts = [getattr(own, name) for own in prompts]
        return None if parts[0] is None else torch.cat(parts)

    return Prompts(joined("boxes"), joined("points"))


@runtime_checkable
class Promptable(Protocol):
    """A model that turns an image and prompts into masks and predicted IoUs.

    Four members are optional. ``accepts_masks = False`` says that the model takes no mask prompts:
    it then gets `Prompts` without masks, and the log says so. ``decode_multimask(embedding,
    prompts)`` returns SAM's three masks, (N, 3, m, m) float32 logits, with their predicted IoU,
    (N, 3) float32. ``decode_images(embeddings, prompts)`` decodes prompts on several images in one
    batch, see `JointPromptable`. ``drop_derived()`` drops the copies and products of the weights
    that the model keeps between calls: the weights may have changed, or the run is over.

    Frames differ between models, hence `input_hw`, `mask_hw` and `upscale`; the two in use are in
    `lightning_samrefine.models.transforms`. `lightning_samrefine.testing` checks a model of yours.

    Attributes:
        name: Short name for logs, such as ``"vit_t"``.
        module: The underlying torch module; the refiner never trains it.
        image_size: Side in pixels of the model's square input.
        mask_size: Side m of its mask prompts and low-resolution logits.
    """

    name: str
    module: nn.Module
    image_size: int
    mask_size: int

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

    def embed(self, images: Sequence[Tensor]) -> list[Any]:
        """Embed images, each uint8 (3, H, W) RGB of its own size (step 0).

        Returns:
            One embedding an image, opaque to the caller. An `EmbeddingCache` keeps tensors and
            tuples of tensors.
        """
        ...

    def decode(self, embedding: Any, prompts: Prompts) -> tuple[Tensor, Tensor]:
        """Decode N ≥ 1 prompts on one image, all in one batch (step 7).

        Returns:
            Low-resolution logits (N, m, m) float32 and predicted IoU (N,) float32.
        """
        ...

    def upscale(self, low_res_logits: Tensor, image_hw: tuple[int, int]) -> Tensor:
        """Bring (N, m, m) logits to (N, H, W) float32 (step 9)."""
        ...


def accepts_masks(sam: Promptable) -> bool:
    """Say whether a model takes mask prompts; one that does not say so does."""
    return bool(getattr(sam, "accepts_masks", True))


def drop_derived(sam: Promptable) -> None:
    """Let a model drop what it keeps between calls; one without the method keeps nothing."""
    drop = getattr(sam, "drop_derived", None)
    if drop is not None:
        drop()


@runtime_checkable
class MultimaskPromptable(Promptable, Protocol):
    """A `Promptable` that also gives SAM's three masks for an ambiguous prompt, such as a point.

    Image-driven masks need it. A model that has the method, but answers single points badly, says
    so with ``accepts_points = False``; its regions are prompted instead, masks included.
    """

    def decode_multimask(self, embedding: Any, prompts: Prompts) -> tuple[Tensor, Tensor]:
        """Decode N ≥ 1 prompts on one image, three masks each.

        Returns:
            Low-resolution logits (N, 3, m, m) float32 and predicted IoU (N, 3) float32.
        """
        ...


@runtime_checkable
class JointPromptable(Promptable, Protocol):
    """A `Promptable` that decodes prompts on several images in one batch, for a busier GPU."""

    def decode_images(
        self, embeddings: Sequence[Any], prompts: Sequence[Prompts]
    ) -> tuple[Tensor, Tensor]:
        """Decode prompts on K images, N_k ≥ 1 on each.

        Args:
            embeddings: K of them, as `embed` returns them.
            prompts: As many; either all have masks or none has, and the same of boxes and points.

        Returns:
            What `decode` returns for each, one after the other: (Σ N_k, m, m) and (Σ N_k,).
        """
        ...
