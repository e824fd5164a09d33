"""Which figures are logged, and warnings of monitored ones that may never be."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_samrefine.callbacks.arguments import callbacks_of
from lightning_samrefine.metrics.comparison import MEANS, SIDES, ComparisonResult

_CLASS_FIGURES = tuple(f"iou_{side}/" for side in SIDES)
_MEANS = tuple(f"{name}_" for name in MEANS)
# What is logged by default: of the others only those that something monitors.
DEFAULT_LOG = (
    "miou_*",
    "trimap_miou_*",
    "fitted_gain*",
    "refine_accept_rate",
    "refine_ms_per_image",
    "refine_failed_images",
)
DEFAULT_PROG_BAR = ("miou_refined", "miou_gain")


def matches(figure: str, patterns: Iterable[str]) -> bool:
    """Whether a figure's name, without the stage, is one of the names or glob patterns."""
    return any(fnmatchcase(figure, pattern) for pattern in patterns)


def is_monitored(trainer: Trainer, name: str) -> bool:
    """Whether a callback or scheduler monitors a figure, or puts it into the name of a file.

    Args:
        trainer: With the callbacks and schedulers that monitor.
        name: As logged, such as ``"val/iou_refined/road"``.
    """
    if any(name == monitor for _, monitor in _monitors(trainer)):
        return True
    files = (getattr(callback, "filename", None) for callback in callbacks_of(trainer, Callback))
    return any(f"{{{name}" in file for file in files if isinstance(file, str))


def show_again(trainer: Trainer, figures: Mapping[str, float]) -> None:
    """Show monitors the last values, in a validation that is not measured.

    Lightning does so itself, but forgets them where a fit is resumed.

    Args:
        trainer: With the callbacks and schedulers that monitor.
        figures: The last values, by the names that they were logged under.
    """
    seen, device = trainer.callback_metrics, trainer.strategy.root_device
    for name, value in figures.items():
        if name not in seen and is_monitored(trainer, name):
            seen[name] = torch.tensor(value, device=device)


def warn_unmatched(patterns: Sequence[str], figures: Iterable[str]) -> None:
    """Warn of names and patterns of the user's that no figure of an evaluation has."""
    figures = list(figures)
    unmatched = [
        one
        for one in patterns  # the fit comes after
        if not one.startswith("fitted_") and not any(fnmatchcase(name, one) for name in figures)
    ]
    if unmatched and patterns != DEFAULT_LOG:
        rank_zero_warn(
            f"SAMRefineCallback: log names {', '.join(map(repr, unmatched))}, which no figure of "
            f"this evaluation matches; without classes they are "
            f"{', '.join(name for name in figures if '/' not in name)}"
        )


def warn_unscored(result: ComparisonResult, where: str) -> None:
    """Warn if none of the images has a scored pixel.

    Args:
        result: Of one dataloader.
        where: Describes the images, such as ``"of the sanity check"``.
    """
    images = result.counts[0]
    if images == 0 or int(result.matrices["raw"].sum()) > 0:
        return
    rank_zero_warn(
        f"SAMRefineCallback: no pixel of the {images} images {where} is scored, for every target "
        f"there is ignore_index={result.ignore_index}; without scored pixels no IoU is logged"
    )


def warn_copies(result: ComparisonResult, processes: int) -> None:
    """Warn if every image was measured by every process, as without a distributed sampler.

    It is certain if each image's counts occur a multiple of times, and two images or more have
    wrong pixels: counts of images without one may agree by chance.

    Args:
        result: Of one dataloader.
        processes: Number of processes.
    """
    images = len(result.totals)
    if processes == 1 or images == 0:
        return
    rows, times = np.unique(result.totals.reshape(images, -1), axis=0, return_counts=True)
    true, hits, *_ = rows.reshape(len(rows), *result.totals.shape[1:]).swapaxes(0, 1)
    wrong = (true > hits).any(axis=1)
    if wrong.sum() > 1 and (times % processes == 0).all():
        rank_zero_warn(
            f"SAMRefineCallback: the {images // processes} images were measured {processes} times "
            "each, as if every process read the whole data set: measured_images and pixels are too "
            "large by that factor, and the interval of the gain is too narrow. Leave "
            "Trainer(use_distributed_sampler=True), or give each process of an IterableDataset "
            "images of its own"
        )


