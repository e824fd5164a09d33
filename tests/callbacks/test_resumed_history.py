"""The history of a fit that is resumed from a checkpoint."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning_stubs import SILENT, Segmenter, loader


def fit(callback, epochs, checkpoint=None, others=(), **kwargs):
    trainer = Trainer(**{**SILENT, "max_epochs": epochs, **kwargs}, callbacks=[callback, *others])
    trainer.fit(Segmenter("logits"), loader(2), loader(2), ckpt_path=checkpoint)
    return trainer


def drop_time(history):
    return [{k: v for k, v in one.items() if "refine_ms" not in k} for one in history]


def test_history_survives_a_resume(make, tmp_path):
    path = tmp_path / "two.ckpt"
    whole = make(every_n_epochs=2)
    fit(whole, 4)
    assert [entry["epoch"] for entry in whole.history] == [0, 2]
    first = make(every_n_epochs=2)
    fit(first, 1).save_checkpoint(path)
    state = torch.load(path, weights_only=True)["callbacks"][first.state_key]
    assert drop_time(state["history"]) == drop_time(first.history)
    resumed = make(every_n_epochs=2)
    fit(resumed, 4, path)
    assert resumed.history[0] == first.history[0]
    # Epoch 1 is skipped as in the run without an interruption.
    places = [[entry[key] for key in ("epoch", "step")] for entry in resumed.history]
    assert places == [[entry[key] for key in ("epoch", "step")] for entry in whole.history]
    again = make(name="again")
    fit(again, 2, path)
    assert [entry["epoch"] for entry in again.history] == [1], "another callback's state"


@pytest.mark.parametrize("kind", [ModelCheckpoint, EarlyStopping])
def test_monitors_see_the_last_values_after_a_resume(make, tmp_path, kind):
    def run(name, epochs, checkpoint=None):
        where = {"dirpath": tmp_path / name} if kind is ModelCheckpoint else {}
        other = kind(monitor="val/miou_refined", mode="max", **where)
        trainer = fit(
            make(every_n_epochs=3), epochs, checkpoint, [other],
            enable_checkpointing=kind is ModelCheckpoint,
        )  # fmt: skip
        return trainer, other, trainer.callback_metrics.get("val/miou_refined")

    _, whole, expected = run("whole", 3)
    path = tmp_path / "one.ckpt"
    run("parts", 1)[0].save_checkpoint(path)
    _, resumed, seen = run("parts", 3, path)  # epochs 1 and 2 are not measured
    assert seen == expected
    if kind is EarlyStopping:
        assert (resumed.wait_count, resumed.best_score) == (whole.wait_count, whole.best_score)
        assert whole.wait_count == 2
    else:
        assert resumed.best_model_score == whole.best_model_score == expected
        assert len(list((tmp_path / "parts").glob("*.ckpt"))) == 1, "an equal value is no better"


def test_a_fit_that_goes_back_forgets_what_came_after(make, tmp_path):
    path, callback = tmp_path / "one.ckpt", make()
    fit(callback, 1).save_checkpoint(path)
    fit(callback, 3, path)
    assert [entry["epoch"] for entry in callback.history] == [0, 1, 2]
    fit(callback, 2, path)
    assert [entry["epoch"] for entry in callback.history] == [0, 1]


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_a_checkpoint_that_is_evaluated_adds_no_history(make, tmp_path, stage):
    path, callback = tmp_path / "one.ckpt", make()
    trainer = fit(callback, 1)
    trainer.save_checkpoint(path)
    kept = list(callback.history)
    other = make()
    for one in (callback, other):
        runner = Trainer(**SILENT, callbacks=[one])
        getattr(runner, stage)(Segmenter("logits"), loader(2), ckpt_path=path, verbose=False)
    assert callback.history[:1] == kept
    assert len(callback.history) == 2
    assert len(other.history) == 1
