"""What is chosen from counts: certain gains are taken, everything else stays raw."""

from dataclasses import asdict

import numpy as np
import pytest
import torch
from command_runs import CLASSES, SMALL, composed, execute, overrides, write_folder
from omegaconf import OmegaConf
from PIL import Image

from lightning_samrefine import RefineConfig
from lightning_samrefine.cli.main import run
from lightning_samrefine.config_files import read_refine
from lightning_samrefine.metrics.bootstrap import class_ious
from lightning_samrefine.tune.choice import best_cell, choose, folds, gain
from lightning_samrefine.tune.counts import GridCounts, Scoring, Truth
from lightning_samrefine.tune.report import NO_HELP
from lightning_samrefine.tune.settings import Grid, Rule

pytestmark = pytest.mark.numerical

GRID = Grid([0.0], [8.0], [0.3, 0.6, 0.9])
SCORING = Scoring(num_classes=5, ignore_index=255, trimap_width=2)
BASE = RefineConfig()
BACKGROUND, GAINS, LOSES, VARIES, SLOW = range(5)


def columns(c):
    """The pixels of an object of a class, in a frame of 20x50."""
    return slice(10 * c + 2, 10 * c + 8)


def scene(rng, luck=3):
    """One frame: every object misses its lower rows in the raw map."""
    target = torch.zeros(20, 50, dtype=torch.int64)
    for c in range(1, 5):
        target[4:16, columns(c)] = c
    raw = target.clone()
    for c in range(1, 5):
        raw[12:16, columns(c)] = BACKGROUND

    def refined(moves):
        labels = raw.clone()
        for c, rows in moves.items():
            labels[12 : 12 + max(rows, 0), columns(c)] = c
            if rows < 0 and c == VARIES:  # it grows too far
                labels[16 : 16 - rows, columns(c)] = c
            elif rows < 0:
                labels[4 : 4 - rows, columns(c)] = BACKGROUND
        return labels

    loose = {GAINS: 3, LOSES: -2, VARIES: luck, SLOW: -2}
    middle = {GAINS: 3, LOSES: -2, VARIES: luck, SLOW: -1}
    tight = {GAINS: int(rng.integers(0, 2)), LOSES: -2, SLOW: 3}
    return target, raw, [refined(moves) for moves in (loose, middle, tight)]


@pytest.fixture(scope="module")
def counts():
    rng = np.random.default_rng(0)
    found = GridCounts(SCORING, len(GRID.cells))
    for image in range(30):
        target, raw, cells = scene(rng, luck=3 if image % 2 else -4)
        truth = Truth(raw, target, SCORING)
        found.add(truth.totals, [truth.changes(labels) for labels in cells])
    return found


EVERY = np.arange(30)


def test_certain_gains_are_open_and_losses_and_luck_are_closed(counts):
    choice = choose(counts, GRID, EVERY, Rule())
    assert choice.is_open == (True, True, False, False, True)
    assert choice.low[GAINS] > 0.1
    assert choice.low[LOSES] < -0.1
    config = choice.config(GRID, BASE)
    assert config.classes == (BACKGROUND, GAINS, SLOW)


def test_a_class_gets_its_own_threshold_where_that_certainly_gains(counts):
    choice = choose(counts, GRID, EVERY, Rule())
    config = choice.config(GRID, BASE)
    own = config.class_pred_iou_thresh or {}
    threshold = {c: own.get(c, config.pred_iou_thresh) for c in config.classes}
    assert threshold[GAINS] in (0.3, 0.6)
    assert threshold[SLOW] == 0.9
    totals = counts.mixed_totals(choice.cell_of_class, np.array(choice.is_open), "miou")
    assert gain(totals) > gain(counts.totals(best_cell(counts, GRID, EVERY, "miou"), "miou"))


def test_what_the_gate_promises_holds_in_the_counts(counts):
    choice = choose(counts, GRID, EVERY, Rule())
    totals = counts.mixed_totals(choice.cell_of_class, np.array(choice.is_open), "miou")
    raw, refined = class_ious(totals.sum(axis=0))
    assert refined[LOSES] == raw[LOSES]
    assert refined[VARIES] == raw[VARIES]
    assert refined[GAINS] > raw[GAINS]


