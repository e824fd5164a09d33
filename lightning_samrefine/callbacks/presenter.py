"""Shows an evaluation: panels and charts for loggers and disk, and the report."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_samrefine.adapters.sample_names import own_names
from lightning_samrefine.callbacks.collective import gather_on_zero, is_distributed
from lightning_samrefine.callbacks.loader_evaluation import LoaderEvaluation
from lightning_samrefine.config import RefineConfig
from lightning_samrefine.config_files import write_refine
from lightning_samrefine.metrics.comparison import ComparisonResult
from lightning_samrefine.reporting.charts import (
    curve_unit,
    draw_class_bars,
    draw_confusions,
    draw_reliability,
)
from lightning_samrefine.reporting.image_table import to_csv
from lightning_samrefine.reporting.loggers import (
    rasterize,
    show_masks,
    show_pictures,
    show_table,
)
from lightning_samrefine.reporting.panels import draw_panels
from lightning_samrefine.reporting.report import Gallery, ReportSection, write_report
from lightning_samrefine.utils.machine import describe_versions
from lightning_samrefine.utils.validation import check_count

REPORT_NAME = "report.html"


@dataclass(frozen=True)
class Evaluated:
    """One dataloader's finished evaluation.

    Attributes:
        stage: ``"val"`` or ``"test"``.
        index: The loader's number.
        suffix: ``"/dataloader_idx_<i>"`` with several loaders, else empty.
        loader: The images and regions that were collected.
        result: Its figures, the classes named as the user does.
        fusion: Which weights it was refined with, in words.
    """

    stage: str
    index: int
    suffix: str
    loader: LoaderEvaluation
    result: ComparisonResult
    fusion: str


class Presenter:
    """Shows evaluations: each in every logger that takes pictures, and all of them in one report.

    Every process calls it: rank zero gathers the others' images and alone writes. An error in
    drawing or writing is a warning and never ends the run.

    See `SAMRefineCallback` for the arguments.

    Raises:
        TypeError: An argument of a wrong type.
        ValueError: A number that is too small.
    """

    def __init__(
        self,
        panels: int,
        panels_every_n_epochs: int,
        panels_width: int,
        report: bool | str | Path,
        name: str | None = None,
    ) -> None:
        check_count("panels", panels, least=0)
        check_count("panels_every_n_epochs", panels_every_n_epochs)
        check_count("panels_width", panels_width, least=200)
        if not isinstance(report, bool | str | Path):
            raise TypeError(f"report must be True, False or a path, got {report!r}")
        self.panels = panels
        self.panels_every_n_epochs = panels_every_n_epochs
        self.panels_width = panels_width
        self.report = Path(report) if isinstance(report, str) else report
        self.name = name
        # By path, for one callback may attend several runs: then by stage and loader.
        self._sections: dict[Path, dict[tuple[str, int], ReportSection]] = {}
        self._drawn: set[Path] = set()
        self._report_paths: dict[Path, Path] = {}

    def emptied(self) -> Presenter:
        """Return a presenter with the same settings and no evaluation, which can be pickled."""
        return Presenter(
            self.panels, self.panels_every_n_epochs, self.panels_width, self.report, self.name
        )

    def write_fitted(self, trainer: Trainer, config: RefineConfig | None) -> None:
        """Write fitted weights to ``fitted.yaml`` in the log folder, if a logger has one.

        A collective call. An error is a warning.
        """
        if config is None or trainer.logger is None or _is_trial(trainer):
            return
        path = _log_folder(trainer) / self.named("fitted.yaml")
        if not trainer.is_global_zero:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_refine(config, path)
        except OSError as error:
            rank_zero_warn(f"SAMRefineCallback: {path} could not be written ({error})")

    def writes_report(self, trainer: Trainer) -> bool:
        """Whether evaluations are written to the report and to its table of images."""
        return self.report is not False and not _is_trial(trainer)

    def gallery(
        self, trainer: Trainer, num_classes: int, ignore_index: int | None
    ) -> Gallery | None:
        """Return a new gallery for one loader, None without a report."""
        if not self.writes_report(trainer):
            return None
        return Gallery(num_classes, ignore_index, folder=_log_folder(trainer))

    def draws(self, trainer: Trainer, validations: int) -> bool:
        """Whether panels are drawn after ``validations`` earlier ones of a fit."""
        due = not _fitting(trainer) or validations % self.panels_every_n_epochs == 0
        return self.panels > 0 and due and not _is_trial(trainer)

    def present(
        self,
        trainer: Trainer,
        evaluations: Sequence[Evaluated],
        draws: bool,
        history: Sequence[Mapping[str, Any]],
        thresholds: Any,
        about: Mapping[str, str],
    ) -> None:
        """Show the results of a pass over all loaders. A collective call.

        Args:
            trainer: Has loggers, log folder and epoch.
            evaluations: One per loader.
            draws: Whether panels and charts are due, see `draws`.
            history: The running fit's, these evaluations included.
            thresholds: The refinement's settings, a dataclass.
            about: Further facts for the report, by name.
        """
        folder = _log_folder(trainer)
        for evaluated in evaluations:
            for rows in gather_on_zero(evaluated.loader.rows):
                evaluated.loader.rows.extend(rows)
            if draws:
                picker = evaluated.loader.picker
                for panels in gather_on_zero(picker.panels()):
                    picker.merge(panels)
            gallery = evaluated.loader.gallery
            if gallery is not None:
                for exported in gather_on_zero(gallery.export() if is_distributed() else {}):
                    gallery.absorb(exported)
            if not trainer.is_global_zero and gallery is not None:
                gallery.close()
        if not trainer.is_global_zero:
            return
        try:
            for evaluated in evaluations:
                if draws:
                    self._draw(trainer, folder / "panels", evaluated)
            if self.writes_report(trainer):
                path = self._report_path(folder)
                self._set_sections(trainer, path, evaluations, history)
                facts = {
                    "Command": {"": _command()},
                    "Thresholds": {key: str(value) for key, value in vars(thresholds).items()},
                    "Set-up": dict(about),
                    "Versions": describe_versions(),
                }
                # By stage: the test set first.
                sections = [part for _, part in sorted(self._sections[path].items())]
                write_report(path, sections, facts)
                table = to_csv((section.title, section.rows) for section in sections)
                path.with_name(_table_name(path.stem)).write_text(table, encoding="utf-8")
        except Exception as error:  # a full disk, a font, a plugin: none is worth the run
            rank_zero_warn(
                f"SAMRefineCallback: panels or report were not written to {folder} "
                f"({type(error).__name__}: {error})"
            )

    def _draw(self, trainer: Trainer, folder: Path, evaluated: Evaluated) -> None:
        stage, result, step = evaluated.stage, evaluated.result, logged_step(trainer)
        epoch = f"_epoch_{trainer.current_epoch:03d}" if stage == "val" else ""
        stem = self.named(f"{stage}{epoch}{evaluated.suffix.replace('/', '_')}")
        path = folder / f"{stem}.png"
        if path in self._drawn and stage == "val":  # several validations an epoch
            path = path.with_stem(f"{stem}_step_{step:06d}")
        self._drawn.add(path)
        headline = path.stem.replace("_", " ")
        pictures = {
            "class_iou": rasterize(draw_class_bars(result, f"IoU by class, {headline}")),
            "confusions": rasterize(draw_confusions(result)),
            "reliability": rasterize(draw_reliability(result.calibration)),
        }
        panels = evaluated.loader.picker.panels()
        if panels:
            figure = draw_panels(panels, result.class_names, headline)
            pictures["panels"] = rasterize(figure, self.panels_width)
        prefix = stage if self.name is None else f"{stage}/{self.name}"
        named = {f"{prefix}/{key}{evaluated.suffix}": value for key, value in pictures.items()}
        show_pictures(trainer.loggers, named, step)
        show_table(
            trainer.loggers, f"{prefix}/images{evaluated.suffix}", evaluated.loader.rows, step
        )
        show_masks(
            trainer.loggers, f"{prefix}/masks{evaluated.suffix}", panels, result.class_names, step
        )
        if panels:
            folder.mkdir(parents=True, exist_ok=True)
            pictures["panels"].save(_free(path))

    def named(self, file: str) -> str:
        """Return a file's name, beginning with that of the callback if it has one."""
        return file if self.name is None else f"{self.name}_{file}"

    def _report_path(self, folder: Path) -> Path:
        """Return the report's path: in a log folder always the same file for this callback."""
        if isinstance(self.report, Path):
            return self.report
        path = folder / self.named(REPORT_NAME)
        if path not in self._report_paths:
            self._report_paths[path] = _free(path)
        return self._report_paths[path]

    def _set_sections(
        self,
        trainer: Trainer,
        path: Path,
        evaluations: Sequence[Evaluated],
        history: Sequence[Mapping[str, Any]],
    ) -> None:
        """Put the loaders of a pass into a report, in place of all those of its previous one."""
        sections = self._sections.setdefault(path, {})
        for key in [key for key in sections if key[0] == evaluations[0].stage]:
            sections.pop(key).gallery.close()
        for one in evaluations:
            gallery = one.loader.gallery
            assert gallery is not None  # of every loader, or of none
            in_epochs = one.stage == "val" and _fitting(trainer)
            title = one.stage if self.name is None else f"{self.name}, {one.stage}"
            here = (one.stage, one.index)
            same = [h for h in history if (h["stage"], h["dataloader_idx"]) == here]
            by_step = in_epochs and curve_unit(same) == "step"
            sections[here] = ReportSection(
                title=title + (f", dataloader {one.index}" if one.suffix else ""),
                epoch=trainer.current_epoch if in_epochs else None,
                step=logged_step(trainer) if by_step else None,
                result=one.result,
                fusion=one.fusion,
                gallery=gallery,
                curve=same if in_epochs else (),
                rows=one.loader.rows,
            )


