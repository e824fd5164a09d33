"""SAM's embeddings between the epochs of a run and between runs."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning_stubs import NUM_CLASSES, REFINE, SILENT, Blobs, Segmenter, loader
from stub_sams import CountingSam
from tiny_random_sam import spread_answers
from torch import nn
from torch.utils.data import DataLoader

from lightning_samrefine import RefineConfig, SAMRefineCallback
from lightning_samrefine.models.sam import SamPromptable
from lightning_samrefine.models.tiny import build_tiny_sam
from lightning_samrefine.refine.cache.embedding_cache import EmbeddingCache

# Four points instead of hundreds.
SMALL_DEFAULT = RefineConfig.preset("default", points_per_side=2, min_region_area=4)


class NoisyBlobs(Blobs):
    """Another image at every look, as random augmentation gives."""

    def __getitem__(self, index):
        image, target = super().__getitem__(index)
        return image ^ torch.randint(0, 2, image.shape, dtype=torch.uint8), target


def callback(sam, **kwargs):
    return SAMRefineCallback(sam, num_classes=NUM_CLASSES, refine=REFINE, **kwargs)


def fit(sam, epochs=3, val=None, **kwargs):
    torch.manual_seed(0)  # dropout
    trainer = Trainer(**SILENT, max_epochs=epochs, callbacks=[callback(sam, **kwargs)])
    trainer.fit(Segmenter(), loader(2, seed=9), loader(4) if val is None else val)
    return trainer.callbacks[0].history


@pytest.mark.parametrize("precision", ["32", "bf16-mixed"])
def test_later_epochs_of_fit_embed_nothing_and_measure_the_same(precision):
    with_cache, without = CountingSam(), CountingSam()
    kept = fit(with_cache, precision=precision)
    computed = fit(without, precision=precision, cache=None)
    assert (with_cache.embedded, without.embedded) == (4, 12)
    for one, other in zip(kept, computed, strict=True):
        assert one.pop("refine_ms_per_image") > 0
        assert other.pop("refine_ms_per_image") > 0
        assert one == other


class AveragingCallback(Callback):
    """Writes other weights into a SAM through ``.data`` before the second epoch, as an EMA does."""

    def __init__(self, sam, weights):
        self.sam, self.weights = sam, weights

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            for name, tensor in self.sam.module.state_dict(keep_vars=True).items():
                tensor.data.copy_(self.weights[name])


def tiny_sam(seed):
    """Return a SAM whose convolutions are folded into copies."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = build_tiny_sam()
        for norm in module.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.running_mean.normal_(std=0.5)
                norm.running_var.uniform_(0.5, 2)
        spread_answers(module.eval().requires_grad_(False), prompts=16)
    return SamPromptable(module, "tiny")


@pytest.mark.slow
@pytest.mark.parametrize("refine", [REFINE, SMALL_DEFAULT], ids=["algorithm4", "default"])
def test_weights_that_are_swapped_through_data_refine_the_next_epoch(refine):
    def figures(sam, *callbacks):
        torch.manual_seed(0)
        measure = SAMRefineCallback(sam, num_classes=NUM_CLASSES, refine=refine, precision="32")
        trainer = Trainer(**SILENT, max_epochs=2, callbacks=[*callbacks, measure])
        trainer.fit(Segmenter(), loader(2, seed=9), loader(2))
        times = "refine_ms_per_image"
        return [{k: v for k, v in row.items() if k != times} for row in measure.history]

    changing, other = tiny_sam(0), tiny_sam(1)
    weights = {name: tensor.clone() for name, tensor in other.module.state_dict().items()}
    first, second = figures(changing, AveragingCallback(changing, weights))
    old, new = figures(tiny_sam(0)), figures(other)
    assert first == old[0]
    assert second == new[1]
    assert second["miou_refined"] != old[1]["miou_refined"]


