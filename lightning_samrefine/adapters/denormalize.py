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

from lightning_samrefine.adapters.candidates import is_image
from lightning_samrefine.adapters.nested import Samples
from lightning_samrefine.utils.validation import WrongValuesError, as_integer

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
    ``x * image_std + image_mean``, multiplied by 255 if the range is 0 to 1. With ``image_stretch``
    percentiles of each image replace all this, so that an image's colors depend on it alone,
    whatever its batch, and mean and deviation, which they undo, need not be known.

    A range that is not set is inferred from the first batch with unambiguous values and kept from
    then on: a dark batch of 0 to 255 is not mistaken for a bright one of 0 to 1. Later values
    outside it raise, because the earlier batches were converted wrongly. A range that is set and
    does not fit the first batch that is not black raises as well.

    Args:
        image_mean: The mean subtracted in normalization, one number or one per channel; None for
            images that were not normalized.
        image_std: The standard deviation of the normalization.
        image_range: ``"0-1"`` or ``"0-255"``, the range in which ``image_mean`` and ``image_std``
            are given. None infers it from the two (0-1 if none exceeds 1), and without those from
            the images.
        image_channels: Indices of the image's channels that become red, green and blue, or one for
            gray; None for images of one or three channels. ``image_mean`` and ``image_std`` are
            those of all the image's channels, in their order.
        image_stretch: The percentiles of each image and channel that become 0 and 255, such as
            ``(2, 98)``, for images of any range: multispectral ones, 16 bits, Hounsfield units.

    Attributes:
        range: As set or inferred from mean and standard deviation, else None.
        settled: The range in use, None until it is known.

    Raises:
        TypeError: A mean or deviation that is not a number; channels that are not integers.
        ValueError: An unknown range, a mean without a deviation, or a deviation not above 0;
            another number of channels; percentiles not in order, or beside other settings.
    """

    def __init__(
        self,
        image_mean: float | Sequence[float] | None = None,
        image_std: float | Sequence[float] | None = None,
        image_range: ImageRange | None = None,
        image_channels: Sequence[int] | None = None,
        image_stretch: tuple[float, float] | None = None,
    ) -> None:
        self.channels = _checked_channels(image_channels)
        self.stretch = _checked_stretch(image_stretch)
        self.mean = _per_channel("image_mean", image_mean, self.channels is not None)
        self.std = _per_channel("image_std", image_std, self.channels is not None)
        if self.stretch is not None and (image_range, self.mean) != (None, None):
            raise ValueError(
                "image_range, image_mean and image_std must be None with image_stretch, got "
                f"{image_range!r}, {image_mean!r} and {image_std!r}"
            )
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
        pair = [values for values in (self.mean, self.std) if values is not None]
        self._are_up_to_1 = all(n <= 1 for values in pair for n in _shown(values, self.channels))
        if image_range is None and pair:
            self.range = "0-1" if self._are_up_to_1 else "0-255"
        self.settled = self.range
        self._looked_at = False

    def describe(self, images: Samples) -> str:
        """Return what is done to images of this kind, in words; empty if nothing."""
        parts = []
        if self.channels is not None:
            parts.append(f"channels {', '.join(map(str, self.channels))} shown")
        if self.stretch is not None:
            low, high = self.stretch
            parts.append(f"percentiles {low:g} to {high:g} of each image as 0 to 255")
        if self.mean is not None and any(image.is_floating_point() for image in images):
            parts.append("image_mean and image_std undone")
        return ", ".join(parts)

    def shows(self, images: Samples) -> bool:
        """Whether tensors have the shape of images, (B, c, H, W) or B × (c, H, W)."""
        if self.channels is None:
            return is_image(images)
        if isinstance(images, Tensor):
            return images.ndim == 4 and images.shape[1] > max(self.channels)
        return all(one.ndim == 3 and len(one) > max(self.channels) for one in images)

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
        self._settle([self._chosen(image) for image in images])

    def _settle(self, images: Sequence[Tensor] | Tensor) -> None:
        if self.settled is not None or self.stretch is not None:
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
            images: (B, 3, H, W), or (B, 1, H, W) gray, integer or float; with ``image_channels`` of
                any number of channels.

        Returns:
            (B, 3, H, W) uint8 RGB on the same device.

        Raises:
            ValueError: A wrong shape, or values outside the range after undoing normalization.
            WrongValuesError: Values outside the range inferred from earlier batches; settings
                that do not fit the first images.
        """
        count = images.shape[1] if images.ndim == 4 else 0
        images = self._chosen(images)
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            hint = "; channels come first" if images.shape[-1:] == (3,) else ""
            if images.ndim == 3 and images.shape[0] in (1, 3):
                hint = (
                    "; the batch dimension is missing, as in samples of a DataLoader with "
                    "batch_size=None: set it to 1"
                )
            elif images.ndim == 4 and images.shape[1] in (2, 6):
                two = "two gray images" if images.shape[1] == 2 else "two RGB images"
                hint = f"; of {two} in one tensor image_channels names the one that SAM sees"
            raise ValueError(
                "image must be (B, 3, H, W) RGB or (B, 1, H, W) gray, got shape "
                f"{tuple(images.shape)}{hint}. For other channels set image_channels to the "
                "indices of red, green and blue, or give an adapter."
            )
        if images.dtype == torch.bool or images.is_complex():
            # Read as 0 to 255, bool would silently be a black image.
            raise ValueError(
                f"image must be integers in 0 to 255 or floats, got dtype {images.dtype}"
            )
        if self.stretch is not None:
            return torch.stack([_stretched(image, *self.stretch) for image in images]).expand(
                -1, 3, -1, -1
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

        self._settle(images)
        pixels = images.float()
        if self.mean is not None and self.std is not None:
            std, mean = (self._numbers(n, count, pixels) for n in (self.std, self.mean))
            pixels = pixels * std + mean
        low, high = _bounds(pixels)
        image_range = self.settled or "0-1"
        tolerance = _TOLERANCE if self.range is None else _TOLERANCE_IF_SET
        self._check(low, high, _fits(low, high, image_range, tolerance), image_range)
        scale = _SCALES[image_range]
        # Black is black in either range, hence the first image of another color is looked at.
        if self.range is not None and not self._looked_at and high * scale > 0.5:
            self._looked_at = True
            self._check_settings(images, high)
        return (pixels * scale).round_().clamp_(0, 255).to(torch.uint8).expand(-1, 3, -1, -1)

    def _chosen(self, images: Tensor) -> Tensor:
        """Return the channels that are shown, of images (…, c, H, W)."""
        if self.channels is None or images.ndim < 3:
            return images
        if images.shape[-3] <= max(self.channels):
            raise ValueError(
                f"image_channels must be below the image's {images.shape[-3]} channels, got "
                f"{self.channels} and shape {tuple(images.shape)}"
            )
        # Older releases of torch cannot index uint16.
        return torch.stack([images.select(-3, channel) for channel in self.channels], dim=-3)

    def _numbers(self, numbers: tuple[float, ...], count: int, like: Tensor) -> Tensor:
        """Return a mean or deviation for the channels that are shown, (c, 1, 1) or (1, 1, 1)."""
        if self.channels is not None and len(numbers) not in (1, count):
            raise ValueError(
                "image_mean and image_std must be 1 number or one for each of the image's "
                f"{count} channels, got {len(numbers)}"
            )
        return torch.tensor(_shown(numbers, self.channels), device=like.device).view(-1, 1, 1)

    def _check_settings(self, images: Tensor, highest: float) -> None:
        """Raise or warn if the first images do not fit the settings.

        That is, if they look not normalized, or in 0 to 1 despite the range. A range of 0 to 255
        with means and deviations of at most 1 is right for images that were normalized without a
        division by 255, so the images decide. ``highest`` is the largest value of the undone ones.
        """
        low, high = _bounds(images.float())
        doubtful = self.mean is not None and self.range == "0-255" and self._are_up_to_1
        if doubtful and highest <= 1 + _TOLERANCE_IF_SET:
            raise WrongValuesError(
                "image_range must be '0-1', the range in which image_mean and image_std are given, "
                f"or left out, got '0-255': with the two undone images are up to {highest:.4g}, "
                "which SAM would see as black"
            )
        # Undoing what was not done makes them darker; normalized ones hold negative or huge values.
        if doubtful and low >= 0 and _LARGEST_NORMALIZED < high <= 255 and highest < 0.75 * high:
            raise WrongValuesError(
                "image_mean and image_std must be None where images are not normalized, got "
                f"{self.mean} and {self.std} for images from {low:.4g} to {high:.4g}"
            )
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
            "image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]). image_range is "
            "the range in which these are given ('0-1' or '0-255'); left out, it is inferred from "
            "them."
        )


