"""The quality benchmark: every method on CamVid's test frames, figures to benchmarks/QUALITY.md.

Run from the root of the repository: ``python -m benchmarks.quality.run``. SAMREFINE_DATA names the
data folder. Each frame's counts are kept in the output folder; a run that was stopped goes on where
it was.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor

from benchmarks.camvid.data import (
    ESPNET_WEIGHTS,
    REPOSITORY,
    RESOLUTIONS,
    SAM_WEIGHTS,
    VOID,
    camvid,
    data_root,
    missing_files,
)
from benchmarks.camvid.espnet import ESPNetSegmenter
from benchmarks.quality.bsds import SEGMENTATIONS, bsds_images
from benchmarks.quality.cityscapes import CITYSCAPES_WEIGHTS, CityscapesESPNetv2
from benchmarks.quality.counts import FrameCounts, count
from benchmarks.quality.methods import Method, build_methods
from benchmarks.quality.page import RAW, quality_page
from lightning_samrefine import load_sam
from lightning_samrefine.demo.scenes import CLASS_NAMES as SCENE_CLASSES
from lightning_samrefine.demo.scenes import make_scene
from lightning_samrefine.refine.cache.embedding_cache import EmbeddingCache
from lightning_samrefine.utils.precision import autocast, autocast_dtype

PAGE = REPOSITORY / "benchmarks" / "QUALITY.md"
CITYSCAPES_EVERY = 3  # the second segmenter sees every third frame

# Other data sets, with blurred true labels where a segmenter would be.
SCENES, SCENES_SEED = 24, 7
BSDS_EVERY = 4
COARSENESS = 16

# inputs → method → frame → counts
Counts = dict[str, dict[str, dict[int, FrameCounts]]]


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, run what is missing and write the page."""
    options = _parse(arguments)
    root = data_root()
    missing = missing_files(root)
    if missing:
        sys.exit(f"SAMREFINE_DATA names {root}, where these are missing: {missing}")
    options.output.mkdir(parents=True, exist_ok=True)
    cache = EmbeddingCache("disk", gb=20, folder=options.output / "cache")
    sam = load_sam("vit_t", checkpoint=root / SAM_WEIGHTS, device=options.device)
    methods = build_methods(sam, cache, torch.device(options.device))
    segmenters: dict[str, torch.nn.Module] = {
        key: ESPNetSegmenter(root / ESPNET_WEIGHTS, resolution=key).eval() for key in RESOLUTIONS
    }
    if (root / CITYSCAPES_WEIGHTS).exists():
        segmenters["cityscapes"] = CityscapesESPNetv2(root / CITYSCAPES_WEIGHTS).eval()

    data = camvid(root)
    data.setup("validate" if options.split == "val" else "test")
    loader = data.val_dataloader() if options.split == "val" else data.test_dataloader()
    frames = loader.dataset
    # Coarse to fine, so that a run that is stopped has seen the whole split.
    order = sorted(range(0, len(frames), options.every), key=lambda i: (i % 9 > 0, i % 3 > 0, i))
    dtype = autocast_dtype("auto", sam.device)

    def measure(
        image: Tensor, target: Tensor, inputs: dict[str, Tensor | None], index: int, kept: Path
    ) -> None:
        """Run on one image what was not run on it before; a prediction of None is computed."""
        done: Counts = torch.load(kept, weights_only=False) if kept.exists() else {}
        todo = {
            key: [m for m in methods if index % m.every == 0 and m.name not in done.get(key, {})]
            for key in inputs
        }
        if not any(todo.values()):
            return
        with autocast(dtype, sam.device):
            begin = time.process_time()
            embeddings = sam.encode_images([image])
            encoder_seconds = time.process_time() - begin
            # Methods are timed without the encoder.
            digests = cache.digests([image])
            cache.fetch(sam, digests, dtype, lambda _, known=embeddings: known, 1)
        for key, waiting in todo.items():
            probs = inputs[key]
            if probs is None:
                probs = segmenters[key](image[None])[0].softmax(dim=0)
            for method in waiting:
                counts = _run(method, image, probs, target)
                if method.name == RAW:
                    counts = replace(counts, seconds=encoder_seconds)
                done.setdefault(key, {})[method.name] = {index: counts}
        torch.save(done, kept)

    for index in track(order, description="frames"):
        keys = [k for k in segmenters if k != "cityscapes" or index % CITYSCAPES_EVERY == 0]
        kept = options.output / f"{options.split}_{index:03d}.pt"
        measure(frames[index]["image"], frames[index]["mask"], dict.fromkeys(keys), index, kept)
    for index in range(0 if options.split == "val" else SCENES):
        scene = make_scene(SCENES_SEED, index)
        inputs = {"scenes": coarsened(scene.labels, len(SCENE_CLASSES))}
        measure(scene.image, scene.labels, inputs, index, options.output / f"scene_{index:03d}.pt")
    if options.split != "val" and (root / SEGMENTATIONS).exists():
        for index, (image, labels) in enumerate(bsds_images(root, BSDS_EVERY, COARSENESS)):
            inputs = {"bsds": coarsened(labels, VOID)}
            measure(image, labels, inputs, index, options.output / f"bsds_{index:03d}.pt")
    counts = _collect(options.output, options.split)
    page = quality_page(counts, [method.name for method in methods])
    options.page.write_text(page, encoding="utf-8")
    print(page, f"Written to {options.page}", sep="\n")


def coarsened(labels: Tensor, num_classes: int) -> Tensor:
    """Blur true labels (H, W), sides multiples of `COARSENESS`, to (C, H, W) probabilities."""
    truth = F.one_hot(labels, num_classes).permute(2, 0, 1)[None].float()
    coarse = F.avg_pool2d(truth, COARSENESS)
    return F.interpolate(coarse, scale_factor=COARSENESS, mode="bilinear")[0]


def _run(method: Method, image: Tensor, probs: Tensor, target: Tensor) -> FrameCounts:
    if method.cached:
        method.refine(image, probs)
    # CPU time, which other processes do not disturb.
    begin = time.process_time()
    labels = method.refine(image, probs)
    return count(labels, target, time.process_time() - begin)


def _collect(output: Path, split: str) -> Counts:
    collected: Counts = {}
    prefixes = ("test", "scene", "bsds") if split == "test" else (split,)
    for path in (p for prefix in prefixes for p in sorted(output.glob(f"{prefix}_*.pt"))):
        for key, methods in torch.load(path, weights_only=False).items():
            for name, frames in methods.items():
                collected.setdefault(key, {}).setdefault(name, {}).update(frames)
    return collected


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--split", choices=("test", "val"), default="test")
    parser.add_argument("--every", type=int, default=1, help="take every n-th frame")
    parser.add_argument("--device", default="cpu", help="where SAM runs")
    parser.add_argument("--output", type=Path, default=Path("outputs/quality"))
    parser.add_argument("--page", type=Path, help="QUALITY.md for the whole test split")
    options = parser.parse_args(arguments)
    if options.page is None:
        whole = options.split == "test" and options.every == 1
        options.page = PAGE if whole else options.output / "QUALITY.md"
    return options


if __name__ == "__main__":
    main()
