"""The files of a tuning: the grid as a table and a heat map, and a configuration to use."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lightning_samrefine.config_files import write_refine
from lightning_samrefine.fit.auto_fusion import TOO_FEW
from lightning_samrefine.metrics.bootstrap import BootstrapInterval, class_ious, mean_ious
from lightning_samrefine.reporting.panels import save_figure
from lightning_samrefine.tune.choice import gain
from lightning_samrefine.tune.settings import OBJECTIVES
from lightning_samrefine.tune.task import Tuning

NO_HELP = "SAM refinement does not help on this data"
_NAMES = {"miou": "mIoU", "trimap_miou": "trimap mIoU"}
_BEST_CELLS = 8


def write_tuning(tuning: Tuning, folder: Path) -> None:
    """Write ``tuned.yaml``, ``best_cell.yaml``, ``surface.csv`` and ``surface.png`` to a folder.

    And ``fitted.yaml``, if the images are enough for a fit.
    """
    if tuning.fitted is not None:
        write_refine(tuning.fitted, folder / "fitted.yaml")
    write_refine(tuning.config, folder / "tuned.yaml", sentences(tuning))
    uncalibrated = _expectation("The best cell of the grid", tuning.expected_uncalibrated, tuning)
    write_refine(tuning.cell_config, folder / "best_cell.yaml", [uncalibrated])
    write_surface(tuning, folder / "surface.csv")
    save_figure(draw_surface(tuning), folder / "surface.png")


def write_surface(tuning: Tuning, path: Path) -> None:
    """Write one row per cell: its thresholds, and raw, refined and gain of both objectives."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        sides = ("raw", "refined", "gain")
        thresholds = list(vars(tuning.grid.cells[0]))
        writer.writerow([*thresholds, *(f"{name}_{s}" for name in OBJECTIVES for s in sides)])
        for index, cell in enumerate(tuning.grid.cells):
            row: list[float] = list(vars(cell).values())
            for objective in OBJECTIVES:
                raw, refined = _means(tuning.counts.totals(index, objective))
                row += [raw, refined, refined - raw]
            writer.writerow(row)


def tuning_metrics(tuning: Tuning) -> dict[str, float]:
    """Return the metrics of a tuning by name, fractions in [0, 1]."""
    figures: dict[str, float] = {}
    for objective in OBJECTIVES:
        raw, best = _means(tuning.counts.totals(tuning.choice.cell, objective))
        calibrated = _means(tuning.trial.totals(0, objective))[1] if tuning.helps else raw
        name = f"tune/{objective}"
        figures |= {f"{name}_raw": raw, f"{name}_best_cell": best, f"{name}_tuned": calibrated}
    for name, interval in (
        ("expected_gain", tuning.expected),
        ("expected_gain_best_cell", tuning.expected_uncalibrated),
    ):
        figures |= {
            f"tune/{name}": interval.gain,
            f"tune/{name}_low": interval.low,
            f"tune/{name}_high": interval.high,
        }
    fitted = {} if tuning.verdict is None else tuning.verdict.figures()
    return figures | {f"tune/{name}": value for name, value in fitted.items()}


def draw_surface(tuning: Tuning) -> Figure:
    """Draw the gain of every cell, in points: one row per pair, one column per threshold."""
    grid, ious = tuning.grid, tuning.grid.pred_iou_thresh
    gains = _gains(tuning).reshape(len(grid.pairs), len(ious))
    height, width = 1.8 + 0.32 * len(grid.pairs), 3.2 + 0.62 * len(ious)
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    limit = max(np.nan_to_num(np.abs(gains)).max(), 1e-9)
    image = axes.imshow(gains, cmap="PiYG", vmin=-limit, vmax=limit, aspect="auto")
    for (row, column), value in np.ndenumerate(gains):
        chosen = row * len(ious) + column == tuning.choice.cell
        axes.text(
            column,
            row,
            _number(value, "+"),
            ha="center",
            va="center",
            fontsize=8,
            fontweight="bold" if chosen else "normal",
            bbox={"fill": False, "edgecolor": "black"} if chosen else None,
        )
    axes.set_xticks(range(len(ious)), [f"{iou:g}" for iou in ious])
    axes.set_yticks(range(len(grid.pairs)), [f"{s:g}, {m:g}" for s, m in grid.pairs])
    axes.set_xlabel("pred_iou_thresh")
    axes.set_ylabel("score_thresh,\nmask_prompt_scale")
    name = _NAMES[tuning.rule.objective]
    axes.set_title(f"gain in {name} on {len(tuning.counts)} images, in points", fontsize=10)
    figure.colorbar(image)
    return figure


