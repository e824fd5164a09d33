"""Folders of images, label maps and stored predictions that share their stems."""

from __future__ import annotations

import codecs
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader, Dataset

from lightning_samrefine.data.image_files import opened, read_header
from lightning_samrefine.data.samples import (
    Sample,
    binary_values,
    check_equal_sizes,
    check_labels,
    check_prediction,
    collate,
    image_hw,
    image_to_tensor,
    label_map_to_tensor,
    read_probs,
    stored_array,
)
from lightning_samrefine.targets import IgnoreIndex, settle_ignore_index

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
LABEL_SUFFIXES = (".png",)
PREDICTION_SUFFIXES = (".png", ".npz")

SPLITS = ("train", "val", "test", "predict")
# The first split of a stage is the one that it cannot do without.
_STAGE_SPLITS = {
    "fit": ("train", "val"),
    "validate": ("val",),
    "test": ("test",),
    "predict": ("predict",),
}
_SHOWN_NAMES = 5


@dataclass(frozen=True)
class FolderSplit:
    """Where one split lies.

    Attributes:
        images: Folder of 8-bit images (png, jpg, webp, bmp, tif), or of sub-folders of them: their
            stems then begin with the sub-folder's, as in ``city/0001``, here and in the other
            folders. An EXIF orientation is applied where the label map and the prediction have
            the size of the turned image, or where there is neither.
        labels: Folder of label maps: png of one channel, uint8, uint16 or palette indices.
            ``None`` for images that are to be predicted only.
        predictions: Folder of stored predictions, or ``None``: label maps (png; a value outside
            [0, C) that is 255, 65535 or the ignore_index means "unknown", any other is an error)
            or npz files with ``probs`` or ``logits``, (C, H, W).
        stems: Text file with one stem a line, UTF-8 or UTF-16, or ``None`` for every image in the
            folder.
    """

    images: str | Path | None = None
    labels: str | Path | None = None
    predictions: str | Path | None = None
    stems: str | Path | None = None

    @classmethod
    def parse(
        cls,
        name: str,
        value: FolderSplit | Mapping[str, Any] | None,
        needed: Sequence[str] = ("images", "labels"),
    ) -> FolderSplit | None:
        """Read a split's setting; one whose values are all ``None`` is no split.

        Args:
            name: What an error calls it.
            value: The setting.
            needed: The folders that it cannot do without.

        Raises:
            TypeError: Neither a mapping nor a `FolderSplit`, or an unknown key.
            ValueError: A needed folder is not set although another one is.
        """
        if value is None:
            return None
        accepted = ", ".join(field.name for field in fields(cls))
        if not isinstance(value, FolderSplit):
            if not isinstance(value, Mapping) or set(value) - {f.name for f in fields(cls)}:
                raise TypeError(f"{name}: got {value!r}, accepted is a mapping with {accepted}")
            value = cls(**value)
        given = {field.name for field in fields(cls) if getattr(value, field.name) is not None}
        if not given:
            return None
        missing = [key for key in needed if key not in given]
        if missing:
            raise ValueError(
                f"{name}: {' and '.join(missing)} not set, though {', '.join(sorted(given))} is; "
                f"this split needs {' and '.join(needed)}"
            )
        return value


_Orientation = Literal["keep", "turn", "undecided"]


@dataclass(frozen=True)
class _Files:
    stem: str
    image: Path
    labels: Path | None
    prediction: Path | None


