"""Panels: image | raw | refined | truth | changes of the images that changed the most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from torch import Tensor

from lightning_samrefine.refine.results import Regions
from lightning_samrefine.utils.palette import class_colors, colorize

_ACCEPTED, _REJECTED = "#19c37d", "#ff4040"
_COLUMNS = ("image and regions", "raw", "refined", "truth", "changed pixels")
# A changed pixel is right now, was right before, or is wrong in another way.
CHANGE_COLORS = {"fixed": "#19c37d", "broken": "#ff4040", "swapped": "#f5b301"}
_FADED = 0.45
_DPI = 100
_WIDTH = 16.0  # inches
# Of a row, in inches: a column of pixels is drawn as one, not as high as it would be wide.
_ROW_HEIGHTS = (0.2, 2 * _WIDTH / len(_COLUMNS))


@dataclass(frozen=True)
class Panel:
    """One image of an evaluation, on the CPU.

    Attributes:
        name: The image's name, such as ``"batch 3, image 0"``.
        gain: Share of the labeled pixels that refinement turned right less those it turned
            wrong, in [-1, 1].
        image: (3, H, W) uint8 RGB.
        raw: (H, W) int64 labels.
        refined: (H, W) int64 labels.
        target: (H, W) int64 labels.
        valid: (H, W) bool, the pixels that are scored.
        regions: The prompted regions.
    """

    name: str
    gain: float
    image: Tensor
    raw: Tensor
    refined: Tensor
    target: Tensor
    valid: Tensor
    regions: Regions


class PanelPicker:
    """Keeps the images that gained and those that lost the most, in constant memory.

    Args:
        count: Maximum number kept: half of them the best, half the worst (the larger half the
            best).
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._best = (count + 1) // 2
        self._worst = count // 2
        self._kept: list[Panel] = []

    def offer(
        self,
        name: str,
        image: Tensor,
        raw: Tensor,
        refined: Tensor,
        target: Tensor,
        valid: Tensor,
        regions: Regions,
    ) -> None:
        """Keep this image if it is among the extremes so far; see `Panel` for the arguments."""
        if self.count == 0:
            return
        fixed = (refined == target) & valid
        right = (raw == target) & valid
        gain = (fixed.sum() - right.sum()).item() / max(int(valid.sum()), 1)
        if not self._takes(gain):
            return
        # SAM's masks would keep a megabyte an image, on its device.
        light = replace(regions, masks=None, windows=())
        labels = (raw.cpu(), refined.cpu(), target.cpu())
        self._keep(Panel(name, gain, image.cpu(), *labels, valid.cpu(), light))

    def merge(self, panels: Sequence[Panel]) -> None:
        """Keep those of another picker's panels that are among the extremes."""
        for panel in panels:
            if self._takes(panel.gain):
                self._keep(panel)

    def _takes(self, gain: float) -> bool:
        ranked = sorted(panel.gain for panel in self._kept)
        return len(ranked) < self.count or bool(
            (self._best and gain > ranked[-self._best])
            or (self._worst and gain < ranked[self._worst - 1])
        )

    def _keep(self, panel: Panel) -> None:
        full = len(self._kept) >= self.count
        self._kept.append(panel)
        self._kept.sort(key=lambda panel: -panel.gain)
        if full:
            del self._kept[self._best]

    def panels(self) -> list[Panel]:
        """Return what is kept, the largest gain first."""
        return list(self._kept)


