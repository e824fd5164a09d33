"""Coarse predictions simulated from exact labels, and the prompts Algorithm 4 makes of them."""

from __future__ import annotations

from dataclasses import dataclass

import cc3d
import edt
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_samrefine.demo.scenes import CLASS_NAMES, Scene
from lightning_samrefine.models.tiny import IMAGE_SIZE

CLASSES = len(CLASS_NAMES)
GRID = IMAGE_SIZE // 2
MASK_PROMPT_SCALE = 8.0
MIN_REGION_AREA = 16
# A scrap of a region is no evidence of the large component it happens to lie in.
MIN_MATCH_IOU = 0.1


@dataclass(frozen=True)
class Prompts:
    """All prompts of one image, in the model's frame.

    Attributes:
        boxes: (N, 4) float32, XYXY with exclusive ends.
        points: (N, 1, 2) float32, one positive click each.
        masks: (N, 1, 128, 128) float32 mask prompts.
        targets: (N, 1, 256, 256) float32 in {0, 1}; all 0 for a false positive.
        coarse_iou: (N,) float32, IoU of the coarse region itself with its target.
        classes: (N,) int64, the class the coarse segmenter gave.
        matched: (N,) bool, False for a false positive.
    """

    boxes: Tensor
    points: Tensor
    masks: Tensor
    targets: Tensor
    coarse_iou: Tensor
    classes: Tensor
    matched: Tensor

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, index: Tensor) -> Prompts:
        return Prompts(**{name: value[index] for name, value in vars(self).items()})


def _smooth_field(rng: np.random.Generator, channels: int, cells: int, side: int) -> Tensor:
    """(1, channels, side, side) standard normal noise on a lattice, bicubically upsampled."""
    noise = torch.from_numpy(rng.standard_normal((1, channels, cells, cells), dtype=np.float32))
    return F.interpolate(noise, (side, side), mode="bicubic", align_corners=False)


