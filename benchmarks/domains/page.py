"""QUALITY.md from the counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from benchmarks.domains.counts import interval, miou, share_hurt, worst_class

RAW = "raw"
_WHOLE, _TRIMAP = 0, 1


def page(
    counts: Mapping[str, Mapping[str, np.ndarray]], classes: Mapping[str, Sequence[str]], split: str
) -> str:
    """Write the page.

    Args:
        counts: By pair, by method, (N, 2, C, C) int64.
        classes: The pairs' class names.
        split: Where the images are from.
    """
    pairs = list(counts)
    names = [name for name in next(iter(counts.values())) if name != RAW]
    gains = {name: [_gain(counts[pair], name) for pair in pairs] for name in names}
    lines = [
        "# What refines best, on eight data sets",
        "",
        f"`python -m benchmarks.domains.run --split {split}`: gains in mIoU over the raw "
        "prediction, in points, with the 95% interval of a paired bootstrap over the images. mIoU "
        "is that of one confusion matrix over a split, SAM is `vit_t`.",
        "",
        "| pair | images | raw | " + " | ".join(names) + " |",
        "| --- | ---: | ---: |" + " ---: |" * len(names),
    ]
    for row, pair in enumerate(pairs):
        raw = counts[pair][RAW][:, _WHOLE]
        cells = [_with_interval(counts[pair], name, gains[name][row]) for name in names]
        lines.append(f"| {pair} | {len(raw)} | {miou(raw):.1f} | {' | '.join(cells)} |")
    lines += [
        "| **mean** | | | "
        + " | ".join(f"**{np.mean(gains[name]):+.2f}**" for name in names)
        + " |",
        "| worst pair | | | " + " | ".join(f"{min(gains[name]):+.2f}" for name in names) + " |",
    ]
    for title, cell in (("Trimap, 3 px", _trimap), ("The class that loses most", None)):
        lines += ["", f"## {title}", "", "| pair | " + " | ".join(names) + " |"]
        lines.append("| --- |" + " ---: |" * len(names))
        for pair in pairs:
            of_pair = counts[pair]
            cells = [
                cell(of_pair, name) if cell else _worst(of_pair, name, classes[pair])
                for name in names
            ]
            lines.append(f"| {pair} | {' | '.join(cells)} |")
    lines += ["", "## Share of images with fewer right pixels than before, in %", ""]
    lines += ["| pair | " + " | ".join(names) + " |", "| --- |" + " ---: |" * len(names)]
    for pair in pairs:
        raw = counts[pair][RAW][:, _WHOLE]
        cells = [f"{share_hurt(counts[pair][name][:, _WHOLE], raw):.0f}" for name in names]
        lines.append(f"| {pair} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _gain(methods: Mapping[str, np.ndarray], name: str, what: int = _WHOLE) -> float:
    return miou(methods[name][:, what]) - miou(methods[RAW][:, what])


def _with_interval(methods: Mapping[str, np.ndarray], name: str, gain: float) -> str:
    low, high = interval(methods[name][:, _WHOLE], methods[RAW][:, _WHOLE])
    return f"{gain:+.2f} ({low:+.1f}…{high:+.1f})"


def _trimap(methods: Mapping[str, np.ndarray], name: str) -> str:
    return f"{_gain(methods, name, _TRIMAP):+.2f}"


def _worst(methods: Mapping[str, np.ndarray], name: str, classes: Sequence[str]) -> str:
    worst, change = worst_class(methods[name][:, _WHOLE], methods[RAW][:, _WHOLE])
    return f"{classes[worst]} {change:+.1f}"