def sentences(tuning: Tuning) -> list[str]:
    """Describe the choice and its expected gain in sentences."""
    if np.isnan(tuning.expected_uncalibrated.gain):
        return [
            f"No pixel of the {len(tuning.counts)} validation images is scored: every target is "
            "ignored, and no class is refined."
        ]
    found = [] if tuning.helps else [f"{NO_HELP}: no class is refined."]
    uncalibrated = _expectation("The best cell alone", tuning.expected_uncalibrated, tuning)
    if not any(tuning.choice.is_open):
        return [*found, "No class gains with certainty.", uncalibrated]
    subject = "Calibrated" if tuning.helps else "Its most certain classes"
    return [*found, _expectation(subject, tuning.expected, tuning), uncalibrated]


def _expectation(subject: str, interval: BootstrapInterval, tuning: Tuning) -> str:
    if np.isnan(interval.gain):
        return f"{subject}: no gain to expect, for no pixel of the validation images is scored."
    gained, low, high = (100 * value for value in (interval.gain, interval.low, interval.high))
    return (
        f"{subject}: {gained:+.2f} points of {_NAMES[tuning.rule.objective]} expected "
        f"({interval.confidence:.0%} interval {low:+.2f} to {high:+.2f}), cross-validated over "
        f"{interval.images} images in {tuning.folds} folds."
    )


def tuning_summary(tuning: Tuning, folder: Path) -> RenderableType:
    """Render the best cells, the classes, the expected gain, and the paths of the files."""
    return Group(
        _cells_table(tuning),
        _classes_table(tuning),
        Text(""),
        *(Text(sentence) for sentence in sentences(tuning)),
        Text(f"Use it: samrefine refine={folder / 'tuned.yaml'} ..."),
        *(Text(line) for line in _fit_lines(tuning, folder)),
        Text(f"Every cell: {folder / 'surface.csv'}, {folder / 'surface.png'}"),
    )


def _fit_lines(tuning: Tuning, folder: Path) -> list[str]:
    """Return what the fitted fusion gains beside the tuned thresholds, and its file."""
    if tuning.fitted is None or tuning.verdict is None:
        return [f"Fitted fusion: {TOO_FEW}."]
    return [
        f"Fitted fusion, cross-validated: {tuning.verdict.sentence(tuning.class_names)}.",
        f"Use it: samrefine refine={folder / 'fitted.yaml'} ...",
    ]


def _cells_table(tuning: Tuning) -> Table:
    name = _NAMES[tuning.rule.objective]
    table = Table(title=f"Best cells, val {name} in %", title_justify="left")
    for column in (*vars(tuning.grid.cells[0]), "raw", "refined", "gain"):
        table.add_column(column, justify="right")
    order = np.argsort(-_gains(tuning), kind="stable").tolist()
    chosen = tuning.choice.cell
    first = [chosen, *(cell for cell in order if cell != chosen)][:_BEST_CELLS]
    for cell in first:
        raw, refined = _means(tuning.counts.totals(cell, tuning.rule.objective))
        thresholds = (f"{value:g}" for value in vars(tuning.grid.cells[cell]).values())
        gained = _number(100 * (refined - raw), "+")
        numbers = (_number(100 * raw), _number(100 * refined), gained)
        table.add_row(*thresholds, *numbers, style="bold" if cell == chosen else "")
    return table


def _classes_table(tuning: Tuning) -> Table:
    choice, objective = tuning.choice, tuning.rule.objective
    table = Table(title="Classes, val IoU in %, gains in points", title_justify="left")
    for column in ("", "raw", "best cell", "calibrated", "at least", "pred_iou_thresh"):
        table.add_column(column, justify="left" if column == "" else "right")
    best, trial = tuning.counts.totals(choice.cell, objective), tuning.trial.totals(0, objective)
    raw, untuned = class_ious(best.sum(axis=0))
    _, tuned = class_ious(trial.sum(axis=0))
    if not tuning.helps:
        tuned = raw
    for c, name in enumerate(tuning.class_names):
        threshold = tuning.grid.cells[choice.cell_of_class[c]].pred_iou_thresh
        refined = tuning.helps and choice.is_open[c]
        table.add_row(
            Text(name),
            _number(100 * raw[c]),
            _number(100 * (untuned[c] - raw[c]), "+"),
            _number(100 * (tuned[c] - raw[c]), "+"),
            _number(100 * choice.low[c], "+"),
            f"{threshold:g}" if refined else "not refined",
        )
    table.add_section()
    gains = [gain(best), gain(trial) if tuning.helps else 0.0]
    cells = (_number(100 * _means(best)[0]), *(_number(100 * value, "+") for value in gains))
    table.add_row(_NAMES[objective], *cells, "", "", style="bold")
    return table


def _number(value: float, sign: str = "") -> str:
    return "-" if np.isnan(value) else f"{value:{sign}.2f}"


def _gains(tuning: Tuning) -> np.ndarray:
    """Return every cell's gain in points."""
    cells = range(len(tuning.grid.cells))
    return np.array([100 * gain(tuning.counts.totals(c, tuning.rule.objective)) for c in cells])


def _means(totals: np.ndarray) -> tuple[float, float]:
    """Return the mIoU of (N, 5, C) totals, raw and refined."""
    raw, refined = mean_ious(totals.sum(axis=0)).tolist()
    return raw, refined
