"""Refine one image's probabilities with nothing but torch, and see which regions were accepted."""

import torch
from torchmetrics.functional.classification import multiclass_jaccard_index

from lightning_samrefine import RefineConfig, Refiner, load_sam
from lightning_samrefine.demo.scenes import ScenesDataset  # in place of your data
from lightning_samrefine.demo.segmenter import SmallSegmenter  # in place of your network


def main():
    torch.manual_seed(0)
    network = SmallSegmenter(6).eval()
    scene = ScenesDataset(1, 1, size=128)[0]
    image, target = scene["image"], scene["mask"]
    with torch.no_grad():
        probs = network(image[None]).softmax(dim=1)[0]

    # "vit_t" for photographs
    refiner = Refiner(load_sam("tiny"), RefineConfig.preset("default"))
    out = refiner(image, probs)  # uint8 (3, H, W) RGB, float (C, H, W) in [0, 1]
    for region in out.regions:
        print(region)
    print(out.labels, out.probs, out.covered)

    raw = multiclass_jaccard_index(probs.argmax(dim=0), target, num_classes=6).item()
    refined = multiclass_jaccard_index(out.labels, target, num_classes=6).item()
    print("val/miou_raw", raw)
    print("val/miou_refined", refined)
    print("val/miou_gain", refined - raw)


if __name__ == "__main__":
    main()
