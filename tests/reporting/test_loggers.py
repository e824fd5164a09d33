"""Scalars, panels and charts in the loggers' own files."""

from __future__ import annotations

import csv
import json
import re

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger
from lightning_stubs import NUM_CLASSES, REFINE, Blobs, Segmenter, loader
from matplotlib.figure import Figure
from PIL import Image
from report_cases import evaluate

from lightning_samrefine import SAMRefineCallback
from lightning_samrefine.reporting.charts import draw_class_bars, draw_reliability, draw_trimaps
from lightning_samrefine.reporting.image_table import COLUMNS
from lightning_samrefine.reporting.loggers import rasterize, safe_names, show_pictures

PICTURES = {"val/panels", "val/class_iou", "val/confusions", "val/reliability"}
# Names that loggers would change, each in its own way.
NAMES = ["sky/blue", "sky:blue", "Fußgänger"]


def validate(random_sam, logger, folder, **kwargs):
    callback = SAMRefineCallback(
        random_sam,
        num_classes=NUM_CLASSES,
        refine=REFINE,
        log=["miou_*", "iou_*"],
        panels=2,
        panels_width=400,
        **kwargs,
    )
    trainer = Trainer(
        accelerator="cpu",
        callbacks=[callback],
        logger=logger,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    (logged,) = trainer.validate(Segmenter(), loader(), verbose=False)
    return logged


def test_tensorboard_holds_scalars_and_pictures(random_sam, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger = TensorBoardLogger(tmp_path, name="", version="")
    logged = validate(random_sam, logger, tmp_path, class_names=NAMES)
    events = accumulator.EventAccumulator(str(tmp_path), size_guidance={"images": 0})
    events.Reload()
    tags = events.Tags()
    assert set(tags["images"]) == PICTURES
    assert events.Images("val/panels")[0].width == 400
    for name, value in logged.items():
        assert events.Scalars(name.replace(" ", "_"))[0].value == pytest.approx(value)
    # Two classes that differ in a character that TensorBoard replaces are still two.
    assert {"val/iou_raw/sky_blue_0", "val/iou_raw/sky_blue_1"} <= set(tags["scalars"])
    assert "val/iou_raw/Fußgänger" in tags["scalars"]


def leveldb_records(data):
    """Read LevelDB's log format: blocks of 32 KiB, whose first holds W&B's 7 bytes as well."""
    position, parts = 7, []
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        length = int.from_bytes(data[position + 4 : position + 6], "little")
        kind = data[position + 6]  # 1 whole, 2 first, 3 middle, 4 last part
        parts.append(data[position + 7 : position + 7 + length])
        position += 7 + length
        if kind in (1, 4):
            yield b"".join(parts)
            parts = []


@pytest.mark.slow
def test_wandb_holds_scalars_and_pictures(random_sam, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="needs wandb (extra: loggers)")
    from lightning.pytorch.loggers import WandbLogger
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_CONSOLE", "off")
    logger = WandbLogger(project="refine", save_dir=tmp_path, offline=True)
    logged = validate(random_sam, logger, tmp_path)
    logger.experiment.finish()
    wandb.teardown()  # its service writes the rest of the file as it leaves
    (run,) = tmp_path.rglob("run-*.wandb")
    rows = []
    for data in leveldb_records(run.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        rows.append(
            {"/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        )
    history = {name: value for row in rows for name, value in row.items()}
    for name, value in logged.items():
        assert history[name] == pytest.approx(value)
    for name in PICTURES:
        (path,) = (run.parent / "files" / entry for entry in history[f"{name}/filenames"])
        assert Image.open(path).width >= 400
    assert history["val/panels/width"] == 400
    # The table has a row for each image, the masks are the panels' label maps.
    table = json.loads((run.parent / "files" / history["val/images/path"]).read_text())
    assert tuple(table["columns"]) == COLUMNS
    gains = [row[1] for row in table["data"]]
    assert len(gains) == 4
    assert gains == sorted(gains)
    dataset, module = Blobs(4), Segmenter().eval()
    with torch.no_grad():
        raw = module.network(dataset.images / 255 - 0.5).argmax(dim=1)
    for entry, caption in zip(
        history["val/masks/all_masks"], history["val/masks/captions"], strict=True
    ):
        batch, position = map(int, re.findall(r"\d+", caption))
        drawn = {
            side: np.array(Image.open(run.parent / "files" / mask["path"]))
            for side, mask in entry.items()
        }
        assert set(drawn) == {"raw", "refined", "truth"}
        assert np.array_equal(drawn["raw"], raw[2 * batch + position].numpy())
        assert np.array_equal(drawn["truth"], dataset.targets[2 * batch + position].numpy())


def test_mlflow_holds_scalars_and_pictures(random_sam, tmp_path, monkeypatch):
    pytest.importorskip("mlflow", reason="needs mlflow or mlflow-skinny (extra: loggers)")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger = MLFlowLogger("refine", tracking_uri=(tmp_path / "store").as_uri())
    logged = validate(random_sam, logger, tmp_path, class_names=NAMES)
    assert {"val/iou_raw/sky_blue_0", "val/iou_raw/sky_blue_1"} <= set(logged)
    assert "val/iou_raw/Fu_ganger" in logged
    (folder,) = (tmp_path / "store").glob(f"*/{logger.run_id}")
    for name, value in logged.items():
        line = (folder / "metrics" / name).read_text().split()
        assert float(line[1]) == pytest.approx(value)
    artifacts = folder / "artifacts"
    with (artifacts / "val" / "images_step_000000.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 4
    found = {path.relative_to(artifacts).as_posix() for path in artifacts.rglob("*.png")}
    assert found == {f"{name}_step_000000.png" for name in PICTURES}
    assert Image.open(artifacts / "val" / "panels_step_000000.png").width == 400


def test_csv_holds_scalars_and_the_disk_pictures(random_sam, tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    logged = validate(random_sam, logger, tmp_path, class_names=["a,b", "a;b", "c"])
    with (tmp_path / "metrics.csv").open() as file:
        (row,) = csv.DictReader(file)
    for name, value in logged.items():
        assert float(row[name]) == pytest.approx(value)
    assert {"val/iou_raw/a_b_0", "val/iou_raw/a_b_1"} <= set(row)
    assert Image.open(tmp_path / "panels" / "val_epoch_000.png").width == 400


class Plain(Logger):
    """A logger that knows scalars alone."""

    name, version = "plain", "0"

    def __init__(self):
        super().__init__()
        self.metrics = {}

    def log_metrics(self, metrics, step=None):
        self.metrics |= metrics

    def log_hyperparams(self, params, *args, **kwargs):
        pass


class Broken(Plain):
    def log_image(self, key, images, step=None):
        raise ConnectionError("the server is away")


def test_a_logger_without_pictures_gets_the_scalars(random_sam, tmp_path):
    logger = Plain()
    logged = validate(random_sam, logger, tmp_path)
    assert {name: logger.metrics[name] for name in logged} == pytest.approx(logged)


def test_a_logger_that_fails_costs_its_pictures_alone(random_sam, tmp_path):
    with pytest.warns(UserWarning, match="Broken took no pictures .*the server is away"):
        logged = validate(random_sam, Broken(), tmp_path)
    assert logged["val/miou_refined"] > 0
    assert (tmp_path / "panels" / "val_epoch_000.png").exists()


def test_every_picture_reaches_every_logger_that_takes_some():
    taken = []

    class Taking(Plain):
        def log_image(self, key, images, step=None):
            taken.append((key, [picture.size for picture in images], step))

    picture = Image.new("RGB", (30, 20))
    show_pictures([Plain(), Taking()], {"val/panels": picture}, step=7)
    assert taken == [("val/panels", [(30, 20)], 7)]


def test_safe_names_keep_what_is_safe():
    names = ["sky", "traffic light", "a.b", "x-y", "道路"]
    assert safe_names(names) == names


@pytest.mark.parametrize("ascii_only", [False, True])
def test_safe_names_never_collide(ascii_only, tmp_path, monkeypatch):
    loggers = []
    if ascii_only:
        pytest.importorskip("mlflow")
        monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        loggers = [MLFlowLogger(tracking_uri=(tmp_path / "store").as_uri())]
    names = ["a/b", "a:b", "a_b", "A b", "道路", "道", "..", "", "ä", "a", "a_b_0", "class_4", "5"]
    safe = safe_names(names, loggers)
    allowed = set("abcdefghijklmnopqrstuvwxyz0123456789_.- ")
    keys = {name.replace(" ", "_").lower() for name in safe}
    assert len(keys) == len(names)
    assert all(keys)
    if ascii_only:
        assert all(set(name.lower()) <= allowed for name in safe)
    else:
        assert safe[4:6] == ["道路", "道"]
    assert safe[-1] == "5"


def test_charts_show_the_figures():
    result, _ = evaluate(3)
    bars = draw_class_bars(result).axes[0]
    widths = [patch.get_width() / 100 for patch in bars.patches]
    iou = [result.scores[side]["iou"].tolist() for side in ("raw", "refined")]
    assert widths == pytest.approx([value for side in iou for value in side])
    assert [label.get_text() for label in bars.get_yticklabels()] == list(result.class_names)
    curve, counts = draw_reliability(result.calibration).axes
    assert sum(patch.get_height() for patch in counts.patches) == result.calibration.regions
    xs, ys = curve.lines[1].get_data()
    np.testing.assert_allclose(
        xs, result.calibration.bin_pred_iou[result.calibration.bin_regions > 0]
    )
    assert len(ys) == len(xs)
    trimaps = draw_trimaps(result).axes[0]
    assert list(trimaps.lines[0].get_xdata()) == [1, 3, 5, 10]
    assert trimaps.lines[1].get_ydata()[3] == 100 * result.trimap_miou("refined", 10)


def test_a_figure_has_the_given_width():
    assert rasterize(Figure(figsize=(4, 2)), 300).size == (300, 150)
    assert rasterize(Figure(figsize=(4, 2))).size == (400, 200)
