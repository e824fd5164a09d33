"""The grid and the rule of `samrefine task=tune`, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from typing import Any, Literal

from lightning_samrefine.config import RefineConfig
from lightning_samrefine.utils.validation import check_count, check_number

Objective = Literal["miou", "trimap_miou"]
OBJECTIVES: tuple[Objective, ...] = ("miou", "trimap_miou")
RESAMPLES = 1000  # number of times the images are drawn with replacement


@dataclass(frozen=True)
class Cell:
    """One combination of thresholds.

    See `RefineConfig`.
    """

    score_thresh: float
    mask_prompt_scale: float
    pred_iou_thresh: float

    def config(self, base: RefineConfig) -> RefineConfig:
        """Return ``base`` with these thresholds."""
        return replace(base, **vars(self))


@dataclass(frozen=True)
class Grid:
    """All combinations of some values of three thresholds.

    Args:
        score_thresh: Values of τ_c.
        mask_prompt_scale: Values of τ_m.
        pred_iou_thresh: Values of τ_iou.

    Raises:
        TypeError: Not a sequence of numbers.
        ValueError: No value, two equal ones, or one outside the range of `RefineConfig`.
    """

    score_thresh: Sequence[float]
    mask_prompt_scale: Sequence[float]
    pred_iou_thresh: Sequence[float]

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, _values(field.name, getattr(self, field.name)))

    def acting_on(self, base: RefineConfig) -> Grid:
        """Return the grid with the values of ``base`` for thresholds without effect.

        Without prompted regions none of the three affects the fusion, and without mask prompts
        their scale has no effect.
        """
        idle = set() if base.mask_prompts else {"mask_prompt_scale"}
        if not base.prompt_regions:
            idle = {field.name for field in fields(self)}
        return replace(self, **{name: (getattr(base, name),) for name in idle})

    @property
    def pairs(self) -> list[tuple[float, float]]:
        """The combinations of τ_c and τ_m: SAM predicts masks once for each."""
        return list(product(self.score_thresh, self.mask_prompt_scale))

    @property
    def cells(self) -> list[Cell]:
        """All cells, pair by pair, τ_iou ascending in each."""
        return [Cell(*pair, iou) for pair in self.pairs for iou in self.pred_iou_thresh]


@dataclass(frozen=True)
class Rule:
    """Objective and required certainty of a choice.

    Attributes:
        objective: The maximized metric: mIoU of the whole images or of the trimap bands.
        margin: Minimum lower bound of a refined class's gain in IoU (exclusive). 0 requires a
            certain gain; -0.01 accepts a class that may lose a point.
        confidence: Confidence of the bounds' two-sided intervals, in (0, 1).
        folds: Number of folds of the cross-validation, at least 2.

    Raises:
        TypeError: Not a number.
        ValueError: A value outside its range.
    """

    objective: Objective = "miou"
    margin: float = 0.0
    confidence: float = 0.95
    folds: int = 5

    def __post_init__(self) -> None:
        for name in ("margin", "confidence"):
            check_number(name, getattr(self, name))
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective must be 'miou' or 'trimap_miou', got {self.objective!r}")
        if not -1 <= self.margin <= 1:
            raise ValueError(f"margin must be an IoU in [-1, 1], got {self.margin}")
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence must be in (0, 1), got {self.confidence}")
        check_count("folds", self.folds, least=2)


def _values(name: str, values: Any) -> tuple[float, ...]:
    """Return one threshold's values in ascending order."""
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise TypeError(
            f"{name} must be a sequence of numbers, got {values!r} of type {type(values).__name__}"
        )
    for value in values:
        RefineConfig(**{name: value})
    if not values or len(set(values)) < len(values):
        raise ValueError(f"{name} must be one or more different numbers, got {list(values)}")
    return tuple(sorted(float(value) for value in values))
