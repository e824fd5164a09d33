"""Everything SAM predicted for one image, before any of it is accepted, and its check."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from torch import Tensor

from lightning_samrefine.models.base import Promptable
from lightning_samrefine.refine.raw_prediction import RawPrediction
from lightning_samrefine.refine.regions import RegionSet
from lightning_samrefine.refine.windows import Window
from lightning_samrefine.utils.precision import active_autocast

if TYPE_CHECKING:
    from lightning_samrefine.refine.mask_proposals import CompressedMasks, MaskProposals


@dataclass(frozen=True)
class MaskPredictions:
    """What a fusion works on.

    The masks of N prompted regions are either logits, for Algorithm 4, or packed, for the soft
    fusion of an ``unsupported_weight``.

    Attributes:
        raw: The image and its raw prediction.
        regions: N regions on the working grid.
        pred_iou: (N,) float32 on the CPU, SAM's predicted IoUs; 0 if regions are not prompted.
        low_res_logits: N maps (m, m) float32, or none.
        region_masks: N packed masks, of a window on the CPU compressed; or None.
        mask_proposals: Masks of the point grid; None without a grid or without a region.
        digest: The image's hash, None if no cache needed it.
        window: The part of an image that ``raw`` is, which may be at a lower resolution; None for
            the image itself.
    """

    raw: RawPrediction
    regions: RegionSet
    pred_iou: Tensor
    low_res_logits: Sequence[Tensor] = ()
    region_masks: MaskProposals | CompressedMasks | None = None
    mask_proposals: MaskProposals | None = None
    digest: str | None = None
    window: Window | None = None

    @property
    def classes(self) -> np.ndarray:
        """(N,) int64, the regions' classes."""
        return self.regions.classes

    @property
    def looks(self) -> tuple[MaskPredictions, ...]:
        """The looks at the image, as `WindowPredictions` has them: this one."""
        return (self,)

    @property
    def in_image(self) -> Window:
        """The part of the image that SAM looked at."""
        return self.window or Window(0, 0, *self.raw.image_hw)


@dataclass(frozen=True)
class WindowPredictions:
    """Everything SAM predicted for the windows of one image.

    Attributes:
        raw: The image and its raw prediction.
        looks: At the windows of `split_windows`, in their order, and last, if there are regions
            larger than a window, at the whole image.
        windows: Number of windows.
        overlap: Pixels over which the votes of neighboring windows blend.
        digest: The image's hash, None if no cache needed it.
    """

    raw: RawPrediction
    looks: tuple[MaskPredictions, ...]
    windows: int
    overlap: int
    digest: str | None = None

    @property
    def classes(self) -> np.ndarray:
        """(N,) int64, the classes of all looks' regions."""
        return np.concatenate([look.classes for look in self.looks])

    @property
    def pred_iou(self) -> Tensor:
        """(N,) float32 on the CPU, SAM's predicted IoUs of all looks' regions."""
        return torch.cat([look.pred_iou for look in self.looks])


ImagePredictions: TypeAlias = MaskPredictions | WindowPredictions


def finite_iou(pred_iou: Tensor, logits: Tensor) -> Tensor:
    """Return predicted IoUs, NaN for a mask with a logit of NaN or infinity.

    Such a mask covers nothing, or everything, and looks like any other. Marked in its IoU, (..., N)
    for logits (..., N, h, w), it costs the CPU no further wait for the GPU.
    """
    # The sum is finite if all logits are: they are no larger than thousands.
    return pred_iou + 0 * logits.sum(dim=(-2, -1))


def non_finite_error(sam: Promptable) -> FloatingPointError:
    """Return the error about a non-finite IoU of `finite_iou`, under the autocast in effect."""
    dtype = active_autocast(sam.device)
    computed = "float32" if dtype is None else str(dtype).removeprefix("torch.")
    return FloatingPointError(
        f"SAM {sam.name} predicted an IoU of NaN or infinity, or a mask with such logits, in "
        f"{computed}; with precision='32' half precision cannot overflow"
    )
