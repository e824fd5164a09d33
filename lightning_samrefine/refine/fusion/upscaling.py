"""PostprocessMasks inside a mask's own extent (docs/algorithm4.md, step 9).

Bilinear interpolation is a convex combination, so a full-resolution logit can only be positive
where one of the low-resolution logits that it is made of is. Everything outside the box of
positive low-resolution logits, grown by the support of both interpolations, need not be computed:
step 10 sets it to 0 anyway.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from segment_anything.modeling import Sam
from torch import Tensor

from lightning_samrefine.models.base import Promptable
from lightning_samrefine.models.sam import SamPromptable

# Up to this sum of height and width torch's CPU kernel rounds in another order, and a whole frame
# costs no more than a window does.
_SMALL_FRAME = 128


@dataclass(frozen=True)
class Window:
    """The part [y0, y1) × [x0, x1) of a frame; empty where an end is not past its start."""

    y0: int
    y1: int
    x0: int
    x1: int

    def __bool__(self) -> bool:
        return self.y1 > self.y0 and self.x1 > self.x0

    @property
    def slices(self) -> tuple[slice, slice]:
        """Index of the window in an (H, W) tensor."""
        return slice(self.y0, self.y1), slice(self.x0, self.x1)


def extents(logits: Tensor) -> Tensor:
    """Mark the rows and columns in which a mask is positive anywhere.

    Args:
        logits: (N, m, m) float, NaN counting as not positive.

    Returns:
        (N, 2, m) bool, rows first.
    """
    positive = logits > 0
    return torch.stack([positive.any(dim=2), positive.any(dim=1)], dim=1)


class WindowedUpscale:
    """SAM's two-step rule for images of one size, computed in windows.

    On the CPU equal to `F.interpolate` on the whole frames bit for bit, elsewhere to float
    rounding: the taps are read off `F.interpolate` itself, and applied in its order, horizontally
    and then vertically, the second tap's product first.

    Args:
        mask_size: m, side of the low-resolution logits.
        image_size: Side of the model's square input.
        input_hw: (h_in, w_in), the part of the input that the image fills.
        image_hw: (H, W).
        device: Where the logits are.
    """

    def __init__(
        self,
        mask_size: int,
        image_size: int,
        input_hw: tuple[int, int],
        image_hw: tuple[int, int],
        device: torch.device,
    ) -> None:
        self._to_input = _Resize((mask_size, mask_size), (image_size, image_size), device)
        self._to_image = _Resize(input_hw, image_hw, device)
        self._crop = Window(0, input_hw[0], 0, input_hw[1])

    @classmethod
    def of(cls, sam: Promptable, image_hw: tuple[int, int]) -> WindowedUpscale | None:
        """Return the rule of a model for an image size; None where it may have one of its own."""
        known = (
            isinstance(sam, SamPromptable)
            and type(sam).postprocess_masks is SamPromptable.postprocess_masks
            and getattr(type(sam.module), "postprocess_masks", None) is Sam.postprocess_masks
        )
        if not known:
            return None
        return cls(sam.mask_size, sam.image_size, sam.input_hw(image_hw), image_hw, sam.device)

    def __call__(self, logits: Tensor, extent: np.ndarray) -> tuple[Tensor, Window]:
        """Upscale one mask where it can be positive.

        Args:
            logits: (m, m) float32.
            extent: (2, m) bool, the mask's row of `extents`.

        Returns:
            (h, w) float32 logits and their window of the (H, W) image, which may be empty.
        """
        positive = Window(*_ends(extent[0]), *_ends(extent[1]))
        in_input = self._to_input.reached_from(positive)
        in_input = Window(
            in_input.y0,
            min(in_input.y1, self._crop.y1),
            in_input.x0,
            min(in_input.x1, self._crop.x1),
        )
        window = self._to_image.reached_from(in_input) if in_input else Window(0, 0, 0, 0)
        if not window:
            return logits.new_empty(0, 0), window
        # Pixels at the window's rim also draw on input pixels that cannot be positive themselves.
        needed = self._to_image.sources_of(window)
        source = self._to_input.sources_of(needed)
        at_input = self._to_input(logits[source.slices], source, needed)
        return self._to_image(at_input, needed, window), window


class _Taps:
    """The two source pixels of each target pixel along one side, and their weights."""

    def __init__(self, source: int, target: int, device: torch.device) -> None:
        # One-hot probes by the remainder modulo 3 give every tap's exact float32 weight; taps are
        # next to one another, so a remainder has one candidate within reach of the position.
        remainder = torch.arange(source, device=device) % 3
        probes = torch.stack([(remainder == r).float() for r in range(3)])[None]
        weights = F.interpolate(probes, target, mode="linear", align_corners=False)[0].cpu().numpy()
        position = (np.arange(target) + 0.5) * (source / target) - 0.5
        position = position.clip(0, source - 1)
        r = np.arange(3)[:, None]
        candidates = r + 3 * np.rint((position - r) / 3).astype(np.int64)
        used = weights != 0
        first = np.where(used, candidates, source).argmin(axis=0)
        last = np.where(used, candidates, -1).argmax(axis=0)
        columns = np.arange(target)
        self.first = candidates[first, columns]
        self.last = candidates[last, columns]
        first_weight = weights[first, columns]
        last_weight = np.where(first == last, np.float32(0), weights[last, columns])
        self._tensors = tuple(
            torch.from_numpy(array).to(device)
            for array in (self.first, self.last, first_weight, last_weight)
        )

    def reached_from(self, start: int, stop: int) -> tuple[int, int]:
        """Return the range of target pixels that draw on source pixels [start, stop)."""
        return (
            int(np.searchsorted(self.last, start, side="left")),
            int(np.searchsorted(self.first, stop - 1, side="right")),
        )

    def sources_of(self, start: int, stop: int) -> tuple[int, int]:
        """Return the range of source pixels that target pixels [start, stop) draw on."""
        return int(self.first[start]), int(self.last[stop - 1]) + 1

    def apply(self, values: Tensor, dim: int, offset: int, start: int, stop: int) -> Tensor:
        """Interpolate (h, w) values, which begin at source pixel ``offset``, along a dimension."""
        first, last, first_weight, last_weight = (t[start:stop] for t in self._tensors)
        shape = (-1, 1) if dim == 0 else (1, -1)
        result = values.index_select(dim, last - offset).mul_(last_weight.view(shape))
        return result.addcmul_(values.index_select(dim, first - offset), first_weight.view(shape))


# A data set has few image sizes, and two sides of equal length share their taps.
_taps = lru_cache(maxsize=256)(_Taps)


class _Resize:
    """One bilinear interpolation from frame to frame, evaluated in windows."""

    def __init__(
        self, source_hw: tuple[int, int], target_hw: tuple[int, int], device: torch.device
    ) -> None:
        self._target_hw = target_hw
        self._rows = _taps(source_hw[0], target_hw[0], device)
        self._columns = _taps(source_hw[1], target_hw[1], device)
        self._whole = sum(target_hw) <= _SMALL_FRAME
        self._source = Window(0, source_hw[0], 0, source_hw[1])

    def reached_from(self, window: Window) -> Window:
        """Return the window of the target that draws on a window of the source."""
        return Window(
            *self._rows.reached_from(window.y0, window.y1),
            *self._columns.reached_from(window.x0, window.x1),
        )

    def sources_of(self, window: Window) -> Window:
        """Return the window of the source that a window of the target draws on."""
        if self._whole:
            return self._source
        return Window(
            *self._rows.sources_of(window.y0, window.y1),
            *self._columns.sources_of(window.x0, window.x1),
        )

    def __call__(self, values: Tensor, source: Window, target: Window) -> Tensor:
        """Interpolate the values of the source window to the target window."""
        if self._whole:
            frame = F.interpolate(
                values[None, None], self._target_hw, mode="bilinear", align_corners=False
            )
            return frame[0, 0][target.slices]
        across = self._columns.apply(values, 1, source.x0, target.x0, target.x1)
        return self._rows.apply(across, 0, source.y0, target.y0, target.y1)


def _ends(used: np.ndarray) -> tuple[int, int]:
    """Return the range from the first to the last True of an (m,) bool array, (0, 0) if none."""
    where = np.flatnonzero(used)
    return (int(where[0]), int(where[-1]) + 1) if len(where) else (0, 0)
