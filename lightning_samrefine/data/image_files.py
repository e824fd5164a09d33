"""Opens image files: depth and orientation beyond Pillow's, and errors with the file's name."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL import ExifTags, Image
from PIL.TiffImagePlugin import TiffImageFile

# Pillow's errors for a damaged file, without its name.
_READ_ERRORS = (
    OSError,
    SyntaxError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
# Pillow silently clips these to 8 bits in convert("RGB").
_WIDE_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
_TIFF_BITS = 258
# Pillow scales the gray levels of such PNGs to 0 to 255.
_GRAY_STEPS = {"L;2": 85, "L;4": 17}


@contextmanager
def readable(
    name: str, kind: str = "image", errors: tuple[type[Exception], ...] = _READ_ERRORS
) -> Iterator[None]:
    """Turn the errors of a damaged file into a ``ValueError`` with its name and kind."""
    try:
        yield
    except errors as error:
        raise ValueError(
            f"{name} must be a readable {kind}, got {type(error).__name__}: {error}"
        ) from error


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """Open an image; errors inside the context contain its path.

    Raises:
        ValueError: Not an image, or a damaged one.
    """
    with readable(str(path)), Image.open(path) as image:
        yield image


@dataclass(frozen=True)
class Header:
    """Facts of an image that are available without decoding it.

    Attributes:
        stored_hw: (H, W) as stored in the file.
        upright_hw: (H, W) after applying the EXIF orientation.
        orientation: The EXIF orientation, 1 to 8; 1 is upright.
        turned_by_pillow: Whether Pillow applies it itself, as it does for TIFF.
    """

    stored_hw: tuple[int, int]
    upright_hw: tuple[int, int]
    orientation: int
    turned_by_pillow: bool


def read_header(path: Path) -> Header:
    """Read an image's header.

    Raises:
        ValueError: Not an image, or one with more than 8 bits per channel.
    """
    with opened(path) as image:
        check_depth(image, str(path))
        hw, orientation, is_tiff = image.size[::-1], _orientation(image), image.format == "TIFF"
    other = hw[::-1] if orientation >= 5 else hw
    stored, upright = (other, hw) if is_tiff else (hw, other)
    return Header(stored, upright, orientation, turned_by_pillow=is_tiff)


def check_depth(image: Image.Image, name: str) -> None:
    """Raise for images of more than 8 bits per channel.

    Of a color image Pillow keeps the upper 8 of 16 bits: nearly black for a 12-bit camera.

    Args:
        image: Opened, not yet decoded.
        name: The image's name in the error.

    Raises:
        ValueError: As described.
    """
    if image.mode in _WIDE_MODES:
        raise ValueError(
            f"{name} must be an 8-bit image, the 0-255 RGB that SAM was trained on, got Pillow's "
            f"mode {image.mode!r}"
        )
    bits = 16 if image.format == "PNG" and ";16" in _raw_mode(image) else 8
    if isinstance(image, TiffImageFile):
        bits = max(image.tag_v2.get(_TIFF_BITS, (8,)))
    if bits > 8:
        raise ValueError(
            f"{name} must have 8 bits per channel, the 0-255 RGB that SAM was trained on, got "
            f"{bits}; scale it by its largest possible value first (4095 for a 12-bit camera, else "
            "65535)"
        )


def gray_step(image: Image.Image) -> int:
    """Return Pillow's scale factor for the values of a gray PNG of 2 or 4 bits, else 1.

    Args:
        image: Opened, not yet decoded.
    """
    return _GRAY_STEPS.get(_raw_mode(image), 1) if image.format == "PNG" else 1


def _raw_mode(image: Image.Image) -> str:
    """Return Pillow's name of the pixel format in the file, "" once they are decoded."""
    tile = getattr(image, "tile", None)
    args = tile[0][3] if tile else ""
    return str(args[0] if isinstance(args, tuple) and args else args)


def _orientation(image: Image.Image) -> int:
    # Without an EXIF chunk before the pixels, Pillow would decode a whole PNG to search after them.
    if image.format == "PNG" and "exif" not in image.info:
        return 1
    value = image.getexif().get(ExifTags.Base.Orientation, 1)
    return value if value in range(1, 9) else 1