def tensors_held(holder, seen=None):
    """Return all tensors that objects of this package hold, besides what their modules do."""
    seen = set() if seen is None else seen
    if isinstance(holder, nn.Module) or id(holder) in seen:
        return []
    seen.add(id(holder))
    if isinstance(holder, torch.Tensor):
        return [holder]
    if isinstance(holder, dict):
        parts = holder.values()
    elif isinstance(holder, list | tuple):
        parts = holder
    else:
        parts = vars(holder).values() if hasattr(holder, "__dict__") else ()
    return [tensor for part in parts for tensor in tensors_held(part, seen)]


@pytest.mark.parametrize("run", ["fit", "validate"])
def test_nothing_derived_from_a_sam_of_ones_own_stays_behind(run):
    sam = tiny_sam(0)
    measure = SAMRefineCallback(sam, num_classes=NUM_CLASSES, refine=SMALL_DEFAULT)
    alive = []
    drop = sam.drop_derived

    def watch():
        folded = [sam._encode._folded] if sam._encode._folded is not None else []
        alive.extend(weakref.ref(part) for part in (*folded, *tensors_held(sam)))
        drop()

    sam.drop_derived = watch
    trainer = Trainer(**SILENT, max_epochs=1, callbacks=[measure])
    arguments = (loader(2, seed=9), loader(2)) if run == "fit" else (loader(2),)
    getattr(trainer, run)(Segmenter(), *arguments)
    gc.collect()
    assert len(alive) > 5  # a folded encoder, and sides of the decoder
    assert not any(reference() is not None for reference in alive)


@pytest.mark.parametrize("run", ["validate", "test"])
def test_a_single_evaluation_keeps_nothing_in_memory(run):
    sam = CountingSam()
    trainer = Trainer(**SILENT, callbacks=[callback(sam)])
    evaluate = getattr(trainer, run)
    evaluate(Segmenter(), loader(4), verbose=False)
    evaluate(Segmenter(), loader(4), verbose=False)
    assert sam.embedded == 8


def test_on_disk_the_next_run_finds_what_the_first_left(tmp_path, monkeypatch):
    monkeypatch.setenv("SAMREFINE_HOME", str(tmp_path))
    sam = CountingSam()
    for _ in range(2):
        trainer = Trainer(**SILENT, callbacks=[callback(sam, cache="disk", cache_gb=0.5)])
        trainer.test(Segmenter(), loader(4), verbose=False)
    assert sam.embedded == 4
    assert len(list((tmp_path / "embeddings").iterdir())) == 4


def test_a_cache_of_ones_own_outlives_a_run_and_travels_empty():
    sam, cache = CountingSam(), EmbeddingCache("memory", 0.5)
    measure = callback(sam, cache=cache)
    for _ in range(2):
        trainer = Trainer(**SILENT, callbacks=[measure])
        trainer.validate(Segmenter(), loader(4), verbose=False)
    assert sam.embedded == 4
    assert (cache.stats.hits, cache.stats.misses) == (4, 4)
    # As in the processes that ddp_spawn starts.
    assert copy.deepcopy(cache).stats.nbytes == 0
    assert cache.stats.nbytes > 0


def test_augmented_validation_images_are_noticed_once():
    sam = CountingSam()
    val = DataLoader(NoisyBlobs(4), batch_size=2)
    with pytest.warns(RuntimeWarning, match="images or SAM's weights change") as caught:
        fit(sam, epochs=4, val=val)
    assert sum("Embedding cache" in str(one.message) for one in caught) == 1
    assert sam.embedded == 16


def test_wrong_arguments_are_refused_at_once(random_sam):
    with pytest.raises(ValueError, match="cache must be 'memory', 'disk' or None, got 'ram'"):
        callback(random_sam, cache="ram")
    with pytest.raises(ValueError, match="cache_gb must be None beside no cache, got 2"):
        callback(random_sam, cache=None, cache_gb=2)
