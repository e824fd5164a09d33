"""The `samrefine` command: a Hydra app that builds a run, runs it and reports its figures."""

from __future__ import annotations

import copy
import logging
import os
import re
import sys
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict

from lightning_samrefine.cli.setup_errors import SetupError, explain
from lightning_samrefine.config import RefineConfig
from lightning_samrefine.config_files import check_refine_keys, with_refine_files

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
    from lightning.pytorch.loggers import Logger

    from lightning_samrefine.refine.cache.embedding_cache import EmbeddingCache
    from lightning_samrefine.tune.settings import TuneSettings

# torch and Lightning are imported where they are needed: `samrefine --help` works without them.

TASKS = ("validate", "test", "fit", "tune", "predict", "check")

# Taken from the data module where the config has null.
INHERITED = ("num_classes", "class_names", "ignore_index", "image_mean", "image_std", "image_range")

# Arguments of `SAMRefineCallback` that `TuneCallback` does not have.
_OF_AN_EVALUATION = (
    "every_n_epochs",
    "name",
    "panels",
    "panels_every_n_epochs",
    "panels_width",
    "report",
)

_FOLDER_MARK = "<output_dir>"

_SPLITS = ("train", "val", "test", "predict")
# Paths of what a run reads and writes, relative to where the command was started.
_INPUTS = (
    "ckpt_path",
    "sam.checkpoint",
    "sam.model",
    "segmenter.checkpoint",
    "data.root",
    *(
        f"data.{name}.{key}"
        for name in _SPLITS
        for key in ("images", "labels", "predictions", "stems")
    ),
)
_OUTPUTS = ("output_dir", "writer.folder", "callback.report")


def config_dir() -> Path:
    """Return the folder of the YAML files: inside the package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def run(cfg: DictConfig) -> float | None:
    """Build the run that a composed config describes, run it and report it.

    Writes ``metrics.json`` and ``config.yaml``, resolved but for the output folder, to
    ``cfg.output_dir``, ``curve.png`` too where more than one epoch was validated, and prints the
    table. ``task=predict`` writes predictions instead, see `SAMRefineWriter`.

    Args:
        cfg: ``configs/samrefine.yaml`` with its groups. Values that the data module supplies are
            filled in.

    Returns:
        Refined mIoU in [0, 1], for sweepers: that of the validation set, or of the test set with
        ``task=test``. ``None`` where refinement was skipped, and with ``task=predict`` and
        ``task=check``, which exits with status 1 where `lightning_samrefine.check` fails. With
        ``task=tune`` what was written, see `lightning_samrefine.tune`, and the refined mIoU of the
        validation set with it.

    Raises:
        SetupError: The config cannot be built.
        MisconfigurationException, ValueError, FileNotFoundError: As the parts raise them.
    """
    _use_original_cwd(cfg)
    _check_config(cfg)
    refine = _refine_config(cfg)
    if cfg.task == "check":
        _check_machine(cfg, refine)
        return None
    tuning = _tune_settings(cfg) if cfg.task == "tune" else None

    from lightning.pytorch import seed_everything

    from lightning_samrefine.reporting.summary import print_summary, refined_miou, write_metrics

    _log_lightning_once()
    if cfg.seed is not None:
        seed_everything(cfg.seed, workers=True, verbose=False)
    if tuning is not None:
        _use_tune_callback(cfg, tuning.callback)
    datamodule = _build(cfg, "data")
    _check_segmenter(cfg, datamodule)
    for key in ("segmenter", "callback", "writer"):
        _inherit(cfg[key], datamodule)
    segmenter = _build(cfg, "segmenter")
    trainer = _build_trainer(cfg, refine)

    folder = Path(cfg.output_dir)
    if trainer.is_global_zero:
        folder.mkdir(parents=True, exist_ok=True)
        _save_config(cfg, folder / "config.yaml")
    if cfg.task == "predict":
        trainer.predict(
            segmenter, datamodule=datamodule, ckpt_path=cfg.ckpt_path, return_predictions=False
        )
        return None
    if tuning is not None:
        return tuning.run(trainer, segmenter, datamodule, cfg.ckpt_path, folder)
    metrics = _execute(cfg.task, trainer, segmenter, datamodule, cfg.ckpt_path)
    if trainer.is_global_zero:
        write_metrics(metrics, folder / "metrics.json")
        _write_curve(trainer, folder / "curve.png")
        print_summary(metrics, folder)
    stage = "test" if cfg.task == "test" else "val"
    name = cfg.callback.get("name")
    return refined_miou(metrics, stage if name is None else f"{stage}/{name}")


def _job(cfg: DictConfig) -> float | None:
    # A console script does not have the current folder on its path, where a user's own
    # segmenter.py lies; last, so that it hides no installed package.
    if str(_original_cwd()) not in sys.path:
        sys.path.append(str(_original_cwd()))
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        return run(cfg)
    try:
        return run(cfg)
    except Exception as error:
        sentence = explain(error)
        if sentence is None:
            raise
        if re.match(r"checkpoint(:| must) ", sentence):  # of `load_sam`; the command has two keys
            key = "model" if "model" in cfg.sam else "checkpoint"
            sentence = f"sam.{key}{sentence.removeprefix('checkpoint')}"
        sys.exit(f"samrefine: {sentence}\n(HYDRA_FULL_ERROR=1 shows where)")


_app = hydra.main(version_base="1.3", config_path=str(config_dir()), config_name="samrefine")(_job)


def main() -> None:
    """Run the command; ``refine=PATH.yaml`` is allowed beside Hydra's own grammar."""
    try:
        check_refine_keys(sys.argv[1:])
        sys.argv[1:] = with_refine_files(sys.argv[1:])
    except (OSError, TypeError, ValueError) as error:
        sys.exit(f"samrefine: {error}")
    _app()


