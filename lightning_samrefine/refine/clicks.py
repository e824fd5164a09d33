"""Where the positive click of a region lies (docs/algorithm4.md, step 3)."""

from __future__ import annotations

import numpy as np


def click_positions(
    values: np.ndarray,
    starts: np.ndarray,
    lengths: np.ndarray,
    components: np.ndarray,
    ids: np.ndarray,
) -> np.ndarray:
    """Return (N,) int64 flat positions of the clicks, one a component.

    A click lies at the component's largest value, the first of equal ones.

    Args:
        values: (h_d, w_d) finite values.
        starts: (R,) int64, flat position of the first pixel of each run of one component.
        lengths: (R,) int64, pixels of each run.
        components: (R,) int64, component id of each run.
        ids: (N,) int64, the components to search.
    """
    if len(ids) == 0:
        return np.empty(0, np.int64)
    values = np.ascontiguousarray(values).ravel()
    count = int(components.max()) + 1
    longest = np.maximum.reduceat(values, starts)
    best = np.full(count, -np.inf, values.dtype)
    np.maximum.at(best, components, longest)
    holding = np.flatnonzero(longest == best[components])
    first = np.full(count, len(starts))
    np.minimum.at(first, components[holding], holding)
    return np.array(
        [
            start + values[start : start + length].argmax()
            for start, length in zip(starts[first[ids]], lengths[first[ids]], strict=True)
        ]
    )
