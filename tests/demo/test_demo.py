"""The demonstration: a segmenter that errs as real ones do, and SAM that mends it."""

import json
import subprocess
import sys

import pytest
import torch
from PIL import Image

from lightning_samrefine import RefineConfig, Refiner, load_sam
from lightning_samrefine.demo.datamodule import ScenesDataModule
from lightning_samrefine.demo.scenes import make_scene
from lightning_samrefine.demo.segmenter import SmallSegmenter
from lightning_samrefine.metrics.comparison import RefinementComparison


def test_splits_share_no_scene_and_repeat_for_a_seed():
    first, again, other = (
        ScenesDataModule(seed=seed, train=2, val=2, test=2, size=64) for seed in (0, 0, 1)
    )
    scenes = [
        batch["image"]
        for data in (first, other)
        for batch in (*data.train_dataloader(), *data.val_dataloader(), *data.test_dataloader())
    ]
    images = torch.cat(scenes).flatten(1)
    assert len(images.unique(dim=0)) == len(images) == 12
    same = [next(iter(data.test_dataloader())) for data in (first, again)]
    assert torch.equal(same[0]["image"], same[1]["image"])
    assert torch.equal(same[0]["mask"], same[1]["mask"])
    assert same[0]["mask"].dtype == torch.int64


@pytest.mark.parametrize(("field", "value"), [("train", 0), ("val", -1), ("test", 0), ("seed", -1)])
def test_a_split_without_scenes_is_refused(field, value):
    with pytest.raises(ValueError, match=f"{field} must be .*, got {value}"):
        ScenesDataModule(**{field: value})


def test_the_segmenter_decides_at_stride_8():
    model = SmallSegmenter(width=8).eval()
    logits = model(torch.zeros(2, 3, 64, 96, dtype=torch.uint8))
    assert logits.shape == (2, 6, 64, 96)
    assert model.net(torch.zeros(1, 3, 64, 96)).shape == (1, 6, 8, 12)


def test_tiny_sam_mends_borders_of_blurred_truth():
    """Without any training: exact labels made coarse, refined, are better than before."""
    refiner = Refiner(load_sam("tiny"), RefineConfig.preset("default"))
    comparison = RefinementComparison(num_classes=6)
    for index in range(12):
        scene = make_scene(7, index)
        truth = torch.nn.functional.one_hot(scene.labels, 6).permute(2, 0, 1)[None].float()
        coarse = torch.nn.functional.avg_pool2d(truth, 16)
        probs = torch.nn.functional.interpolate(coarse, scale_factor=16, mode="bilinear")[0]
        out = refiner(scene.image, probs)
        comparison.update(probs.argmax(dim=0), out.labels, scene.labels)
    figures = comparison.compute()
    assert figures["miou_gain"] > 0.05
    assert figures["trimap_miou_gain"] > 0.10


@pytest.mark.slow
def test_a_short_default_run_leaves_table_figures_panels_and_curve(tmp_path):
    """The command as a newcomer types it, with fewer scenes and epochs."""
    small = ["data.train=16", "data.val=4", "data.test=4", "trainer.max_epochs=2"]
    done = subprocess.run(
        [sys.executable, "-m", "lightning_samrefine.cli.main", *small, "hydra.run.dir=out"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    for stage in ("val", "test"):
        for key in ("miou_raw", "miou_refined", "miou_gain", "trimap_miou_gain"):
            assert f"{stage}/{key}" in metrics
    assert "test: IoU in %" in done.stdout
    panels = {path.name for path in (tmp_path / "out" / "csv" / "panels").iterdir()}
    assert panels == {"test.png", "val_epoch_000.png", "val_epoch_001.png"}
    for name in ("curve.png", "csv/panels/test.png"):
        assert Image.open(tmp_path / "out" / name).size[0] >= 1000
        assert name in done.stdout.replace("\n", "")
