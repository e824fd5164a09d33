"""What an evaluation is shown as: panels and charts for loggers and disk, and the report."""

from __future__ import annotations

import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import distributed

from lightning_samrefine.charts import draw_class_bars, draw_reliability
from lightning_samrefine.comparison import ComparisonResult
from lightning_samrefine.dashboards import rasterise, show_pictures
from lightning_samrefine.evaluation import LoaderEvaluation
from lightning_samrefine.panels import draw_panels
from lightning_samrefine.report import Gallery, ReportSection, write_report

REPORT_NAME = "report.html"
_PACKAGES = ("lightning-samrefine", "torch", "torchvision", "lightning", "torchmetrics", "numpy")


@dataclass(frozen=True)
class Evaluated:
    """One dataloader's finished evaluation.

    Attributes:
        stage: ``"val"`` or ``"test"``.
        suffix: ``"/dataloader_idx_<i>"`` where loaders are several, else empty.
        loader: What was collected.
        result: Its figures.
        curve: The figures of this loader's evaluations of the stage, one an epoch, this one last.
    """

    stage: str
    suffix: str
    loader: LoaderEvaluation
    result: ComparisonResult
    curve: Sequence[Mapping[str, Any]]


class Presenter:
    """Shows evaluations, each to every logger that can, and all of them in one report.

    Every process calls it: what the others saw is gathered on rank zero, which alone writes.

    Args:
        panels: How many images to draw, half that gained and half that lost the most.
        panels_every_n_epochs: Inside ``fit``, draw panels and charts for every n-th epoch.
        panels_width: Their width in pixels.
        report: Where the report goes: a path, True for ``report.html`` in the Trainer's log folder,
            False for none.
    """

    def __init__(
        self, panels: int, panels_every_n_epochs: int, panels_width: int, report: bool | Path
    ) -> None:
        self.panels = panels
        self.panels_every_n_epochs = panels_every_n_epochs
        self.panels_width = panels_width
        self.report = report
        self._sections: dict[tuple[str, str], ReportSection] = {}

    def emptied(self) -> Presenter:
        """Return one with the same settings and no evaluation, which can be pickled."""
        return Presenter(self.panels, self.panels_every_n_epochs, self.panels_width, self.report)

    def gallery(
        self, trainer: Trainer, num_classes: int, ignore_index: int | None
    ) -> Gallery | None:
        """Return a new gallery for one loader, None where there is no report to fill."""
        if self.report is False:
            return None
        return Gallery(num_classes, ignore_index, folder=_log_folder(trainer))

    def draws(self, trainer: Trainer) -> bool:
        """Whether panels are drawn in this epoch."""
        epochs = trainer.current_epoch + 1
        due = not _fitting(trainer) or epochs % self.panels_every_n_epochs == 0
        return self.panels > 0 and due

    def show(self, trainer: Trainer, evaluated: Evaluated) -> None:
        """Draw panels and charts of one loader. A collective call."""
        if not self.draws(trainer):
            return
        folder = _log_folder(trainer) / "panels"
        picker = evaluated.loader.picker
        for kept in _gather(picker.panels()):
            picker.merge(kept)
        if not trainer.is_global_zero:
            return
        stage, result = evaluated.stage, evaluated.result
        epoch = f"_epoch_{trainer.current_epoch:03d}" if stage == "val" else ""
        stem = f"{stage}{epoch}{evaluated.suffix.replace('/', '_')}"
        headline = stem.replace("_", " ")
        pictures = {
            "class_iou": draw_class_bars(result, f"IoU by class, {headline}"),
            "reliability": draw_reliability(result.calibration),
        }
        panels = picker.panels()
        if panels:
            pictures["panels"] = draw_panels(panels, result.class_names, headline)
        drawn = {
            f"{stage}/{name}{evaluated.suffix}": rasterise(
                figure, self.panels_width if name == "panels" else None
            )
            for name, figure in pictures.items()
        }
        if panels:
            path = folder / f"{stem}.png"
            try:
                folder.mkdir(parents=True, exist_ok=True)
                drawn[f"{stage}/panels{evaluated.suffix}"].save(path)
            except OSError as error:  # a full disk must not end the run
                rank_zero_warn(f"SAMRefineCallback: no panels were written to {folder} ({error})")
        show_pictures(trainer.loggers, drawn, trainer.global_step)

    def add_to_report(self, trainer: Trainer, evaluated: Evaluated) -> None:
        """Take a loader's gallery into the report, in place of its last one. A collective call."""
        gallery = evaluated.loader.gallery
        if gallery is None:
            return
        for exported in _gather(gallery.export() if _is_distributed() else {}):
            gallery.absorb(exported)
        key = (evaluated.stage, evaluated.suffix)
        if key in self._sections:
            self._sections[key].gallery.close()
        if not trainer.is_global_zero:
            gallery.close()
            return
        index = evaluated.suffix.rpartition("_")[2]
        self._sections[key] = ReportSection(
            title=evaluated.stage + (f", dataloader {index}" if index else ""),
            epoch=trainer.current_epoch if evaluated.stage == "val" and _fitting(trainer) else None,
            result=evaluated.result,
            gallery=gallery,
            curve=evaluated.curve if _fitting(trainer) else (),
        )

    def write(self, trainer: Trainer, thresholds: Any, about: Mapping[str, str]) -> None:
        """Write the report of all evaluations so far, the last of each loader.

        Args:
            trainer: For the log folder. A collective call.
            thresholds: A dataclass of the refinement's settings.
            about: What else to say of the run, by name.
        """
        if self.report is False:
            return
        path = self.report if isinstance(self.report, Path) else _log_folder(trainer) / REPORT_NAME
        if not trainer.is_global_zero or not self._sections:
            return
        facts = {
            "Command": {"": _command()},
            "Thresholds": {name: str(value) for name, value in asdict(thresholds).items()},
            "Set-up": dict(about),
            "Versions": _versions(),
        }
        # The test set first: it is what a reader came for.
        sections = [section for _, section in sorted(self._sections.items())]
        try:
            write_report(path, sections, facts)
        except OSError as error:
            rank_zero_warn(f"SAMRefineCallback: no report was written to {path} ({error})")


