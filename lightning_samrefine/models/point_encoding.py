"""Positional encodings of clicks, boxes and image tokens, as segment-anything computes them.

Two things differ from its code. Every click is positive, so no boolean index makes the CPU wait for
the GPU. And coordinates meet the random matrix element by element: as a matrix product TF32 would
round them to ten bits, which moves a click by pixels, wherever
``torch.set_float32_matmul_precision("high")`` is set.
"""

from __future__ import annotations

import math

import torch
from segment_anything.modeling.prompt_encoder import PositionEmbeddingRandom, PromptEncoder
from torch import Tensor


def prompt_tokens(encoder: PromptEncoder, points: Tensor | None, boxes: Tensor | None) -> Tensor:
    """Return the sparse prompt embeddings of N prompts.

    Args:
        encoder: Its random matrix and embeddings.
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


def _relative(points: Tensor, height: int, width: int) -> Tensor:
    """Return pixel centers as fractions of the input's sides."""
    # As sides of Python numbers: a tensor of them would have to be uploaded.
    x, y = (points + 0.5).unbind(dim=-1)
    return torch.stack([x / width, y / height], dim=-1)


def _encode(layer: PositionEmbeddingRandom, positions: Tensor) -> Tensor:
    """Return (..., C) sines and cosines of (..., 2) XY positions in [0, 1]."""
    matrix = layer.positional_encoding_gaussian_matrix
    centered = 2 * positions.float() - 1
    phases = centered[..., :1] * matrix[0] + centered[..., 1:] * matrix[1]
    phases = 2 * math.pi * phases
    return torch.cat([phases.sin(), phases.cos()], dim=-1)
