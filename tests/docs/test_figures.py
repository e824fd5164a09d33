"""The gains in README and docs/choosing.md are those of benchmarks/QUALITY.md."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
MEASURED = {
    "auto": "`auto`, fitted on val",
    "control": "the same without SAM",
    "fast": "fast",
    "default": "default",
    "algorithm4": "algorithm4",
    "DenseCRF": "DenseCRF",
    "mode filter": "mode filter, 5 px",
}
CAMVID = "CamVid ESPNet"


def rows(page: str, start: str = "|") -> list[list[str]]:
    """Return the cells of the table lines of a page that begin with a string."""
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    return [
        [cell.strip(" *") for cell in line.strip("|").split("|")]
        for line in lines
        if line.startswith(start)
    ]


@pytest.fixture(scope="module")
def gains() -> dict[str, dict[str, float]]:
    """Gains in mIoU by method and data set, from the first table of QUALITY.md."""
    header, _, *lines = rows("benchmarks/QUALITY.md")
    found: dict[str, dict[str, float]] = {name: {} for name in MEASURED}
    for line in lines:
        if line[0] == "mean":
            break
        for name, column in MEASURED.items():
            if number := re.match(r"[+-]\d+\.\d+", line[header.index(column)]):
                found[name][line[0]] = float(number[0])
    return found


def points(value: float) -> str:
    """Return a gain as the pages write it."""
    return "0.0" if abs(value) < 0.05 else f"{value:+.1f}"


def test_readme(gains):
    (auto,), (fast,) = (
        rows("README.md", '| `refine="auto"`'),
        rows("README.md", '| `refine="fast"`'),
    )
    for name, row in (("auto", auto), ("fast", fast)):
        every = list(gains[name].values())
        assert len(every) == 8
        assert row[1:3] == [points(np.mean(every)), points(min(every))]
    assert auto[3] == points(np.mean(list(gains["control"].values())))


def test_choosing(gains):
    for name, start in (
        ("auto", "| `auto`, fitted"),
        ("control", "| `auto` without SAM"),
        ("fast", "| `fast` | +"),
        ("default", "| `default` | +"),
        ("algorithm4", "| `algorithm4` | -"),
        ("DenseCRF", "| DenseCRF"),
        ("mode filter", "| mode filter"),
    ):
        (row,) = rows("docs/choosing.md", start)
        every = gains[name]
        assert len(every) == 8
        assert row[1] == points(np.mean(list(every.values())))
        assert row[2] == points(np.mean([every[pair] for pair in every if pair != CAMVID]))
        assert row[3] == points(min(every.values()))
