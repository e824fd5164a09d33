"""Undoing normalization, and refusing what SAM could not read."""

from __future__ import annotations

import logging
from typing import ClassVar

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning_stubs import NUM_CLASSES, REFINE, SILENT, Blobs, Segmenter
from torch.utils.data import DataLoader

from lightning_samrefine import SAMRefineCallback
from lightning_samrefine.adapters.batch_adapter import BatchAdapter
from lightning_samrefine.adapters.denormalize import Denormalize
from lightning_samrefine.callbacks.run_state import RunState
from lightning_samrefine.utils.validation import WrongValuesError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture
def rgb() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, 3, 9, 11), generator=generator, dtype=torch.uint8)


def normalized(images: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (images / 255 - mean) / std


def test_uint8_passes_untouched(rgb):
    assert torch.equal(Denormalize()(rgb), rgb)
    assert torch.equal(Denormalize(MEAN, STD)(rgb), rgb)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
def test_other_integers_are_0_to_255(rgb, dtype):
    assert torch.equal(Denormalize()(rgb.to(dtype)), rgb)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("scale", [1, 255])
def test_plain_floats_in_either_range(rgb, scale, dtype):
    images = (rgb / 255 * scale).to(dtype)
    found = Denormalize()(images)
    assert found.dtype == torch.uint8
    assert (found.int() - rgb.int()).abs().max() <= (1 if dtype == torch.float16 else 0)


def test_imagenet_normalization_is_undone_exactly(rgb):
    assert torch.equal(Denormalize(MEAN, STD)(normalized(rgb)), rgb)
    assert torch.equal(Denormalize(list(MEAN), list(STD), "0-1")(normalized(rgb)), rgb)


def test_normalization_of_0_to_255_is_known_by_its_numbers(rgb):
    images = (rgb.float() - 120) / 60
    assert torch.equal(Denormalize(120.0, 60.0)(images), rgb)
    by_channel = Denormalize([120.0, 120.0, 120.0], [60.0, 60.0, 60.0], "0-255")
    assert torch.equal(by_channel(images), rgb)


def test_bf16_normalized_images_stay_close(rgb):
    found = Denormalize(MEAN, STD)(normalized(rgb).bfloat16())
    assert (found.int() - rgb.int()).abs().max() <= 2


def test_gray_becomes_three_channels(rgb):
    found = Denormalize()(rgb[:, :1])
    assert found.shape == (2, 3, 9, 11)
    assert all(torch.equal(found[:, c], rgb[:, 0]) for c in range(3))


def test_normalized_images_without_their_numbers_are_refused_with_advice(rgb):
    with pytest.raises(ValueError, match="got values from -2") as error:
        Denormalize()(normalized(rgb))
    for word in ("image_mean", "image_std", "image_range", "0.485, 0.456, 0.406", "0.229"):
        assert word in str(error.value)


def test_bright_normalized_images_are_refused_although_none_is_negative():
    bright = normalized(torch.full((1, 3, 4, 4), 250, dtype=torch.uint8))
    assert bright.min() > 0
    with pytest.raises(ValueError, match="image_mean"):
        Denormalize()(bright)


@pytest.mark.parametrize(
    ("converter", "images"),
    [
        (Denormalize(image_range="0-1"), torch.full((1, 3, 2, 2), 3.0)),
        (Denormalize(image_range="0-255"), torch.full((1, 3, 2, 2), 300.0)),
        (Denormalize(MEAN, STD), torch.full((1, 3, 2, 2), 200.0)),
        (Denormalize(), torch.full((1, 3, 2, 2), -1.0)),
        (Denormalize(), torch.full((1, 3, 2, 2), float("nan"))),
    ],
)
def test_values_outside_the_range_are_refused(converter, images):
    with pytest.raises(ValueError, match=r"image must be in .*, got values .* set image_mean"):
        converter(images)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int64, torch.uint16, torch.uint32])
