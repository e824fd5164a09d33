"""From regions to prompts in the model's frames (docs/algorithm4.md, steps 5 and 6).

Boxes and clicks come with the regions, see `refine.regions` and `refine.clicks`.
"""

from __future__ import annotations

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from lightning_samrefine.config import RefineConfig
from lightning_samrefine.models.base import Promptable, Prompts, accepts_masks
from lightning_samrefine.models.transforms import get_preprocess_shape
from lightning_samrefine.refine.regions import RegionSet
from lightning_samrefine.utils.device import upload


def build_prompts(
    regions: RegionSet,
    sam: Promptable,
    image_hw: tuple[int, int],
    config: RefineConfig,
) -> Prompts:
    """Build box, point and (if configured and the model takes them) mask prompts of one image.

    Args:
        regions: N ≥ 1 regions on the working grid.
        sam: The model, for its frames.
        image_hw: (H, W) of the image.
        config: Its ``mask_prompts``; τ_c, probabilities not above it are 0 in the mask prompt; τ_m.
    """
    device = regions.probs.device
    scale = _scale(regions.components.shape, sam, image_hw)
    boxes = upload((regions.boxes * np.tile(scale, 2)).astype(np.float32), device)
    points = upload((regions.points * scale).astype(np.float32), device)
    if not config.mask_prompts or not accepts_masks(sam):
        return Prompts(boxes, points)
    used, mask_index = np.unique(regions.classes, return_inverse=True)
    return Prompts(
        boxes=boxes,
        points=points,
        masks=mask_prompts(
            regions.probs[upload(used, device)],
            sam.mask_hw(image_hw),
            sam.mask_size,
            config.score_thresh,
            config.mask_prompt_scale,
        ),
        mask_index=upload(mask_index, device),
    )


def mask_prompts(
    class_probs: Tensor,
    mask_hw: tuple[int, int],
    mask_size: int,
    score_thresh: float,
    mask_prompt_scale: float,
) -> Tensor:
    """Turn probabilities of classes, (K, h_d, w_d), into mask-prompt logits, (K, m, m) (step 5).

    They are L · τ_m · 1{L > τ_c}, and 0 right of and below the part (h_n, w_n) that the image
    fills.
    """
    resized = F.interpolate(class_probs[None], mask_hw, mode="bilinear", align_corners=False)[0]
    padded = F.pad(resized, (0, mask_size - mask_hw[1], 0, mask_size - mask_hw[0]))
    return padded * mask_prompt_scale * (padded > score_thresh)


def _scale(grid_hw: tuple[int, int], sam: Promptable, image_hw: tuple[int, int]) -> np.ndarray:
    """Return the XY factors from the working grid to the model's frame.

    For a model that resizes the longest side, as published: the grid is scaled as if it were the
    image, which differs by less than a grid pixel if ⌊H/r⌋ cuts off a row.
    """
    in_h, in_w = sam.input_hw(image_hw)
    if (in_h, in_w) == get_preprocess_shape(*image_hw, sam.image_size):
        in_h, in_w = get_preprocess_shape(*grid_hw, sam.image_size)
    return np.array([in_w / grid_hw[1], in_h / grid_hw[0]])