def _stretched(image: Tensor, low: float, high: float) -> Tensor:
    """Scale every channel between two of its percentiles, each the value of a pixel.

    Args:
        image: (c, H, W), integer or float.
        low: Percentile that becomes 0.
        high: Percentile that becomes 255.

    Returns:
        (c, H, W) uint8; a channel of one value is 0.
    """
    values = image.float() if image.is_floating_point() else image
    if not bool(values.isfinite().all()):
        raise ValueError("image must be finite with image_stretch, got NaN or infinite values")
    # Not torch.quantile, which takes 16 million values at most.
    bounds = np.percentile(values.flatten(1).cpu().numpy(), (low, high), axis=1, method="nearest")
    black, white = torch.from_numpy(bounds.astype(np.float32)).to(image.device)[..., None, None]
    scaled = (values.float() - black) / (white - black).clamp(min=1e-30) * 255
    return scaled.round_().clamp_(0, 255).to(torch.uint8)


def _checked_channels(channels: Sequence[int] | None) -> tuple[int, ...] | None:
    if channels is None:
        return None
    required = "image_channels must be 1 or 3 indices of at least 0"
    if isinstance(channels, str) or not isinstance(channels, Sequence):
        raise TypeError(f"{required}, got {channels!r}")
    numbers = [as_integer(channel) for channel in channels]
    if any(number is None for number in numbers):
        raise TypeError(f"{required}, got {channels!r}")
    found = tuple(number for number in numbers if number is not None)
    if len(found) not in (1, 3) or min(found) < 0:
        raise ValueError(f"{required}, got {channels!r}")
    return found


