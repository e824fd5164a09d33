"""The arguments that the callbacks share, checked before any work is done."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_samrefine.adapters.batch_adapter import AdapterFunction, BatchAdapter
from lightning_samrefine.adapters.denormalize import Denormalize
from lightning_samrefine.adapters.layouts.padding import Padding
from lightning_samrefine.adapters.layouts.volumes import checked_axis
from lightning_samrefine.adapters.scores import ScoresKind
from lightning_samrefine.config import PRESETS, RefineConfig
from lightning_samrefine.config_files import is_refine_file, read_refine, refine_from_mapping
from lightning_samrefine.fusion_weights import FusionWeights
from lightning_samrefine.models import SAM_NAMES, Promptable
from lightning_samrefine.models.registry import HF
from lightning_samrefine.utils.precision import PRECISIONS
from lightning_samrefine.utils.validation import as_integer, check_count

if TYPE_CHECKING:
    from lightning_samrefine.callbacks.refine_callback import SAMRefineCallback

Thresholds = Mapping[str, Any] | RefineConfig | str | Path
"""What `parse_refine` reads."""

AnyCallback = TypeVar("AnyCallback", bound=Callback)


@dataclass(frozen=True)
class SharedArguments:
    """SAM, the classes, and how a user's batches are read: arguments of every callback.

    Attributes:
        sam: A name for `load_sam`, or a `Promptable`.
        checkpoint: The weights of a named SAM, see `load_sam`.
        num_classes: C, None until the module's is known.
        class_names: C names, or None.
        refine: The thresholds.
        precision: SAM's autocast, see `Refiner`.
        adapter: Reads batches; its number of classes is not set yet.
        group_key: Where the names of the images' groups are in the batch, None for no groups.
    """

    sam: str | Promptable
    checkpoint: str | Path | None
    num_classes: int | None
    class_names: list[str] | None
    refine: RefineConfig
    precision: str
    adapter: BatchAdapter
    group_key: str | None = None

    @classmethod
    def of(
        cls,
        *,
        sam: str | Promptable,
        checkpoint: str | Path | None = None,
        num_classes: int | None = None,
        class_names: Sequence[str] | None = None,
        refine: Thresholds = "auto",
        precision: str = "auto",
        image_key: str | None = None,
        scores_key: str | None = None,
        scores_kind: ScoresKind = "auto",
        image_mean: Sequence[float] | float | None = None,
        image_std: Sequence[float] | float | None = None,
        image_range: Literal["0-255", "0-1"] | None = None,
        image_channels: Sequence[int] | None = None,
        image_stretch: tuple[float, float] | None = None,
        padding_key: str | Literal[False] | None = None,
        slice_axis: int = 2,
        adapter: AdapterFunction | None = None,
        target_key: str | None = None,
        group_key: str | None = None,
        needs_target: bool = True,
    ) -> SharedArguments:
        """Check and convert the arguments of a callback's constructor.

        Raises:
            TypeError: An argument of a wrong type.
            ValueError: An argument outside its range, or weights fitted with another SAM.
            MisconfigurationException: A number of classes that contradicts the names.
        """
        check_sam(sam, checkpoint, precision)
        names = parse_class_names(class_names)
        config = _of_overlapping(parse_refine(refine), scores_kind)
        if isinstance(config.weights, FusionWeights) and sam != HF:
            config.weights.check_sam(sam if isinstance(sam, str) else sam.name)
        num_classes = parse_num_classes(num_classes, names)
        if names is None and config.class_names is not None:
            names = parse_class_names(config.class_names)
            rank_zero_info(f"class_names are those of refine: {', '.join(config.class_names)}")
        if group_key is not None and not isinstance(group_key, str):
            raise TypeError(
                f"group_key must be a string such as 'scene' or None, got {group_key!r}"
            )
        return cls(
            sam=sam,
            checkpoint=checkpoint,
            num_classes=num_classes,
            class_names=names,
            refine=config,
            precision=precision,
            adapter=BatchAdapter(
                image_key=image_key,
                target_key=target_key,
                scores_key=scores_key,
                scores_kind=scores_kind,
                rgb=Denormalize(image_mean, image_std, image_range, image_channels, image_stretch),
                padding=Padding(padding_key),
                slice_axis=checked_axis(slice_axis),
                function=adapter,
                needs_target=needs_target,
            ),
            group_key=group_key,
        )


def _of_overlapping(refine: RefineConfig, scores_kind: ScoresKind) -> RefineConfig:
    """Return the thresholds of binary maps if classes overlap: there is no fit for these.

    Raises:
        ValueError: Thresholds of single classes, or fitted weights.
    """
    if scores_kind != "multilabel":
        return refine
    if refine.weights == "auto":
        refine = replace(refine, weights=None)
    for name in ("classes", "class_pred_iou_thresh", "class_names", "weights"):
        if getattr(refine, name) is not None:
            raise ValueError(
                f"refine: {name} must be None with scores_kind='multilabel', which refines every "
                f"class as a binary map of its own, got {getattr(refine, name)!r}"
            )
    return refine


def check_sam(sam: Any, checkpoint: Any, precision: Any) -> None:
    """Refuse anything but a SAM, a checkpoint beside a loaded SAM, and an unknown precision.

    Raises:
        TypeError: Neither a name nor a `Promptable`.
        ValueError: An unknown name or precision, or a checkpoint beside a loaded model.
    """
    if not isinstance(sam, str | Promptable):
        raise TypeError(
            f"sam must be a name for load_sam or a Promptable, got {type(sam).__name__}"
        )
    if isinstance(sam, str) and sam not in SAM_NAMES:
        raise ValueError(
            f"sam must be {', '.join(map(repr, SAM_NAMES))} or a Promptable, got {sam!r}"
        )
    if not isinstance(sam, str) and checkpoint is not None:
        raise ValueError(f"checkpoint must be None beside a loaded model, got {checkpoint!r}")
    if precision not in PRECISIONS:
        raise ValueError(
            f"precision must be one of {', '.join(map(repr, PRECISIONS))}, got {precision!r}"
        )


def check_trainer(owner: str, trainer: Trainer) -> None:
    """Refuse a Trainer of the package pytorch_lightning.

    That package is a copy of `lightning.pytorch` with classes of its own: its Trainer accepts
    callbacks of `lightning.pytorch`, which do not recognize its loggers and states.

    Raises:
        MisconfigurationException: The Trainer's class, or a base class of it, comes from
            pytorch_lightning.
    """
    if any(base.__module__.startswith("pytorch_lightning.") for base in type(trainer).__mro__):
        raise MisconfigurationException(
            f"{owner}: the Trainer must be that of lightning.pytorch, got pytorch_lightning's; "
            "replace `import pytorch_lightning as pl` by `import lightning.pytorch as pl` and "
            "`from pytorch_lightning` by `from lightning.pytorch`, for the LightningModule as well"
        )


def callbacks_of(trainer: Trainer, kind: type[AnyCallback]) -> list[AnyCallback]:
    """Return a Trainer's callbacks of one class, in its order."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
    return [callback for callback in callbacks if isinstance(callback, kind)]


