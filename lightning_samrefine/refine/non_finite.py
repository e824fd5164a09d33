"""MaskPredictions of SAM that are no numbers, as half precision or damaged weights give them."""

from __future__ import annotations

from torch import Tensor


def finite_iou(pred_iou: Tensor, logits: Tensor) -> Tensor:
    """Return predicted IoUs, NaN where a mask holds NaN or infinity.

    A mask like that covers nothing, or everything, and looks like an answer. Told by its IoU, it
    costs the CPU no further wait for the GPU.

    Args:
        pred_iou: (..., N) float32.
        logits: (..., N, h, w) float32.

    Returns:
        (..., N) float32.
    """
    # The sum is finite where all logits are: they are no larger than thousands.
    return pred_iou + 0 * logits.sum(dim=(-2, -1))


def non_finite_error(name: str, precision: str) -> FloatingPointError:
    """Return the error about a model whose answers `finite_iou` found wanting."""
    return FloatingPointError(
        f"SAM {name} predicted an IoU of NaN or infinity, or a mask with such logits, under "
        f"precision={precision!r}; with precision='32' half precision cannot overflow"
    )
