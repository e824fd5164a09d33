"""A sample of pixels depends on the images alone, not on how they were dealt."""

from __future__ import annotations

import random

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_samrefine.fit.sample import PixelSample, assign_folds
from lightning_samrefine.refine.fusion.features import FeatureMaps
from lightning_samrefine.refine.windows import WindowMaps

C, H, W = 4, 16, 12


def maps_of(probs: torch.Tensor) -> FeatureMaps:
    """Features of an image of one color without a mask."""
    image_hw = probs.shape[1:]
    votes = WindowMaps.whole(torch.zeros(len(probs), 1, 1), tuple(image_hw))
    return FeatureMaps(probs, torch.ones(len(probs), 1), torch.zeros(image_hw).long(), votes)


def image(index: int) -> tuple[str, FeatureMaps, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(index)
    probs = torch.rand(C, H, W, generator=generator).mul(3).softmax(dim=0)
    target = torch.randint(C, (H, W), generator=generator)
    target[:3] = 255
    return f"image {index}", maps_of(probs), target, probs.argmax(dim=0)


def collected(indices: list[int], **arguments: int) -> PixelSample:
    sample = PixelSample(C, **arguments)
    for index in indices:
        sample.add(*image(index))
    return sample


def contents(sample: PixelSample) -> list[tuple]:
    return [
        (s.key, s.group, s.features.numpy().tobytes(), s.target.tolist(), s.raw.tolist())
        for s in sample
    ]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(1, 14))
def test_any_order_and_number_of_processes_gives_the_same_sample(seed, processes, most):
    alone = contents(collected(list(range(12)), max_images=most))
    assert len(alone) == min(most, 12)
    order = [*range(12), 3, 7]  # a sampler repeats images to even out the processes
    random.Random(seed).shuffle(order)
    parts = [collected(order[rank::processes], max_images=most) for rank in range(processes)]
    for receiver in parts:
        merged = PixelSample(C, max_images=most)
        merged.merge(s for part in [receiver, *parts] for s in part)
        assert contents(merged) == alone


def test_pixels_hold_their_own_target_raw_class_and_features():
    key, maps, target, raw = image(5)
    target = target.clone()
    raw = raw.clone()
    raw[10] = 9  # no class
    # Each pixel's first probability identifies the pixel.
    (sample,) = collected_one(key, maps, target, raw)
    first = maps.probs.clamp(min=1e-4).log().half()[0].flatten()
    assert len(set(first.tolist())) > 0.9 * H * W
    for n in range(len(sample)):
        pixels = (
            (maps.probs.clamp(min=1e-4).log().half().flatten(1) == sample.features[0, :, n, None])
            .all(dim=0)
            .nonzero()[:, 0]
        )
        assert len(pixels) == 1
        assert sample.target[n] == target.flatten()[pixels[0]]
        known = raw.flatten()[pixels[0]]
        assert sample.raw[n] == (known if known < C else -1)


def collected_one(*arguments: object) -> PixelSample:
    sample = PixelSample(C)
    assert sample.add(*arguments)
    return sample


def test_every_labeled_pixel_of_a_small_image_is_drawn_once():
    key, maps, target, raw = image(1)
    (sample,) = collected_one(key, maps, target, raw)
    counts = np.bincount(target[target != 255].numpy(), minlength=C)
    assert np.bincount(sample.target.numpy(), minlength=C).tolist() == counts.tolist()


def test_pixels_of_a_large_image_are_drawn_uniformly():
    torch.manual_seed(0)
    probs = torch.rand(2, 200, 300).softmax(dim=0)
    target = torch.zeros(200, 300, dtype=torch.int64)
    target[:, :60] = 1  # a fifth
    sample = PixelSample(2)
    for index in range(8):
        sample.add(str(index), maps_of(probs), target, target)
    assert [len(s) for s in sample] == [3000] * 8
    share = torch.cat([s.target for s in sample]).float().mean()
    assert abs(share - 0.2) < 5 * np.sqrt(0.2 * 0.8 / 24000)
    assert len({tuple(s.target.tolist()) for s in sample}) == 8  # not the same pixels everywhere


def test_ignored_pixels_and_values_that_are_no_class_are_not_drawn():
    key, maps, target, raw = image(2)
    target[4:8] = -1
    sample = PixelSample(C)
    assert sample.add(key, maps, target, raw, ignore_index=1)
    (found,) = sample
    valid = (target >= 0) & (target < C) & (target != 1)
    assert len(found) == int(valid.sum())
    assert set(found.target.tolist()) == {0, 2, 3}


def test_an_image_without_labels_is_not_added():
    key, maps, target, raw = image(3)
    sample = PixelSample(C)
    assert not sample.add(key, maps, torch.full_like(target, 255), raw)
    assert len(sample) == 0


def test_memory_is_bounded_with_many_classes():
    classes = 150
    sample = PixelSample(classes, max_images=8, max_bytes=8 * classes * 4 * 2 * 500)
    probs = torch.rand(classes, 40, 40).softmax(dim=0)
    for index in range(12):
        sample.add(str(index), maps_of(probs), torch.zeros(40, 40).long(), probs.argmax(0))
    assert len(sample) == 8
    assert [len(s) for s in sample] == [500] * 8


def test_wants_is_whether_add_keeps_an_image():
    sample = PixelSample(C, max_images=3)
    for index in range(10):
        wanted = sample.wants(f"image {index}")
        assert sample.add(*image(index)) == wanted
    assert not any(sample.wants(s.key) for s in sample)


def test_folds_keep_groups_together_and_are_balanced():
    sample = PixelSample(C)
    for index in range(12):
        sample.add(*image(index), group=f"scene {index // 2}")
    images = list(sample)
    fold = assign_folds(images, 3)
    assert np.bincount(fold).tolist() == [4, 4, 4]
    of_group: dict[str, set[int]] = {}
    for s, own in zip(images, fold, strict=True):
        of_group.setdefault(s.group, set()).add(int(own))
    assert all(len(folds) == 1 for folds in of_group.values())
    backwards = assign_folds(images[::-1], 3)
    assert backwards[::-1].tolist() == fold.tolist()
