"""Opening image files: what Pillow leaves unsaid about them, and errors that name the file."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL import ExifTags, Image
from PIL.TiffImagePlugin import TiffImageFile

# What Pillow raises for a damaged file; none of them names it.
READ_ERRORS = (
    OSError,
    SyntaxError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
_TIFF_BITS = 258
# Pillow widens the gray levels of such PNGs to 0 to 255.
_GRAY_STEPS = {"L;2": 85, "L;4": 17}


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """Open an image; what fails inside names the file.

    Raises:
        ValueError: Not an image, or a damaged one.
    """
    try:
        with Image.open(path) as image:
            yield image
    except READ_ERRORS as error:
        raise ValueError(f"{path}: not a readable image ({error})") from error


@dataclass(frozen=True)
class Header:
    """What is known of an image without decoding it.

    Attributes:
        stored_hw: (H, W) as the pixels lie in the file.
        upright_hw: (H, W) once the EXIF orientation is applied.
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
        ValueError: Not an image, or one of more than 8 bits a channel.
    """
    with opened(path) as image:
        check_depth(image, str(path))
        hw, orientation, is_tiff = image.size[::-1], _orientation(image), image.format == "TIFF"
    other = hw[::-1] if orientation >= 5 else hw
    stored, upright = (other, hw) if is_tiff else (hw, other)
    return Header(stored, upright, orientation, turned_by_pillow=is_tiff)


def check_depth(image: Image.Image, name: str) -> None:
    """Refuse color images of more than 8 bits a channel.

    Pillow keeps the upper 8 of 16 bits, nearly black where a camera has used 12 of them.

    Args:
        image: Opened, not yet decoded.
        name: What the error calls it.

    Raises:
        ValueError: As described.
    """
    bits = 16 if image.format == "PNG" and ";16" in _raw_mode(image) else 8
    if isinstance(image, TiffImageFile):
        bits = max(image.tag_v2.get(_TIFF_BITS, (8,)))
    if bits > 8 and image.mode not in ("I", "F") and not image.mode.startswith("I;"):
        raise ValueError(
            f"{name}: got {bits} bits a channel, accepted are 8-bit images, the 0-255 RGB that "
            "SAM was trained on; scale it by its largest possible value first (4095 of a 12-bit "
            "camera, else 65535)"
        )


def gray_step(image: Image.Image) -> int:
    """Return by how much Pillow multiplies the values of a gray PNG of 2 or 4 bits, else 1.

    Args:
        image: Opened, not yet decoded.
    """
    return _GRAY_STEPS.get(_raw_mode(image), 1) if image.format == "PNG" else 1


def _raw_mode(image: Image.Image) -> str:
    """Return Pillow's name of how the pixels lie in the file, "" where they are decoded."""
    tile = getattr(image, "tile", None)
    args = tile[0][3] if tile else ""
    return str(args[0] if isinstance(args, tuple) and args else args)


def _orientation(image: Image.Image) -> int:
    # Without the chunk in front of the pixels Pillow would decode a whole PNG to look behind them.
    if image.format == "PNG" and "exif" not in image.info:
        return 1
    value = image.getexif().get(ExifTags.Base.Orientation, 1)
    return value if value in range(1, 9) else 1