def check_different(callbacks: Sequence[SAMRefineCallback]) -> None:
    """Refuse callbacks of one Trainer that would overwrite each other's figures, panels or report.

    Raises:
        MisconfigurationException: Two of one name, or with one report.
    """
    # Some file systems treat upper and lower case as equal.
    names = [None if part.name is None else part.name.casefold() for part in callbacks]
    for part, name in zip(callbacks, names, strict=True):
        if names.count(name) > 1:
            raise MisconfigurationException(
                f"SAMRefineCallback: name must differ between the {len(callbacks)} callbacks of "
                f"one Trainer, got {part.name!r} more than once; figures are logged under it, as "
                "in SAMRefineCallback(name='fast')"
            )
    reports = [part.presenter.report for part in callbacks]
    for report in reports:
        if isinstance(report, Path) and reports.count(report) > 1:
            raise MisconfigurationException(
                f"SAMRefineCallback: report must differ between the callbacks of one Trainer, got "
                f"{str(report)!r} more than once"
            )


def fitted_config(trainer: Trainer, config: RefineConfig) -> RefineConfig:
    """Return a configuration with the weights that one of a Trainer's callbacks has fitted.

    Raises:
        MisconfigurationException: Several callbacks have fitted weights.
    """
    from lightning_samrefine.callbacks.refine_callback import SAMRefineCallback

    callbacks = callbacks_of(trainer, SAMRefineCallback)
    configs = [(part.name, part.fitted_config) for part in callbacks]
    fitted = {name: own.weights for name, own in configs if own is not None}
    if len(fitted) > 1:
        raise MisconfigurationException(
            "SAMRefineWriter: refine must be a file such as fitted.yaml if several callbacks have "
            f"fitted weights, got 'auto' beside those named {', '.join(map(repr, fitted))}"
        )
    if not fitted:
        rank_zero_info(
            "SAMRefineWriter: without fitted weights refine='auto' refines as 'fast' does; weights "
            "come from a validation with SAMRefineCallback, or from refine='fitted.yaml'"
        )
    return replace(config, weights=next(iter(fitted.values()), None))


