"""Evaluations made without a SAM, for the tests and the benchmark of what is shown of them."""

from __future__ import annotations

import numpy as np
import torch

from lightning_samrefine.metrics.comparison import RefinementComparison
from lightning_samrefine.refine.results import Regions
from lightning_samrefine.reporting.report import Gallery


def blob_image(index, hw, num_classes, regions=6):
    """Draw a photo-like image, its labels, a raw and a refined prediction, and regions."""
    rng = np.random.default_rng(index)
    height, width = hw
    y, x = np.mgrid[:height, :width]
    target = np.zeros(hw, np.int64)
    boxes = []
    for number in range(regions):
        cy, cx = rng.uniform(0, height), rng.uniform(0, width)
        radius = rng.uniform(0.06, 0.2) * height
        target[np.hypot(y - cy, x - cx) < radius] = 1 + number % (num_classes - 1)
        sides = [cx - radius, cy - radius, cx + radius, cy + radius]
        boxes.append(np.clip(sides, 0, [width, height, width, height]))
    colors = rng.integers(30, 220, (num_classes, 3))
    texture = np.kron(rng.normal(0, 14, (-(-height // 3), -(-width // 3), 3)), np.ones((3, 3, 1)))
    image = np.clip(colors[target] + texture[:height, :width], 0, 255).astype(np.uint8)
    shift = max(1, height // 40)
    raw = np.roll(target, (shift, 2 * shift), (0, 1))
    refined = np.where(x < width * rng.random(), target, raw)
    refined[: height // 8] = 0
    target[-2:] = 255
    masks = rng.random((regions, max(1, height // 4), max(1, width // 4))) < 0.1
    for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
        mask[int(y0 / 4) : int(y1 / 4) + 1, int(x0 / 4) : int(x1 / 4) + 1] = True
    predicted = torch.from_numpy(rng.random(regions).astype(np.float32))
    table = Regions(
        classes=torch.tensor([1 + number % (num_classes - 1) for number in range(regions)]),
        boxes=torch.from_numpy(np.array(boxes, np.float32)),
        extents=torch.from_numpy(np.array(boxes, np.float32)),
        points=torch.from_numpy(np.array(boxes, np.float32)[:, :2]),
        scores=torch.ones(regions),
        pred_iou=predicted,
        accepted=predicted > 0.3,
        masks=torch.from_numpy(masks),
    )
    maps = (torch.from_numpy(labels) for labels in (raw, refined, target))
    return torch.from_numpy(image).permute(2, 0, 1), *maps, table


def evaluate(images, hw=(48, 64), class_names=("sky", "road", "car <i>", "pole"), **kwargs):
    """Return the comparison's result and the gallery of a number of images."""
    comparison = RefinementComparison(len(class_names), 255, class_names)
    gallery = Gallery(len(class_names), 255, **kwargs)
    for index in range(images):
        add_image(comparison, gallery, index, hw)
    return comparison.result(), gallery


def add_image(comparison, gallery, index, hw, picker=None):
    image, raw, refined, target, regions = blob_image(index, hw, comparison.num_classes)
    (found,) = comparison.update(raw, refined, target, regions)
    accepted = int(regions.accepted.sum())
    comparison.counts.update(images=1, regions=len(regions), accepted=accepted, seconds=0.1)
    name = f"image {index:04d}"
    gallery.add(name, image, raw, refined, target, regions, found)
    if picker is not None:
        picker.offer(name, image, raw, refined, target, found.valid, regions)
