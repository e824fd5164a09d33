"""Algorithm 4 transcribed step by step, one region at a time, for comparison with the refiner.

Each comment of the form "Step n" opens a step of docs/algorithm4.md. Nothing here is shared with
the package: regions come from `scipy.ndimage`, everything that SAM does from segment-anything's own
modules. Slow on purpose.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import ndimage
from segment_anything.modeling import Sam
from segment_anything.utils.transforms import ResizeLongestSide

EIGHT_CONNECTED = np.ones((3, 3), dtype=int)


@dataclass
class OracleRegion:
    """One prompted region.

    Attributes:
        class_index: Class in [0, C).
        mask: (h_d, w_d) bool.
        grid_box: (x_min, y_min, x_max, y_max) on the grid, all inclusive.
        grid_point: (x, y) of a pixel of the grid.
        box: `grid_box` in image pixels.
        point: `grid_point` in image pixels.
        score: Q_b.
        pred_iou: SAM's predicted IoU, None before step 7.
        accepted: Whether it is above τ_iou.
    """

    class_index: int
    mask: NDArray[np.bool_]
    grid_box: tuple[int, int, int, int]
    grid_point: tuple[int, int]
    box: tuple[float, float, float, float]
    point: tuple[float, float]
    score: np.float32
    pred_iou: np.float32 | None = None
    accepted: bool = False


@dataclass
class OracleResult:
    """Everything that the algorithm returns, and what the tests check on its way there.

    Attributes:
        labels: (H, W) int64, S'.
        probs: (C, H, W) float32, L'.
        covered: (H, W) bool, as step 10 leaves it.
        pred_iou: (N,) float32, Q.
        boxes: (N, 4) float32, B'.
        classes: (N,) int64.
        regions: Every prompted region, in order.
        skipped: Number of classes with pixels in the label map that step 3 skipped.
        mapped: (C, H, W) float32, L' as step 10 leaves it; None after an early return.
        failed: (H, W) bool, the union of step 11; None after an early return.
        margin: (H, W) float32, how far the pixel is from another outcome of step 10: the smallest
            of its logits' distances to 0 and of the lead of its best class; inf where no accepted
            mask has a say, and after an early return.
    """

    labels: NDArray[np.int64]
    probs: NDArray[np.float32]
    covered: NDArray[np.bool_]
    pred_iou: NDArray[np.float32]
    boxes: NDArray[np.float32]
    classes: NDArray[np.int64]
    regions: list[OracleRegion]
    skipped: int
    mapped: NDArray[np.float32] | None = None
    failed: NDArray[np.bool_] | None = None
    margin: NDArray[np.float32] | None = None


@torch.no_grad()
def algorithm4(
    sam: Sam,
    image: torch.Tensor,
    labels: torch.Tensor | None,
    probs: torch.Tensor,
    score_thresh: float,
    mask_prompt_scale: float,
    pred_iou_thresh: float,
    stride: int,
    min_region_area: int = 1,
    mask_axes: int = 4,
    embedding: torch.Tensor | None = None,
) -> OracleResult:
    """Run steps 0 to 12.

    Args:
        sam: The model, in float32 on the CPU.
        image: (3, H, W) uint8 RGB.
        labels: (H, W) int64; None takes the first class of the largest probability.
        probs: (C, H, W) float32 in [0, 1].
        score_thresh: τ_c.
        mask_prompt_scale: τ_m.
        pred_iou_thresh: τ_iou.
        stride: r.
        min_region_area: In grid pixels.
        mask_axes: 4 for the mask prompt as (1, 1, m, m); 3 repeats the slip of the published code,
            which leaves the batch axis out.
        embedding: (1, D, h, w), the image's; step 0 computes it where None.
    """
    num_classes, height, width = probs.shape
    raw_probs = probs.numpy().astype(np.float32)
    raw_labels = raw_probs.argmax(axis=0) if labels is None else labels.numpy()
    tau_c, tau_iou = np.float32(score_thresh), np.float32(pred_iou_thresh)

    # Step 0
    input_hw = preprocess_shape(height, width, sam.image_encoder.img_size)
    if embedding is None:
        resized = F.interpolate(
            image[None].float(), input_hw, mode="bilinear", align_corners=False, antialias=True
        )
        embedding = sam.image_encoder(sam.preprocess(resized))

    # Step 1
    grid_h, grid_w = max(1, height // stride), max(1, width // stride)
    grid_labels = nearest(raw_labels, (grid_h, grid_w))
    grid_probs = bilinear(raw_probs, (grid_h, grid_w))

    # Step 2
    unknown = (grid_labels < 0) | (grid_labels >= num_classes)
    if score_thresh > 0:
        unknown |= grid_probs.max(axis=0) < tau_c
    grid_labels[unknown] = num_classes

    # Step 3
    regions, skipped = [], 0
    for c in range(num_classes):
        if grid_probs[c].max() < tau_c:
            skipped += bool((grid_labels == c).any())
            continue
        for mask in components(grid_labels == c):
            if mask.sum() < min_region_area:
                continue
            rows, columns = np.nonzero(mask)
            box = tuple(int(v) for v in (columns.min(), rows.min(), columns.max(), rows.max()))
            point = most_probable_pixel(mask, grid_probs[c])
            regions.append(
                OracleRegion(
                    class_index=c,
                    mask=mask,
                    grid_box=box,
                    grid_point=point,
                    box=tuple(float(v * stride) for v in box),
                    point=tuple(float(v * stride) for v in point),
                    score=np.float32(grid_probs[c][mask].astype(np.float64).mean()),
                )
            )

    # Step 4
    untouched = OracleResult(
        labels=raw_labels,
        probs=raw_probs,
        covered=np.zeros((height, width), bool),
        pred_iou=np.zeros(0, np.float32),
        boxes=np.zeros((0, 4), np.float32),
        classes=np.zeros(0, np.int64),
        regions=regions,
        skipped=skipped,
        margin=np.full((height, width), np.inf, np.float32),
    )
    if not regions:
        return untouched

    # Step 5
    prompted = sorted({region.class_index for region in regions})
    mask_prompts = class_prompts(
        grid_probs[prompted],
        preprocess_shape(height, width, sam.prompt_encoder.mask_input_size[0]),
        sam.prompt_encoder.mask_input_size[0],
        tau_c,
        mask_prompt_scale,
    )

    # Steps 6 and 7
    low_res_logits = []
    grid_input_hw = preprocess_shape(grid_h, grid_w, sam.image_encoder.img_size)
    for region in regions:
        # The product in float64, rounded once: the float32 nearest to the exact coordinate.
        scale = np.array([grid_input_hw[1] / grid_w, grid_input_hw[0] / grid_h])
        box = torch.from_numpy(np.array([region.grid_box]) * np.tile(scale, 2)).float()
        point = torch.from_numpy(np.array([[region.grid_point]]) * scale).float()
        mask = mask_prompts[prompted.index(region.class_index)][None]
        sparse, dense = sam.prompt_encoder(
            points=(point, torch.ones(1, 1)),
            boxes=box,
            masks=mask[None] if mask_axes == 4 else mask,
        )
        logits, pred_iou = sam.mask_decoder(
            image_embeddings=embedding,
            image_pe=sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
        )
        region.pred_iou = np.float32(pred_iou.item())
        low_res_logits.append(logits)

    # Step 8
    for region in regions:
        region.accepted = bool(region.pred_iou > tau_iou)
    if not any(region.accepted for region in regions):
        return untouched

    # Steps 9 and 10
    mapped = np.zeros_like(raw_probs)
    margin = np.full((height, width), np.inf, np.float32)
    for region, logits in zip(regions, low_res_logits, strict=True):
        if not region.accepted:
            continue
        full = sam.postprocess_masks(logits, input_hw, (height, width))[0, 0]
        c = region.class_index
        value = torch.sigmoid(full).numpy() * (full.numpy() > 0) * raw_probs[c]
        mapped[c] = np.maximum(mapped[c], value)
        margin = np.where(raw_probs[c] > 0, np.minimum(margin, abs(full.numpy())), margin)
    covered = mapped.sum(axis=0) > 0
    new_labels = np.where(covered, mapped.argmax(axis=0), raw_labels)
    if num_classes > 1:
        second, best = np.sort(mapped, axis=0)[-2:]
        margin = np.where(covered, np.minimum(margin, best - second), margin)

    # Step 11
    failed = np.zeros((height, width), bool)
    for region in regions:
        if not region.accepted:
            failed |= nearest(region.mask, (height, width)) > 0
    raised = np.maximum(mapped, raw_probs * failed)
    # As published; L' has just been raised to L · 1{F}, so this changes no label.
    beaten = (raw_probs * failed).max(axis=0) > raised.max(axis=0)
    new_labels = np.where(beaten, raw_labels, new_labels)

    # Step 12
    accepted = [region for region in regions if region.accepted]
    return OracleResult(
        labels=new_labels,
        probs=raised,
        covered=covered,
        pred_iou=np.array([region.pred_iou for region in accepted], np.float32),
        boxes=np.array([region.box for region in accepted], np.float32),
        classes=np.array([region.class_index for region in accepted], np.int64),
        regions=regions,
        skipped=skipped,
        mapped=mapped,
        failed=failed,
        margin=margin,
    )


def preprocess_shape(height: int, width: int, long_side: int) -> tuple[int, int]:
    """GetPreprocessShape; a side that rounds to 0 becomes 1, or there would be no image."""
    h, w = ResizeLongestSide.get_preprocess_shape(height, width, long_side)
    return max(1, h), max(1, w)


def nearest(plane: NDArray, hw: tuple[int, int]) -> NDArray[np.float32]:
    """Resize one (H, W) plane; in float32, for torch places the pixels by the data's type."""
    tensor = torch.from_numpy(plane.astype(np.float32))
    return F.interpolate(tensor[None, None], hw, mode="nearest")[0, 0].numpy()


