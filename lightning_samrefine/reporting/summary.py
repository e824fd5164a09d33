"""The metrics of a run as a flat JSON file and as tables on the console."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

SIDES = ("raw", "refined")
MEAN_ROWS = {"mIoU": "miou", "trimap mIoU": "trimap_miou", "Boundary IoU": "boundary_iou"}
_UNLIMITED = 10_000  # characters
_FACTS = {
    "miou_without_sam": "mIoU {:.2%} without SAM",
    "refine_accept_rate": "{:.1%} of regions accepted",
    "refine_regions_per_image": "{:.1f} regions an image",
    "refine_ms_per_image": "{:.0f} ms an image",
    "refine_fixed_px": "{:.0f} pixels fixed",
    "refine_broken_px": "{:.0f} broken",
}


def write_metrics(metrics: Mapping[str, float], path: Path) -> None:
    """Write a flat JSON object; a value that is not finite (an absent class) becomes null."""
    finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
    path.write_text(json.dumps(finite, indent=2) + "\n", encoding="utf-8")


def refined_miou(metrics: Mapping[str, float], stage: str) -> float | None:
    """Return a stage's refined mIoU, the mean over its dataloaders, ``None`` without any.

    Args:
        metrics: As logged, fractions in [0, 1].
        stage: The first part of the names, ``"val/fast"`` for a callback named ``"fast"``.
    """
    values = [metrics[f"{stage}/miou_refined{suffix}"] for suffix in _loaders(metrics, stage)]
    return sum(values) / len(values) if values else None


def refinement_table(metrics: Mapping[str, float], stage: str, loader: str = "") -> Table:
    """Tabulate raw against refined in per cent, the gain in points.

    Args:
        metrics: As logged, fractions in [0, 1].
        stage: The first part of the names: ``"val"``, ``"test"``, or ``"val/fast"`` for a callback
            named ``"fast"``.
        loader: The last part of the names, ``"/dataloader_idx_0"``, if there are several loaders.

    Returns:
        A row a class, then the means.
    """
    table = Table(title=f"{stage}{loader}: IoU in %", title_justify="left")
    table.add_column("")
    for column in ("raw", "refined", "gain"):
        table.add_column(column, justify="right")
    for name in _class_names(metrics, stage, loader):
        sides = (metrics.get(f"{stage}/iou_{side}/{name}{loader}", math.nan) for side in SIDES)
        table.add_row(Text(name), *_cells(*sides))
    table.add_section()
    for label, key in MEAN_ROWS.items():
        names = [f"{stage}/{key}_{side}{loader}" for side in SIDES]
        if all(name in metrics for name in names):
            table.add_row(label, *_cells(*(metrics[name] for name in names)), style="bold")
    return table


def summary(metrics: Mapping[str, float], folder: Path) -> RenderableType:
    """Render the tables of all stages in ``metrics``, what refining cost, and the log folder."""
    parts: list[RenderableType] = []
    for stage in _stages(metrics):
        for loader in _loaders(metrics, stage):
            facts = [
                text.format(metrics[f"{stage}/{key}{loader}"])
                for key, text in _FACTS.items()
                if f"{stage}/{key}{loader}" in metrics
            ]
            low, high = (f"{stage}/miou_gain_{end}{loader}" for end in ("low", "high"))
            if low in metrics:
                bounds = f"{_per_cent(metrics[low], '+')} to {_per_cent(metrics[high], '+')}"
                facts.insert(0, f"gain in mIoU within {bounds} (95%)")
            gain, same = (
                _per_cent(metrics.get(f"{stage}/{key}{loader}", math.nan), "+")
                for key in ("miou_gain", "miou_gain_same_classes")
            )
            if gain != same:
                facts.insert(0, f"gain {same} over the classes that both means have")
            failed = metrics.get(f"{stage}/refine_failed_images{loader}", 0)
            if failed:
                facts.append(f"{failed:.0f} images could not be refined and kept their prediction")
            parts += [refinement_table(metrics, stage, loader), Text(", ".join(facts)), Text("")]
    if not parts and any("/refine_failed_images" in name for name in metrics):
        parts.append(Text("No pixel was scored: every target is ignored."))
    elif not parts:
        parts.append(Text("No refinement was logged: every image or epoch was skipped."))
    parts.append(Text(f"Logs, metrics.json and config.yaml: {folder}"))
    parts += [Text(f"  {path}") for path in _to_look_at(folder)]
    return Group(*parts)


def _to_look_at(folder: Path) -> list[Path]:
    """Return reports, curves and each stage's last panels; earlier ones lie beside them."""
    drawn = sorted(folder.glob("**/panels/*.png"), key=lambda path: (path.stat().st_mtime, path))
    panels = {re.sub(r"_epoch_\d+|_step_\d+|-v\d+$", "", path.stem): path for path in drawn}
    pages, curves = (sorted(folder.glob(f"*{name}")) for name in ("report.html", "curve.png"))
    return [*pages, *curves, *panels.values()]


def print_whole(content: RenderableType, console: Console | None = None) -> None:
    """Print tables as wide as they are, and paths unbroken so that they can be copied.

    A narrow terminal breaks the lines; rich would cut headings and numbers.
    """
    console = console or Console()
    unlimited = console.options.update(max_width=_UNLIMITED)
    before = console.width
    # The argument `width` of `print` can only make it narrower.
    console.width = max(before, Measurement.get(console, unlimited, content).maximum)
    try:
        console.print(content, soft_wrap=True)
    finally:
        console.width = before


def _stages(metrics: Mapping[str, float]) -> list[str]:
    """Return the first parts of the names, every callback's: ``val``, ``val/fast``, ``test``."""
    found = [name.partition("/miou_refined")[0] for name in metrics if "/miou_refined" in name]
    return sorted(dict.fromkeys(found), key=lambda stage: (stage.partition("/")[0] != "val", stage))


def _loaders(metrics: Mapping[str, float], stage: str) -> list[str]:
    prefix = f"{stage}/miou_refined"
    return [name.removeprefix(prefix) for name in metrics if name.startswith(prefix)]


def _class_names(metrics: Mapping[str, float], stage: str, loader: str) -> list[str]:
    # A class that only one side predicts, and no target has, is logged for that side alone.
    found = [
        name.removeprefix(prefix).removesuffix(loader)
        for prefix in (f"{stage}/iou_{side}/" for side in SIDES)
        for name in metrics
        if name.startswith(prefix) and name.endswith(loader)
    ]
    return list(dict.fromkeys(found))


def _cells(raw: float, refined: float) -> tuple[str, str, Text]:
    gain = refined - raw
    color = "green" if gain > 0 else "red" if gain < 0 else ""
    return _per_cent(raw), _per_cent(refined), Text(_per_cent(gain, sign="+"), style=color)


def _per_cent(value: float, sign: str = "") -> str:
    return f"{100 * value:{sign}.2f}" if math.isfinite(value) else "-"
