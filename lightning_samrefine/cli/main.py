"""The `samrefine` command: a Hydra app that builds a run, runs it and reports its figures."""

from __future__ import annotations

import copy
import logging
import math
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from lightning_samrefine.cli.build import (
    build,
    build_trainer,
    inherit,
    refine_config,
    sam_arguments,
    tune_settings,
    use_tune_callback,
)
from lightning_samrefine.cli.setup_errors import SetupError, explain
from lightning_samrefine.config import RefineConfig
from lightning_samrefine.config_files import check_refine_keys, with_refine_files

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule, LightningModule, Trainer

    from lightning_samrefine import SAMRefineCallback
    from lightning_samrefine.tune.settings import Grid, Rule

# torch and Lightning are imported where they are needed: `samrefine --help` works without them.

TASKS = ("validate", "test", "fit", "tune", "predict", "check")

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
    ``cfg.output_dir``, ``curve.png`` too if more than one epoch was validated and
    ``fitted.yaml`` if ``refine=auto`` fitted weights, and prints the table. ``task=predict``
    writes predictions instead, see `SAMRefineWriter`.

    Args:
        cfg: ``configs/samrefine.yaml`` with its groups. Values that the data module supplies are
            filled in.

    Returns:
        Refined mIoU in [0, 1], for sweepers: that of the validation set, or of the test set with
        ``task=test``. ``None`` if refinement was skipped, and with ``task=predict`` and
        ``task=check``, which exits with status 1 if `lightning_samrefine.check` fails. With
        ``task=tune`` what was written, see `lightning_samrefine.tune`, and the refined mIoU of the
        validation set with it.

    Raises:
        SetupError: The config cannot be built.
        MisconfigurationException, ValueError, FileNotFoundError: As the parts raise them.
    """
    _use_original_cwd(cfg)
    _check_config(cfg)
    refine = refine_config(cfg)
    if cfg.task == "check":
        _check_machine(cfg, refine)
        return None
    tuning = tune_settings(cfg) if cfg.task == "tune" else None

    from lightning.pytorch import seed_everything

    from lightning_samrefine.reporting.summary import (
        print_whole,
        refined_miou,
        summary,
        write_metrics,
    )

    _log_lightning_once()
    if cfg.seed is not None:
        seed_everything(cfg.seed, workers=True, verbose=False)
    if tuning is not None:
        use_tune_callback(cfg)
    datamodule = build(cfg, "data")
    _check_segmenter(cfg, datamodule)
    for key in ("segmenter", "callback", "writer"):
        inherit(cfg[key], datamodule)
    segmenter = build(cfg, "segmenter")
    trainer = build_trainer(cfg, refine)

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
        return _tune(cfg, trainer, segmenter, datamodule, *tuning)
    metrics = _execute(cfg.task, trainer, segmenter, datamodule, cfg.ckpt_path)
    if trainer.is_global_zero:
        write_metrics(metrics, folder / "metrics.json")
        _write_curve(trainer, folder / "curve.png")
        _write_fitted(trainer, folder)
        print_whole(summary(metrics, folder))
    stage = "test" if cfg.task == "test" else "val"
    name = cfg.callback.get("name")
    return refined_miou(metrics, stage if name is None else f"{stage}/{name}")


def _job(cfg: DictConfig) -> float | None:
    # A console script does not have the current folder on its path, where a user's own
    # segmenter.py lies; last, so that it hides no installed package.
    if str(_original_cwd()) not in sys.path:
        sys.path.append(str(_original_cwd()))
    try:
        return run(cfg)
    except Exception as error:
        sentence = explain(error)
        if sentence is None or os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        if re.match(r"checkpoint(:| must) ", sentence):  # of `load_sam`; the command has two keys
            key = "model" if "model" in cfg.sam else "checkpoint"
            sentence = f"sam.{key}{sentence.removeprefix('checkpoint')}"
        sys.exit(f"samrefine: {sentence}\n(HYDRA_FULL_ERROR=1 shows where)")
    finally:
        _finish_wandb()


def _finish_wandb() -> None:
    """End W&B's run: the logger of a sweep's next job would go on with it."""
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.finish()


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
        raise SetupError(f"{', '.join(missing)} must be set, as in: samrefine {example}; got none")
    if cfg.task not in TASKS:
        raise SetupError(f"task must be one of {', '.join(TASKS)}, got {cfg.task!r}")
    if cfg.ckpt_path is not None and not Path(cfg.ckpt_path).is_file():
        path = Path(cfg.ckpt_path).absolute()
        raise SetupError(f"ckpt_path must be a file, got {path}, where there is none")


def _original_cwd() -> Path:
    """Return the folder in which the command was started: ``hydra.job.chdir`` may have left it."""
    return Path(HydraConfig.get().runtime.cwd if HydraConfig.initialized() else Path.cwd())


def _use_original_cwd(cfg: DictConfig) -> None:
    """Make relative paths absolute if ``hydra.job.chdir`` has left the folder of their start."""
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
    """Refuse the network of the scenes on other data, and a network beside stored predictions."""
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
                f"segmenter must be stored if predictions are given ({', '.join(given)}), got "
                "torchvision, which predicts itself: leave out one of the two"
            )


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


def _check_machine(cfg: DictConfig, refine: RefineConfig) -> None:
    """Print what `lightning_samrefine.check` finds, and exit with status 1 if it fails."""
    import torch

    from lightning_samrefine import check

    accelerator = cfg.trainer.get("accelerator", "auto")
    if accelerator == "gpu":
        accelerator = "mps" if torch.backends.mps.is_available() else "cuda"
    device = None if accelerator == "auto" else accelerator
    precision = cfg.callback.get("precision", "auto")
    result = check(**sam_arguments(cfg), refine=refine, precision=precision, device=device)
    print(result)
    if not result.passed:
        sys.exit(1)


def _tune(
    cfg: DictConfig,
    trainer: Trainer,
    segmenter: LightningModule,
    datamodule: LightningDataModule,
    grid: Grid,
    rule: Rule,
) -> float | None:
    """Tune, write the files and print the result.

    Returns:
        mIoU of the validation set, refined with the choice; None without a scored pixel.
    """
    from lightning_samrefine.reporting.summary import print_whole, write_metrics
    from lightning_samrefine.tune.report import tuning_metrics, tuning_summary, write_tuning
    from lightning_samrefine.tune.task import tune

    folder = Path(cfg.output_dir)
    tuning = tune(trainer, segmenter, datamodule, grid, rule, cfg.ckpt_path)
    metrics = tuning_metrics(tuning)
    write_tuning(tuning, folder)
    write_metrics(metrics, folder / "metrics.json")
    print_whole(tuning_summary(tuning, folder))
    tuned = metrics["tune/miou_tuned"]
    return None if math.isnan(tuned) else tuned


def _execute(
    task: str,
    trainer: Trainer,
    segmenter: LightningModule,
    datamodule: LightningDataModule,
    ckpt_path: str | None,
) -> dict[str, float]:
    if task != "fit":
        evaluate = trainer.validate if task == "validate" else trainer.test
        evaluate(segmenter, datamodule=datamodule, ckpt_path=ckpt_path, verbose=False)
        return _metrics(trainer)

    trainer.fit(segmenter, datamodule=datamodule, ckpt_path=ckpt_path)
    metrics = _metrics(trainer)
    if _can_test(segmenter, datamodule):
        checkpoints = trainer.checkpoint_callback
        best = getattr(checkpoints, "monitor", None) and getattr(checkpoints, "best_model_path", "")
        trainer.test(segmenter, datamodule=datamodule, ckpt_path=best or None, verbose=False)
        metrics |= _metrics(trainer)
    return metrics


def _callbacks(trainer: Trainer) -> list[SAMRefineCallback]:
    from lightning_samrefine import SAMRefineCallback
    from lightning_samrefine.callbacks.arguments import callbacks_of

    return callbacks_of(trainer, SAMRefineCallback)


def _metrics(trainer: Trainer) -> dict[str, float]:
    """Return what the last stage logged, and every figure of the callbacks, logged or not."""
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    for callback in _callbacks(trainer):
        metrics |= callback.figures
    return metrics


def _write_curve(trainer: Trainer, path: Path) -> None:
    """Draw raw against refined over the validations of each callback, if more than one."""
    for callback in _callbacks(trainer):
        epochs = [figures for figures in callback.history if figures["stage"] == "val"]
        first_loader = [figures for figures in epochs if figures["dataloader_idx"] == 0]
        if len(first_loader) > 1:
            from lightning_samrefine.reporting.charts import draw_curve
            from lightning_samrefine.reporting.panels import save_figure

            save_figure(
                draw_curve(first_loader), path.with_name(callback.presenter.named(path.name))
            )


def _write_fitted(trainer: Trainer, folder: Path) -> None:
    """Write the weights that ``refine=auto`` fitted, and print what was found."""
    from lightning_samrefine.config_files import write_refine
    from lightning_samrefine.fusion_weights import FusionWeights

    for callback in _callbacks(trainer):
        config = callback.fitted_config
        if config is not None and isinstance(config.weights, FusionWeights):
            path = folder / callback.presenter.named("fitted.yaml")
            write_refine(config, path)
            print(f"{config.weights.found} (cross-validated). Weights: {path}")


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