def test_integers_of_more_than_8_bits_are_refused_by_name(dtype):
    images = torch.full((1, 3, 2, 2), 4095).to(dtype)
    with pytest.raises(WrongValuesError, match=f"image must be in 0 to 255 .*{dtype} from 4095"):
        Denormalize()(images)


def test_integers_below_0_are_refused():
    with pytest.raises(WrongValuesError, match="image must be in 0 to 255"):
        Denormalize()(torch.full((1, 3, 2, 2), -1))


class TestSettledRange:
    """The range is that of the run: no batch is read by its own values alone."""

    def test_a_dark_batch_of_0_to_255_stays_dark(self, rgb):
        converter = Denormalize()
        dark = torch.linspace(0, 1, 12).view(1, 1, 3, 4)
        assert torch.equal(converter(rgb.float()), rgb)
        expected = np.repeat(np.round(dark.numpy()).astype(np.uint8), 3, axis=1)
        assert np.array_equal(converter(dark).numpy(), expected)

    def test_a_dark_image_is_read_like_the_brighter_ones_of_its_batch(self):
        dark, bright = torch.full((3, 2, 2), 0.7), torch.full((3, 2, 3), 200.0)
        adapter = BatchAdapter(2, needs_target=False)
        scores = [torch.full((2, 2, 2), 0.5), torch.full((2, 2, 3), 0.5)]
        read = adapter({"image": [dark, bright]}, {"logits": scores})
        assert [image.unique().tolist() for image in read.images] == [[1], [200]]

    def test_a_bright_batch_after_one_read_as_0_to_1_is_refused(self, rgb):
        converter = Denormalize()
        converter(torch.full((1, 3, 2, 2), 0.4))
        with pytest.raises(WrongValuesError, match=r"range 0-1, like the images before"):
            converter(rgb.float())

    def test_black_images_settle_no_range(self, rgb):
        converter = Denormalize()
        assert converter(torch.zeros(1, 3, 2, 2)).sum() == 0
        assert torch.equal(converter(rgb.float()), rgb)

    def test_nothing_but_0_and_1_is_refused_unless_the_range_is_known(self, rgb):
        images = torch.tensor([0.0, 1.0, 1.0, 0.0]).view(1, 1, 2, 2)
        with pytest.raises(WrongValuesError, match="image_range must be '0-1' or '0-255'"):
            Denormalize()(images)
        for image_range, white in (("0-1", 255), ("0-255", 1)):
            assert Denormalize(image_range=image_range)(images).max() == white
        converter = Denormalize()
        converter(rgb / 255)
        assert converter(images).max() == 255

    def test_a_fresh_converter_has_seen_nothing(self, rgb):
        converter = Denormalize()
        converter(rgb.float())
        assert torch.equal(converter.fresh()(rgb / 255), rgb)
        assert torch.equal(Denormalize(image_range="0-1").fresh()(rgb / 255), rgb)

    @pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.bfloat16, torch.float16])
    def test_images_of_other_types_are_read_right(self, rgb, dtype):
        assert torch.equal(Denormalize()(rgb.to(dtype)), rgb)

    def test_under_a_trainer_a_dark_batch_does_not_flip(self, random_sam, monkeypatch):
        """With ranges read batch by batch SAM would see the second image 255 times as bright."""
        dataset = Blobs(3)
        dataset.images = dataset.images.float()
        dataset.images[1] /= 255
        seen = []
        refine = RunState.refine

        def remember(self, inputs, dataloader_idx):
            seen.append(inputs)
            return refine(self, inputs, dataloader_idx)

        monkeypatch.setattr(RunState, "refine", remember)
        callback = SAMRefineCallback(random_sam, num_classes=NUM_CLASSES, refine=REFINE)
        trainer = Trainer(**SILENT, callbacks=[callback])
        trainer.validate(Segmenter(), DataLoader(dataset), verbose=False)
        assert [int(inputs.images[0].max()) > 1 for inputs in seen] == [True, False, True]

    def test_under_a_trainer_a_first_batch_that_misled_is_refused(self, random_sam):
        dataset = Blobs(3)
        dataset.images = dataset.images.float()
        dataset.images[0] /= 255
        callback = SAMRefineCallback(random_sam, num_classes=NUM_CLASSES, refine=REFINE)
        trainer = Trainer(**SILENT, callbacks=[callback])
        with pytest.raises(ValueError, match="range 0-1, like the images before"):
            trainer.validate(Segmenter(), DataLoader(dataset), verbose=False)


