"""Refine stored predictions with Ray Data: Parquet in, Parquet out, a refiner in every actor."""

import numpy as np
import ray
import torch
from torchmetrics.classification import MulticlassJaccardIndex

from lightning_samrefine import Refiner, load_sam
from lightning_samrefine.demo.scenes import ScenesDataset
from lightning_samrefine.demo.segmenter import SmallSegmenter


class Refine:
    def __init__(self):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.refiner = Refiner(load_sam("tiny", device=device))  # "vit_t" for photographs

    def __call__(self, batch):
        images = torch.tensor(batch["image"])  # (B, 3, H, W) uint8
        probs = torch.tensor(batch["probs"], device=self.refiner.sam.device)  # (B, C, H, W)
        results = self.refiner.refine_batch(images, probs)
        batch["refined"] = torch.stack([one.labels for one in results]).cpu().numpy()
        return batch


@torch.no_grad()
def store(folder):
    """Store predictions, in place of yours."""
    torch.manual_seed(0)
    network = SmallSegmenter(6).eval()
    scenes = [ScenesDataset(1, 4, size=128)[index] for index in range(4)]
    rows = [
        {
            "image": scene["image"].numpy(),
            "mask": scene["mask"].numpy(),
            "probs": network(scene["image"][None]).softmax(dim=1)[0].numpy(),
        }
        for scene in scenes
    ]
    ray.data.from_items(rows).write_parquet(folder)


def main():
    ray.init(num_cpus=2, include_dashboard=False)
    store("predictions")

    predictions = ray.data.read_parquet("predictions")
    # On GPUs: concurrency=8, num_gpus=1.
    predictions.map_batches(Refine, batch_size=2, concurrency=1).write_parquet("refined")

    raw, refined = MulticlassJaccardIndex(6), MulticlassJaccardIndex(6)
    for row in ray.data.read_parquet("refined").iter_rows():
        target = torch.tensor(row["mask"])
        raw.update(torch.tensor(np.argmax(row["probs"], axis=0)), target)
        refined.update(torch.tensor(row["refined"]), target)
    print("val/miou_raw", raw.compute().item())
    print("val/miou_refined", refined.compute().item())
    print("val/miou_gain", (refined.compute() - raw.compute()).item())


if __name__ == "__main__":
    main()
