"""Refined label maps in what steps return: for later callbacks, the module's hooks and predict."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_stubs import NUM_CLASSES, REFINE, SILENT, Blobs, Segmenter, loader
from torch.utils.data import DataLoader, DistributedSampler

from lightning_samrefine import Refiner, SAMRefineCallback


class Predicting(Segmenter):
    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        image = batch["image"] if isinstance(batch, dict) else batch[0]
        return {"logits": self(image)}


class Later(Callback):
    """Keeps the label maps that come after the callback."""

    def __init__(self):
        self.seen = []

    def on_validation_batch_end(self, trainer, pl_module, outputs, *_):
        self.seen.append((trainer.sanity_checking, outputs["refined"]))

    on_test_batch_end = on_validation_batch_end


def expected_labels(random_sam, dataset):
    """Refine without a Trainer; also return the raw labels."""
    module, refiner = Segmenter().eval(), Refiner(random_sam, REFINE)
    with torch.no_grad():
        logits = module.network(dataset.images / 255 - 0.5)
    refined = [
        refiner(image, one.softmax(dim=0)).labels
        for image, one in zip(dataset.images, logits, strict=True)
    ]
    return torch.stack(refined), logits.argmax(dim=1)


def test_predict_returns_refined_label_maps(make, random_sam):
    callback = make(add_to_outputs="refined")
    predictions = Trainer(**SILENT, callbacks=[callback]).predict(Predicting(), loader(3))
    refined, raw = expected_labels(random_sam, Blobs(3))
    assert not torch.equal(refined, raw)
    found = torch.cat([one["refined"] for one in predictions])
    assert found.dtype == torch.int64
    assert torch.equal(found, refined)
    assert all("logits" in one for one in predictions)
    assert callback.history == []


def test_predict_is_left_alone_without_a_key_and_the_log_names_it(make, caplog):
    caplog.set_level("INFO")
    (one,) = Trainer(**SILENT, callbacks=[make()]).predict(Predicting(), loader(2))
    assert set(one) == {"logits"}
    assert "refines nothing in predict without add_to_outputs" in caplog.text


def test_predict_uses_the_weights_that_validation_fitted(random_sam):

    callback = SAMRefineCallback(
        random_sam, num_classes=NUM_CLASSES, refine={"min_region_area": 4}, add_to_outputs="refined"
    )
    trainer, images = Trainer(**SILENT, callbacks=[callback]), loader(12)
    trainer.validate(Segmenter(), images, verbose=False)
    assert callback.fitted_config is not None
    unseen = DataLoader(Blobs(2, seed=9), batch_size=2)
    (found,) = trainer.predict(Predicting(), unseen)
    refiner, dataset = Refiner(random_sam, callback.fitted_config), Blobs(2, seed=9)
    with torch.no_grad():
        logits = Segmenter().eval().network(dataset.images / 255 - 0.5)
    for index in range(2):
        own = refiner(dataset.images[index], logits[index].softmax(dim=0)).labels
        assert torch.equal(found["refined"][index], own)


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_later_callbacks_see_them(make, random_sam, stage):
    later = Later()
    trainer = Trainer(**SILENT, callbacks=[make(add_to_outputs="refined"), later])
    getattr(trainer, stage)(Segmenter(), loader(3), verbose=False)
    refined, _ = expected_labels(random_sam, Blobs(3))
    assert torch.equal(torch.cat([labels for _, labels in later.seen]), refined)


def test_the_sanity_check_has_raw_ones(make, random_sam):
    later, module = Later(), Segmenter()
    trainer = Trainer(
        **SILENT,
        max_epochs=1,
        limit_train_batches=0,
        callbacks=[make(add_to_outputs="refined"), later],
    )
    trainer.fit(module, loader(2), loader(2))
    _, raw = expected_labels(random_sam, Blobs(2))
    assert torch.equal(later.seen[0][1], raw)


def test_repeats_of_a_sampler_are_refined_and_not_counted(make, random_sam):
    dataset = Blobs(3)
    sampler = DistributedSampler(dataset, num_replicas=2, rank=1, shuffle=False)
    later, callback = Later(), make(add_to_outputs="refined")
    trainer = Trainer(**SILENT, callbacks=[callback, later], use_distributed_sampler=False)
    trainer.validate(Segmenter(), DataLoader(dataset, 2, sampler=sampler), verbose=False)
    refined, _ = expected_labels(random_sam, dataset)
    ((_, labels),) = later.seen
    assert torch.equal(labels, refined[[1, 0]])  # the second repeats image 0
    assert callback.history[0]["refine_failed_images"] == 0
    alone = make()
    Trainer(**SILENT, callbacks=[alone], use_distributed_sampler=False).validate(
        Segmenter(), DataLoader(dataset, 2, sampler=sampler), verbose=False
    )
    assert callback.history[0]["miou_refined"] == alone.history[0]["miou_refined"]


def test_images_of_different_sizes_are_a_list(make):
    class Sizes(Predicting):
        def predict_step(self, batch, batch_idx):
            return {"logits": [self(image[None])[0] for image in batch["image"]]}

    samples = [Blobs(1, hw=(32, 40)).images[0], Blobs(1, hw=(24, 48)).images[0]]
    images = DataLoader(samples, 2, collate_fn=lambda batch: {"image": list(batch)})
    (one,) = Trainer(**SILENT, callbacks=[make(add_to_outputs="refined")]).predict(Sizes(), images)
    assert [tuple(labels.shape) for labels in one["refined"]] == [(32, 40), (24, 48)]


@pytest.mark.parametrize(
    ("returns", "key", "words"),
    [
        ("logits", "refined", "add_to_outputs='refined': the step must return a dict .*got Tensor"),
        ("none", "refined", "add_to_outputs='refined': the step must return a dict .*got NoneType"),
        ("dict", "logits", "a key that the step does not return, got 'logits'"),
    ],
)
def test_outputs_that_take_no_key(make, returns, key, words):
    trainer = Trainer(**SILENT, callbacks=[make(add_to_outputs=key)])
    with pytest.raises(MisconfigurationException, match=words):
        trainer.validate(Segmenter(returns), loader(), verbose=False)
    with pytest.raises(TypeError, match="add_to_outputs must be a string or None"):
        make(add_to_outputs=3)
