"""The module and the data of somebody else's app, and LightningCLI over them."""

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch.utils.data import DataLoader, Dataset


class _Scenes(Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        mask = torch.zeros(64, 64, dtype=torch.long)
        mask[10 : 40 + 4 * index, 20:50] = 1
        return torch.stack([mask * 200, mask * 90 + 40, 255 - mask * 120]).to(torch.uint8), mask


class BlobData(LightningDataModule):
    def val_dataloader(self):
        return DataLoader(_Scenes(), batch_size=1)


class Blobs(LightningModule):
    """Predicts a blurred threshold of the red channel."""

    num_classes = 2

    def validation_step(self, batch, batch_idx):
        red = torch.nn.functional.avg_pool2d(batch[0][:, :1].float(), 9, 1, 4) / 50 - 2
        return {"logits": torch.cat([-red, red], dim=1)}


def cli():
    from lightning.pytorch.cli import LightningCLI

    run = LightningCLI(Blobs, BlobData)
    print("METRICS", sorted(run.trainer.callback_metrics))


if __name__ == "__main__":
    cli()
