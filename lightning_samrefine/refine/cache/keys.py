"""What an entry of the cache is found by: hashes of the image, the weights and the precision."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_samrefine.models.fingerprint import all_weights, raw_bytes, stamp


def weights_fingerprint(weights: Iterable[tuple[str, Tensor]], about: tuple[Any, ...] = ()) -> str:
    """Hash named tensors with dtypes and shapes, and further values: 40 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=20)
    digest.update(repr(about).encode())
    for name, tensor in weights:
        digest.update(repr((name, tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(raw_bytes(tensor))
    return digest.hexdigest()


def image_digest(image: np.ndarray) -> str:
    """Hash an image on the CPU, its dtype and shape included."""
    digest = hashlib.blake2b(digest_size=20)
    digest.update(repr((str(image.dtype), image.shape)).encode())
    digest.update(np.ascontiguousarray(image).data)
    return digest.hexdigest()


def entry_key(model: str, image: str, dtype: torch.dtype | None, device: torch.device) -> str:
    """Return the key of an entry: 40 hexadecimal digits."""
    about = repr((model, dtype, device.type, image))
    return hashlib.blake2b(about.encode(), digest_size=20).hexdigest()


def key_weights(module: nn.Module, whole: bool) -> dict[str, Tensor]:
    """Return the tensors of the whole model, or of the encoder with the model's own buffers."""
    if whole:
        return {**dict(module.named_parameters()), **dict(module.named_buffers())}
    encoder = getattr(module, "image_encoder", module)
    own = module.named_buffers(recurse=False)
    return {
        **{f"encoder.{name}": tensor for name, tensor in encoder.named_parameters()},
        **{f"encoder.{name}": tensor for name, tensor in encoder.named_buffers()},
        **dict(own),
    }


def weights_state(module: nn.Module, whole: bool) -> tuple[tuple[Any, ...], ...]:
    """Return a value that changes when one of `key_weights` is replaced, moved or written to."""
    if whole:
        return stamp(all_weights(module))
    encoder = getattr(module, "image_encoder", module)
    return stamp([*all_weights(encoder), *module.buffers(recurse=False)])
