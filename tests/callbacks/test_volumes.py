"""Volumes under a real Trainer: SAM sees slices, and figures are those over all voxels."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_stubs import IGNORE, NUM_CLASSES, REFINE, SILENT, Blobs, Segmenter
from PIL import Image
from stub_sams import CountingSam
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics.classification import MulticlassJaccardIndex, MultilabelJaccardIndex

from lightning_samrefine import Refiner, SAMRefineCallback, SAMRefineWriter
from lightning_samrefine.metrics.bootstrap import paired_bootstrap
from lightning_samrefine.tune.callback import TuneCallback

DEPTH, VOLUMES = 3, 4


class Scans(Dataset):
    """Gray volumes of blobs, float (1, D, H, W) in 0 to 1, and labels (D, H, W)."""

    def __init__(self, axis: int = 2) -> None:
        slices = Blobs(VOLUMES * DEPTH)
        gray = slices.images.float().mean(dim=1).round() / 255
        self.axis = axis
        self.slices = gray.unflatten(0, (VOLUMES, DEPTH))
        self.truths = slices.targets.unflatten(0, (VOLUMES, DEPTH))

    def __len__(self):
        return VOLUMES

    def __getitem__(self, index):
        image, target = self.slices[index], self.truths[index]
        to = self.axis - 2
        return {"image": image.movedim(0, to)[None], "label": target.movedim(0, to)}


class WithChannel(Scans):
    def __getitem__(self, index):
        sample = super().__getitem__(index)
        return {**sample, "label": sample["label"][None]}


class Network(nn.Module):
    """Three classes of gray values, the same for each voxel."""

    def forward(self, image):
        levels = torch.tensor([0.36, 0.39, 0.45], device=image.device)
        gray = image.movedim(1, -1)
        return (-60 * (gray - levels).abs()).movedim(-1, 1)


RETURNED = {
    "dict": lambda logits: {"logits": logits},
    "probs": lambda logits: {"probs": logits.softmax(dim=1)},
    "labels": lambda logits: {"preds": logits.argmax(dim=1)},
    "loss": lambda logits: logits.mean(),
}


class OnVolumes(Segmenter):
    def __init__(self, returns: str = "dict") -> None:
        super().__init__()
        self.volumes, self.how = Network(), returns

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        return RETURNED[self.how](self.volumes(batch["image"]))

    def predict_step(self, batch, batch_idx):
        return self.volumes(batch["image"])


def by_hand(sam) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return raw and refined labels and targets, (V · D, H, W) each."""
    data, refiner = Scans(), Refiner(sam, REFINE)
    images = data.slices.flatten(0, 1)
    raw, refined = [], []
    for image in images:
        probs = Network()(image[None, None])[0].softmax(dim=0)
        rgb = torch.from_numpy(np.round(image.numpy() * 255).astype(np.uint8)).expand(3, -1, -1)
        raw.append(probs.argmax(dim=0))
        refined.append(refiner(rgb, probs).labels)
    return torch.stack(raw), torch.stack(refined), data.truths.flatten(0, 1)


def miou(labels, targets) -> float:
    metric = MulticlassJaccardIndex(NUM_CLASSES, ignore_index=IGNORE)
    return float(metric(labels, targets))


def run(sam, data=None, returns="dict", batch_size=2, trainer=None, **kwargs):
    callback = SAMRefineCallback(
        sam, **{"num_classes": NUM_CLASSES, "refine": REFINE, "log": "all", **kwargs}
    )
    trainer = Trainer(**{**SILENT, **(trainer or {})}, callbacks=[callback])
    loader = DataLoader(data or Scans(), batch_size)
    return trainer.validate(OnVolumes(returns), loader, verbose=False)[0]


@pytest.mark.parametrize("returns", RETURNED)
@pytest.mark.parametrize("data", [Scans, WithChannel])
def test_figures_are_those_over_all_voxels(random_sam, returns, data, caplog):
    with caplog.at_level(logging.INFO):
        logged = run(random_sam, data(), returns)
    raw, refined, truth = by_hand(random_sam)
    assert miou(raw, truth) != miou(refined, truth)
    assert logged["val/miou_raw"] == pytest.approx(miou(raw, truth), abs=1e-6)
    if returns != "labels":
        assert logged["val/miou_refined"] == pytest.approx(miou(refined, truth), abs=1e-6)
    valid = truth != IGNORE
    if returns == "dict":
        fixed = ((raw != truth) & (refined == truth) & valid).sum()
        assert logged["val/refine_fixed_px"] == int(fixed)
    assert "2 volumes of 3 slices along axis 2" in caplog.text


@pytest.mark.parametrize("axis", [3, 4, -1])
def test_another_axis_may_be_sliced(random_sam, axis):
    logged = run(random_sam, Scans(axis % 5), slice_axis=axis)
    raw, refined, truth = by_hand(random_sam)
    assert logged["val/miou_raw"] == pytest.approx(miou(raw, truth), abs=1e-6)
    assert logged["val/miou_refined"] == pytest.approx(miou(refined, truth), abs=1e-6)