class FolderDataset(Dataset[Sample]):
    """Samples of one split, in the order of their stems.

    Every file is found, and every size compared by header, on construction.

    Args:
        split: The folders.
        num_classes: C, the number of classes that label maps and predictions index.
        ignore_index: Label value that means "not annotated", or ``None``; ``"auto"`` is 255.

    Raises:
        FileNotFoundError: A folder or a file that is missing, with its stem.
        ValueError: Files that do not fit together, or of more than 8 bits a channel, named; two
            classes whose maps hold 0 and 255
            alone; or 255 classes and more with ``ignore_index="auto"``.
    """

    def __init__(self, split: FolderSplit, num_classes: int, ignore_index: IgnoreIndex) -> None:
        self.split = split
        self.num_classes = num_classes
        self.ignore_index = settle_ignore_index(ignore_index, num_classes)
        self._files = _pair_files(split)
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
        return [files.stem for files in self._files]

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Sample:
        files = self._files[index]
        turn = self._orientations[index] == "turn"
        with opened(files.image) as image:
            pixels = image_to_tensor(image, str(files.image), turn)
        sample: Sample = {"image": pixels, "name": files.stem}
        if files.labels is not None:
            with opened(files.labels) as labels:
                sample["mask"] = label_map_to_tensor(labels, str(files.labels))
            check_labels(sample["mask"], self.num_classes, self.ignore_index, str(files.labels))
        if files.prediction is None:
            return sample
        if files.prediction.suffix == ".npz":
            sample["probs"] = read_probs(files.prediction)
        else:
            with opened(files.prediction) as prediction:
                sample["prediction"] = label_map_to_tensor(prediction, str(files.prediction))
            check_prediction(
                sample["prediction"], self.num_classes, self.ignore_index, str(files.prediction)
            )
        return sample

    def _check_sizes(self, files: _Files) -> tuple[int, int]:
        """Return the size of an image, and note how it is turned."""
        header = read_header(files.image)
        shapes = {
            path: stored_array(path) if path.suffix == ".npz" else ("", image_hw(path))
            for path in (files.labels, files.prediction)
            if path is not None
        }
        sizes = {shape[-2:] for _, shape in shapes.values()}
        # Of what belongs to an image its size shows whether it was made before or after turning.
        as_stored = header.orientation == 1 or (
            sizes == {header.stored_hw} and not header.turned_by_pillow
        )
        hw = header.stored_hw if as_stored and not header.turned_by_pillow else header.upright_hw
        for path, (key, shape) in shapes.items():
            expected = (self.num_classes, *hw) if key else hw
            if shape != expected:
                what = f"{key} of shape" if key else "a label map of (H, W) ="
                turned = (
                    ""
                    if header.orientation == 1
                    else (f", whose EXIF orientation {header.orientation} turns it")
                )
                raise ValueError(
                    f"{path}: got {what} {shape}, accepted is {expected}, the size of its image "
                    f"{files.image.name}{turned}"
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
                f"{self.split.images}: {_some(undecided)} carry an EXIF orientation, and their "
                "label maps or predictions fit them turned or not; save these images upright "
                "without it (PIL.ImageOps.exif_transpose), the way their label maps lie"
            )


