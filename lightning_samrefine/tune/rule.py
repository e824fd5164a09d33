"""The rule that decides when a gain is certain enough."""

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
        margin: A class is refined if the lower bound of its gain in IoU is above it. 0 means
            certainty; -0.01 admits a class that may lose a point.
        confidence: Of the bounds' two-sided intervals, in (0, 1).
        resamples: Number of times the images are drawn with replacement.
        seed: Seed of the draws.

    Raises:
        TypeError: Not a number.
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
                raise TypeError(f"{name} must be a number, got {value!r}")
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective must be 'miou' or 'trimap_miou', got {self.objective!r}")
        if not -1 <= self.margin <= 1:
            raise ValueError(f"margin must be an IoU in [-1, 1], got {self.margin}")
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence must be in (0, 1), got {self.confidence}")
