"""Batches of images that are padded to one size: the padding is cut off and counted nowhere."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning_stubs import HW, IGNORE, NUM_CLASSES, REFINE, SILENT, Blobs, Segmenter
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassJaccardIndex

from lightning_samrefine import Refiner, SAMRefineCallback, SAMRefineWriter
from lightning_samrefine.adapters.batch_adapter import BatchAdapter
from lightning_samrefine.adapters.layouts.padding import Padding
from lightning_samrefine.utils.validation import WrongValuesError

SIZES = [(32, 30), (20, 40), (26, 33), (32, 40)]


class Padded(Blobs):
    """Images of several sizes, padded to `HW` with zeros and with targets of class 0."""

    def __init__(self, mode: str = "constant", hw: tuple[int, int] = HW) -> None:
        super().__init__(len(SIZES))
        real = [i[:, :h, :w] for i, (h, w) in zip(self.images, SIZES, strict=True)]
        self.truths = [t[:h, :w] for t, (h, w) in zip(self.targets, SIZES, strict=True)]
        self.real = real
        pads = [(0, hw[1] - w, 0, hw[0] - h) for h, w in SIZES]
        self.images = torch.stack(
            [
                nn.functional.pad(one.float(), pad, mode=mode).to(torch.uint8)
                for one, pad in zip(real, pads, strict=True)
            ]
        )
        self.targets = torch.stack(
            [nn.functional.pad(one, pad) for one, pad in zip(self.truths, pads, strict=True)]
        )
        self.masks = torch.stack(
            [
                nn.functional.pad(torch.ones(size), pad)
                for size, pad in zip(SIZES, pads, strict=True)
            ]
        )

    def __getitem__(self, index):
        return {"image": self.images[index], "mask": self.targets[index]}


class WithEntries(Padded):
    def __init__(self, entries, **kwargs) -> None:
        super().__init__(**kwargs)
        self.entries = entries

    def __getitem__(self, index):
        return {**super().__getitem__(index), **self.entries(self, index)}


class ByImage(Segmenter):
    """Has the logits of an image whatever else is in the batch."""

    def predict_step(self, batch, batch_idx):
        return self.logits_and_target(batch)[0]


CLAIMS = {
    "pixel mask": lambda data, i: {"pixel_mask": data.masks[i].long()},
    "pixel mask with a channel": lambda data, i: {"pixel_mask": data.masks[i][None]},
    "padding mask": lambda data, i: {"padding_mask": data.masks[i] == 0},
    "inverted padding mask": lambda data, i: {"padding_mask": data.masks[i] == 1},
    "image sizes": lambda data, i: {"image_sizes": torch.tensor(SIZES[i])},
    "sizes as a collated tuple": lambda data, i: {"original_sizes": SIZES[i]},
    "width first": lambda data, i: {"image_sizes": torch.tensor(SIZES[i][::-1])},
    "nested": lambda data, i: {"meta": {"target_sizes": torch.tensor(SIZES[i])}},
    "both, agreeing": lambda data, i: {
        "pixel_mask": data.masks[i],
        "image_sizes": torch.tensor(SIZES[i]),
    },
    "a mask beside sizes before resizing": lambda data, i: {
        "pixel_mask": data.masks[i],
        "original_sizes": torch.tensor([500, 333]),
    },
}


def expected(module: Segmenter, data: Padded, sam) -> tuple[float, float]:
    """Return mIoU of raw and refined over the real pixels, by torchmetrics."""
    raw, refined = (MulticlassJaccardIndex(NUM_CLASSES, ignore_index=IGNORE) for _ in range(2))
    refiner = Refiner(sam, REFINE)
    with torch.no_grad():
        for image, real, truth in zip(data.images, data.real, data.truths, strict=True):
            h, w = truth.shape
            probs = module.network(image[None] / 255 - 0.5)[0].softmax(dim=0)[:, :h, :w]
            raw.update(probs.argmax(dim=0)[None], truth[None])
            refined.update(refiner(real, probs.contiguous()).labels[None], truth[None])
    return float(raw.compute()), float(refined.compute())


def validate(random_sam, dataset, batch_size=2, module=None, collate=None, **kwargs):
    callback = SAMRefineCallback(random_sam, num_classes=NUM_CLASSES, refine=REFINE, **kwargs)
    loader = DataLoader(dataset, batch_size, collate_fn=collate)
    trainer = Trainer(**SILENT, callbacks=[callback])
    return trainer.validate(module or Segmenter(), loader, verbose=False)[0]


@pytest.mark.parametrize("claim", CLAIMS)
def test_padding_is_cut_off_and_counts_nowhere(random_sam, claim, caplog):
    data = WithEntries(CLAIMS[claim])
    with caplog.at_level(logging.INFO):
        logged = validate(random_sam, data)
    raw, refined = expected(Segmenter(), data, random_sam)
    assert logged["val/miou_raw"] == pytest.approx(raw, abs=1e-6)
    assert logged["val/miou_refined"] == pytest.approx(refined, abs=1e-6)
    assert "padding by batch[" in caplog.text
    assert "31.2% cut off" in caplog.text  # 800 of 2 * 1280 pixels are not real


def test_without_a_claim_every_pixel_counts(random_sam):
    data = WithEntries(CLAIMS["pixel mask"])
    real = validate(random_sam, data)["val/miou_raw"]
    assert validate(random_sam, Padded())["val/miou_raw"] != pytest.approx(real, abs=1e-3)
    whole = validate(random_sam, data, padding_key=False)
    assert whole["val/miou_raw"] != pytest.approx(real, abs=1e-3)


def test_sizes_in_the_dicts_of_a_list(random_sam):
    """As DETR's and torchvision's batches have them."""
    data = Padded()

    def collate(indices):
        rows = [{"size": torch.tensor(SIZES[i]), "image_id": i} for i in indices]
        return {"image": data.images[indices], "mask": data.targets[indices], "labels": rows}

    logged = validate(random_sam, range(4), collate=collate)
    raw, refined = expected(Segmenter(), data, random_sam)
    assert logged["val/miou_raw"] == pytest.approx(raw, abs=1e-6)
    assert logged["val/miou_refined"] == pytest.approx(refined, abs=1e-6)


def test_maps_of_the_real_parts_in_lists_are_taken_as_they_are(random_sam):
    """As transformers' post-processing returns them."""
    data = Padded()

    class PostProcessed(Segmenter):
        def validation_step(self, batch, batch_idx):
            labels = self.network(batch["image"] / 255 - 0.5).argmax(dim=1)
            sizes = batch["target_sizes"].tolist()
            return {"preds": [own[:h, :w] for own, (h, w) in zip(labels, sizes, strict=True)]}

    def collate(indices):
        return {
            "image": data.images[indices],
            "mask": [data.truths[i] for i in indices],
            "target_sizes": torch.tensor([SIZES[i] for i in indices]),
        }

    logged = validate(random_sam, range(4), module=PostProcessed(), collate=collate)
    raw, _ = expected(Segmenter(), data, random_sam)
    assert logged["val/miou_raw"] == pytest.approx(raw, abs=1e-6)


