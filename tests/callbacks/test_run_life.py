"""What else happens to a run: averaged weights, tuners, interruptions, resumed and copied runs.

Each figure is compared with torchmetrics inside the module's own validation step.
"""

from __future__ import annotations

import copy

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.tuner import Tuner
from lightning_stubs import IGNORE, NUM_CLASSES, REFINE, SILENT, Blobs, Segmenter, loader
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassJaccardIndex

from lightning_samrefine import SAMRefineCallback


class Measured(Segmenter):
    """Measures its own raw predictions, with whatever weights the validation runs."""

    def __init__(self, lr=0.05):
        super().__init__("logits")
        self.lr = lr
        self.jaccard = MulticlassJaccardIndex(NUM_CLASSES, ignore_index=IGNORE)
        self.measured = []

    def validation_step(self, batch, batch_idx):
        logits, target = self.logits_and_target(batch)
        self.jaccard.update(logits, target)
        return logits

    def on_validation_epoch_start(self):
        self.jaccard.reset()

    def on_validation_epoch_end(self):
        if not self.trainer.sanity_checking:
            self.measured.append(float(self.jaccard.compute()))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


@pytest.fixture
def callback(random_sam):
    return SAMRefineCallback(random_sam, num_classes=NUM_CLASSES, refine=REFINE)


def trainer_of(*callbacks, **kwargs):
    return Trainer(**{**SILENT, "max_epochs": 3, **kwargs}, callbacks=list(callbacks))


def raw(callback):
    return [entry["miou_raw"] for entry in callback.history]


def ema():
    averaging = pytest.importorskip("lightning.pytorch.callbacks.weight_averaging")
    return averaging.EMAWeightAveraging(decay=0.5)


@pytest.mark.parametrize(
    "average",
    [ema, lambda: StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)],
    ids=["ema", "swa"],
)
def test_averaged_weights_are_the_ones_that_are_measured(callback, average):
    torch.manual_seed(0)
    module = Measured()
    trainer_of(callback, average()).fit(module, loader(4), loader(2, seed=9))
    assert len(raw(callback)) == 3
    assert raw(callback) == pytest.approx(module.measured, abs=1e-6)


class Data(LightningDataModule):
    def __init__(self):
        super().__init__()
        self.batch_size = 1

    def train_dataloader(self):
        return DataLoader(Blobs(4), batch_size=self.batch_size)

    def val_dataloader(self):
        return loader(2, seed=9)


@pytest.mark.slow
def test_tuners_run_beside_the_callback_and_leave_no_trace_in_it(callback, tmp_path):
    module = Measured()
    trainer = trainer_of(callback, default_root_dir=tmp_path)
    tuner = Tuner(trainer)
    data = Data()
    tuner.scale_batch_size(module, datamodule=data, mode="power", max_trials=2, steps_per_trial=1)
    assert data.batch_size == 2 or data.batch_size == 4
    tuner.lr_find(module, datamodule=data, num_training=4)
    assert callback.history == []
    module.measured.clear()
    trainer.fit(module, datamodule=data)
    assert raw(callback) == pytest.approx(module.measured, abs=1e-6)
    assert len(raw(callback)) == 3


def test_a_resumed_run_measures_its_first_validation(random_sam, tmp_path):
    def run(epochs, path=None):
        callback = SAMRefineCallback(
            random_sam, num_classes=NUM_CLASSES, refine=REFINE, every_n_epochs=2
        )
        trainer = trainer_of(callback, max_epochs=epochs)
        trainer.fit(Measured(), loader(4), loader(2, seed=9), ckpt_path=path)
        return trainer, callback

    first, _ = run(2)
    first.save_checkpoint(tmp_path / "half.ckpt")
    _, callback = run(5, tmp_path / "half.ckpt")
    assert [entry["epoch"] for entry in callback.history] == [0, 2, 4]


def test_a_keyboard_interrupt_in_training_frees_all_and_the_next_run_works(callback):
    class Interrupted(Measured):
        def training_step(self, batch, batch_idx):
            if self.trainer.current_epoch == 1:
                raise KeyboardInterrupt
            return super().training_step(batch, batch_idx)

    module = Interrupted()
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        trainer_of(callback).fit(module, loader(4), loader(2, seed=9))
    assert len(callback.history) == 1
    assert callback._attached is None
    assert not any(part._forward_hooks for part in module.modules())
    again = Measured()
    trainer_of(callback, max_epochs=1).fit(again, loader(4), loader(2, seed=9))
    assert raw(callback)[1:] == pytest.approx(again.measured, abs=1e-6)


def test_a_deep_copy_is_a_callback_of_its_own(random_sam, tmp_path):
    callback = SAMRefineCallback(
        random_sam, num_classes=NUM_CLASSES, refine=REFINE, name="first", report=tmp_path / "r.html"
    )
    module = Measured()
    trainer_of(callback, max_epochs=1).fit(module, loader(4), loader(2, seed=9))
    twin = copy.deepcopy(callback)
    assert twin.history == callback.history
    assert twin.state_key == callback.state_key
    trainer_of(twin, max_epochs=1).validate(module, loader(2, seed=9), verbose=False)
    assert len(twin.history) == len(callback.history) + 1
    assert twin.history[-1]["miou_raw"] == pytest.approx(callback.history[-1]["miou_raw"])
