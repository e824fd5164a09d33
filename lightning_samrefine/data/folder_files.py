"""Matches images, label maps and stored predictions of a sample by their stems."""

from __future__ import annotations

import codecs
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_samrefine.adapters.sample_names import IMAGE_SUFFIXES
from lightning_samrefine.utils.validation import some_of

# By attribute of `FolderSplit`: what a file is, and the endings of its name.
_KINDS = {
    "images": ("image", IMAGE_SUFFIXES),
    "labels": ("label map", (".png",)),
    "predictions": ("stored prediction", (".png", ".npz")),
}


@dataclass(frozen=True)
class FolderSplit:
    """The folders of one split.

    Attributes:
        images: Folder of 8-bit images (png, jpg, webp, bmp, tif), or of sub-folders with images:
            stems then start with the sub-folder's name, as in ``city/0001``, here and in the other
            folders. An EXIF orientation is applied if the label map and the prediction have the
            size of the rotated image, or without either.
        labels: Folder of label maps: png of one channel, uint8, uint16 or palette indices.
            ``None`` for prediction without labels.
        predictions: Folder of stored predictions, or ``None``: label maps (png; the values 255,
            65535 and the ignore_index outside [0, C) mean "unknown", any other is an error) or npz
            files with ``probs`` or ``logits``, (C, H, W).
        stems: Text file with one stem per line, UTF-8 or UTF-16, or ``None`` for every image in the
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
        """Convert a split's setting; None if all its values are ``None``.

        Args:
            name: The split's name in errors.
            value: The setting.
            needed: The required folders.

        Raises:
            TypeError: Neither a mapping nor a `FolderSplit`, or an unknown key.
            ValueError: A needed folder is not set although another one is.
        """
        if value is None:
            return None
        accepted = ", ".join(field.name for field in fields(cls))
        if not isinstance(value, FolderSplit):
            if not isinstance(value, Mapping) or set(value) - {f.name for f in fields(cls)}:
                raise TypeError(f"{name} must be a mapping with {accepted}, got {value!r}")
            value = cls(**value)
        given = {field.name for field in fields(cls) if getattr(value, field.name) is not None}
        if not given:
            return None
        missing = [key for key in needed if key not in given]
        if missing:
            raise ValueError(
                f"{name} must have {' and '.join(needed)}, got {' and '.join(sorted(given))} "
                f"without {' and '.join(missing)}"
            )
        return value


@dataclass(frozen=True)
class SampleFiles:
    """The files of one sample; None for a kind that the split does not have."""

    stem: str
    image: Path
    labels: Path | None
    prediction: Path | None


def pair_files(split: FolderSplit) -> list[SampleFiles]:
    """Find the files of every sample of a split, in the order of its stems.

    Raises:
        FileNotFoundError: A folder or a file is missing, with its stem.
        ValueError: Two files with the same stem, or an invalid stems file.
    """
    found = {
        key: _by_stem(Path(folder), key, suffixes)
        for key, (_, suffixes) in _KINDS.items()
        if (folder := getattr(split, key)) is not None
    }
    images = found["images"]
    if split.stems is None:
        _warn_of_nested(list(images.values()), split)
    stems = sorted(images) if split.stems is None else _read_stems(Path(split.stems))
    for key, files in found.items():
        missing = [stem for stem in stems if stem not in files]
        if missing:
            raise FileNotFoundError(
                f"{getattr(split, key)} must hold one {_KINDS[key][0]} for each of {len(stems)} "
                f"stems, got none for {len(missing)}: {some_of(missing)}"
            )
    labels, predictions = found.get("labels", {}), found.get("predictions", {})
    return [
        SampleFiles(stem, images[stem], labels.get(stem), predictions.get(stem)) for stem in stems
    ]


def _by_stem(folder: Path, key: str, suffixes: Sequence[str]) -> dict[str, Path]:
    """Return files by stem: those in the folder, or else those in its sub-folders."""
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{key} must be a folder, got {folder.absolute()}, where there is none"
        )
    found: dict[str, Path] = {}
    for paths in (folder.iterdir(), folder.rglob("*")):
        for path in sorted(paths):
            name = path.relative_to(folder)
            if path.suffix.lower() not in suffixes or any(p.startswith(".") for p in name.parts):
                continue
            stem = name.with_suffix("").as_posix()
            if stem in found:
                raise ValueError(
                    f"{folder} must hold one file for each stem, got {found[stem].name} and "
                    f"{path.name}"
                )
            found[stem] = path
        if found:
            return found
    raise FileNotFoundError(
        f"{key} must be a folder with files ending in {', '.join(suffixes)}, got {folder}, which "
        "has none"
    )


def _warn_of_nested(images: Sequence[Path], split: FolderSplit) -> None:
    """Warn of images in sub-folders if there are images in the folder itself."""
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
            f"{folder}: {len(nested)} images in its sub-folders ({some_of(parents)}) are left out, "
            f"because {len(images)} are in the folder itself"
        )


def _read_stems(path: Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"stems must be a file, got {path.absolute()}, where there is none")
    stems = [line.strip() for line in _read_text(path).splitlines()]
    stems = [stem for stem in stems if stem]
    if not stems or len(set(stems)) < len(stems):
        twice = some_of(stem for stem, count in Counter(stems).items() if count > 1)
        raise ValueError(
            f"{path} must have one stem per line, each once, got "
            f"{twice + ' more than once' if stems else 'no stem'}"
        )
    return stems


def _read_text(path: Path) -> str:
    """Decode UTF-8, with or without a byte order mark, or UTF-16 with one."""
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