def _log_lightning_once() -> None:
    # Lightning's own handler would repeat every line that Hydra's root logger prints and files.
    if logging.getLogger().hasHandlers():
        logging.getLogger("lightning").handlers.clear()


def _check_config(cfg: DictConfig) -> None:
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        example = f"{missing[0]}=VALUE"
        raise SetupError(f"No value for {', '.join(missing)}; give it as in: samrefine {example}")
    if cfg.task not in TASKS:
        raise SetupError(f"task must be one of {', '.join(TASKS)}, got {cfg.task!r}")
    if cfg.ckpt_path is not None and not Path(cfg.ckpt_path).is_file():
        path = Path(cfg.ckpt_path).absolute()
        raise SetupError(f"ckpt_path must be a file, got {path}, where there is none")


def _original_cwd() -> Path:
    """Return where the command was started: ``hydra.job.chdir`` may have left it."""
    return Path(HydraConfig.get().runtime.cwd if HydraConfig.initialized() else Path.cwd())


def _use_original_cwd(cfg: DictConfig) -> None:
    """Make relative paths absolute where ``hydra.job.chdir`` has left the folder of their start."""
    if not HydraConfig.initialized() or not HydraConfig.get().job.chdir:
        return
    start = _original_cwd()
    for key in (*_INPUTS, *_OUTPUTS):
        value = OmegaConf.select(cfg, key, throw_on_missing=False)
        if not isinstance(value, str) or Path(value).is_absolute():
            continue
        # A checkpoint may be a word, and a model an id.
        if not key.startswith("sam.") or (start / value).exists():
            OmegaConf.update(cfg, key, str(start / value))


def _check_segmenter(cfg: DictConfig, datamodule: LightningDataModule) -> None:
    """Refuse a network that the data are not for, and one beside predictions it would ignore."""
    target = cfg.segmenter._target_
    if target == "lightning_samrefine.demo.segmenter.SmallSegmenter":
        from lightning_samrefine.demo.datamodule import ScenesDataModule

        if not isinstance(datamodule, ScenesDataModule):
            raise SetupError(
                "segmenter must be stored (for data=folder with predictions), torchvision or "
                f"custom with {type(datamodule).__name__}, got small, which is for scenes alone"
            )
    if target == "lightning_samrefine.segmenters.TorchvisionSegmenter":
        keys = [f"data.{name}.predictions" for name in _SPLITS]
        given = [key for key in keys if OmegaConf.select(cfg, key) is not None]
        if given:
            raise SetupError(
                f"segmenter must be stored where predictions are given ({', '.join(given)}), got "
                "torchvision, which predicts itself: leave out one of the two"
            )


def _refine_config(cfg: DictConfig) -> RefineConfig:
    try:
        return RefineConfig.preset("algorithm4", **_plain(cfg.refine))
    except (TypeError, ValueError) as error:
        raise SetupError(f"refine: {error}") from error


def _plain(node: DictConfig) -> dict[str, Any]:
    """Return a node as a dict, its interpolations resolved."""
    return cast("dict[str, Any]", OmegaConf.to_container(node, resolve=True))


def _tune_settings(cfg: DictConfig) -> TuneSettings:
    from lightning_samrefine.tune.settings import TuneSettings

    try:
        return TuneSettings(**_plain(cfg.tune))
    except (TypeError, ValueError) as error:
        raise SetupError(f"tune: {error}") from error


def _use_tune_callback(cfg: DictConfig, target: str) -> None:
    """Make the node ``callback`` that of a tuning, without what only an evaluation has."""
    cfg.callback._target_ = target
    with open_dict(cfg.callback):
        for key in _OF_AN_EVALUATION:
            cfg.callback.pop(key, None)


def _build(cfg: DictConfig, key: str, **objects: Any) -> Any:
    """Instantiate one node; ``objects`` reach the constructor without Hydra copying them."""
    try:
        return instantiate(OmegaConf.select(cfg, key), _partial_=True)(**objects)
    except InstantiationException as error:
        raise SetupError(f"{key}: {error.__cause__ or error}") from error
    except (TypeError, ValueError, OSError, ImportError) as error:
        raise SetupError(f"{key}: {error}") from error


