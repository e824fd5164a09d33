"""Checks of values, before any work is done."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch
from torch import Tensor


class WrongValuesError(ValueError):
    """Values that put the reading of earlier batches of the same loader in doubt, too."""


def check_range(low: float, high: float) -> None:
    """Refuse values that are no probabilities, by the smallest and the largest of them."""
    # NaN fails both comparisons; float16 softmax may exceed 1 by its last bit.
    if not (low >= 0 and high <= 1 + 1e-3):
        raise ValueError(
            f"probs: got values from {low:.4g} to {high:.4g}, accepted are probabilities in "
            "[0, 1] without NaN (apply softmax to logits)"
        )


def as_integer(value: Any) -> int | None:
    """Return an integer of Python, NumPy or torch (also in an array of no dimension), else None."""
    if isinstance(value, bool | np.bool_) or getattr(value, "ndim", 0) != 0:
        return None
    if isinstance(value, Tensor) and (value.dtype == torch.bool or value.is_floating_point()):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def check_count(name: str, value: Any, least: int = 1) -> int:
    """Return an integer of at least ``least``, and refuse anything else.

    Raises:
        TypeError: Not an integer.
        ValueError: Too small.
    """
    required = f"{name} must be an integer of at least {least}"
    number = as_integer(value)
    if number is None:
        raise TypeError(f"{required}, got {value!r} of type {type(value).__name__}")
    if number < least:
        raise ValueError(f"{required}, got {value!r}")
    return number
