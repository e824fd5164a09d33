"""A Trainer of the package pytorch_lightning, whose parts are not those of lightning.pytorch."""

from __future__ import annotations

import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_stubs import NUM_CLASSES, SILENT, loader
from torch import nn

from lightning_samrefine import SAMRefineCallback, SAMRefineWriter
from lightning_samrefine.tune.callback import TuneCallback

pl = pytest.importorskip("pytorch_lightning")


class Segmenter(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Conv2d(3, NUM_CLASSES, 1)

    def validation_step(self, batch, batch_idx):
        return {"logits": self.net(batch[0] / 255)}

    test_step = predict_step = validation_step

    def training_step(self, batch, batch_idx):
        return self.net(batch[0] / 255).mean()

    def configure_optimizers(self):
        return None


class OwnTrainer(pl.Trainer):
    """Frameworks subclass the Trainer."""


@pytest.mark.parametrize("trainer", [pl.Trainer, OwnTrainer])
@pytest.mark.parametrize("kind", [SAMRefineCallback, TuneCallback])
def test_its_trainer_is_refused_with_the_right_import(random_sam, kind, trainer):
    """MLflow's logger would not be known as one, for example, and mix up names of classes."""
    callback = kind(random_sam, num_classes=NUM_CLASSES)
    runner = trainer(**SILENT, callbacks=[callback], max_epochs=1)
    for run in (runner.validate, runner.test, runner.fit):
        with pytest.raises(MisconfigurationException, match=r"replace .* by `import lightning"):
            run(Segmenter(), loader(2))


def test_the_writer_refuses_it_before_it_writes(random_sam, tmp_path):
    writer = SAMRefineWriter(tmp_path / "out", random_sam, num_classes=NUM_CLASSES)
    runner = pl.Trainer(**SILENT, callbacks=[writer])
    with pytest.raises(MisconfigurationException, match=r"SAMRefineWriter: .* pytorch_lightning"):
        runner.predict(Segmenter(), loader(2), return_predictions=False)
    assert not (tmp_path / "out").exists()
