"""Undoing normalisation, and refusing what SAM could not read."""

from __future__ import annotations

import pytest
import torch

from lightning_samrefine.images import RgbConverter

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture
def rgb() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, 3, 9, 11), generator=generator, dtype=torch.uint8)


def normalised(images: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (images / 255 - mean) / std


def test_uint8_passes_untouched(rgb):
    assert torch.equal(RgbConverter()(rgb), rgb)
    assert torch.equal(RgbConverter(MEAN, STD)(rgb), rgb)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
def test_other_integers_are_0_to_255(rgb, dtype):
    assert torch.equal(RgbConverter()(rgb.to(dtype)), rgb)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("scale", [1, 255])
def test_plain_floats_in_either_range(rgb, scale, dtype):
    images = (rgb / 255 * scale).to(dtype)
    found = RgbConverter()(images)
    assert found.dtype == torch.uint8
    assert (found.int() - rgb.int()).abs().max() <= (1 if dtype == torch.float16 else 0)


def test_imagenet_normalisation_is_undone_exactly(rgb):
    assert torch.equal(RgbConverter(MEAN, STD)(normalised(rgb)), rgb)
    assert torch.equal(RgbConverter(list(MEAN), list(STD), "0-1")(normalised(rgb)), rgb)


def test_normalisation_of_0_to_255_is_known_by_its_numbers(rgb):
    images = (rgb.float() - 120) / 60
    assert torch.equal(RgbConverter(120.0, 60.0)(images), rgb)
    by_channel = RgbConverter([120.0, 120.0, 120.0], [60.0, 60.0, 60.0], "0-255")
    assert torch.equal(by_channel(images), rgb)


def test_bf16_normalised_images_stay_close(rgb):
    found = RgbConverter(MEAN, STD)(normalised(rgb).bfloat16())
    assert (found.int() - rgb.int()).abs().max() <= 2


def test_grey_becomes_three_channels(rgb):
    found = RgbConverter()(rgb[:, :1])
    assert found.shape == (2, 3, 9, 11)
    assert all(torch.equal(found[:, c], rgb[:, 0]) for c in range(3))


def test_normalised_images_without_their_numbers_are_refused_with_advice(rgb):
    with pytest.raises(ValueError, match="got values from -2") as error:
        RgbConverter()(normalised(rgb))
    for word in ("image_mean", "image_std", "image_range", "0.485, 0.456, 0.406", "0.229"):
        assert word in str(error.value)


def test_bright_normalised_images_are_refused_although_none_is_negative():
    bright = normalised(torch.full((1, 3, 4, 4), 250, dtype=torch.uint8))
    assert bright.min() > 0
    with pytest.raises(ValueError, match="image_mean"):
        RgbConverter()(bright)


@pytest.mark.parametrize(
    ("converter", "images"),
    [
        (RgbConverter(image_range="0-1"), torch.full((1, 3, 2, 2), 3.0)),
        (RgbConverter(image_range="0-255"), torch.full((1, 3, 2, 2), 300.0)),
        (RgbConverter(MEAN, STD), torch.full((1, 3, 2, 2), 200.0)),
        (RgbConverter(), torch.full((1, 3, 2, 2), -1.0)),
        (RgbConverter(), torch.full((1, 3, 2, 2), float("nan"))),
        (RgbConverter(), torch.full((1, 3, 2, 2), 700)),
        (RgbConverter(), torch.full((1, 3, 2, 2), -1)),
    ],
)
def test_values_outside_the_range_are_refused(converter, images):
    with pytest.raises(ValueError, match=r"image: got values .* set image_mean"):
        converter(images)


def test_overshoot_of_bicubic_resizing_is_clamped_where_the_range_is_set():
    images = torch.tensor([-0.06, 0.5, 1.07]).view(1, 1, 1, 3)
    assert RgbConverter(image_range="0-1")(images)[0, 0, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (2, 13, 8, 8), (3, 8, 8)])
def test_other_channels_are_refused(shape):
    with pytest.raises(ValueError, match="adapter"):
        RgbConverter()(torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.bool, torch.complex64])
def test_other_types_are_refused(dtype):
    with pytest.raises(ValueError, match=f"image: got dtype {dtype}"):
        RgbConverter()(torch.ones(2, 3, 8, 8).to(dtype))


def test_channels_last_are_refused_with_a_hint():
    with pytest.raises(ValueError, match="channels come first"):
        RgbConverter()(torch.zeros(2, 8, 8, 3, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"image_mean": MEAN}, ValueError, "image_mean, image_std"),
        ({"image_std": 0.5}, ValueError, "image_mean, image_std"),
        ({"image_mean": 0.5, "image_std": 0.0}, ValueError, "image_std: got 0.0"),
        ({"image_mean": [0.5, 0.5], "image_std": 1.0}, ValueError, "image_mean: got 2 numbers"),
        ({"image_mean": "0.5", "image_std": 1.0}, TypeError, "image_mean: got '0.5'"),
        ({"image_range": "0-2"}, ValueError, "image_range: got '0-2'"),
    ],
)
def test_bad_arguments_name_themselves(arguments, error, message):
    with pytest.raises(error, match=message):
        RgbConverter(**arguments)
