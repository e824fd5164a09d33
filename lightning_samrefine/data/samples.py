"""Reads images, label maps and stored predictions as tensors, and collates them."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import default_collate

from lightning_samrefine.adapters.target_values import describe_others, holds_others
from lightning_samrefine.data.image_files import check_depth, gray_step, opened, readable

Sample = dict[str, Any]

_INDEX_MODES = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L", "I;16N")

# Errors of a damaged archive, without its name.
_ARCHIVE_ERRORS = (
    ValueError,
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    OSError,
    NotImplementedError,
)

# Sums of probabilities computed or stored in half precision, and in single precision.
_SUM_TOLERANCE = 1e-2
_EXACT_SUM = 1e-4


def image_to_tensor(image: Image.Image, name: str, turn: bool = False) -> Tensor:
    """Convert a picture to uint8 (3, H, W) RGB.

    Args:
        image: Any 8-bit mode; palettes, gray and CMYK are converted, an alpha channel is dropped.
        name: Its name in errors.
        turn: Whether its EXIF orientation is applied.

    Raises:
        ValueError: More than 8 bits per channel.
    """
    check_depth(image, name)
    upright = ImageOps.exif_transpose(image) if turn else image
    return torch.from_numpy(np.array(upright.convert("RGB"))).permute(2, 0, 1).contiguous()


def label_map_to_tensor(image: Image.Image, name: str) -> Tensor:
    """Convert a label map to int64 (H, W) of class indices.

    Args:
        image: One channel: values of 1, 2, 4, 8 or 16 bits, or palette indices (the colors are
            ignored). Opened, not yet decoded.
        name: Its name in errors.

    Raises:
        ValueError: More than one channel, as in a color-coded map.
    """
    if image.mode not in _INDEX_MODES:
        raise ValueError(
            f"{name} must have one channel of class indices (uint8, uint16 or a palette), got "
            f"Pillow's mode {image.mode!r}; convert colors to indices first"
        )
    step = gray_step(image)  # unavailable once the pixels are decoded
    return torch.from_numpy(np.array(image).astype(np.int64)) // step


def read_label_map(path: Path) -> Tensor:
    """Read a label map as int64 (H, W) of class indices.

    Raises:
        ValueError: Not an image, or one with several channels.
    """
    with opened(path) as image:
        return label_map_to_tensor(image, str(path))


def check_labels(labels: Tensor, num_classes: int, ignore_index: int | None, name: str) -> None:
    """Check that an (H, W) int64 label map, called ``name``, holds only classes and ignored values.

    Raises:
        ValueError: Another value, which a metric would count as a class or crash on.
    """
    if holds_others(labels, num_classes, ignore_index):
        raise ValueError(describe_others(labels, num_classes, ignore_index, name=name))


def image_hw(path: Path) -> tuple[int, int]:
    """Return (H, W) from an image file's header.

    Raises:
        ValueError: Not an image that Pillow can read.
    """
    with opened(path) as image:
        return image.height, image.width


def stored_array(path: Path) -> tuple[str, tuple[int, ...]]:
    """Return the key and shape of an npz prediction, from its headers.

    Returns:
        ``"probs"`` or ``"logits"``, and the array's shape.

    Raises:
        ValueError: Not an npz file, or one without exactly one of the two arrays.
    """
    with _readable_npz(path), zipfile.ZipFile(path) as archive:
        keys = [Path(member).stem for member in archive.namelist()]
        found = [key for key in ("probs", "logits") if key in keys]
        if len(found) == 1:
            with archive.open(f"{found[0]}.npy") as header:
                if np.lib.format.read_magic(header) == (1, 0):
                    return found[0], np.lib.format.read_array_header_1_0(header)[0]
                return found[0], np.lib.format.read_array_header_2_0(header)[0]
    raise ValueError(
        f"{path} must hold either 'probs' or 'logits', of shape (C, H, W), got the arrays "
        f"{', '.join(keys)}"
    )


def _readable_npz(path: Path) -> AbstractContextManager[None]:
    return readable(str(path), "npz file", _ARCHIVE_ERRORS)


def read_probs(path: Path) -> Tensor:
    """Read stored probabilities, or logits through a softmax.

    Args:
        path: An npz file with ``probs``, (C, H, W) float in [0, 1] or uint8 in 0 to 255, that sum
            to 1 over the classes, or with ``logits``, (C, H, W) float.

    Returns:
        (C, H, W) float32 in [0, 1], normalized over the classes if half precision or 8 bits have
        changed the sum.

    Raises:
        ValueError: Probabilities outside [0, 1] or with another sum, non-finite values, or another
            dtype.
    """
    key, _ = stored_array(path)
    with _readable_npz(path), np.load(path) as archive:
        array = archive[key]
    is_uint8 = key == "probs" and array.dtype == np.uint8
    if array.dtype.kind != "f" and not is_uint8:
        raise ValueError(f"{path}: {key!r} must be floats, or uint8 for 'probs', got {array.dtype}")
    values = torch.from_numpy(array.astype(np.float32))
    if not values.isfinite().all():
        raise ValueError(f"{path}: {key!r} must be finite, got NaN or infinity")
    if key == "logits":
        return values.softmax(dim=0)
    if is_uint8:
        values = values / 255
    low, high = values.min().item(), values.max().item()
    if low < 0 or high > 1:
        raise ValueError(
            f"{path}: 'probs' must be in [0, 1], got values from {low:.4g} to {high:.4g}; store "
            "unnormalized scores as 'logits'"
        )
    total = values.sum(dim=0)
    lost = (total - 1).abs().max().item()
    # Rounding to n/255 moves each class by at most half a step.
    if lost > (len(values) / 510 + 1e-6 if is_uint8 else _SUM_TOLERANCE):
        raise ValueError(
            f"{path}: 'probs' must sum to 1 over the classes, as after a softmax, got "
            f"{total.min():.4g} to {total.max():.4g}; store unnormalized scores as 'logits'"
        )
    return values / total if lost > _EXACT_SUM else values


def collate(samples: Sequence[Sample]) -> dict[str, Any]:
    """Stack samples of one size into a batch.

    Raises:
        ValueError: Images of different sizes, with the names of two.
    """
    check_equal_sizes(
        len(samples),
        [sample["name"] for sample in samples],
        [tuple(sample["image"].shape[-2:]) for sample in samples],
    )
    return default_collate(list(samples))


def check_equal_sizes(
    batch_size: int, names: Sequence[str], sizes: Sequence[tuple[int, int]]
) -> None:
    """Check that all images have one size (H, W) if the batch size is above 1.

    Raises:
        ValueError: Different sizes, with the names of two images.
    """
    if batch_size == 1:
        return
    for name, (height, width) in zip(names, sizes, strict=True):
        if (height, width) != sizes[0]:
            raise ValueError(
                f"batch_size must be 1 for images of different sizes, got {batch_size}: "
                f"{names[0]} is {sizes[0][1]}x{sizes[0][0]}, {name} is {width}x{height}"
            )
