"""Folders of images, label maps and stored predictions, matched by file stem."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_samrefine.adapters.sample_names import Stem
from lightning_samrefine.adapters.target_values import (
    IgnoreIndex,
    settle_ignore_index,
    without_unknown,
)
from lightning_samrefine.data.folder_files import (
    FolderSplit,
    SampleFiles,
    pair_files,
)
from lightning_samrefine.data.image_files import opened, read_header
from lightning_samrefine.data.samples import (
    Sample,
    check_equal_sizes,
    check_labels,
    collate,
    image_hw,
    image_to_tensor,
    read_label_map,
    read_probs,
    stored_array,
)
from lightning_samrefine.utils.validation import some_of

SPLITS = ("train", "val", "test", "predict")
# The first split of a stage is required.
_STAGE_SPLITS = {
    "fit": ("train", "val"),
    "validate": ("val",),
    "test": ("test",),
    "predict": ("predict",),
}


_Orientation = Literal["keep", "turn", "undecided"]


class FolderDataset(Dataset[Sample]):
    """Samples of one split, in the order of their stems.

    On construction all files are searched, and their sizes compared by their headers.

    Args:
        split: The folders.
        num_classes: C, the number of classes that label maps and predictions index.
        ignore_index: Label value that means "not annotated", or ``None``; ``"auto"`` is 255.

    Raises:
        FileNotFoundError: A folder or a file is missing, with its stem.
        ValueError: Files that do not fit together, or with more than 8 bits per channel; two
            classes with maps of 0 and 255 only; or more than 255 classes with
            ``ignore_index="auto"``.
    """

    def __init__(self, split: FolderSplit, num_classes: int, ignore_index: IgnoreIndex) -> None:
        self.split = split
        self.num_classes = num_classes
        self.ignore_index = settle_ignore_index(ignore_index, num_classes)
        self._files = pair_files(split)
        self._orientations: list[_Orientation] = []
        self.sizes = [self._check_sizes(files) for files in self._files]
        self._refuse_undecided()
        if num_classes == 2:
            if ignore_index == "auto":
                hint = ", or set ignore_index=255 if that marks pixels without annotation"
                _check_not_scaled(split.labels, [files.labels for files in self._files], hint)
            _check_not_scaled(split.predictions, [files.prediction for files in self._files])

    @property
    def names(self) -> list[str]:
        """Stems, in the order of the samples."""
        return [Stem(files.stem) for files in self._files]

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Sample:
        files = self._files[index]
        turn = self._orientations[index] == "turn"
        with opened(files.image) as image:
            pixels = image_to_tensor(image, str(files.image), turn)
        sample: Sample = {
            "image": pixels,
            "name": Stem(files.stem),
            "folder": PurePosixPath(files.stem).parent.as_posix(),  # for group_key
        }
        if files.labels is not None:
            sample["mask"] = read_label_map(files.labels)
            self._check(sample["mask"], f"{files.labels}: the label map")
        if files.prediction is None:
            return sample
        if files.prediction.suffix == ".npz":
            sample["probs"] = read_probs(files.prediction)
        else:
            sample["prediction"] = read_label_map(files.prediction)
            known = without_unknown(sample["prediction"], self.num_classes)
            self._check(known, f"{files.prediction}: the prediction")
        return sample

    def _check(self, labels: Tensor, name: str) -> None:
        check_labels(labels, self.num_classes, self.ignore_index, name)

    def _check_sizes(self, files: SampleFiles) -> tuple[int, int]:
        """Return the size of an image, and record its orientation."""
        header = read_header(files.image)
        shapes = {
            path: stored_array(path) if path.suffix == ".npz" else ("", image_hw(path))
            for path in (files.labels, files.prediction)
            if path is not None
        }
        sizes = {shape[-2:] for _, shape in shapes.values()}
        # The size of the label map shows whether it was made before or after applying the EXIF
        # orientation.
        as_stored = header.orientation == 1 or (
            sizes == {header.stored_hw} and not header.turned_by_pillow
        )
        hw = header.stored_hw if as_stored and not header.turned_by_pillow else header.upright_hw
        for path, (key, shape) in shapes.items():
            expected = (self.num_classes, *hw) if key else hw
            if shape != expected:
                what = f"{key} of shape" if key else "a label map of (H, W) ="
                turned = ""
                if header.orientation != 1:
                    turned = f", whose EXIF orientation {header.orientation} turns it"
                raise ValueError(
                    f"{path} must have the size of its image {files.image.name}{turned}, "
                    f"{expected}, got {what} {shape}"
                )
        if header.orientation != 1 and shapes and header.stored_hw == header.upright_hw:
            self._orientations.append("undecided")
        else:
            self._orientations.append("keep" if as_stored or header.turned_by_pillow else "turn")
        return hw

    def _refuse_undecided(self) -> None:
        undecided = [
            files.image.name
            for files, orientation in zip(self._files, self._orientations, strict=True)
            if orientation == "undecided"
        ]
        if undecided:
            raise ValueError(
                f"{self.split.images} must hold images whose label maps or predictions fit one "
                f"orientation, got {some_of(undecided)}, whose EXIF orientation fits as well as "
                "none; save these upright without it (PIL.ImageOps.exif_transpose), the way their "
                "label maps lie"
            )


class FolderDataModule(LightningDataModule):
    """Images, label maps and optionally stored predictions from folders.

    Each split is a mapping with the keys of `FolderSplit`; files of one sample have the same stem.
    The keys of batches are those of `lightning_samrefine.data`.

    Args:
        num_classes: C. ``None`` takes it from ``class_names``.
        class_names: C names for tables and logs, or ``None``.
        ignore_index: Label value that metrics ignore, or ``None``; ``"auto"`` is 255, and an error
            if 255 is a class.
        train: Training split, shuffled; required for fitting only.
        val: Validation split.
        test: Test split.
        predict: Images to predict; labels are not needed.
        batch_size: 1 unless all images of a split have the same size.
        num_workers: Number of loader processes; 0 loads in the main process.

    Raises:
        TypeError: A split that is not a mapping, or has an unknown key.
        ValueError: ``num_classes`` and ``class_names`` disagree, or are both missing;
            ``ignore_index="auto"`` if 255 is a class.

    Example::

        data = FolderDataModule(
            class_names=["background", "cell"],
            val={"images": "val/images", "labels": "val/labels", "predictions": "val/unet"},
        )
    """

    def __init__(
        self,
        num_classes: int | None = None,
        class_names: Sequence[str] | None = None,
        ignore_index: IgnoreIndex = "auto",
        train: FolderSplit | Mapping[str, Any] | None = None,
        val: FolderSplit | Mapping[str, Any] | None = None,
        test: FolderSplit | Mapping[str, Any] | None = None,
        predict: FolderSplit | Mapping[str, Any] | None = None,
        batch_size: int = 1,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        if num_classes is None and not class_names:
            raise ValueError("num_classes or class_names must be set, got neither")
        if num_classes is None:
            num_classes = len(class_names or ())
        if class_names and len(class_names) != num_classes:
            raise ValueError(
                f"class_names must be num_classes={num_classes} names, got {len(class_names)}"
            )
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.num_classes = num_classes
        self.class_names = list(class_names) if class_names else None
        self.ignore_index = settle_ignore_index(ignore_index, num_classes)
        self._ignore_index = ignore_index
        self.batch_size = batch_size
        self.num_workers = num_workers
        self._splits = {
            name: FolderSplit.parse(name, value)
            for name, value in {"train": train, "val": val, "test": test}.items()
        }
        self._splits["predict"] = FolderSplit.parse("predict", predict, needed=("images",))
        self._datasets: dict[str, FolderDataset] = {}

    def has_split(self, name: str) -> bool:
        """Whether ``"train"``, ``"val"``, ``"test"`` or ``"predict"`` is set."""
        return self._splits[name] is not None

    def setup(self, stage: str) -> None:
        """Find the files of a stage's splits.

        Raises:
            MisconfigurationException: A split that the stage needs is not set.
            FileNotFoundError: Missing folders or files, with their stems.
            ValueError: Files that do not fit together, or images of different sizes with a batch
                size above 1.
        """
        names = _STAGE_SPLITS.get(stage, ())
        if names and not self.has_split(names[0]):
            needed = "images" if stage == "predict" else "images and labels"
            raise MisconfigurationException(
                f"data.{names[0]} must be set, because this run needs its {needed}, got "
                f"{', '.join(filter(self.has_split, SPLITS)) or 'no split'}"
            )
        for name in names:
            split = self._splits[name]
            if split is not None and name not in self._datasets:
                dataset = FolderDataset(split, self.num_classes, self._ignore_index)
                check_equal_sizes(self.batch_size, dataset.names, dataset.sizes)
                self._datasets[name] = dataset

    def train_dataloader(self) -> DataLoader[Sample]:
        """Shuffled batches of the train split."""
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader[Sample] | list[Any]:
        """Batches of the validation split; an empty list if it is not set, as Lightning expects."""
        return self._loader("val") if self.has_split("val") else []

    def test_dataloader(self) -> DataLoader[Sample]:
        """Batches of the test split."""
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[Sample]:
        """Batches of the images to predict."""
        return self._loader("predict")

    def _loader(self, name: str, shuffle: bool = False) -> DataLoader[Sample]:
        return DataLoader(
            self._datasets[name],
            batch_size=self.batch_size,
            shuffle=shuffle,
            num_workers=self.num_workers,
            collate_fn=collate,
        )


def _check_not_scaled(folder: Any, paths: Sequence[Path | None], hint: str = "") -> None:
    """Raise if two classes are stored as 0 and 255; reads maps until one holds a 1.

    Raises:
        ValueError: 255 occurs, and 1 occurs in none of the label maps.
    """
    scaled = False
    for path in paths:
        if path is None or path.suffix == ".npz":
            continue
        labels = read_label_map(path)
        if (labels == 1).any():
            return
        scaled = scaled or bool((labels == 255).any())
    if scaled:
        raise ValueError(
            f"{folder}: label maps of two classes must hold 0 and 1, got 255 but no pixel of 1. "
            f"Divide masks of 0 and 255 by 255{hint}"
        )
