"""Names of a batch's images, and of the files that are written for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
from torch import Tensor

from lightning_samrefine.adapters.nested import MAX_DEPTH, describe, entries

STEM_NAMES = (
    "stem", "stems", "name", "names", "image_name", "image_names", "filename", "filenames",
    "file_name", "file_names", "path", "paths", "image_path", "image_paths", "image_id",
    "image_ids", "id", "ids",
)  # fmt: skip
# Other suffixes may be part of a name, as in "scene.01".
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


class Stem(str):
    """A name without its file's suffix: it is used unchanged."""

    __slots__ = ()


def find_stems(
    batch: Any, count: int, key: str | None = None, indices: Sequence[int] | None = None
) -> list[str]:
    """Return the names of a batch's images.

    They are read under ``key``, or else under the usual names, up to three containers deep;
    without any, an image's name is its index in the data set, such as ``"00000042"``.

    Args:
        batch: As the dataloader yields it.
        count: B, the number of its images.
        key: Key of B strings, paths or integers, such as ``"meta.path"``.
        indices: The images' indices in the data set, None or empty if unknown.

    Returns:
        B relative paths without the suffix of an image file (see `to_stem`), parts separated by
        "/".

    Raises:
        ValueError: Nothing under ``key``, no name and no index, or a name that no file can have.
    """
    names = _search(batch, count) if key is None else names_under(batch, key, count, "stem_key")
    if names is not None:
        return [to_stem(name) for name in names]
    if indices is not None and len(indices) == count:
        return [f"{index:08d}" for index in indices]
    raise ValueError(
        f"No names found for the {count} images of a batch, and their indices in the data set are "
        f"unknown. The batch is {describe(batch)}. Put a name into each sample, under 'name' or "
        "any other key, and set stem_key to it"
    )


def names_under(batch: Any, key: str, count: int, argument: str) -> list[Any]:
    """Return what a batch holds for each of its images under a user's key.

    Args:
        batch: As the dataloader yields it.
        key: Key of B strings, paths or integers, such as ``"meta.path"``.
        count: B, the number of its images.
        argument: Name of the argument that the key was given as, for the error.

    Raises:
        ValueError: Nothing under the key, or something else.
    """
    value = _at(batch, key)
    names = _names(value, count)
    if names is None:
        raise ValueError(
            f"{argument} must be the key of {count} strings, paths or integers, got {key!r}, "
            f"under which the batch has {describe(value)}. The batch is {describe(batch)}"
        )
    return names


def own_names(batch: Any, count: int) -> list[str] | None:
    """Return the names of a batch's images under a usual name, None without any.

    Args:
        batch: As the dataloader yields it.
        count: B, the number of its images.
    """
    names = _search(batch, count)
    return None if names is None else [str(name) for name in names]


def known_stems(dataloaders: Any) -> Iterator[str]:
    """Yield the names that data sets list in advance; others are known batch by batch."""
    several = dataloaders if isinstance(dataloaders, list | tuple) else [dataloaders]
    for index, dataloader in enumerate(several):
        names = getattr(getattr(dataloader, "dataset", None), "names", None)
        if isinstance(names, list):
            prefix = f"{index}/" if len(several) > 1 else ""
            yield from (f"{prefix}{name}" for name in names if isinstance(name, Stem))


def to_stem(name: str | int | PurePath) -> str:
    """Turn a name, a path or a number into the relative path of a file without its suffix.

    Only the last part of an absolute path is kept. The suffix of an image file is removed once; a
    `Stem` has none.

    Raises:
        ValueError: No file can have that name, or it would lie outside the folder.
    """
    text = str(name)
    if PurePosixPath(text).is_absolute() or PureWindowsPath(text).is_absolute():
        text = PureWindowsPath(text).name  # it splits at "/" as well
    path = PurePosixPath(text)
    if not isinstance(name, Stem) and path.suffix.lower() in IMAGE_SUFFIXES:
        path = path.with_suffix("")
    if not path.parts or ".." in path.parts or set(text) & set("\0\n\r\\"):
        raise ValueError(
            f"stem must be a file name, or a path below a folder without '..', got {str(name)!r}"
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"stem must be text that UTF-8 can encode, got {text!r}") from error
    return str(path)


def _search(container: Any, count: int, depth: int = 0) -> list[Any] | None:
    """Return names under a usual key: an earlier key wins, then the shallower place."""
    held = entries(container)
    for wanted in STEM_NAMES:
        for key, value in held:
            names = _names(value, count) if str(key).lower() == wanted else None
            if names is not None:
                return names
    if depth + 1 < MAX_DEPTH:
        for _, value in held:
            if isinstance(value, Mapping) or (depth == 0 and entries(value)):
                names = _search(value, count, depth + 1)
                if names is not None:
                    return names
    return None


def _names(value: Any, count: int) -> list[Any] | None:
    """Return B names, None if the value holds something else."""
    if isinstance(value, str | PurePath):
        value = [value]
    if isinstance(value, np.ndarray | np.generic) and value.ndim <= 1:
        value = value.reshape(-1).tolist()
    if isinstance(value, Tensor):
        if value.is_floating_point() or value.is_complex() or value.ndim > 1:
            return None
        value = value.reshape(-1).tolist()
    if not isinstance(value, list | tuple) or len(value) != count:
        return None
    value = [item.item() if isinstance(item, np.generic) else item for item in value]
    kinds = (str, PurePath, int)
    if not all(isinstance(item, kinds) and not isinstance(item, bool) for item in value):
        return None
    return list(value)


def _at(container: Any, key: str) -> Any:
    """Return the value under a dotted key, None if there is none."""
    for part in key.split("."):
        found = [value for name, value in entries(container) if str(name) == part]
        if not found:
            return None
        container = found[0]
    return container
