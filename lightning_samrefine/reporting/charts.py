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
    iou = {side: result.scores[side]["iou"].numpy() * 100 for side in SIDES}
    shown = [
        index
        for index in range(len(result.class_names))
        if not all(np.isnan(iou[side][index]) for side in SIDES)
    ]
    figure = Figure(figsize=(5.4, 1.4 + 0.33 * max(len(shown), 1)), layout="constrained")
    axes = figure.subplots()
    rows = np.arange(len(shown))
    for side, shift in zip(SIDES, (-0.2, 0.2), strict=True):
        values = np.nan_to_num(iou[side][shown])
        axes.barh(rows + shift, values, height=0.38, color=SIDE_COLORS[side], label=side)
    for row, index in enumerate(shown):
        gain = iou["refined"][index] - iou["raw"][index]
        if np.isnan(gain):
            continue
        end = max(iou[side][index] for side in SIDES)
        color = SIDE_COLORS["refined"] if gain >= 0 else _LOSS
        axes.text(end + 1, row, f"{gain:+.1f}", va="center", fontsize=9, color=color)
    axes.set_yticks(rows, [result.class_names[index] for index in shown])
    axes.invert_yaxis()
    axes.set_xlim(0, 115)
    axes.set_xlabel("IoU, %")
    axes.set_title(title, fontsize=10)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def draw_confusions(result: ComparisonResult, most: int = 12) -> Figure:
    """Draw which class lost pixels to which, raw beside refined, with the difference.

    Args:
        result: An evaluation.
        most: Maximum number of pairs, those with the most pixels on either side.

    Returns:
        A matplotlib figure that belongs to no global state.
    """
    pixels = {side: result.matrices[side][-1].numpy().copy() for side in SIDES}
    for matrix in pixels.values():
        np.fill_diagonal(matrix, 0)
    largest = np.maximum(*pixels.values())
    ranked = np.argsort(-largest, axis=None, kind="stable")[:most]
    pairs = [np.unravel_index(cell, largest.shape) for cell in ranked]
    pairs = [pair for pair in pairs if largest[pair] > 0]
    figure = Figure(figsize=(5.4, 1.4 + 0.33 * max(len(pairs), 1)), layout="constrained")
    axes = figure.subplots()
    rows = np.arange(len(pairs))
    for side, shift in zip(SIDES, (-0.2, 0.2), strict=True):
        values = [pixels[side][pair] for pair in pairs]
        axes.barh(rows + shift, values, height=0.38, color=SIDE_COLORS[side], label=side)
    for row, pair in zip(rows, pairs, strict=True):
        change = int(pixels["refined"][pair] - pixels["raw"][pair])
        color = SIDE_COLORS["refined"] if change <= 0 else _LOSS
        axes.text(
            float(largest[pair]), float(row), f" {change:+,}", va="center", fontsize=9, color=color
        )
    names = [*result.class_names, "no class"]
    axes.set_yticks(rows, [f"{names[true]} → {names[called]}" for true, called in pairs])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.25 * max((largest[pair] for pair in pairs), default=1))
    axes.set_xlabel("pixels")
    axes.set_title("Pixels of a class called another", fontsize=10)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


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
