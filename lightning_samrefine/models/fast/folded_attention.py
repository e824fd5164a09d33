"""Attention between few tokens and SAM's image tokens, with all projections applied to the few.

With X the image tokens and W_k a head's key weights, q·(X W_k)ᵀ = (q W_kᵀ)·Xᵀ, and likewise for
values, queries and outputs: image tokens are never projected.
"""

from __future__ import annotations

import math

import torch
from segment_anything.modeling.transformer import Attention
from torch import Tensor, nn


def attend_to_image(attention: Attention, q: Tensor, keys: Tensor, pe_keys: Tensor) -> Tensor:
    """Attend from tokens q (N, P, C), with positional encoding, to image tokens (N, T, C) without.

    ``pe_keys`` (H, d, T) is the image tokens' encoding as keys. The bias of the keys adds the same
    value to all scores of a query, so softmax cancels it; that of the values is added once, because
    softmax sums to 1.
    """
    q = project(attention.q_proj, q, attention) * query_scale(attention)
    scores = folded_scores(q, pe_keys, attention.k_proj.weight, keys.mT)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(scores.dtype)
    mean = (weights @ keys).unflatten(1, (attention.num_heads, -1))
    value = unfold(mean, attention.v_proj.weight).transpose(1, 2).flatten(2)
    return attention.out_proj(value + attention.v_proj.bias)


def folded_scores(x: Tensor, constant: Tensor, weight: Tensor, channels: Tensor) -> Tensor:
    """Return (N, H · P, T) scores of tokens against the image: x·constant + (x·weight)·channels.

    The tokens x (N, H, P, d) are projected and scaled. Prompts share the ``constant`` (H, d, T);
    each has ``channels`` (N, K, T) of its own, with the projection ``weight`` (H · d, K).
    """
    return torch.baddbmm(per_head(x, constant).flatten(1, 2), fold(x, weight), channels)


def softmax_over_tokens(scores: Tensor, attention: Attention) -> Tensor:
    """Normalize (N, H · P, T) scores over the P tokens of a head."""
    heads = scores.unflatten(1, (attention.num_heads, -1))
    return heads.softmax(dim=2, dtype=torch.float32).to(scores.dtype).flatten(1, 2)


def token_outputs(attention: Attention, queries: Tensor) -> Tensor:
    """Return (N, H · P, C), the output of an image token that attends to one token only.

    The bias of the output is added to the first head, whose weights sum to 1 as well.
    """
    v = project(attention.v_proj, queries, attention)
    outputs = fold(v, attention.out_proj.weight.T).unflatten(1, (attention.num_heads, -1))
    bias = torch.zeros_like(outputs[:1, :, :1])
    bias[:, 0] = attention.out_proj.bias
    return (outputs + bias).flatten(1, 2)


def query_scale(attention: Attention) -> float:
    """Return 1 / √d, with d the channels of a head."""
    return 1 / math.sqrt(attention.internal_dim // attention.num_heads)


def project(linear: nn.Linear, tokens: Tensor, attention: Attention) -> Tensor:
    """Project (N, P, C) tokens to (N, H, P, d)."""
    return linear(tokens).unflatten(2, (attention.num_heads, -1)).transpose(1, 2)


def fold(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply (N, H, P, d) by each head's (d, C) of a (H · d, C) matrix: (N, H · P, C)."""
    return per_head(x, weight.unflatten(0, (x.shape[1], -1))).flatten(1, 2)


def unfold(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply (N, H, P, C) by each head's (C, d) of a (H · d, C) matrix: (N, H, P, d)."""
    return per_head(x, weight.unflatten(0, (x.shape[1], -1)).mT)


def per_head(x: Tensor, matrices: Tensor) -> Tensor:
    """Multiply (N, H, P, K) by (H, K, L), one matrix per head for all N: (N, H, P, L).

    Or by (N, H, K, L), one matrix per head and prompt.
    """
    if matrices.ndim == 4:
        return x @ matrices
    count, heads, tokens, _ = x.shape
    product = x.transpose(0, 1).flatten(1, 2) @ matrices
    return product.view(heads, count, tokens, -1).transpose(0, 1)
