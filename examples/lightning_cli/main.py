"""A project under LightningCLI; the callback is chosen on the command line or in config.yaml."""

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI
from torch import nn
from torch.optim import AdamW
from torch.utils.data import DataLoader

from lightning_samrefine.demo.scenes import ScenesDataset  # in place of your data


class Scenes(LightningDataModule):
    def __init__(self, batch_size: int = 4):
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self):
        return DataLoader(ScenesDataset(0, 16, size=128), self.batch_size)

    def val_dataloader(self):
        return DataLoader(ScenesDataset(1, 4, size=128), self.batch_size)


class Segmenter(LightningModule):
    def __init__(self, num_classes: int = 6, width: int = 16, lr: float = 1e-2):
        super().__init__()
        self.save_hyperparameters()
        self.network = nn.Sequential(
            nn.Conv2d(3, width, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv2d(width, num_classes, 5, padding=2),
        )
        # Of a pixel of an object and of one of the background.
        weights = [0.1] + [1.0] * (num_classes - 1)
        self.loss = nn.CrossEntropyLoss(torch.tensor(weights))

    def forward(self, image):
        logits = self.network(image / 255)
        return F.interpolate(logits, image.shape[-2:], mode="bilinear")

    def training_step(self, batch, batch_idx):
        return self.loss(self(batch["image"]), batch["mask"])

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.loss(self(batch["image"]), batch["mask"]))

    def configure_optimizers(self):
        return AdamW(self.parameters(), self.hparams.lr)


def main():
    cli = LightningCLI(Segmenter, Scenes, seed_everything_default=0)
    for name in ("val/miou_raw", "val/miou_refined", "val/miou_gain"):
        print(name, cli.trainer.callback_metrics[name].item())


if __name__ == "__main__":
    main()
