"""Label maps that a step makes of its network's scores: refined as those scores are."""

from __future__ import annotations

import logging

import pytest
import torch
from lightning.pytorch import Trainer
from lightning_stubs import NUM_CLASSES, REFINE, SILENT, DictBlobs, Segmenter
from torch import Tensor
from torch.nn import functional as nnf
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassJaccardIndex

from lightning_samrefine import SAMRefineCallback
from lightning_samrefine.adapters.batch_adapter import BatchAdapter

B, C, H, W = 2, 3, 16, 24
GENERATOR = torch.Generator().manual_seed(0)
IMAGE = torch.randint(0, 256, (B, 3, H, W), generator=GENERATOR, dtype=torch.uint8)
LOGITS = torch.randn(B, C, H, W, generator=GENERATOR)
BATCH = {"image": IMAGE, "mask": LOGITS.roll(1, dims=1).argmax(dim=1)}


def read(outputs: dict, captured: Tensor, num_classes: int = C, **kwargs) -> tuple[Tensor, Tensor]:
    inputs = BatchAdapter(num_classes, **kwargs)(BATCH, outputs, captured)
    return inputs.probs, inputs.labels


@pytest.mark.parametrize("form", ["labels", "one-hot", "uint8"])
def test_a_label_map_of_the_networks_scores_takes_their_probabilities(form):
    labels = LOGITS.argmax(dim=1)
    one_hot = nnf.one_hot(labels, C).permute(0, 3, 1, 2).float()
    preds = {"labels": labels, "one-hot": one_hot, "uint8": labels.to(torch.uint8)}[form]
    probs, read_labels = read({"loss": torch.tensor(0.5), "preds": preds}, LOGITS)
    torch.testing.assert_close(probs, LOGITS.softmax(dim=1))
    assert torch.equal(read_labels, labels)


def test_smaller_scores_are_enlarged_as_the_step_does_it():
    coarse = LOGITS[..., ::4, ::4]
    full = nnf.interpolate(coarse, (H, W), mode="bilinear", align_corners=False)
    probs, _ = read({"preds": full.argmax(dim=1)}, coarse)
    torch.testing.assert_close(probs, full.softmax(dim=1))


def test_each_image_is_decided_by_itself():
    labels = LOGITS.argmax(dim=1)
    labels[1, 0, 0] = (labels[1, 0, 0] + 1) % C  # a rule of the step's own
    probs, read_labels = read({"preds": labels}, LOGITS)
    torch.testing.assert_close(probs[0], LOGITS[0].softmax(dim=0))
    assert torch.equal(read_labels, labels)
    assert torch.equal(probs[1].argmax(dim=0), labels[1])
    assert float(probs[1].amax(dim=0).min()) == pytest.approx(0.999)


def test_one_channel():
    logits = LOGITS[:, :1]
    probs, _ = read({"preds": (logits > 0).float()}, logits, num_classes=2)
    torch.testing.assert_close(probs[:, 1:], logits.sigmoid())
    # Values in [0, 1] that may be logits as well as probabilities are not read at all.
    unclear = logits.sigmoid() * 0.2 + 0.4
    probs, _ = read({"preds": (unclear > 0.5).float()}, unclear, num_classes=2)
    assert float(probs.amax(dim=1).min()) == pytest.approx(0.999)


def test_scores_that_are_not_finite_leave_the_label_map():
    logits = LOGITS.clone()
    logits[0, :, 3, 3] = torch.nan
    labels = logits.argmax(dim=1)
    probs, _ = read({"preds": labels}, logits)
    assert bool(probs.isfinite().all())
    torch.testing.assert_close(probs[1], logits[1].softmax(dim=0))


@pytest.mark.parametrize("named", [{"scores_key": "preds"}, {"scores_kind": "labels"}])
def test_what_is_named_is_read_as_it_is(named):
    probs, _ = read({"preds": LOGITS.argmax(dim=1)}, LOGITS, **named)
    assert float(probs.amax(dim=1).min()) == pytest.approx(0.999)


def test_a_run_refines_them_as_it_refines_scores(random_sam, caplog):
    class Maps(Segmenter):
        def validation_step(self, batch, batch_idx):
            logits, target = self.logits_and_target(batch)
            return {
                "loss": self.loss(logits, target),
                "preds": logits.argmax(dim=1),
                "targets": target,
            }

    history = []
    for module in (Maps(), Segmenter("dict")):
        callback = SAMRefineCallback(random_sam, num_classes=NUM_CLASSES, refine=REFINE)
        with caplog.at_level(logging.INFO):
            trainer = Trainer(**SILENT, callbacks=[callback])
            trainer.validate(module, DataLoader(DictBlobs(4), 2), verbose=False)
        history.append(callback.history[-1])
    for name in ("miou_raw", "miou_refined", "refine_accept_rate"):
        assert history[0][name] == history[1][name]
    assert "label map, with the probabilities of the forward hook's scores" in caplog.text


@pytest.mark.parametrize("returned", ["bare", "named"])
def test_a_rule_that_shows_in_a_later_batch_is_what_is_measured(random_sam, returned):
    class Smoothing(Segmenter):
        def validation_step(self, batch, batch_idx):
            labels = self(batch["image"]).argmax(dim=1)
            if batch_idx > 0:
                labels[:, :9] = 1
            self.labels.append(labels)
            return labels if returned == "bare" else {"loss": torch.tensor(0.5), "preds": labels}

    dataset, module = DictBlobs(6), Smoothing().eval()
    module.labels = []
    callback = SAMRefineCallback(random_sam, num_classes=NUM_CLASSES, refine=REFINE, precision="32")
    trainer = Trainer(**SILENT, num_sanity_val_steps=0, callbacks=[callback])
    (logged,) = trainer.validate(module, DataLoader(dataset, 2), verbose=False)
    expected = MulticlassJaccardIndex(NUM_CLASSES, ignore_index=255)
    raw = expected(torch.cat(module.labels), dataset.targets)
    assert logged["val/miou_raw"] == pytest.approx(raw.item(), abs=1e-6)
