"""Which figures a run logs, monitors and shows in its progress bar; the user's own among them."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import torch
from command_runs import execute, overrides
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, TQDMProgressBar
from lightning_stubs import IGNORE, NUM_CLASSES, REFINE, SILENT, Blobs, Segmenter, loader
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from lightning_samrefine import Refiner, SAMRefineCallback
from lightning_samrefine.callbacks.run_state import RunState

DOZEN = {
    "miou_raw", "miou_refined", "miou_gain", "miou_gain_low", "miou_gain_high",
    "miou_gain_same_classes",
    "trimap_miou_raw", "trimap_miou_refined", "trimap_miou_gain",
    "refine_accept_rate", "refine_ms_per_image", "refine_failed_images",
}  # fmt: skip


@pytest.fixture
def plain(random_sam):
    """Makes a callback with the default figures."""

    def build(**kwargs):
        return SAMRefineCallback(
            random_sam, **{"num_classes": NUM_CLASSES, "refine": REFINE, **kwargs}
        )

    return build


def validate(callback, *others, **kwargs):
    trainer = Trainer(**{**SILENT, **kwargs}, callbacks=[callback, *others])
    (logged,) = trainer.validate(Segmenter(), loader(), verbose=False)
    return {name.removeprefix("val/") for name in logged}


def test_a_dozen_figures_by_default_and_everything_in_history(plain):
    callback = plain()
    assert validate(callback) == DOZEN
    (entry,) = callback.history
    more = {"iou_refined/1", "dice_raw/0", "boundary_f1_refined", "trimap_5px_miou_raw"}
    assert DOZEN | more <= set(entry)
    where = {"stage", "epoch", "step", "dataloader_idx"}
    assert callback.figures == {f"val/{k}": v for k, v in entry.items() if k not in where}


def test_names_patterns_and_everything(plain):
    bar = {"miou_refined", "miou_gain"}
    assert validate(plain(log=["iou_raw/*", "dice_refined/1"])) == bar | {
        "iou_raw/0", "iou_raw/1", "iou_raw/2", "dice_refined/1"
    }  # fmt: skip
    callback = plain(log="all", prog_bar=())
    logged = validate(callback)
    assert {f"val/{name}" for name in logged} == set(callback.figures)
    # MLflow's file store makes a file of each figure, and a folder of each "/".
    folders = {str(parent) for name in logged for parent in PurePosixPath(name).parents}
    assert not folders & logged
    assert validate(plain(log=[], prog_bar=[])) == set()


@pytest.mark.parametrize("log", ["miou_gain", None, 3, [3]])
def test_patterns_of_another_type(plain, log):
    with pytest.raises(TypeError, match="log must be 'all' or a sequence of names"):
        plain(log=log)


def test_a_name_that_no_figure_has(plain):
    with pytest.warns(UserWarning, match="log names 'miou_refind', which no figure .*matches"):
        validate(plain(log=["miou_refind", "miou_raw"]))


def test_figures_that_are_monitored_or_part_of_a_file_name_are_logged(plain, tmp_path):
    best = ModelCheckpoint(
        tmp_path,
        "{val/boundary_f1_refined:.6f}",
        "val/iou_refined/1",
        mode="max",
        auto_insert_metric_name=False,
    )
    stop = EarlyStopping("val/dice_refined/2", mode="max")
    callback = plain(log=["miou_gain"], prog_bar=())
    trainer = Trainer(
        **{**SILENT, "enable_checkpointing": True}, max_epochs=1, callbacks=[callback, best, stop]
    )
    trainer.fit(Segmenter("logits"), loader(2), loader())
    figures = callback.figures
    assert best.best_model_score == pytest.approx(figures["val/iou_refined/1"])
    assert stop.best_score == pytest.approx(figures["val/dice_refined/2"])
    (written,) = tmp_path.rglob("*.ckpt")
    assert float(written.stem) == pytest.approx(figures["val/boundary_f1_refined"], abs=1e-6)
    logged = {name for name in trainer.callback_metrics if name.startswith("val/")}
    assert logged == {
        "val/miou_gain", "val/boundary_f1_refined", "val/iou_refined/1", "val/dice_refined/2"
    }  # fmt: skip


def test_the_progress_bar_shows_the_gain(plain):
    class Seen(TQDMProgressBar):
        shown: dict = {}  # noqa: RUF012

        def on_validation_end(self, trainer, pl_module):
            self.shown.update(self.get_metrics(trainer, pl_module))

    bar = Seen()
    callback = plain()
    trainer = Trainer(
        **{**SILENT, "enable_progress_bar": True}, max_epochs=1, callbacks=[callback, bar]
    )
    trainer.fit(Segmenter("logits"), loader(2), loader())
    shown = {name: value for name, value in bar.shown.items() if name.startswith("val/")}
    assert set(shown) == {"val/miou_refined", "val/miou_gain"}
    assert shown["val/miou_gain"] == pytest.approx(callback.figures["val/miou_gain"])


def metrics():
    return MetricCollection(
        {
            "iou_without_0": MulticlassJaccardIndex(
                NUM_CLASSES, ignore_index=IGNORE, average="weighted"
            ),
            "acc": MulticlassAccuracy(NUM_CLASSES, ignore_index=IGNORE, average=None),
        }
    )


def expected_metrics(random_sam, count):
    """Compute the metrics with torchmetrics, the refiner and no callback."""
    refiner, module, data = Refiner(random_sam, REFINE), Segmenter().eval(), Blobs(count)
    sides = {"raw": metrics(), "refined": metrics()}
    with torch.no_grad():
        for image, target in zip(data.images, data.targets, strict=True):
            logits = module.network(image[None] / 255 - 0.5)[0]
            sides["raw"].update(logits.argmax(0)[None], target[None])
            refined = refiner(image, logits.softmax(dim=0)).labels
            sides["refined"].update(refined[None], target[None])
    found = {side: collection.compute() for side, collection in sides.items()}
    expected = {
        f"iou_without_0_{side}": values["iou_without_0"].item() for side, values in found.items()
    }
    expected["iou_without_0_gain"] = (
        expected["iou_without_0_refined"] - expected["iou_without_0_raw"]
    )
    for c in range(NUM_CLASSES):
        pair = [found[side]["acc"][c].item() for side in sides]
        expected |= {
            f"acc_raw/{c}": pair[0],
            f"acc_refined/{c}": pair[1],
            f"acc_gain/{c}": pair[1] - pair[0],
        }
    return expected


def test_metrics_of_the_user(plain, random_sam):
    callback = plain(metrics=metrics(), log=(), prog_bar=())
    trainer = Trainer(**SILENT, callbacks=[callback])
    (logged,) = trainer.test(Segmenter(), loader(5), verbose=False)
    expected = expected_metrics(random_sam, 5)
    assert expected["iou_without_0_gain"] != 0
    assert logged == {f"test/{k}": pytest.approx(v, abs=1e-6) for k, v in expected.items()}
    assert expected.keys() <= callback.history[0].keys()
    (again,) = trainer.validate(Segmenter(), loader(5), verbose=False)
    assert again == {f"val/{k}": pytest.approx(v, abs=1e-6) for k, v in expected.items()}


def test_metrics_of_the_user_through_fit_and_checkpoints(plain, random_sam, tmp_path):
    callback = plain(metrics=metrics())
    best = ModelCheckpoint(tmp_path, monitor="val/iou_without_0_refined", mode="max")
    trainer = Trainer(
        **{**SILENT, "enable_checkpointing": True}, max_epochs=2, callbacks=[callback, best]
    )
    trainer.fit(Segmenter("logits"), loader(2), loader())
    values = [entry["iou_without_0_refined"] for entry in callback.history]
    assert best.best_model_score == pytest.approx(max(values))
    state = torch.load(best.best_model_path, weights_only=False)["state_dict"]
    assert not any("metric" in key for key in state)


def test_metrics_that_do_not_fit_end_the_sanity_check(plain):
    callback = plain(metrics=MulticlassJaccardIndex(NUM_CLASSES))  # 255 is no class
    trainer = Trainer(**SILENT, max_epochs=1, callbacks=[callback])
    with pytest.raises(ValueError, match="metrics must take label maps and targets"):
        trainer.fit(Segmenter("logits"), loader(2), loader())
    assert trainer.global_step == 0


def test_the_command_writes_every_figure(folder, tmp_path):
    name = "torchmetrics.classification.MulticlassJaccardIndex"
    values = [f"callback.metrics={{_target_: {name}, num_classes: 4, ignore_index: 255}}"]
    values += ["callback.log=[miou_gain]"]
    _, written = execute(tmp_path / "out", *overrides(folder, *values))
    assert written["val/MulticlassJaccardIndex_refined"] == pytest.approx(
        written["val/miou_refined"], abs=1e-6
    )
    assert "val/iou_raw/disc" in written
    with next(Path(tmp_path).rglob("metrics.csv")).open() as file:
        columns = set(file.readline().strip().split(","))
    assert "val/miou_gain" in columns
    assert "val/iou_raw/disc" not in columns


class TestClassesOfOneMean:
    """Class 3 is in no target: raw predicts it, and the refined prediction here does not."""

    def callback(self, random_sam, monkeypatch, **kwargs):
        original = RunState.refine

        def without_class(state, inputs, dataloader_idx=0):
            found, seconds = original(state, inputs, dataloader_idx)
            kept = [replace(one, labels=one.labels.where(one.labels != 3, 0)) for one in found]
            return kept, seconds

        monkeypatch.setattr(RunState, "refine", without_class)
        names = ["sky", "road", "car", "book"]
        return SAMRefineCallback(random_sam, class_names=names, refine=REFINE, **kwargs)

    def warnings_of(self, caught):
        return [str(one.message) for one in caught if "a class in no target" in str(one.message)]

    @pytest.mark.slow
    def test_they_are_named_once_a_stage(self, random_sam, monkeypatch, tmp_path):
        callback = self.callback(random_sam, monkeypatch, report=tmp_path / "report.html")
        module = Segmenter("logits", channels=4)
        # Unchanged by training, which would unlearn the class.
        module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)
        trainer = Trainer(**SILENT, max_epochs=3, callbacks=[callback])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.fit(module, loader(2), loader())
        first, *others = callback.history
        assert {one["miou_gain_same_classes"] for one in others} == {
            first["miou_gain_same_classes"]
        }
        raw, refined = (
            np.mean([first[f"iou_{side}/{name}"] for name in ("sky", "road", "car")])
            for side in ("raw", "refined")
        )
        gain = refined - raw
        assert first["miou_gain_same_classes"] == pytest.approx(gain, abs=1e-12)
        (text,) = self.warnings_of(caught)
        assert "SAMRefineCallback: val: " in text
        assert (
            f"(raw: book); over the 3 classes of both means the gain is {100 * gain:+.2f}" in text
        )
        assert f"not {100 * first['miou_gain']:+.2f}" in text
        page = (tmp_path / "report.html").read_text(encoding="utf-8")
        assert "(raw: book); over the 3 classes of both means" in page