def bilinear(planes: NDArray[np.float32], hw: tuple[int, int]) -> NDArray[np.float32]:
    """Resize (K, H, W) planes in one call, for torch rounds by the number of planes."""
    tensor = torch.from_numpy(planes)
    return F.interpolate(tensor[None], hw, mode="bilinear", align_corners=False)[0].numpy()


def components(mask: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
    """Split a mask into its 8-connected components, by the place of their first pixel."""
    numbered, count = ndimage.label(mask, structure=EIGHT_CONNECTED)
    masks = [numbered == number for number in range(1, count + 1)]
    return sorted(masks, key=lambda m: int(np.flatnonzero(m)[0]))


def most_probable_pixel(mask: NDArray[np.bool_], probs: NDArray[np.float32]) -> tuple[int, int]:
    """Return (x, y) of the first pixel of the mask whose probability is the largest in it."""
    row, column = np.unravel_index(np.where(mask, probs, -1).argmax(), mask.shape)
    return int(column), int(row)


def class_prompts(
    planes: NDArray[np.float32],
    hw: tuple[int, int],
    side: int,
    tau_c: np.float32,
    scale: float,
) -> torch.Tensor:
    """Build (K, side, side) mask prompts from L_d of the K classes that have regions (step 5)."""
    padded = np.zeros((len(planes), side, side), np.float32)
    padded[:, : hw[0], : hw[1]] = bilinear(planes, hw)
    return torch.from_numpy(padded * np.float32(scale) * (padded > tau_c))
