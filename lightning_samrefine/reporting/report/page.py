"""From evaluations to one HTML file: template, tables, charts, and the galleries streamed in."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from io import StringIO
from pathlib import Path
from typing import Any, TextIO

import jinja2
import matplotlib
from matplotlib.figure import Figure

from lightning_samrefine.metrics.changes import KINDS
from lightning_samrefine.metrics.comparison import SIDES, ComparisonResult
from lightning_samrefine.metrics.same_classes import different_classes
from lightning_samrefine.reporting.charts import (
    curve_unit,
    draw_class_bars,
    draw_confusions,
    draw_curve,
    draw_reliability,
    draw_trimaps,
)
from lightning_samrefine.reporting.image_table import ImageRow, in_order
from lightning_samrefine.reporting.panels import CHANGE_COLORS
from lightning_samrefine.reporting.report.gallery_entries import MAX_REGIONS, Gallery
from lightning_samrefine.reporting.report.thumbnails import REGION_COLORS
from lightning_samrefine.utils.palette import class_colors

# Where the template leaves room for galleries: they are streamed, and never in memory as a whole.
_IMAGES_MARK, _REGIONS_MARK = "@@images-{}@@", "@@regions-{}@@"
_MARK = re.compile(r"@@(images|regions)-(\d+)@@")


@dataclass
class ReportSection:
    """One evaluation in a report.

    Attributes:
        title: Such as ``"test"`` or ``"val, dataloader 1"``.
        epoch: The evaluation's epoch, None outside fit.
        result: Its figures.
        gallery: Its images and regions.
        curve: The figures of the same loader's evaluations over epochs, this one last.
        step: The evaluation's step, None if its epoch has no other evaluation.
        rows: A row for each image.
        fusion: Which weights it was refined with, in words.
    """

    title: str
    epoch: int | None
    result: ComparisonResult
    gallery: Gallery
    curve: Sequence[Mapping[str, Any]] = ()
    step: int | None = None
    rows: Sequence[ImageRow] = ()
    fusion: str = ""


def write_report(
    path: Path, sections: Sequence[ReportSection], facts: Mapping[str, Mapping[str, str]]
) -> None:
    """Write a self-contained page: no network, no other file.

    Args:
        path: The file to write. It is replaced at once, when the new one is complete.
        sections: At least one.
        facts: Tables of names and values by heading: thresholds, versions, the command.

    Raises:
        ValueError: Without a section.
        OSError: The folder cannot be written.
    """
    if not sections:
        raise ValueError("sections must be at least one, got none")
    page = _template().render(
        sections=[_context(index, section) for index, section in enumerate(sections)],
        facts=facts,
        change_colors=CHANGE_COLORS,
        region_colors={name: _hex(rgb) for name, rgb in REGION_COLORS.items()},
        max_regions=MAX_REGIONS,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with unfinished.open("w", encoding="utf-8") as file:
            _stream(page, sections, file)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _stream(page: str, sections: Sequence[ReportSection], file: TextIO) -> None:
    start = 0
    for mark in _MARK.finditer(page):
        file.write(page[start : mark.start()])
        gallery = sections[int(mark[2])].gallery
        _write_array(gallery.images() if mark[1] == "images" else gallery.regions(), file)
        start = mark.end()
    file.write(page[start:])


def _write_array(entries: Iterable[str], file: TextIO) -> None:
    file.write("[")
    for index, entry in enumerate(entries):
        file.write(",\n" if index else "\n")
        file.write(entry)
    file.write("]")


@lru_cache(maxsize=1)
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"percent": _percent, "points": _points, "fixed": _fixed}
    return environment.get_template("template.html")


def _context(index: int, section: ReportSection) -> dict[str, Any]:
    result = section.result
    images, failed, regions, accepted, microseconds = result.counts
    fixed, broken, swapped = result.changes.sum(dim=1).tolist()
    return {
        "id": index,
        "title": section.title,
        "epoch": section.epoch,
        "step": section.step,
        "headline": _headline(result),
        "verdict": _verdict(result),
        "different_classes": different_classes(result),
        "fusion": section.fusion,
        "means": list(_means(result)),
        "classes": list(_classes(result)),
        "charts": list(_charts(section)),
        "rows": in_order(section.rows),
        "images": images,
        "failed": failed,
        "regions": regions,
        "accept_rate": accepted / max(regions, 1),
        "ms": microseconds / 1000 / max(images, 1),
        "fixed": fixed,
        "broken": broken,
        "swapped": swapped,
        "calibration": result.calibration,
        "gallery_seen": section.gallery.images_seen,
        "gallery_most": section.gallery.max_images,
        "names": result.class_names,
        "colors": _hex_colors(len(result.class_names)),
        "images_mark": _IMAGES_MARK.format(index),
        "regions_mark": _REGIONS_MARK.format(index),
    }


def _headline(result: ComparisonResult) -> dict[str, float | None]:
    raw, refined = (result.scores[side]["miou"].item() for side in SIDES)
    interval = result.interval
    if interval is not None and not math.isfinite(interval.low):
        interval = None
    return {
        "raw": raw,
        "refined": refined,
        "gain": refined - raw,
        "low": None if interval is None else interval.low,
        "high": None if interval is None else interval.high,
    }


def _verdict(result: ComparisonResult) -> str:
    """Return a sentence on what the gain means."""
    raw, refined = (result.scores[side]["miou"].item() for side in SIDES)
    if math.isnan(refined - raw):
        return "No pixel was scored."
    images = len(result.totals)
    interval = result.interval
    if interval is None or math.isnan(interval.low):
        return "One image alone cannot show whether a gain is luck."
    if interval.is_noise:
        return f"With these {images} images the true difference may be zero."
    if (refined - raw) * result.same_classes_gain <= 0:
        return "Over the classes of both means there is no such difference."
    word = "better" if refined > raw else "worse"
    return f"SAM makes these masks {word}, by more than the choice of {images} images explains."


def _means(result: ComparisonResult) -> Iterator[dict[str, Any]]:
    scores = result.scores
    for label, name in (
        ("mIoU", "miou"),
        ("mean Dice (F1)", "mdice"),
        ("pixel accuracy", "pixel_acc"),
        ("class accuracy", "class_acc"),
        ("frequency-weighted IoU", "fwiou"),
    ):
        yield _row(label, *(scores[side][name].item() for side in SIDES))
    for label, name in (
        ("Boundary IoU (2% of the diagonal)", "boundary_iou"),
        ("boundary F1 (0.75% of the diagonal)", "boundary_f1"),
    ):
        yield _row(label, *(scores[side][name].nanmean().item() for side in SIDES))
    for width in result.widths:
        label = f"trimap mIoU, {width} px"
        yield _row(label, *(result.trimap_miou(side, width) for side in SIDES))


def _classes(result: ComparisonResult) -> Iterator[dict[str, Any]]:
    colors = _hex_colors(len(result.class_names))
    pixels = result.matrices["raw"][-1].sum(dim=1)[: len(result.class_names)]
    for index, name in enumerate(result.class_names):
        raw, refined = (result.scores[side]["iou"][index].item() for side in SIDES)
        if math.isnan(raw) and math.isnan(refined):
            continue
        edges = (result.scores[side]["boundary_iou"][index].item() for side in SIDES)
        yield {
            "color": colors[index],
            "share": (pixels[index] / pixels.sum().clamp(min=1)).item(),
            "iou": _row(name, raw, refined),
            "boundary": _row(name, *edges),
            **dict(zip(KINDS, result.changes[:, index].tolist(), strict=True)),
        }


def _row(label: str, raw: float, refined: float) -> dict[str, Any]:
    return {"label": label, "raw": raw, "refined": refined, "gain": refined - raw}


def _charts(section: ReportSection) -> Iterator[dict[str, str]]:
    result = section.result
    drawn: list[tuple[str, Figure]] = [
        ("IoU of every class, raw and refined", draw_class_bars(result)),
        ("Pixels of a class called another, raw and refined", draw_confusions(result)),
        ("mIoU in bands around borders, raw and refined", draw_trimaps(result)),
        ("True IoU of regions by predicted IoU", draw_reliability(result.calibration)),
    ]
    if len(section.curve) > 1:
        label = f"mIoU and trimap mIoU over {curve_unit(section.curve)}s"
        drawn.append((label, draw_curve(section.curve)))
    for index, (label, figure) in enumerate(drawn):
        yield {"label": label, "svg": _svg(figure, f"{section.title}-{index}")}


def _svg(figure: Figure, salt: str) -> str:
    """Return an inline SVG element whose text stays text, its ids different from other charts'."""
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": salt, "font.family": "sans-serif"}
    buffer = StringIO()
    with matplotlib.rc_context(settings):
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Ids that matplotlib counts up, as in "axes_1", come again in the next chart.
    return re.sub(r'\sid="(?!\w*[0-9a-f]{8})[^"]*"', "", text)


def _hex_colors(num_classes: int) -> list[str]:
    return [_hex(color) for color in class_colors(num_classes).tolist()]


def _hex(rgb: Sequence[int]) -> str:
    return "#" + bytes(rgb).hex()


def _percent(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{100 * value:.2f}"


def _points(value: float | None) -> str:
    if value is None or math.isnan(value):
        return "-"
    text = f"{100 * value:+.2f}"
    return "0.00" if text in ("+0.00", "-0.00") else text  # a sign would claim a difference


def _fixed(value: float, digits: int = 3) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"
