"""The project's network, in place of yours."""

import torch
from lightning.pytorch import LightningModule
from torch import nn


class Segmenter(LightningModule):
    def __init__(self, num_classes, width, lr):
        super().__init__()
        self.save_hyperparameters()
        self.network = nn.Sequential(
            nn.Conv2d(3, width, 5, padding=2),
            nn.ReLU(),
            nn.Conv2d(width, num_classes, 5, padding=2),
        )
        weights = [0.1] + [1.0] * (num_classes - 1)
        self.loss = nn.CrossEntropyLoss(torch.tensor(weights))

    def forward(self, image):
        return self.network(image / 255)

    def training_step(self, batch, batch_idx):
        return self.loss(self(batch["image"]), batch["mask"])

    def validation_step(self, batch, batch_idx):
        logits = self(batch["image"])
        self.log("val/loss", self.loss(logits, batch["mask"]))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), self.hparams.lr)
