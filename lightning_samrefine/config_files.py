"""Thresholds and weights in YAML files, such as ``tuned.yaml`` and ``fitted.yaml``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

from lightning_samrefine.config import RefineConfig, unknown_fields
from lightning_samrefine.fusion_weights import FusionWeights

_OVERRIDE = "refine="
_SUFFIXES = (".yaml", ".yml")
# As in refine.stride=2, ++refine.classes=[1] and refine.class_pred_iou_thresh.3=0.7.
_KEY = re.compile(r"(?:\+{1,2}|~)?refine\.(\w+)")


def is_refine_file(name: str) -> bool:
    """Whether a string is the path of a YAML file, and not a preset's name."""
    return name.endswith(_SUFFIXES)


def read_refine(path: str | Path) -> RefineConfig:
    """Read a YAML mapping of `RefineConfig`'s fields; others are those of ``"auto"``.

    Raises:
        FileNotFoundError: No file at that path.
        TypeError: An unknown field, or a value of a wrong type.
        ValueError: Not a mapping, an unknown preset, or a value outside its range.
    """
    from omegaconf import DictConfig, OmegaConf

    if not Path(path).is_file():
        raise FileNotFoundError(
            f"refine must be the path of a file, got {path}, where there is none"
        )
    loaded = OmegaConf.load(path)
    if not isinstance(loaded, DictConfig):
        raise ValueError(f"refine must be a file with RefineConfig's fields, got {path}")
    try:
        fields = cast("dict[Any, Any]", OmegaConf.to_container(loaded, resolve=True))
        return refine_from_mapping(fields)
    except (TypeError, ValueError) as error:
        raise type(error)(f"refine={path}: {error}") from error


def write_refine(config: RefineConfig, path: str | Path, comments: Sequence[str] = ()) -> None:
    """Write a YAML file that `read_refine` and ``samrefine refine=PATH`` read.

    Args:
        config: Every field is written. The head of the file also has what its fit found.
        path: The file.
        comments: Lines at its head.
    """
    from omegaconf import OmegaConf

    found = [config.weights.found] if isinstance(config.weights, FusionWeights) else []
    text = "".join(f"# {comment}\n" for comment in [*comments, *filter(None, found)])
    text += OmegaConf.to_yaml(OmegaConf.create(refine_to_mapping(config)))
    Path(path).write_text(text, encoding="utf-8")


def refine_to_mapping(config: RefineConfig) -> dict[str, Any]:
    """Return all fields as plain values, from which `RefineConfig` is built again."""
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    if isinstance(config.weights, FusionWeights):
        values["weights"] = config.weights.to_mapping()
    return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}


def refine_from_mapping(fields: Mapping[Any, Any]) -> RefineConfig:
    """Replace fields of a preset: the one under the key ``"preset"``, or else ``"auto"``."""
    values = {str(key): value for key, value in fields.items()}
    return RefineConfig.preset(values.pop("preset", "auto"), **values)


def with_refine_files(arguments: Sequence[str]) -> list[str]:
    """Turn ``refine=PATH.yaml`` of a command line into an option of Hydra's group ``refine``.

    The option's name is ``file/<stem>``. Several files, as in ``-m refine=a.yaml,b.yaml``, are
    several options.

    Raises:
        FileNotFoundError, TypeError, ValueError: As `read_refine`.
    """
    return [
        _OVERRIDE + ",".join(map(_option, argument.removeprefix(_OVERRIDE).split(",")))
        if argument.startswith(_OVERRIDE)
        else argument
        for argument in arguments
    ]


def check_refine_keys(arguments: Sequence[str]) -> None:
    """Refuse a threshold that does not exist; Hydra's own message would suggest appending it.

    Raises:
        TypeError: An override of ``refine`` is not a field of `RefineConfig`.
    """
    known = {field.name for field in fields(RefineConfig)}
    for argument in arguments:
        key = _KEY.match(argument)
        if key is not None and key[1] not in known:
            raise TypeError(f"refine.{key[1]}: {unknown_fields([key[1]])}")


def _option(name: str) -> str:
    if not is_refine_file(name):
        return name
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    values = refine_to_mapping(read_refine(name))
    # Sweeps may name files of one stem in several folders.
    taken = [str(option) for option in store.repo.get("refine", {}).get("file", {})]
    stem = Path(name).stem
    option = stem if f"{stem}.yaml" not in taken else f"{stem}_{len(taken)}"
    store.store(group="refine/file", name=option, node=values, provider="samrefine")
    return f"file/{option}"
