"""One pass over the grid: every cell is a run of its own, SAM looks once, the choice is kept."""

import csv
import io
import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from command_runs import CLASSES, EVERY_REGION, SMALL, composed, execute, overrides, write_folder
from random_predictions import blobs
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text
from stub_sams import SmallSam

from lightning_samrefine import RefineConfig, Refiner
from lightning_samrefine.adapters.batch_adapter import RefineInputs
from lightning_samrefine.cli.main import SetupError, run
from lightning_samrefine.config_files import read_refine
from lightning_samrefine.metrics.bootstrap import class_ious
from lightning_samrefine.metrics.comparison import RefinementComparison
from lightning_samrefine.refine.cache.embedding_cache import EmbeddingCache
from lightning_samrefine.reporting.summary import print_whole
from lightning_samrefine.tune.choice import gain
from lightning_samrefine.tune.counts import Scoring
from lightning_samrefine.tune.settings import Grid
from lightning_samrefine.tune.sweep import Sweep

SCORING = Scoring(num_classes=4, ignore_index=255, trimap_width=2)
GRID = Grid([0.5, 0.0], [8.0, 2.0], [0.3, 0.45, 0.6, 0.9])


def sample(seed, ignored=255):
    image, probs = blobs(seed=seed)
    _, shifted = blobs(seed=seed)
    target = shifted.roll((2, -3), dims=(1, 2)).argmax(dim=0)
    target[:5, :9] = ignored
    return RefineInputs(image[None], probs[None], probs.argmax(dim=0)[None], target[None])


class CountingSAM:
    """Counts the images that a SAM embeds."""

    def __init__(self, sam, monkeypatch):
        self.embedded = 0
        embed = sam.encode_images

        def counted(images):
            self.embedded += len(images)
            return embed(images)

        monkeypatch.setattr(sam, "encode_images", counted)


# --- the sweep -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("ignore_index", [255, 1])
def test_every_cell_is_a_run_of_its_own(random_sam, monkeypatch, ignore_index):
    scoring = replace(SCORING, ignore_index=ignore_index)
    base = RefineConfig(min_region_area=2, classes=(1,), class_pred_iou_thresh={2: 0.9})
    sweep = Sweep(GRID, base, scoring)
    samples = [sample(seed, ignore_index) for seed in range(2)]
    counter = CountingSAM(random_sam, monkeypatch)
    refiner = Refiner(random_sam, cache=EmbeddingCache("memory"))
    for inputs in samples:
        sweep(refiner, inputs)
    assert counter.embedded == len(samples)

    refined_differently = set()
    for index, cell in enumerate(GRID.cells):
        config = RefineConfig(min_region_area=2, **vars(cell))
        comparison = RefinementComparison(4, ignore_index, trimap_width=2)
        for inputs in samples:
            out = Refiner(random_sam, config)(inputs.images[0], inputs.probs[0])
            comparison.update(inputs.labels[0], out.labels, inputs.targets[0])
        figures = comparison.compute()
        refined_differently.add(figures["miou_refined"])
        totals = sweep.counts.totals(index, "miou")
        raw, refined = class_ious(totals.sum(axis=0))
        for name, iou in (("raw", raw), ("refined", refined)):
            expected = [figures.get(f"iou_{name}/{c}", np.nan) for c in range(4)]
            np.testing.assert_array_equal(iou, expected)
            assert np.nanmean(iou) == pytest.approx(figures[f"miou_{name}"], abs=1e-12)
        assert gain(totals) == pytest.approx(figures["miou_gain"], abs=1e-12)
        trimap = gain(sweep.counts.totals(index, "trimap_miou"))
        assert trimap == pytest.approx(figures["trimap_miou_gain"], abs=1e-12)
    assert len(refined_differently) > len(GRID.cells) // 2


def test_a_memory_limit_is_found_once_and_not_cell_by_cell():
    sam = SmallSam(MemoryError(), prompts=1)
    base = RefineConfig(min_region_area=2, max_prompts_per_batch=4)
    sweep, refiner = Sweep(GRID, base, SCORING), Refiner(sam)
    for seed in range(2):
        sweep(refiner, sample(seed))
    assert [count for count in sam.prompt_counts if count > 1] == [4, 2]


def test_mixed_thresholds_and_a_gate_are_read_from_the_same_counts(random_sam):
    sweep = Sweep(GRID, RefineConfig(), SCORING)
    sweep(Refiner(random_sam), sample(3))
    every = np.ones(4, dtype=bool)
    for cell in (0, 5):
        same = sweep.counts.mixed_totals([cell] * 4, every, "miou")
        np.testing.assert_array_equal(same, sweep.counts.totals(cell, "miou"))
    gated = sweep.counts.mixed_totals([0] * 4, np.array([True, True, False, True]), "miou")
    assert gated[0, 3:, 2].tolist() == gated[0, 1:3, 2].tolist()
    assert gated[0, 3:, 1].tolist() != gated[0, 1:3, 1].tolist()


