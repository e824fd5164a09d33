"""The callback leaves nothing behind: weights, checkpoints, random numbers, memory, pickles."""

from __future__ import annotations

import copy
import gc
import pickle
import random
import weakref

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from lightning_stubs import NUM_CLASSES, REFINE, SILENT, Blobs, Segmenter, loader
from tiny_random_sam import build_random_sam
from torch.utils.data import DataLoader

from lightning_samrefine import SAMRefineCallback
from lightning_samrefine.callbacks import run_state as run_state_module
from lightning_samrefine.callbacks.safe_refiner import isolated_rng
from lightning_samrefine.models.sam import SamPromptable


def draw() -> tuple[float, float, float]:
    """Draw from every global random state."""
    # The global states, which users' augmentations draw from, are what is tested.
    return float(torch.rand(())), float(np.random.rand()), random.random()  # noqa: NPY002 - above


def seed_everything() -> None:
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - the global state is what is tested
    random.seed(0)


class GreedySam(SamPromptable):
    """Draws random numbers wherever it can."""

    def encode_images(self, images):
        draw()
        return super().encode_images(images)

    def predict_masks(self, embedding, prompts, multimask_output=False):
        draw()
        return super().predict_masks(embedding, prompts, multimask_output)


@pytest.fixture
def loaded(monkeypatch):
    """Stand in for load_sam; the list holds weak references to the modules that were loaded."""
    references = []

    def load(name, checkpoint, device):
        draw()
        sam = GreedySam(build_random_sam().to(device), name)
        references.append(weakref.ref(sam.module))
        return sam

    monkeypatch.setattr(run_state_module, "load_sam", load)
    return references


@pytest.fixture
def callback(loaded) -> SAMRefineCallback:
    return SAMRefineCallback("vit_t", "some.pt", NUM_CLASSES, refine=REFINE)


def fit(*callbacks: Callback, module: Segmenter | None = None, **kwargs) -> tuple[Segmenter, tuple]:
    """Train with shuffling, dropout and every random state in use."""
    seed_everything()
    module = Segmenter() if module is None else module
    trainer = Trainer(**{**SILENT, "max_epochs": 3, **kwargs}, callbacks=list(callbacks))
    shuffled = DataLoader(Blobs(6), batch_size=2, shuffle=True)
    trainer.fit(module, shuffled, loader(2, seed=1))
    return module, draw()


def test_training_ends_in_the_same_bits_with_and_without(callback):
    alone, numbers_alone = fit()
    together, numbers_together = fit(callback)
    assert numbers_alone == numbers_together
    for name, value in alone.state_dict().items():
        assert torch.equal(value, together.state_dict()[name]), name


def test_random_states_survive_an_exception():
    seed_everything()
    expected = draw()
    seed_everything()
    with pytest.raises(KeyError):
        with_isolation_fails()
    assert draw() == expected


def with_isolation_fails():
    with isolated_rng(torch.device("cpu")):
        draw()
        raise KeyError


def test_checkpoints_and_optimizers_hold_nothing_of_it(callback, tmp_path):
    module = Segmenter()
    trainer = Trainer(**SILENT, max_epochs=1, callbacks=[callback])
    trainer.fit(module, loader(), loader())
    trainer.save_checkpoint(tmp_path / "with.ckpt")
    plain = Trainer(**SILENT, max_epochs=1)
    plain.fit(Segmenter(), loader(), loader())
    plain.save_checkpoint(tmp_path / "without.ckpt")
    contents, expected = (
        torch.load(tmp_path / name, weights_only=True) for name in ("with.ckpt", "without.ckpt")
    )
    assert contents["state_dict"].keys() == expected["state_dict"].keys()
    state = contents["callbacks"].pop(callback.state_key)
    assert set(state) == {"history", "figures", "_history_start", "_validations"}
    assert contents["callbacks"] == expected["callbacks"]
    parameters = {id(p) for p in module.parameters()}
    assert {id(p) for g in trainer.optimizers[0].param_groups for p in g["params"]} == parameters
    # A run may go on without the callback, or with it where it was missing.
    resumed = Trainer(**SILENT, max_epochs=2, callbacks=[callback])
    resumed.fit(Segmenter(), loader(), loader(), ckpt_path=tmp_path / "without.ckpt")
    assert "val/miou_gain" in resumed.callback_metrics


