"""Every image encoder of `benchmarks.speed`, and the floor under them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from segment_anything.modeling import ImageEncoderViT
from torch import Tensor, nn

from benchmarks.speed_clock import seconds
from lightning_samrefine.models.sam import SamPromptable
from lightning_samrefine.utils.precision import autocast, autocast_dtype

Costs = dict[str, list[float]]
UNIT = "segment-anything, float32"


@torch.no_grad()
def measure_encoders(sam: SamPromptable, costs: Costs) -> None:
    """Time one forward of every encoder once."""
    device, encoder = sam.device, sam.module.image_encoder
    inputs = torch.randn(1, 3, sam.image_size, sam.image_size, device=device)
    dtype = autocast_dtype("bf16-mixed", device)

    def under(cast: torch.dtype | None, run: Callable[[Tensor], Any]) -> float:
        with autocast(cast, device):
            return seconds(device, lambda: run(inputs))

    costs[UNIT].append(under(None, encoder))
    costs["segment-anything, bf16 autocast"].append(under(dtype, encoder))
    peer = _transformers_encoder(sam, device)
    if peer is not None:
        costs["transformers SamModel, float32"].append(under(None, peer))
        costs["transformers SamModel, bf16 autocast"].append(under(dtype, peer))
    costs["ours, float32"].append(under(None, sam._encode))
    costs["ours, bf16 autocast"].append(under(dtype, sam._encode))
    if isinstance(encoder, ImageEncoderViT):
        for name, kind in (("float32", torch.float32), ("bf16", dtype)):
            products = _matrix_products(encoder, kind, device)
            costs[f"floor: its matrix products alone, {name}"].append(seconds(device, products))


def _matrix_products(
    encoder: ImageEncoderViT, dtype: torch.dtype, device: torch.device
) -> Callable[[], None]:
    """Return a run of all matrix products that an encoder cannot do without, on random numbers.

    What lies beyond this on a machine is copies, additions, softmax and norms.
    """
    side = encoder.img_size // encoder.patch_embed.proj.stride[0]
    dim, tokens = encoder.pos_embed.shape[-1], side * side
    x = torch.randn(tokens, dim, device=device, dtype=dtype)
    wide = torch.randn(tokens, 4 * dim, device=device, dtype=dtype)
    weight = torch.randn(dim, 4 * dim, device=device, dtype=dtype)
    attention = []
    for block in encoder.blocks:
        heads = block.attn.num_heads
        keys = block.window_size**2 or tokens
        # Windows at the edges hold fewer queries, yet padding counts among their keys.
        query = torch.randn(heads, min(tokens, 512), dim // heads, device=device, dtype=dtype)
        key = torch.randn(heads, keys, dim // heads, device=device, dtype=dtype)
        attention.append((query, key, max(1, tokens // query.shape[1])))

    def run() -> None:
        for query, key, parts in attention:
            torch.mm(x, weight[:, : 3 * dim])
            torch.mm(x, weight[:, :dim])
            torch.mm(x, weight)
            torch.mm(wide, weight.T)
            for _ in range(parts):
                torch.bmm(torch.bmm(query, key.mT), key)

    return run


def _transformers_encoder(sam: SamPromptable, device: torch.device) -> nn.Module | None:
    """Return transformers' vision encoder of the same size, random weights; None without it."""
    try:
        from transformers import SamVisionConfig, SamVisionModel
    except ImportError:
        return None
    if sam.name != "vit_b":
        return None
    if not hasattr(_transformers_encoder, "made"):
        _transformers_encoder.made = SamVisionModel(SamVisionConfig()).to(device).eval()
    return _transformers_encoder.made