def test_volumes_are_resampled_as_a_whole(random_sam):
    logged = run(random_sam)
    raw, refined, truth = by_hand(random_sam)
    counts = []
    for labels in (raw, refined):
        own = np.zeros((VOLUMES, NUM_CLASSES, NUM_CLASSES + 1), dtype=np.int64)
        for index in range(len(truth)):
            valid = truth[index] != IGNORE
            pairs = (truth[index][valid].numpy(), labels[index][valid].numpy())
            np.add.at(own[index // DEPTH], pairs, 1)
        counts.append(own)
    interval = paired_bootstrap(*counts)
    assert logged["val/miou_gain_low"] == pytest.approx(interval.low, abs=1e-9)
    assert logged["val/miou_gain_high"] == pytest.approx(interval.high, abs=1e-9)


def test_batches_change_nothing(random_sam):
    figures = [
        {k: v for k, v in run(random_sam, batch_size=size).items() if "refine_ms" not in k}
        for size in (1, 4)
    ]
    assert figures[0] == figures[1]


def test_embeddings_are_kept_by_slice():
    sam = CountingSam()
    callback = SAMRefineCallback(sam, num_classes=NUM_CLASSES, refine=REFINE)

    class Training(OnVolumes):
        def training_step(self, batch, batch_idx):
            return self.network.weight.sum()

    loader = DataLoader(Scans(), 2)
    Trainer(**SILENT, max_epochs=3, callbacks=[callback]).fit(Training(), loader, loader)
    assert sam.embedded == VOLUMES * DEPTH
    assert len(callback.history) == 3


def test_slices_of_a_volume_share_a_fold(random_sam):
    loader, seen = DataLoader(Scans(), 2), []

    class Spy(SAMRefineCallback):
        def on_validation_epoch_end(self, trainer, pl_module):
            seen.extend(self._run_state.auto.sample)
            super().on_validation_epoch_end(trainer, pl_module)

    callback = Spy(random_sam, num_classes=NUM_CLASSES)
    Trainer(**SILENT, callbacks=[callback]).validate(OnVolumes(), loader, verbose=False)
    assert len(seen) == VOLUMES * DEPTH
    assert len({image.group for image in seen}) == VOLUMES


def test_the_writer_writes_slices(random_sam, tmp_path):
    class Named(Scans):
        def __getitem__(self, index):
            return {"image": super().__getitem__(index)["image"], "name": f"scan{index}"}

    writer = SAMRefineWriter(tmp_path / "out", random_sam, num_classes=NUM_CLASSES, refine=REFINE)
    trainer = Trainer(**SILENT, callbacks=[writer])
    trainer.predict(OnVolumes(), DataLoader(Named(), 2), return_predictions=False)
    _, refined, _ = by_hand(random_sam)
    for index, labels in enumerate(refined):
        path = tmp_path / f"out/labels/scan{index // DEPTH}/slice_{index % DEPTH:03d}.png"
        with Image.open(path) as picture:
            assert np.array_equal(np.array(picture), labels.numpy())


def test_panels_name_the_slices(random_sam, tmp_path):
    run(random_sam, panels=2, report=True, trainer={"default_root_dir": tmp_path})
    assert "slice_00" in next(tmp_path.rglob("report.html")).read_text()
    assert list(tmp_path.rglob("panels/*.png"))


def test_overlapping_classes_of_volumes(random_sam, tmp_path):
    class MultiHot(Scans):
        def __getitem__(self, index):
            sample = super().__getitem__(index)
            maps = [sample["label"] == 0, sample["label"] < 2, sample["label"] == 2]
            return {**sample, "label": torch.stack(maps).long()}

    class Offset(OnVolumes):
        def validation_step(self, batch, batch_idx):
            return {"logits": self.volumes(batch["image"]) + 2}

    callback = SAMRefineCallback(
        random_sam, num_classes=3, refine=REFINE, scores_kind="multilabel", panels=2
    )
    loader = DataLoader(MultiHot(), 2)
    trainer = Trainer(**SILENT, callbacks=[callback], default_root_dir=tmp_path)
    (logged,) = trainer.validate(Offset(), loader, verbose=False)
    data, metric = MultiHot(), MultilabelJaccardIndex(3)
    for index in range(VOLUMES):
        sample = data[index]
        metric.update((Network()(sample["image"][None]) > -2).long(), sample["label"][None])
    assert logged["val/miou_raw"] > 0.1
    assert logged["val/miou_raw"] == pytest.approx(float(metric.compute()), abs=1e-6)


def test_scores_of_fewer_slices_are_refused(random_sam):
    class Half(OnVolumes):
        def validation_step(self, batch, batch_idx):
            return {"logits": Network()(batch["image"])[:, :, :2]}

    callback = SAMRefineCallback(random_sam, num_classes=NUM_CLASSES, refine=REFINE)
    with pytest.raises(ValueError, match="scores must be"):
        Trainer(**SILENT, callbacks=[callback]).validate(
            Half(), DataLoader(Scans(), 2), verbose=False
        )


def test_a_tuning_refuses_volumes(random_sam):
    """It would take neighboring slices for independent images."""
    callback = TuneCallback(random_sam, num_classes=NUM_CLASSES, refine=REFINE)
    callback.visitor = lambda scoring: lambda refiner, inputs: None
    trainer = Trainer(**SILENT, callbacks=[callback])
    with pytest.raises(MisconfigurationException, match="got volumes of 3 slices"):
        trainer.validate(OnVolumes(), DataLoader(Scans(), 2), verbose=False)


@pytest.mark.parametrize(("axis", "error"), [(1, ValueError), (5, ValueError), ("D", TypeError)])
def test_other_axes_are_refused(axis, error):
    with pytest.raises(error, match=r"slice_axis must be 2, 3 or 4 of \(B, C, D, H, W\)"):
        SAMRefineCallback("tiny", slice_axis=axis)
