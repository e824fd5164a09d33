"""What the callback keeps beside the logger: its history, and panels on disk."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning_stubs import NUM_CLASSES, REFINE, Segmenter, loader
from PIL import Image

from lightning_samrefine import SAMRefineCallback


def run(random_sam, folder, task="fit", loaders=None, **kwargs):
    callback = SAMRefineCallback(random_sam, num_classes=NUM_CLASSES, refine=REFINE, **kwargs)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=2,
        callbacks=[callback],
        logger=CSVLogger(folder),
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    loaders = loader() if loaders is None else loaders
    if task == "fit":
        trainer.fit(Segmenter(), loader(), loaders)
    else:
        getattr(trainer, task)(Segmenter(), loaders, verbose=False)
    return trainer, callback


def test_history_holds_what_was_logged_in_every_epoch(random_sam, tmp_path):
    trainer, callback = run(random_sam, tmp_path)
    assert [(entry["stage"], entry["epoch"]) for entry in callback.history] == [
        ("val", 0),
        ("val", 1),
    ]
    last = callback.history[-1]
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    names = {name for name in logged if name.startswith("val/")}
    more = {name for name in last if f"val/{name}" not in names}
    assert more >= {"stage", "epoch", "dataloader_idx", "trimap_10px_miou_raw", "fixed_px/0"}
    for name in names:
        assert logged[name] == pytest.approx(last[name.removeprefix("val/")], rel=1e-6)


def test_panels_are_drawn_for_every_evaluation_into_the_log_folder(random_sam, tmp_path):
    trainer, _ = run(random_sam, tmp_path, panels=2)
    drawn = sorted(path.relative_to(trainer.log_dir) for path in tmp_path.rglob("*.png"))
    assert [path.as_posix() for path in drawn] == [
        "panels/val_epoch_000.png",
        "panels/val_epoch_001.png",
    ]


def test_every_dataloader_has_its_own_panels(random_sam, tmp_path):
    _, callback = run(random_sam, tmp_path, "test", [loader(seed=0), loader(seed=1)], panels=1)
    assert {path.name for path in tmp_path.rglob("*.png")} == {
        "test_dataloader_idx_0.png",
        "test_dataloader_idx_1.png",
    }
    assert [entry["dataloader_idx"] for entry in callback.history] == [0, 1]


def test_panels_are_drawn_at_the_given_interval_and_width(random_sam, tmp_path):
    run(random_sam, tmp_path, panels=1, panels_every_n_epochs=2, panels_width=500)
    (drawn,) = tmp_path.rglob("*.png")
    assert drawn.name == "val_epoch_000.png"
    assert Image.open(drawn).width == 500


@pytest.mark.slow
def test_a_report_holds_every_stage(random_sam, tmp_path):
    trainer, callback = run(random_sam, tmp_path, report=True)
    path = Path(trainer.log_dir) / "report.html"
    text = path.read_text(encoding="utf-8")
    assert "<h2>val, epoch 1</h2>" in text
    assert text.count("batch 0, image 0") >= 1
    assert "mIoU and trimap mIoU over epochs" in text
    trainer.test(Segmenter(), loader(), verbose=False)
    text = path.read_text(encoding="utf-8")
    assert "<h2>val, epoch 1</h2>" in text
    assert "<h2>test</h2>" in text
    assert f"{100 * callback.history[-1]['miou_refined']:.2f} %" in text
    pickle.loads(pickle.dumps(callback))


def test_a_report_goes_where_it_should(random_sam, tmp_path):
    names = ["sky/blue", "sky:blue", "road"]
    run(random_sam, tmp_path, "validate", report=tmp_path / "here.html", class_names=names)
    text = (tmp_path / "here.html").read_text(encoding="utf-8")
    assert all(f">{name}</th>" in text for name in names), "not the loggers' names"
    assert not list(tmp_path.rglob("report.html"))
    with pytest.raises(TypeError, match="report must be True, False or a path, got 3"):
        SAMRefineCallback(random_sam, num_classes=NUM_CLASSES, report=3)


def test_a_report_that_cannot_be_written_ends_no_run(random_sam, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.warns(UserWarning, match="panels or report were not written .*file"):
        _, callback = run(
            random_sam, tmp_path, "validate", report=str(tmp_path / "file" / "report.html")
        )
    assert callback.history[0]["miou_refined"] > 0


def test_no_panels_by_default(random_sam, tmp_path):
    run(random_sam, tmp_path, "validate")
    assert not list(tmp_path.rglob("*.png"))


def test_a_folder_that_cannot_be_written_ends_no_run(random_sam, tmp_path):
    callback = SAMRefineCallback(random_sam, num_classes=NUM_CLASSES, refine=REFINE, panels=1)
    (tmp_path / "panels").write_text("a file where the folder should be")
    trainer = Trainer(
        accelerator="cpu",
        callbacks=[callback],
        logger=False,
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with pytest.warns(UserWarning, match="panels or report were not written to .*File"):
        trainer.validate(Segmenter(), loader(), verbose=False)
    assert callback.history[0]["miou_refined"] > 0


@pytest.mark.parametrize(("panels", "error"), [(-1, ValueError), (1.5, TypeError)])
def test_a_wrong_number_of_panels_is_refused(random_sam, panels, error):
    with pytest.raises(error, match=r"panels must be an integer of at least 0, got"):
        SAMRefineCallback(random_sam, num_classes=NUM_CLASSES, panels=panels)
