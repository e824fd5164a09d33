"""Fingerprints of an image and its raw prediction, to notice when one of them has changed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_samrefine.models.fingerprint import raw_bytes

# A segmenter's last bits depend on what else is in its batch, so probabilities are not hashed.
_DECIMALS = 5
_TOLERANCE = 2.1e-5
_GOLDEN = 0.6180339887498949


@dataclass(frozen=True)
class Fingerprint:
    """Columns of the manifest.

    Attributes:
        image: 16 hexadecimal digits, the hash of the image.
        raw: The hash of the raw label map.
        raw_probs: For each class the mean over the pixels of its raw probability, each pixel with a
            weight of its own in [0.5, 1.5), rounded to five decimals.
    """

    image: str
    raw: str
    raw_probs: tuple[float, ...]

    @classmethod
    def of(cls, image: Tensor, labels: Tensor, probs: Tensor) -> Fingerprint:
        """Fingerprint an image and its raw prediction.

        Args:
            image: (3, H, W) uint8 on any device.
            labels: (H, W) int64, the raw label map.
            probs: (C, H, W) float32, the raw probabilities.
        """
        # MPS has no float64.
        if probs.device.type == "mps":
            probs = probs.cpu()
        order = torch.arange(labels.numel(), dtype=torch.float64, device=probs.device)
        weights = (order * _GOLDEN).frac() + 0.5  # no two neighbors are alike
        sums = torch.stack([plane.flatten().double() @ weights for plane in probs])
        means = (sums / labels.numel()).tolist()
        return cls(
            content_hash(image),
            content_hash(labels.to(torch.int32)),
            tuple(round(mean, _DECIMALS) for mean in means),
        )

    def matches(self, row: Mapping[str, Any]) -> bool:
        """Whether a row of the manifest has the same image and raw prediction."""
        theirs = row["raw_probs"]
        return (
            (row["image"], row["raw"]) == (self.image, self.raw)
            and len(theirs) == len(self.raw_probs)
            and all(
                abs(one - other) < _TOLERANCE
                for one, other in zip(self.raw_probs, theirs, strict=True)
            )
        )

    def columns(self) -> dict[str, Any]:
        """Return the row's values."""
        return {**asdict(self), "raw_probs": list(self.raw_probs)}


def content_hash(tensor: Tensor) -> str:
    """Return 16 hexadecimal digits of a tensor's type, shape and bytes, on any device."""
    digest = hashlib.blake2b(repr((tensor.dtype, tuple(tensor.shape))).encode(), digest_size=8)
    digest.update(raw_bytes(tensor))
    return digest.hexdigest()
