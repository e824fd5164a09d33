"""What does a grid of thresholds cost, in passes of SAM's decoder?

``python -m benchmarks.tune`` sweeps a 4×4×10 grid over CamVid val frames as ``samrefine task=tune``
does, and prints its time as a multiple of that of one decoding of the same images with the preset
``default``, prompts included, and how often each image was encoded.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.camvid.data import ESPNET_WEIGHTS, SAM_WEIGHTS, VOID, camvid, data_root
from benchmarks.camvid.espnet import ESPNetSegmenter
from lightning_samrefine import RefineConfig, Refiner, load_sam
from lightning_samrefine.adapters.batch_adapter import RefineInputs
from lightning_samrefine.refine.cache.embedding_cache import EmbeddingCache
from lightning_samrefine.refine.mask_predictions import MaskPredictions
from lightning_samrefine.tune.counts import Scoring
from lightning_samrefine.tune.settings import Grid
from lightning_samrefine.tune.sweep import Sweep

GRID = Grid(
    [0.0, 0.3, 0.5, 0.7],
    [2.0, 4.0, 8.0, 16.0],
    [0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95],
)


def main() -> None:
    """Measure, image by image, and print the medians."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tune", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--images", type=int, default=5, help="number of val frames")
    options = parser.parse_args()
    root = data_root()
    if not (root / SAM_WEIGHTS).exists():
        sys.exit(f"SAMREFINE_DATA names {root}, where {SAM_WEIGHTS} is missing")

    sam = load_sam("vit_t", checkpoint=root / SAM_WEIGHTS)
    encoded = 0
    embed = sam.encode_images

    def counted(images: Sequence[Tensor]) -> list[Any]:
        nonlocal encoded
        encoded += len(images)
        return embed(images)

    sam.encode_images = counted
    refiner = Refiner(sam, RefineConfig.preset("default"), cache=EmbeddingCache("memory"))
    sweep = Sweep(GRID, refiner.config, Scoring(VOID, VOID, trimap_width=3))
    samples = val_samples(options.images)
    ratios, sweeps, decodes, encoders, regions = [], [], [], [], []
    for inputs in samples:
        encoder = seconds(partial(embed, inputs.images))
        decode(refiner, inputs)  # embeds, and warms up
        before = seconds(partial(decode, refiner, inputs))
        sweeps.append(seconds(partial(sweep, refiner, inputs)))
        after = seconds(partial(decode, refiner, inputs))
        decodes.append((before + after) / 2)
        encoders.append(encoder)
        ratios.append(sweeps[-1] / decodes[-1])
        (predictions,) = decode(refiner, inputs)
        regions.append(len(predictions.regions))
    print(
        f"{len(samples)} frames of 480x360, {statistics.mean(regions):.0f} regions each, "
        f"{len(GRID.pairs)} decodings and {len(GRID.cells)} cells an image\n"
        f"one encoder pass       {1000 * statistics.median(encoders):8.0f} ms (median)\n"
        f"one decoding           {1000 * statistics.median(decodes):8.0f} ms\n"
        f"the grid               {1000 * statistics.median(sweeps):8.0f} ms\n"
        f"the grid, in decodings {statistics.median(ratios):8.1f} (from {min(ratios):.1f} to "
        f"{max(ratios):.1f})\n"
        f"encoder passes         {encoded / len(samples):8.2f} an image"
    )


@torch.inference_mode()
def val_samples(count: int) -> list[RefineInputs]:
    """Return val frames with the network's probabilities, one a batch."""
    root = data_root()
    data = camvid(root)
    data.setup("validate")
    model = ESPNetSegmenter(root / ESPNET_WEIGHTS, resolution="full").eval()
    samples = []
    for batch in data.val_dataloader():
        probs = model(batch["image"]).softmax(dim=1)
        samples.append(RefineInputs(batch["image"], probs, probs.argmax(dim=1), batch["mask"]))
        if len(samples) == count:
            break
    return samples


def decode(refiner: Refiner, inputs: RefineInputs) -> list[MaskPredictions]:
    """Predict the masks of images whose embeddings are kept."""
    return list(refiner.predict(inputs.images, inputs.probs, inputs.labels))


def seconds(work: Callable[[], Any]) -> float:
    """Return the processor time that a call takes: other programs do not lengthen it."""
    start = time.process_time()
    work()
    return time.process_time() - start


if __name__ == "__main__":
    main()
