"""Random weights, embeddings and prompts for mask decoders."""

from __future__ import annotations

import torch
from tiny_random_sam import WEIGHT_GAIN, build_random_sam
from torch import Tensor, nn

from lightning_samrefine.models.base import Prompts


def shaken(sam: nn.Module, seed: int = 0) -> nn.Module:
    """Return a model whose biases and norms are far from their initial values.

    The random SAM's gain is taken back, for with it float32 alone is off by 1e-4; the logits'
    standard deviation becomes 4.
    """
    sam.eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for part in (sam.prompt_encoder, sam.mask_decoder):
        for weight in part.parameters():
            if weight.ndim == 1:
                weight.add_(0.3 * torch.randn(weight.shape, generator=generator))
    if type(sam.image_encoder).__module__ == build_random_sam.__module__:
        for module in sam.mask_decoder.modules():
            if isinstance(module, nn.Linear):
                module.weight.div_(WEIGHT_GAIN)
    logits, _ = official(sam, draw_embedding(sam), draw_prompts(sam, 2, 2))
    last = sam.mask_decoder.output_hypernetworks_mlps[0].layers[-1]
    last.weight.mul_(4 / logits.std())
    last.bias.mul_(4 / logits.std())
    return sam


def draw_prompts(sam: nn.Module, count: int, classes: int, seed: int = 0) -> Prompts:
    generator = torch.Generator().manual_seed(seed)
    size, side = sam.image_encoder.img_size, sam.prompt_encoder.mask_input_size[0]
    corners = torch.rand(count, 2, 2, generator=generator) * size
    low, high = corners.amin(dim=1), corners.amax(dim=1)
    return Prompts(
        boxes=torch.cat([low, high], dim=1),
        points=low + (high - low) * torch.rand(count, 2, generator=generator),
        masks=torch.rand(classes, side, side, generator=generator) * 8,
        mask_index=torch.randint(0, classes, (count,), generator=generator),
    )


def draw_embedding(sam: nn.Module, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    side = sam.prompt_encoder.image_embedding_size
    return torch.randn(1, sam.prompt_encoder.embed_dim, *side, generator=generator)


@torch.no_grad()
def official(sam: nn.Module, embedding: Tensor, prompts: Prompts) -> tuple[Tensor, Tensor]:
    sparse, dense = sam.prompt_encoder(
        points=(prompts.points[:, None], torch.ones(len(prompts), 1)),
        boxes=prompts.boxes,
        masks=prompts.masks[prompts.mask_index][:, None],
    )
    logits, pred_iou = sam.mask_decoder(
        image_embeddings=embedding,
        image_pe=sam.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=False,
    )
    return logits[:, 0], pred_iou[:, 0]
