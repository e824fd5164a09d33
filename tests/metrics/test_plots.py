"""Metrics draw themselves as those of torchmetrics do: the values are in the lines."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt

from lightning_samrefine.metrics import ChangeCounts, ConfusionMatrix
from lightning_samrefine.metrics.changes import ChangedPixels
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


def test_confusion_matrices(maps):
    metric = ConfusionMatrix(3)
    metric.update(maps[0], maps[1])
    _, axes = metric.plot(labels=["a", "b", "c"])
    expected = [((maps[1] == i) & (maps[0] == j)).sum().item() for i in range(3) for j in range(3)]
    assert [int(text.get_text()) for text in axes.texts] == expected


def test_changes(maps):
    metric = ChangeCounts(3)
    raw, refined, target = maps
    metric.update(ChangedPixels(raw, refined, target, torch.ones_like(target, dtype=torch.bool)))
    _, axes = metric.plot()
    fixed = (raw != target) & (refined == target)
    assert lines(axes)["fixed"].tolist() == [int((fixed & (target == c)).sum()) for c in range(3)]
