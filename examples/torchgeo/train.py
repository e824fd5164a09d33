"""torchgeo's SemanticSegmentationTask with a data module of torchgeo's kind."""

import torch
from lightning.pytorch import Trainer, seed_everything
from torchgeo.datamodules import NonGeoDataModule
from torchgeo.datasets import NonGeoDataset
from torchgeo.trainers import SemanticSegmentationTask

from lightning_samrefine import SAMRefineCallback
from lightning_samrefine.demo.scenes import CLASS_NAMES, ScenesDataset  # in place of your data


class Scenes(NonGeoDataset):
    def __init__(self, seed, length):
        self.scenes = ScenesDataset(seed, length, size=128)

    def __len__(self):
        return len(self.scenes)

    def __getitem__(self, index):
        scene = self.scenes[index]
        return {"image": scene["image"].float(), "mask": scene["mask"]}


class ScenesDataModule(NonGeoDataModule):
    mean, std = torch.tensor(0), torch.tensor(255)  # torchgeo divides images by 255

    def __init__(self):
        super().__init__(Scenes, batch_size=4)

    def setup(self, stage):
        self.train_dataset, self.val_dataset = Scenes(0, 16), Scenes(1, 4)


def task():
    return SemanticSegmentationTask(
        model="unet", backbone="resnet18", task="multiclass", num_classes=len(CLASS_NAMES)
    )


def main():
    seed_everything(0)
    callback = SAMRefineCallback("tiny", class_names=CLASS_NAMES)  # "vit_t" for photographs
    trainer = Trainer(max_epochs=2, callbacks=[callback])
    trainer.fit(task(), datamodule=ScenesDataModule())
    for name in ("val/miou_raw", "val/miou_refined", "val/miou_gain"):
        print(name, trainer.callback_metrics[name].item())


if __name__ == "__main__":
    main()
