"""The benchmark over many data sets: its figures are torchmetrics', and it runs."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torchmetrics.classification import MulticlassJaccardIndex

sys.path.append(str(Path(__file__).parents[2]))

from benchmarks.domains import run
from benchmarks.domains.counts import count, interval, miou, share_hurt, worst_class
from benchmarks.domains.page import page
from benchmarks.domains.pairs import IGNORED


def maps(seed, classes=4, size=(5, 30, 40)):
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(0, classes, size, generator=generator)
    noise = torch.rand(size, generator=generator)
    raw = torch.where(noise < 0.6, target, torch.randint(0, classes, size, generator=generator))
    refined = torch.where(noise < 0.8, target, raw)
    target[:, :3] = IGNORED
    return raw, refined, target


def stacked(labels, target, classes=4):
    pairs = zip(labels, target, strict=True)
    return np.stack([count(own, truth, classes)[0] for own, truth in pairs])


def test_miou_is_that_of_torchmetrics():
    raw, refined, target = maps(0)
    metric = MulticlassJaccardIndex(4, ignore_index=IGNORED)
    for labels in (raw, refined):
        expected = 100 * metric(labels, target).item()
        assert miou(stacked(labels, target)) == pytest.approx(expected, abs=1e-4)


def test_gains_and_losses_by_hand():
    raw, refined, target = maps(0)
    better, worse = stacked(refined, target), stacked(raw, target)
    gain = miou(better) - miou(worse)
    low, high = interval(better, worse)
    assert 0 < low < gain < high
    assert share_hurt(better, worse) == 0
    assert share_hurt(worse, better) == 100

    broken = raw.clone()
    broken[target == 2] = 1
    worst, change = worst_class(stacked(broken, target), worse)
    metric = MulticlassJaccardIndex(4, ignore_index=IGNORED, average="none")
    assert worst == 2
    assert change == pytest.approx(-100 * metric(raw, target)[2].item(), abs=1e-4)


def test_a_method_that_a_pair_lacks_is_a_dash_and_has_no_mean():
    raw, refined, target = maps(0)
    both = {
        name: np.stack([count(*own, 4) for own in zip(labels, target, strict=True)])
        for name, labels in (("raw", raw), ("fast", refined), ("slow", refined))
    }
    few = {name: both[name] for name in ("raw", "fast")}
    classes = dict.fromkeys(("one", "other"), tuple("abcd"))
    text = page({"one": few, "other": both}, classes, "val")
    gain = miou(both["fast"][:, 0]) - miou(both["raw"][:, 0])
    rows = [line.split(" | ") for line in text.splitlines()]
    (mean,) = (row for row in rows if row[0] == "| **mean**")
    assert mean[-2:] == [f"**{gain:+.2f}**", "- |"]
    one, other = (next(row for row in rows if row[0] == f"| {name}") for name in ("one", "other"))
    assert one[3].startswith(f"{gain:+.2f} (")
    assert one[4] == "- |"
    assert other[4].startswith(f"{gain:+.2f} (")


@pytest.mark.data
@pytest.mark.slow
def test_one_image_of_two_pairs(data_root, tmp_path, monkeypatch, capsys):
    if not (data_root / "domains").is_dir():
        pytest.skip(f"{data_root} has no folder domains")
    monkeypatch.setenv("SAMREFINE_DATA", str(data_root))
    values = ["--limit", "1", "--pairs", "nuclei", "CamVid ESPNet", "--output", str(tmp_path)]
    run.main([*values, "--methods", "fast", "mode filter, 5 px"])
    written = (tmp_path / "QUALITY.md").read_text()
    assert written in capsys.readouterr().out
    rows = [line for line in written.splitlines() if line.startswith("| nuclei | 1 |")]
    assert len(rows) == 1
    # Kept: the second run computes nothing.
    monkeypatch.setattr(run, "count", lambda *_: pytest.fail("counted again"))
    run.main([*values, "--methods", "fast", "mode filter, 5 px"])
    assert (tmp_path / "QUALITY.md").read_text() == written
    monkeypatch.setattr(run, "examples", lambda *_: pytest.fail("predicted again"))
    run.main([*values, "--methods", "fast", "mode filter, 5 px", "default", "--kept"])
    assert (tmp_path / "QUALITY.md").read_text() == written