def _checked_stretch(stretch: Sequence[float] | None) -> tuple[float, float] | None:
    if stretch is None:
        return None
    required = "image_stretch must be two percentiles such as (2, 98)"
    is_sequence = isinstance(stretch, Sequence) and not isinstance(stretch, str)
    if not is_sequence or not all(isinstance(number, int | float) for number in stretch):
        raise TypeError(f"{required}, got {stretch!r}")
    if len(stretch) != 2 or not 0 <= stretch[0] < stretch[1] <= 100:
        raise ValueError(f"{required}, got {stretch!r}")
    return float(stretch[0]), float(stretch[1])


def _per_channel(
    name: str, value: float | Sequence[float] | None, any_count: bool
) -> tuple[float, ...] | None:
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
    if len(numbers) not in (1, 3) and not any_count:
        raise ValueError(f"{name} must be 1 or 3 numbers, got {len(numbers)}")
    return tuple(float(number) for number in numbers)


def _shown(numbers: tuple[float, ...], channels: tuple[int, ...] | None) -> tuple[float, ...]:
    """Return the numbers of the channels that are shown; a single number is that of all."""
    if channels is None or len(numbers) == 1:
        return numbers
    return tuple(numbers[channel] for channel in channels if channel < len(numbers))


def _fits(low: float, high: float, image_range: str, tolerance: float) -> bool:
    scale, slack = _SCALES[image_range], 255 * tolerance
    # In this form NaN, which fails every comparison, does not fit.
    return low * scale >= -slack and high * scale <= 255 + slack


def _bounds(values: Tensor) -> tuple[float, float]:
    low, high = torch.stack(torch.aminmax(values)).tolist()
    return low, high
