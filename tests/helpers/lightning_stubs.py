"""A small segmentation task for a real Trainer: data sets, loaders and LightningModules."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_samrefine.config import RefineConfig
from lightning_samrefine.metrics.comparison import RefinementComparison
from lightning_samrefine.models import Promptable
from lightning_samrefine.refine.refiner import Refiner

NUM_CLASSES = 3
HW = (32, 40)
IGNORE = 255
# Low enough for the random SAM to accept about half of its regions.
REFINE = RefineConfig(min_region_area=4, pred_iou_thresh=0.5)
# Arguments of a Trainer that writes and prints nothing.
SILENT = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
}


class Blobs(Dataset):
    """Images of colored blobs: uint8 (3, H, W) and int64 (H, W) with an ignored stripe."""

    def __init__(self, length: int = 4, seed: int = 0, hw: tuple[int, int] = HW) -> None:
        generator = torch.Generator().manual_seed(seed)
        coarse = torch.randint(0, NUM_CLASSES, (length, 1, 4, 5), generator=generator).float()
        targets = nn.functional.interpolate(coarse, hw, mode="nearest")[:, 0].long()
        colors = torch.tensor([[220, 40, 30], [50, 200, 60], [40, 70, 230]])
        images = colors[targets].permute(0, 3, 1, 2)
        noise = torch.randint(-30, 30, images.shape, generator=generator)
        self.images = (images + noise).clamp(0, 255).to(torch.uint8)
        self.targets = targets.clone()
        self.targets[:, -2:] = IGNORE

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.targets[index]


class DictBlobs(Blobs):
    def __getitem__(self, index: int) -> dict[str, Tensor]:
        image, target = super().__getitem__(index)
        return {"image": image, "mask": target}


def loader(length: int = 4, seed: int = 0, batch_size: int = 2, **kwargs: Any) -> DataLoader:
    return DataLoader(Blobs(length, seed, **kwargs), batch_size=batch_size)


class Segmenter(LightningModule):
    """One convolution over pixels, with seeded weights that are wrong often enough.

    Args:
        returns: What evaluation steps return: a key of `OUTPUTS`.
        call: ``"self"`` or ``"child"``, whose forward the steps call.
    """

    OUTPUTS: ClassVar = {
        "logits": lambda logits, loss: logits,
        "dict": lambda logits, loss: {"loss": loss, "logits": logits},
        "probs": lambda logits, loss: {"probs": logits.softmax(dim=1)},
        "labels": lambda logits, loss: {"preds": logits.argmax(dim=1)},
        "half": lambda logits, loss: logits.bfloat16(),
        "loss": lambda logits, loss: loss,
        "none": lambda logits, loss: None,
    }

    def __init__(self, returns: str = "dict", call: str = "self", channels: int = NUM_CLASSES):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.network = nn.Conv2d(3, channels, 3, padding=1)
        self.dropout = nn.Dropout(0.2)
        self.returns = returns
        self.call = call
        self.forwards = 0

    def forward(self, image: Tensor) -> Tensor:
        self.forwards += 1
        # An image at a time: convolutions of a batch may round otherwise than those of one image,
        # and tests compare runs of different batch sizes bit for bit.
        logits = [self.network(one / 255 - 0.5) for one in image.split(1)]
        return self.dropout(torch.cat(logits))

    def logits_and_target(self, batch: Any) -> tuple[Tensor, Tensor]:
        if isinstance(batch, dict):
            image, target = batch["image"], batch["mask"]
        else:
            image, target = batch[:2]
        logits = self(image) if self.call == "self" else self.network(image / 255 - 0.5)
        return logits, target

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        if logits.shape[1] == 1:
            valid = target != IGNORE
            return nn.functional.binary_cross_entropy_with_logits(
                logits[:, 0][valid], (target[valid] > 0).float()
            )
        return nn.functional.cross_entropy(logits, target, ignore_index=IGNORE)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(*self.logits_and_target(batch))

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        logits, target = self.logits_and_target(batch)
        return self.OUTPUTS[self.returns](logits, self.loss(logits, target))

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self.validation_step(batch, batch_idx, dataloader_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.05)


def expected_figures(
    module: Segmenter, dataset: Blobs, sam: Promptable, refine: RefineConfig = REFINE, **kwargs: Any
) -> dict[str, float]:
    """Compute the figures without Trainer or callback, image by image."""
    comparison = RefinementComparison(NUM_CLASSES, IGNORE, **kwargs)
    refiner = Refiner(sam, refine)
    module.eval()
    with torch.no_grad():
        for index in range(len(dataset)):
            image, target = dataset.images[index], dataset.targets[index]
            logits = module.network(image[None] / 255 - 0.5)[0]
            out = refiner(image, logits.softmax(dim=0))
            comparison.update(logits.argmax(dim=0), out.labels, target, out.regions)
            comparison.counts.update(images=1, regions=len(out.regions), accepted=len(out.pred_iou))
    return comparison.compute()
