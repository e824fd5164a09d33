"""Draw the pictures of docs/how-it-works.md: one image, step by step.

python docs/pictures/draw.py [FOLDER]

The scene is procedural and SAM is the tiny one, both from the package. In place of a network the
raw prediction is the truth averaged over cells of 16 x 16 pixels, which has what segmenters have:
corners that are rounded and thin things that are missing. Nothing else is made up.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from lightning_samrefine import RefineConfig, Refinement, Refiner, load_sam
from lightning_samrefine.demo.scenes import CLASS_NAMES, make_scene
from lightning_samrefine.refine.fusion.fitted import feature_maps
from lightning_samrefine.refine.mask_predictions import ImagePredictions
from lightning_samrefine.reporting.loggers import rasterize
from lightning_samrefine.utils.palette import class_colors, colorize

HERE = Path(__file__).parent
SEED, INDEX, CELL = 4242, 5, 16
ACCEPTED, REJECTED = "#19c37d", "#ff4040"
# Thresholds under which the tiny SAM both accepts and rejects.
CONFIG = RefineConfig(pred_iou_thresh=0.8, min_region_area=16)
SHOWN = "ring"  # the class whose evidence the second picture shows


def raw_prediction(labels: Tensor) -> Tensor:
    """Return (C, H, W) float32 probabilities: the truth, averaged over square cells."""
    exact = F.one_hot(labels, len(CLASS_NAMES)).permute(2, 0, 1).float()
    coarse = F.avg_pool2d(exact[None], CELL)
    return F.interpolate(coarse, labels.shape, mode="bilinear", align_corners=False)[0]


def show(axes: Axes, picture: np.ndarray, title: str) -> None:
    """Show an (H, W, 3) picture under a title."""
    axes.imshow(picture)
    axes.set_title(title, fontsize=10)
    axes.set_axis_off()


def show_map(axes: Axes, values: Tensor, title: str) -> None:
    """Show an (H, W) map from 0, black, to its largest value, or 1 if that is larger."""
    axes.imshow(values, cmap="magma", vmin=0, vmax=max(1, values.max()))
    axes.set_title(title, fontsize=10)
    axes.set_axis_off()


def row(count: int) -> tuple[Figure, np.ndarray]:
    """Return a figure of ``count`` squares in a row."""
    figure = Figure((2.4 * count, 2.75), layout="constrained")
    return figure, figure.subplots(1, count)


def draw_algorithm4(image: np.ndarray, out: Refinement, raw: Tensor, target: Tensor) -> Figure:
    """Draw image, regions with prompts, SAM's masks, fused labels and truth."""
    figure, axes = row(5)
    count = len(CLASS_NAMES)
    show(axes[0], colorize(raw, count), "raw label map")
    faded = 255 - (255 - colorize(raw, count)) // 3
    show(axes[1], faded, "regions: box and click")
    masks = image // 2 + 60
    colors = class_colors(count)
    regions = out.regions
    for index, region in enumerate(regions):
        x_min, y_min, x_max, y_max = region.box
        box = ((x_min, y_min), x_max - x_min, y_max - y_min)
        color = ACCEPTED if region.accepted else REJECTED
        axes[1].add_patch(Rectangle(*box, fill=False, lw=1.2, color="black"))
        axes[1].plot(*region.point, "o", ms=4, color="black")
        axes[2].add_patch(Rectangle(*box, fill=False, lw=1.2, color=color))
        axes[2].text(
            x_min + 4, y_min + 4, f"{region.pred_iou:.2f}", color="white", fontsize=7, va="top"
        )
        if region.accepted:
            mask = F.interpolate(regions.masks[index][None, None].float(), raw.shape)[0, 0] > 0.5
            masks[mask.numpy()] = masks[mask.numpy()] // 2 + colors[region.class_index] // 2
    show(axes[2], masks, "SAM's masks and predicted IoUs")
    show(axes[3], colorize(out.labels, count), "refined label map")
    show(axes[4], colorize(target, count), "truth")
    return figure


def draw_fusion(image: np.ndarray, predictions: ImagePredictions, fused: Refinement) -> Figure:
    """Draw the evidence for one class, and what the fusion makes of all classes."""
    figure, axes = row(6)
    c = CLASS_NAMES.index(SHOWN)
    maps = feature_maps(predictions, CONFIG)
    show(axes[0], image, "image")
    show_map(axes[1], maps.probs[c], f"raw probability of {SHOWN}")
    show_map(axes[2], maps.color_ratios[c][maps.color_bins.long()].log1p(), "times color")
    votes = maps.region_votes.rows(slice(0, len(image)), slice(c, c + 1))[0]
    show_map(axes[3], votes, "times votes of accepted masks")
    show_map(axes[4], fused.probs[c], f"= refined probability of {SHOWN}")
    show(axes[5], colorize(fused.labels, len(CLASS_NAMES)), "refined label map")
    return figure


def main(folder: Path) -> None:
    """Write both pictures to a folder."""
    scene = make_scene(SEED, INDEX)
    probs = raw_prediction(scene.labels)
    refiner = Refiner(load_sam("tiny"), CONFIG, precision="32")
    soft = RefineConfig.preset("fast", mask_prompts=True)
    (hard_masks,) = refiner.predict([scene.image], [probs])
    (soft_masks,) = refiner.predict([scene.image], [probs], config=soft)
    image = scene.image.permute(1, 2, 0).numpy()
    raw, hard = probs.argmax(dim=0), refiner.fuse(hard_masks)
    pictures = {
        "algorithm4": draw_algorithm4(image, hard, raw, scene.labels),
        "fusion": draw_fusion(image, soft_masks, refiner.fuse(soft_masks, soft)),
    }
    for name, figure in pictures.items():
        # 256 colors are plenty, and a third of the bytes.
        rasterize(figure).quantize(256).save(folder / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
