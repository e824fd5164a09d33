"""Scenes as train, validation and test sets of a LightningDataModule."""

from __future__ import annotations

import lightning as lit
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_samrefine.demo.scenes import CLASS_NAMES, ScenesDataset

# Each split has its own seeds: splits never share a scene.
_SPLITS = ("train", "val", "test")


class ScenesDataModule(lit.LightningDataModule):
    """Procedural scenes, rendered once in memory, the same for the same seed.

    Batches are dicts of ``image``, (B, 3, size, size) uint8 RGB, and ``mask``, (B, size, size)
    int64.

    Attributes:
        num_classes: 6, including the background.
        class_names: Their names.
        ignore_index: None; every pixel has a label.

    Args:
        seed: Seed of all three splits, at least 0.
        train: Number of training scenes.
        val: Number of validation scenes.
        test: Number of test scenes.
        size: Side of a scene in pixels.
        batch_size: Scenes per batch.

    Raises:
        ValueError: A split without scenes, or a negative seed.
    """

    def __init__(
        self,
        seed: int = 0,
        train: int = 512,
        val: int = 24,
        test: int = 64,
        size: int = 256,
        batch_size: int = 8,
    ) -> None:
        super().__init__()
        self.num_classes = len(CLASS_NAMES)
        self.class_names = CLASS_NAMES
        self.ignore_index = None
        self.batch_size = batch_size
        lengths = {"train": train, "val": val, "test": test}
        for name, length in lengths.items():
            if length < 1:
                raise ValueError(f"{name} must be at least 1 scene, got {length}")
        if seed < 0:
            raise ValueError(f"seed must be at least 0, got {seed}")
        self._scenes = {
            name: _InMemory(ScenesDataset(len(_SPLITS) * seed + index, lengths[name], size))
            for index, name in enumerate(_SPLITS)
        }

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Shuffled training scenes; the incomplete last batch is left out."""
        scenes = self._scenes["train"]
        whole = len(scenes) >= self.batch_size
        return DataLoader(scenes, self.batch_size, shuffle=True, drop_last=whole)

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Validation scenes in order."""
        return DataLoader(self._scenes["val"], self.batch_size)

    def test_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Test scenes in order."""
        return DataLoader(self._scenes["test"], self.batch_size)

    def predict_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """The test scenes."""
        return self.test_dataloader()


class _InMemory(Dataset[dict[str, Tensor]]):
    """Keeps rendered scenes: rendering a scene takes longer than training on it."""

    def __init__(self, scenes: ScenesDataset) -> None:
        self._scenes = scenes
        self._rendered: dict[int, tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return len(self._scenes)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index not in self._rendered:
            scene = self._scenes[index]
            self._rendered[index] = scene["image"], scene["mask"].to(torch.uint8)
        image, mask = self._rendered[index]
        return {"image": image, "mask": mask.long()}
