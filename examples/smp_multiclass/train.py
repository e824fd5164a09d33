"""Train a Unet of segmentation-models-pytorch; the callback measures it after every epoch."""

import segmentation_models_pytorch as smp
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch.optim import AdamW
from torch.utils.data import DataLoader

from lightning_samrefine import SAMRefineCallback
from lightning_samrefine.demo.scenes import ScenesDataset  # in place of your data


class Segmenter(LightningModule):
    def __init__(self):
        super().__init__()
        self.network = smp.Unet("resnet18", encoder_weights=None, classes=6)
        self.loss = smp.losses.DiceLoss("multiclass")

    def forward(self, image):
        return self.network(image / 255)

    def training_step(self, batch, batch_idx):
        return self.loss(self(batch["image"]), batch["mask"])

    def validation_step(self, batch, batch_idx):
        logits = self(batch["image"])
        self.log("val/loss", self.loss(logits, batch["mask"]))
        return {"logits": logits}

    def configure_optimizers(self):
        return AdamW(self.parameters(), lr=1e-3)


def loader(seed, length):
    return DataLoader(ScenesDataset(seed, length, size=128), batch_size=4)


def main():
    seed_everything(0)
    model, train_loader, val_loader = Segmenter(), loader(0, 16), loader(1, 4)
    callback = SAMRefineCallback(sam="tiny", num_classes=6)  # "vit_t" for photographs
    trainer = Trainer(max_epochs=2, callbacks=[callback])
    trainer.fit(model, train_loader, val_loader)
    for name in ("val/miou_raw", "val/miou_refined", "val/miou_gain"):
        print(name, trainer.callback_metrics[name].item())


if __name__ == "__main__":
    main()