def simulate_coarse(scene: Scene, rng: np.random.Generator, severity: float = 1.0) -> Tensor:
    """Class probabilities a coarse segmenter might give for a scene.

    Args:
        scene: a scene of 256×256.
        rng: source of the mistakes.
        severity: how bad they are; 1 is what training uses, 0 leaves little but the coarse cells.

    Returns:
        (C, 128, 128) float32 probabilities, as Algorithm 4 sees them on its half-resolution grid.
    """
    labels = scene.labels.clone()
    for instance in range(1, int(scene.instances.max()) + 1):
        fate = rng.random()
        if fate < 0.06 * severity:
            other = 0 if fate < 0.03 * severity else int(rng.integers(CLASSES))
            labels[scene.instances == instance] = other
    maps = F.one_hot(labels, CLASSES).permute(2, 0, 1)[None].float()
    maps = F.avg_pool2d(maps, 2)

    if rng.random() < 0.7:
        base = F.affine_grid(torch.eye(2, 3)[None], [1, 1, GRID, GRID], align_corners=False)
        bend = _smooth_field(rng, 2, int(rng.integers(3, 9)), GRID) * rng.uniform(0.0, 3.0)
        bend = bend + torch.from_numpy(rng.normal(0.0, 1.0, (1, 2, 1, 1)).astype(np.float32))
        flow = bend.permute(0, 2, 3, 1) * (severity * 2.0 / GRID)
        maps = F.grid_sample(maps, base + flow, padding_mode="border", align_corners=False)

    things = maps[:, 1:]
    if rng.random() < 0.4 * severity:
        kernel = int(rng.choice((3, 5)))
        opened = -F.max_pool2d(-things, kernel, 1, kernel // 2)
        things = torch.minimum(F.max_pool2d(opened, kernel, 1, kernel // 2), things)
    swell = rng.random()
    if swell < 0.2 * severity:
        things = F.max_pool2d(things, 3, 1, 1)
    elif swell < 0.35 * severity:
        things = -F.max_pool2d(-things, 3, 1, 1)
    maps = torch.cat([(1.0 - things.sum(1, keepdim=True)).clamp_min(0.0), things], dim=1)
    maps = maps / maps.sum(1, keepdim=True)

    if rng.random() < 0.7:
        cells = round(IMAGE_SIZE // int(rng.integers(6, 14)) / (0.5 + 0.5 * severity))
        maps = F.adaptive_avg_pool2d(maps, (cells, cells))
    else:
        maps = F.avg_pool2d(maps, 2)
        cells = GRID // 2
        kernel = int(rng.choice((3, 5, 7)))
        for _ in range(2):
            maps = F.avg_pool2d(maps, kernel, 1, kernel // 2, count_include_pad=False)
    logits = maps.clamp_min(10.0 ** rng.uniform(-3.0, -1.5)).log()
    # Segmenters trained with balanced losses favor objects over the background around them.
    logits[:, 1:] += rng.uniform(0.0, 0.9) * severity
    for lattice in (int(rng.integers(4, 9)), min(cells, 32)):
        logits = logits + _smooth_field(rng, CLASSES, lattice, cells) * (
            severity * rng.uniform(0.0, 0.6)
        )
    logits = logits / rng.uniform(0.5, 1.5)
    logits = F.interpolate(logits, (GRID, GRID), mode="bilinear", align_corners=False)
    return logits[0].softmax(0)


def make_prompts(
    probabilities: Tensor, labels: Tensor, *, scale: float, threshold: float, min_area: int
) -> Prompts | None:
    """Split coarse probabilities into regions, prompt each one and find what it stands for.

    A region's target is the union of the true components of its class which lie half inside it or
    fill a quarter of it, so that a perfect segmenter's regions stand for themselves. A region with
    no such component, or hardly any overlap with them, is a false positive.

    Args:
        probabilities: (C, 128, 128) float32.
        labels: (256, 256) int64 true classes.
        scale: what a probability is multiplied with in the mask prompt.
        threshold: confidence gate; 0 turns it off.
        min_area: smallest region, in pixels of the 128×128 grid.

    Returns:
        The prompts in no particular order, or None if no region is large enough.
    """
    confidence, winner = probabilities.max(0)
    gated = torch.where(confidence < threshold, -1, winner).numpy() + 1
    regions = cc3d.connected_components(gated.astype(np.uint8), connectivity=8)
    statistics = cc3d.statistics(regions)
    numbers = [
        k
        for k in range(1, len(statistics["voxel_counts"]))
        if statistics["voxel_counts"][k] >= min_area
    ]
    if not numbers:
        return None
    depth = edt.edt(regions, black_border=True)

    truth = cc3d.connected_components(labels.numpy().astype(np.uint8) + 1, connectivity=8)
    count = int(truth.max()) + 1
    component_class = np.zeros(count, np.int64)
    component_class[truth.ravel()] = labels.numpy().ravel()
    fine = regions.repeat(2, axis=0).repeat(2, axis=1)
    overlaps = np.bincount(
        fine.ravel().astype(np.int64) * count + truth.ravel(),
        minlength=(int(regions.max()) + 1) * count,
    ).reshape(-1, count)
    component_area = overlaps.sum(axis=0)

    boxes, points, targets, coarse_iou, classes = [], [], [], [], []
    for k in numbers:
        rows, columns = statistics["bounding_boxes"][k][:2]
        boxes.append((columns.start, rows.start, columns.stop, rows.stop))
        inside = np.where(regions[rows, columns] == k, depth[rows, columns], -1.0)
        y, x = np.unravel_index(int(inside.argmax()), inside.shape)
        points.append((columns.start + x + 0.5, rows.start + y + 0.5))
        label = int(gated[rows.start + y, columns.start + x]) - 1
        classes.append(label)
        overlap, area = overlaps[k], int(overlaps[k].sum())
        member = (overlap >= 0.5 * component_area) | (overlap >= 0.25 * area)
        member &= (component_class == label) & (component_area > 0)
        shared = int(overlap[member].sum())
        iou = shared / max(area + int(component_area[member].sum()) - shared, 1)
        targets.append(member[truth] & (iou >= MIN_MATCH_IOU))
        coarse_iou.append(iou)
    target = torch.from_numpy(np.stack(targets))
    chosen = torch.tensor(classes)
    mask = probabilities[chosen]
    return Prompts(
        boxes=torch.tensor(boxes, dtype=torch.float32) * 2.0,
        points=torch.tensor(np.array(points), dtype=torch.float32)[:, None] * 2.0,
        masks=(mask * scale * (mask > threshold))[:, None],
        targets=target[:, None].float(),
        coarse_iou=torch.tensor(coarse_iou, dtype=torch.float32),
        classes=chosen,
        matched=target.flatten(1).any(1),
    )


def training_prompts(scene: Scene, rng: np.random.Generator, limit: int) -> Prompts | None:
    """At most `limit` prompts of a scene, with random errors, gate and scale."""
    prompts = make_prompts(
        simulate_coarse(scene, rng),
        scene.labels,
        scale=MASK_PROMPT_SCALE if rng.random() < 0.7 else rng.uniform(4.0, 12.0),
        threshold=0.0 if rng.random() < 0.5 else rng.uniform(0.1, 0.5),
        min_area=MIN_REGION_AREA,
    )
    if prompts is None:
        return None
    order = torch.from_numpy(rng.permutation(len(prompts)))
    wrong = ~prompts.matched[order]
    # One false positive at most: the mask loss learns nothing from them.
    order = order[~wrong | (wrong.cumsum(0) <= 1)]
    return prompts[order[:limit]]