def test_overshoot_of_bicubic_resizing_is_clamped_where_the_range_is_set():
    images = torch.tensor([-0.06, 0.5, 1.07]).view(1, 1, 1, 3)
    assert Denormalize(image_range="0-1")(images)[0, 0, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (2, 13, 8, 8), (3, 8, 8)])
def test_other_channels_are_refused(shape):
    with pytest.raises(ValueError, match="adapter"):
        Denormalize()(torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.bool, torch.complex64])
def test_other_types_are_refused(dtype):
    with pytest.raises(ValueError, match=f"image must be integers .*, got dtype {dtype}"):
        Denormalize()(torch.ones(2, 3, 8, 8).to(dtype))


def test_channels_last_are_refused_with_a_hint():
    with pytest.raises(ValueError, match="channels come first"):
        Denormalize()(torch.zeros(2, 8, 8, 3, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"image_mean": MEAN}, ValueError, "image_mean and image_std must be set both"),
        ({"image_std": 0.5}, ValueError, "image_mean and image_std must be set both"),
        ({"image_mean": 0.5, "image_std": 0.0}, ValueError, "image_std must be above 0, got 0.0"),
        (
            {"image_mean": [0.5, 0.5], "image_std": 1.0},
            ValueError,
            "image_mean must be 1 or 3 .* got 2",
        ),
        (
            {"image_mean": "0.5", "image_std": 1.0},
            TypeError,
            "image_mean must .* got '0.5'",
        ),
        ({"image_range": "0-2"}, ValueError, "image_range must be one of .*, got '0-2'"),
    ],
)
def test_bad_arguments_name_themselves(arguments, error, message):
    with pytest.raises(error, match=message):
        Denormalize(**arguments)


class TestSettingsThatDoNotFit:
    """Mean, deviation or range of images that need none: SAM would see them gray or black."""

    IMAGES: ClassVar = torch.rand(2, 3, 8, 9, generator=torch.Generator().manual_seed(7))

    def test_mean_and_std_for_images_in_0_to_1(self):
        converter = Denormalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        with pytest.warns(RuntimeWarning, match=r"image_mean and image_std.*lie within 0 to 1"):
            converter(self.IMAGES)

    def test_range_0_to_255_for_images_in_0_to_1(self):
        with pytest.warns(RuntimeWarning, match=r"image_range.*'0-1'"):
            Denormalize(image_range="0-255")(self.IMAGES)

    def test_settings_that_fit(self, recwarn):
        Denormalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])((self.IMAGES - 0.45) / 0.225)
        converter = Denormalize(image_range="0-255")
        converter(255 * self.IMAGES)
        converter(self.IMAGES)  # a dark batch after others
        assert not recwarn.list


