"""What comparing raw with refined costs, part by part, against SAM's own encoder.

    python -m benchmarks.metrics [--repeats 9]

One image of 720×960 with 19 classes and 35 regions, one core. Times are CPU seconds of this
process, rounds of all parts interleaved, medians. The baseline is the `vit_t` encoder on the same
image, its weights random, which takes the same time as trained ones.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from torch.nn import functional as F
from torchmetrics.classification import MulticlassConfusionMatrix

from lightning_samrefine import load_sam
from lightning_samrefine.metrics import (
    BandedConfusion,
    BorderCounts,
    ImageTotals,
    KnownLabels,
    RegionCalibration,
    valid_pixels,
)
from lightning_samrefine.metrics.boundary import Borders, border_distances
from lightning_samrefine.metrics.calibration import score_regions
from lightning_samrefine.metrics.changes import ChangedPixels
from lightning_samrefine.metrics.comparison import SIDES, RefinementComparison
from lightning_samrefine.refine.results import Regions
from lightning_samrefine.utils.precision import autocast, autocast_dtype

HW = (720, 960)
NUM_CLASSES = 19
REGIONS = 35
IGNORE = 255


def main() -> None:
    """Command line: see the module's own documentation."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    parts = build_parts()
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for round_number in range(args.repeats + 1):
        for name, part in parts.items():
            start = time.process_time()
            part()
            if round_number > 0:  # the first round fills caches
                seconds[name].append(time.process_time() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    encoder = medians["vit_t encoder"]
    print(f"{HW[0]}x{HW[1]}, {NUM_CLASSES} classes, {REGIONS} regions, torch {torch.__version__}")
    for name, value in medians.items():
        print(f"{name:<42}{1000 * value:9.1f} ms {value / encoder:8.1%} of the encoder")


@torch.no_grad()
def build_parts() -> dict[str, Callable[[], object]]:
    """Return what is timed, by name."""
    image, raw, refined, target, regions = scene()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that its weights are random
        sam = load_sam("vit_t", "random")
    dtype = autocast_dtype("auto", sam.device)
    comparison = RefinementComparison(NUM_CLASSES, IGNORE)
    valid = valid_pixels(target, NUM_CLASSES, IGNORE)
    truth, guess = (KnownLabels(labels, valid, NUM_CLASSES) for labels in (target, raw))
    distances = border_distances(*HW)
    rings = truth.rings(comparison.widths)
    pixels = BandedConfusion(NUM_CLASSES, len(comparison.widths))
    plain = MulticlassConfusionMatrix(NUM_CLASSES, ignore_index=IGNORE, validate_args=False)
    counted = pixels.count(guess, truth, rings).sum(dim=0)
    borders = [Borders(known, *distances) for known in (guess, truth)]
    border_counts, totals = BorderCounts(NUM_CLASSES), ImageTotals(NUM_CLASSES)
    changes = ChangedPixels(raw, refined, target, valid)
    scores = score_regions(regions, raw, target, valid)
    calibration = RegionCalibration()

    def encode() -> None:
        with torch.no_grad(), autocast(dtype, sam.device):
            sam.encode_images([image])

    def measure_regions() -> None:
        found = score_regions(regions, raw, target, valid)
        calibration.update(regions.pred_iou, found.mask_iou, found.mask_iou > found.raw_iou)
        changes.by_region(scores.windows, regions.classes)

    return {
        "vit_t encoder": encode,
        "whole comparison": lambda: comparison.update(raw, refined, target, regions),
        "  rings of the trimaps": lambda: truth.rings(comparison.widths),
        "  matrices of all rings, one side": lambda: pixels.count(guess, truth, rings),
        "  borders of one label map": lambda: Borders(guess, *distances),
        "  border counts, one side": lambda: border_counts.update(*borders),
        "  changed pixels": lambda: ChangedPixels(raw, refined, target, valid),
        "  regions": measure_regions,
        "  image totals": lambda: totals.update(counted, counted),
        f"for comparison: {len(SIDES)} plain matrices": lambda: [
            plain.update(raw, target) for _ in SIDES
        ],
    }


def scene() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, Regions]:
    """Return an image, smooth label maps that differ near borders, and regions with masks."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(1, NUM_CLASSES, 8, 10, generator=generator)
    target = F.interpolate(noise, HW, mode="bicubic")[0].argmax(dim=0)
    raw, refined = target.roll((3, 5), (0, 1)), target.roll(2, 1)
    target[-20:] = IGNORE
    image = torch.randint(0, 256, (3, *HW), generator=generator, dtype=torch.uint8)
    corners = torch.rand(REGIONS, 2, generator=generator) * torch.tensor([660.0, 500.0])
    boxes = torch.cat([corners, corners + 200], dim=1)
    grid = torch.arange(256)[None] * 3.75
    masks = ((grid > boxes[:, :1]) & (grid < boxes[:, 2:3]))[:, None, :] & (
        (grid[:, :192] > boxes[:, 1:2]) & (grid[:, :192] < boxes[:, 3:])
    )[:, :, None]
    regions = Regions(
        classes=torch.randint(0, NUM_CLASSES, (REGIONS,), generator=generator),
        boxes=boxes,
        extents=boxes,
        points=corners + 100,
        scores=torch.ones(REGIONS),
        pred_iou=torch.rand(REGIONS, generator=generator),
        accepted=torch.ones(REGIONS, dtype=torch.bool),
        masks=masks,
    )
    return image, raw, refined, target, regions


if __name__ == "__main__":
    main()
