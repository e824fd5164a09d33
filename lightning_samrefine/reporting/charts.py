"""Charts of figures: classes, confusions, bands around borders, predicted IoU, epochs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_samrefine.metrics import Calibration
from lightning_samrefine.metrics.calibration import BINS
from lightning_samrefine.metrics.comparison import SIDES, ComparisonResult

SIDE_COLORS = {"raw": "#8a8f98", "refined": "#178a5e"}
_LOSS = "#c8342b"


def draw_class_bars(result: ComparisonResult, title: str = "IoU by class") -> Figure:
    """Draw the IoU of every class that occurs, raw beside refined, with the gain in points.

    Args:
        result: An evaluation.
        title: Headline of the figure.

    Returns:
        A matplotlib figure that belongs to no global state.
    """
    iou = np.stack([result.scores[side]["iou"].numpy() * 100 for side in SIDES])
    shown = np.flatnonzero(~np.isnan(iou).all(axis=0))
    iou = iou[:, shown]
    gains = iou[1] - iou[0]
    notes = ["" if np.isnan(gain) else f"{gain:+.1f}" for gain in gains]
    names = [result.class_names[index] for index in shown]
    figure, axes = _paired_bars(np.nan_to_num(iou), names, notes, gains >= 0, space=1)
    axes.set_xlim(0, 115)
    axes.set_xlabel("IoU, %")
    axes.set_title(title, fontsize=10)
    return figure


def draw_confusions(result: ComparisonResult, most: int = 12) -> Figure:
    """Draw which class lost pixels to which, raw beside refined, with the difference.

    Args:
        result: An evaluation.
        most: Maximum number of pairs, those with the most pixels on either side.

    Returns:
        A matplotlib figure that belongs to no global state.
    """
    pixels = np.stack([result.matrices[side][-1].numpy() for side in SIDES])
    for matrix in pixels:
        np.fill_diagonal(matrix, 0)
    largest = pixels.max(axis=0)
    ranked = np.argsort(-largest, axis=None, kind="stable")[:most]
    pairs = [np.unravel_index(cell, largest.shape) for cell in ranked]
    pairs = [pair for pair in pairs if largest[pair] > 0]
    shown = np.array([[matrix[pair] for pair in pairs] for matrix in pixels])
    changes = shown[1] - shown[0]
    names = [*result.class_names, "no class"]
    labels = [f"{names[true]} → {names[called]}" for true, called in pairs]
    notes = [f" {int(change):+,}" for change in changes]
    figure, axes = _paired_bars(shown, labels, notes, changes <= 0)
    axes.set_xlim(0, 1.25 * shown.max(initial=1))
    axes.set_xlabel("pixels")
    axes.set_title("Pixels of a class called another", fontsize=10)
    return figure


def _paired_bars(
    values: np.ndarray,
    labels: Sequence[str],
    notes: Sequence[str],
    better: np.ndarray,
    space: float = 0,
) -> tuple[Figure, Axes]:
    """Draw (2, N) values, raw beside refined, each pair with a note, green if it is ``better``."""
    rows = np.arange(len(labels))
    figure = Figure(figsize=(5.4, 1.4 + 0.33 * max(len(rows), 1)), layout="constrained")
    axes: Axes = figure.subplots()
    for side, own, shift in zip(SIDES, values, (-0.2, 0.2), strict=True):
        axes.barh(rows + shift, own, height=0.38, color=SIDE_COLORS[side], label=side)
    for row, end, note, good in zip(rows, values.max(axis=0), notes, better, strict=True):
        color = SIDE_COLORS["refined"] if good else _LOSS
        axes.text(float(end) + space, float(row), note, va="center", fontsize=9, color=color)
    axes.set_yticks(rows, labels)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2)
    return figure, axes


def draw_reliability(calibration: Calibration) -> Figure:
    """Draw the mean true IoU of regions against their predicted IoU, and how many there are.

    Args:
        calibration: Of all regions, accepted and rejected.

    Returns:
        A matplotlib figure that belongs to no global state.
    """
    figure = Figure(figsize=(5.4, 5), layout="constrained")
    curve, counts = figure.subplots(2, height_ratios=(3, 1), sharex=True)
    curve.plot([0, 1], [0, 1], color="#8a8f98", linestyle="--", linewidth=1, label="calibrated")
    regions = calibration.bin_regions.numpy()
    some = regions > 0
    curve.plot(
        calibration.bin_pred_iou.numpy()[some],
        calibration.bin_true_iou.numpy()[some],
        "o-",
        color=SIDE_COLORS["refined"],
        label="regions",
    )
    curve.set_ylabel("true IoU")
    curve.set_ylim(0, 1)
    curve.set_title(f"SAM's predicted IoU: {_in_words(calibration)}", fontsize=10)
    curve.legend(loc="upper left")
    centers = (np.arange(BINS) + 0.5) / BINS
    counts.bar(centers, regions, width=0.9 / BINS, color=SIDE_COLORS["refined"])
    counts.set_xlim(0, 1)
    counts.set_xlabel("predicted IoU")
    counts.set_ylabel("regions")
    for axes in (curve, counts):
        axes.grid(alpha=0.3)
    return figure


def draw_trimaps(result: ComparisonResult) -> Figure:
    """Draw mIoU inside bands around borders against their width.

    Args:
        result: An evaluation.

    Returns:
        A matplotlib figure that belongs to no global state.
    """
    figure = Figure(figsize=(5.4, 5), layout="constrained")
    axes: Axes = figure.subplots()
    for side in SIDES:
        values = [100 * result.trimap_miou(side, width) for width in result.widths]
        axes.plot(result.widths, values, "o-", color=SIDE_COLORS[side], label=side)
    axes.set_xticks(result.widths)
    axes.set_xlabel("width of the band, px")
    axes.set_ylabel("trimap mIoU, %")
    axes.set_title("mIoU near borders", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def curve_unit(history: Sequence[Mapping[str, float]]) -> str:
    """Return ``"epoch"``, or ``"step"`` if an epoch has several evaluations."""
    epochs = [figures["epoch"] for figures in history]
    return "epoch" if len(set(epochs)) == len(epochs) else "step"


def draw_curve(history: Sequence[Mapping[str, float]]) -> Figure:
    """Draw mIoU and trimap mIoU, raw and refined, over epochs, or over steps.

    Args:
        history: One mapping per evaluation, in order: ``epoch``, ``step`` if an epoch comes
            twice, and the names of `RefinementComparison.compute`.

    Returns:
        A matplotlib figure that belongs to no global state.

    Raises:
        ValueError: An empty history.
    """
    if not history:
        raise ValueError("history must have at least one evaluation, got none")
    unit = curve_unit(history)
    figure = Figure(figsize=(10, 4), layout="constrained")
    panes = figure.subplots(1, 2, sharex=True)
    for axes, (prefix, title) in zip(
        panes, (("", "mIoU"), ("trimap_", "trimap mIoU")), strict=True
    ):
        for side, color in (("raw", "#888888"), ("refined", "#19a974")):
            points = [
                (figures[unit], 100 * figures[f"{prefix}miou_{side}"])
                for figures in history
                if f"{prefix}miou_{side}" in figures
            ]
            xs, ys = zip(*points, strict=True) if points else ((), ())
            axes.plot(xs, ys, "o-", color=color, label=side, markersize=4)
        axes.set_title(f"{title}, validation")
        axes.set_xlabel(unit)
        axes.set_ylabel("%")
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def _in_words(calibration: Calibration) -> str:
    if calibration.regions == 0:
        return "no region with ground truth"
    return f"ECE {calibration.ece:.3f}, AUROC {calibration.auroc:.3f}"
