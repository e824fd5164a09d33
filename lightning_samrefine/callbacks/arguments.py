"""Checks of the callback's arguments, before any work is done."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_samrefine.config import PRESETS, RefineConfig
from lightning_samrefine.config_files import is_refine_file, read_refine, refine_from_mapping
from lightning_samrefine.models import SAM_NAMES, Promptable
from lightning_samrefine.utils.precision import PRECISIONS
from lightning_samrefine.utils.validation import as_integer, check_count


def check_sam(sam: Any, checkpoint: Any, precision: Any) -> None:
    """Refuse what is no SAM, a checkpoint for a loaded one, and an unknown precision.

    Raises:
        TypeError: Neither a name nor a `Promptable`.
        ValueError: An unknown name or precision, or a checkpoint beside a loaded model.
    """
    if not isinstance(sam, str | Promptable):
        raise TypeError(
            f"sam: got {type(sam).__name__}, accepted is a name for load_sam or a Promptable"
        )
    if isinstance(sam, str) and sam not in SAM_NAMES:
        raise ValueError(
            f"sam must be {', '.join(map(repr, SAM_NAMES))} or a Promptable, got {sam!r}"
        )
    if not isinstance(sam, str) and checkpoint is not None:
        raise ValueError("checkpoint: got one beside a loaded model, accepted is None there")
    if precision not in PRECISIONS:
        raise ValueError(
            f"precision: got {precision!r}, accepted are {', '.join(map(repr, PRECISIONS))}"
        )


def check_trainer(owner: str, trainer: Trainer) -> None:
    """Refuse a Trainer of the package pytorch_lightning.

    It is a copy of `lightning.pytorch` whose classes are others: a Trainer of the one takes
    callbacks of the other, which do not recognize its loggers and states.

    Args:
        owner: Class name of the callback.
        trainer: What called ``setup``.

    Raises:
        MisconfigurationException: The Trainer, or a base class of it, is of pytorch_lightning.
    """
    if any(base.__module__.startswith("pytorch_lightning.") for base in type(trainer).__mro__):
        raise MisconfigurationException(
            f"{owner}: the Trainer must be that of lightning.pytorch, got pytorch_lightning's; "
            "replace `import pytorch_lightning as pl` by `import lightning.pytorch as pl` and "
            "`from pytorch_lightning` by `from lightning.pytorch`, for the LightningModule as well"
        )


def parse_refine(refine: RefineConfig | Mapping[str, Any] | str) -> RefineConfig:
    """Read thresholds: a config, a preset's name, a YAML file, or fields that replace a preset's.

    Args:
        refine: A mapping's key ``"preset"`` names the preset, ``"default"`` without it. A string
            that ends in ``.yaml`` or ``.yml`` is a path, see `read_refine`.

    Raises:
        TypeError: Another type, or an unknown field.
        ValueError: An unknown preset, a value outside its range, or a file that is no mapping.
        FileNotFoundError: No file at that path.
    """
    if isinstance(refine, RefineConfig):
        return refine
    if isinstance(refine, str):
        if is_refine_file(refine):
            return read_refine(refine)
        if refine not in PRESETS:
            raise ValueError(
                f"refine must be {', '.join(map(repr, sorted(PRESETS)))} or the path of a .yaml "
                f"file, got {refine!r}"
            )
        return RefineConfig.preset(refine)
    if isinstance(refine, Mapping):
        return refine_from_mapping(refine)
    raise TypeError(
        f"refine: got {type(refine).__name__}, accepted is a RefineConfig, a preset's name, or a "
        "mapping of RefineConfig's fields"
    )


def parse_class_names(class_names: Sequence[str] | None) -> list[str] | None:
    """Return the names as a list.

    Raises:
        TypeError: No sequence of strings.
        ValueError: A name that comes twice: its figures could not be told apart.
    """
    if class_names is None:
        return None
    names = list(class_names)
    if isinstance(class_names, str) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"class_names: got {class_names!r}, accepted is a sequence of strings")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"class_names: got {', '.join(twice)} more than once")
    return names


def parse_name(name: str | None) -> str | None:
    """Return the name unless a logger or a file system would change it.

    Raises:
        TypeError: No string.
        ValueError: Empty, or with other characters than letters, digits, ``_``, ``-`` and ``.``.
    """
    if name is None:
        return None
    if not isinstance(name, str):
        raise TypeError(f"name must be a string or None, got {type(name).__name__} {name!r}")
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*", name):
        raise ValueError(
            "name must be letters, digits, '_', '-' and '.' (not first), as in 'fast', got "
            f"{name!r}"
        )
    return name


def parse_num_classes(num_classes: int | None, class_names: Sequence[str] | None) -> int | None:
    """Return the number of classes, from the names where it is None, None without either.

    Raises:
        TypeError: No integer.
        MisconfigurationException: Below 2, or other than the number of names.
    """
    if num_classes is None:
        num_classes = None if class_names is None else len(class_names)
    if num_classes is None:
        return None
    num_classes = check_count("num_classes", num_classes)
    if num_classes < 2:
        raise MisconfigurationException(
            "num_classes: got 1, accepted is at least 2: a one-channel binary model has 2 classes, "
            "background and foreground"
        )
    if class_names is not None and len(class_names) != num_classes:
        raise MisconfigurationException(
            f"class_names: got {len(class_names)} names, accepted are num_classes={num_classes}"
        )
    return num_classes


def num_classes_of(pl_module: LightningModule) -> int:
    """Ask a module for its number of classes; 1 is a binary model's, which makes 2.

    Raises:
        MisconfigurationException: It does not say.
    """
    for owner in (pl_module, pl_module.hparams):
        value = as_integer(getattr(owner, "num_classes", None))
        if value is not None and value >= 1:
            return max(value, 2)
    raise MisconfigurationException(
        f"num_classes: got None, and {type(pl_module).__name__} has neither num_classes nor "
        "hparams.num_classes; set SAMRefineCallback(num_classes=…) to the number of classes"
    )
