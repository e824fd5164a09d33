"""The callback under a real Trainer: what it logs, when, and from which outputs."""

from __future__ import annotations

import csv
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_stubs import (
    IGNORE,
    NUM_CLASSES,
    REFINE,
    SILENT,
    Blobs,
    DictBlobs,
    Segmenter,
    expected_figures,
    loader,
)
from torch.utils.data import DataLoader

from lightning_samrefine import RefineConfig, SAMRefineCallback
from lightning_samrefine.adapters.batch_adapter import RefineInputs
from lightning_samrefine.metrics.comparison import RefinementComparison


@pytest.fixture(scope="module")
def reference(random_sam):
    """The figures of the plain case, to which other ways of running it must come."""
    callback = SAMRefineCallback(random_sam, num_classes=NUM_CLASSES, refine=REFINE, log="all")
    return drop_time(run_validate(callback))


def run_validate(callback, module=None, loaders=None, **kwargs):
    trainer = Trainer(**{**SILENT, **kwargs}, callbacks=[callback])
    loaders = loader() if loaders is None else loaders
    results = trainer.validate(Segmenter() if module is None else module, loaders, verbose=False)
    return {key: value for one in results for key, value in one.items()}


def read_rows(logger):
    with Path(logger.log_dir, "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def untimed(figures, prefix=""):
    return {
        prefix + name: pytest.approx(value, abs=1e-6)
        for name, value in figures.items()
        if "refine_ms" not in name
    }


def drop_time(logged):
    return {name: value for name, value in logged.items() if "refine_ms" not in name}


class TestFigures:
    def test_validate_logs_what_the_refiner_gives(self, make, random_sam):
        logged = run_validate(make())
        expected = expected_figures(Segmenter(), Blobs(4), random_sam)
        assert expected["miou_gain"] != 0
        assert 0 < expected["refine_accept_rate"] < 1
        assert drop_time(logged) == untimed(expected, "val/")
        assert logged["val/refine_ms_per_image"] > 0

    def test_test_logs_under_its_own_prefix(self, make, random_sam):
        trainer = Trainer(**SILENT, callbacks=[make()])
        (logged,) = trainer.test(Segmenter(), loader(3), verbose=False)
        expected = expected_figures(Segmenter(), Blobs(3), random_sam)
        assert drop_time(logged) == untimed(expected, "test/")

    @pytest.mark.numerical
    def test_batch_size_changes_nothing(self, make):
        one = drop_time(run_validate(make(), loaders=loader(5, batch_size=1)))
        assert drop_time(run_validate(make(), loaders=loader(5, batch_size=3))) == one

    def test_class_names_and_trimap_width(self, make, random_sam):
        names = ["sky", "road", "pole"]
        logged = run_validate(make(num_classes=None, class_names=names, trimap_width=1))
        expected = expected_figures(
            Segmenter(), Blobs(4), random_sam, class_names=names, trimap_width=1
        )
        assert "val/iou_refined/pole" in logged
        assert drop_time(logged) == untimed(expected, "val/")

    @pytest.mark.parametrize(
        ("refine", "expected"),
        [
            (REFINE, REFINE),
            ("algorithm4", RefineConfig.preset("algorithm4")),
            ({"pred_iou_thresh": 0.7}, RefineConfig.preset("auto", pred_iou_thresh=0.7)),
            ({"preset": "algorithm4", "stride": 1}, RefineConfig.preset("algorithm4", stride=1)),
        ],
    )
    def test_thresholds_in_every_form(self, make, refine, expected):
        assert make(refine=refine).refine_config == expected

    def test_thresholds_reach_sam(self, make):
        assert run_validate(make(refine=replace(REFINE, pred_iou_thresh=1.0)))["val/miou_gain"] == 0
        assert run_validate(make(refine=REFINE))["val/miou_gain"] != 0

    def test_several_loaders_have_figures_of_their_own(self, make, random_sam):
        logged = run_validate(make(), loaders=[loader(2, seed=1), loader(3, seed=2)])
        expected = {}
        for index, (length, seed) in enumerate([(2, 1), (3, 2)]):
            figures = expected_figures(Segmenter(), Blobs(length, seed), random_sam)
            expected |= {f"{k}/dataloader_idx_{index}": v for k, v in figures.items()}
        assert drop_time(logged) == untimed(expected, "val/")

    def test_one_named_loader_has_no_suffix(self, make):
        assert "val/miou_raw" in run_validate(make(), loaders={"only": loader(2)})

    def test_loaders_drawn_from_at_once_need_keys(self, make):
        loaders = {"a": DataLoader(DictBlobs(2), batch_size=2), "b": loader(2)}
        both = CombinedLoader(loaders, "max_size")
        callback = make(image_key="a.image", target_key="a.mask")

        class First(Segmenter):
            def logits_and_target(self, batch):
                return super().logits_and_target(batch["a"])

        logged = run_validate(callback, First(), both)
        assert drop_time(logged) == drop_time(run_validate(make(), loaders=loader(2)))

    def test_max_batches_measures_raw_on_the_same_images(self, make, random_sam):
        logged = run_validate(make(max_batches=1), loaders=[loader(4), loader(4, seed=1)])
        expected = {}
        for index in (0, 1):
            dataset = Blobs(4, seed=index)
            dataset.images, dataset.targets = dataset.images[:2], dataset.targets[:2]
            figures = expected_figures(Segmenter(), dataset, random_sam)
            expected |= {f"{k}/dataloader_idx_{index}": v for k, v in figures.items()}
        assert drop_time(logged) == untimed(expected, "val/")

    def test_an_image_without_a_region_counts_as_refined(self, make):
        logged = run_validate(make(refine={"min_region_area": 10_000}))
        assert logged["val/miou_gain"] == 0
        assert logged["val/refine_regions_per_image"] == 0
        assert logged["val/refine_accept_rate"] == 0
        assert logged["val/refine_failed_images"] == 0

    def test_all_ignored_targets_log_no_mean(self, make):
        dataset = Blobs(2)
        dataset.targets[:] = IGNORE
        logged = run_validate(make(), Segmenter("logits"), DataLoader(dataset))
        assert not any("miou" in name for name in logged)
        assert logged["val/refine_regions_per_image"] > 0


class TestSources:
    @pytest.mark.parametrize("returns", ["logits", "probs", "none", "loss"])
    @pytest.mark.parametrize("dataset", [Blobs, DictBlobs])
    def test_steps_and_batches(self, make, reference, returns, dataset):
        module = Segmenter(returns)
        logged = run_validate(make(), module, DataLoader(dataset(4), batch_size=2))
        assert drop_time(logged) == pytest.approx(reference, abs=1e-6)
        assert module.forwards == 2, "the network ran again"

    def test_a_child_called_by_the_step_is_captured(self, make, reference):
        module = Segmenter("none", call="child")
        assert drop_time(run_validate(make(), module)) == pytest.approx(reference, abs=1e-6)
        assert module.forwards == 0

    def test_label_maps_leave_raw_figures_as_they_are(self, make, reference):
        logged = run_validate(make(), Segmenter("labels"))
        assert logged["val/miou_raw"] == reference["val/miou_raw"]
        assert logged["val/miou_gain"] != 0

    def test_half_precision_outputs(self, make, reference):
        logged = run_validate(make(), Segmenter("half"))
        assert logged["val/miou_raw"] == pytest.approx(reference["val/miou_raw"], abs=0.02)

    def test_autocast_trainers(self, make, reference):
        logged = run_validate(make(), precision="bf16-mixed")
        assert logged["val/miou_raw"] == pytest.approx(reference["val/miou_raw"], abs=0.02)

    @pytest.mark.slow
    @pytest.mark.parametrize("returns", ["logits", "none"])
    def test_compiled_modules(self, make, reference, returns):
        module = torch.compile(Segmenter(returns), backend="eager")
        assert drop_time(run_validate(make(), module)) == pytest.approx(reference, abs=1e-6)

    def test_a_compiled_child(self, make, reference):
        module = Segmenter("none", call="child")
        module.network = torch.compile(module.network, backend="eager")
        assert drop_time(run_validate(make(), module)) == pytest.approx(reference, abs=1e-6)

    def test_binary_models(self, make):
        class Binary(DictBlobs):
            def __getitem__(self, index):
                sample = super().__getitem__(index)
                foreground = (sample["mask"] > 0).long()
                sample["mask"] = torch.where(sample["mask"] == IGNORE, IGNORE, foreground)[None]
                return sample

        class BinarySegmenter(Segmenter):
            def loss(self, logits, target):
                return super().loss(logits, target[:, 0])

        dataset = Binary(3)
        module = BinarySegmenter("none", channels=1)
        logged = run_validate(make(num_classes=2), module, DataLoader(dataset, batch_size=3))
        module.eval()
        with torch.no_grad():
            guess = module.network(dataset.images / 255 - 0.5)[:, 0] > 0
        raw = RefinementComparison(2, IGNORE)
        targets = torch.where(dataset.targets == IGNORE, IGNORE, (dataset.targets > 0).long())
        raw.update(guess.long(), guess.long(), targets)
        assert logged["val/miou_raw"] == pytest.approx(raw.compute()["miou_raw"], abs=1e-6)
        assert logged["val/miou_gain"] != 0

    def test_normalized_images(self, make, reference):
        mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

        class Normalized(Segmenter):
            def on_after_batch_transfer(self, batch, dataloader_idx):
                image, target = batch
                shift, scale = (torch.tensor(v).view(3, 1, 1) for v in (mean, std))
                return (image / 255 - shift) / scale, target

            def forward(self, image):
                shift, scale = (torch.tensor(v).view(3, 1, 1) for v in (mean, std))
                return super().forward((image * scale + shift) * 255)

        logged = run_validate(make(image_mean=mean, image_std=std), Normalized())
        assert drop_time(logged) == pytest.approx(reference, abs=1e-6)
        with pytest.raises(ValueError, match=r"image must be in .* set image_mean and image_std"):
            run_validate(make(), Normalized())

    def test_a_custom_adapter(self, make, reference):
        def adapter(batch, outputs, captured):
            probs = captured.softmax(dim=1)
            return RefineInputs(batch[0], probs, probs.argmax(dim=1), batch[1])

        logged = run_validate(make(adapter=adapter), Segmenter("none"))
        assert drop_time(logged) == pytest.approx(reference, abs=1e-6)

    def test_what_is_not_found_is_an_error_that_lists_what_was_there(self, make):
        class Odd(DictBlobs):
            def __getitem__(self, index):
                image, target = Blobs.__getitem__(self, index)
                return {"picture": image, "mask": target}

        class OddSegmenter(Segmenter):
            def logits_and_target(self, batch):
                return self(batch["picture"]), batch["mask"]

        loaders = DataLoader(Odd(2))
        with pytest.raises(ValueError, match=r"No image found.*'picture': uint8 \(1, 3, 32, 40\)"):
            run_validate(make(), OddSegmenter(), loaders)
        assert "val/miou_raw" in run_validate(make(image_key="picture"), OddSegmenter(), loaders)

    def test_num_classes_comes_from_the_module(self, make, reference):
        module = Segmenter()
        module.num_classes = NUM_CLASSES
        assert drop_time(run_validate(make(num_classes=None), module)) == reference
        module = Segmenter()
        module.hparams.num_classes = NUM_CLASSES
        assert drop_time(run_validate(make(num_classes=None), module)) == reference

    def test_num_classes_may_be_known_in_the_modules_setup_only(self, make, reference):
        class Late(Segmenter):
            def setup(self, stage):
                self.num_classes = NUM_CLASSES

        assert drop_time(run_validate(make(num_classes=None), Late())) == reference

    def test_without_num_classes_nothing_starts(self, make):
        module = Segmenter()
        with pytest.raises(MisconfigurationException, match=r"SAMRefineCallback\(num_classes="):
            run_validate(make(num_classes=None), module)
        assert module.forwards == 0
        trainer = Trainer(**SILENT, max_epochs=1, callbacks=[make(num_classes=None)])
        with pytest.raises(MisconfigurationException, match="num_classes"):
            trainer.fit(module, loader(), loader())
        assert module.forwards == 0

    @pytest.mark.parametrize("num_classes", [NUM_CLASSES, None])
    def test_thresholds_of_other_classes_are_an_error(self, make, num_classes):
        module = Segmenter()
        module.num_classes = NUM_CLASSES
        refine = replace(REFINE, class_names=["a", "b", "c", "d"], classes=[1])
        expected = r"tuned for the 3 classes of this run \(0, 1, 2\), got .* for 4 \(a, b, c, d\)"
        with pytest.raises(ValueError, match=expected):
            run_validate(make(num_classes=num_classes, refine=refine), module)
        assert module.forwards == 0

    def test_another_number_of_classes_is_an_error(self, make):
        with pytest.raises(
            ValueError, match=r"scores must .*num_classes=5, got .*\(2, 3, 32, 40\)"
        ):
            run_validate(make(num_classes=5), Segmenter("none"))


class Recorder(ModelCheckpoint):
    """Keeps every value that it saw under its monitor."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, monitor="val/miou_refined", mode="max", save_top_k=-1)
        self.seen = []

    def on_validation_end(self, trainer, pl_module):
        super().on_validation_end(trainer, pl_module)
        if not trainer.sanity_checking:
            self.seen.append(float(trainer.callback_metrics["val/miou_refined"]))


class TestFit:
    def fit(self, callbacks, module=None, **kwargs):
        torch.manual_seed(0)
        arguments = {**SILENT, "max_epochs": 2, "log_every_n_steps": 1, **kwargs}
        trainer = Trainer(**arguments, callbacks=callbacks)
        trainer.fit(module or Segmenter(), loader(4), loader(2, seed=9))
        return trainer

    def test_checkpointing_and_loggers_see_the_same_epoch(self, make, tmp_path):
        recorder = Recorder(tmp_path)
        loggers = [CSVLogger(tmp_path, "csv"), TensorBoardLogger(tmp_path, "tb")]
        trainer = self.fit(
            [make(), recorder], max_epochs=3, logger=loggers, enable_checkpointing=True
        )
        rows = read_rows(loggers[0])
        column = [float(row["val/miou_refined"]) for row in rows if row["val/miou_refined"]]
        assert len(column) == 3
        assert len(set(column)) > 1
        assert column == pytest.approx(recorder.seen)
        assert recorder.best_model_score == pytest.approx(max(column))
        logged = {name for row in rows for name, value in row.items() if value}
        assert {"val/miou_raw", "val/miou_gain", "val/iou_raw/0", "val/iou_refined/2"} <= logged
        assert {"val/refine_accept_rate", "val/refine_regions_per_image"} <= logged
        assert {"val/refine_ms_per_image", "val/refine_failed_images"} <= logged

        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(loggers[1].log_dir).Reload()
        values = [event.value for event in events.Scalars("val/miou_refined")]
        assert values == pytest.approx(column)
        assert logged - {"epoch", "step"} <= set(events.Tags()["scalars"])
        assert trainer.callback_metrics["val/miou_refined"] == pytest.approx(column[-1])

    def test_early_stopping_sees_it_at_once(self, make):
        stopping = EarlyStopping("val/miou_refined", mode="max", patience=1, min_delta=1.0)
        trainer = self.fit([stopping, make()], max_epochs=5)
        assert trainer.current_epoch == 2
        assert stopping.stopped_epoch == 1

    def test_epochs_that_are_not_due_log_nothing(self, make, tmp_path):
        logger = CSVLogger(tmp_path)
        self.fit([make(every_n_epochs=2)], max_epochs=5, logger=logger)
        rows = read_rows(logger)
        assert [row["epoch"] for row in rows if row["val/miou_refined"]] == ["0", "2", "4"]

    def test_validate_alone_is_always_due(self, make):
        assert "val/miou_raw" in run_validate(make(every_n_epochs=7))

    def test_the_sanity_check_neither_runs_sam_nor_logs(self, make, random_sam, monkeypatch):
        embedded = []
        embed = random_sam.encode_images
        monkeypatch.setattr(
            random_sam,
            "encode_images",
            lambda images: (embedded.append(len(images)), embed(images))[1],
        )

        class AfterSanityCheck(Callback):
            seen = None

            def on_sanity_check_end(self, trainer, pl_module):
                self.seen = (list(embedded), dict(trainer.callback_metrics))

        watching = AfterSanityCheck()
        self.fit([make(), watching], max_epochs=1, num_sanity_val_steps=2)
        assert watching.seen == ([], {})
        assert embedded == [2]

    def test_the_sanity_check_reports_a_wrong_set_up_before_training(self, make):
        module = Segmenter("none")
        with pytest.raises(ValueError, match="num_classes=5"):
            self.fit([make(num_classes=5)], module)
        assert module.forwards == 1

    def test_fit_after_validate_and_validate_after_fit(self, make):
        callback = make()
        trainer = Trainer(**SILENT, max_epochs=2, callbacks=[callback])
        module = Segmenter()
        first = trainer.validate(module, loader(), verbose=False)
        trainer.fit(module, loader(), loader())
        last = trainer.callback_metrics["val/miou_refined"]
        second = trainer.validate(module, loader(), verbose=False)
        other = trainer.validate(module, [loader(3), loader(2)], verbose=False)
        assert first[0]["val/miou_refined"] != second[0]["val/miou_refined"]
        assert second[0]["val/miou_refined"] == pytest.approx(float(last))
        assert "val/miou_refined/dataloader_idx_1" in other[1]

    def test_datamodules(self, make):
        class Data(LightningDataModule):
            def val_dataloader(self):
                return loader(2)

        trainer = Trainer(**SILENT, callbacks=[make()])
        (logged,) = trainer.validate(Segmenter(), datamodule=Data(), verbose=False)
        assert "val/miou_gain" in logged

    @pytest.mark.parametrize(
        "flags",
        [
            {"fast_dev_run": True},
            {"limit_val_batches": 0},
            {"overfit_batches": 1},
            {"deterministic": True},
            {"detect_anomaly": True},
            {"inference_mode": False},
            {"val_check_interval": 0.5},
            {"num_sanity_val_steps": 0},
        ],
        ids=str,
    )
    def test_trainer_flags(self, make, flags):
        try:
            trainer = self.fit([make()], **{"max_epochs": 1, **flags})
        finally:
            torch.use_deterministic_algorithms(False)
        has_run = flags.get("limit_val_batches") != 0
        assert ("val/miou_raw" in trainer.callback_metrics) == has_run


class TestArguments:
    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"sam": 3}, TypeError, "sam must be a name for load_sam or a Promptable, got int"),
            ({"sam": "vit_q"}, ValueError, r"sam must be 'tiny', .* or a Promptable, got 'vit_q'"),
            ({"checkpoint": "x.pt"}, ValueError, "checkpoint must be None beside a loaded model"),
            (
                {"num_classes": 1},
                MisconfigurationException,
                "num_classes .* at least 2, got 1",
            ),
            ({"num_classes": 2.0}, TypeError, "num_classes must be .*, got 2.0"),
            (
                {"class_names": ["a"]},
                MisconfigurationException,
                "class_names must be .*=3 names, got 1",
            ),
            (
                {"class_names": "abc"},
                TypeError,
                "class_names must be .*, got 'abc'",
            ),
            (
                {"class_names": ["a", "b", "a"]},
                ValueError,
                "class_names must differ, got a more",
            ),
            ({"ignore_index": "255"}, TypeError, "ignore_index must be an integer, .*, got '255'"),
            ({"refine": "bets"}, ValueError, "refine must be .*, got 'bets'"),
            ({"refine": {"tau": 1}}, TypeError, "RefineConfig has no field tau"),
            ({"refine": 0.5}, TypeError, "refine must be .*, got float"),
            ({"precision": "fp8"}, ValueError, "precision must be .*, got 'fp8'"),
            ({"every_n_epochs": 0}, ValueError, "every_n_epochs must be .*, got 0"),
            ({"max_batches": True}, TypeError, "max_batches must be .*, got True"),
            ({"trimap_width": 0}, ValueError, "trimap_width must be .*, got 0"),
            ({"scores_kind": "soft"}, ValueError, "scores_kind must be one of .*, got 'soft'"),
            ({"image_mean": 0.5}, ValueError, "image_mean and image_std must be set"),
            ({"adapter": 3}, TypeError, "adapter must be a callable .*, got int"),
        ],
    )
    def test_bad_ones_name_themselves(self, make, random_sam, arguments, error, message):
        given = {"sam": random_sam, "num_classes": NUM_CLASSES, **arguments}
        with pytest.raises(error, match=message):
            SAMRefineCallback(**given)

    def test_a_missing_checkpoint_is_reported_before_any_batch(self):
        module = Segmenter()
        with pytest.raises(FileNotFoundError, match=r"checkpoint must be .*got 'nowhere\.pt'"):
            run_validate(SAMRefineCallback("vit_t", "nowhere.pt", NUM_CLASSES), module)
        assert module.forwards == 0

    def test_hydra_containers(self, make, random_sam):
        from omegaconf import OmegaConf

        config = OmegaConf.create(
            {
                "refine": {"min_region_area": 4, "pred_iou_thresh": 0.5},
                "class_names": ["a", "b", "c"],
                "image_mean": [0.5, 0.5, 0.5],
                "image_std": [0.5, 0.5, 0.5],
            }
        )
        callback = make(**dict(config.items()))
        assert callback.refine_config == RefineConfig.preset("auto", min_region_area=4)
        assert "val/iou_raw/c" in run_validate(callback)

    def test_lightning_cli(self, tmp_path):
        pytest.importorskip("jsonargparse", reason="LightningCLI needs jsonargparse")
        from lightning.pytorch.cli import LightningCLI

        callback = {
            "class_path": "lightning_samrefine.SAMRefineCallback",
            "init_args": {
                "sam": "vit_t",
                "checkpoint": "random",
                "num_classes": 3,
                "refine": {"pred_iou_thresh": 0.7},
                "image_mean": [0.5, 0.5, 0.5],
                "image_std": 0.5,
            },
        }
        cli = LightningCLI(
            Segmenter,
            run=False,
            save_config_callback=None,
            args={"trainer": {**SILENT, "callbacks": [callback]}},
        )
        found = next(c for c in cli.trainer.callbacks if isinstance(c, SAMRefineCallback))
        assert found.refine_config == RefineConfig.preset("auto", pred_iou_thresh=0.7)
        assert found.shared.num_classes == 3


class TestFailures:
    def failing(self, random_sam, monkeypatch, on):
        """Make SAM's encoder fail at the calls whose numbers are in `on`."""
        calls = iter(range(1000))
        embed = random_sam.encode_images

        def fail(images):
            if next(calls) in on:
                raise RuntimeError("out of memory, or so")
            return embed(images)

        monkeypatch.setattr(random_sam, "encode_images", fail)

    def test_images_that_fail_keep_raw_and_are_counted_and_warned_of_once(
        self, make, random_sam, monkeypatch
    ):
        self.failing(random_sam, monkeypatch, on={1, 3})
        loaders = loader(4, batch_size=1)
        with pytest.warns(RuntimeWarning, match="out of memory, or so") as caught:
            logged = run_validate(make(), loaders=loaders)
        assert sum("SAMRefineCallback" in str(w.message) for w in caught) == 1
        monkeypatch.undo()
        assert logged["val/refine_failed_images"] == 2

        dataset, module, comparison = Blobs(4), Segmenter(), RefinementComparison(3, IGNORE)
        from lightning_samrefine import Refiner

        module.eval()
        with torch.no_grad():
            logits = module.network(dataset.images / 255 - 0.5)
        for index in range(4):
            raw = logits[index].argmax(dim=0)
            out = Refiner(random_sam, REFINE)(dataset.images[index], logits[index].softmax(dim=0))
            refined = raw if index in (1, 3) else out.labels
            comparison.update(raw, refined, dataset.targets[index])
        expected = comparison.compute()
        assert logged["val/miou_raw"] == pytest.approx(expected["miou_raw"], abs=1e-6)
        assert logged["val/miou_refined"] == pytest.approx(expected["miou_refined"], abs=1e-6)

    def test_a_batch_that_fails_is_retried_image_by_image(self, make, random_sam, monkeypatch):
        self.failing(random_sam, monkeypatch, on={0})
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            logged = run_validate(make(), loaders=loader(4, batch_size=4))
        monkeypatch.undo()
        assert logged["val/refine_failed_images"] == 0
        assert drop_time(logged) == drop_time(run_validate(make(), loaders=loader(4, batch_size=4)))

    def test_everything_after_the_first_batch_fails_and_the_run_goes_on(
        self, make, random_sam, monkeypatch
    ):
        self.failing(random_sam, monkeypatch, on=set(range(1, 1000)))
        trainer = Trainer(**SILENT, max_epochs=2, callbacks=[make()])
        with pytest.warns(RuntimeWarning) as caught:
            trainer.fit(Segmenter(), loader(), loader())
        assert sum("SAMRefineCallback" in str(w.message) for w in caught) == 1
        assert trainer.callback_metrics["val/refine_failed_images"] == 2

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_scores_that_are_not_finite(self, make, bad):
        class Broken(Segmenter):
            def forward(self, image):
                logits = super().forward(image)
                logits[0, :, 3] = bad
                return logits

        with pytest.warns(RuntimeWarning, match="NaN or infinite"):
            logged = run_validate(make(), Broken(), loader(4, batch_size=2))
        assert logged["val/refine_failed_images"] == 2
        assert logged["val/miou_gain"] != 0

    def test_a_later_batch_that_cannot_be_read_is_left_out(self, make):
        class Cropping(Segmenter):
            def on_after_batch_transfer(self, batch, dataloader_idx):
                self.index = getattr(self, "index", -1) + 1
                return (batch[0], batch[1][:, :5]) if self.index == 1 else batch

            def validation_step(self, batch, batch_idx):
                return self(batch[0])

        with pytest.warns(RuntimeWarning, match=r"could not be read.*target must be .*, got shape"):
            logged = run_validate(make(), Cropping(), loader(5, batch_size=2))
        assert logged["val/refine_failed_images"] == 2
        dataset = Blobs(5)
        kept = torch.utils.data.Subset(dataset, [0, 1, 4])
        alone = run_validate(make(), loaders=DataLoader(kept, batch_size=2))
        assert logged["val/miou_refined"] == alone["val/miou_refined"]
