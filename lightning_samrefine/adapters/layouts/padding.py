"""Finds the real part of each image in a batch that is padded to one size.

A pad mask decides if its real pixels are a rectangle in every image. Sizes decide if the pixels
beyond them are padding, of one color or copies of the image's edge: their usual names as often mean
the image before it was resized.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from lightning_samrefine.adapters.nested import MAX_DEPTH, Samples, describe, entries
from lightning_samrefine.utils.validation import WrongValuesError, as_integer

_MASK_NAMES = (
    "pixel_mask", "pixel_masks", "padding_mask", "padding_masks", "pad_mask", "pad_masks",
)  # fmt: skip
_SIZE_NAMES = (
    "image_sizes", "image_size", "target_sizes", "target_size", "original_sizes", "original_size",
    "orig_sizes", "orig_size", "sizes", "size", "img_shapes", "img_shape",
)  # fmt: skip

# Of a pad mask's values.
_READINGS = ("1 is real", "0 is real")

Box: TypeAlias = tuple[int, int, int, int]
"""Top, left, bottom and right of a real part in pixels, the last two exclusive."""


@dataclass(frozen=True)
class RealParts:
    """The real part of each image of a padded batch.

    Attributes:
        place: Where the pad mask or the sizes are, in words.
        reading: How they were read, such as ``"1 is real"`` or ``"(h, w)"``.
        boxes: B boxes.
        padded_hw: (H, W) of the padded images.
    """

    place: str
    reading: str
    boxes: Sequence[Box]
    padded_hw: tuple[int, int]

    def __str__(self) -> str:
        height, width = self.padded_hw
        real = sum((bottom - top) * (right - left) for top, left, bottom, right in self.boxes)
        share = 1 - real / (len(self.boxes) * height * width)
        return f"padding by {self.place}, read as {self.reading}, {share:.1%} cut off"

    def cut(self, samples: Samples) -> list[Tensor]:
        """Return B maps without their padding; those of another size than the padded one's stay."""
        return [
            one[..., top:bottom, left:right] if tuple(one.shape[-2:]) == self.padded_hw else one
            for one, (top, left, bottom, right) in zip(samples, self.boxes, strict=True)
        ]


@dataclass(frozen=True)
class _Claim:
    """A pad mask or sizes, with the boxes of each possible reading."""

    path: tuple[str | int, ...]
    is_mask: bool
    value: Any
    readings: dict[str, list[Box]]

    @property
    def key(self) -> str:
        return ".".join(map(str, self.path))


