"""Undoes a user's image normalization: SAM needs uint8 RGB."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from copy import copy
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from lightning_samrefine.utils.validation import WrongValuesError

ImageRange: TypeAlias = Literal["0-255", "0-1"]
RANGES = ("0-255", "0-1")
_SCALES = {"0-255": 1.0, "0-1": 255.0}

# Rounding in half precision; bicubic resizing overshoots further, hence the second one, which
# applies if the user has set the range.
_TOLERANCE = 2 / 255
_TOLERANCE_IF_SET = 0.1

# Data in [0, 1] normalized by any usual mean and deviation stays below this.
_LARGEST_NORMALIZED = 8.0


class Denormalize:
    """Turns a user's images into uint8 RGB in 0 to 255.

    Integer images of any dtype are expected in 0 to 255. Float images become
    ``x * image_std + image_mean``, multiplied by 255 if the range is 0 to 1.

    A range that is not set is inferred from the first batch with unambiguous values and kept from
    then on: a dark batch of 0 to 255 is not mistaken for a bright one of 0 to 1. Later values
    outside it raise, because the earlier batches were converted wrongly.

    Args:
        image_mean: The mean subtracted in normalization, one number or one per channel; None for
            images that were not normalized.
        image_std: The standard deviation of the normalization.
        image_range: ``"0-1"`` or ``"0-255"``, the range before normalization. None infers it from
            ``image_mean`` and ``image_std`` (0-1 if none exceeds 1), and without those from the
            values.

    Attributes:
        range: As set or inferred from mean and standard deviation, else None.
        settled: The range in use, None until it is known.

    Raises:
        TypeError: A mean or deviation that is not a number.
        ValueError: An unknown range, a mean without a deviation, or a deviation not above 0.
    """

    def __init__(
        self,
        image_mean: float | Sequence[float] | None = None,
        image_std: float | Sequence[float] | None = None,
        image_range: ImageRange | None = None,
    ) -> None:
        self.mean = _per_channel("image_mean", image_mean)
        self.std = _per_channel("image_std", image_std)
        if (self.mean is None) != (self.std is None):
            raise ValueError(
                "image_mean and image_std must be set both or neither, got "
                f"{image_mean!r} and {image_std!r}"
            )
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"image_std must be above 0, got {image_std!r}")
        if image_range is not None and image_range not in RANGES:
            raise ValueError(
                f"image_range must be one of {', '.join(map(repr, RANGES))} and None, got "
                f"{image_range!r}"
            )
        self.range = image_range
        if image_range is None and self.mean is not None and self.std is not None:
            self.range = "0-1" if max(*self.mean, *self.std) <= 1 else "0-255"
        self.settled = self.range
        self._looked_at = False

    def fresh(self) -> Denormalize:
        """Return one with the same settings, before its first image."""
        new = copy(self)
        new.settled = new.range
        new._looked_at = False
        return new

    def settle(self, images: Sequence[Tensor] | Tensor) -> None:
        """Infer the range from the images of one batch, if it is not known yet.

        Args:
            images: B × (C, H, W), each of its own size, or (B, C, H, W).

        Raises:
            WrongValuesError: Values of neither range; or only 0 and 1, which are dark images of 0
                to 255 or images of two colors in 0 to 1.
        """
        if self.settled is not None:
            return
        # A broken image must not affect the others.
        floats = [image.float() for image in images if image.is_floating_point()]
        usable = [image for image in floats if image.numel() > 0 and bool(image.isfinite().all())]
        if not usable:
            return
        bounds = [_bounds(image) for image in usable]
        low, high = min(low for low, _ in bounds), max(high for _, high in bounds)
        found: ImageRange = "0-1" if high <= 1 + _TOLERANCE else "0-255"
        is_clear = found == "0-1" or high > _LARGEST_NORMALIZED
        self._check(low, high, is_clear and _fits(low, high, found, _TOLERANCE), found)
        if found == "0-255" or any(bool((image != image.round()).any()) for image in usable):
            self.settled = found
        elif high > 0:  # black is black in either range
            raise WrongValuesError(
                "image_range must be '0-1' or '0-255' where images hold nothing but 0 and 1, got "
                "None: they may be of two colors, or nearly black"
            )

    def __call__(self, images: Tensor) -> Tensor:
        """Convert a batch.

        Args:
            images: (B, 3, H, W), or (B, 1, H, W) gray, integer or float.

        Returns:
            (B, 3, H, W) uint8 RGB on the same device.

        Raises:
            ValueError: A wrong shape, or values outside the range after undoing normalization.
            WrongValuesError: Values outside the range inferred from earlier batches.
        """
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            hint = "; channels come first" if images.shape[-1:] == (3,) else ""
            if images.ndim == 3 and images.shape[0] in (1, 3):
                hint = (
                    "; the batch dimension is missing, as in samples of a DataLoader with "
                    "batch_size=None: set it to 1"
                )
            elif images.ndim == 4 and images.shape[1] in (2, 6):
                two = "two gray images" if images.shape[1] == 2 else "two RGB images"
                hint = f"; of {two} in one tensor SAM sees the one that an adapter returns"
            raise ValueError(
                "image must be (B, 3, H, W) RGB or (B, 1, H, W) gray, got shape "
                f"{tuple(images.shape)}{hint}. For other channels give an adapter that returns RGB."
            )
        if images.dtype == torch.bool or images.is_complex():
            # Read as 0 to 255, bool would silently be a black image.
            raise ValueError(
                f"image must be integers in 0 to 255 or floats, got dtype {images.dtype}"
            )
        if images.dtype == torch.uint8:
            return images.expand(-1, 3, -1, -1)
        if not images.is_floating_point():
            # torch implements few operations for uint16 and wider unsigned dtypes.
            low, high = _bounds(images.to(torch.int64))
            if low < 0 or high > 255:
                raise WrongValuesError(
                    f"image must be in 0 to 255 where it holds integers, got {images.dtype} from "
                    f"{low} to {high}: scale it to 8 bits, or to floats in 0 to 1"
                )
            return images.to(torch.uint8).expand(-1, 3, -1, -1)

        self.settle(images)
        if self.range is not None and not self._looked_at:
            self._looked_at = True
            self._warn_of_settings(images)
        pixels = images.float()
        if self.mean is not None and self.std is not None:
            pixels = pixels * _as_channels(self.std, pixels) + _as_channels(self.mean, pixels)
        low, high = _bounds(pixels)
        image_range = self.settled or "0-1"
        tolerance = _TOLERANCE if self.range is None else _TOLERANCE_IF_SET
        self._check(low, high, _fits(low, high, image_range, tolerance), image_range)
        scale = _SCALES[image_range]
        return (pixels * scale).round_().clamp_(0, 255).to(torch.uint8).expand(-1, 3, -1, -1)

    def _warn_of_settings(self, images: Tensor) -> None:
        """Warn if the first images look not normalized, or in 0 to 1 despite the set range."""
        low, high = _bounds(images.float())
        # 0.5: images in 0 to 1 have bright pixels, normalized ones of low contrast seldom do.
        if not (low >= 0 and 0.5 < high <= 1) or bool((images == images.round()).all()):
            return
        if self.mean is not None:
            message = (
                "image_mean and image_std are set, and the images lie within "
                "0 to 1 without them: leave both out if the images are not normalized"
            )
        elif self.range == "0-255":
            message = (
                "image_range is '0-255', and the images lie within 0 to 1, nearly black: set "
                "image_range='0-1' if they are not"
            )
        else:
            return
        warnings.warn(f"image: {message}", RuntimeWarning, stacklevel=2)

    def _check(self, low: float, high: float, inside: bool, image_range: str) -> None:
        if inside:
            return
        undone = " after undoing image_mean and image_std" if self.mean is not None else ""
        expected = image_range if self.settled is not None else "0-1 or 0-255"
        before = ", like the images before" if self.settled != self.range else ""
        # An inferred range was applied to earlier images as well; NaN concerns one image only.
        kind = WrongValuesError if self.range is None and low <= high < math.inf else ValueError
        raise kind(
            f"image must be in the range {expected}{before}, got values from {low:.4g} to "
            f"{high:.4g}{undone}. SAM needs the image before normalization: set image_mean and "
            "image_std to the numbers of your Normalize transform (ImageNet's, the likeliest, are "
            "image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]) and image_range "
            "to the range before it ('0-1' or '0-255')."
        )


def _per_channel(name: str, value: float | Sequence[float] | None) -> tuple[float, ...] | None:
    if value is None:
        return None
    if isinstance(value, Tensor | np.ndarray | np.generic):
        value = value.tolist()
    numbers = [value] if isinstance(value, int | float) else value
    if isinstance(numbers, str) or not isinstance(numbers, Sequence):
        raise TypeError(f"{name} must be a number or one per channel, got {value!r}")
    numbers = [number.item() if isinstance(number, np.generic) else number for number in numbers]
    if not all(isinstance(number, int | float) for number in numbers):
        raise TypeError(f"{name} must be a number or one per channel, got {value!r}")
    if len(numbers) not in (1, 3):
        raise ValueError(f"{name} must be 1 or 3 numbers, got {len(numbers)}")
    return tuple(float(number) for number in numbers)


def _as_channels(numbers: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor(numbers, device=like.device).view(-1, 1, 1)


def _fits(low: float, high: float, image_range: str, tolerance: float) -> bool:
    scale, slack = _SCALES[image_range], 255 * tolerance
    # In this form NaN, which fails every comparison, does not fit.
    return low * scale >= -slack and high * scale <= 255 + slack


def _bounds(values: Tensor) -> tuple[float, float]:
    low, high = torch.stack(torch.aminmax(values)).tolist()
    return low, high
