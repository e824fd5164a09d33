"""A row for each image of an evaluation: what it gained, at what cost."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class ImageRow:
    """One image.

    Attributes:
        name: The image's name.
        gain: miou_refined − miou_raw of this image alone, NaN if no pixel is scored.
        miou_raw: In [0, 1], the mean over the classes of the image's target, see
            `ImageComparison.mious`.
        miou_refined: In [0, 1], over the same classes.
        fixed_px: Pixels that became right.
        broken_px: Pixels that became wrong.
        swapped_px: Pixels that are wrong in another way.
        regions: Number of prompted regions.
        accepted: Number of accepted ones.
        seconds: The image's share of the time that its batch took.
        failed: Whether refining failed: the image keeps its raw prediction.
    """

    name: str
    gain: float
    miou_raw: float
    miou_refined: float
    fixed_px: int
    broken_px: int
    swapped_px: int
    regions: int
    accepted: int
    seconds: float
    failed: bool

    def values(self) -> list[Any]:
        """Return the values in the order of `COLUMNS`, None for NaN."""
        values = asdict(self).values()
        return [None if isinstance(one, float) and math.isnan(one) else one for one in values]


COLUMNS = tuple(field.name for field in fields(ImageRow))


def in_order(rows: Iterable[ImageRow]) -> list[ImageRow]:
    """Return the rows, the largest loss first; without a gain last."""
    return sorted(rows, key=lambda row: (math.isnan(row.gain), row.gain, row.name))


def to_csv(sections: Iterable[tuple[str, Iterable[ImageRow]]]) -> str:
    """Return the text of a CSV file.

    Args:
        sections: Titles of evaluations, such as ``"val, dataloader 1"``, and their rows.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["evaluation", *COLUMNS])
    for title, rows in sections:
        writer.writerows([title, *row.values()] for row in in_order(rows))
    return text.getvalue()