def test_the_writer_writes_the_real_parts(random_sam, tmp_path):
    data = WithEntries(CLAIMS["image sizes"])
    module = ByImage()
    writer = SAMRefineWriter(tmp_path / "out", random_sam, num_classes=NUM_CLASSES, refine=REFINE)
    trainer = Trainer(**SILENT, callbacks=[writer])
    trainer.predict(module, DataLoader(data, 2), return_predictions=False)
    refiner = Refiner(random_sam, REFINE)
    for index, (image, real, (h, w)) in enumerate(zip(data.images, data.real, SIZES, strict=True)):
        with torch.no_grad():
            probs = module.network(image[None] / 255 - 0.5)[0].softmax(dim=0)[:, :h, :w]
        with Image.open(tmp_path / f"out/labels/{index:08d}.png") as picture:
            written = np.array(picture)
        assert np.array_equal(written, refiner(real, probs.contiguous()).labels.numpy())


# Sizes of the images before they were resized, beside images that are not padded.
OTHER_SIZES = {
    "larger": [(64, 80), (40, 80), (52, 66), (64, 80)],
    "smaller": [(20, 30), (16, 16), (31, 40), (8, 9)],
    "larger on one side": [(20, 80), (64, 30), (30, 64), (64, 20)],
}


@pytest.mark.parametrize("sizes", OTHER_SIZES)
@pytest.mark.parametrize("name", ["original_sizes", "target_sizes"])
def test_sizes_before_resizing_cut_nothing(random_sam, sizes, name):
    class Resized(Blobs):
        def __getitem__(self, index):
            image, target = super().__getitem__(index)
            return {"image": image, "mask": target, name: torch.tensor(OTHER_SIZES[sizes][index])}

    logged = validate(random_sam, Resized())
    plain = validate(random_sam, Blobs())
    assert logged["val/miou_raw"] == plain["val/miou_raw"]


@pytest.mark.parametrize("mode", ["replicate", "reflect", "circular"])
def test_copies_of_the_edge_are_padding(random_sam, mode):
    data = Padded(mode, hw=(36, 44))
    sizes = torch.tensor(SIZES)
    found = Padding()({"image_sizes": sizes}, data.images, "batch")
    assert found.boxes == [(0, 0, h, w) for h, w in SIZES]


BLACK = torch.zeros(2, 3, 8, 10)
NOISE = torch.rand(2, 3, 8, 10, generator=torch.Generator().manual_seed(0))
IN_THE_MIDDLE = torch.zeros(2, 8, 10)
IN_THE_MIDDLE[:, 2:6, 3:9] = 1


