"""Unexpected inputs under every preset: finite numbers, known labels, equal results."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from random_predictions import noisy
from stub_sams import SmallSam

from lightning_samrefine import RefineConfig, Refiner
from lightning_samrefine.config import PRESETS

pytestmark = pytest.mark.numerical


@pytest.fixture(params=sorted(PRESETS))
def refiner(request, random_sam):
    # No region is too small or too unsure: these images have few.
    config = RefineConfig.preset(
        request.param, min_region_area=1, score_thresh=0.0, pred_iou_thresh=0.5
    )
    return Refiner(random_sam, config, "32")


def assert_sound(out, probs):
    assert out.labels.shape == out.covered.shape == probs.shape[1:]
    assert out.probs.shape == probs.shape
    assert out.probs.isfinite().all()
    assert 0 <= out.probs.min() <= out.probs.max() <= 1
    assert 0 <= out.labels.min() <= out.labels.max() < len(probs)


def test_every_preset_changes_something_here(refiner):
    image, probs = noisy()
    out = refiner(image, probs)
    assert_sound(out, probs)
    assert out.covered.any()
    assert (out.labels != probs.argmax(dim=0)).any()


@pytest.mark.parametrize("hw", [(1, 1), (1, 2), (1, 300), (300, 1), (2, 3), (3, 3), (7, 1024)])
def test_slivers(refiner, hw):
    image, probs = noisy(hw=hw)
    out = refiner(image, probs)
    assert_sound(out, probs)
    assert len(out.regions) > 0


@pytest.mark.parametrize("classes", [1, 2, 300])
def test_numbers_of_classes(refiner, classes):
    image, probs = noisy(classes)
    assert_sound(refiner(image, probs), probs)


@pytest.mark.parametrize("scale", [0.0, 0.3, 3.0])
def test_probabilities_that_do_not_sum_to_one(refiner, scale):
    image, probs = noisy()
    probs = (scale * probs).clamp(max=1)
    out = refiner(image, probs)
    assert_sound(out, probs)
    if scale == 0:  # nothing to compare: the raw label map stays
        assert not out.labels.any()


def test_certainty_of_every_class_at_once(refiner):
    image, probs = noisy()
    out = refiner(image, torch.ones_like(probs), probs.argmax(dim=0))
    assert_sound(out, probs)


def test_memory_layout_means_nothing(refiner):
    images, probs = (torch.stack(parts) for parts in zip(noisy(), noisy(seed=1), strict=True))
    expected = refiner.refine_batch(images, probs)
    last = torch.channels_last
    sliced = torch.zeros(2, 6, 80, 96, dtype=torch.uint8)[:, ::2, ::2, ::2].copy_(images)
    transposed = probs.transpose(2, 3).contiguous().transpose(2, 3)
    for given in (
        (images.to(memory_format=last), probs.to(memory_format=last)),
        (sliced, transposed),
        (images, probs.double()),
    ):
        for out, one in zip(refiner.refine_batch(*given), expected, strict=True):
            assert torch.equal(out.labels, one.labels)
            assert torch.equal(out.probs, one.probs)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.int16, torch.int32])
def test_labels_of_any_integer_type_with_unknown_values(refiner, dtype):
    image, probs = noisy()
    labels = probs.argmax(dim=0)
    labels[:4] = 30_000
    out, expected = refiner(image, probs, labels.to(dtype)), refiner(image, probs, labels)
    assert torch.equal(out.labels, expected.labels)
    assert torch.equal(out.probs, expected.probs)
    assert (out.labels[:4][~out.covered[:4]] == 30_000).all()


def test_chunks_of_prompts_and_the_order_of_a_batch_change_nothing(refiner, random_sam):
    images, probs = zip(*(noisy(seed=seed) for seed in range(3)), strict=True)
    outs = refiner.refine_batch(images, probs)
    for image, prob, out in zip(images[::-1], probs[::-1], outs[::-1], strict=True):
        alone = refiner(image, prob)
        assert torch.equal(alone.labels, out.labels)
        assert torch.equal(alone.probs, out.probs)
    one_by_one = Refiner(random_sam, replace(refiner.config, max_prompts_per_batch=1), "32")
    for image, prob, out in zip(images, probs, outs, strict=True):
        other = one_by_one(image, prob)
        assert (other.labels != out.labels).float().mean() < 0.01
        # A mask whose border is at a threshold may count for or against with the last bit.
        assert (other.probs - out.probs).abs().median() < 1e-4


def test_after_memory_ran_out_chunks_stay_smaller(refiner, random_sam):
    images, probs = zip(*(noisy(seed=seed) for seed in range(3)), strict=True)
    small = SmallSam(MemoryError(), prompts=1, images=1)
    spare = Refiner(small, replace(refiner.config, max_prompts_per_batch=4), "32")
    outs = spare.refine_batch(images, probs)
    assert max(*small.prompt_counts, *small.image_counts) > 1
    one_by_one = Refiner(random_sam, replace(refiner.config, max_prompts_per_batch=1), "32")
    for image, prob, out in zip(images, probs, outs, strict=True):
        expected = one_by_one(image, prob)
        assert torch.equal(out.labels, expected.labels)
        assert torch.equal(out.probs, expected.probs)
    small.prompt_counts.clear()
    small.image_counts.clear()
    spare.refine_batch(images, probs)
    assert {*small.prompt_counts, *small.image_counts} == {1}