class FolderDataModule(LightningDataModule):
    """Images, label maps and optionally stored predictions from folders.

    Each split is a mapping with the keys of `FolderSplit`; files of one sample share their stem.
    Batches have the keys that `lightning_samrefine.data` names.

    Args:
        num_classes: C. ``None`` takes it from ``class_names``.
        class_names: C names for tables and logs, or ``None``.
        ignore_index: Label value that metrics leave out, or ``None``; ``"auto"`` is 255, and
            refused where 255 is a class.
        train: Shuffled; needed to fit only.
        val: Validation split.
        test: Test split.
        predict: Images to predict, no labels needed.
        batch_size: 1 unless all images of a split have one size.
        num_workers: Processes that load samples; 0 loads in the main one.

    Raises:
        TypeError: A split that is no mapping, or has an unknown key.
        ValueError: ``num_classes`` and ``class_names`` that disagree, or are both missing;
            ``ignore_index="auto"`` where 255 is a class.

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
            raise ValueError("num_classes: not set, and neither is class_names; give one of them")
        if num_classes is None:
            num_classes = len(class_names or ())
        if class_names and len(class_names) != num_classes:
            raise ValueError(
                f"class_names: got {len(class_names)} names, accepted are {num_classes}, "
                f"as many as num_classes"
            )
        if batch_size < 1:
            raise ValueError(f"batch_size: got {batch_size}, accepted is an integer of at least 1")
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
        """Find the files of the splits that a stage uses.

        Raises:
            MisconfigurationException: A split that the stage needs is not set.
            FileNotFoundError: Missing folders or files, with their stems.
            ValueError: Files that do not fit together, or images of different sizes that a batch
                size above 1 would have to stack.
        """
        names = _STAGE_SPLITS.get(stage, ())
        if names and not self.has_split(names[0]):
            needed = "images" if stage == "predict" else "images and labels"
            raise MisconfigurationException(
                f"data.{names[0]}: not set, though this run needs its {needed} "
                f"(set are: {', '.join(filter(self.has_split, SPLITS)) or 'none'})"
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
        """Batches of the validation split; none where it is not set, as Lightning expects."""
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


def _pair_files(split: FolderSplit) -> list[_Files]:
    images = _by_stem(Path(split.images or ""), "images", IMAGE_SUFFIXES)
    labels = (
        _by_stem(Path(split.labels), "labels", LABEL_SUFFIXES) if split.labels is not None else None
    )
    stored = (
        _by_stem(Path(split.predictions), "predictions", PREDICTION_SUFFIXES)
        if split.predictions is not None
        else None
    )
    if split.stems is None:
        _warn_of_nested(list(images.values()), split)
    stems = sorted(images) if split.stems is None else _read_stems(Path(split.stems))
    for what, found, folder in (
        ("image", images, split.images),
        ("label map", labels, split.labels),
        ("stored prediction", stored, split.predictions),
    ):
        missing = [stem for stem in stems if found is not None and stem not in found]
        if missing:
            raise FileNotFoundError(
                f"{folder}: no {what} for {_some(missing)} ({len(missing)} of {len(stems)} stems)"
            )
    return [
        _Files(
            stem,
            images[stem],
            labels[stem] if labels is not None else None,
            stored[stem] if stored is not None else None,
        )
        for stem in stems
    ]


def _check_not_scaled(folder: Any, paths: Sequence[Path | None], hint: str = "") -> None:
    """Refuse two classes stored as 0 and 255; the first map with a 1 in it settles the matter.

    Raises:
        ValueError: 255 occurs, and 1 does not in any of the label maps.
    """
    scaled = False
    for path in paths:
        if path is None or path.suffix == ".npz":
            continue
        has_one, has_255 = binary_values(path)
        if has_one:
            return
        scaled = scaled or has_255
    if scaled:
        raise ValueError(
            f"{folder}: label maps of two classes must hold 0 and 1, got 255 but no pixel of 1. "
            f"Divide masks of 0 and 255 by 255{hint}"
        )


def _by_stem(folder: Path, key: str, suffixes: Sequence[str]) -> dict[str, Path]:
    """Find files by their stems: those in the folder, or else those in its sub-folders."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{key}: no folder {folder}")
    found: dict[str, Path] = {}
    for paths in (folder.iterdir(), folder.rglob("*")):
        for path in sorted(paths):
            name = path.relative_to(folder)
            if path.suffix.lower() not in suffixes or any(p.startswith(".") for p in name.parts):
                continue
            stem = name.with_suffix("").as_posix()
            if stem in found:
                raise ValueError(
                    f"{folder}: two files for one stem, {found[stem].name} and {path.name}"
                )
            found[stem] = path
        if found:
            return found
    raise FileNotFoundError(f"{key}: no file ending in {', '.join(suffixes)} in {folder}")


def _warn_of_nested(images: Sequence[Path], split: FolderSplit) -> None:
    """Warn of images in sub-folders beside those that lie in the folder itself."""
    folder = Path(split.images or "")
    own = [Path(other) for other in (split.labels, split.predictions) if other is not None]
    nested = [
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES
        and path.parent != folder
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and not any(path.is_relative_to(other) for other in own)
    ]
    if nested and all(path.parent == folder for path in images):
        parents = sorted({path.relative_to(folder).parts[0] for path in nested})
        rank_zero_warn(
            f"{folder}: {len(nested)} images in its sub-folders ({_some(parents)}) are left out, "
            f"for {len(images)} lie in the folder itself"
        )


def _read_stems(path: Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"stems: no file {path}")
    stems = [line.strip() for line in _read_text(path).splitlines()]
    stems = [stem for stem in stems if stem]
    if not stems or len(set(stems)) < len(stems):
        twice = _some(stem for stem, count in Counter(stems).items() if count > 1)
        raise ValueError(
            f"{path}: got {twice + ' more than once' if stems else 'no stem'}, accepted is one "
            "stem a line, each once"
        )
    return stems


def _read_text(path: Path) -> str:
    """Decode UTF-8, with a byte order mark or without, or UTF-16 with one."""
    content = path.read_bytes()
    is_wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if is_wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: stems must be UTF-8 text, got other bytes ({error})") from error
    if "\0" in text:
        raise ValueError(
            f"{path}: stems must be UTF-8 text, or UTF-16 with a byte order mark, got NUL bytes"
        )
    return text


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = len(names) - _SHOWN_NAMES
    return ", ".join(names[:_SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "")