class Padding:
    """Finds the real parts batch by batch; the first clear batch settles how they are read.

    Args:
        key: Key of the pad mask or of the sizes; None searches usual names, False cuts nothing.

    Raises:
        TypeError: Another key.
    """

    def __init__(self, key: str | Literal[False] | None = None) -> None:
        if key is not None and key is not False and not isinstance(key, str):
            raise TypeError(
                "padding_key must be a string such as 'pixel_mask', False or None, got "
                f"{key!r} of type {type(key).__name__}"
            )
        self.key = key
        # Readings by path, None for sizes of other images.
        self._settled: dict[tuple[str | int, ...], str | None] = {}

    def fresh(self) -> Padding:
        """Return one with the same key, before its first batch."""
        return Padding(self.key)

    def __call__(self, container: Any, images: Samples, source: str) -> RealParts | None:
        """Find the real parts of a batch.

        Args:
            container: What holds the images.
            images: (B, c, H, W); images in a list have sizes of their own and no padding.
            source: The container in words.

        Returns:
            None where nothing is cut off.

        Raises:
            ValueError: It is unclear what is padding, or nothing fits the key.
            WrongValuesError: Pixels that contradict how earlier batches were read.
        """
        if self.key is False or not isinstance(images, Tensor) or images.ndim != 4:
            return None
        padded_hw = (images.shape[-2], images.shape[-1])
        claims = list(_claims(container, len(images), padded_hw, self.key))
        if self.key is not None and not any(claim.readings for claim in claims):
            raise ValueError(
                "padding_key must be the key of a pad mask (B, H, W) or of B sizes (h, w) of the "
                f"{len(images)} images padded to {padded_hw}, got {self.key!r}; the {source} is "
                f"{describe(container)}"
            )
        found = []
        for claim in claims:
            reading = self._read(claim, images)
            if reading is not None and _cuts(claim.readings[reading], padded_hw):
                place = source + "".join(f"[{part!r}]" for part in claim.path)
                found.append(RealParts(place, reading, claim.readings[reading], padded_hw))
        if any(one.boxes != found[0].boxes for one in found):
            keys = " or ".join(f"padding_key={claim.key!r}" for claim in claims)
            raise ValueError(
                f"padding must be the same by every pad mask and size, got {len(found)}: "
                f"{'; '.join(map(str, found))}. Name the right one with {keys}"
            )
        return found[0] if found else None

    def _read(self, claim: _Claim, images: Tensor) -> str | None:
        """Return how a claim is read, None for one that is not of the padding."""
        if claim.path not in self._settled:
            reading, is_clear = self._first_reading(claim, images)
            if is_clear:
                self._settled[claim.path] = reading
            return reading
        reading = self._settled[claim.path]
        if reading is None:
            return None
        boxes = claim.readings.get(reading)
        is_checked = not claim.is_mask and self.key is None
        if boxes is None or (is_checked and _is_padding(images, boxes) is False):
            raise WrongValuesError(
                f"padding must be that of {claim.key!r}, read as {reading} like the batches "
                f"before, got {describe(claim.value)} that contradicts it: set padding_key=False "
                "if it is something else"
            )
        return reading

    def _first_reading(self, claim: _Claim, images: Tensor) -> tuple[str | None, bool]:
        """Return how a claim is read, and whether that holds for later batches."""
        if not claim.is_mask:
            return self._of_sizes(claim, images)
        readings = list(claim.readings)
        if not readings:
            raise ValueError(
                f"padding must leave a rectangle of every image, got {claim.key!r} "
                f"{describe(claim.value)} with another shape: set padding_key=False if it marks "
                "something else"
            )
        if len(readings) > 1:
            clear = [name for name in readings if _is_padding(images, claim.readings[name])]
            if len(clear) != 1:
                # transformers' pixel_mask has 1 for real pixels, torch's key_padding_mask True
                # for padding.
                return _READINGS[not claim.key.lower().split(".")[-1].startswith("pixel")], False
            readings = clear
        return readings[0], _cuts(claim.readings[readings[0]], tuple(images.shape[-2:]))

    def _of_sizes(self, claim: _Claim, images: Tensor) -> tuple[str | None, bool]:
        verdicts = {name: _is_padding(images, boxes) for name, boxes in claim.readings.items()}
        clear = [name for name, verdict in verdicts.items() if verdict]
        if clear:
            return clear[0], True
        first = next(iter(verdicts), None)
        if first is None or (verdicts[first] is False and self.key is None):
            return None, True
        if self.key is None and _cuts(claim.readings[first], tuple(images.shape[-2:])):
            raise ValueError(
                f"padding must be visible in some image, got {claim.key!r} that may be of the "
                "images before they were resized, and images of one color there: set "
                f"padding_key={claim.key!r} if they are padded, False if not"
            )
        return first, False


def _claims(
    container: Any, count: int, padded_hw: tuple[int, int], key: str | None
) -> Iterator[_Claim]:
    """Yield what has the form of a pad mask or of sizes, under a key or the usual names."""
    for path, value in _held(container, count):
        name = str(path[-1]).lower()
        if key is not None and ".".join(map(str, path)) != key:
            continue
        may_be_mask = key is not None or name in _MASK_NAMES
        may_be_sizes = key is not None or name in _SIZE_NAMES
        mask = _mask(value, count, padded_hw) if may_be_mask else None
        if mask is not None:
            boxes = zip(_READINGS, (_rectangles(mask), _rectangles(~mask)), strict=True)
            yield _Claim(path, True, value, {k: v for k, v in boxes if v is not None})
        elif may_be_sizes:
            pairs = _pairs(value, count)
            if pairs:
                yield _Claim(path, False, value, _boxes_of_sizes(pairs, padded_hw))