def parse_refine(refine: Thresholds) -> RefineConfig:
    """Read thresholds: a config, a preset's name, a YAML file, or fields that replace a preset's.

    Args:
        refine: The key ``"preset"`` of a mapping is the preset's name, ``"auto"`` without the
            key. A string that ends in ``.yaml`` or ``.yml`` is a path, see `read_refine`.

    Raises:
        TypeError: Another type, or an unknown field.
        ValueError: An unknown preset, a value outside its range, or a file without a mapping.
        FileNotFoundError: No file at that path.
    """
    if isinstance(refine, RefineConfig):
        return refine
    if isinstance(refine, Path):
        return read_refine(refine)
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
        "refine must be a RefineConfig, a preset's name, the path of a .yaml file, or a mapping of "
        f"RefineConfig's fields, got {type(refine).__name__}"
    )


def parse_patterns(argument: str, patterns: Sequence[str] | str) -> tuple[str, ...]:
    """Return names and glob patterns of figures; ``"all"`` is every figure.

    Args:
        argument: Its name, for the error.
        patterns: As the user gave them.

    Raises:
        TypeError: Neither ``"all"`` nor a sequence of strings.
    """
    if patterns == "all":
        return ("*",)
    several = isinstance(patterns, Sequence) and not isinstance(patterns, str)
    if not several or not all(isinstance(one, str) for one in patterns):
        raise TypeError(
            f"{argument} must be 'all' or a sequence of names and patterns of figures, such as "
            f"['miou_*', 'iou_refined/*'], got {patterns!r}"
        )
    return tuple(patterns)


def parse_class_names(class_names: Sequence[str] | None) -> list[str] | None:
    """Return the names as a list.

    Raises:
        TypeError: Not a sequence of strings.
        ValueError: Two equal names: their figures could not be distinguished.
    """
    if class_names is None:
        return None
    names = list(class_names)
    if isinstance(class_names, str) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"class_names must be a sequence of strings, got {class_names!r}")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"class_names must differ, got {', '.join(twice)} more than once")
    return names


def parse_name(name: str | None) -> str | None:
    """Return the name; refuse one that a logger or a file system would change.

    Raises:
        TypeError: Not a string.
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
    """Return the number of classes, or the number of names if it is None; None without either.

    Raises:
        TypeError: Not an integer.
        MisconfigurationException: Below 2, or different from the number of names.
    """
    if num_classes is None:
        num_classes = None if class_names is None else len(class_names)
    if num_classes is None:
        return None
    num_classes = check_count("num_classes", num_classes)
    if num_classes < 2:
        raise MisconfigurationException(
            "num_classes must be at least 2, got 1: a one-channel binary model has 2 classes, "
            "background and foreground"
        )
    if class_names is not None and len(class_names) != num_classes:
        raise MisconfigurationException(
            f"class_names must be num_classes={num_classes} names, got {len(class_names)}"
        )
    return num_classes


def num_classes_of(pl_module: LightningModule) -> int:
    """Return a module's number of classes; a binary model's 1 means 2 classes.

    Raises:
        MisconfigurationException: The module has no such attribute or hyperparameter.
    """
    for owner in (pl_module, pl_module.hparams):
        value = as_integer(getattr(owner, "num_classes", None))
        if value is not None and value >= 1:
            return max(value, 2)
    raise MisconfigurationException(
        f"num_classes must be given where the module has none, got None, and "
        f"{type(pl_module).__name__} has neither num_classes nor hparams.num_classes; set "
        "SAMRefineCallback(num_classes=…) to the number of classes"
    )
