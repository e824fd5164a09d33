"""Small prediction runs with the writer, and what they leave behind."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
from kill_trials import contents  # noqa: F401 - for the tests of the writer
from lightning.pytorch import Trainer
from lightning_stubs import NUM_CLASSES, REFINE, SILENT, Blobs, Segmenter
from stub_sams import CountingSam
from torch.utils.data import DataLoader

from lightning_samrefine import SAMRefineWriter


class Named(Blobs):
    """Images with names, as a predict loader brings them: no target."""

    def __getitem__(self, index):
        return {"image": self.images[index], "name": f"scene/{index:03d}.jpg"}


class Predicting(Segmenter):
    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        image = batch["image"] if isinstance(batch, dict) else batch
        return self(image)


def named(length=5, batch_size=2, seed=0):
    return DataLoader(Named(length, seed), batch_size=batch_size)


def predict(folder, loaders=None, module=None, sam=None, trainer=None, **kwargs):
    sam = sam or CountingSam()
    writer = SAMRefineWriter(
        folder, sam, **{"num_classes": NUM_CLASSES, "refine": REFINE, **kwargs}
    )
    Trainer(**SILENT, **(trainer or {}), callbacks=[writer]).predict(
        Predicting() if module is None else module,
        named() if loaders is None else loaders,
        return_predictions=False,
    )
    return writer, sam.embedded


def rows(folder):
    return pq.read_table(Path(folder) / "manifest.parquet").to_pylist()
