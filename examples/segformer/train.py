"""Hugging Face's SegFormer, whose image processor makes the unlabeled class 0 the ignored one."""

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch.utils.data import DataLoader
from transformers import (
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SegformerImageProcessor,
)

from lightning_samrefine import SAMRefineCallback
from lightning_samrefine.demo.scenes import CLASS_NAMES, ScenesDataset  # in place of your data

PROCESSOR = SegformerImageProcessor(do_reduce_labels=True, size={"height": 128, "width": 128})
# In your project from_pretrained("nvidia/mit-b0", num_labels=…), which downloads weights.
CONFIG = SegformerConfig(
    num_labels=len(CLASS_NAMES) - 1, depths=[1, 1, 1, 1], hidden_sizes=[16, 32, 64, 128]
)


def collate(scenes):
    images, masks = [scene["image"] for scene in scenes], [scene["mask"] for scene in scenes]
    return PROCESSOR(images, masks, return_tensors="pt")


def loader(seed, length):
    return DataLoader(ScenesDataset(seed, length, size=160), batch_size=4, collate_fn=collate)


class Segmenter(LightningModule):
    def __init__(self):
        super().__init__()
        self.network = SegformerForSemanticSegmentation(CONFIG)

    def training_step(self, batch, batch_idx):
        return self.network(**batch).loss

    def validation_step(self, batch, batch_idx):
        return self.network(**batch)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main():
    seed_everything(0)
    callback = SAMRefineCallback(  # "vit_t" for photographs
        "tiny",
        class_names=CLASS_NAMES[1:],
        image_mean=PROCESSOR.image_mean,
        image_std=PROCESSOR.image_std,
    )
    trainer = Trainer(max_epochs=2, callbacks=[callback])
    trainer.fit(Segmenter(), loader(0, 16), loader(1, 4))
    for name in ("val/miou_raw", "val/miou_refined", "val/miou_gain"):
        print(name, trainer.callback_metrics[name].item())


if __name__ == "__main__":
    main()
