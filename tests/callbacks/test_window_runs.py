"""Windows in whole runs: callback, fit, panels and report, writer, and the sweep of a tuning."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning_stubs import NUM_CLASSES, SILENT, Blobs, Segmenter
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from torchmetrics.functional.classification import multiclass_jaccard_index
from writer_cases import Named, Predicting, predict, rows

from lightning_samrefine import RefineConfig, Refiner, SAMRefineCallback
from lightning_samrefine.tune.counts import Scoring
from lightning_samrefine.tune.settings import Grid
from lightning_samrefine.tune.sweep import Sweep

HW = (70, 90)
REFINE = RefineConfig.preset("fast", window=48, min_region_area=4, pred_iou_thresh=0.4)


def raw_probs(module, image):
    with torch.no_grad():
        return module(image[None])[0].float().softmax(dim=0)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["fast", "default"])
def test_the_callback_logs_what_windows_give(random_sam, tmp_path, preset):
    config = replace(REFINE, points_per_side=RefineConfig.preset(preset).points_per_side)
    module, data = Segmenter().eval(), Blobs(3, hw=HW)
    own = SAMRefineCallback(
        random_sam,
        num_classes=NUM_CLASSES,
        ignore_index=255,
        refine=config,
        precision="32",
        panels=2,
        report=tmp_path / "report.html",
        log="all",
    )
    runner = Trainer(**SILENT, callbacks=[own], default_root_dir=tmp_path)
    (logged,) = runner.validate(module, DataLoader(data, 2), verbose=False)
    refiner = Refiner(random_sam, config, "32")
    outs = [refiner(image, raw_probs(module, image)) for image in data.images]
    labels = torch.stack([out.labels for out in outs])
    expected = multiclass_jaccard_index(
        labels, data.targets, NUM_CLASSES, average="macro", ignore_index=255
    )
    assert logged["val/miou_refined"] == pytest.approx(expected.item(), abs=1e-6)
    assert logged["val/miou_refined"] != logged["val/miou_raw"]
    prompted = sum(len(out.regions) for out in outs)
    accepted = sum(int(out.regions.accepted.sum()) for out in outs)
    assert logged["val/refine_regions_per_image"] == pytest.approx(prompted / 3)
    assert logged["val/refine_accept_rate"] == pytest.approx(accepted / prompted)
    assert np.isfinite(logged["val/refine_iou_ece"])
    assert logged["val/refine_failed_images"] == 0
    assert (tmp_path / "report.html").exists()
    assert len(list((tmp_path / "panels").glob("*.png"))) == 1


@pytest.mark.slow
def test_a_fusion_is_fitted_to_windows(random_sam):
    config = replace(REFINE, weights="auto")
    own = SAMRefineCallback(
        random_sam, num_classes=NUM_CLASSES, ignore_index=255, refine=config, precision="32"
    )
    runner = Trainer(**SILENT, callbacks=[own])
    module, loader = Segmenter().eval(), DataLoader(Blobs(10, hw=HW), 2)
    runner.validate(module, loader, verbose=False)
    assert own.fitted_config is not None
    assert own.fitted_config.weights.images == 10
    assert own.fitted_config.window == 48
    (tested,) = runner.test(module, loader, verbose=False)
    assert tested["test/refine_failed_images"] == 0
    refiner = Refiner(random_sam, own.fitted_config, "32")
    data = Blobs(10, hw=HW)
    labels = torch.stack([refiner(i, raw_probs(module, i)).labels for i in data.images])
    expected = multiclass_jaccard_index(
        labels, data.targets, NUM_CLASSES, average="macro", ignore_index=255
    )
    # Images of the fit are refined with weights of their fold, which were fitted without them.
    assert tested["test/miou_refined"] == pytest.approx(expected.item(), abs=0.05)


def test_the_writer_writes_what_windows_give(random_sam, tmp_path):
    data = Named(2, hw=HW)
    predict(tmp_path, DataLoader(data, 2), refine=REFINE, precision="32", probs="uint8")
    module, refiner = Predicting().eval(), Refiner(random_sam, REFINE, "32")
    for index, image in enumerate(data.images):
        out = refiner(image, raw_probs(module, image))
        stem = f"scene/{index:03d}"
        with Image.open(tmp_path / f"labels/{stem}.png") as picture:
            assert np.array_equal(np.array(picture), out.labels.numpy())
        stored = load_file(tmp_path / f"probs/{stem}.safetensors")["probs"]
        assert torch.equal(stored, (out.probs * 255).round().to(torch.uint8))
        row = rows(tmp_path)[index]
        assert row["regions"] == len(out.regions)
        np.testing.assert_allclose(row["pred_iou"], out.regions.pred_iou, atol=1e-6)


def test_every_cell_of_a_sweep_is_a_run_with_windows(random_sam):
    image, module = Blobs(1, hw=HW).images[0], Segmenter().eval()
    probs = raw_probs(module, image)
    grid = Grid([0.0], [8.0], [0.2, 0.5]).acting_on(REFINE)
    refiner = Refiner(random_sam, REFINE, "32")
    found = Sweep(grid, REFINE, Scoring(NUM_CLASSES, 255, 3)).labels(
        refiner, image, probs, probs.argmax(dim=0)
    )
    for labels, cell in zip(found, grid.cells, strict=True):
        expected = Refiner(random_sam, cell.config(REFINE), "32")(image, probs)
        assert torch.equal(labels, expected.labels)
