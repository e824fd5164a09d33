"""Overlapping classes under a real Trainer: every class is refined and measured as a binary map."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_stubs import HW, REFINE, SILENT, Blobs, Segmenter
from PIL import Image
from stub_sams import CountingSam
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics.classification import (
    MulticlassJaccardIndex,
    MultilabelAccuracy,
    MultilabelF1Score,
    MultilabelJaccardIndex,
)

from lightning_samrefine import RefineConfig, Refiner, SAMRefineCallback, SAMRefineWriter
from lightning_samrefine.callbacks import presenter
from lightning_samrefine.tune.callback import TuneCallback

CLASSES = ["red", "bright", "left"]
C, IGNORED = len(CLASSES), 255


class MultiHot(Blobs):
    """Blobs that are red, bright, both or neither, and the left of the image."""

    def __init__(self, length: int = 4) -> None:
        super().__init__(length)
        red = self.targets == 0
        left = torch.arange(HW[1]).expand(length, *HW) < HW[1] // 2
        self.multi_hot = torch.stack([red, red | (self.targets == 1), left], dim=1).long()

    def __getitem__(self, index):
        return self.images[index], self.multi_hot[index]


class IgnoringSome(MultiHot):
    def __init__(self) -> None:
        super().__init__()
        self.multi_hot[:, 1, -3:] = IGNORED


RETURNED = {
    "logits": lambda logits: {"logits": logits},
    "probs": lambda logits: {"probs": logits.sigmoid()},
    "one tensor": lambda logits: logits,
    "nothing": lambda logits: None,
    "loss": lambda logits: logits.mean(),
    "half": lambda logits: {"logits": logits.bfloat16()},
}


class Overlapping(Segmenter):
    def __init__(self, returns: str = "logits") -> None:
        super().__init__(channels=C)
        self.multilabel = returns

    def forward(self, image):
        return super().forward(image) * 4

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        return RETURNED[self.multilabel](self(batch[0]))

    def predict_step(self, batch, batch_idx):
        return self(batch[0])


def probabilities(image) -> torch.Tensor:
    with torch.no_grad():
        return (Overlapping().network(image[None] / 255 - 0.5) * 4).sigmoid()[0]


def refined_by_hand(sam, image, refine=REFINE) -> torch.Tensor:
    """Return (C, H, W) labels, each class refined as a segmentation of two classes."""
    refiner = Refiner(sam, refine)
    maps = [torch.stack([1 - p, p]) for p in probabilities(image)]
    labels = [(p > 0.5).long() for p in probabilities(image)]
    return torch.stack(
        [refiner(image, both, own).labels for both, own in zip(maps, labels, strict=True)]
    )


def expected(metric, sam, data, refine=REFINE) -> tuple[float, float]:
    raw, refined = metric(), metric()
    for image, truth in zip(data.images, data.multi_hot, strict=True):
        raw.update((probabilities(image) > 0.5).long()[None], truth[None])
        refined.update(refined_by_hand(sam, image, refine)[None], truth[None])
    return float(raw.compute()), float(refined.compute())


def jaccard(average="macro"):
    return MultilabelJaccardIndex(C, average=average, ignore_index=IGNORED)


def run(sam, data=None, returns="logits", batch_size=2, trainer=None, **kwargs):
    arguments = {"refine": REFINE, "class_names": CLASSES, "scores_kind": "multilabel", **kwargs}
    callback = SAMRefineCallback(sam, log="all", **arguments)
    trainer = Trainer(**{**SILENT, **(trainer or {})}, callbacks=[callback])
    loader = DataLoader(data or MultiHot(), batch_size)
    return trainer.validate(Overlapping(returns), loader, verbose=False)[0], callback


@pytest.mark.parametrize("returns", sorted(RETURNED.keys() - {"half"}))
def test_miou_is_the_mean_of_the_binary_ious(random_sam, returns, caplog):
    with caplog.at_level(logging.INFO):
        logged, _ = run(random_sam, returns=returns)
    raw, refined = expected(jaccard, random_sam, MultiHot())
    assert raw != refined
    assert logged["val/miou_raw"] == pytest.approx(raw, abs=1e-6)
    assert logged["val/miou_refined"] == pytest.approx(refined, abs=1e-6)
    assert logged["val/miou_gain"] == pytest.approx(refined - raw, abs=1e-6)
    assert f"of {C} overlapping classes" in caplog.text


def test_every_figure_is_of_binary_maps(random_sam):
    logged, callback = run(random_sam)
    data = MultiHot()
    for side, index in (("raw", 0), ("refined", 1)):
        by_metric = {
            "mdice": lambda: MultilabelF1Score(C, average="macro"),
            "pixel_acc": lambda: MultilabelAccuracy(C, average="micro"),
        }
        for name, metric in by_metric.items():
            value = expected(metric, random_sam, data)[index]
            assert logged[f"val/{name}_{side}"] == pytest.approx(value, abs=1e-6), name
    stacked = [
        torch.stack([(probabilities(i) > 0.5).long() for i in data.images]),
        torch.stack([refined_by_hand(random_sam, i) for i in data.images]),
    ]
    for c, name in enumerate(CLASSES):
        truth = data.multi_hot[:, c].numpy() == 1
        for side, maps in zip(("raw", "refined"), stacked, strict=True):
            own = maps[:, c].numpy() == 1
            iou = (own & truth).sum() / (own | truth).sum()
            assert logged[f"val/iou_{side}/{name}"] == pytest.approx(iou, abs=1e-6)
    raw, refined = (maps.numpy() == data.multi_hot.numpy() for maps in stacked)
    assert logged["val/refine_fixed_px"] == (refined & ~raw).sum() > 0
    assert logged["val/refine_broken_px"] == (raw & ~refined).sum()
    low, high = logged["val/miou_gain_low"], logged["val/miou_gain_high"]
    assert low <= logged["val/miou_gain"] <= high
    assert "val/refine_iou_ece" in logged
    assert callback.history[0]["miou_raw"] == pytest.approx(logged["val/miou_raw"], abs=1e-6)


@pytest.mark.parametrize("preset", ["auto", "fast", "default"])
def test_presets_refine_binary_maps_too(random_sam, preset):
    """There is no fit for overlapping classes: auto refines as fast does."""
    logged, callback = run(random_sam, refine=preset)
    own = RefineConfig.preset("fast" if preset == "auto" else preset)
    _, refined = expected(jaccard, random_sam, MultiHot(), own)
    assert logged["val/miou_refined"] == pytest.approx(refined, abs=1e-6)
    assert callback.refine_config.weights is None
    assert "val/miou_without_sam" not in logged


def test_pixels_of_one_class_may_be_ignored(random_sam):
    logged, _ = run(random_sam, IgnoringSome())
    raw, refined = expected(jaccard, random_sam, IgnoringSome())
    assert logged["val/miou_raw"] == pytest.approx(raw, abs=1e-6)
    assert logged["val/miou_refined"] == pytest.approx(refined, abs=1e-6)


def test_batches_change_nothing(random_sam):
    figures = [
        {k: v for k, v in run(random_sam, batch_size=size)[0].items() if "refine_ms" not in k}
        for size in (1, 3)
    ]
    assert figures[0] == figures[1]


@pytest.mark.parametrize("cache", [None, "memory"])
def test_an_image_is_encoded_once_for_all_of_its_classes(cache):
    sam = CountingSam()
    run(sam, cache=cache)
    assert sam.embedded == 4


def test_panels_show_the_classes_that_changed_the_most(random_sam, tmp_path, monkeypatch):
    drawn = []
    draw = presenter.draw_panels
    monkeypatch.setattr(
        presenter, "draw_panels", lambda panels, *rest: drawn.extend(panels) or draw(panels, *rest)
    )
    run(random_sam, panels=4, report=True, trainer={"default_root_dir": tmp_path})
    assert len(drawn) == 4
    assert all(panel.name.rpartition(", ")[2] in CLASSES for panel in drawn)
    for panel in drawn:
        c = CLASSES.index(panel.name.rpartition(", ")[2])
        assert set(panel.target.unique().tolist()) <= {-1, c}
        assert set(panel.regions.classes.tolist()) <= {c}
    assert list(tmp_path.rglob("panels/*.png"))
    assert "bright" in next(tmp_path.rglob("report.html")).read_text()


def test_a_fit_sees_the_same_figures(random_sam):
    callback = SAMRefineCallback(
        random_sam, refine=REFINE, class_names=CLASSES, scores_kind="multilabel"
    )

    class Training(Overlapping):
        def training_step(self, batch, batch_idx):
            return nn.functional.binary_cross_entropy_with_logits(self(batch[0]), batch[1].float())

    loader = DataLoader(MultiHot(), 2)
    Trainer(**SILENT, max_epochs=1, callbacks=[callback]).fit(Training(), loader, loader)
    assert callback.history[0]["miou_raw"] > 0


class TestWriter:
    def test_a_label_map_is_written_for_each_class(self, random_sam, tmp_path):
        writer = SAMRefineWriter(
            tmp_path / "out", random_sam, class_names=CLASSES, refine=REFINE,
            scores_kind="multilabel",
        )  # fmt: skip
        trainer = Trainer(**SILENT, callbacks=[writer])
        data = MultiHot()
        trainer.predict(Overlapping(), DataLoader(data, 2), return_predictions=False)
        for index, image in enumerate(data.images):
            for name, labels in zip(CLASSES, refined_by_hand(random_sam, image), strict=True):
                with Image.open(tmp_path / f"out/labels/{index:08d}/{name}.png") as picture:
                    assert np.array_equal(np.array(picture), labels.numpy())
        assert writer.counts.written == 4 * C


class TestRefusals:
    def test_multi_hot_targets_are_never_taken_for_anything_else(self, random_sam):
        with pytest.raises(ValueError, match=r"multi-hot.*overlap.*scores_kind='multilabel'"):
            run(random_sam, scores_kind="auto")

    def test_targets_of_one_class_a_pixel_are_refused(self, random_sam):
        with pytest.raises(ValueError, match=r"target must be multi-hot \(B, 3, H, W\)"):
            run(random_sam, Blobs())

    @pytest.mark.parametrize(
        "refine", [{"classes": [0]}, {"class_pred_iou_thresh": {0: 0.5}}, {"class_names": CLASSES}]
    )
    @pytest.mark.parametrize("owner", [SAMRefineCallback, SAMRefineWriter])
    def test_thresholds_of_classes_are_refused_before_any_work(self, owner, refine):
        with pytest.raises(ValueError, match=f"{next(iter(refine))} must be None with scores_kind"):
            owner("tiny", refine=refine, scores_kind="multilabel")

    def test_a_tuning_is_refused(self):
        with pytest.raises(ValueError, match="one class a pixel in a tuning, got 'multilabel'"):
            TuneCallback("tiny", scores_kind="multilabel")

    def test_values_other_than_0_and_1_are_refused(self, random_sam):
        data = MultiHot()
        data.multi_hot *= 255
        with pytest.raises(ValueError, match="divide them by 255"):
            run(random_sam, data)

    def test_an_adapter_returns_a_mapping(self, random_sam):
        def adapter(batch, outputs, captured):
            return {"image": batch[0], "target": batch[1], "logits": outputs["logits"]}

        assert run(random_sam, adapter=adapter)[0]["val/miou_raw"] == pytest.approx(
            run(random_sam)[0]["val/miou_raw"]
        )


@pytest.mark.parametrize(
    ("argument", "value"),
    [("metrics", MulticlassJaccardIndex(C)), ("add_to_outputs", "refined")],
)
def test_what_needs_one_label_map_an_image_is_refused(random_sam, argument, value):
    words = f"{argument} must be None for volumes and overlapping classes"
    with pytest.raises(MisconfigurationException, match=words):
        run(random_sam, returns="logits", **{argument: value})
