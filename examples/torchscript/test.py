"""Test a TorchScript file: only its scores can be read."""

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch.utils.data import DataLoader

from lightning_samrefine import SAMRefineCallback
from lightning_samrefine.demo.scenes import CLASS_NAMES, ScenesDataset  # in place of your data
from lightning_samrefine.demo.segmenter import SmallSegmenter  # in place of your network


class Deployed(LightningModule):
    def __init__(self, path):
        super().__init__()
        self.network = torch.jit.load(path)

    def test_step(self, batch, batch_idx):
        # Scripted networks take no forward hooks, so the step returns the scores.
        return {"logits": self.network(batch["image"] / 127.5 - 1)}


def main():
    seed_everything(0)
    torch.jit.script(SmallSegmenter(6).net.eval()).save("network.pt")
    callback = SAMRefineCallback("tiny", class_names=CLASS_NAMES)  # "vit_t" for photographs
    trainer = Trainer(callbacks=[callback])
    trainer.test(Deployed("network.pt"), DataLoader(ScenesDataset(1, 4, size=128), batch_size=4))
    for name in ("test/miou_raw", "test/miou_refined", "test/miou_gain"):
        print(name, trainer.callback_metrics[name].item())


if __name__ == "__main__":
    main()
