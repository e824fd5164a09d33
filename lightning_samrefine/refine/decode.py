"""Encodes images and decodes prompts, in chunks that fit the memory (docs/algorithm4.md, 0 and 7).

All functions run under the autocast of their caller.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_samrefine.config import RefineConfig
from lightning_samrefine.models.base import (
    Embedding,
    JointPromptable,
    Promptable,
    Prompts,
    can_skip_padding,
)
from lightning_samrefine.refine.mask_predictions import finite_iou, non_finite_error
from lightning_samrefine.refine.mask_proposals import MaskProposals, pack_masks
from lightning_samrefine.utils.memory import ChunkSize
from lightning_samrefine.utils.precision import active_autocast, rounded

# Four prompts at once fit a core's cache: faster than one, eight and forty (measured, FP32, BF16).
_CPU_PROMPTS = 4
# The published function's largest b_size, which it reduces by the driver's free memory. That does
# not work here: torch's allocator keeps memory freed by training, so that prompts would be decoded
# one at a time after an epoch.
_GPU_PROMPTS = 32


def prompts_at_once(device: torch.device) -> int:
    """Return the number of prompts to decode at once if memory allows it (step 7).

    The same on every run; `ChunkSize` halves it if memory runs out.
    """
    return _GPU_PROMPTS if device.type == "cuda" else _CPU_PROMPTS


def images_at_once(device: torch.device, count: int) -> int:
    """Return how many of ``count`` images are split into regions before they are encoded.

    One on CUDA, so that the CPU splits an image while the GPU encodes the one before; all of them
    on other devices, which do not overlap and may be faster with images encoded together.
    """
    return 1 if device.type == "cuda" else max(1, count)


def encode_images(
    sam: Promptable, images: Sequence[Tensor], chunks: ChunkSize, padding: bool = True
) -> list[Embedding]:
    """Encode images, all in one call if memory allows.

    Floats are rounded to the autocast's dtype: a stored embedding, which is kept in that dtype,
    has the same bits as a new one.

    Args:
        sam: The model.
        images: (3, H, W) uint8 each.
        chunks: Halves the number of images at once if memory runs out.
        padding: Whether to encode the padding of the model's square input, if the model can do
            without.
    """
    dtype = active_autocast(sam.device)

    def encode(start: int, stop: int) -> list[Embedding]:
        if not padding and can_skip_padding(sam):
            return sam.encode_images(images[start:stop], padding=False)
        return sam.encode_images(images[start:stop])

    encoded = chunks.run(len(images), len(images), encode)
    return [rounded(embedding, dtype) for _, _, part in encoded for embedding in part]


@dataclass(frozen=True)
class Decoded:
    """A model's output for the N prompts on one image.

    Attributes:
        pred_iou: (N,) float32 on the CPU.
        low_res_logits: N maps (m, m) float32; empty if the masks are packed.
        packed: The N masks, a twentieth of the logits' bytes; None if the logits are kept.
    """

    pred_iou: Tensor
    low_res_logits: Sequence[Tensor] = ()
    packed: MaskProposals | None = None


def decodes_jointly(sam: Promptable, config: RefineConfig) -> bool:
    """Whether prompts on several images share a batch: they keep a GPU busy, not a CPU core.

    ``max_prompts_per_batch`` makes batches equal from run to run, so with it they do not depend on
    which images come together either.
    """
    on_gpu = sam.device.type == "cuda"
    return on_gpu and config.max_prompts_per_batch is None and isinstance(sam, JointPromptable)


def decode_prompts(
    sam: Promptable,
    embeddings: Sequence[Embedding],
    prompts: Sequence[Prompts],
    size: int,
    chunks: ChunkSize,
    packed_hw: Sequence[tuple[int, int]] | None = None,
) -> list[Decoded]:
    """Decode the prompts on K images, the last of one image and the first of the next together.

    Args:
        sam: The model; a `JointPromptable` if K > 1.
        embeddings: K of them.
        prompts: As many; N_k ≥ 1 each.
        size: Number of prompts decoded at once.
        chunks: Halves that number if memory runs out.
        packed_hw: K × (h_n, w_n), the part of the logits that each image fills: masks are packed
            chunk by chunk, so that a batch's logits are never held together. None keeps logits.

    Raises:
        FloatingPointError: Non-finite SAM outputs.
    """
    if not prompts:
        return []
    ends = np.cumsum([len(own) for own in prompts]).tolist()
    ious: list[Tensor] = []
    logits: list[Tensor] = []
    packed: list[list[Tensor]] = [[] for _ in prompts]

    def predict(start: int, stop: int) -> tuple[Tensor, Tensor]:
        parts = list(_parts_by_image(ends, start, stop))
        chosen = [embeddings[k] for k, _, _ in parts]
        own = [prompts[k].chunk(first, last) for k, first, last in parts]
        if isinstance(sam, JointPromptable) and len(parts) > 1:
            return sam.predict_masks_jointly(chosen, own)
        return sam.predict_masks(chosen[0], own[0])

    for start, stop, (chunk_logits, chunk_iou) in chunks.run(ends[-1], size, predict):
        ious.append(finite_iou(chunk_iou.float(), chunk_logits.float()))
        if packed_hw is None:
            logits.extend(chunk_logits.float())
            continue
        parts = list(_parts_by_image(ends, start, stop))
        logits_of_parts = chunk_logits.split([last - first for _, first, last in parts])
        for (k, _, _), of_part in zip(parts, logits_of_parts, strict=True):
            rows, columns = packed_hw[k]
            packed[k].append(pack_masks(of_part[:, :rows, :columns]))
        del chunk_logits, logits_of_parts, of_part  # before the next chunk is decoded
    on_device = torch.cat(ious)
    pred_iou = on_device.cpu()
    if not bool(pred_iou.isfinite().all()):
        raise non_finite_error(sam)
    own = [slice(end - len(of_image), end) for end, of_image in zip(ends, prompts, strict=True)]
    if packed_hw is None:
        return [Decoded(pred_iou[part], low_res_logits=logits[part]) for part in own]
    return [
        Decoded(pred_iou[part], packed=MaskProposals(torch.cat(masks), on_device[part], mask_hw))
        for part, masks, mask_hw in zip(own, packed, packed_hw, strict=True)
    ]


def _parts_by_image(ends: Sequence[int], start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Yield the images to which prompts ``start`` to ``stop`` belong, and their range in each."""
    begin = 0
    for k, end in enumerate(ends):
        first, last = max(begin, start) - begin, min(end, stop) - begin
        if first < last:
            yield k, first, last
        begin = end
