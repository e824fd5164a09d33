"""Images of many bands, of 16 bits, and in another order of colors."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning_stubs import IGNORE, NUM_CLASSES, REFINE, SILENT, Blobs, Segmenter
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassJaccardIndex

from lightning_samrefine import Refiner, SAMRefineCallback, SAMRefineWriter
from lightning_samrefine.adapters.batch_adapter import BatchAdapter
from lightning_samrefine.adapters.denormalize import Denormalize
from lightning_samrefine.callbacks import presenter

BANDS = 5
SHOWN = (3, 2, 1)


class Multispectral(Blobs):
    """Five bands of 12 bits, each image of another brightness; red, green and blue are 3, 2, 1."""

    def __init__(self, dtype: torch.dtype = torch.int32) -> None:
        super().__init__()
        self.rgb = self.images
        infrared = torch.randint(0, 4000, (4, 2, *self.rgb.shape[2:]), dtype=torch.int32)
        blue_to_red = self.rgb.flip(1).int() * torch.tensor([4, 7, 11, 14]).view(-1, 1, 1, 1) + 90
        self.images = torch.cat([infrared[:, :1], blue_to_red, infrared[:, 1:]], 1).to(dtype)


class OnBands(Segmenter):
    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Conv2d(BANDS, NUM_CLASSES, 1)
        nn.init.constant_(self.network.bias, 0)
        with torch.no_grad():
            self.network.weight.zero_()
            self.network.weight[:, 1:4, 0, 0] = torch.eye(3).flip(1) / 300

    def forward(self, image):
        return self.network(image.float())

    def predict_step(self, batch, batch_idx):
        return self(batch["image"])


def stretched(image: np.ndarray, low: float, high: float) -> torch.Tensor:
    """Return (c, H, W) uint8 by numpy."""
    bounds = np.percentile(image, (low, high), axis=(1, 2), method="nearest", keepdims=True)
    image, (black, white) = image.astype(np.float32), bounds.astype(np.float32)
    scaled = (image - black) / (white - black) * np.float32(255)
    return torch.from_numpy(np.round(scaled).clip(0, 255).astype(np.uint8))


def expected(data, module, shown, sam) -> tuple[float, float]:
    """Return mIoU of raw and refined predictions by torchmetrics."""
    raw, refined = (MulticlassJaccardIndex(NUM_CLASSES, ignore_index=IGNORE) for _ in range(2))
    refiner = Refiner(sam, REFINE)
    with torch.no_grad():
        for image, target, rgb in zip(data.images, data.targets, shown, strict=True):
            probs = module(image[None])[0].softmax(dim=0)
            raw.update(probs.argmax(dim=0)[None], target[None])
            refined.update(refiner(rgb, probs).labels[None], target[None])
    return float(raw.compute()), float(refined.compute())


def validate(sam, module, data, batch_size, **kwargs):
    callback = SAMRefineCallback(sam, num_classes=NUM_CLASSES, refine=REFINE, **kwargs)
    trainer = Trainer(**SILENT, callbacks=[callback])
    return trainer.validate(module, DataLoader(data, batch_size), verbose=False)[0]


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint16, torch.float32])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_bands_are_shown_as_rgb_whatever_the_batch(
    random_sam, dtype, batch_size, caplog, monkeypatch, tmp_path
):
    data, module, drawn = Multispectral(dtype), OnBands(), []
    monkeypatch.setattr(presenter, "draw_panels", lambda panels, *_: drawn.extend(panels) or 1 / 0)
    with caplog.at_level(logging.INFO), pytest.warns(UserWarning, match="ZeroDivision"):
        logged = validate(
            random_sam, module, data, batch_size,
            image_channels=SHOWN, image_stretch=(2, 98), panels=4,
        )  # fmt: skip
    shown = [stretched(image.numpy()[[3, 2, 1]], 2, 98) for image in data.images]
    raw, refined = expected(data, module, shown, random_sam)
    assert logged["val/miou_raw"] == pytest.approx(raw, abs=1e-6)
    assert logged["val/miou_refined"] == pytest.approx(refined, abs=1e-6)
    assert "channels 3, 2, 1 shown, percentiles 2 to 98 of each image as 0 to 255" in caplog.text
    assert len(drawn) == 4
    assert all(any(torch.equal(panel.image, one) for one in shown) for panel in drawn)


def test_without_channels_many_bands_are_refused(random_sam):
    with pytest.raises(ValueError, match=r"image must be .* got shape .*5.*set image_channels"):
        validate(random_sam, OnBands(), Multispectral(), 2)


def test_bgr_is_an_order_of_channels(random_sam):
    class Reversed(Blobs):
        def __init__(self):
            super().__init__()
            self.images = self.images.flip(1)

    class OnReversed(Segmenter):
        def forward(self, image):
            return super().forward(image.flip(1))

    plain = validate(random_sam, Segmenter(), Blobs(), 2)
    turned = validate(random_sam, OnReversed(), Reversed(), 2, image_channels=(2, 1, 0))
    for key in ("val/miou_raw", "val/miou_refined", "val/trimap_miou_refined"):
        assert turned[key] == plain[key]


def test_one_channel_of_any_range_is_repeated(random_sam):
    """As of a CT in Hounsfield units, read as one of two channels."""
    scan = torch.randint(-1000, 3000, (2, 2, 9, 11), dtype=torch.int16)
    rgb = Denormalize(image_channels=[1], image_stretch=(0.5, 99.5))
    for own, found in zip(scan, rgb(scan), strict=True):
        assert torch.equal(found, stretched(own[1:].numpy(), 0.5, 99.5).expand(3, -1, -1))
    one = Denormalize(image_stretch=(0, 100))(scan[:, :1])
    assert one.amin() == 0
    assert one.amax() == 255


def test_mean_and_std_are_those_of_all_bands():
    rgb = torch.randint(0, 256, (2, 4, 9, 11), dtype=torch.uint8)
    mean, std = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0.4, 0.3, 0.2, 0.1])
    images = (rgb / 255 - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
    found = Denormalize(mean, std, image_channels=(3, 0, 2))(images)
    assert torch.equal(found, rgb[:, [3, 0, 2]])
    with pytest.raises(ValueError, match="one for each of the image's 4 channels, got 3"):
        Denormalize(mean[:3], std[:3], image_channels=(3, 0, 2))(images)


def test_ranges_are_settled_by_the_channels_that_are_shown():
    images = torch.rand(2, 4, 9, 11)
    images[:, 0] *= 1e4
    found = Denormalize(image_channels=(1, 2, 3))(images)
    assert torch.equal(found, (images[:, 1:] * 255).round().to(torch.uint8))


def test_a_channel_of_one_value_is_black():
    images = torch.full((1, 3, 4, 4), 700, dtype=torch.int32)
    assert not Denormalize(image_stretch=(2, 98))(images).any()


def test_batches_in_tuples_and_lists_are_found():
    adapter = BatchAdapter(
        NUM_CLASSES, rgb=Denormalize(image_channels=SHOWN, image_stretch=(2, 98))
    )
    data = Multispectral()
    logits = torch.zeros(4, NUM_CLASSES, *data.targets.shape[1:])
    whole = adapter((data.images, data.targets), logits)
    listed = adapter(
        {"image": list(data.images), "mask": list(data.targets)}, {"logits": list(logits)}
    )
    for index in range(4):
        assert torch.equal(whole.images[index], listed.images[index])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_channels": (3, 2)}, "image_channels must be 1 or 3 indices"),
        ({"image_channels": (3, 2, -1)}, "image_channels must be 1 or 3 indices"),
        ({"image_channels": 3}, "image_channels must be 1 or 3 indices"),
        ({"image_channels": (1.5, 2, 3)}, "image_channels must be 1 or 3 indices"),
        ({"image_channels": "rgb"}, "image_channels must be 1 or 3 indices"),
        ({"image_stretch": (98, 2)}, "image_stretch must be two percentiles"),
        ({"image_stretch": (2, 101)}, "image_stretch must be two percentiles"),
        ({"image_stretch": 2}, "image_stretch must be two percentiles"),
        ({"image_stretch": (2, 98), "image_range": "0-1"}, "must be None with image_stretch"),
        ({"image_stretch": (2, 98), "image_mean": 1, "image_std": 1}, "must be None with image_st"),
    ],
)
@pytest.mark.parametrize("owner", [SAMRefineCallback, SAMRefineWriter])
def test_wrong_settings_are_refused_before_any_work(owner, arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        owner("tiny", **arguments)


def test_a_band_that_is_not_there_is_an_error():
    with pytest.raises(ValueError, match=r"below the image's 3 channels, got \(3, 2, 1\)"):
        Denormalize(image_channels=(3, 2, 1))(torch.zeros(1, 3, 4, 4, dtype=torch.uint8))


def test_nan_has_no_percentile():
    with pytest.raises(ValueError, match="image must be finite with image_stretch"):
        Denormalize(image_stretch=(2, 98))(torch.full((1, 3, 4, 4), torch.nan))