def sample_names(batch: Any, count: int, fallback: str) -> list[str]:
    """Name the samples of a batch: by its own names where it has some, else by position.

    Args:
        batch: As the dataloader yields it; a mapping may hold strings under a usual key.
        count: B.
        fallback: Such as ``"batch 3"``.
    """
    if isinstance(batch, Mapping):
        for key in ("name", "names", "filename", "file_name", "image_path", "path", "id"):
            names = batch.get(key)
            listed = isinstance(names, list | tuple) and len(names) >= count
            if listed and all(isinstance(name, str) for name in names):
                return list(names[:count])
    return [f"{fallback}, image {index}" for index in range(count)]


def batch_label(trainer: Trainer, batch_idx: int) -> str:
    """Return what to call a batch, the process included where there are several."""
    rank = f"rank {trainer.global_rank}, " if trainer.world_size > 1 else ""
    return f"{rank}batch {batch_idx}"


def _fitting(trainer: Trainer) -> bool:
    return trainer.state.fn == TrainerFn.FITTING


def _log_folder(trainer: Trainer) -> Path:
    # Reading log_dir is a collective call: every process must make it.
    return Path(trainer.log_dir or trainer.default_root_dir)


def _is_distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def _gather(value: Any) -> list[Any]:
    """Return the other processes' values on rank zero, nothing on the others."""
    if not _is_distributed() or distributed.get_world_size() == 1:
        return []
    zero = distributed.get_rank() == 0
    values = [None] * distributed.get_world_size() if zero else None
    distributed.gather_object(value, values)
    return values[1:] if values is not None else []


def _command() -> str:
    """Return the command line that started this process, ready to be pasted."""
    main = sys.modules.get("__main__")
    spec = getattr(main, "__spec__", None)
    program = Path(sys.argv[0]).name or "python"
    if spec is not None and spec.name == "lightning_samrefine.app":
        program = "samrefine"
    elif spec is not None and spec.name:
        program = f"python -m {spec.name.removesuffix('.__main__')}"
    elif program.endswith(".py"):
        program = f"python {shlex.quote(sys.argv[0])}"
    return " ".join([program, *map(shlex.quote, sys.argv[1:])])


def _versions() -> dict[str, str]:
    versions = {"Python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # a source tree on the path
            continue
    if torch.cuda.is_available():
        versions["CUDA"] = str(torch.version.cuda)
    return versions
