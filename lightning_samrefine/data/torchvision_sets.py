"""torchvision's VOCSegmentation and OxfordIIITPet, with samples like those of folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.datasets import OxfordIIITPet, VOCSegmentation

from lightning_samrefine.adapters.sample_names import Stem
from lightning_samrefine.data.image_files import readable
from lightning_samrefine.data.samples import (
    Sample,
    check_labels,
    collate,
    image_to_tensor,
    label_map_to_tensor,
)

IGNORE_INDEX = 255

VOC_CLASSES = (
    "background",
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)
PET_CLASSES = ("background", "pet", "border")

# Labels by the values of the published trimaps: 1 pet, 2 background, 3 not classified.
_PET_LABELS = {
    "ignore": torch.tensor([IGNORE_INDEX, 1, 0, IGNORE_INDEX]),
    "class": torch.tensor([IGNORE_INDEX, 1, 0, 2]),
}
_PET_VAL_EVERY = 10


class TorchvisionDataModule(LightningDataModule):
    """PASCAL VOC or Oxford-IIIT Pet, with images of their own sizes.

    - ``"voc"``: 21 classes; the white border of the label maps, 255, is ignored. ``train`` and
      ``val`` are VOC's; its test labels are not public, so ``test`` is ``val`` again, except for
      2007, whose test set is.
    - ``"pet"``: 2 classes, background 0 (trimap 2) and pet 1 (trimap 1). The border (trimap 3) is
      ignored, or class 2 with ``border="class"``. Every tenth image of ``trainval`` is ``val``,
      the others ``train``; ``test`` is the published one.

    Args:
        dataset: ``"voc"`` or ``"pet"``.
        root: Parent folder of ``VOCdevkit`` or ``oxford-iiit-pet``.
        download: Download missing archives to ``root``.
        year: VOC's year, ``"2007"`` to ``"2012"``; ignored for ``"pet"``.
        border: Use of the border of pets, ``"ignore"`` or ``"class"``; ignored for ``"voc"``.
        batch_size: 1 unless all images have one size.
        num_workers: Number of loader processes; 0 loads in the main process.

    Raises:
        ValueError: An unknown ``dataset``, ``border`` or ``year``.
    """

    def __init__(
        self,
        dataset: Literal["voc", "pet"],
        root: str | Path,
        download: bool = False,
        year: str = "2012",
        border: Literal["ignore", "class"] = "ignore",
        batch_size: int = 1,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        _check_choice("dataset", dataset, ("voc", "pet"))
        _check_choice("border", border, tuple(_PET_LABELS))
        _check_choice("year", str(year), tuple(str(y) for y in range(2007, 2013)))
        pet_classes = PET_CLASSES if border == "class" else PET_CLASSES[:2]
        self.class_names = list(VOC_CLASSES if dataset == "voc" else pet_classes)
        self.num_classes = len(self.class_names)
        self.ignore_index = IGNORE_INDEX
        self.dataset = dataset
        self.root = Path(root)
        self.download = download
        self.year = str(year)
        self.border = border
        self.batch_size = batch_size
        self.num_workers = num_workers

    def prepare_data(self) -> None:
        """Download the archives if ``download`` is set."""
        if not self.download:
            return
        for split in {self._source_split(split) for split in ("train", "val", "test")}:
            self._source(split, download=True)

    def setup(self, stage: str) -> None:
        """Check that ``root`` contains the complete data set.

        Raises:
            FileNotFoundError: It is missing or incomplete.
        """
        splits = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}
        for split in splits.get(stage, ()):
            self._dataset(split)

    def train_dataloader(self) -> DataLoader[Sample]:
        """Shuffled batches of the train split."""
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader[Sample]:
        """Batches of the validation split."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Sample]:
        """Batches of the test split."""
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[Sample]:
        """The same images as for testing."""
        return self.test_dataloader()

    def _loader(self, split: str, shuffle: bool = False) -> DataLoader[Sample]:
        return DataLoader(
            self._dataset(split),
            batch_size=self.batch_size,
            shuffle=shuffle,
            num_workers=self.num_workers,
            collate_fn=collate,
        )

    def _source_split(self, split: str) -> str:
        if self.dataset == "pet":
            return "test" if split == "test" else "trainval"
        return "val" if split == "test" and self.year != "2007" else split

    def _source(self, split: str, download: bool = False) -> VOCSegmentation | OxfordIIITPet:
        try:
            if self.dataset == "voc":
                return VOCSegmentation(self.root, self.year, split, download=download)
            return OxfordIIITPet(self.root, split, target_types="segmentation", download=download)
        except (RuntimeError, FileNotFoundError) as error:
            folder = "VOCdevkit" if self.dataset == "voc" else "oxford-iiit-pet"
            raise FileNotFoundError(
                f"root must hold a complete {self.dataset} data set ({split}) in the folder "
                f"{folder}, got {self.root}, which does not; data.download=true fetches it"
            ) from error

    def _dataset(self, split: str) -> Dataset[Sample]:
        source = self._source(self._source_split(split))
        if self.dataset == "voc":
            names = [Path(path).stem for path in source.images]
            return _Samples(source, names, self.num_classes, None)
        names = self._pet_names(self._source_split(split))
        samples = _Samples(source, names, self.num_classes, _PET_LABELS[self.border])
        if split == "test":
            return samples
        in_val = [index % _PET_VAL_EVERY == 0 for index in range(len(samples))]
        return Subset(samples, [i for i, val in enumerate(in_val) if val == (split == "val")])

    def _pet_names(self, split: str) -> list[str]:
        listing = self.root / "oxford-iiit-pet" / "annotations" / f"{split}.txt"
        return [line.split()[0] for line in listing.read_text(encoding="utf-8").splitlines()]


class _Samples(Dataset[Sample]):
    """Pairs of Pillow images as samples; ``lookup`` maps the label values of the files."""

    def __init__(
        self,
        source: Sequence[tuple[Image.Image, Image.Image]] | Dataset[Any],
        names: Sequence[str],
        num_classes: int,
        lookup: Tensor | None,
    ) -> None:
        self._source = source
        self._names = names
        self._num_classes = num_classes
        self._lookup = lookup

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Sample:
        name = self._names[index]
        with readable(name):
            image, labels = self._source[index]
        mask = label_map_to_tensor(labels, name)
        if self._lookup is not None:
            check_labels(mask, len(self._lookup), None, f"{name}: the label map")
            mask = self._lookup[mask]
        check_labels(mask, self._num_classes, IGNORE_INDEX, f"{name}: the label map")
        return {"image": image_to_tensor(image, name), "mask": mask, "name": Stem(name)}


def _check_choice(name: str, value: str, accepted: Sequence[str]) -> None:
    if value not in accepted:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, accepted))}, got {value!r}")
