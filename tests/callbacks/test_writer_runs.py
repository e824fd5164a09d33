"""SAMRefineWriter under the Trainer's flags, in compiled modules, and when a run is broken off."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from lightning.pytorch import Trainer
from lightning_stubs import NUM_CLASSES, REFINE, SILENT, Segmenter, loader
from tiny_random_sam import build_random_sam
from writer_cases import Predicting, contents, named, predict, rows

from lightning_samrefine import SAMRefineWriter
from lightning_samrefine.callbacks import run_state
from lightning_samrefine.models.sam import SamPromptable


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """What a run without any flag writes."""
    folder = tmp_path_factory.mktemp("complete") / "out"
    predict(folder)
    return contents(folder)


@pytest.mark.parametrize(
    "flags",
    [{"deterministic": True}, {"detect_anomaly": True}, {"inference_mode": False}],
    ids=str,
)
def test_flags_change_no_byte(complete, tmp_path, flags):
    try:
        predict(tmp_path, trainer=flags)
    finally:
        torch.use_deterministic_algorithms(False)
    assert contents(tmp_path) == complete


def test_barebones(complete, tmp_path, random_sam):
    writer = SAMRefineWriter(tmp_path, random_sam, num_classes=NUM_CLASSES, refine=REFINE)
    trainer = Trainer(barebones=True, accelerator="cpu", callbacks=[writer])
    trainer.predict(Predicting(), named(), return_predictions=False)
    labels = {name for name in complete if name.startswith("labels")}
    written = contents(tmp_path)
    assert {name: written[name] for name in labels} == {name: complete[name] for name in labels}


@pytest.mark.slow
@pytest.mark.parametrize("returns", ["the scores", "nothing"])
def test_compiled_modules_write_the_same_and_go_on_where_others_ended(complete, tmp_path, returns):
    class Quiet(Predicting):
        def predict_step(self, batch, batch_idx):
            scores = super().predict_step(batch, batch_idx)
            return scores if returns == "the scores" else None

    predict(tmp_path, module=torch.compile(Quiet(), backend="eager"))
    labels = {name for name in complete if name.startswith("labels")}
    written = contents(tmp_path)
    assert {name: written[name] for name in labels} == {name: complete[name] for name in labels}
    _, embedded = predict(tmp_path, module=Quiet())
    assert embedded == 0


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_run_that_is_broken_off_frees_sam_and_keeps_what_it_refined(tmp_path, monkeypatch, error):
    loaded = []

    def load(name, checkpoint, device):
        sam = SamPromptable(build_random_sam(), name)
        loaded.append(weakref.ref(sam.module))
        return sam

    class Breaking(Predicting):
        broken = True

        def predict_step(self, batch, batch_idx):
            if batch_idx == 2 and self.broken:
                raise error("broken off")
            return super().predict_step(batch, batch_idx)

    monkeypatch.setattr(run_state, "load_sam", load)
    writer = SAMRefineWriter(tmp_path, "vit_t", "x.pt", NUM_CLASSES, refine=REFINE)
    trainer, module = Trainer(**SILENT, callbacks=[writer]), Breaking()
    with pytest.raises(SystemExit if error is KeyboardInterrupt else error):
        trainer.predict(module, named(), return_predictions=False)
    gc.collect()
    assert [reference() for reference in loaded] == [None]
    assert not any(m._forward_hooks for m in module.modules())
    assert not [t for t in threading.enumerate() if t.name == "samrefine-writer"]

    Breaking.broken = False
    trainer = Trainer(**SILENT, callbacks=[writer])
    trainer.predict(module, named(), return_predictions=False)
    assert (writer.counts.kept, writer.counts.written) == (4, 1)
    assert len(rows(tmp_path)) == 5


def test_fit_and_validate_leave_the_folder_alone(tmp_path, random_sam):
    writer = SAMRefineWriter(tmp_path, random_sam, num_classes=NUM_CLASSES)
    Trainer(**SILENT, max_epochs=1, callbacks=[writer]).fit(Segmenter(), loader(2), loader(2))
    assert contents(tmp_path) == {}
