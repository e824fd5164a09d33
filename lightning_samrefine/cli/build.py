"""Builds the parts of a run from a composed config: data, segmenter, callbacks and Trainer."""

from __future__ import annotations

from dataclasses import fields
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict

from lightning_samrefine.cli.setup_errors import SetupError
from lightning_samrefine.config import RefineConfig

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningDataModule, Trainer
    from lightning.pytorch.loggers import Logger

    from lightning_samrefine.refine.cache.embedding_cache import EmbeddingCache
    from lightning_samrefine.tune.settings import Grid, Rule

# Taken from the data module if the config has null.
INHERITED = (
    "num_classes", "class_names", "ignore_index",
    "image_mean", "image_std", "image_range", "image_channels", "image_stretch",
)  # fmt: skip

# Arguments of `SAMRefineCallback` that `TuneCallback` does not have.
_OF_AN_EVALUATION = (
    "add_to_outputs",
    "every_n_epochs",
    "log",
    "metrics",
    "name",
    "panels",
    "panels_every_n_epochs",
    "panels_width",
    "prog_bar",
    "report",
)


def refine_config(cfg: DictConfig) -> RefineConfig:
    """Return the thresholds of a config.

    Raises:
        SetupError: An unknown threshold, or a value outside its range.
    """
    try:
        return RefineConfig.preset("algorithm4", **_plain(cfg.refine))
    except (TypeError, ValueError) as error:
        raise SetupError(f"refine: {error}") from error


def _plain(node: DictConfig) -> dict[str, Any]:
    """Return a node as a dict, its interpolations resolved."""
    return cast("dict[str, Any]", OmegaConf.to_container(node, resolve=True))


def tune_settings(cfg: DictConfig) -> tuple[Grid, Rule]:
    """Return the grid and the rule of a tuning.

    Raises:
        SetupError: A value of a wrong type or outside its range.
    """
    from lightning_samrefine.tune.settings import Grid, Rule

    values = _plain(cfg.tune)
    grid = {field.name: values.pop(field.name) for field in fields(Grid) if field.name in values}
    try:
        return Grid(**grid), Rule(**values)
    except (TypeError, ValueError) as error:
        raise SetupError(f"tune: {error}") from error


def use_tune_callback(cfg: DictConfig) -> None:
    """Make the node ``callback`` that of a tuning, without what only an evaluation has."""
    cfg.callback._target_ = "lightning_samrefine.tune.callback.TuneCallback"
    with open_dict(cfg.callback):
        for key in _OF_AN_EVALUATION:
            cfg.callback.pop(key, None)


def build(cfg: DictConfig, key: str, **objects: Any) -> Any:
    """Instantiate the node under a key, with further arguments that Hydra does not copy.

    Raises:
        SetupError: The constructor refuses its arguments.
    """
    try:
        return instantiate(OmegaConf.select(cfg, key), _partial_=True)(**objects)
    except InstantiationException as error:
        raise SetupError(f"{key}: {error.__cause__ or error}") from error
    except (TypeError, ValueError, OSError, ImportError) as error:
        raise SetupError(f"{key}: {error}") from error


def inherit(node: DictConfig, datamodule: LightningDataModule) -> None:
    """Fill a node's null values from the data module; others keep the constructor's default."""
    with open_dict(node):
        for key in INHERITED:
            if key not in node or node[key] is not None:
                continue
            if hasattr(datamodule, key):
                value = getattr(datamodule, key)
                node[key] = value.tolist() if hasattr(value, "tolist") else value
            else:
                del node[key]


def build_trainer(cfg: DictConfig, refine: RefineConfig) -> Trainer:
    """Instantiate the Trainer with its callbacks and loggers, our callback first.

    Raises:
        SetupError: A part cannot be built.
    """
    from lightning.pytorch.callbacks import ProgressBar, RichProgressBar

    sam = sam_arguments(cfg)
    if cfg.task == "predict":
        first = build(cfg, "writer", refine=refine, **sam)
    else:
        first = build(cfg, "callback", refine=refine, **sam, **_kept_embeddings(cfg))
    callbacks: list[Callback] = [first]
    callbacks += [build(cfg, f"extra_callbacks.{name}") for name in cfg.extra_callbacks]
    if cfg.trainer.get("enable_progress_bar", True) and not any(
        isinstance(callback, ProgressBar) for callback in callbacks
    ):
        callbacks.append(RichProgressBar())
    loggers: list[Logger] = [build(cfg, f"logger.{name}") for name in cfg.logger]
    return build(cfg, "trainer", callbacks=callbacks, logger=loggers)


def sam_arguments(cfg: DictConfig) -> dict[str, Any]:
    """Return the arguments ``sam`` and ``checkpoint`` of the callbacks."""
    if "_target_" in cfg.sam:
        return {"sam": build(cfg, "sam"), "checkpoint": None}
    checkpoint = cfg.sam.model if "model" in cfg.sam else cfg.sam.checkpoint
    return {"sam": cfg.sam.name, "checkpoint": checkpoint}


def _kept_embeddings(cfg: DictConfig) -> dict[str, Any]:
    """Keep embeddings in memory for the jobs of a sweep, and for the passes of a tuning."""
    cache, is_tuning = cfg.callback.get("cache"), cfg.task == "tune"
    if (cache == "memory" and (is_tuning or _is_sweep())) or (cache is None and is_tuning):
        return {"cache": _cache_of_process(cfg.callback.get("cache_gb")), "cache_gb": None}
    return {}


def _is_sweep() -> bool:
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


@lru_cache(maxsize=1)
def _cache_of_process(gb: float | None) -> EmbeddingCache:
    from lightning_samrefine.refine.cache.embedding_cache import EmbeddingCache

    return EmbeddingCache("memory", gb)
