"""Pictures, tables and names for the loggers of a Trainer."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from lightning_samrefine.reporting.image_table import COLUMNS, ImageRow, in_order, to_csv
from lightning_samrefine.reporting.panels import Panel

# What no logger changes in a name: TensorBoard makes "_" of other characters, MLflow drops them,
# and "/" would make folders of its own. A space is TensorBoard's alone to change.
_KEPT = re.compile(r"[^\w .-]")
_LONGEST_SIDE = 32_000  # pixels
_NO_CLASS = 255
_KEPT_ASCII = re.compile(r"[^A-Za-z0-9_ .-]")


def safe_names(class_names: Iterable[str], loggers: Sequence[Logger] = ()) -> list[str]:
    """Return names of classes that stay different in every logger of a run.

    A class's figures have one name in all loggers. Characters that one of them would change become
    "_"; with MLflow letters lose their accents and other characters than ASCII become "_", too. If
    that makes two names equal, the classes' numbers are added.

    Args:
        class_names: C names, all different.
        loggers: The Trainer's.

    Returns:
        C names, different for each of the loggers, upper and lower case counting as the same.
    """
    ascii_only = any(isinstance(logger, MLFlowLogger) for logger in loggers)
    cleaned = [_clean(name, ascii_only) for name in class_names]
    keys = [_key(name) for name in cleaned]
    names: list[str] = []
    taken: set[str] = {key for key in keys if keys.count(key) == 1}
    for index, (name, key) in enumerate(zip(cleaned, keys, strict=True)):
        if key and keys.count(key) == 1:
            names.append(name)
            continue
        numbered = f"{name}_{index}" if key else f"class_{index}"
        while _key(numbered) in taken:
            numbered += f"_{index}"
        taken.add(_key(numbered))
        names.append(numbered)
    return names


def _clean(name: str, ascii_only: bool) -> str:
    if ascii_only:
        name = unicodedata.normalize("NFKD", name)
        name = "".join(letter for letter in name if not unicodedata.combining(letter))
    name = (_KEPT_ASCII if ascii_only else _KEPT).sub("_", name).strip()
    return re.sub(r"^\.+", "_", name)  # "." and ".." are folders to a file store


def _key(name: str) -> str:
    return name.replace(" ", "_").casefold().strip("_.")


def rasterize(figure: Figure, width: int | None = None) -> Image.Image:
    """Draw a figure as an RGB image, ``width`` pixels wide unless None.

    Neither side gets longer than 32,000 pixels: larger figures are drawn smaller.
    """
    dpi = 100 if width is None else width / figure.get_figwidth()
    dpi = min(dpi, _LONGEST_SIDE / max(figure.get_size_inches()))
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def show_pictures(
    loggers: Sequence[Logger], pictures: Mapping[str, Image.Image], step: int
) -> None:
    """Log pictures to the loggers that take them.

    These are TensorBoard, MLflow (as artifacts), and any other logger with a method
    ``log_image(key, images, step)``, such as W&B's. A logger that raises, for example because its
    server is unreachable, loses its pictures, with a warning.

    Args:
        loggers: The Trainer's. Call on rank zero alone.
        pictures: By name, such as ``"val/panels"``.
        step: The step to log them under.
    """
    for logger in loggers:
        with _unless_it_fails(logger, "pictures"):
            for name, picture in pictures.items():
                _show(logger, name, picture, step)


def show_table(loggers: Sequence[Logger], name: str, rows: Iterable[ImageRow], step: int) -> None:
    """Log a table of images: a W&B table, and a CSV file among MLflow's artifacts.

    Args:
        loggers: The Trainer's. Call on rank zero alone.
        name: Such as ``"val/images"``.
        rows: One for each image.
        step: The step to log it under.
    """
    rows = in_order(rows)
    for logger in loggers:
        with _unless_it_fails(logger, "table of images"):
            if isinstance(logger, WandbLogger):
                data = [row.values() for row in rows]
                logger.log_table(key=name, columns=list(COLUMNS), data=data, step=step)
            elif isinstance(logger, MLFlowLogger):
                text = to_csv([(name.partition("/")[0], rows)])
                logger.experiment.log_text(logger.run_id, text, _artifact(name, step, "csv"))


def show_masks(
    loggers: Sequence[Logger],
    name: str,
    panels: Sequence[Panel],
    class_names: Sequence[str],
    step: int,
) -> None:
    """Log images to W&B with masks that can be switched on and off: raw, refined and truth.

    Args:
        loggers: The Trainer's; others than W&B's have no masks. Call on rank zero alone.
        name: Such as ``"val/masks"``.
        panels: The images.
        class_names: C names; W&B stores 8 bits a pixel, and above 255 classes there are no masks.
        step: The step to log them under.
    """
    if not panels or len(class_names) > _NO_CLASS:
        return
    labels = {**dict(enumerate(class_names)), _NO_CLASS: "not scored"}
    masks = []
    for panel in panels:
        maps = {"raw": panel.raw, "refined": panel.refined, "truth": panel.target}
        known = {side: (one >= 0) & (one < len(class_names)) for side, one in maps.items()}
        known["truth"] &= panel.valid
        masks.append(
            {
                side: {
                    "mask_data": one.masked_fill(~known[side], _NO_CLASS).numpy().astype(np.uint8),
                    "class_labels": labels,
                }
                for side, one in maps.items()
            }
        )
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            with _unless_it_fails(logger, "masks"):
                logger.log_image(
                    key=name,
                    images=[panel.image.permute(1, 2, 0).numpy() for panel in panels],
                    step=step,
                    caption=[panel.name for panel in panels],
                    masks=masks,
                )


@contextmanager
def _unless_it_fails(logger: Logger, what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of a server, a disk or a plugin
        rank_zero_warn(
            f"SAMRefineCallback: {type(logger).__name__} took no {what} "
            f"({type(error).__name__}: {error})"
        )


def _artifact(name: str, step: int, ending: str) -> str:
    path = Path(name)
    return path.with_name(f"{path.name}_step_{step:06d}.{ending}").as_posix()


def _show(logger: Logger, name: str, picture: Image.Image, step: int) -> None:
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_image(name, np.asarray(picture), step, dataformats="HWC")
    elif isinstance(logger, MLFlowLogger):
        artifact = _artifact(name, step, "png")
        logger.experiment.log_image(logger.run_id, picture, artifact_file=artifact)
    elif callable(log_image := getattr(logger, "log_image", None)):
        log_image(key=name, images=[picture], step=step)