def change_kinds(raw: Tensor, refined: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Return (H, W) uint8, 1 + the index in `CHANGE_COLORS` of changed scored pixels, else 0."""
    kinds = ((raw != refined) & valid).to(torch.uint8) * 3
    kinds.masked_fill_((refined == target) & (kinds > 0), 1)
    return kinds.masked_fill_((raw == target) & (kinds > 0), 2)


def change_table() -> np.ndarray:
    """Return (4, 3) uint8 RGB: the color of each value of `change_kinds`, black for none."""
    colors = [to_rgb(color) for color in CHANGE_COLORS.values()]
    return np.round(np.array([(0, 0, 0), *colors]) * 255).astype(np.uint8)


def _changes_picture(panel: Panel) -> np.ndarray:
    """Return (H, W, 3) uint8: the image, gray and faded, under its changed pixels."""
    kinds = change_kinds(panel.raw, panel.refined, panel.target, panel.valid).numpy()
    gray = panel.image.float().mean(dim=0).mul(_FADED).to(torch.uint8).numpy()
    return np.where(kinds[..., None] > 0, change_table()[kinds], gray[..., None])


def draw_panels(panels: Sequence[Panel], class_names: Sequence[str], title: str) -> Figure:
    """Draw one row per panel, as high as its image within bounds.

    Args:
        panels: At least one.
        class_names: C names, for the legend.
        title: Headline of the figure.

    Returns:
        A matplotlib figure that belongs to no global state: save it, or give it to a logger.

    Raises:
        ValueError: Without a panel.
    """
    if not panels:
        raise ValueError("panels must be at least one, got none")
    heights = [_row_height(*panel.image.shape[1:]) for panel in panels]
    size = (_WIDTH, 0.9 + sum(heights) + 0.3 * len(heights))
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title)
    grid = figure.subplots(len(panels), len(_COLUMNS), squeeze=False, height_ratios=heights)
    for axes_row, panel in zip(grid, panels, strict=True):
        _draw_row(axes_row, panel, len(class_names))
    for axes, column in zip(grid[0], _COLUMNS, strict=True):
        axes.set_title(column, fontsize=10)
    figure.legend(
        handles=_legend(panels, class_names), loc="outside lower center", ncols=8, fontsize=9
    )
    return figure


def _row_height(height: int, width: int) -> float:
    least, most = _ROW_HEIGHTS
    return min(max(_WIDTH / len(_COLUMNS) * height / width, least), most)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, making the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=_DPI)


def _draw_row(axes_row: Sequence[Axes], panel: Panel, num_classes: int) -> None:
    pictures = (
        panel.image.permute(1, 2, 0).numpy(),
        colorize(panel.raw, num_classes),
        colorize(panel.refined, num_classes),
        colorize(panel.target, num_classes, panel.valid),
        _changes_picture(panel),
    )
    for axes, picture in zip(axes_row, pictures, strict=True):
        axes.imshow(picture, interpolation="nearest")
        axes.set_xticks([])
        axes.set_yticks([])
    accepted = int(panel.regions.accepted.sum())
    axes_row[0].set_xlabel(
        f"{panel.name}: {accepted} of {len(panel.regions)} regions accepted", fontsize=8
    )
    axes_row[2].set_xlabel(f"{100 * panel.gain:+.2f} % of pixels", fontsize=8)
    for region, extent in zip(panel.regions, panel.regions.extents.tolist(), strict=True):
        x0, y0, x1, y1 = extent
        color = _ACCEPTED if region.accepted else _REJECTED
        axes_row[0].add_patch(
            Rectangle(
                (x0 - 0.5, y0 - 0.5),
                x1 - x0,
                y1 - y0,
                fill=False,
                edgecolor=color,
                linewidth=1.2,
                linestyle="-" if region.accepted else "--",
            )
        )
        axes_row[0].plot(*region.point, ".", color=color, markersize=4)
        axes_row[0].text(
            x0, y0, f"{region.pred_iou:.2f}", color="white", backgroundcolor=color, fontsize=5
        )


def _legend(panels: Sequence[Panel], class_names: Sequence[str]) -> list[Patch]:
    """Entries for the classes that occur, and for the two kinds of boxes."""
    present = torch.cat(
        [torch.cat([p.raw, p.refined, p.target]).flatten() for p in panels]
    ).unique()
    colors = class_colors(len(class_names)) / 255
    entries = [
        Patch(color=colors[index], label=class_names[index])
        for index in present.tolist()
        if 0 <= index < len(class_names)
    ]
    entries += [Patch(color=color, label=word) for word, color in CHANGE_COLORS.items()]
    boxes: tuple[tuple[str, str, Literal["-", "--"]], ...] = (
        ("accepted", _ACCEPTED, "-"),
        ("rejected", _REJECTED, "--"),
    )
    entries += [
        Patch(fill=False, edgecolor=color, linestyle=style, label=f"region {word} (predicted IoU)")
        for word, color, style in boxes
    ]
    return entries