class TestRangesThatDoNotFit:
    """Numbers of one range and ``image_range`` of the other: SAM would see black images."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_numbers_of_0_to_1_with_the_range_0_to_255(self, rgb, dtype):
        converter = Denormalize(MEAN, STD, "0-255")
        with pytest.raises(WrongValuesError, match=r"image_range must be '0-1'.*, got '0-255'"):
            converter(normalized(rgb).to(dtype))

    def test_no_normalization_written_as_mean_0_and_deviation_1(self, rgb):
        with pytest.raises(WrongValuesError, match="image_range must be '0-1'"):
            Denormalize(0.0, 1.0, "0-255")(rgb / 255)
        assert torch.equal(Denormalize(0.0, 1.0, "0-255")(rgb.float()), rgb)

    def test_black_images_come_first(self, rgb):
        converter = Denormalize(MEAN, STD, "0-255")
        assert converter(normalized(torch.zeros_like(rgb))).sum() == 0
        with pytest.raises(WrongValuesError, match="image_range must be '0-1'"):
            converter(normalized(rgb))

    def test_images_of_0_to_255_that_were_not_normalized(self, rgb):
        with pytest.raises(WrongValuesError, match="image_mean and image_std must be None"):
            Denormalize(MEAN, STD, "0-255")(rgb.float())

    def test_numbers_of_0_to_1_that_were_applied_to_0_to_255(self, rgb):
        """Normalize without a division by 255: an odd pipeline, and its undoing is right."""
        mean, std = (np.array(values, np.float32)[:, None, None] for values in (MEAN, STD))
        images = torch.from_numpy((rgb.numpy() - mean) / std)
        assert torch.equal(Denormalize(MEAN, STD, "0-255")(images), rgb)
        with pytest.raises(ValueError, match=r"range 0-1, got values .*image_range"):
            Denormalize(MEAN, STD)(images)

    def test_numbers_of_0_to_255_with_the_range_0_to_1(self, rgb):
        converter = Denormalize(120.0, 60.0, "0-1")
        with pytest.raises(ValueError, match=r"range 0-1, got values from 0 to 255 after undoing"):
            converter((rgb.float() - 120) / 60)

    def test_dark_images_of_numbers_of_0_to_255(self):
        dark = np.linspace(0, 1, 12, dtype=np.float32).reshape(1, 1, 3, 4)
        found = Denormalize(120.0, 60.0, "0-255")(torch.from_numpy((dark - 120) / 60))
        assert np.array_equal(found[:, :1].numpy(), np.round(dark).astype(np.uint8))

    def test_bands_that_are_not_shown_do_not_decide_the_range(self, rgb):
        """Red, green and blue in 0 to 1 beside a depth in meters."""
        depth = torch.full((2, 1, 9, 11), 0.5)
        converter = Denormalize((*MEAN, 7.0), (*STD, 3.0), image_channels=(0, 1, 2))
        assert torch.equal(converter(torch.cat([normalized(rgb), depth], dim=1)), rgb)

    def test_under_a_trainer_it_is_an_error_before_any_work(self, random_sam):
        dataset = Blobs(2)
        dataset.images = normalized(dataset.images)
        callback = SAMRefineCallback(
            random_sam,
            num_classes=NUM_CLASSES,
            refine=REFINE,
            image_mean=MEAN,
            image_std=STD,
            image_range="0-255",
        )
        trainer = Trainer(**SILENT, callbacks=[callback])
        with pytest.raises(ValueError, match="image_range must be '0-1'"):
            trainer.validate(Segmenter(), DataLoader(dataset), verbose=False)

    def test_the_log_line_shows_what_sam_sees(self, random_sam, caplog):
        dataset = Blobs(2)
        pixels = dataset.images
        dataset.images = normalized(pixels)
        callback = SAMRefineCallback(
            random_sam, num_classes=NUM_CLASSES, refine=REFINE, image_mean=MEAN, image_std=STD
        )
        with caplog.at_level(logging.INFO):
            trainer = Trainer(**SILENT, callbacks=[callback])
            trainer.validate(Segmenter(), DataLoader(dataset, 2), verbose=False)
        (line,) = (r.message for r in caplog.records if "reads image" in r.message)
        low, high = normalized(pixels).aminmax()
        assert (
            f"with values {low:.4g} to {high:.4g}, image_mean and image_std undone, seen by SAM as "
            f"{pixels.min()} to {pixels.max()};"
        ) in line
