"""When a choice of thresholds is certain enough."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Objective = Literal["miou", "trimap_miou"]
OBJECTIVES: tuple[Objective, ...] = ("miou", "trimap_miou")


@dataclass(frozen=True)
class Rule:
    """When something is certain enough to be chosen.

    Attributes:
        objective: What is maximized: mIoU of the whole images or of the trimap bands.
        margin: A class is refined where the lower bound of its gain in IoU is above it. 0 asks
            for certainty; -0.01 lets a class in that may lose a point.
        confidence: Of the bounds' two-sided intervals, in (0, 1).
        resamples: How many times the images are drawn with replacement.
        seed: Of the draws.

    Raises:
        TypeError: No number.
        ValueError: A value outside its range.
    """

    objective: Objective = "miou"
    margin: float = 0.0
    confidence: float = 0.95
    resamples: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("margin", "confidence"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{name}: got {value!r}, accepted is a number")
        if self.objective not in OBJECTIVES:
            raise ValueError(
                f"objective: got {self.objective!r}, accepted are 'miou' and 'trimap_miou'"
            )
        if not -1 <= self.margin <= 1:
            raise ValueError(f"margin: got {self.margin}, accepted is an IoU in [-1, 1]")
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence: got {self.confidence}, accepted is in (0, 1)")
