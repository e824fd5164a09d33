"""Mask proposals: masks of whatever an image shows, from a grid of point prompts.

They depend on no segmenter. The points, the thresholds and the removal of duplicates are those of
SAM's automatic mask generation (Kirillov et al., "Segment Anything", ICCV 2023, appendix "Automatic
Mask Generation Details"), without crops and with duplicates compared as masks instead of boxes. The
masks are packed to two bits a pixel, small enough to be cached.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_samrefine.models.base import Embedding, Promptable, Prompts
from lightning_samrefine.refine.mask_predictions import finite_iou, non_finite_error
from lightning_samrefine.utils.device import upload
from lightning_samrefine.utils.memory import ChunkSize
from lightning_samrefine.utils.precision import autocast

# Raise this when the masks of an image change by more than rounding, or are kept in another way.
MASKS_VERSION = 2

# In image pixels between points: small images hold few objects.
_MIN_SPACING = 16
_MIN_PRED_IOU = 0.7
_MIN_STABILITY = 0.7
_STABILITY_OFFSET = 1.0  # in logits, as in SAM's own generator
_DUPLICATE_IOU = 0.8

# σ(logit) is kept in two bits: the thresholds of the logits, and the mean of σ between them.
_LOGIT_STEPS = (-2.0, 0.0, 2.0)
_LEVELS = (0.0, 0.27, 0.73, 1.0)
_PER_BYTE = 4


@dataclass(frozen=True)
class MaskProposals:
    """K masks of one image on SAM's low-resolution grid, all on one device.

    Attributes:
        packed: (K, ⌈h_n · w_n / 4⌉) uint8, two bits a pixel in row-major order.
        pred_iou: (K,) float32, SAM's predicted IoU, descending.
        mask_hw: (h_n, w_n), the part of the low-resolution logits that the image fills.
    """

    packed: Tensor
    pred_iou: Tensor
    mask_hw: tuple[int, int]

    def __len__(self) -> int:
        return self.packed.shape[0]

    def __getitem__(self, chosen: slice | Tensor) -> MaskProposals:
        return MaskProposals(self.packed[chosen], self.pred_iou[chosen], self.mask_hw)

    def decompressed(self) -> MaskProposals:
        """Return these masks, which are not compressed."""
        return self

    def inside(self) -> Tensor:
        """Return the masks, (K, h_n, w_n) bool."""
        return self.probs() > 0.5

    def inside_at(self, y: Tensor, x: Tensor) -> Tensor:
        """Return (K, N) bool, whether N pixels of the low-resolution grid are in each mask.

        Args:
            y: (N,) int64 rows.
            x: (N,) int64 columns.
        """
        position = y * self.mask_hw[1] + x
        byte = self.packed[:, position // _PER_BYTE]
        return (byte >> (2 * (position % _PER_BYTE)).to(torch.uint8)) & 2 > 0

    def probs(self) -> Tensor:
        """Return (K, h_n, w_n) float32 in [0, 1], σ of the logits in four levels."""
        height, width = self.mask_hw
        of_byte = _byte_levels(self.packed.device)
        if self.packed.device.type == "cpu":
            # The four levels of a byte as one item of 16 bytes: a quarter of torch's time.
            items = of_byte.numpy().view(np.complex128)[:, 0]
            levels = torch.from_numpy(items.take(self.packed.numpy()).view(np.float32))
        else:
            levels = F.embedding(self.packed.int(), of_byte).flatten(1)
        return levels[:, : height * width].unflatten(1, self.mask_hw)


@dataclass(frozen=True)
class CompressedMasks:
    """Masks on the CPU in a fraction of their bytes: a large image's windows have thousands.

    Attributes:
        data: `MaskProposals.packed` by zlib.
        pred_iou: (K,) float32.
        mask_hw: (h_n, w_n).
    """

    data: bytes
    pred_iou: Tensor
    mask_hw: tuple[int, int]

    @classmethod
    def of(cls, masks: MaskProposals) -> CompressedMasks:
        """Compress masks, fast rather than well: most are one blob."""
        return cls(
            zlib.compress(masks.packed.numpy().tobytes(), level=1), masks.pred_iou, masks.mask_hw
        )

    def decompressed(self) -> MaskProposals:
        """Return the masks."""
        packed = np.frombuffer(bytearray(zlib.decompress(self.data)), np.uint8)
        rows = packed.reshape(len(self.pred_iou), -(-math.prod(self.mask_hw) // _PER_BYTE))
        return MaskProposals(torch.from_numpy(rows), self.pred_iou, self.mask_hw)


def propose_masks(
    sam: Promptable,
    embedding: Embedding,
    image_hw: tuple[int, int],
    points_per_side: int,
    prompts_per_batch: int,
    at_once: ChunkSize,
) -> MaskProposals:
    """Prompt a grid of points and keep the good masks, each once.

    On CUDA the CPU waits twice: for the number of good masks and for their overlaps.

    Args:
        sam: The model; its autocast is the caller's.
        embedding: Of the image, from ``sam``.
        image_hw: (H, W) of the image.
        points_per_side: Number of points along the longer side, fewer if they would be closer than
            16 pixels; the shorter side has them at the same spacing.
        prompts_per_batch: Number of points decoded at once.
        at_once: Halves that number if memory runs out.

    Raises:
        FloatingPointError: Non-finite SAM outputs.
    """
    height, width = mask_hw = sam.mask_hw(image_hw)
    points = upload(point_grid(image_hw, sam.input_hw(image_hw), points_per_side), sam.device)
    packed, pred_iou, stability = [], [], []

    def predict(start: int, stop: int) -> tuple[Tensor, Tensor]:
        return sam.predict_masks(embedding, Prompts(None, points[start:stop]), True)

    for _, _, (logits, ious) in at_once.run(len(points), prompts_per_batch, predict):
        logits = logits[..., :height, :width].flatten(0, 1)
        stability.append(_stability(logits))
        packed.append(pack_masks(logits))
        pred_iou.append(finite_iou(ious.flatten().float(), logits.float()))
    masks = MaskProposals(torch.cat(packed), torch.cat(pred_iou), mask_hw)
    best = _best(masks, torch.cat(stability))
    if best is None:
        raise non_finite_error(sam)
    return best


def _best(masks: MaskProposals, stability: Tensor) -> MaskProposals | None:
    """Keep the good masks, and only the best of those that nearly equal one another.

    Returns None if a predicted IoU is NaN or infinite.
    """
    good = (masks.pred_iou > _MIN_PRED_IOU) & (stability > _MIN_STABILITY)
    order = masks.pred_iou.masked_fill(~good, -1).argsort(descending=True, stable=True)
    # In one download: each makes the CPU wait for the GPU.
    count, known = torch.stack([good.sum(), masks.pred_iou.isfinite().sum()]).tolist()
    if known < len(masks):
        return None
    order = order[:count]
    if len(order) == 0:
        return masks[:0]
    masks = masks[order]
    return masks[_first_of_duplicates(masks)]


def point_grid(
    image_hw: tuple[int, int], input_hw: tuple[int, int], points_per_side: int
) -> Tensor:
    """Return (N, 2) float32 XY points at the centers of equal cells, in the model's frame."""
    longer = max(image_hw)
    along = max(1, min(points_per_side, longer // _MIN_SPACING))
    rows, columns = (max(1, round(along * side / longer)) for side in image_hw)
    y = (torch.arange(rows) + 0.5) * (input_hw[0] / rows)
    x = (torch.arange(columns) + 0.5) * (input_hw[1] / columns)
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).reshape(-1, 2)


def _stability(logits: Tensor) -> Tensor:
    """Return (N,), the IoU of each mask thresholded above 0 with itself thresholded below 0."""
    above = (logits > _STABILITY_OFFSET).sum(dim=(1, 2))
    below = (logits > -_STABILITY_OFFSET).sum(dim=(1, 2))
    return above / below.clamp(min=1)


def pack_masks(logits: Tensor) -> Tensor:
    """Pack (N, h, w) logits to (N, B) uint8 as in `MaskProposals`, NaN counting as outside."""
    low, middle, high = ((logits > step).to(torch.uint8) for step in _LOGIT_STEPS)
    codes = (low + middle + high).flatten(1)
    codes = F.pad(codes, (0, -codes.shape[1] % _PER_BYTE)).unflatten(1, (-1, _PER_BYTE))
    first, second, third, fourth = codes.unbind(dim=-1)
    return first | second << 2 | third << 4 | fourth << 6


def _byte_levels(device: torch.device) -> Tensor:
    """Return (256, 4) float32, the levels of the four pixels in a byte."""
    # Computed on the device: an upload would make the CPU wait.
    codes = (torch.arange(256, device=device)[:, None] >> 2 * torch.arange(4, device=device)) & 3
    levels = torch.zeros(codes.shape, device=device)
    return sum((level * (codes == code) for code, level in enumerate(_LEVELS)), levels)


def _first_of_duplicates(masks: MaskProposals) -> Tensor:
    """Return the indices of masks that no mask kept before them nearly equals."""
    inside = (masks.probs() > 0.5).float()
    small = (F.avg_pool2d(inside, 2, ceil_mode=True) > 0.5).float().flatten(1)
    area = small.sum(dim=1)
    # Under an autocast the pixels of an overlap would be counted in 8 or 11 bits.
    with autocast(None, small.device):
        overlap = small @ small.T
    iou = overlap / (area[:, None] + area - overlap).clamp(min=1)
    duplicates = (iou > _DUPLICATE_IOU).cpu().numpy()
    kept: list[int] = []
    for index in range(len(masks)):
        if not duplicates[index, kept].any():
            kept.append(index)
    return upload(torch.tensor(kept, dtype=torch.int64), masks.packed.device)
