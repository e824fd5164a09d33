"""QUALITY.md from the counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from benchmarks.camvid.data import CLASS_NAMES
from benchmarks.quality.counts import Frames, interval, ious, miou, shared
from lightning_samrefine.demo.scenes import CLASS_NAMES as SCENE_CLASSES

CHOICES = Path(__file__).parent / "choices.md"  # what was tried on val, by hand
RAW, DEFAULT = "raw", "`default`"
TITLES = {
    "full": "ESPNet at 480x360",
    "half": "ESPNet at 240x176, enlarged",
    "cityscapes": "ESPNetv2 trained on Cityscapes, classes mapped",
    "bsds": "BSDS500, human segmentations coarsened 16-fold",
    "scenes": "Procedural scenes, their true labels coarsened 16-fold",
}
# The segments of BSDS500 have no names.
_CLASSES = dict.fromkeys(("full", "half", "cityscapes"), CLASS_NAMES) | {"scenes": SCENE_CLASSES}
_PER_CLASS = (RAW, "`algorithm4`", "`fast`", DEFAULT)


def quality_page(counts: Mapping[str, Mapping[str, Frames]], names: Sequence[str]) -> str:
    """Write the page.

    Args:
        counts: By inputs, by method, by frame.
        names: The methods in the order of the table.
    """
    parts = [
        "# What refines best on CamVid",
        "",
        "`python -m benchmarks.quality.run`",
        "",
        "All methods get the same probabilities, and SAM's all the same `vit_t`. mIoU in % of one "
        "confusion matrix of all frames, void ground truth ignored; trimap: pixels within 3 px of "
        "a border. Gains are over raw on the same frames, in points, with the 95% interval of a "
        "paired bootstrap over frames (neighboring frames look alike, so the true interval is "
        "wider). Seconds are CPU time on one core, the median of the frames, without the image "
        "encoder, whose own time stands in the row of raw; the presets that ask without mask "
        "prompts are timed when they see a prediction again, and a cache answers in SAM's place.",
        "",
    ]
    for key, title in TITLES.items():
        if key in counts:
            parts += [f"## {title}", "", *_table(counts[key], names), ""]
            if key in _CLASSES:
                parts += [*_classes(counts[key], _CLASSES[key]), ""]
    return "\n".join(parts) + "\n" + CHOICES.read_text(encoding="utf-8")


def _table(methods: Mapping[str, Frames], names: Sequence[str]) -> list[str]:
    lines = [
        "| method | frames | mIoU | gain | trimap gain | `default` is better by | seconds |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in names:
        if name not in methods:
            continue
        frames, raw = shared(methods[name], methods[RAW])
        best, rival = shared(methods[DEFAULT], methods[name])
        seconds = median(frame.seconds for frame in frames.values())
        lines.append(
            f"| {name} | {len(frames)} | {100 * miou(frames):.2f} | "
            f"{'' if name == RAW else _difference(frames, raw)} | "
            f"{'' if name == RAW else _difference(frames, raw, 'trimap')} | "
            f"{'' if name == DEFAULT else _difference(best, rival)} | {seconds:.2f} |"
        )
    return lines


def _difference(frames: Frames, others: Frames, what: str = "whole") -> str:
    gain = 100 * (miou(frames, what) - miou(others, what))
    low, high = (100 * end for end in interval(frames, others, what))
    return f"{gain:+.2f} ({low:+.1f}…{high:+.1f})"


def _classes(methods: Mapping[str, Frames], class_names: Sequence[str]) -> list[str]:
    names = [name for name in _PER_CLASS if name in methods]
    raw, gains = ious(methods[RAW]), {}
    for name in names:
        frames, same = shared(methods[name], methods[RAW])
        gains[name] = ious(frames) - ious(same)
    lines = [
        f"| class | raw IoU | {' | '.join(names[1:])} |",
        "| --- | ---: |" + " ---: |" * (len(names) - 1),
    ]
    for c, class_name in enumerate(class_names):
        cells = " | ".join(f"{100 * gains[name][c].item():+.2f}" for name in names[1:])
        lines.append(f"| {class_name} | {100 * raw[c].item():.2f} | {cells} |")
    return lines