def sample_names(batch: Any, count: int, fallback: str) -> list[str]:
    """Return the names of a batch's samples: its own if it has some, else by position.

    Args:
        batch: As the dataloader yields it, see `own_names`.
        count: B.
        fallback: Such as ``"batch 3"``.
    """
    positions = [f"{fallback}, image {index}" for index in range(count)]
    return own_names(batch, count) or positions


def batch_label(trainer: Trainer, batch_idx: int) -> str:
    """Return a batch's name for the user, with the process if there are several."""
    rank = f"rank {trainer.global_rank}, " if trainer.world_size > 1 else ""
    return f"{rank}batch {batch_idx}"


def _table_name(stem: str) -> str:
    """Return the name of the table of images beside a report: ``images.csv`` of ``report``."""
    return f"{stem.replace('report', 'images') if 'report' in stem else f'{stem}_images'}.csv"


def _is_trial(trainer: Trainer) -> bool:
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]  # set by a connector


def _fitting(trainer: Trainer) -> bool:
    return trainer.state.fn == TrainerFn.FITTING


def logged_step(trainer: Trainer) -> int:
    """Return the step that Lightning files the running evaluation's figures under.

    Not ``global_step``, which counts the steps of every optimizer.
    """
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def _log_folder(trainer: Trainer) -> Path:
    """Return a folder of this run alone if its loggers have one. A collective call."""
    folder = Path(trainer.log_dir or trainer.default_root_dir)  # reading log_dir is collective
    logger = trainer.logger
    shared = not isinstance(logger, CSVLogger | TensorBoardLogger)
    if logger is None or logger.save_dir is None or not shared:
        return folder
    # All runs of other loggers share their folder; ModelCheckpoint distinguishes them like this.
    name, version = logger.name, logger.version
    version = version if version is None or isinstance(version, str) else f"version_{version}"
    parts = [str(part).strip("/") for part in (name, version) if part is not None]
    return trainer.strategy.broadcast(folder.joinpath(*parts))


def _free(path: Path) -> Path:
    """Return the path, with a version if a file is there already, as `ModelCheckpoint` does."""
    free, version = path, 0
    while free.exists():
        version += 1
        free = path.with_stem(f"{path.stem}-v{version}")
    return free


def _command() -> str:
    """Return the command line that started this process, quoted for a shell."""
    main = sys.modules.get("__main__")
    spec = getattr(main, "__spec__", None)
    program = Path(sys.argv[0]).name or "python"
    if spec is not None and spec.name == "lightning_samrefine.cli.main":
        program = "samrefine"
    elif spec is not None and spec.name:
        program = f"python -m {spec.name.removesuffix('.__main__')}"
    elif program.endswith(".py"):
        program = f"python {shlex.quote(sys.argv[0])}"
    return " ".join([program, *map(shlex.quote, sys.argv[1:])])