def test_the_module_keeps_neither_hooks_nor_gradients_nor_mode(callback):
    class Watching(Callback):
        hooks = 0

        def on_validation_batch_start(self, trainer, pl_module, *_):
            self.hooks += len(pl_module._forward_hooks)

    watching, module = Watching(), Segmenter()
    trainer = Trainer(**SILENT, callbacks=[callback, watching])
    module.train()
    trainer.validate(module, loader(), verbose=False)
    assert watching.hooks == 2
    assert not any(m._forward_hooks for m in module.modules())
    assert all(p.grad is None for p in module.parameters())
    assert module.training


@pytest.mark.parametrize("entry", ["fit", "validate", "test"])
def test_sam_is_freed_after_each_run_and_loaded_again_for_the_next(callback, loaded, entry):
    trainer = Trainer(**SILENT, max_epochs=1, callbacks=[callback])
    module = Segmenter()
    for count in (1, 2):
        if entry == "fit":
            trainer.fit(module, loader(), loader())
            trainer.fit_loop.epoch_progress.reset()
        else:
            getattr(trainer, entry)(module, loader(), verbose=False)
        gc.collect()
        assert len(loaded) == count
        assert [reference() for reference in loaded] == [None] * count


def test_predict_loads_no_sam(callback, loaded):
    class Predicting(Segmenter):
        def predict_step(self, batch, batch_idx):
            return self(batch[0])

    Trainer(**SILENT, callbacks=[callback]).predict(Predicting(), loader())
    assert loaded == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_in_the_users_step_frees_everything(callback, loaded, error):
    class Failing(Segmenter):
        def validation_step(self, batch, batch_idx):
            if batch_idx == 1:
                raise error
            return super().validation_step(batch, batch_idx)

    module = Failing()
    trainer = Trainer(**SILENT, callbacks=[callback])
    with pytest.raises(SystemExit if error is KeyboardInterrupt else error):
        trainer.validate(module, loader(), verbose=False)
    gc.collect()
    assert [reference() for reference in loaded] == [None]
    assert not any(m._forward_hooks for m in module.modules())


def test_pickles_hold_the_settings_and_nothing_that_a_run_made(callback):
    class Peeking(Callback):
        size = None

        def on_validation_epoch_end(self, trainer, pl_module):
            self.size = len(pickle.dumps(callback))
            self.copy = copy.deepcopy(callback)

    peeking = Peeking()
    before = len(pickle.dumps(callback))
    trainer = Trainer(**SILENT, callbacks=[peeking, callback])
    trainer.validate(Segmenter(), loader(), verbose=False)
    assert peeking.size == before, "pickled while SAM was loaded"
    settings = pickle.loads(pickle.dumps(callback))
    settings.history.clear()  # the figures, plain numbers, stay
    settings.figures.clear()
    assert len(pickle.dumps(settings)) == before
    for one in (pickle.loads(pickle.dumps(callback)), peeking.copy):
        again = Trainer(**SILENT, callbacks=[one]).validate(Segmenter(), loader(), verbose=False)
        assert again[0]["val/miou_gain"] == float(trainer.callback_metrics["val/miou_gain"])


def test_a_users_own_sam_is_moved_to_the_trainers_device_and_back():
    class Elsewhere(SamPromptable):
        """Says that it is on a GPU, and notes where its module is sent."""

        def __init__(self) -> None:
            super().__init__(build_random_sam(), "mine")
            self.where = torch.device("cuda", 0)
            self.module.to = lambda device: setattr(self, "where", device)

        @property
        def device(self):
            return self.where

    sam = Elsewhere()
    callback = SAMRefineCallback(sam, num_classes=NUM_CLASSES, refine=REFINE)
    trainer = Trainer(**SILENT, callbacks=[callback])
    callback.setup(trainer, Segmenter(), "validate")
    assert sam.where == trainer.strategy.root_device == torch.device("cpu")
    callback.teardown(trainer, Segmenter(), "validate")
    assert sam.where == torch.device("cuda", 0)