class TestEvidence:
    def test_a_real_part_may_lie_in_the_middle(self):
        found = Padding()({"pixel_mask": IN_THE_MIDDLE}, NOISE * IN_THE_MIDDLE[:, None], "batch")
        assert found.boxes == [(2, 3, 6, 9)] * 2
        assert found.reading == "1 is real"

    @pytest.mark.parametrize("name", ["pixel_mask", "padding_mask"])
    @pytest.mark.parametrize("real", [0, 1])
    def test_pixels_decide_which_value_is_real_if_both_are_rectangles(self, name, real):
        right = torch.ones(2, 8, 10)
        right[..., 6:] = 0
        mask = right if real == 1 else 1 - right
        found = Padding()({name: mask}, NOISE * right[:, None], "batch")
        assert found.boxes == [(0, 0, 8, 6)] * 2
        assert found.reading == f"{real} is real"

    def test_the_name_decides_for_black_images_and_what_was_clear_stays(self):
        right = torch.ones(2, 8, 10)
        right[..., 6:] = 0
        padding = Padding()
        assert padding({"pixel_mask": right}, BLACK, "batch").boxes[0] == (0, 0, 8, 6)
        assert Padding()({"pad_mask": right}, BLACK, "batch").boxes[0] == (0, 6, 8, 10)
        padding({"pad_mask": right}, NOISE * right[:, None], "batch")
        assert padding({"pad_mask": right}, BLACK, "batch").boxes[0] == (0, 0, 8, 6)

    @pytest.mark.parametrize("value", [0, 1])
    def test_a_mask_of_one_value_marks_no_padding(self, value):
        for name in ("pixel_mask", "padding_mask"):
            assert Padding()({name: torch.full((2, 8, 10), value)}, NOISE, "batch") is None

    def test_a_mask_of_another_shape_is_an_error(self):
        mask = IN_THE_MIDDLE.clone()
        mask[0, 4, 4] = 0
        with pytest.raises(ValueError, match=r"rectangle.*'pixel_mask'.*padding_key=False"):
            Padding()({"pixel_mask": mask}, NOISE, "batch")
        assert Padding(False)({"pixel_mask": mask}, NOISE, "batch") is None

    def test_two_claims_that_differ_are_an_error(self):
        batch = {"pixel_mask": IN_THE_MIDDLE, "image_sizes": torch.tensor([[6, 9], [6, 9]])}
        images = NOISE.clone()
        images[:, :, 6:] = 0
        images[..., 9:] = 0
        with pytest.raises(ValueError, match=r"padding_key='pixel_mask' or padding_key='image_s"):
            Padding()(batch, images, "batch")
        assert Padding("image_sizes")(batch, images, "batch").boxes[0] == (0, 0, 6, 9)

    def test_images_that_show_nothing_are_an_error(self):
        sizes = torch.tensor([[6, 9], [5, 10]])
        with pytest.raises(ValueError, match=r"padding must be visible.*padding_key='orig_size'"):
            Padding()({"orig_size": sizes}, BLACK, "batch")
        found = Padding("orig_size")({"orig_size": sizes}, BLACK, "batch")
        assert found.boxes == [(0, 0, 6, 9), (0, 0, 5, 10)]

    def test_later_pixels_that_contradict_are_an_error(self):
        padding, images = Padding(), NOISE.clone()
        images[:, :, 6:] = 0
        sizes = {"sizes": torch.tensor([[6, 10], [6, 10]])}
        assert padding(sizes, images, "batch") is not None
        with pytest.raises(WrongValuesError, match="padding_key=False"):
            padding(sizes, NOISE, "batch")

    def test_a_key_that_fits_nothing_is_an_error(self):
        for batch in ({"sizes": torch.tensor([[9, 10], [6, 10]])}, {"pixel_mask": NOISE}, {}):
            with pytest.raises(ValueError, match="padding_key must be the key of"):
                Padding("sizes")(batch, NOISE, "batch")

    @pytest.mark.parametrize("key", [True, 1, b"x"])
    def test_a_key_of_another_type_is_an_error(self, key):
        with pytest.raises(TypeError, match="padding_key must be a string"):
            SAMRefineCallback("tiny", padding_key=key)

    def test_values_in_the_padding_do_not_matter(self):
        """Padding of -1 or NaN is no image of any range, and its target need not be a class."""
        images, target = NOISE.clone(), torch.ones(2, 8, 10)
        images[:, :, 6:], target[:, 6:] = -1, float("nan")
        images[1, :, 6:] = float("nan")
        logits = torch.zeros(2, 3, 8, 10)
        batch = {"image": images, "mask": target, "sizes": torch.tensor([[6, 10], [6, 10]])}
        inputs = BatchAdapter(3)(batch, logits)
        assert [tuple(one.shape) for one in inputs.images] == [(3, 6, 10)] * 2
        assert [tuple(one.shape) for one in inputs.probs] == [(3, 6, 10)] * 2
        assert all(bool((one == 1).all()) for one in inputs.targets)


@pytest.mark.parametrize("returns", ["labels", "probs", "loss"])
def test_what_the_step_returns_does_not_matter(random_sam, returns):
    data = WithEntries(CLAIMS["pixel mask"])
    logged = validate(random_sam, data, module=Segmenter(returns))
    assert logged["val/miou_refined"] == pytest.approx(
        expected(Segmenter(), data, random_sam)[1], abs=1e-6
    )
