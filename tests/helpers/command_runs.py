"""Runs of the `samrefine` command on a small folder of images, in this process."""

from __future__ import annotations

import io
import json

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from lightning.pytorch import LightningDataModule, LightningModule
from PIL import Image
from rich.console import Console
from tiny_random_sam import build_random_sam
from torch import nn

from lightning_samrefine import Refiner
from lightning_samrefine.cli.main import config_dir, run
from lightning_samrefine.models.sam import SamPromptable

CLASSES = ["back ground", "disc", "bar", "absent"]


SIZE = (48, 64)


SAM = ["sam=custom", "sam._target_=command_runs.small_sam"]


def small_sam(seed=0):
    """What the configs of these tests name as their SAM."""
    return SamPromptable(build_random_sam(seed), "small")


class Pixelwise(LightningModule):
    """A segmenter with one convolution, and the least that Lightning requires."""

    def __init__(self, num_classes, lr=0.1):
        super().__init__()
        self.save_hyperparameters()
        self.layer = nn.Conv2d(3, num_classes, 1)

    def forward(self, image):
        return self.layer(image / 255)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch["image"]), batch["mask"], ignore_index=255)

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.training_step(batch, batch_idx))
        return {"logits": self(batch["image"])}

    def test_step(self, batch, batch_idx):
        return {"logits": self(batch["image"])}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr)


def write_folder(root, count=2):
    """Images of a disc and a bar, labels with an ignored corner, noisy stored probabilities."""
    for folder in ("images", "labels", "predictions"):
        (root / folder).mkdir(parents=True)
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    for index in range(count):
        rng = np.random.default_rng(index)
        labels = np.zeros(SIZE, np.uint8)
        labels[np.hypot(rows - 20, columns - 20 - 8 * index) < 12] = 1
        labels[30:38, 10:50] = 2
        image = np.array([[90, 60, 30], [200, 40, 40], [40, 60, 220]], np.uint8)[labels]
        image = np.clip(image + rng.normal(0, 12, image.shape), 0, 255).astype(np.uint8)
        scores = 2 * np.eye(len(CLASSES))[labels].transpose(2, 0, 1) + rng.normal(
            0, 0.7, (len(CLASSES), *SIZE)
        )
        scores[3] -= 9
        probs = np.exp(scores) / np.exp(scores).sum(axis=0)
        labels[:6, :6] = 255
        Image.fromarray(image).save(root / "images" / f"{index}.png")
        Image.fromarray(labels).save(root / "labels" / f"{index}.png")
        np.savez(root / "predictions" / f"{index}.npz", probs=probs.astype(np.float32))
    return root


def split(folder, name="val", predictions=True):
    keys = ("images", "labels", "predictions") if predictions else ("images", "labels")
    return [f"data.{name}.{key}={folder / key}" for key in keys]


def overrides(folder, *more, sam=SAM):
    names = ",".join(CLASSES)
    return [
        "data=folder",
        "segmenter=stored",
        *split(folder),
        f"data.class_names=[{names}]",
        "trainer.accelerator=cpu",
        "trainer.enable_progress_bar=false",
        *sam,
        *more,
    ]


def composed(out, *values):
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return compose("samrefine", overrides=[f"output_dir={out}", *values])


def execute(out, *values):
    """Run in this process; returns what the task returned and metrics.json."""
    result = run(composed(out, *values))
    return result, json.loads((out / "metrics.json").read_text())


class Mistaken(Pixelwise):
    """Raises in its step what a wrong set-up raises, too."""

    def validation_step(self, batch, batch_idx):
        raise ValueError("mine")


class Absent(torch.utils.data.Dataset):
    """Does not find its file."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        raise FileNotFoundError("mine")


class Workers(LightningDataModule):
    """Reads in a process of its own."""

    def val_dataloader(self):
        return torch.utils.data.DataLoader(Absent(), num_workers=1)


def rendered(renderable):
    console = Console(width=100, file=io.StringIO(), no_color=True)
    console.print(renderable)
    return console.file.getvalue()


# Algorithm 4 on images too small for its published thresholds.
EVERY_REGION = (
    *("refine=algorithm4", "refine.score_thresh=0.0", "refine.mask_prompt_scale=8.0"),
    "refine.min_region_area=1",
)


SMALL = [
    "task=tune",
    *EVERY_REGION,
    "tune.score_thresh=[0.0,0.4]",
    "tune.mask_prompt_scale=[8.0]",
    "tune.pred_iou_thresh=[0.1,0.2,0.3]",
]


def folder_of_validation():
    """What the pages call the user's own data."""
    from lightning_samrefine.data import FolderDataModule

    return FolderDataModule(
        num_classes=11, ignore_index=11, test={"images": "val", "labels": "valannot"}
    )


def expected_miou(folder, refine, sides=("raw", "refined")):
    """Mean IoU over the classes present, from the files and the refiner alone."""
    refiner = Refiner(small_sam(), refine)
    counts = {side: np.zeros((len(CLASSES), len(CLASSES)), int) for side in sides}
    for path in sorted((folder / "predictions").iterdir()):
        probs = torch.from_numpy(np.load(path)["probs"])
        image = np.array(Image.open(folder / "images" / f"{path.stem}.png"))
        labels = np.array(Image.open(folder / "labels" / f"{path.stem}.png"))
        refined = refiner(torch.from_numpy(image).permute(2, 0, 1), probs).labels
        maps = {"raw": probs.argmax(dim=0).numpy(), "refined": refined.numpy()}
        known = labels != 255
        for side in sides:
            np.add.at(counts[side], (labels[known], maps[side][known]), 1)
    result = {}
    for side, matrix in counts.items():
        hits = np.diag(matrix)
        union = matrix.sum(0) + matrix.sum(1) - hits
        result[side] = (hits[union > 0] / union[union > 0]).mean()
    return result
