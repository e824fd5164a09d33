"""A UNet of MONAI, trained on patches and validated by sliding windows over MetaTensors."""

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from monai.data import DataLoader, Dataset
from monai.inferers import sliding_window_inference
from monai.losses import DiceCELoss
from monai.networks.nets import UNet
from monai.transforms import Compose, EnsureTyped, RandSpatialCropd, ScaleIntensityRanged

from lightning_samrefine import SAMRefineCallback
from lightning_samrefine.demo.scenes import CLASS_NAMES, ScenesDataset  # in place of your data

PATCH = (64, 64)
VALIDATION = [
    EnsureTyped(["image", "label"]),
    ScaleIntensityRanged("image", a_min=0, a_max=255, b_min=0, b_max=1),
]
TRAINING = [*VALIDATION, RandSpatialCropd(["image", "label"], PATCH, random_size=False)]


def loader(seed, length, transforms):
    scenes = ScenesDataset(seed, length, size=128)
    items = [{"image": scene["image"], "label": scene["mask"][None]} for scene in list(scenes)]
    return DataLoader(Dataset(items, Compose(transforms)), batch_size=4)


class Segmenter(LightningModule):
    def __init__(self):
        super().__init__()
        classes = len(CLASS_NAMES)
        self.network = UNet(2, 3, classes, channels=(16, 32, 64), strides=(2, 2))
        self.loss = DiceCELoss(to_onehot_y=True, softmax=True)

    def training_step(self, batch, batch_idx):
        return self.loss(self.network(batch["image"]), batch["label"])

    def validation_step(self, batch, batch_idx):
        logits = sliding_window_inference(batch["image"], PATCH, 4, self.network, overlap=0.25)
        return {"loss": self.loss(logits, batch["label"]), "pred": logits}

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main():
    seed_everything(0)
    callback = SAMRefineCallback("tiny", class_names=CLASS_NAMES)  # "vit_t" for photographs
    trainer = Trainer(max_epochs=2, callbacks=[callback])
    trainer.fit(Segmenter(), loader(0, 16, TRAINING), loader(1, 4, VALIDATION))
    for name in ("val/miou_raw", "val/miou_refined", "val/miou_gain"):
        print(name, trainer.callback_metrics[name].item())


if __name__ == "__main__":
    main()
