"""Undoing a user's image normalisation: SAM wants uint8 RGB."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

RANGES = ("0-255", "0-1")

# Rounding in half precision; bicubic resizing overshoots further, hence the second one, which
# holds once the user has said what the range is.
_TOLERANCE = 2 / 255
_TOLERANCE_WHERE_SET = 0.1

# Data in [0, 1] normalised by any usual mean and deviation stays below this.
_LARGEST_NORMALISED = 8.0


class RgbConverter:
    """Turns a user's images into uint8 RGB in 0 to 255.

    Integer images are taken to be in 0 to 255 already. Float images become
    ``x * image_std + image_mean``, then are multiplied by 255 where the range is 0 to 1.

    Args:
        image_mean: What was subtracted in normalisation, one number or one per channel; None for
            images that were not normalised.
        image_std: What they were divided by.
        image_range: ``"0-1"`` or ``"0-255"``, the range before normalisation. None takes it from
            ``image_mean`` and ``image_std`` (0-1 where none exceeds 1), and without those from
            the values of each batch.

    Raises:
        TypeError: A mean or deviation that is no number.
        ValueError: An unknown range, a mean without a deviation, or a deviation not above 0.
    """

    def __init__(
        self,
        image_mean: float | Sequence[float] | None = None,
        image_std: float | Sequence[float] | None = None,
        image_range: Literal["0-255", "0-1"] | None = None,
    ) -> None:
        self.mean = _per_channel("image_mean", image_mean)
        self.std = _per_channel("image_std", image_std)
        if (self.mean is None) != (self.std is None):
            raise ValueError(
                f"image_mean, image_std: got {image_mean!r} and {image_std!r}, accepted are both "
                "or neither"
            )
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"image_std: got {image_std!r}, accepted are numbers above 0")
        if image_range is not None and image_range not in RANGES:
            raise ValueError(
                f"image_range: got {image_range!r}, accepted are "
                f"{', '.join(map(repr, RANGES))} and None"
            )
        self.range = image_range
        if image_range is None and self.mean is not None and self.std is not None:
            self.range = "0-1" if max(*self.mean, *self.std) <= 1 else "0-255"

    def __call__(self, images: Tensor) -> Tensor:
        """Convert a batch.

        Args:
            images: (B, 3, H, W), or (B, 1, H, W) grey, integer or float.

        Returns:
            (B, 3, H, W) uint8 RGB on the same device.

        Raises:
            ValueError: A wrong shape, or values outside the range once normalisation is undone.
        """
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            hint = "; channels come first" if images.shape[-1:] == (3,) else ""
            raise ValueError(
                f"image: got shape {tuple(images.shape)}, accepted is (B, 3, H, W) RGB or "
                f"(B, 1, H, W) grey{hint}. For other channels give an adapter that returns RGB."
            )
        if images.dtype == torch.bool or images.is_complex():
            # Read as 0 to 255, bool would be a black image and no error.
            raise ValueError(
                f"image: got dtype {images.dtype}, accepted are integers in 0 to 255 and floats"
            )
        if images.dtype == torch.uint8:
            return images.expand(-1, 3, -1, -1)
        if not images.is_floating_point():
            low, high = _bounds(images)
            self._check(low, high, low >= 0 and high <= 255, "0-255")
            return images.to(torch.uint8).expand(-1, 3, -1, -1)

        pixels = images.float()
        if self.mean is not None and self.std is not None:
            pixels = pixels * _as_channels(self.std, pixels) + _as_channels(self.mean, pixels)
        low, high = _bounds(pixels)
        image_range = self.range or ("0-1" if high <= 1 + _TOLERANCE else "0-255")
        scale = 255.0 if image_range == "0-1" else 1.0
        slack = 255 * (_TOLERANCE if self.range is None else _TOLERANCE_WHERE_SET)
        # Written so that NaN, which fails every comparison, is refused.
        inside = low * scale >= -slack and high * scale <= 255 + slack
        guessed = self.range is None and image_range == "0-255"
        inside = inside and not (guessed and high <= _LARGEST_NORMALISED)
        self._check(low, high, inside, image_range)
        return (pixels * scale).round_().clamp_(0, 255).to(torch.uint8).expand(-1, 3, -1, -1)

    def _check(self, low: float, high: float, inside: bool, image_range: str) -> None:
        if inside:
            return
        undone = " after undoing image_mean and image_std" if self.mean is not None else ""
        expected = image_range if self.range is not None else "0-1 or 0-255"
        raise ValueError(
            f"image: got values from {low:.4g} to {high:.4g}{undone}, accepted is the range "
            f"{expected}. SAM needs the image before normalisation: set image_mean and image_std "
            "to the numbers of your Normalize transform (ImageNet's, the likeliest, are "
            "image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]) and image_range "
            "to the range before it ('0-1' or '0-255')."
        )


def _per_channel(name: str, value: float | Sequence[float] | None) -> tuple[float, ...] | None:
    if value is None:
        return None
    if isinstance(value, Tensor):
        value = value.tolist()
    numbers = [value] if isinstance(value, int | float) else value
    if isinstance(numbers, str) or not isinstance(numbers, Sequence):
        raise TypeError(f"{name}: got {value!r}, accepted is a number or one per channel")
    if not all(isinstance(number, int | float) for number in numbers):
        raise TypeError(f"{name}: got {value!r}, accepted is a number or one per channel")
    if len(numbers) not in (1, 3):
        raise ValueError(f"{name}: got {len(numbers)} numbers, accepted are 1 or 3")
    return tuple(float(number) for number in numbers)


def _as_channels(numbers: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor(numbers, device=like.device).view(-1, 1, 1)


def _bounds(values: Tensor) -> tuple[float, float]:
    low, high = torch.stack(torch.aminmax(values)).tolist()
    return low, high
