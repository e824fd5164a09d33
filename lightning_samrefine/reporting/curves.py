"""The curve of raw against refined mIoU over the evaluations of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure


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
