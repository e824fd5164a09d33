"""Checks of argument values."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

_SHOWN = 5


class WrongValuesError(ValueError):
    """Values which show that earlier batches of the same loader were read wrongly as well."""


def check_range(low: float, high: float) -> None:
    """Raise for values that are not probabilities, given their minimum and maximum."""
    # NaN fails both comparisons; float16 softmax may exceed 1 by its last bit.
    if not (low >= 0 and high <= 1 + 1e-3):
        raise ValueError(
            "probs must be probabilities in [0, 1] without NaN, got values from "
            f"{low:.4g} to {high:.4g} (apply softmax to logits)"
        )


def as_integer(value: Any) -> int | None:
    """Return an integer of Python, NumPy or torch (also in a 0-D array), else None."""
    is_bool = isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool")
    if is_bool or getattr(value, "ndim", 0) != 0:
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def check_count(name: str, value: Any, least: int = 1, alternative: str = "") -> int:
    """Return an integer of at least ``least``; the error also lists the ``alternative``.

    Raises:
        TypeError: Not an integer.
        ValueError: Too small.
    """
    required = f"{name} must be an integer of at least {least} {alternative}".rstrip()
    number = as_integer(value)
    if number is None:
        raise TypeError(f"{required}, got {value!r} of type {type(value).__name__}")
    if number < least:
        raise ValueError(f"{required}, got {value!r}")
    return number


def check_number(name: str, value: Any) -> float:
    """Return a number as a float.

    Raises:
        TypeError: Not a number.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}")
    return float(value)


def some_of(values: Iterable[Any]) -> str:
    """Return the first few values, and the number of the others, as text."""
    texts = list(map(str, values))
    more = len(texts) - _SHOWN
    return ", ".join(texts[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