def warn_shifted(result: ComparisonResult) -> None:
    """Warn if targets look like the predicted classes plus or minus 1: the step shifts its labels.

    It is certain where a class at the end occurs in no target, the network predicts the neighbor
    of two classes or more on most of their pixels (of one class, a network that predicts a single
    class would do so), and most pixels agree with the neighbor (an untrained network's do not),
    far more than with the class.
    """
    matrix = result.matrices["raw"][-1]
    pixels, classes = matrix.sum(dim=1), torch.arange(len(matrix))
    most = torch.where(2 * matrix.amax(dim=1) > pixels, matrix.argmax(dim=1), -2)
    for shift, absent in ((-1, 0), (1, -1)):
        moved = int((most == classes + shift)[pixels > 0].sum()) >= 2
        others = max(2 * int(matrix.diagonal().sum()), int(matrix.sum()) // 2)
        is_better = int(matrix.diagonal(shift).sum()) > others
        if int(pixels[absent]) == 0 and moved and is_better:
            change = "1 less" if shift < 0 else "1 more"
            rank_zero_warn(
                f"SAMRefineCallback: the predicted classes are {change} than the targets in the "
                "batch, as if the step shifted its labels: mIoU is wrong, raw and refined. Shift "
                "them in the data set or in an adapter, where the callback sees it"
            )


def warn_monitors(trainer: Trainer, prefix: str, results: Sequence[ComparisonResult]) -> None:
    """Warn, in the sanity check, of monitored figures that may never be logged.

    A `ModelCheckpoint` ends the run if its figure is absent, and does so after the first epoch.

    Args:
        trainer: With the callbacks and schedulers that monitor.
        prefix: What the figures' names begin with, ``"val"`` or ``"val/fast"``.
        results: Of the targets of the sanity check, one a dataloader.
    """
    for owner, monitor in _monitors(trainer):
        if not monitor.startswith(f"{prefix}/"):
            continue
        figure, _, number = monitor.removeprefix(f"{prefix}/").partition("/dataloader_idx_")
        if not figure.startswith((*_CLASS_FIGURES, *_MEANS)):
            continue
        if (len(results) > 1) != (number != ""):
            several = f"{len(results)} dataloaders" if len(results) > 1 else "one dataloader"
            end = "in /dataloader_idx_0 and so on" if len(results) > 1 else "without a number"
            _warn(owner, monitor, f"the figures of {several} end {end}")
            continue
        index = int(number) if number.isdecimal() else 0
        if figure.startswith(_CLASS_FIGURES) and index < len(results):
            reason = _why_absent(figure.partition("/")[2], results[index])
            if reason is not None:
                _warn(owner, monitor, reason)


def _monitors(trainer: Trainer) -> Iterator[tuple[str, str]]:
    """Yield the class that monitors a figure, and the figure's name."""
    for callback in callbacks_of(trainer, Callback):
        if isinstance(monitor := getattr(callback, "monitor", None), str):
            yield type(callback).__name__, monitor
    for config in trainer.lr_scheduler_configs:
        if config.reduce_on_plateau and isinstance(config.monitor, str):
            yield type(config.scheduler).__name__, config.monitor


def _why_absent(name: str, result: ComparisonResult) -> str | None:
    if name not in result.class_names:
        return f"the classes are {', '.join(result.class_names)}"
    index = result.class_names.index(name)
    if index == result.ignore_index:
        return f"class {name} is ignore_index and never scored"
    images, pixels = result.counts[0], result.matrices["raw"][-1].sum(dim=1)
    if images == 0 or int(pixels[index]) > 0:
        return None
    return (
        f"no target of the {images} images of the sanity check holds class {name}; where the whole "
        "validation set has none, the figure may be absent (num_sanity_val_steps=-1 looks at all)"
    )


def _warn(owner: str, monitor: str, reason: str) -> None:
    rank_zero_warn(
        f"SAMRefineCallback: {owner} monitors {monitor!r}, which may never be logged: {reason}"
    )