def _inherit(node: DictConfig, datamodule: LightningDataModule) -> None:
    """Fill a node's null values from the data module; what that lacks keeps its own default."""
    with open_dict(node):
        for key in INHERITED:
            if key not in node or node[key] is not None:
                continue
            if hasattr(datamodule, key):
                value = getattr(datamodule, key)
                node[key] = value.tolist() if hasattr(value, "tolist") else value
            else:
                del node[key]


def _save_config(cfg: DictConfig, path: Path) -> None:
    """Save all values resolved but the output folder, so that a second run gets its own."""
    resolved = copy.deepcopy(cfg)
    resolved.output_dir = _FOLDER_MARK
    text = OmegaConf.to_yaml(resolved, resolve=True).replace(_FOLDER_MARK, "${output_dir}")
    saved = OmegaConf.create(text)
    OmegaConf.update(
        saved, "output_dir", cast("dict[str, Any]", OmegaConf.to_container(cfg))["output_dir"]
    )
    OmegaConf.save(saved, path)


def _build_trainer(cfg: DictConfig, refine: RefineConfig) -> Trainer:
    from lightning.pytorch.callbacks import ProgressBar, RichProgressBar

    sam = _sam(cfg)
    if cfg.task == "predict":
        first = _build(cfg, "writer", refine=refine, **sam)
    else:
        first = _build(cfg, "callback", refine=refine, **sam, **_kept_embeddings(cfg))
    callbacks: list[Callback] = [first]
    callbacks += [_build(cfg, f"extra_callbacks.{name}") for name in cfg.extra_callbacks]
    if cfg.trainer.get("enable_progress_bar", True) and not any(
        isinstance(callback, ProgressBar) for callback in callbacks
    ):
        callbacks.append(RichProgressBar())
    loggers: list[Logger] = [_build(cfg, f"logger.{name}") for name in cfg.logger]
    return _build(cfg, "trainer", callbacks=callbacks, logger=loggers)


def _sam(cfg: DictConfig) -> dict[str, Any]:
    """Return the arguments that name SAM, or hold it."""
    if "_target_" in cfg.sam:
        return {"sam": _build(cfg, "sam"), "checkpoint": None}
    checkpoint = cfg.sam.model if "model" in cfg.sam else cfg.sam.checkpoint
    return {"sam": cfg.sam.name, "checkpoint": checkpoint}


def _check_machine(cfg: DictConfig, refine: RefineConfig) -> None:
    """Print what `lightning_samrefine.check` finds, and exit with status 1 where it fails."""
    import torch

    from lightning_samrefine import check

    accelerator = cfg.trainer.get("accelerator", "auto")
    if accelerator == "gpu":
        accelerator = "mps" if torch.backends.mps.is_available() else "cuda"
    device = None if accelerator == "auto" else accelerator
    precision = cfg.callback.get("precision", "auto")
    result = check(**_sam(cfg), refine=refine, precision=precision, device=device)
    print(result)
    if not result.passed:
        sys.exit(1)


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


def _execute(
    task: str,
    trainer: Trainer,
    segmenter: LightningModule,
    datamodule: LightningDataModule,
    ckpt_path: str | None,
) -> dict[str, float]:
    from lightning_samrefine.reporting.summary import logged_metrics

    if task != "fit":
        evaluate = trainer.validate if task == "validate" else trainer.test
        evaluate(segmenter, datamodule=datamodule, ckpt_path=ckpt_path, verbose=False)
        return logged_metrics(trainer)

    trainer.fit(segmenter, datamodule=datamodule, ckpt_path=ckpt_path)
    metrics = logged_metrics(trainer)
    if _can_test(segmenter, datamodule):
        checkpoints = trainer.checkpoint_callback
        best = getattr(checkpoints, "monitor", None) and getattr(checkpoints, "best_model_path", "")
        trainer.test(segmenter, datamodule=datamodule, ckpt_path=best or None, verbose=False)
        metrics |= logged_metrics(trainer)
    return metrics


def _write_curve(trainer: Trainer, path: Path) -> None:
    """Draw raw against refined over the validations of each callback, if more than one."""
    from lightning_samrefine import SAMRefineCallback

    callbacks = (part for part in trainer.callbacks if isinstance(part, SAMRefineCallback))
    for callback in callbacks:
        epochs = [figures for figures in callback.history if figures["stage"] == "val"]
        first_loader = [figures for figures in epochs if figures["dataloader_idx"] == 0]
        if len(first_loader) > 1:
            from lightning_samrefine.reporting.curves import draw_curve
            from lightning_samrefine.reporting.panels import save_figure

            name = path.name if callback.name is None else f"{callback.name}_{path.name}"
            save_figure(draw_curve(first_loader), path.with_name(name))


def _can_test(segmenter: LightningModule, datamodule: LightningDataModule) -> bool:
    from lightning.pytorch.utilities.model_helpers import is_overridden

    if not is_overridden("test_step", segmenter):
        return False
    has_split = getattr(datamodule, "has_split", None)
    if has_split is not None:
        return has_split("test")
    return is_overridden("test_dataloader", datamodule)


if __name__ == "__main__":
    main()
