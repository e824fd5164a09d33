"""Masks of whatever an image shows, from a grid of points: they depend on no segmenter.

The points, the thresholds and the removal of duplicates are those of SAM's automatic mask
generation (Kirillov et al., "Segment Anything", ICCV 2023, appendix "Automatic Mask Generation
Details"), without crops and with duplicates compared as masks instead of boxes. What is kept of an
image is small and can be cached whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_samrefine.finite import iou_of_numbers
from lightning_samrefine.looks import image_features, looks_of
from lightning_samrefine.memory import ChunkSize
from lightning_samrefine.models.protocol import MultimaskPromptable, Prompts

# Raise this when what is kept of a mask changes by more than rounding.
MASKS_VERSION = 2

# No denser than this many image pixels between points: small images hold few objects.
_MIN_SPACING = 16
_MIN_PRED_IOU = 0.7
_MIN_STABILITY = 0.7
_STABILITY_OFFSET = 1.0  # in logits, as in SAM's own generator
_DUPLICATE_IOU = 0.8

# σ(logit) is kept in two bits: the border between these logits, and the mean of σ in between.
_LOGIT_STEPS = (-2.0, 0.0, 2.0)
_LEVELS = (0.0, 0.27, 0.73, 1.0)
_PER_BYTE = 4


@dataclass(frozen=True)
class ImageMasks:
    """K masks of one image on SAM's low-resolution grid, all on one device.

    Attributes:
        packed: (K, h_n, ⌈w_n / 4⌉) uint8, two bits a pixel.
        pred_iou: (K,) float32, SAM's predicted IoU.
        looks: (K, D) int8 of `looks_of`; D is 0 where the model shows no features.
        mask_hw: (h_n, w_n), the part of the low-resolution logits that the image fills.
    """

    packed: Tensor
    pred_iou: Tensor
    looks: Tensor
    mask_hw: tuple[int, int]

    @classmethod
    def of_logits(
        cls, logits: Tensor, pred_iou: Tensor, features: Tensor | None = None
    ) -> ImageMasks:
        """Pack masks and take down how they look.

        Args:
            logits: (K, h_n, w_n) float.
            pred_iou: (K,) float32.
            features: Of `image_features`; None where looks are not asked for.
        """
        bare = logits.new_empty(len(logits), 0, dtype=torch.int8)
        masks = cls(pack_masks(logits), pred_iou, bare, (logits.shape[1], logits.shape[2]))
        return masks.looked_at(features)

    def __len__(self) -> int:
        return self.packed.shape[0]

    def __getitem__(self, chosen: slice | Tensor) -> ImageMasks:
        kept = (self.packed[chosen], self.pred_iou[chosen], self.looks[chosen])
        return ImageMasks(*kept, self.mask_hw)

    def to(self, device: torch.device) -> ImageMasks:
        """Bring the masks to a device."""
        moved = (self.packed.to(device), self.pred_iou.to(device), self.looks.to(device))
        return ImageMasks(*moved, self.mask_hw)

    @classmethod
    def cat(cls, parts: Sequence[ImageMasks]) -> ImageMasks:
        """Join masks of one image that lie on one device."""
        fields = zip(*((part.packed, part.pred_iou, part.looks) for part in parts), strict=True)
        return cls(*map(torch.cat, fields), parts[0].mask_hw)

    def looked_at(self, features: Tensor | None) -> ImageMasks:
        """Return the masks with their looks, or as they are where there are no features."""
        if features is None:
            return self
        return replace(self, looks=looks_of(self.halved(), features))

    def inside_at(self, y: Tensor, x: Tensor) -> Tensor:
        """Return (K, N) bool, whether N pixels of the low-resolution grid are in each mask.

        Args:
            y: (N,) int64 rows.
            x: (N,) int64 columns.
        """
        byte = self.packed[:, y, x // _PER_BYTE]
        return (byte >> (2 * (x % _PER_BYTE)).to(torch.uint8)) & 2 > 0

    def probs(self) -> Tensor:
        """Return (K, h_n, w_n) float32 in [0, 1], σ of the logits in four levels."""
        return _looked_up(self.packed, _byte_levels())[..., : self.mask_hw[1]]

    def halved(self) -> Tensor:
        """Return (K, ⌈h_n / 2⌉, ⌈w_n / 2⌉) float32, the means of `probs` over squares of 2.

        Beyond the grid there is nothing: a square that crosses its end has a smaller mean. It takes
        half as long as all pixels, and what is done with it a quarter.
        """
        pairs = _byte_levels().unflatten(1, (-1, 2)).sum(dim=2) / 4
        halved = _looked_up(self.packed[:, ::2], pairs)
        below = _looked_up(self.packed[:, 1::2], pairs)
        halved[:, : below.shape[1]] += below
        return halved[..., : (self.mask_hw[1] + 1) // 2]


def generate_masks(
    sam: MultimaskPromptable,
    embedding: Any,
    image_hw: tuple[int, int],
    points_per_side: int,
    prompts_per_batch: int,
    at_once: ChunkSize | None = None,
) -> ImageMasks | None:
    """Prompt a grid of points and keep the good masks, each once.

    On CUDA the CPU waits twice: for the number of good masks and for their overlaps.

    Args:
        sam: The model; its autocast is the caller's.
        embedding: What ``sam`` made of the image.
        image_hw: (H, W) of the image.
        points_per_side: Points along the longer side, fewer where they would come closer than 16
            pixels; the shorter side gets them at the same spacing.
        prompts_per_batch: How many points to decode at once.
        at_once: Remembers how many of them memory allows.

    Returns:
        The masks, on SAM's device; None where an answer holds NaN or infinity.
    """
    height, width = mask_hw = sam.mask_hw(image_hw)
    points = point_grid(image_hw, sam.input_hw(image_hw), points_per_side).to(sam.device)
    found, stability = [], []

    def ask(start: int, stop: int) -> tuple[Tensor, Tensor]:
        return sam.decode_multimask(embedding, Prompts(None, points[start:stop], None, None))

    for _, _, (logits, ious) in (at_once or ChunkSize()).run(len(points), prompts_per_batch, ask):
        logits = logits[..., :height, :width].flatten(0, 1)
        stability.append(_stability(logits))
        numbers = iou_of_numbers(ious.flatten().float(), logits.float())
        found.append(ImageMasks.of_logits(logits, numbers))
    masks = _best(ImageMasks.cat(found), torch.cat(stability))
    return None if masks is None else masks.looked_at(image_features(sam, embedding, mask_hw))


def _best(masks: ImageMasks, stability: Tensor) -> ImageMasks | None:
    """Keep the good masks, the best of those that nearly equal one another.

    Returns:
        The masks; None where a predicted IoU is NaN or infinite.
    """
    good = (masks.pred_iou > _MIN_PRED_IOU) & (stability > _MIN_STABILITY)
    order = masks.pred_iou.masked_fill(~good, -1).argsort(descending=True, stable=True)
    # One download: each would make the CPU wait for the GPU.
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
    """Return (N, 2) float32 XY points in the middle of equal cells, in the model's frame."""
    longer = max(image_hw)
    along = max(1, min(points_per_side, longer // _MIN_SPACING))
    rows, columns = (max(1, round(along * side / longer)) for side in image_hw)
    y = (torch.arange(rows) + 0.5) * (input_hw[0] / rows)
    x = (torch.arange(columns) + 0.5) * (input_hw[1] / columns)
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).reshape(-1, 2)


def _stability(logits: Tensor) -> Tensor:
    """Return (N,): IoU of each mask cut a little above and a little below its border."""
    above = (logits > _STABILITY_OFFSET).sum(dim=(1, 2))
    below = (logits > -_STABILITY_OFFSET).sum(dim=(1, 2))
    return above / below.clamp(min=1)


def pack_masks(logits: Tensor) -> Tensor:
    """Pack (N, h, w) logits to (N, h, ⌈w / 4⌉) uint8 as in `ImageMasks`, NaN being outside."""
    codes = sum((logits > step).to(torch.uint8) for step in _LOGIT_STEPS)
    codes = F.pad(codes, (0, -codes.shape[2] % _PER_BYTE)).unflatten(2, (-1, _PER_BYTE))
    return sum(codes[..., i] << 2 * i for i in range(_PER_BYTE))


def _byte_levels() -> Tensor:
    """Return (256, 4) float32, the levels of the four pixels in a byte."""
    codes = (torch.arange(256)[:, None] >> torch.tensor([0, 2, 4, 6])) & 3
    return torch.tensor(_LEVELS)[codes]


def _looked_up(packed: Tensor, table: Tensor) -> Tensor:
    """Replace each byte of (K, h, B) uint8 by its row of (256, n) float32, n 2 or 4.

    Returns:
        (K, h, B · n) float32.
    """
    if packed.device.type != "cpu":
        return F.embedding(packed.int(), table.to(packed.device)).flatten(2)
    # A row as one item of 8 or 16 bytes: a quarter of torch's time.
    item = {2: np.complex64, 4: np.complex128}[table.shape[1]]
    taken = table.contiguous().numpy().view(item)[:, 0].take(packed.numpy())
    return torch.from_numpy(taken.view(np.float32))


def _first_of_duplicates(masks: ImageMasks) -> Tensor:
    """Return the indices of masks that no mask kept before them nearly equals."""
    inside = (masks.probs() > 0.5).float()
    small = (F.avg_pool2d(inside, 2, ceil_mode=True) > 0.5).float().flatten(1)
    area = small.sum(dim=1)
    overlap = small @ small.T
    iou = overlap / (area[:, None] + area - overlap).clamp(min=1)
    duplicates = (iou > _DUPLICATE_IOU).cpu().numpy()
    kept: list[int] = []
    for index in range(len(masks)):
        if not duplicates[index, kept].any():
            kept.append(index)
    return torch.tensor(kept, dtype=torch.int64, device=masks.packed.device)
