"""Parts of SAM's mask decoder computed once for its weights and for an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightning_samrefine.models.base import Prompts
from lightning_samrefine.models.fingerprint import Identity


@dataclass(frozen=True)
class ModelSide:
    """Products that depend on the weights only: T image tokens, H heads of d channels.

    Attributes:
        pe_keys: One (H, d, T) for each attention to the image after the first layer, including the
            final attention: keys of the positional encoding.
        pe_queries: One (H, d, T) for each attention from the image after the first layer: queries
            of the positional encoding, with their bias.
        up1: (4 · C/4, C), the first transposed convolution as a matrix.
        up1_bias: (4 · C/4,).
        up2: (4 · C/8, C/4), the second one.
        up2_bias: (4 · C/8,).
    """

    pe_keys: list[Tensor]
    pe_queries: list[Tensor]
    up1: Tensor
    up1_bias: Tensor
    up2: Tensor
    up2_bias: Tensor


@dataclass(frozen=True)
class ImageSide:
    """Products of an image; all include the dense prompt, or its bias with a mask prompt.

    For prompts on several images there are N of each, see `beside`.

    Attributes:
        tokens: (1, T, C), the embedding E.
        keys: (H, d, T), the first layer's keys with positional encoding, without bias.
        values: (H, T, d), its values with bias.
        queries: (H, d, T), its queries with positional encoding and bias.
    """

    tokens: Tensor
    keys: Tensor
    values: Tensor
    queries: Tensor


Side = TypeVar("Side", ModelSide, ImageSide)


@dataclass(frozen=True)
class Memo:
    """The constant parts of the latest call, and the identity of their inputs."""

    state: tuple[Any, ...]
    model: ModelSide
    embedding: Identity
    image: ImageSide


def beside(memos: Sequence[Memo], prompts: Sequence[Prompts]) -> ImageSide:
    """Return the image sides of several images, each repeated for every one of its prompts.

    Returns:
        (N, T, C) tokens, and N keys, values and queries, with N the number of all prompts.
    """

    def rows(name: str) -> Tensor:
        parts = []
        for memo, own in zip(memos, prompts, strict=True):
            side = getattr(memo.image, name)
            side = side if name == "tokens" else side[None]
            parts.append(side.expand(len(own), *side.shape[1:]))
        return torch.cat(parts)

    return ImageSide(**{field.name: rows(field.name) for field in fields(ImageSide)})


def cast(side: Side, dtype: torch.dtype) -> Side:
    """Return a side with its tensors in the dtype of the matrix products."""

    def convert(value: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        return [v.to(dtype) for v in value] if isinstance(value, list) else value.to(dtype)

    changed: dict[str, Any] = {f.name: convert(getattr(side, f.name)) for f in fields(side)}
    return replace(side, **changed)
