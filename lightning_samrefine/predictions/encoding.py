"""Predictions as bytes of files: label maps as PNG, probabilities as safetensors."""

from __future__ import annotations

import io
from functools import lru_cache
from typing import Literal, TypeAlias

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save
from torch import Tensor

from lightning_samrefine.utils.palette import class_colors

PROBS_KINDS = ("uint8", "float16")
ProbsKind: TypeAlias = Literal["uint8", "float16"]

# The largest value of each depth is what "unknown" is written as, so it is no class.
_PALETTED_CLASSES = 255
MAX_CLASSES = 65_535


def storable_labels(labels: Tensor, num_classes: int) -> Tensor:
    """Bring an (H, W) int64 label map of C ≤ 65,535 classes to the CPU as it is stored.

    Returns:
        (H, W) uint8 if C ≤ 255, int32 otherwise. Values outside [0, C) become 255 or 65,535.
    """
    is_small = num_classes <= _PALETTED_CLASSES
    unknown = _PALETTED_CLASSES if is_small else MAX_CLASSES
    known = (labels >= 0) & (labels < num_classes)
    stored = labels.masked_fill(~known, unknown)
    return stored.to(torch.uint8 if is_small else torch.int32).cpu()


def label_png(stored: Tensor) -> bytes:
    """Encode what `storable_labels` returned.

    Returns:
        A PNG of 8-bit palette indices, or of 16-bit values; equal maps give equal bytes.
    """
    is_small = stored.dtype == torch.uint8
    image = Image.fromarray(stored.numpy() if is_small else stored.numpy().astype(np.uint16))
    if is_small:
        image.putpalette(_palette())
    sink = io.BytesIO()
    image.save(sink, "PNG")
    return sink.getvalue()


def storable_probs(probs: Tensor, kind: ProbsKind) -> Tensor:
    """Bring (C, H, W) float32 probabilities in [0, 1] to the CPU as they are stored.

    Returns:
        (C, H, W) uint8, 255 meaning 1, or float16.
    """
    if kind == "uint8":
        return (probs * 255).round().to(torch.uint8).cpu()
    return probs.to(torch.float16).cpu()


def probs_safetensors(stored: Tensor) -> bytes:
    """Encode what `storable_probs` returned, under the name ``probs``."""
    return save({"probs": stored.contiguous()})


@lru_cache(maxsize=1)
def _palette() -> bytes:
    return class_colors(256).tobytes()