def test_a_larger_margin_freezes_more_classes(counts):
    strict = choose(counts, GRID, EVERY, Rule(margin=0.9))
    assert strict.config(GRID, BASE).classes == ()
    lenient = choose(counts, GRID, EVERY, Rule(margin=-1.0))
    assert all(lenient.is_open)
    assert lenient.config(GRID, BASE).classes is None


def test_luck_in_one_image_is_no_evidence(counts):
    """Of the class that gains or loses by chance, it gains on some images alone."""
    gains = [
        np.subtract(*reversed(class_ious(counts.totals(0, "miou")[image])))[VARIES]
        for image in EVERY
    ]
    lucky = np.flatnonzero(np.array(gains) > 0)
    assert len(lucky) > 5
    assert choose(counts, GRID, lucky, Rule()).is_open[VARIES]
    assert not choose(counts, GRID, EVERY, Rule()).is_open[VARIES]


def test_of_equal_cells_the_strictest_is_chosen():
    target, raw, _ = scene(np.random.default_rng(1))
    truth = Truth(raw, target, SCORING)
    same = GridCounts(SCORING, 3)
    for _ in range(2):
        same.add(truth.totals, [truth.changes(raw)] * 3)
    assert best_cell(same, GRID, np.arange(2), "miou") == 2
    assert choose(same, GRID, np.arange(2), Rule()).config(GRID, BASE).classes == ()


def test_folds_are_neighbors_and_cover_all():
    parts = folds(7, 3)
    assert [part.tolist() for part in parts] == [[0, 1, 2], [3, 4], [5, 6]]
    assert len(folds(2, 5)) == 2


# --- data that SAM cannot help -------------------------------------------------------------------


@pytest.mark.slow
def test_where_the_raw_prediction_is_the_truth_nothing_is_refined(tmp_path, capsys):
    folder = write_folder(tmp_path / "data", count=3)
    for path in sorted((folder / "predictions").iterdir()):
        labels = np.load(path)["probs"].argmax(axis=0).astype(np.uint8)
        Image.fromarray(labels).save(folder / "labels" / f"{path.stem}.png")
    result = run(composed(tmp_path / "out", *overrides(folder, *SMALL)))
    assert result == 1.0
    written = tmp_path / "out" / "tuned.yaml"
    assert written.read_text().startswith(f"# {NO_HELP}")
    assert NO_HELP in capsys.readouterr().out
    assert read_refine(written).classes == ()
    assert read_refine(written).class_names == tuple(CLASSES)
    other = composed(tmp_path / "other", *overrides(folder, "data.class_names=[a,b,c,d]"))
    other.refine = asdict(read_refine(written))
    with pytest.raises(ValueError, match=r"tuned for the 4 classes of this run \(a, b, c, d\)"):
        run(other)
    _, metrics = execute(tmp_path / "again", *overrides(folder, "refine.classes=[]"))
    assert metrics["val/miou_refined"] == 1.0
    assert metrics["val/refine_regions_per_image"] == 0
    assert OmegaConf.load(tmp_path / "again" / "config.yaml").refine.classes == []


@pytest.mark.slow
def test_a_random_sam_refines_nothing(tmp_path):
    """Its masks have nothing to do with the image."""
    folder = write_folder(tmp_path / "data", count=4)
    sam = ["sam=vit_t", "sam.checkpoint=random", "tune.score_thresh=[0.0]"]
    values = overrides(folder, *SMALL, sam=sam)
    with pytest.warns(UserWarning, match="random weights"):
        result = run(composed(tmp_path / "out", *values))
    config = read_refine(tmp_path / "out" / "tuned.yaml")
    assert config.classes == ()
    assert NO_HELP in (tmp_path / "out" / "tuned.yaml").read_text()
    surface = (tmp_path / "out" / "surface.csv").read_text().splitlines()
    assert result == float(surface[1].split(",")[3])
