"""Runs the callback on several processes; `test_callback_ddp.py` starts it.

    python ddp_run.py STRATEGY DEVICES FOLDER

Every rank leaves what it logged in FOLDER/RANK.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning_stubs import IGNORE, NUM_CLASSES, REFINE, Blobs, Segmenter, loader
from stub_sams import FailingSam
from tiny_random_sam import build_random_sam
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassJaccardIndex

from lightning_samrefine import SAMRefineCallback
from lightning_samrefine.models.sam import SamPromptable

FAILING_IMAGE = 3


class Frozen(Segmenter):
    """Trains with a learning rate of 0, so that every layout evaluates the same weights."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Keep(Callback):
    """Writes what its rank saw after each evaluation."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seen = []

    def on_validation_end(self, trainer, pl_module):
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.seen.append(metrics)
        path = self.folder / f"{trainer.global_rank}.json"
        path.write_text(json.dumps(self.seen))


def run(strategy: str, devices: int, folder: Path) -> None:
    def trainer(callback, *others, **kwargs):
        return Trainer(
            accelerator="cpu",
            strategy=strategy,
            devices=devices,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=any(isinstance(other, ModelCheckpoint) for other in others),
            callbacks=[callback, keep, *others],
            **kwargs,
        )

    keep = Keep(folder)
    sam = SamPromptable(build_random_sam(), "random")
    metric = MulticlassJaccardIndex(NUM_CLASSES, ignore_index=IGNORE)
    arguments = {"num_classes": NUM_CLASSES, "refine": REFINE, "log": "all", "metrics": metric}
    if strategy == "ddp_spawn":
        # What happens in its processes stays there, hence one run.
        trainer(SAMRefineCallback(sam, **arguments)).validate(Frozen(), loader(5), verbose=False)
        return
    # Neither 5 nor 1 image divides by 2 ranks: one rank of the last loader has none of its own.
    loaders = [loader(5, batch_size=2), loader(1, seed=1)]
    shown = {"panels": 2, "report": folder / "report.html"}
    callback = SAMRefineCallback(sam, **arguments, **shown)
    trainer(callback, default_root_dir=folder).validate(Frozen(), loaders, verbose=False)

    lost = Blobs(5).images[FAILING_IMAGE]
    failing = FailingSam(lambda images: any(torch.equal(image, lost) for image in images))
    trainer(SAMRefineCallback(failing, **arguments)).validate(
        Frozen("none"), loader(5, batch_size=3), verbose=False
    )

    # The second evaluation refines with what the first has fitted.
    auto = SAMRefineCallback(sam, num_classes=NUM_CLASSES, refine={"min_region_area": 4})
    for _ in range(2):
        trainer(auto).validate(Frozen(), loader(13), verbose=False)

    # Both processes read the whole data set.
    unsampled = trainer(SAMRefineCallback(sam, **arguments), use_distributed_sampler=False)
    unsampled.callbacks.remove(keep)
    unsampled.validate(Frozen(), loader(5), verbose=False)

    checkpoint = ModelCheckpoint(folder, monitor="val/miou_refined", mode="max")
    stopping = EarlyStopping("val/miou_refined", mode="max", patience=1)
    shuffled = DataLoader(Blobs(5), batch_size=1)
    trainer(SAMRefineCallback(sam, **arguments), checkpoint, stopping, max_epochs=3).fit(
        Frozen("none"), loader(4), shuffled
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
