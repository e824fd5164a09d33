"""Asking a model about prompts, in chunks that fit it (docs/algorithm4.md, step 7)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_samrefine.config import RefineConfig
from lightning_samrefine.models.base import JointPromptable, Promptable, Prompts
from lightning_samrefine.refine.fusion.upscaling import extents
from lightning_samrefine.refine.mask_proposals import pack_masks
from lightning_samrefine.refine.non_finite import finite_iou, non_finite_error
from lightning_samrefine.utils.memory import ChunkSize
from lightning_samrefine.utils.precision import autocast, autocast_dtype


@dataclass(frozen=True)
class Decoded:
    """What a model says to the N prompts on one image.

    Attributes:
        low_res_logits: N maps (m, m) float32; empty if the masks are packed.
        pred_iou: (N,) float32 on the CPU.
        extents: (N, 2, m) bool, see `lightning_samrefine.refine.fusion.upscaling.extents`. None on
            a GPU, where whole frames cost less than the many small launches of windows.
        packed: (N, B) uint8 of `pack_masks`, a twentieth of the logits; None if they are kept.
    """

    low_res_logits: list[Tensor]
    pred_iou: Tensor
    extents: np.ndarray | None
    packed: Tensor | None = None


def decodes_jointly(sam: Promptable, config: RefineConfig) -> bool:
    """Whether prompts on several images share a batch: they keep a GPU busy, not a CPU core.

    ``max_prompts_per_batch`` asks for batches that are equal from run to run, so with it they do
    not depend on which images come together either.
    """
    on_gpu = sam.device.type == "cuda"
    return on_gpu and config.max_prompts_per_batch is None and isinstance(sam, JointPromptable)


def decode_prompts(
    sam: Promptable,
    embeddings: Sequence[Any],
    prompts: Sequence[Prompts],
    precision: str,
    size: int,
    chunks: ChunkSize,
    packed_hw: Sequence[tuple[int, int]] | None = None,
) -> list[Decoded]:
    """Decode the prompts on K images, the last of one image and the first of the next together.

    Args:
        sam: The model; a `JointPromptable` where K > 1.
        embeddings: K of them.
        prompts: As many; N_k ≥ 1 each.
        precision: See `autocast_dtype`.
        size: How many prompts to decode at once.
        chunks: Decodes fewer where memory runs out.
        packed_hw: K × (h_n, w_n), the part of the logits that each image fills: masks are packed
            chunk by chunk, so that a batch's logits are never held together. None keeps logits.

    Returns:
        K answers.

    Raises:
        FloatingPointError: A predicted IoU or a logit that is not finite.
    """
    if not prompts:
        return []
    device = sam.device
    ends = np.cumsum([len(own) for own in prompts]).tolist()
    logits, ious, masks_extents = [], [], []
    packed: list[list[Tensor]] = [[] for _ in prompts]

    def decode(start: int, stop: int) -> tuple[Tensor, Tensor]:
        parts = [
            (embeddings[k], prompts[k].chunk(first, last))
            for k, first, last in _of_images(ends, start, stop)
        ]
        if len(parts) == 1:
            return sam.predict_masks(*parts[0])
        return sam.predict_masks_jointly(*zip(*parts, strict=True))

    with autocast(autocast_dtype(precision, device), device):
        for start, stop, (chunk_logits, chunk_iou) in chunks.run(ends[-1], size, decode):
            ious.append(finite_iou(chunk_iou.float(), chunk_logits.float()))
            if packed_hw is not None:
                parts = list(_of_images(ends, start, stop))
                of_parts = chunk_logits.split([last - first for _, first, last in parts])
                for (k, _, _), logits_of_part in zip(parts, of_parts, strict=True):
                    rows, columns = packed_hw[k]
                    packed[k].append(pack_masks(logits_of_part[:, :rows, :columns]))
                del chunk_logits, of_parts, logits_of_part  # before the next chunk is decoded
                continue
            logits.extend(chunk_logits.float())
            if device.type == "cpu":
                masks_extents.append(extents(chunk_logits))
    on_cpu = torch.cat(masks_extents).numpy() if masks_extents else None
    pred_iou = torch.cat(ious).cpu()
    if not bool(pred_iou.isfinite().all()):
        raise non_finite_error(sam.name, precision)
    own = [slice(end - len(of_image), end) for end, of_image in zip(ends, prompts, strict=True)]
    if packed_hw is not None:
        return [
            Decoded([], pred_iou[part], None, torch.cat(masks))
            for part, masks in zip(own, packed, strict=True)
        ]
    return [
        Decoded(logits[part], pred_iou[part], None if on_cpu is None else on_cpu[part])
        for part in own
    ]


def _of_images(ends: Sequence[int], start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Yield the images that prompts ``start`` to ``stop`` are of, and their range in each image."""
    begin = 0
    for k, end in enumerate(ends):
        first, last = max(begin, start) - begin, min(end, stop) - begin
        if first < last:
            yield k, first, last
        begin = end
