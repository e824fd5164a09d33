"""Faster forward passes of image encoders, with the same weights and the same output."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any, TypeAlias, cast

import torch
import torch.nn.functional as F
from segment_anything.modeling import ImageEncoderViT
from segment_anything.modeling.common import LayerNorm2d
from segment_anything.modeling.image_encoder import Block
from timm.models.tiny_vit import ConvNorm, MBConv, PatchMerging, TinyVitBlock
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from lightning_samrefine.models.fast.attention import (
    global_attention,
    relative_positions,
    window_attention,
)
from lightning_samrefine.models.fingerprint import all_weights, stamp
from lightning_samrefine.models.tiny import TinyImageEncoder
from lightning_samrefine.models.tiny_vit import TinyVitEncoder
from lightning_samrefine.utils.precision import active_autocast

# Maximum number of elements of an intermediate on the CPU. Larger blocks are requested from the
# system every time (glibc's mmap threshold ends at 32 MiB), and their page faults cost as much as
# the arithmetic.
_CPU_ELEMENTS = 2**22
# Side of the empty square whose middle is the embedding of padding: a window of ViT and TinyViT.
_EMPTY_PATCHES = 14


class FastImageEncoder:
    """Runs a fast forward pass of an image encoder, or its own if there is no fast one.

    - segment-anything's `ImageEncoderViT`: scores are computed in slices of one head, padding is
      not projected, and additions are in place. No weight is copied.
    - `TinyVitEncoder` and `TinyImageEncoder`: batch normalizations are folded into a copy of the
      convolutions, made at the first call and again after the weights have moved or changed.

    The module is not changed and can still be called directly; the fast passes ignore its hooks.

    Args:
        encoder: The module, in eval mode.
    """

    def __init__(self, encoder: nn.Module) -> None:
        self.encoder = encoder
        self._folded: nn.Module | None = None
        self._fingerprint: tuple[tuple[Any, ...], ...] = ()
        self._padding: tuple[tuple[Any, ...], Tensor] | None = None

    def drop_derived(self) -> None:
        """Drop the folded copy and the embedding of padding."""
        self._folded, self._fingerprint, self._padding = None, (), None

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Embed (B, 3, S, S) float, normalized and padded, as (B, D, h_e, w_e).

        An encoder that `takes_parts` also embeds the top left patches of the square alone, as if
        nothing were right of and below them: positions keep their meaning.

        The dtype is that of the module's own forward, also under autocast.
        """
        # The exact type: a subclass may override forward.
        kind = type(self.encoder)
        if kind is ImageEncoderViT:
            return _vit(self.encoder, images)
        if kind is TinyVitEncoder:
            return _tiny_vit(cast(TinyVitEncoder, self._without_batch_norm()), images)
        if kind is TinyImageEncoder:
            return self._without_batch_norm()(images)
        return self.encoder(images)

    def of_padding(self, square: Tensor, patch: int) -> Tensor:
        """Embed padding: (1, D, 1, 1), from the middle of a window without an image.

        Kept for the same weights and precision.

        Args:
            square: (1, 3, S, S), any input; only its kind counts.
            patch: Side of a patch in pixels.
        """
        state = (active_autocast(square.device), *stamp(all_weights(self.encoder)))
        if self._padding is None or self._padding[0] != state:
            side = _EMPTY_PATCHES * patch
            embedded = self(torch.zeros_like(square[..., :side, :side]))
            middle = embedded.shape[-1] // 2
            self._padding = state, embedded[..., middle : middle + 1, middle : middle + 1].clone()
        return self._padding[1]

    def _without_batch_norm(self) -> nn.Module:
        """Return the folded copy, recomputed if the module's weights have changed."""
        fingerprint = stamp(all_weights(self.encoder))
        if self._folded is None or fingerprint != self._fingerprint:
            self._folded = _fold_batch_norms(copy.deepcopy(self.encoder))
            self._fingerprint = fingerprint
        return self._folded


def takes_parts(encoder: nn.Module) -> bool:
    """Return whether `FastImageEncoder` can embed a part of an encoder's square alone."""
    return type(encoder) in (ImageEncoderViT, TinyVitEncoder)


def _fold_batch_norms(module: nn.Module) -> nn.Module:
    """Replace every Conv2d followed by its BatchNorm2d in a Sequential, in place."""
    for child in module.modules():
        if not isinstance(child, nn.Sequential):
            continue
        names = list(child._modules)
        for first, second in pairwise(names):
            conv, norm = child._modules[first], child._modules[second]
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                child._modules[first] = fuse_conv_bn_eval(conv, norm)
                child._modules[second] = nn.Identity()
    return module.to(memory_format=torch.channels_last)