def test_an_image_without_finite_scores_stays_raw(random_sam):
    inputs = sample(0)
    inputs.probs[0, 0, 3, 3] = float("nan")
    sweep = Sweep(GRID, RefineConfig(), SCORING)
    sweep(Refiner(random_sam), inputs)
    assert all(gain(sweep.counts.totals(cell, "miou")) == 0 for cell in range(len(GRID.cells)))


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        (([], [8.0], [0.5]), ValueError, "score_thresh must be one or more .*, got \\[\\]"),
        (([0.0], [8.0, 8.0], [0.5]), ValueError, "mask_prompt_scale must .*different numbers"),
        (([0.0], [8.0], [0.5, 1.5]), ValueError, "pred_iou_thresh must be .*, got 1.5"),
        (([0.0], [8.0], 0.5), TypeError, "pred_iou_thresh must be .*, got 0.5 of type float"),
    ],
)
def test_a_wrong_grid_is_refused(values, error, message):
    with pytest.raises(error, match=message):
        Grid(*values)


@pytest.mark.data
@pytest.mark.slow
def test_cells_are_runs_on_ten_real_frames(data_root):
    from benchmarks.camvid.data import ESPNET_WEIGHTS, SAM_WEIGHTS, VOID, camvid
    from benchmarks.camvid.espnet import ESPNetSegmenter
    from lightning_samrefine import load_sam

    grid = Grid([0.0, 0.5], [8.0], [0.3, 0.8])
    base = RefineConfig(min_region_area=16)
    refiner = Refiner(
        load_sam("vit_t", data_root / SAM_WEIGHTS), base, cache=EmbeddingCache("memory")
    )
    sweep = Sweep(grid, base, Scoring(VOID, VOID, trimap_width=3))
    model = ESPNetSegmenter(data_root / ESPNET_WEIGHTS, resolution="half").eval()
    frames = camvid(data_root)
    frames.setup("validate")
    changed = 0
    for number, batch in enumerate(frames.val_dataloader()):
        if number == 10:
            break
        with torch.inference_mode():
            probs = model(batch["image"])[0].softmax(dim=0)
        image, raw = batch["image"][0], probs.argmax(dim=0)
        found = sweep.labels(refiner, image, probs, raw)
        for labels, cell in zip(found, grid.cells, strict=True):
            single = Refiner(refiner.sam, cell.config(base), cache=refiner.cache)
            assert torch.equal(labels, single(image, probs).labels)
            changed += int((labels != raw).sum())
    assert changed > 10_000


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("tuned")
    return out, run(composed(out, *overrides(folder, *SMALL)))


def rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("width", [20, 60, 200])
def test_headings_and_numbers_are_whole_on_a_narrow_terminal(width):
    headings = ["score_thresh", "mask_prompt_scale", "pred_iou_thresh", "raw", "gain"]
    table = Table(*headings, title="Best cells")
    table.add_row("0", "8", "0.5", "12.34", "+1.25")
    out = io.StringIO()
    print_whole(Group(table, Text("/a/path/" * 20)), Console(width=width, file=out))
    lines = out.getvalue().splitlines()
    (heading,) = (line for line in lines if "score_thresh" in line)
    (row,) = (line for line in lines if "12.34" in line)
    assert all(name in heading for name in headings)
    assert "+1.25" in row
    assert "/a/path/" * 20 in lines


def test_the_surface_is_that_of_single_runs(folder, tuned, tmp_path):
    out, _ = tuned
    surface = rows(out / "surface.csv")
    assert len(surface) == 6
    row = surface[4]
    thresholds = ("score_thresh", "mask_prompt_scale", "pred_iou_thresh")
    assert [float(row[name]) for name in thresholds] == [0.4, 8.0, 0.2]
    values = [*EVERY_REGION, *(f"refine.{name}={row[name]}" for name in thresholds)]
    _, metrics = execute(tmp_path, *overrides(folder, *values))
    for name in ("miou_raw", "miou_refined", "trimap_miou_refined"):
        assert float(row[name]) == pytest.approx(metrics[f"val/{name}"], abs=1e-7)
    assert (out / "surface.png").stat().st_size > 10_000


def test_the_best_cell_runs_again_to_the_digit(folder, tuned, tmp_path):
    out, _ = tuned
    best = max(float(row["miou_refined"]) for row in rows(out / "surface.csv"))
    fields = asdict(read_refine(out / "best_cell.yaml"))
    names = fields.pop("class_names")
    assert names == tuple(CLASSES)
    values = [f"refine.{name}={value}" for name, value in fields.items() if value is not None]
    values.append(f"refine.class_names=[{','.join(names)}]")
    _, metrics = execute(tmp_path, *overrides(folder, "refine=algorithm4", *values))
    assert metrics["val/miou_refined"] == pytest.approx(best, abs=1e-7)


