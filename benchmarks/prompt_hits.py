"""How many of the prompts of an epoch SAM has answered in earlier ones, while a network trains.

    python -m benchmarks.prompt_hits

ESPNet trains on CamVid's train frames, from random weights and on from its trained ones. After
each epoch the regions of val frames are brought to the lattice of `lattice_prompts`; a cache would
answer those that were asked before. SAM is not needed to count them. SAMREFINE_DATA names the data
folder.
"""

from __future__ import annotations

import argparse
import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.camvid.data import ESPNET_WEIGHTS, VOID, camvid, data_root, missing_files
from benchmarks.camvid.espnet import ESPNetSegmenter
from lightning_samrefine import RefineConfig
from lightning_samrefine.data import FolderDataModule
from lightning_samrefine.prompts import lattice_prompts
from lightning_samrefine.regions import split_regions

CONFIG = RefineConfig.preset("default")
_BATCH, _RATE = 6, 5e-4


def train_frames() -> list[dict[str, Tensor]]:
    """Read CamVid's train frames."""
    folder = data_root() / "camvid"
    data = FolderDataModule(
        num_classes=VOID,
        ignore_index=VOID,
        val={"images": folder / "train", "labels": folder / "trainannot"},
    )
    data.setup("validate")
    dataset = data.val_dataloader().dataset
    return [dataset[index] for index in range(len(dataset))]


def train_epoch(
    model: ESPNetSegmenter, optimizer: torch.optim.Optimizer, frames: list[dict[str, Tensor]]
) -> None:
    """Train on frames at half their size, flipped at random."""
    model.train()
    order = torch.randperm(len(frames))
    for batch in order.split(_BATCH):
        images = torch.stack([frames[i]["image"] for i in batch])
        masks = torch.stack([frames[i]["mask"] for i in batch])
        if torch.rand(()) < 0.5:
            images, masks = images.flip(-1), masks.flip(-1)
        with torch.enable_grad():
            loss = F.cross_entropy(model(images), masks, ignore_index=VOID)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()


def asked(model: ESPNetSegmenter, image: Tensor) -> set[bytes]:
    """Return the prompts of an image's regions."""
    probs = model(image[None])[0].softmax(dim=0)
    regions = split_regions(
        probs.argmax(dim=0),
        probs,
        CONFIG.score_thresh,
        CONFIG.stride,
        CONFIG.min_region_area,
        CONFIG.max_regions,
    )
    return {prompt.tobytes() for prompt in lattice_prompts(regions)}


@torch.no_grad()
def main() -> None:
    """Train twice and print a row an epoch."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--train-every", type=int, default=2, help="take every n-th train frame")
    parser.add_argument("--val-every", type=int, default=5, help="take every n-th val frame")
    options = parser.parse_args()
    if missing := missing_files(data_root()):
        sys.exit(f"SAMREFINE_DATA names {data_root()}, where these are missing: {missing}")
    data = camvid(data_root())
    data.setup("validate")
    val = data.val_dataloader().dataset
    images = [val[index]["image"] for index in range(0, len(val), options.val_every)]
    frames = train_frames()[:: options.train_every]
    print("| weights | epoch | prompts an image | answered before |\n| --- | ---: | ---: | ---: |")
    for start in ("random", "trained"):
        torch.manual_seed(0)
        model = ESPNetSegmenter(data_root() / ESPNET_WEIGHTS, resolution="half").eval()
        if start == "random":
            for module in model.network.modules():
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()
        optimizer = torch.optim.Adam(model.network.parameters(), lr=_RATE, weight_decay=2e-4)
        known: list[set[bytes]] = [set() for _ in images]
        for epoch in range(1, options.epochs + 1):
            train_epoch(model, optimizer, frames)
            prompts = [asked(model, image) for image in images]
            hits = sum(len(new & old) for new, old in zip(prompts, known, strict=True))
            count = sum(map(len, prompts))
            known = [old | new for new, old in zip(prompts, known, strict=True)]
            print(
                f"| {start} | {epoch} | {count / len(images):.1f} | {hits / count:.0%} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