def _vit(encoder: ImageEncoderViT, images: Tensor) -> Tensor:
    """Run `ImageEncoderViT.forward` ("Segment Anything", arXiv 2304.02643, section 3)."""
    x = _patches(encoder.patch_embed.proj, images)
    if encoder.pos_embed is not None:
        x = x + encoder.pos_embed[:, : x.shape[1], : x.shape[2]]
    grid = encoder.img_size // encoder.patch_embed.proj.stride[0]
    for block in encoder.blocks:
        x.add_(block.attn.proj(_vit_attention(block, x, grid)))
        _add_mlp(x, block.norm2, block.mlp.lin1, block.mlp.act, block.mlp.lin2)
    return _neck(encoder.neck, x)


def _patches(conv: nn.Conv2d, images: Tensor) -> Tensor:
    """Embed patches that do not overlap as one matrix product: (B, 3, S, S) to (B, h, w, D)."""
    if conv.kernel_size != conv.stride or conv.padding != (0, 0):
        return conv(images).permute(0, 2, 3, 1).contiguous()
    rows, columns = conv.kernel_size
    height, width = images.shape[2] // rows, images.shape[3] // columns
    patches = images[:, :, : height * rows, : width * columns]
    patches = patches.unflatten(3, (width, columns)).unflatten(2, (height, rows))
    patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3)
    return F.linear(patches, conv.weight.flatten(1), conv.bias)


def _vit_attention(block: Block, x: Tensor, grid: int) -> Tensor:
    """Return attention's output before its projection, (B, h, w, D).

    Args:
        block: The block.
        x: (B, h, w, D).
        grid: Side of the whole square in tokens, for which relative positions were learned.
    """
    attn = block.attn
    height, width = x.shape[1:3]
    window = block.window_size
    qkv = attn.qkv(block.norm1(x)).unflatten(-1, (3, attn.num_heads, -1))
    rel_pos = None
    if attn.use_rel_pos:
        sides = (window, window) if window > 0 else (height, width)
        learned = window or grid
        rel_pos = (
            _relative_embeddings(sides[0], attn.rel_pos_h, learned),
            _relative_embeddings(sides[1], attn.rel_pos_w, learned),
        )
    if window == 0:
        return global_attention(qkv, rel_pos)

    def bias(query: Tensor, rows: int, columns: int) -> Tensor | None:
        if rel_pos is None:
            return None
        by_row, by_column = relative_positions(query.unflatten(2, (rows, columns)), *rel_pos)
        return (by_row[..., :, None] + by_column[..., None, :]).flatten(4).flatten(2, 3)

    # The windows are padded with zeros after the norm, and padded tokens are keys as well.
    padding = attn.qkv(x.new_zeros(1, x.shape[-1])).view(3, attn.num_heads, -1)
    return window_attention(qkv, padding, window, bias)


def _relative_embeddings(side: int, table: Tensor, learned: int) -> Tensor:
    """Return (side, side, d), the embedding of each query's position relative to each key's.

    segment-anything's `get_rel_pos` indexes with a CPU tensor, which synchronizes with the GPU
    twice per block.

    Args:
        side: Number of queries and of keys along one axis.
        table: (L, d), for ``learned`` positions: resized to 2 · learned - 1 rows if L differs.
        learned: Number of tokens along the axis of the whole square, or of a window.
    """
    learned = max(side, learned)
    rows = 2 * learned - 1
    if len(table) != rows:
        table = F.interpolate(table.T[None], rows, mode="linear")[0].T
    position = torch.arange(side, device=table.device)
    return table[position[:, None] - position + (learned - 1)]


def _add_mlp(x: Tensor, norm: nn.Module, first: nn.Linear, act: nn.Module, last: nn.Linear) -> None:
    """Add last(act(first(norm(x)))) to contiguous x (..., D) in place."""
    tokens = x.view(-1, x.shape[-1])
    rows = _rows_at_once(x.device, len(tokens), first.out_features)
    for part in tokens.split(rows):
        part.add_(last(_activate(act, first(norm(part)))))


