"""Which validations are measured, and where figures, pictures, panels and reports go."""

from __future__ import annotations

import csv
import pickle
import re
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_stubs import REFINE, SILENT, Blobs, Segmenter, loader
from torch.utils.data import DataLoader, IterableDataset

import lightning_samrefine
from lightning_samrefine import RefineConfig

OTHER = RefineConfig(min_region_area=4, pred_iou_thresh=0.4)


def fit(callbacks, module=None, train=None, **kwargs):
    torch.manual_seed(0)
    arguments = {**SILENT, "max_epochs": 2, "log_every_n_steps": 1, **kwargs}
    trainer = Trainer(**arguments, callbacks=callbacks)
    trainer.fit(module or Segmenter(), loader(4) if train is None else train, loader(2, seed=9))
    return trainer


class Frozen(Segmenter):
    """Keeps its weights, which are wrong often enough for SAM to change masks."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def figures(trainer):
    return {
        name: float(value)
        for name, value in trainer.callback_metrics.items()
        if "refine_ms" not in name
    }


def files(folder):
    return {path.relative_to(folder).as_posix() for path in Path(folder).rglob("*.*")}


def drawn(folder):
    return sorted(path.name for path in Path(folder).rglob("panels/*.png"))


def headings(report):
    return re.findall("<h2>(val|test)(.*?)</h2>", Path(report).read_text(encoding="utf-8"))


def logged_epochs(logger, name="val/miou_refined"):
    with Path(logger.log_dir, "metrics.csv").open() as file:
        return [row["epoch"] for row in csv.DictReader(file) if row[name]]


class TestNames:
    def test_two_callbacks_log_what_each_logs_alone(self, make, tmp_path):
        alone = {}
        for name, refine in (("fast", OTHER), (None, REFINE)):
            found = figures(fit([make(refine=refine)], Frozen()))
            assert found["val/miou_refined"] != found["val/miou_raw"]
            part = "val" if name is None else f"val/{name}"
            alone |= {key.replace("val", part, 1): value for key, value in found.items()}
        assert alone["val/fast/miou_refined"] != alone["val/miou_refined"]
        both = [make(refine=OTHER, name="fast"), make(refine=REFINE)]
        assert figures(fit(both, Frozen())) == alone
        assert both[0].history[-1]["miou_refined"] != both[1].history[-1]["miou_refined"]

    @pytest.mark.slow
    def test_their_panels_reports_and_pictures_lie_side_by_side(self, make, tmp_path):
        shown = {"panels": 1, "report": True}
        both = [make(name="fast", **shown), make(**shown)]
        logger = TensorBoardLogger(tmp_path)
        fit(both, max_epochs=1, logger=logger)
        found = {name for name in files(logger.log_dir) if not name.startswith("events")}
        assert found - {"hparams.yaml"} == {
            "report.html",
            "fast_report.html",
            "images.csv",
            "fast_images.csv",
            "panels/val_epoch_000.png",
            "panels/fast_val_epoch_000.png",
        }
        text = Path(logger.log_dir, "fast_report.html").read_text(encoding="utf-8")
        assert "<h2>fast, val, epoch 0</h2>" in text
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        images = EventAccumulator(logger.log_dir).Reload().Tags()["images"]
        assert {"val/panels", "val/fast/panels", "val/fast/class_iou"} <= set(images)

    def test_states_and_checkpoints_keep_them_separate(self, make, tmp_path):
        both = [make(name="fast"), make()]
        assert both[0].state_key != both[1].state_key
        assert make().state_key == "SAMRefineCallback"
        checkpoint = ModelCheckpoint(tmp_path, monitor="val/fast/miou_refined", mode="max")
        fit([*both, checkpoint], enable_checkpointing=True)
        assert checkpoint.best_model_score == pytest.approx(
            max(entry["miou_refined"] for entry in both[0].history)
        )
        fit([make(name="fast"), make()], max_epochs=3, **{"enable_checkpointing": False})
        assert pickle.loads(pickle.dumps(both[0])).name == "fast"

    def test_suffixes_of_loaders_stay_last(self, make):
        trainer = Trainer(**SILENT, callbacks=[make(name="fast")])
        trainer.test(Segmenter(), [loader(2), loader(2, seed=1)], verbose=False)
        assert "test/fast/miou_refined/dataloader_idx_1" in trainer.callback_metrics

    @pytest.mark.parametrize("names", [(None, None), ("a", "a"), ("Fast", "fast")])
    def test_equal_names_are_refused_before_any_batch(self, make, names):
        module = Segmenter()
        # Lightning itself refuses callbacks of one state key.
        expected = r"name must differ between the 2|more than one stateful callback"
        with pytest.raises((MisconfigurationException, RuntimeError), match=expected):
            fit([make(name=name) for name in names], module)
        assert module.forwards == 0

    def test_one_report_for_two_is_refused(self, make, tmp_path):
        both = [make(name=name, report=tmp_path / "x.html") for name in ("a", "b")]
        with pytest.raises(MisconfigurationException, match="report must differ"):
            fit(both)

    @pytest.mark.parametrize(
        ("name", "error"),
        [("", ValueError), ("a/b", ValueError), ("..", ValueError), (3, TypeError)],
    )
    def test_names_that_loggers_would_change_are_refused(self, make, name, error):
        with pytest.raises(error, match="name must be"):
            make(name=name)

    def test_the_presets_of_other_apps_take_a_name(self):
        from hydra import compose, initialize_config_dir

        root = Path(lightning_samrefine.__file__).parent / "searchpath"
        with initialize_config_dir(str(root), version_base="1.3"):
            cfg = compose(overrides=["+samrefine@fast=fast", "fast.name=fast"])
        assert cfg.fast.name == "fast"


class TestSchedule:
    @pytest.mark.parametrize(
        "other",
        [
            ModelCheckpoint(monitor="val/miou_refined", mode="max"),
            EarlyStopping("val/miou_refined", mode="max", patience=9),
        ],
        ids=["checkpoint", "stopping"],
    )
    def test_a_monitor_has_its_figure_from_the_first_validation_on(self, make, tmp_path, other):
        logger = CSVLogger(tmp_path)
        callback = make(every_n_epochs=2)
        trainer = fit(
            [callback, other],
            max_epochs=5,
            logger=logger,
            enable_checkpointing=isinstance(other, ModelCheckpoint),
            default_root_dir=tmp_path,
        )
        assert trainer.current_epoch == 5
        assert logged_epochs(logger) == ["0", "2", "4"]

    def test_the_best_checkpoint_is_of_a_measured_epoch(self, make, tmp_path):
        callback = make(every_n_epochs=2)
        best = ModelCheckpoint(tmp_path, "{epoch}", monitor="val/miou_refined", mode="max")
        fit([callback, best], max_epochs=4, enable_checkpointing=True)
        measured = {entry["epoch"]: entry["miou_refined"] for entry in callback.history}
        assert sorted(measured) == [0, 2]
        epoch = int(re.search(r"epoch=(\d+)", best.best_model_path)[1])
        assert measured[epoch] == pytest.approx(max(measured.values()))
        # The weights in the file give the figure that it was chosen for.
        again = make()
        module = Segmenter()
        module.load_state_dict(torch.load(best.best_model_path)["state_dict"])
        Trainer(**SILENT, callbacks=[again]).validate(module, loader(2, seed=9), verbose=False)
        assert again.history[0]["miou_refined"] == pytest.approx(measured[epoch], abs=1e-6)

    def test_validations_of_an_endless_stream_are_counted(self, make, tmp_path):
        class Stream(IterableDataset):
            def __iter__(self):
                while True:
                    yield Blobs(1)[0]

        callback = make(every_n_epochs=2, panels=1, panels_every_n_epochs=4)
        trainer = fit(
            [callback],
            train=DataLoader(Stream(), batch_size=1),
            max_epochs=-1,
            max_steps=12,
            val_check_interval=2,
            check_val_every_n_epoch=None,
            default_root_dir=tmp_path,
        )
        assert trainer.global_step == 12
        assert [entry["epoch"] for entry in callback.history] == [0, 0, 0]
        # Of the validations after 2, 4, … 12 batches the first, third and fifth.
        assert [entry["step"] for entry in callback.history] == [1, 5, 9]
        assert len(drawn(tmp_path)) == 2

    def test_every_fit_begins_anew(self, make):
        callback = make(every_n_epochs=3)
        for _ in range(2):
            fit([callback])
        assert [entry["epoch"] for entry in callback.history] == [0, 0]


class TwoOptimizers(Segmenter):
    """Steps each of two optimizers with every batch, so that `global_step` counts double."""

    def __init__(self):
        super().__init__("logits")
        self.automatic_optimization = False

    def configure_optimizers(self):
        return [torch.optim.SGD(self.parameters(), lr=0.01) for _ in range(2)]

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()


class TestSteps:
    @pytest.mark.slow
    @pytest.mark.parametrize("module", [Segmenter, TwoOptimizers])
    def test_figures_and_pictures_lie_at_one_step(self, make, tmp_path, module):
        logger = TensorBoardLogger(tmp_path)
        callback = make(panels=1)
        fit([callback], module(), logger=logger)
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(logger.log_dir).Reload()
        steps = [event.step for event in events.Scalars("val/miou_refined")]
        assert len(set(steps)) == 2
        assert [event.step for event in events.Images("val/panels")] == steps
        assert [entry["step"] for entry in callback.history] == steps

    @pytest.mark.slow
    def test_several_validations_an_epoch_have_their_own_panels_and_places(self, make, tmp_path):
        logger = CSVLogger(tmp_path)
        callback = make(panels=1, report=True)
        fit([callback], max_epochs=1, val_check_interval=0.5, logger=logger)
        assert drawn(tmp_path) == ["val_epoch_000.png", "val_epoch_000_step_000001.png"]
        text = Path(logger.log_dir, "report.html").read_text(encoding="utf-8")
        assert "<h2>val, epoch 0, step 1</h2>" in text
        assert "over steps" in text

        from lightning_samrefine.reporting.charts import draw_curve

        axes = draw_curve(callback.history).axes[0]
        assert list(axes.lines[0].get_xdata()) == [0, 1]
        assert axes.get_xlabel() == "step"

    def test_a_curve_holds_the_running_fit_alone(self, make, tmp_path):
        callback = make(report=tmp_path / "r.html")
        trainer = Trainer(**SILENT, callbacks=[callback])
        trainer.validate(Segmenter(), loader(2), verbose=False)
        fit([callback], max_epochs=1)
        assert len(callback.history) == 2
        assert "over epochs" not in (tmp_path / "r.html").read_text(encoding="utf-8")


class TestFolders:
    @pytest.mark.slow
    def test_wandb_runs_keep_their_own_files(self, make, tmp_path, monkeypatch):
        pytest.importorskip("wandb")
        monkeypatch.setenv("WANDB_MODE", "offline")
        monkeypatch.chdir(tmp_path)
        import wandb

        reports = []
        for version in ("first", "second"):
            logger = WandbLogger(project="masks", version=version, save_dir=tmp_path, offline=True)
            trainer = Trainer(
                **{**SILENT, "logger": logger}, callbacks=[make(panels=1, report=True)]
            )
            trainer.validate(Segmenter(), loader(), verbose=False)
            wandb.finish()
            reports += sorted(set(tmp_path.rglob("report.html")) - set(reports))
            assert len(drawn(tmp_path)) == len(reports)
        assert [path.relative_to(tmp_path).as_posix() for path in reports] == [
            "masks/first/report.html",
            "masks/second/report.html",
        ]

    @pytest.mark.slow
    def test_a_folder_without_a_logger_keeps_every_runs_files(self, make, tmp_path):
        texts = []
        for seed in range(2):
            callback = make(panels=1, report=True)
            trainer = Trainer(**SILENT, default_root_dir=tmp_path, callbacks=[callback])
            trainer.validate(Segmenter(), loader(2, seed=seed), verbose=False)
            texts.append((tmp_path / "report.html").read_text(encoding="utf-8"))
        assert texts[0] == texts[1]
        assert drawn(tmp_path) == ["val_epoch_000-v1.png", "val_epoch_000.png"]
        assert sorted(path.name for path in tmp_path.glob("*.html")) == [
            "report-v1.html",
            "report.html",
        ]
        # The same callback goes on with its own report.
        trainer.validate(Segmenter(), loader(2), verbose=False)
        assert len(list(tmp_path.glob("*.html"))) == 2
        assert len(drawn(tmp_path)) == 3

    @pytest.mark.slow
    def test_a_report_holds_the_runs_of_its_own_folder(self, make, tmp_path):
        callback = make(report=True)
        for name in ("first", "second"):
            trainer = fit([callback], max_epochs=1, default_root_dir=tmp_path / name)
            if name == "first":
                trainer.test(Segmenter(), loader(2), verbose=False)
        assert headings(tmp_path / "first" / "report.html") == [("test", ""), ("val", ", epoch 0")]
        assert headings(tmp_path / "second" / "report.html") == [("val", ", epoch 0")]
        with (tmp_path / "second" / "images.csv").open() as file:
            assert {row["evaluation"] for row in csv.DictReader(file)} == {"val"}

    @pytest.mark.slow
    def test_an_evaluation_replaces_all_loaders_of_its_stage(self, make, tmp_path):
        callback = make(report=tmp_path / "r.html")
        trainer = Trainer(**SILENT, callbacks=[callback])
        trainer.validate(Segmenter(), [loader(1) for _ in range(11)], verbose=False)
        expected = [("val", f", dataloader {index}") for index in range(11)]
        assert headings(tmp_path / "r.html") == expected
        trainer.validate(Segmenter(), loader(2), verbose=False)
        assert headings(tmp_path / "r.html") == [("val", "")]

    def test_fast_dev_run_writes_nothing(self, make, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        callback = make(panels=2, report=True)
        trainer = Trainer(fast_dev_run=True, accelerator="cpu", callbacks=[callback])
        trainer.fit(Segmenter(), loader(), loader())
        assert callback.history
        assert files(tmp_path) == set()
        callback = make(report=tmp_path / "mine.html")
        trainer = Trainer(fast_dev_run=True, accelerator="cpu", callbacks=[callback])
        trainer.validate(Segmenter(), loader(), verbose=False)
        assert files(tmp_path) == set()
        # Nor does one after a run that has.
        callback = make(report=True)
        fit([callback], max_epochs=1, default_root_dir=tmp_path / "run")
        trainer = Trainer(fast_dev_run=True, accelerator="cpu", callbacks=[callback])
        trainer.validate(Segmenter(), loader(), verbose=False)
        assert files(tmp_path) == {"run/report.html", "run/images.csv"}
