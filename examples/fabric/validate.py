"""A validation loop of Fabric, which has no callbacks of a Trainer: the refiner is called."""

import torch
from lightning.fabric import Fabric
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassJaccardIndex

from lightning_samrefine import Refiner, load_sam
from lightning_samrefine.demo.scenes import ScenesDataset  # in place of your data
from lightning_samrefine.demo.segmenter import SmallSegmenter  # in place of your network


@torch.no_grad()
def validate(fabric, network, loader):
    refiner = Refiner(load_sam("tiny", device=fabric.device))  # "vit_t" for photographs
    raw = fabric.to_device(MulticlassJaccardIndex(6))
    refined = fabric.to_device(MulticlassJaccardIndex(6))
    network.eval()
    for batch in loader:
        probs = network(batch["image"]).softmax(dim=1)
        results = refiner.refine_batch(batch["image"], probs)
        raw.update(probs, batch["mask"])
        refined.update(torch.stack([result.labels for result in results]), batch["mask"])
    return raw.compute().item(), refined.compute().item()


def main():
    fabric = Fabric(accelerator="auto", devices=1)
    fabric.launch()
    fabric.seed_everything(0)
    network = fabric.setup(SmallSegmenter(6))
    loader = fabric.setup_dataloaders(DataLoader(ScenesDataset(1, 4, size=128), 4))
    raw, refined = validate(fabric, network, loader)
    print("val/miou_raw", raw)
    print("val/miou_refined", refined)
    print("val/miou_gain", refined - raw)


if __name__ == "__main__":
    main()
