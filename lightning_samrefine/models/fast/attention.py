"""Attention over SAM's image tokens, in slices of scores that fit into a cache."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_samrefine.utils.precision import autocast

# Number of attention scores of one head at a time: 16 MiB fit into a CPU's last-level cache. A GPU
# computes a whole 64×64 grid in one kernel.
_CPU_SCORES = 2**22
_GPU_SCORES = 2**24
# In bf16 scores and weights, 2 MiB each, fit together into a core's own cache.
_CPU_SCORES_BF16 = 2**20

Bias = Callable[[Tensor, int, int], Tensor | None]


def relative_positions(query: Tensor, rel_h: Tensor, rel_w: Tensor) -> tuple[Tensor, Tensor]:
    """Return the decomposed relative positions' terms of the scores (arXiv 2112.01526, eq. 4).

    They are (N, heads, h, w, K_h) and (N, heads, h, w, K_w), for queries (N, heads, h, w, d) that
    are not scaled and embeddings of rows (≥ h, K_h, d) and columns (≥ w, K_w, d).
    """
    height, width = query.shape[2:4]
    by_row = torch.einsum("nshwd,hkd->nshwk", query, rel_h[:height])
    by_column = torch.einsum("nshwd,wkd->nshwk", query, rel_w[:width])
    return by_row, by_column


def global_attention(qkv: Tensor, rel_pos: tuple[Tensor, Tensor] | None) -> Tensor:
    """Attend over the whole grid, one slice of the scores at a time.

    Relative positions can also be folded into the head dimension (queries [q·s, q·R_h, q·R_w],
    keys [k, one-hot row, one-hot column]), without any bias. On a CPU in float32 this took 2.2
    times as long: it triples the products' depth, while adding to a slice in the cache is nearly
    free.

    Args:
        qkv: (B, h, w, 3, heads, d).
        rel_pos: (h, h, d) and (w, w, d), or None.

    Returns:
        (B, h, w, heads·d).
    """
    batch, height, width, _, heads, depth = qkv.shape
    query, key, value = qkv.flatten(1, 2).permute(2, 0, 3, 1, 4)
    if _by_products(qkv):
        key, value = key.contiguous(), value.contiguous()
    if rel_pos is None:
        attended = F.scaled_dot_product_attention(query, key, value)
        return attended.transpose(1, 2).reshape(batch, height, width, heads * depth)

    on_cpu = qkv.device.type == "cpu"
    group = min(heads, torch.get_num_threads()) if on_cpu else heads
    keys = height * width
    scores = _GPU_SCORES
    if on_cpu:
        scores = _CPU_SCORES_BF16 if _by_products(query) else _CPU_SCORES
    rows = max(1, scores // (width * keys))
    out = qkv.new_empty(batch, height, width, heads, depth)
    for image in range(batch):
        by_row, by_column = relative_positions(
            query[image, None].unflatten(2, (height, width)), *rel_pos
        )
        for head, row in product(range(0, heads, group), range(0, height, rows)):
            part = (slice(None), slice(head, head + group), slice(row, row + rows))
            bias = by_row[part][..., :, None] + by_column[part][..., None, :]
            chosen = (slice(image, image + 1), slice(head, head + group))
            queries = (*chosen, slice(row * width, (row + rows) * width))
            attended = _attend(
                query[queries],
                key[chosen],
                value[chosen],
                bias.flatten(4).flatten(2, 3),
            )
            out[image, row : row + rows, :, head : head + group] = (
                attended[0].permute(1, 0, 2).unflatten(0, (-1, width))
            )
    return out.flatten(3)


def window_attention(qkv: Tensor, padding: Tensor, window: int, bias: Bias) -> Tensor:
    """Attend within windows; those at the right and bottom edge may be partly padding.

    Padding is included in keys and values, as in the reference, but not in queries.

    Args:
        qkv: (B, h, w, 3, heads, d), real tokens only.
        padding: (3, heads, d), query, key and value of a padded token.
        window: Side of a window.
        bias: Function from queries (N, heads, rows·columns, d) of the top left rows × columns of
            their windows to a new tensor, added to the scores, (N or 1, heads, rows·columns,
            window²).

    Returns:
        (B, h, w, heads·d).
    """
    batch, height, width, _, heads, depth = qkv.shape
    out = qkv.new_empty(batch, height, width, heads, depth)
    for (top, down, rows), (left, across, columns) in product(
        _bands(height, window), _bands(width, window)
    ):
        area = (
            slice(None),
            slice(top, top + down * rows),
            slice(left, left + across * columns),
        )
        tokens = qkv[area].unflatten(2, (across, columns)).unflatten(1, (down, rows))
        tokens = tokens.permute(5, 0, 1, 3, 6, 2, 4, 7)
        query = tokens[0].reshape(-1, heads, rows * columns, depth)
        key_value = tokens[1:]
        if rows < window or columns < window:
            key_value = padding[1:, None, None, None, :, None, None].expand(
                2, batch, down, across, heads, window, window, depth
            )
            key_value = key_value.clone()
            key_value[..., :rows, :columns, :] = tokens[1:]
        key, value = key_value.reshape(2, -1, heads, window * window, depth)
        attended = _attend(query, key, value, bias(query, rows, columns))
        target = out[area].unflatten(2, (across, columns)).unflatten(1, (down, rows))
        target.permute(0, 1, 3, 5, 2, 4, 6).copy_(
            attended.view(batch, down, across, heads, rows, columns, depth)
        )
    return out.flatten(3)


def _bands(size: int, window: int) -> list[tuple[int, int, int]]:
    """Split a side into (start, number of windows, their extent): whole windows, then a rest."""
    whole, rest = divmod(size, window)
    bands = [(0, whole, window), (whole * window, 1, rest)]
    return [band for band in bands if band[1] > 0 and band[2] > 0]


def _by_products(query: Tensor) -> bool:
    """Whether matrix products are faster than torch's fused kernel: on a CPU in bf16."""
    return query.device.type == "cpu" and query.dtype == torch.bfloat16


def _attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    """Return softmax(q·kᵀ / √d + bias)·v, (N, heads, Q, d).

    The bias, (N or 1, heads, Q, K) or None, may be overwritten.
    """
    if bias is None or not _by_products(query):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    count = max(1, _CPU_SCORES_BF16 // bias[0].numel())
    out = torch.empty_like(query)
    scale = 1 / math.sqrt(query.shape[-1])
    # Autocast would return the softmax in float32; internally it is computed in float32 anyway.
    with autocast(None, query.device):
        for start in range(0, len(query), count):
            part = slice(start, start + count)
            q, k, v = (tensor[part].flatten(0, 1) for tensor in (query * scale, key, value))
            scores = bias.expand(len(query), -1, -1, -1)[part].flatten(0, 1)
            weights = scores.baddbmm_(q, k.mT).softmax(dim=-1)
            out[part] = torch.bmm(weights, v).unflatten(0, (-1, query.shape[1]))
    return out