def test_what_was_written_is_what_was_measured(folder, tuned, tmp_path):
    out, result = tuned
    metrics = json.loads((out / "metrics.json").read_text())
    assert result == metrics["tune/miou_tuned"]
    cfg = composed(tmp_path, *overrides(folder))
    cfg.refine = asdict(read_refine(out / "tuned.yaml"))
    assert run(cfg) == pytest.approx(result, abs=1e-7)
    assert metrics["tune/miou_tuned"] >= metrics["tune/miou_raw"]


@pytest.mark.slow
def test_the_fit_is_that_of_a_validation(tmp_path, capsys):
    """The same weights, to the digit, as refine=auto finds on the same images."""
    frames = write_folder(tmp_path / "frames", count=9)
    values = overrides(frames, "refine=auto", "refine.min_region_area=1")
    tuning, validation = tmp_path / "tuning", tmp_path / "validation"
    _, tuned = execute(tuning, *values, *SMALL[-3:], "task=tune")
    shown = capsys.readouterr().out
    _, validated = execute(validation, *values, "task=validate")
    config = read_refine(tuning / "fitted.yaml")
    assert config == read_refine(validation / "fitted.yaml")
    assert config.weights == read_refine(validation / "fitted.yaml").weights
    assert config.weights.images == 9
    assert config.weights.found in shown
    assert str(tuning / "fitted.yaml") in shown
    fitted = {name: value for name, value in tuned.items() if name.startswith("tune/fitted_")}
    assert len(fitted) == 7
    for name, value in fitted.items():
        assert value == pytest.approx(validated[name.replace("tune/", "val/")], abs=1e-6)


def test_tuned_thresholds_of_another_fusion_have_the_preset_fitted_beside_them(tmp_path):
    frames = write_folder(tmp_path / "frames", count=8)
    execute(tmp_path / "out", *overrides(frames, *SMALL))
    config = read_refine(tmp_path / "out" / "fitted.yaml")
    assert replace(config, weights="auto", class_names=None) == RefineConfig.preset("auto")


def test_too_few_images_are_tuned_and_not_fitted(tuned, folder, tmp_path, capsys):
    out, _ = tuned
    assert not (out / "fitted.yaml").exists()
    run(composed(tmp_path, *overrides(folder, *SMALL)))
    assert "nothing was fitted to fewer than 8 labeled images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("tune.margin=lots", r"^tune: margin must be a number, got 'lots'"),
        ("tune.objective=dice", r"^tune: objective must be 'miou' or .*, got 'dice'"),
        (
            "tune.score_thresh=[1.0]",
            r"^tune: score_thresh must be a number in \[0, 1.*, got 1.0",
        ),
        ("tune.folds=1", r"^tune: folds must be an integer of at least 2, got 1"),
    ],
)
def test_wrong_settings_are_refused_before_any_work(folder, tmp_path, value, message):
    with pytest.raises(SetupError, match=message):
        run(composed(tmp_path, *overrides(folder, *SMALL, value)))


def test_one_image_is_too_few(folder, tmp_path):
    values = overrides(folder, *SMALL, "trainer.limit_val_batches=1")
    with pytest.raises(Exception, match="validation loader must have at least 2 images, got 1"):
        run(composed(tmp_path, *values))


def test_thresholds_without_influence_are_not_tried():
    grid = Grid([0.0, 0.5], [4.0, 8.0], [0.3, 0.6])
    assert grid.acting_on(RefineConfig()) == grid
    assert grid.acting_on(RefineConfig.preset("fast")) == Grid([0.0, 0.5], [8.0], [0.3, 0.6])
    assert grid.acting_on(RefineConfig.preset("default")) == Grid([0.0, 0.5], [8.0], [0.3, 0.6])
    points_alone = RefineConfig.preset("default", prompt_regions=False)
    assert grid.acting_on(points_alone) == Grid([0.0], [8.0], [0.5])


@pytest.mark.parametrize("preset", ["default", "fast"])
def test_image_driven_presets_are_swept_too(random_sam, preset):
    base = RefineConfig.preset(preset, min_region_area=4)
    grid = Grid([0.0], [8.0], [0.2, 0.6]).acting_on(base)
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, 64, 80), dtype=torch.uint8, generator=generator)
    probs = (
        torch.rand(3, 8, 10, generator=generator).repeat_interleave(8, 1).repeat_interleave(8, 2)
    )
    probs = probs / probs.sum(dim=0)
    refiner = Refiner(random_sam, base, "32")
    found = Sweep(grid, base, Scoring(3, 255, 3)).labels(refiner, image, probs, probs.argmax(dim=0))
    for labels, cell in zip(found, grid.cells, strict=True):
        assert torch.equal(
            labels, Refiner(random_sam, cell.config(base), "32")(image, probs).labels
        )
