"""Refine predictions, and make a FiftyOne dataset of truth, raw and refined label maps."""

from pathlib import Path

import fiftyone as fo
import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from PIL import Image
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassJaccardIndex

from lightning_samrefine import SAMRefineWriter
from lightning_samrefine.demo.scenes import CLASS_NAMES, ScenesDataset  # in place of your data
from lightning_samrefine.demo.segmenter import SmallSegmenter  # in place of your network


class Scenes(ScenesDataset):
    def __getitem__(self, index):
        scene = super().__getitem__(index)
        name = f"{index}.png"
        save(scene["image"].permute(1, 2, 0), f"images/{name}")
        save(scene["mask"], f"truth/{name}")
        return {"image": scene["image"], "name": name}


class Segmenter(LightningModule):
    def __init__(self):
        super().__init__()
        self.network = SmallSegmenter(6)

    def predict_step(self, batch, batch_idx):
        logits = self.network(batch["image"])
        for name, labels in zip(batch["name"], logits.argmax(dim=1), strict=True):
            save(labels, f"raw/{name}")
        return {"logits": logits}


def save(pixels, path):
    Path(path).parent.mkdir(exist_ok=True)
    Image.fromarray(pixels.numpy(force=True).astype(np.uint8)).save(path)


def export(name, images, class_names, **folders):
    """Make a dataset with a field for each folder of label maps, which are named like images."""
    dataset = fo.Dataset(name, persistent=True, overwrite=True)
    dataset.default_mask_targets = dict(enumerate(class_names))
    for image in sorted(path for path in Path(images).rglob("*") if path.is_file()):
        name = image.relative_to(images).with_suffix(".png")
        sample = fo.Sample(image)
        for field, folder in folders.items():
            sample[field] = fo.Segmentation(mask=np.array(Image.open(Path(folder, name))))
        dataset.add_sample(sample)
    return dataset


def main():
    seed_everything(0)
    writer = SAMRefineWriter("refined", sam="tiny", num_classes=6)  # "vit_t" for photographs
    loader = DataLoader(Scenes(1, 4, size=128), batch_size=4)
    Trainer(callbacks=[writer]).predict(Segmenter(), loader, return_predictions=False)

    dataset = export(
        "scenes", "images", CLASS_NAMES, truth="truth", raw="raw", refined="refined/labels"
    )
    for field in ("raw", "refined"):
        dataset.evaluate_segmentations(field, gt_field="truth", eval_key=field)

    raw, refined = MulticlassJaccardIndex(6), MulticlassJaccardIndex(6)
    for sample in dataset:
        raw.update(torch.tensor(sample.raw.mask), torch.tensor(sample.truth.mask))
        refined.update(torch.tensor(sample.refined.mask), torch.tensor(sample.truth.mask))
    print("val/miou_raw", raw.compute().item())
    print("val/miou_refined", refined.compute().item())
    print("val/miou_gain", (refined.compute() - raw.compute()).item())


if __name__ == "__main__":
    main()
