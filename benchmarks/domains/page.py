"""QUALITY.md from the counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

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
    most_first = sorted(counts.values(), key=len, reverse=True)  # in the methods' order
    names = list(dict.fromkeys(n for of_pair in most_first for n in of_pair if n != RAW))
    gains = {n: [_gain(of, n) for of in counts.values() if n in of] for n in names}
    lines = [
        "# What refines best, on eight data sets",
        "",
        f"`python -m benchmarks.domains.run --split {split}`: gains in mIoU over the raw "
        "prediction, in points, with the 95% interval of a paired bootstrap over the images. mIoU "
        "is that of one confusion matrix over a split, SAM is `vit_t`. A dash is not measured.",
        "",
        "| pair | images | raw | " + " | ".join(names) + " |",
        "| --- | ---: | ---: |" + " ---: |" * len(names),
    ]
    for pair, of_pair in counts.items():
        raw = of_pair[RAW][:, _WHOLE]
        cells = _cells(of_pair, names, _with_interval)
        lines.append(f"| {pair} | {len(raw)} | {miou(raw):.1f} | {cells} |")
    whole = [n if len(gains[n]) == len(counts) else None for n in names]
    means = [f"**{np.mean(gains[n]):+.2f}**" if n else "-" for n in whole]
    worst = [f"{min(gains[n]):+.2f}" if n else "-" for n in whole]
    lines += [f"| **mean** | | | {' | '.join(means)} |"]
    lines += [f"| worst pair | | | {' | '.join(worst)} |"]
    for title, cell in (
        ("Trimap, 3 px", lambda of_pair, name: f"{_gain(of_pair, name, _TRIMAP):+.2f}"),
        ("The class that loses most", None),
        ("Share of images with fewer right pixels than before, in %", _hurt),
    ):
        lines += ["", f"## {title}", "", "| pair | " + " | ".join(names) + " |"]
        lines.append("| --- |" + " ---: |" * len(names))
        for pair, of_pair in counts.items():
            own = cell or partial(_worst, classes=classes[pair])
            lines.append(f"| {pair} | {_cells(of_pair, names, own)} |")
    return "\n".join(lines) + "\n"


def _cells(
    of_pair: Mapping[str, np.ndarray],
    names: Sequence[str],
    cell: Callable[[Mapping[str, np.ndarray], str], str],
) -> str:
    return " | ".join(cell(of_pair, name) if name in of_pair else "-" for name in names)


def _gain(methods: Mapping[str, np.ndarray], name: str, what: int = _WHOLE) -> float:
    return miou(methods[name][:, what]) - miou(methods[RAW][:, what])


def _with_interval(methods: Mapping[str, np.ndarray], name: str) -> str:
    low, high = interval(methods[name][:, _WHOLE], methods[RAW][:, _WHOLE])
    return f"{_gain(methods, name):+.2f} ({low:+.1f}…{high:+.1f})"


def _worst(methods: Mapping[str, np.ndarray], name: str, classes: Sequence[str]) -> str:
    worst, change = worst_class(methods[name][:, _WHOLE], methods[RAW][:, _WHOLE])
    return f"{classes[worst]} {change:+.1f}"


def _hurt(methods: Mapping[str, np.ndarray], name: str) -> str:
    return f"{share_hurt(methods[name][:, _WHOLE], methods[RAW][:, _WHOLE]):.0f}"