def _rows_at_once(device: torch.device, rows: int, elements: int) -> int:
    """Return the number of rows to compute together, with ``elements`` elements each."""
    return max(1, min(rows, _CPU_ELEMENTS // elements)) if device.type == "cpu" else rows


def _activate(act: nn.Module, x: Tensor) -> Tensor:
    """Apply an activation; the exact GELU overwrites its input."""
    if type(act) is nn.GELU and act.approximate == "none":
        return torch.ops.aten.gelu_(x)
    return act(x)


_Neck: TypeAlias = tuple[nn.Conv2d, LayerNorm2d, nn.Conv2d, LayerNorm2d]


def _neck(neck: nn.Sequential, x: Tensor) -> Tensor:
    """Run SAM's neck on (B, h, w, D): with channels last its channel norm is a layer norm."""
    reduce, norm, mix, last_norm = cast(_Neck, tuple(neck))
    x = F.linear(x, reduce.weight.flatten(1), reduce.bias)
    x = F.layer_norm(x.float(), norm.weight.shape, norm.weight, norm.bias, norm.eps)
    x = mix(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    x = F.layer_norm(
        x.float(), last_norm.weight.shape, last_norm.weight, last_norm.bias, last_norm.eps
    )
    return x.permute(0, 3, 1, 2).contiguous()


def _tiny_vit(encoder: TinyVitEncoder, images: Tensor) -> Tensor:
    """Run `TinyVitEncoder.forward` with channels last and folded batch norms."""
    backbone = encoder.backbone
    stem = backbone.patch_embed
    x = _activate(stem.act, stem.conv1(images.contiguous(memory_format=torch.channels_last)))
    x = stem.conv2(x).permute(0, 2, 3, 1)
    for block in backbone.stages[0].blocks:
        x = _inverted_bottleneck(block, x)
    for stage in backbone.stages[1:]:
        x = _merge(stage.downsample, x)
        for block in stage.blocks:
            x = _tiny_vit_block(block, x)
    return _neck(encoder.neck, x)


def _pointwise(layer: ConvNorm, x: Tensor) -> Tensor:
    """Apply a folded 1×1 convolution to (B, h, w, D)."""
    return F.linear(x, layer.conv.weight.flatten(1), layer.conv.bias)


def _convolve(layer: ConvNorm, x: Tensor) -> Tensor:
    """Apply a folded convolution to (B, h, w, D)."""
    return layer.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def _inverted_bottleneck(block: MBConv, x: Tensor) -> Tensor:
    """Run the block in bands of rows; a 3×3 convolution needs one more row on each side."""
    batch, height, width, _ = x.shape
    rows = _rows_at_once(x.device, height, batch * width * block.conv1.conv.out_channels)
    out = torch.empty_like(x)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        above, below = int(top > 0), int(bottom < height)
        mid = _pointwise(block.conv1, x[:, top - above : bottom + below])
        mid = _convolve(block.conv2, _activate(block.act1, mid))
        mid = _activate(block.act2, mid[:, above : above + bottom - top])
        band = _pointwise(block.conv3, mid).add_(x[:, top:bottom])
        out[:, top:bottom] = _activate(block.act3, band)
    return out


def _merge(layer: PatchMerging, x: Tensor) -> Tensor:
    mid = _activate(layer.act1, _pointwise(layer.conv1, x))
    mid = _activate(layer.act2, _convolve(layer.conv2, mid))
    return _pointwise(layer.conv3, mid)


def _tiny_vit_block(block: TinyVitBlock, x: Tensor) -> Tensor:
    attn, window = block.attn, block.window_size
    qkv = attn.qkv(attn.norm(x)).unflatten(-1, (attn.num_heads, 3, attn.key_dim))
    # Padded before the norm here, so a padded token is the norm of zeros.
    padding = attn.qkv(attn.norm(x.new_zeros(1, x.shape[-1])))
    padding = padding.view(attn.num_heads, 3, attn.key_dim)
    # With three dimensions torch would select the attention kernel that materializes all scores.
    biases = attn.get_attention_biases(x.device)[None].unflatten(2, (window, window))

    def bias(query: Tensor, rows: int, columns: int) -> Tensor:
        return biases[:, :, :rows, :columns].flatten(2, 3).to(query.dtype, copy=True)

    attended = window_attention(qkv.transpose(3, 4), padding.transpose(0, 1), window, bias)
    x = _convolve(block.local_conv, attn.proj(attended).add_(x)).contiguous()
    mlp = block.mlp
    _add_mlp(x, mlp.norm, mlp.fc1, mlp.act, mlp.fc2)
    return x
