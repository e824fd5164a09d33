"""Metrics draw themselves as those of torchmetrics do: the values are in the lines."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt

from lightning_samrefine.metrics.comparison import RefinementComparison

mpl.use("agg")


@pytest.fixture
def maps():
    return torch.randint(0, 3, (3, 9, 11), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def lines(axes):
    return {line.get_label(): line.get_ydata() for line in axes.get_lines()}


def test_comparisons(maps):
    comparison = RefinementComparison(3)
    comparison.update(*maps)
    figures = comparison.compute()
    _, axes = comparison.plot()
    drawn = lines(axes)
    for name in ("miou_raw", "miou_refined", "trimap_miou_raw", "trimap_miou_refined"):
        assert drawn[name] == pytest.approx([figures[name]])
    own = plt.figure().subplots()
    assert comparison.plot([figures, {"miou_raw": 0.5}], ax=own) == (None, own)
    drawn = lines(own)
    assert drawn["miou_raw"] == pytest.approx([figures["miou_raw"], 0.5])
    assert np.isnan(drawn["miou_refined"][1])