def _held(
    container: Any, count: int, path: tuple[str | int, ...] = ()
) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Yield the values of nested containers; those of B mappings in a list are collected."""
    held = entries(container)
    inner = [dict(entries(value)) for _, value in held]
    if path and len(held) == count and all(inner) and isinstance(container, list | tuple):
        for name in inner[0]:
            if isinstance(name, str) and all(name in one for one in inner):
                yield (*path, name), [one[name] for one in inner]
    for name, value in held:
        yield (*path, name), value
        if len(path) + 1 < MAX_DEPTH:
            yield from _held(value, count, (*path, name))


def _mask(value: Any, count: int, padded_hw: tuple[int, int]) -> Tensor | None:
    """Return a pad mask as (B, H, W) bool on the CPU; None for another shape or other values."""
    if not isinstance(value, Tensor) or value.ndim not in (3, 4):
        return None
    mask = value[:, 0] if value.ndim == 4 and value.shape[1] == 1 else value
    if mask.shape != (count, *padded_hw) or not bool(((mask == 0) | (mask == 1)).all()):
        return None
    return mask.bool().cpu()


def _rectangles(masks: Tensor) -> list[Box] | None:
    """Return the box of each mask; None unless every mask is one full rectangle."""
    boxes = []
    for mask in masks.numpy():
        rows, columns = mask.any(axis=1).nonzero()[0], mask.any(axis=0).nonzero()[0]
        if len(rows) == 0:
            return None
        box = (int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1)
        if not mask[box[0] : box[2], box[1] : box[3]].all():
            return None
        boxes.append(box)
    return boxes


def _pairs(value: Any, count: int) -> dict[str, list[tuple[int, int]]]:
    """Return B pairs of integers by their arrangement: one an image, or one list a side."""
    if isinstance(value, Tensor | np.ndarray):
        value = value.tolist() if value.ndim == 2 else None
    if not isinstance(value, list | tuple):
        return {}
    rows = [
        list(one) if isinstance(one, Tensor | np.ndarray | list | tuple) else [] for one in value
    ]
    numbers = [[as_integer(number) for number in row] for row in rows]
    found = {}
    for name, table in (("", numbers), (" collated by side", list(zip(*numbers, strict=False)))):
        pairs = [(row[0], row[1]) for row in table if len(row) == 2 and None not in row]
        if len(pairs) == len(table) == count:
            found[name] = pairs
    return found  # type: ignore[return-value]  # no None is left


def _boxes_of_sizes(
    arranged: dict[str, list[tuple[int, int]]], padded_hw: tuple[int, int]
) -> dict[str, list[Box]]:
    """Return the boxes at the top left of sizes in either order, where they lie in the images."""
    found = {}
    for name, pairs in arranged.items():
        for order, sizes in (("(h, w)", pairs), ("(w, h)", [(b, a) for a, b in pairs])):
            if all(0 < h <= padded_hw[0] and 0 < w <= padded_hw[1] for h, w in sizes):
                found[order + name] = [(0, 0, h, w) for h, w in sizes]
    return found


def _cuts(boxes: Sequence[Box], padded_hw: tuple[int, ...]) -> bool:
    return any(box != (0, 0, *padded_hw) for box in boxes)


def _is_padding(images: Tensor, boxes: Sequence[Box]) -> bool | None:
    """Whether what lies beyond the boxes is padding; None where no image shows it."""
    verdicts = {
        _is_padded(image, box)
        for image, box in zip(images, boxes, strict=True)
        if _cuts([box], tuple(images.shape[-2:]))
    }
    return False if False in verdicts else True if True in verdicts else None


def _is_padded(image: Tensor, box: Box) -> bool | None:
    """Whether an image is padded around a box: by one color, or by copies of its edge.

    None if padding and edge have one color, as dark images have that were not padded.
    """
    top, left, bottom, right = box
    image = image.detach().cpu().double().nan_to_num(nan=-1e9)
    real = image[:, top:bottom, left:right]
    # Each strip of padding with the real part, turned so that its last row meets the strip's first.
    strips = [
        (strip, part)
        for strip, part in (
            (image[:, bottom:, left:right], real),
            (image[:, :top, left:right].flip(1), real.flip(1)),
            (image[:, top:bottom, right:].transpose(1, 2), real.transpose(1, 2)),
            (image[:, top:bottom, :left].transpose(1, 2).flip(1), real.transpose(1, 2).flip(1)),
        )
        if strip.shape[1] > 0
    ]
    outside = torch.ones(image.shape[1:], dtype=torch.bool)
    outside[top:bottom, left:right] = False
    color = image[:, outside][:, :1]
    if bool((image[:, outside] == color).all()):
        return True if any(bool((part[:, -1] != color).any()) for _, part in strips) else None
    copies = [_is_copied(*pair) for pair in strips]
    return False if False in copies else True if True in copies else None


def _is_copied(strip: Tensor, real: Tensor) -> bool | None:
    """Whether the first row of a strip copies a row of the part above it, both (c, n, w).

    Replicated and symmetric padding copy the last row, reflected padding the row before, circular
    padding the first.
    """
    row = strip[:, 0]
    if bool((row == row[:, :1]).all()):
        return None
    return any(torch.equal(row, real[:, index]) for index in {-1, -min(2, real.shape[1]), 0})
