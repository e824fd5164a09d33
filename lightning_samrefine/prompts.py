"""From regions to prompts in the model's frames (ALGORITHM.md steps 5 and 6).

Without mask prompts the box and the click of a region may be moved to a coarse lattice: regions
that differ a little then ask the same, and the answer of an earlier epoch serves.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_samrefine.models.protocol import Promptable, Prompts, accepts_masks
from lightning_samrefine.regions import GridRegions

# Sides of a box move by at most an eighth of its size: measured, that neither gains nor loses mIoU.
_STEPS_PER_SIDE = 4


def lattice_prompts(regions: GridRegions) -> np.ndarray:
    """Move each region's box and point to a lattice whose steps grow with the region.

    Box sides lie at multiples of a power of two of at most a quarter of the box's size, points in
    the middle of cells no larger than the distance to the region's border, and so inside it.

    Args:
        regions: N regions on the working grid.

    Returns:
        (N, 6) int32, XYXY of the box and XY of the point in half grid pixels.
    """
    height, width = regions.components.shape
    size = np.array([width, height], dtype=np.float64)
    boxes = regions.boxes.reshape(-1, 2, 2)
    sides = boxes[:, 1] - boxes[:, 0]
    steps = _power_of_two(sides / _STEPS_PER_SIDE)[:, None]
    boxes = np.clip(np.rint(boxes / steps) * steps, 0, size)
    cells = _power_of_two(regions.radii)[:, None]
    points = np.minimum((np.floor(regions.points / cells) + 0.5) * cells, size - 0.5)
    return np.rint(2 * np.concatenate([boxes.reshape(-1, 4), points], axis=1)).astype(np.int32)


def _power_of_two(values: np.ndarray) -> np.ndarray:
    """Round down to powers of two, of at least 1."""
    return 2.0 ** np.floor(np.log2(np.maximum(values, 1)))


def prompts_at(
    lattice: np.ndarray,
    grid_hw: tuple[int, int],
    sam: Promptable,
    image_hw: tuple[int, int],
    device: torch.device,
) -> Prompts:
    """Bring prompts on the lattice to the model's frame (step 6).

    Args:
        lattice: (N, 6) int32 of `lattice_prompts`.
        grid_hw: (h_d, w_d) of the working grid.
        sam: The model.
        image_hw: (H, W) of the image.
        device: Where the prompts are to be.
    """
    scaled = lattice / 2 * np.tile(_scale(grid_hw, sam, image_hw), 3)
    return Prompts(_to_device(scaled[:, :4], device), _to_device(scaled[:, 4:], device))


def build_prompts(
    regions: GridRegions,
    sam: Promptable,
    image_hw: tuple[int, int],
    score_thresh: float,
    mask_prompt_scale: float,
    with_masks: bool = True,
) -> Prompts:
    """Build box, point and (where the model takes them) mask prompts for one image's regions.

    Args:
        regions: N ≥ 1 regions on the working grid.
        sam: The model, for its frames.
        image_hw: (H, W) of the image.
        score_thresh: τ_c. Probabilities not above it are 0 in the mask prompt.
        mask_prompt_scale: τ_m.
        with_masks: Whether to prompt masks at all.
    """
    device = regions.probs.device
    scale = _scale(regions.components.shape, sam, image_hw)
    boxes = _to_device(regions.boxes * np.tile(scale, 2), device)
    points = _to_device(regions.points * scale, device)
    if not with_masks or not accepts_masks(sam):
        return Prompts(boxes, points)
    used, mask_index = np.unique(regions.classes, return_inverse=True)
    return Prompts(
        boxes=boxes,
        points=points,
        masks=mask_prompts(
            regions.probs[torch.from_numpy(used).to(device)],
            sam.mask_hw(image_hw),
            sam.mask_size,
            score_thresh,
            mask_prompt_scale,
        ),
        mask_index=torch.from_numpy(mask_index).to(device),
    )


def mask_prompts(
    class_probs: Tensor,
    mask_hw: tuple[int, int],
    mask_size: int,
    score_thresh: float,
    mask_prompt_scale: float,
) -> Tensor:
    """Turn probability maps of classes into mask-prompt logits (step 5).

    Args:
        class_probs: (K, h_d, w_d) float32 in [0, 1].
        mask_hw: (h_n, w_n), the part of the prompt that the image fills.
        mask_size: m.
        score_thresh: τ_c.
        mask_prompt_scale: τ_m.

    Returns:
        (K, m, m) float32: L · τ_m · 1{L > τ_c}, 0 right of and below the image.
    """
    resized = F.interpolate(class_probs[None], mask_hw, mode="bilinear", align_corners=False)[0]
    padded = F.pad(resized, (0, mask_size - mask_hw[1], 0, mask_size - mask_hw[0]))
    return padded * mask_prompt_scale * (padded > score_thresh)


def _scale(grid_hw: tuple[int, int], sam: Promptable, image_hw: tuple[int, int]) -> np.ndarray:
    """Return the XY factors from the working grid to the model's frame."""
    in_h, in_w = sam.input_hw(image_hw)
    return np.array([in_w / grid_hw[1], in_h / grid_hw[0]])


def _to_device(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(array.astype(np.float32)).to(device, non_blocking=True)
