"""Image encoders with random weights."""

from __future__ import annotations

from functools import partial

import torch
from segment_anything.modeling import ImageEncoderViT
from torch import nn


def randomize(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter and statistic a value that shows when it is left out."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.named_parameters():
            if tensor.ndim == 1:
                offset = float(name.endswith("weight"))
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.5 + offset)
            elif any(part in name for part in ("rel_pos", "pos_embed", "attention_biases")):
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
        for name, tensor in module.named_buffers():
            if name.endswith("running_mean"):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
            if name.endswith("running_var"):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return module.eval().requires_grad_(False)


def vit(window: int, seed: int = 0, **options) -> ImageEncoderViT:
    """Four blocks on an 8×8 grid, every other one global."""
    defaults = {
        "img_size": 128,
        "embed_dim": 48,
        "depth": 4,
        "num_heads": 3,
        "out_chans": 24,
        "use_rel_pos": True,
        "global_attn_indexes": (1, 3),
        "norm_layer": partial(nn.LayerNorm, eps=1e-6),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return randomize(ImageEncoderViT(window_size=window, **(defaults | options)), seed)
