"""Mask2Former predicts masks and classes of queries: its post-processing is the adapter."""

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch.utils.data import DataLoader
from transformers import (
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    SwinConfig,
)

from lightning_samrefine import SAMRefineCallback
from lightning_samrefine.demo.scenes import CLASS_NAMES, ScenesDataset  # in place of your data

PROCESSOR = Mask2FormerImageProcessor(size={"height": 128, "width": 128})


def collate(scenes):
    images, masks = [scene["image"] for scene in scenes], [scene["mask"] for scene in scenes]
    return {**PROCESSOR(images, masks, return_tensors="pt"), "mask": torch.stack(masks)}


def loader(seed, length):
    return DataLoader(ScenesDataset(seed, length, size=128), batch_size=4, collate_fn=collate)


class Segmenter(LightningModule):
    def __init__(self):
        super().__init__()
        # In your project from_pretrained("facebook/mask2former-…"), which downloads weights.
        backbone = SwinConfig(
            embed_dim=16,
            depths=[1, 1, 1, 1],
            num_heads=[1, 2, 4, 8],
            out_features=["stage1", "stage2", "stage3", "stage4"],
        )
        config = Mask2FormerConfig(
            backbone_config=backbone,
            num_labels=len(CLASS_NAMES),
            num_queries=20,
            feature_size=32,
            mask_feature_size=32,
            hidden_dim=32,
            encoder_feedforward_dim=64,
            dim_feedforward=64,
            encoder_layers=1,
            decoder_layers=2,
            num_attention_heads=2,
        )
        self.network = Mask2FormerForUniversalSegmentation(config)

    def forward(self, batch):
        return self.network(**{key: value for key, value in batch.items() if key != "mask"})

    def training_step(self, batch, batch_idx):
        return self(batch).loss

    def validation_step(self, batch, batch_idx):
        return self(batch)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def post_process(batch, outputs, captured):
    results = PROCESSOR.post_process_semantic_segmentation(
        outputs,
        target_sizes=[mask.shape for mask in batch["mask"]],
        return_segmentation_scores=True,
    )
    scores = torch.stack([result.segmentation_scores for result in results])
    # Queries add up, so a pixel's scores do not sum to 1.
    probs = scores / scores.sum(dim=1, keepdim=True)
    return {"image": batch["pixel_values"], "target": batch["mask"], "probs": probs}


def main():
    seed_everything(0)
    callback = SAMRefineCallback(  # "vit_t" for photographs
        "tiny",
        class_names=CLASS_NAMES,
        adapter=post_process,
        image_mean=PROCESSOR.image_mean,
        image_std=PROCESSOR.image_std,
    )
    trainer = Trainer(max_epochs=4, callbacks=[callback])
    trainer.fit(Segmenter(), loader(0, 16), loader(1, 4))
    for name in ("val/miou_raw", "val/miou_refined", "val/miou_gain"):
        print(name, trainer.callback_metrics[name].item())


if __name__ == "__main__":
    main()
