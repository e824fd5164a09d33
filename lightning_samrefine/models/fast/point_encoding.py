"""Positional encodings of clicks, boxes and image tokens, equal to segment-anything's.

Two differences to its code: every click is positive, so there is no boolean index, which would
synchronize with the GPU. And coordinates are multiplied by the random matrix element by element: in
a matrix product TF32 would round them to ten bits if
``torch.set_float32_matmul_precision("high")`` is set, which moves a click by pixels.
`exact_coordinates` does the same in the prompt encoders of other models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from segment_anything.modeling.prompt_encoder import PositionEmbeddingRandom, PromptEncoder
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_samrefine.utils.precision import autocast

_PRODUCTS = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)


def prompt_tokens(encoder: PromptEncoder, points: Tensor | None, boxes: Tensor | None) -> Tensor:
    """Return the sparse prompt embeddings of N prompts.

    Args:
        encoder: Its random matrix and embeddings are used.
        points: (N, 2) float32 XY in the model's input frame, one positive click for each prompt.
        boxes: (N, 4) float32 XYXY in the same frame. One of the two may be None.

    Returns:
        (N, P, C) float32: the click, then the corners of the box or the token for "no box".
    """
    height, width = encoder.input_image_size
    tokens = []
    if points is not None:
        click = _encode(encoder.pe_layer, _relative(points[:, None], height, width))
        tokens.append(click + encoder.point_embeddings[1].weight)
    if boxes is None:
        assert points is not None  # `Prompts` has at least one of the two
        padding = encoder.not_a_point_embed.weight
        tokens.append(padding.expand(len(points), 1, -1))
    else:
        corners = _encode(encoder.pe_layer, _relative(boxes.reshape(-1, 2, 2), height, width))
        kinds = torch.stack([encoder.point_embeddings[i].weight[0] for i in (2, 3)])
        tokens.append(corners + kinds)
    return torch.cat(tokens, dim=1)


def dense_encoding(encoder: PromptEncoder) -> Tensor:
    """Return (1, C, h, w) float32, the encoding of every image token's center."""
    height, width = encoder.image_embedding_size
    device = encoder.not_a_point_embed.weight.device
    y = ((torch.arange(height, device=device) + 0.5) / height)[:, None].expand(height, width)
    x = ((torch.arange(width, device=device) + 0.5) / width).expand(height, width)
    return _encode(encoder.pe_layer, torch.stack([x, y], dim=-1)).permute(2, 0, 1)[None]


@contextmanager
def exact_coordinates(device: torch.device) -> Iterator[None]:
    """Make a model's own prompt encoder multiply coordinates in float32, whatever is set.

    TF32 is a setting of the whole process, so products over two elements are replaced; only this
    layer of a promptable model has them. Autocast is switched off.

    Args:
        device: Device of the model.
    """
    with autocast(None, device), _ElementwiseProducts():
        yield


class _ElementwiseProducts(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in _PRODUCTS and not kwargs and args[0].shape[-1] == 2 and args[1].ndim == 2:
            return _project(*args)
        return func(*args, **(kwargs or {}))


def _project(coordinates: Tensor, matrix: Tensor) -> Tensor:
    """Return (…, 2) coordinates times a (2, F) matrix, without a matrix product."""
    return coordinates[..., :1] * matrix[0] + coordinates[..., 1:] * matrix[1]


def _relative(points: Tensor, height: int, width: int) -> Tensor:
    """Return pixel centers as fractions of the input's sides."""
    # Python numbers instead of a tensor, which would have to be uploaded.
    x, y = (points + 0.5).unbind(dim=-1)
    return torch.stack([x / width, y / height], dim=-1)


def _encode(layer: PositionEmbeddingRandom, positions: Tensor) -> Tensor:
    """Return (..., C) sines and cosines of (..., 2) XY positions in [0, 1]."""
    matrix = layer.positional_encoding_gaussian_matrix
    phases = 2 * math.pi * _project(2 * positions.float() - 1, matrix)
    return torch.cat([phases.sin(), phases.cos()], dim=-1)
