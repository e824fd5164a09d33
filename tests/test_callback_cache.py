"""SAM's embeddings between the epochs of a run and between runs."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning.pytorch import Trainer
from lightning_stubs import NUM_CLASSES, REFINE, SILENT, Blobs, Segmenter, loader
from tiny_random_sam import build_random_sam
from torch.utils.data import DataLoader

from lightning_samrefine import SAMRefineCallback
from lightning_samrefine.cache import EmbeddingCache
from lightning_samrefine.models.sam import SamPromptable


class CountingSam(SamPromptable):
    """Counts the images that it embeds."""

    def __init__(self) -> None:
        super().__init__(build_random_sam(), "counting")
        self.embedded = 0

    def embed(self, images):
        self.embedded += len(images)
        return super().embed(images)


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


def test_later_epochs_of_fit_embed_nothing_and_measure_the_same():
    with_cache, without = CountingSam(), CountingSam()
    kept = fit(with_cache, precision="32")
    computed = fit(without, precision="32", cache=None)
    assert (with_cache.embedded, without.embedded) == (4, 12)
    for one, other in zip(kept, computed, strict=True):
        assert one.pop("refine_ms_per_image") > 0
        assert other.pop("refine_ms_per_image") > 0
        assert one == other


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
    assert cache.stats.hit_rate == 0.5
    # As in the processes that ddp_spawn starts.
    assert copy.deepcopy(cache).stats.nbytes == 0
    assert cache.stats.nbytes > 0


def test_augmented_validation_images_are_noticed_once():
    sam = CountingSam()
    val = DataLoader(NoisyBlobs(4), batch_size=2)
    with pytest.warns(RuntimeWarning, match="images change from epoch to epoch") as caught:
        fit(sam, epochs=4, val=val)
    assert sum("Embedding cache" in str(one.message) for one in caught) == 1
    assert sam.embedded == 16


def test_wrong_arguments_are_refused_at_once(random_sam):
    with pytest.raises(ValueError, match="cache: got 'ram', accepted are 'memory', 'disk'"):
        callback(random_sam, cache="ram")
    with pytest.raises(ValueError, match="cache_gb: got 2 beside no cache"):
        callback(random_sam, cache=None, cache_gb=2)
