"""Object or background in one channel, with a step as in segmentation-models-pytorch's examples."""

import segmentation_models_pytorch as smp
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch.optim import AdamW
from torch.utils.data import DataLoader, Dataset

from lightning_samrefine import SAMRefineCallback
from lightning_samrefine.demo.scenes import ScenesDataset  # in place of your data


class Objects(Dataset):
    def __init__(self, seed, length):
        self.scenes = ScenesDataset(seed, length, size=128)

    def __len__(self):
        return len(self.scenes)

    def __getitem__(self, index):
        scene = self.scenes[index]
        return {"image": scene["image"] / 255, "mask": (scene["mask"] > 0).float()[None]}


class Segmenter(LightningModule):
    def __init__(self):
        super().__init__()
        self.model = smp.create_model("Unet", "resnet18", encoder_weights=None, classes=1)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))
        self.loss_fn = smp.losses.DiceLoss(smp.losses.BINARY_MODE, from_logits=True)

    def forward(self, image):
        return self.model((image - self.mean) / self.std)

    def shared_step(self, batch):
        image, mask = batch["image"], batch["mask"]
        logits = self(image)
        predicted = (logits.sigmoid() > 0.5).long()
        tp, fp, fn, tn = smp.metrics.get_stats(predicted, mask.long(), mode="binary")
        return {"loss": self.loss_fn(logits, mask), "tp": tp, "fp": fp, "fn": fn, "tn": tn}

    def training_step(self, batch, batch_idx):
        return self.shared_step(batch)

    def validation_step(self, batch, batch_idx):
        return self.shared_step(batch)

    def configure_optimizers(self):
        return AdamW(self.parameters(), lr=1e-3)


def main():
    seed_everything(0)
    callback = SAMRefineCallback("tiny", num_classes=2)  # "vit_t" for photographs
    trainer = Trainer(max_epochs=2, callbacks=[callback])
    trainer.fit(Segmenter(), DataLoader(Objects(0, 16), 4), DataLoader(Objects(1, 4), 4))
    for name in ("val/miou_raw", "val/miou_refined", "val/miou_gain"):
        print(name, trainer.callback_metrics[name].item())


if __name__ == "__main__":
    main()
