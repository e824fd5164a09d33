"""The `samrefine` command: what it writes, prints and returns, and how it refuses."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from command_runs import (
    CLASSES,
    SAM,
    composed,
    execute,
    expected_miou,
    overrides,
    rendered,
    small_sam,
    split,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import OmegaConf
from PIL import Image

from lightning_samrefine import Refiner
from lightning_samrefine.cli.main import SetupError, _job, explain, run
from lightning_samrefine.config import RefineConfig
from lightning_samrefine.reporting.summary import (
    refined_miou,
    refinement_table,
    summary,
    write_metrics,
)

ROOT = Path(__file__).parents[2]
# Algorithm 4 on images too small for its published thresholds: RefineConfig().
EVERY_REGION = (
    *("refine=algorithm4", "refine.score_thresh=0.0", "refine.mask_prompt_scale=8.0"),
    *("refine.pred_iou_thresh=0.25", "refine.min_region_area=1"),
)


def logged_rows(out, name):
    """Rows of the CSV logger that hold a metric, as floats."""
    with (out / "csv" / "metrics.csv").open() as file:
        rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
    return [row for row in rows if name in row]


# --- a whole run ---------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["validate", "test"])
def test_a_run_measures_what_the_files_say(folder, tmp_path, capsys, task):
    stage = {"validate": "val", "test": "test"}[task]
    values = overrides(folder, f"task={task}", *split(folder, "test"), *EVERY_REGION)
    result, metrics = execute(tmp_path, *values, "refine.pred_iou_thresh=0.25")
    expected = expected_miou(folder, RefineConfig(pred_iou_thresh=0.25))
    assert expected["raw"] != pytest.approx(expected["refined"], abs=1e-4), "nothing was refined"
    for side, value in expected.items():
        assert metrics[f"{stage}/miou_{side}"] == pytest.approx(value, abs=1e-6)
    assert result == metrics[f"{stage}/miou_refined"]
    assert 0 < metrics[f"{stage}/refine_accept_rate"] < 1

    (row,) = logged_rows(tmp_path, f"{stage}/miou_refined")
    # Everything is in metrics.json, some of it in the loggers, in float32.
    logged = row.keys() - {"epoch", "step"}
    assert logged < metrics.keys()
    assert {k: row[k] for k in logged} == pytest.approx({k: metrics[k] for k in logged}, rel=1e-6)

    printed = capsys.readouterr().out
    assert re.search(
        rf"mIoU .* {100 * expected['raw']:.2f} .* {100 * expected['refined']:.2f} ", printed
    )
    assert all(name in printed for name in CLASSES[:3])
    assert f"Logs, metrics.json and config.yaml: {tmp_path}\n" in printed


@pytest.mark.slow
def test_a_named_callback_is_reported_under_its_name(folder, tmp_path, capsys):
    result, metrics = execute(tmp_path, *overrides(folder, "callback.name=fast"))
    assert result == metrics["val/fast/miou_refined"]
    expected = expected_miou(folder, RefineConfig.preset("default"))
    assert metrics["val/fast/miou_raw"] == pytest.approx(expected["raw"], abs=1e-6)
    printed = capsys.readouterr().out
    assert "val/fast: IoU in %" in printed
    assert "panels/fast_val_epoch_000.png" in printed


def test_predict_writes_what_the_refiner_gives_and_goes_on(folder, tmp_path):
    values = overrides(folder, "task=predict", *EVERY_REGION, "writer.probs=uint8")
    values += [
        f"data.predict.images={folder / 'images'}",
        f"data.predict.predictions={folder / 'predictions'}",
    ]
    assert run(composed(tmp_path, *values)) is None
    refiner = Refiner(small_sam(), RefineConfig(pred_iou_thresh=0.25))
    for path in sorted((folder / "predictions").iterdir()):
        probs = torch.from_numpy(np.load(path)["probs"])
        image = torch.from_numpy(np.array(Image.open(folder / "images" / f"{path.stem}.png")))
        labels = refiner(image.permute(2, 0, 1), probs).labels
        written = Image.open(tmp_path / "predictions" / "labels" / f"{path.stem}.png")
        assert np.array_equal(np.array(written), labels.numpy())
    manifest = tmp_path / "predictions" / "manifest.parquet"
    before = manifest.read_bytes()
    run(composed(tmp_path, *values))
    assert manifest.read_bytes() == before
    with pytest.raises(MisconfigurationException, match=r"refine\.pred_iou_thresh"):
        run(composed(tmp_path, *values, "refine.pred_iou_thresh=0.9"))


def test_predict_needs_images(folder, tmp_path):
    with pytest.raises(MisconfigurationException, match=r"data\.predict must be set"):
        run(composed(tmp_path, *overrides(folder, "task=predict")))
    with pytest.raises(
        SetupError, match=r"predict must have images, got predictions without images"
    ):
        run(composed(tmp_path, *overrides(folder, "data.predict.predictions=x")))


def test_thresholds_reach_the_refiner_and_the_saved_config(folder, tmp_path):
    # An image-driven mask counts whatever the threshold, so a preset without them.
    values = overrides(folder, "refine=fast", "refine.pred_iou_thresh=1.0", "refine.stride=4")
    values.append("refine.window=32")
    result, metrics = execute(tmp_path, *values)
    assert metrics["val/refine_accept_rate"] == 0
    assert metrics["val/miou_gain"] == 0
    assert result == metrics["val/miou_raw"]
    saved = OmegaConf.load(tmp_path / "config.yaml")
    assert (saved.refine.pred_iou_thresh, saved.refine.stride) == (1.0, 4)
    assert saved.refine.window == 32
    assert saved.callback.class_names == CLASSES
    assert (saved.callback.num_classes, saved.callback.ignore_index) == (4, 255)


@pytest.mark.slow
def test_the_saved_config_runs_again(folder, tmp_path):
    result, metrics = execute(tmp_path / "first", *overrides(folder))
    again = OmegaConf.load(tmp_path / "first" / "config.yaml")
    again.output_dir = str(tmp_path / "second")
    assert run(again) == result
    assert len(logged_rows(tmp_path / "second", "val/miou_raw")) == 1
    repeated = json.loads((tmp_path / "second" / "metrics.json").read_text())
    clock = "val/refine_ms_per_image"
    assert {k: repeated[k] for k in metrics if k != clock} == {
        k: v for k, v in metrics.items() if k != clock
    }


@pytest.mark.slow
def test_both_loggers_hold_the_figures(folder, tmp_path):
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    values = ["logger=csv_tensorboard", "callback.log=[miou_*,iou_*]"]
    _, metrics = execute(tmp_path, *overrides(folder, *values))
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    for name in ("val/miou_raw", "val/miou_refined", "val/iou_refined/disc"):
        assert events.Scalars(name)[0].value == pytest.approx(metrics[name])
    assert len(logged_rows(tmp_path, "val/miou_refined")) == 1


@pytest.mark.slow
def test_a_named_sam_is_loaded(folder, tmp_path):
    values = ["sam=vit_t", "sam.checkpoint=random", "trainer.limit_val_batches=1"]
    with pytest.warns(UserWarning, match="SAM vit_t has random weights"):
        result, metrics = execute(tmp_path, *overrides(folder, sam=values))
    assert metrics["val/refine_regions_per_image"] > 0
    assert result == metrics["val/miou_refined"]


@pytest.mark.slow
def test_fit_logs_every_epoch_then_tests_and_its_checkpoint_comes_back(folder, tmp_path):
    own = ["segmenter=custom", "segmenter._target_=command_runs.Pixelwise"]
    own += ["+segmenter.num_classes=null", "+segmenter.lr=0.3"]
    values = [*overrides(folder), *own]
    fit = ["task=fit", "trainer.max_epochs=3", *split(folder, "train"), *split(folder, "test")]
    result, metrics = execute(tmp_path / "fit", *values, *fit)
    rows = logged_rows(tmp_path / "fit", "val/miou_refined")
    assert [row["epoch"] for row in rows] == [0, 1, 2]
    assert rows[-1]["val/miou_refined"] == pytest.approx(result)
    # Same images for validation and test, and the last epoch's weights for both.
    assert metrics["test/miou_refined"] == pytest.approx(result)
    assert rows[0]["val/loss"] > rows[-1]["val/loss"]

    (checkpoint,) = (tmp_path / "fit").rglob("*.ckpt")
    assert not any("sam" in key for key in torch.load(checkpoint, weights_only=True)["state_dict"])
    again, _ = execute(tmp_path / "again", *values, f"ckpt_path='{checkpoint}'")
    assert again == pytest.approx(result)
    untrained, _ = execute(tmp_path / "untrained", *values)
    assert untrained != pytest.approx(result)


def test_fit_without_a_test_set_reports_the_validation(folder, tmp_path, capsys):
    own = [
        "segmenter=custom",
        "segmenter._target_=command_runs.Pixelwise",
        "+segmenter.num_classes=4",
    ]
    fit = ["task=fit", "trainer.max_epochs=1", *split(folder, "train", predictions=False)]
    result, metrics = execute(tmp_path, *overrides(folder), *own, *fit)
    assert result == metrics["val/miou_refined"]
    assert not any(name.startswith("test/") for name in metrics)
    assert "val: IoU in %" in capsys.readouterr().out


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["sam=hf"], r"^sam\.model must be set, as in: samrefine sam\.model="),
        (["sam=hf", "segmenter=custom"], r"sam\.model, segmenter\._target_ must be set"),
        (
            ["sam=hf", "sam.model=/no/folder"],
            r"^checkpoint must .*got '/no/folder', which is",
        ),
        (
            ["sam=vit_t"],
            r"^mobile_sam\.pt could not be fetched: SAMREFINE_OFFLINE is set, so it is",
        ),
        (["task=train"], r"^task must be one of validate, test, fit.*got 'train'"),
        (["ckpt_path=/no/such.ckpt"], r"^ckpt_path must be a file, got /no/such\.ckpt"),
        (["refine.pred_iou_thresh=2"], r"^refine: pred_iou_thresh must be a number in .*, got 2"),
        (["refine.stride=half"], r"^refine: stride must be .*, got 'half' of type str"),
        (["refine.window=16"], r"^refine: window must be an integer of at least 32 .*got 16"),
        (["refine.window=half"], r"^refine: window must be .*'auto' or None, got 'half'"),
        (["+refine.iou=0.7"], r"^refine: RefineConfig has no field iou; its fields are"),
        (["data.class_names=null"], r"^data: num_classes or class_names must be set, got neither"),
        (["data._target_=nowhere.Data"], r"^data: Error .*'nowhere\.Data'.*No module named"),
        (["+segmenter.depth=3"], r"^segmenter: .*unexpected keyword argument 'depth'"),
        (["callback.max_batches=0"], r"^callback: max_batches must be an integer .*got 0"),
        (
            ["data.val.predictions=null"],
            r"must hold prediction or probs, got image, name, folder, mask; set",
        ),
        (["data.val.labels=/no/labels"], r"^labels must be a folder, got /no/labels"),
        (["task=test"], r"^data\.test must be set, because this run needs .*, got val$"),
        (["task=fit"], r"^No `training_step\(\)` method defined"),
        (
            ["sam=vit_t", "sam.checkpoint=/no/sam.pt"],
            r"^checkpoint must .*got '/no/sam\.pt'",
        ),
    ],
)
def test_a_wrong_setup_is_one_sentence(folder, tmp_path, values, message, monkeypatch):
    monkeypatch.setenv("SAMREFINE_OFFLINE", "1")
    monkeypatch.setenv("SAMREFINE_HOME", str(tmp_path))
    with pytest.raises(Exception) as info:  # noqa: PT011 - its type and text are checked below
        execute(tmp_path, *overrides(folder, *values, sam=[] if "sam" in values[0] else SAM))
    sentence = explain(info.value)
    assert sentence is not None, repr(info.value)
    assert "\n" not in sentence
    assert re.search(message, sentence), sentence
    assert not (tmp_path / "metrics.json").exists()


def test_a_checkpoint_of_another_network_is_explained(folder, tmp_path):
    own = [
        "segmenter=custom",
        "segmenter._target_=command_runs.Pixelwise",
        "+segmenter.num_classes=4",
    ]
    state = {
        "state_dict": {"layer.weight": torch.zeros(4, 3, 1, 1)},
        "pytorch-lightning_version": "2",
    }
    torch.save(state, tmp_path / "w.ckpt")
    with pytest.raises(RuntimeError) as info:
        execute(tmp_path, *overrides(folder), *own, f"ckpt_path={tmp_path / 'w.ckpt'}")
    assert re.match(r"Error\(s\) in loading state_dict.*layer\.bias", explain(info.value))


def test_a_failure_that_is_no_setup_keeps_its_traceback():
    assert explain(RuntimeError("out of memory")) is None
    assert explain(MisconfigurationException("two\n lines")) == "two lines"
    assert explain(SetupError("x" * 10_000)).endswith(" …")


def test_an_error_in_the_users_own_code_keeps_its_traceback(folder, tmp_path, monkeypatch):
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    own = [
        "segmenter=custom",
        "segmenter._target_=command_runs.Mistaken",
        "+segmenter.num_classes=4",
    ]
    with pytest.raises(ValueError, match="mine") as info:
        _job(composed(tmp_path, *overrides(folder), *own))
    assert info.traceback[-1].name == "validation_step"
    assert explain(info.value) is None


def test_an_error_in_a_worker_process_is_recognized(tmp_path):
    own = [
        "segmenter=custom",
        "segmenter._target_=command_runs.Pixelwise",
        "+segmenter.num_classes=4",
    ]
    own += ["data=custom", "data._target_=command_runs.Workers", "callback.num_classes=4", *SAM]
    with pytest.raises(FileNotFoundError, match="DataLoader worker") as info:
        run(composed(tmp_path, *own, "trainer.accelerator=cpu"))
    assert explain(info.value) is None
    loader = torch.utils.data.DataLoader(
        ["bets"], batch_size=None, collate_fn=RefineConfig.preset, num_workers=1
    )
    with pytest.raises(ValueError, match="DataLoader worker") as info:
        next(iter(loader))
    assert explain(info.value).startswith("preset must be 'algorithm4', 'auto'")


# --- the command itself --------------------------------------------------------------------------


def command(cwd, *arguments, **environment):
    paths = os.pathsep.join(map(str, [ROOT, ROOT / "tests" / "helpers"]))
    return subprocess.run(
        [sys.executable, "-m", "lightning_samrefine.cli.main", *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": paths, "COLUMNS": "100"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_the_command_end_to_end(folder, tmp_path):
    # Its SAM lies in the current folder, as a user's own classes do.
    (tmp_path / "mine.py").write_text("from command_runs import small_sam\n")
    values = overrides(folder, "sam._target_=mine.small_sam", "trainer.enable_progress_bar=true")
    done = command(tmp_path, *values)
    assert done.returncode == 0, done.stderr
    (out,) = (tmp_path / "outputs" / "samrefine").glob("*/*")
    metrics = json.loads((out / "metrics.json").read_text())
    assert "Validation" in done.stdout
    assert re.search(rf"mIoU .*{100 * metrics['val/miou_refined']:.2f}", done.stdout)
    assert f"config.yaml: {out}\n" in done.stdout
    assert {"metrics.json", "config.yaml", "csv", "samrefine.log"} <= {
        p.name for p in out.iterdir()
    }
    assert done.stdout.count("SAMRefineCallback: SAM small") == 1
    assert "SAMRefineCallback: SAM small" not in done.stderr


@pytest.mark.slow
def test_the_job_refuses_in_one_sentence_or_shows_where(folder, tmp_path, monkeypatch):
    cfg = composed(tmp_path, *overrides(folder, "data.val.images=/no/images"))
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    with pytest.raises(
        SystemExit,
        match=r"^samrefine: images must be a folder, got /no/images, .*\n\(HYDRA_FULL",
    ):
        _job(cfg)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(FileNotFoundError, match="images must be a folder, got /no/images"):
        _job(cfg)


@pytest.mark.parametrize(
    "values", [["sam=vit_t", "sam.checkpoint=/no/sam"], ["sam=hf", "sam.model=/no/sam"]]
)
def test_a_missing_checkpoint_has_the_name_of_the_command_line(folder, tmp_path, values):
    cfg = composed(tmp_path, *overrides(folder, *values, sam=[]))
    key = values[1].partition("=")[0]
    with pytest.raises(SystemExit, match=rf"^samrefine: {key} must be .*got '/no/sam', which is"):
        _job(cfg)


@pytest.mark.slow
def test_the_command_refuses_typos_and_helps_without_torch(tmp_path):
    block = "raise ImportError('too heavy')\n"
    for name in ("torch", "lightning", "torchvision"):
        (tmp_path / f"{name}.py").write_text(block)
    typo = command(tmp_path, "refine.pred_iou_tresh=0.7")
    assert typo.returncode == 1
    assert typo.stderr.startswith("samrefine: refine.pred_iou_tresh: ")
    assert "did you mean pred_iou_thresh" in typo.stderr
    other = command(tmp_path, "data.nom_classes=3")
    assert other.returncode == 1
    assert "Key 'nom_classes' is not in struct" in other.stderr
    missing = command(tmp_path, "sam=hf")
    assert missing.returncode == 1
    assert missing.stderr.startswith("samrefine: sam.model must be set,")
    shown = command(tmp_path, "--help")
    assert shown.returncode == 0
    assert "refine: algorithm4, auto, default, fast" in shown.stdout
    assert "pred_iou_thresh: 0.5" in shown.stdout


def test_a_model_of_transformers_in_a_folder_runs(folder, tmp_path):
    pytest.importorskip("transformers")
    from tiny_hf import build_tiny_hf

    build_tiny_hf("sam2").module.save_pretrained(tmp_path / "model")
    with pytest.warns(UserWarning, match="does not specify how images are normalized"):
        _, metrics = execute(
            tmp_path / "run",
            *overrides(folder, sam=["sam=hf", f"sam.model={tmp_path / 'model'}"]),
        )
    assert metrics["val/refine_failed_images"] == 0
    assert metrics["val/refine_regions_per_image"] > 0


def test_an_absent_extra_is_one_sentence(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    values = ["sam=hf", "sam.model=facebook/sam2.1-hiera-small"]
    with pytest.raises(ImportError) as info:
        execute(tmp_path, *overrides(folder, sam=values))
    assert 'pip install "lightning-samrefine[hf]"' in explain(info.value)
    assert explain(ImportError("No module named nowhere")) is None


# --- the summary ---------------------------------------------------------------------------------


def test_the_table_shows_per_cents_gains_and_what_is_absent():
    metrics = {
        "val/iou_raw/a": 0.5,
        "val/iou_refined/a": 0.525,
        "val/iou_raw/b": 0.0,
        "val/miou_raw": 0.25,
        "val/miou_refined": 0.5251,
        "val/trimap_miou_raw": 0.4,
        "val/trimap_miou_refined": 0.3,
    }
    rows = [
        re.findall(r"[\w.+-]+", line)
        for line in rendered(refinement_table(metrics, "val")).split("\n")
    ]
    assert ["a", "50.00", "52.50", "+2.50"] in rows
    assert ["b", "0.00", "-", "-"] in rows
    assert ["mIoU", "25.00", "52.51", "+27.51"] in rows
    assert ["trimap", "mIoU", "40.00", "30.00", "-10.00"] in rows


def test_every_dataloader_has_its_table_and_the_mean_is_returned():
    metrics = {}
    for index, value in enumerate((0.2, 0.6)):
        suffix = f"/dataloader_idx_{index}"
        metrics |= {
            f"test/iou_raw/sky{suffix}": 0.1,
            f"test/iou_refined/sky{suffix}": value,
            f"test/miou_raw{suffix}": 0.1,
            f"test/miou_refined{suffix}": value,
            f"test/refine_failed_images{suffix}": index,
        }
    assert refined_miou(metrics, "test") == pytest.approx(0.4)
    assert refined_miou(metrics, "val") is None
    text = rendered(summary(metrics, Path("out")))
    assert "test/dataloader_idx_0: IoU in %" in text
    assert "test/dataloader_idx_1: IoU in %" in text
    assert re.findall(r"sky\W+(\S+) \W+(\S+)", text) == [("10.00", "20.00"), ("10.00", "60.00")]
    assert text.count("could not be refined") == 1


def test_a_gain_over_other_classes_is_shown_beside_the_means():
    means = {"val/miou_raw": 0.1837, "val/miou_refined": 0.1661, "val/miou_gain": -0.0176}
    text = rendered(summary(means | {"val/miou_gain_same_classes": 0.0051}, Path("out")))
    assert "gain +0.51 over the classes that both means have" in text
    text = rendered(summary(means | {"val/miou_gain_same_classes": -0.0176}, Path("out")))
    assert "both means" not in text


def test_nothing_refined_is_reported():
    assert "No refinement was logged" in rendered(summary({"val/loss": 1.0}, Path("out")))


def test_metrics_that_are_not_finite_stay_valid_json(tmp_path):
    write_metrics({"a": 0.5, "b": float("nan"), "c": float("inf")}, tmp_path / "m.json")
    assert json.loads((tmp_path / "m.json").read_text()) == {"a": 0.5, "b": None, "c": None}


@pytest.mark.slow
def test_every_job_of_a_sweep_has_a_wandb_run_of_its_own(folder, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="needs wandb (extra: loggers)")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_CONSOLE", "off")
    for job in ("first", "second"):
        _job(composed(tmp_path / job, *overrides(folder, "logger=wandb")))
        assert wandb.run is None
    wandb.teardown()  # its service writes the rest of the files as it leaves
    for job in ("first", "second"):
        assert len(list((tmp_path / job).rglob("run-*.wandb"))) == 1
