"""How images, prompts and masks pass to a model's frames and back.

The steps of docs/algorithm4.md are written for SAM; some name a size that a model may choose
differently:

| step | `PaddedFrame`: SAM, SAM-HQ, MobileSAM | `SquashedFrame`: SAM 2, EdgeTAM, SAM 3 |
|---|---|---|
| 0, 6: image, boxes, points | long side to S, zeros fill S × S | both sides to S |
| 5: mask prompt | long side to m, zeros fill m × m | both sides to m |
| 9: logits | m × m to S × S, padding cut off, to H × W | m × m to H × W at once |

S is `image_size`: 1024, and 1008 in SAM 3. m is `mask_size`, four for each patch of the encoder:
256, and 288 in SAM 3. The refiner uses `input_hw`, `mask_hw` and `postprocess_masks` of a model and
needs no other difference.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_CPU_ROWS = 1024  # of an image, converted to float32 at once


def get_preprocess_shape(height: int, width: int, long_side: int) -> tuple[int, int]:
    """Return the size of an image whose long side was resized to ``long_side`` (steps 0, 5, 6).

    The rule of segment-anything's ``ResizeLongestSide.get_preprocess_shape``, except that no
    side falls below 1: an image of 1 × 4000 pixels still has a row.
    """
    scale = long_side * 1.0 / max(height, width)
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


@dataclass(frozen=True)
class _Frame:
    """A model's square frames.

    Attributes:
        image_size: S, side in pixels of the model's input.
        mask_size: m, side of its mask prompts and low-resolution logits.
    """

    image_size: int
    mask_size: int


class PaddedFrame(_Frame):
    """SAM's geometry: images keep their shape, and zeros fill the square right and below."""

    def input_hw(self, image_hw: tuple[int, int]) -> tuple[int, int]:
        """Return (h_in, w_in), the size an image of size (H, W) is resized to (steps 0 and 6)."""
        return get_preprocess_shape(*image_hw, self.image_size)

    def mask_hw(self, image_hw: tuple[int, int]) -> tuple[int, int]:
        """Return (h_n, w_n), the part of a mask prompt that the image fills (step 5)."""
        return get_preprocess_shape(*image_hw, self.mask_size)

    def postprocess_masks(self, low_res_logits: Tensor, image_hw: tuple[int, int]) -> Tensor:
        """Bring (N, m, m) logits to (N, H, W) by way of the padded input (step 9)."""
        padded = _bilinear(low_res_logits, (self.image_size, self.image_size))
        height, width = self.input_hw(image_hw)
        return _bilinear(padded[:, :height, :width], image_hw)


class SquashedFrame(_Frame):
    """SAM 2's geometry: every image is stretched to the square, whatever its shape."""

    def input_hw(self, image_hw: tuple[int, int]) -> tuple[int, int]:
        """Return (S, S) (steps 0 and 6)."""
        return self.image_size, self.image_size

    def mask_hw(self, image_hw: tuple[int, int]) -> tuple[int, int]:
        """Return (m, m) (step 5)."""
        return self.mask_size, self.mask_size

    def postprocess_masks(self, low_res_logits: Tensor, image_hw: tuple[int, int]) -> Tensor:
        """Bring (N, m, m) logits to (N, H, W) in one step (step 9)."""
        return _bilinear(low_res_logits, image_hw)


def resize_and_pad(
    image: Tensor, frame: PaddedFrame | SquashedFrame, mean: Tensor, std: Tensor
) -> Tensor:
    """Make a model's input, (1, 3, S, S) float32, of a (3, H, W) uint8 RGB image (step 0).

    Mean and deviation are (3, 1, 1), in units of pixel values, on the model's device.
    """
    height, width = frame.input_hw((image.shape[1], image.shape[2]))
    resized = resize(image, (height, width), mean.device)
    # After normalizing: the padding is 0 to the model, not black.
    normalized = (resized - mean) / std
    return F.pad(normalized, (0, frame.image_size - width, 0, frame.image_size - height))


def resize(image: Tensor, size: tuple[int, int], device: torch.device) -> Tensor:
    """Resize (3, H, W) uint8 RGB with antialiasing to (1, 3, h, w) float32 in [0, 255] (step 0)."""
    # torch has no antialiasing kernel for MPS before 2.7: the CPU resizes there.
    missing = device.type == "mps" and torch.__version__ < "2.7"
    return antialiased(image.to("cpu" if missing else device), size)[None].to(device)


def antialiased(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize (C, H, W) maps bilinearly with antialiasing to (C, h, w) float32.

    On a CPU first along the rows, some at a time, as torch does inside: in float32 a large image
    takes four times its memory.
    """
    rows = _CPU_ROWS if maps.device.type == "cpu" else maps.shape[1]
    if maps.shape[1] <= rows:
        return _antialiased(maps, size)
    narrow = [_antialiased(part, (part.shape[1], size[1])) for part in maps.split(rows, dim=1)]
    return _antialiased(torch.cat(narrow, dim=1), size)


def _antialiased(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(
        maps[None].float(), size, mode="bilinear", align_corners=False, antialias=True
    )[0]


def _bilinear(masks: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(masks[:, None].float(), size, mode="bilinear", align_corners=False)[:, 0]
