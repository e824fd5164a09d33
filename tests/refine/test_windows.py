"""Windows of large images: how they cover and blend, and what a refinement of them must hold."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from random_predictions import blobs
from stub_sams import CountingSam
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_samrefine import RefineConfig, Refiner
from lightning_samrefine.metrics.calibration import score_regions
from lightning_samrefine.refine.cache.embedding_cache import EmbeddingCache
from lightning_samrefine.refine.fusion import strips as strips_module
from lightning_samrefine.refine.fusion.crf import REACH
from lightning_samrefine.refine.windows import (
    Window,
    WindowMaps,
    blend_weights,
    split_windows,
    window_side,
)

SIDE = 64  # of the random SAM's input
WINDOW = {"window": SIDE, "window_overlap": 0.25, "min_region_area": 4}
STEP = 48


def large_case(hw=(160, 200), classes=4, seed=0, cells=(20, 25)):
    """Return an image and probabilities with regions of all sizes."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (3, *hw), dtype=torch.uint8, generator=generator)
    noise = torch.randn(1, classes, *cells, generator=generator) * 4
    return image, F.interpolate(noise, hw, mode="bilinear")[0].softmax(dim=0)


@given(
    st.tuples(st.integers(1, 300), st.integers(1, 300)),
    st.integers(32, 128),
    st.floats(0, 0.5),
)
def test_windows_cover_the_image_and_their_weights_sum_to_1(hw, side, overlap):
    windows = split_windows(hw, side, overlap)
    total = np.zeros(hw)
    weights = [
        blend_weights(length, sorted({own[axis] for own in windows}), windows[0][axis + 2], pixels)
        for axis, length in enumerate(hw)
        for pixels in [round(side * overlap)]
    ]
    for own in windows:
        assert (own.height, own.width) == (min(side, hw[0]), min(side, hw[1]))
        assert own.top >= 0
        assert own.top + own.height <= hw[0]
        assert own.left + own.width <= hw[1]
        total[own.rows, own.columns] += np.outer(weights[0][own.top], weights[1][own.left])
    np.testing.assert_allclose(total, 1, atol=1e-5)
    assert len(set(windows)) == len(windows)


def test_weights_are_raised_cosines_over_the_overlap():
    weights = blend_weights(112, [0, 48], 64, 16)
    ramp = np.sin(np.pi / 2 * (np.arange(16) + 0.5) / 16) ** 2
    np.testing.assert_allclose(weights[48][:16], ramp, atol=1e-6)
    np.testing.assert_allclose(weights[0][48:], 1 - ramp, atol=1e-6)
    assert (weights[0][:48] == 1).all()
    assert (weights[48][16:] == 1).all()


@pytest.mark.parametrize("rows", [slice(0, 40), slice(0, 7), slice(13, 29), slice(39, 40)])
def test_rows_of_a_map_are_those_of_the_whole_map(rows):
    maps = torch.rand(3, 7, 9)
    expected = F.interpolate(maps[None], (40, 50), mode="bilinear")[0][1:, rows]
    found = WindowMaps.whole(maps, (40, 50)).rows(rows, slice(1, 3))
    torch.testing.assert_close(found, expected)


def test_maps_that_agree_have_no_seams():
    """Where all windows show one plane, so does their blend."""
    hw = (100, 130)
    plane = (torch.arange(hw[0])[:, None] + 2 * torch.arange(hw[1])[None]).float()[None]
    windows = split_windows(hw, 48, 0.25)
    maps = WindowMaps(hw, windows, lambda index: windows[index].of(plane), 12)
    torch.testing.assert_close(maps.rows(slice(0, 100)), plane)
    torch.testing.assert_close(maps.rows(slice(31, 64)), plane[:, 31:64])
    other = WindowMaps.whole(torch.full((1, 1, 1), 150.0), hw)
    together = replace(maps, other=other).rows(slice(0, 100))
    torch.testing.assert_close(together, plane.clamp(min=150))


def test_which_images_have_windows(random_sam):
    auto = RefineConfig.preset("fast", window="auto")
    assert window_side(auto, random_sam, (96, 50)) is None
    assert window_side(auto, random_sam, (50, 97)) == SIDE
    given = RefineConfig.preset("fast", window=80)
    assert window_side(given, random_sam, (80, 80)) is None
    assert window_side(given, random_sam, (81, 10)) == 80
    assert window_side(RefineConfig.preset("fast"), random_sam, (900, 900)) is None


@pytest.mark.parametrize("preset", ["fast", "default", "auto"])
def test_an_image_within_the_window_is_refined_as_a_whole(random_sam, preset):
    image, probs = blobs()
    whole = Refiner(random_sam, RefineConfig.preset(preset), "32")(image, probs)
    config = RefineConfig.preset(preset, window=60)
    found = Refiner(random_sam, config, "32")(image, probs)
    assert torch.equal(found.labels, whole.labels)
    assert torch.equal(found.probs, whole.probs)
    assert torch.equal(found.regions.masks, whole.regions.masks)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["fast", "default"])
def test_a_shifted_crop_differs_within_the_overlaps_reach_only(random_sam, preset):
    """A crop at a multiple of the step has windows of the image; the first ones lose a neighbor."""
    image, probs = large_case(hw=(160, 208), classes=6, cells=(40, 52))
    # Colors are those of the whole image, and a crop has others.
    config = RefineConfig.preset(preset, color_weight=0.0, **WINDOW)
    refiner = Refiner(random_sam, config, "32")
    predictions = next(refiner.predict([image], [probs]))
    assert len(predictions.looks) == predictions.windows  # no region is larger than a window
    out = refiner.fuse(predictions)
    for top, left in ((STEP, 0), (0, STEP), (STEP, 2 * STEP)):
        own = refiner(image[:, top:, left:], probs[:, top:, left:])
        # Where only windows of the crop had a say: beyond the first windows' overlap.
        reach = SIDE - STEP + REACH
        rows = slice(reach if top else 0, None)
        columns = slice(reach if left else 0, None)
        expected = out.probs[:, top:, left:][:, rows, columns]
        torch.testing.assert_close(own.probs[:, rows, columns], expected, atol=1e-5, rtol=1e-4)
        same = own.labels[rows, columns] == out.labels[top:, left:][rows, columns]
        assert same.float().mean() > 0.9999
        assert not torch.equal(own.probs, out.probs[:, top:, left:])


@pytest.mark.parametrize("preset", ["fast", "default", "auto"])
def test_no_seams_at_the_windows_edges(random_sam, preset):
    """Probabilities jump no more at the edges of windows than elsewhere."""
    image, probs = large_case()
    image = torch.full_like(image, 90)
    config = RefineConfig.preset(preset, **WINDOW)
    out = Refiner(random_sam, config, "32")(image, probs)
    jumps = (out.probs[:, :, 1:] - out.probs[:, :, :-1]).abs().amax(dim=0).mean(dim=0)
    edges = sorted({own.left for own in split_windows((160, 200), SIDE, 0.25)} - {0})
    ends = [left - STEP + SIDE for left in edges]
    at_edges = jumps[[x - 1 for x in (*edges, *ends) if x < 200]]
    assert at_edges.mean() < 1.5 * jumps.mean()


def test_a_region_larger_than_a_window_is_prompted_in_the_whole_image(random_sam):
    image, probs = large_case()
    band = torch.zeros(160, 200, dtype=torch.bool)
    band[70:90] = True  # 200 pixels wide
    probs = torch.where(band, torch.tensor([0.01, 0.01, 0.01, 0.97])[:, None, None], probs)
    probs[3].masked_fill_(~band, 0)
    probs /= probs.sum(dim=0)
    refiner = Refiner(random_sam, RefineConfig.preset("fast", **WINDOW), "32")
    predictions = next(refiner.predict([image], [probs]))
    assert len(predictions.looks) == predictions.windows + 1
    look = predictions.looks[-1]
    assert look.in_image == Window(0, 0, 160, 200)
    assert look.raw.image_hw == (51, 64)
    out = refiner.fuse(predictions)
    last = out.regions.windows[-1].table
    assert 3 in last.classes
    x0, y0, x1, y1 = last.extents[last.classes == 3][0].tolist()
    # To a pixel of the grid at that resolution: 2 · 200 / 64.
    assert (x0, x1) == (0, 200)
    assert y0 == pytest.approx(70, abs=6.3)
    assert y1 == pytest.approx(90, abs=6.3)
    sizes = last.extents[:, 2:] - last.extents[:, :2]
    assert (sizes > SIDE - 6.3).any(dim=1).all()


@pytest.mark.parametrize("preset", ["fast", "default", "auto"])
def test_regions_are_in_the_images_pixels(random_sam, preset):
    image, probs = large_case(cells=(6, 8))  # some regions are larger than a window
    refiner = Refiner(random_sam, RefineConfig.preset(preset, **WINDOW), "32")
    predictions = next(refiner.predict([image], [probs]))
    out = refiner.fuse(predictions)
    regions, labels = out.regions, probs.argmax(dim=0)
    assert len(regions) == len(predictions.pred_iou) == len(predictions.classes)
    assert regions.masks is None
    assert int(regions.accepted.sum()) == len(out.pred_iou)
    torch.testing.assert_close(regions.pred_iou, predictions.pred_iou)
    of_windows = sum(len(look.regions) for look in predictions.looks[: predictions.windows])
    assert len(predictions.looks) == predictions.windows + 1
    for index, region in enumerate(regions):
        (x, y), (x0, y0, x1, y1) = region.point, regions.extents[index].tolist()
        assert x0 <= x < x1 <= 200
        assert y0 <= y < y1 <= 160
        if index < of_windows:  # others are found at a lower resolution
            assert labels[int(y), int(x)] == region.class_index


def test_regions_are_measured_in_their_windows(random_sam):
    image, probs = large_case()
    out = Refiner(random_sam, RefineConfig.preset("fast", **WINDOW), "32")(image, probs)
    raw = probs.argmax(dim=0)
    target = large_case(seed=1)[1].argmax(dim=0)
    valid = torch.ones_like(target, dtype=torch.bool)
    found = score_regions(out.regions, raw, target, valid)
    assert len(found.raw_iou) == len(found.mask_iou) == len(found.windows) == len(out.regions)
    index = 0
    for own in out.regions.windows:
        masks = own.regions.masks
        for position, c in enumerate(own.table.classes.tolist()):
            height, width = masks.shape[1:]
            y = ((np.arange(height) + 0.5) * own.window.height / height).astype(int)
            x = ((np.arange(width) + 0.5) * own.window.width / width).astype(int)
            truth = own.window.of(target).numpy()[y][:, x] == c
            x0, y0, x1, y1 = own.table.extents[position].tolist()
            box = np.outer(
                ((y + 0.5) >= y0) & ((y + 0.5) < y1), ((x + 0.5) >= x0) & ((x + 0.5) < x1)
            )
            mask = masks[position].numpy()
            union = (mask | (truth & box)).sum()
            expected = (mask & truth).sum() / union if union else math.nan
            np.testing.assert_allclose(found.mask_iou[index], expected)
            if mask.any():
                rows = np.flatnonzero(mask.any(axis=1)) * own.window.height / height
                top, bottom = found.windows[index, [1, 3]].tolist()
                assert top <= own.window.top + rows[0] <= own.window.top + rows[-1] <= bottom
            index += 1


@pytest.mark.parametrize("preset", ["fast", "default", "auto"])
def test_strips_change_nothing(random_sam, preset, monkeypatch):
    image, probs = large_case()
    refiner = Refiner(random_sam, RefineConfig.preset(preset, **WINDOW), "32")
    predictions = next(refiner.predict([image], [probs]))
    whole = refiner.fuse(predictions)
    monkeypatch.setattr(strips_module, "_BYTES", 4 * 4 * 200 * 11)
    assert len(list(strips_module.strips(probs))) == 15
    found = refiner.fuse(predictions)
    torch.testing.assert_close(found.probs, whole.probs, atol=1e-5, rtol=1e-4)
    assert (found.labels == whole.labels).float().mean() > 0.9999
    assert torch.equal(found.covered, whole.covered)
    alone = refiner.fuse(predictions, with_probs=False)
    assert alone.probs is None
    assert torch.equal(alone.labels, found.labels)


@pytest.mark.slow
def test_every_window_is_kept_by_the_cache():
    image, probs = large_case(classes=6, cells=(40, 52))  # no region larger than a window
    sam, cache = CountingSam(), EmbeddingCache("memory")
    config = RefineConfig.preset("default", **WINDOW)
    refiner = Refiner(sam, config, "32", cache)
    hashed = []
    digests = cache.digests
    cache.digests = lambda images: hashed.extend(one.shape for one in images) or digests(images)
    first = refiner(image, probs)
    windows = split_windows((160, 200), SIDE, 0.25)
    assert sam.embedded == len(windows)
    assert hashed == [image.shape]
    second = refiner(image, probs)
    assert sam.embedded == len(windows)
    assert torch.equal(first.labels, second.labels)
    uncached = Refiner(CountingSam(), config, "32")(image, probs)
    assert torch.equal(first.probs, uncached.probs)
    # Other windows of the image, and the windows of another image, are encoded anew.
    Refiner(sam, replace(config, window=72), "32", cache)(image, probs)
    others = split_windows((160, 200), 72, 0.25)
    assert sam.embedded == len(windows) + len(others)
    refiner(image.flip(2), probs)
    assert sam.embedded == 2 * len(windows) + len(others)


def test_frozen_classes_keep_their_pixels(random_sam):
    image, probs = large_case()
    raw = probs.argmax(dim=0)
    config = RefineConfig.preset("fast", classes=(0, 1), **WINDOW)
    out = Refiner(random_sam, config, "32")(image, probs)
    changed = out.labels != raw
    assert changed.any()
    assert (raw[changed] <= 1).all()
    assert (out.labels[changed] <= 1).all()
    assert set(out.regions.classes.tolist()) == {0, 1}


class LargestTensor(TorchDispatchMode):
    """Measures the largest tensor that an operation allocates."""

    def __init__(self, known):
        super().__init__()
        self.known = {one.untyped_storage().data_ptr() for one in known}
        self.nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else [out]:
            if isinstance(one, torch.Tensor):
                storage = one.untyped_storage()
                if storage.data_ptr() not in self.known:
                    self.nbytes = max(self.nbytes, storage.nbytes())
        return out


@pytest.mark.slow
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("preset", ["fast", "default"])
def test_nothing_as_large_as_the_probabilities_is_allocated(random_sam, monkeypatch, preset, given):
    """The labels are the largest result: 8 bytes a pixel, where the inputs have 4 a class."""
    monkeypatch.setattr(strips_module, "_BYTES", 2**18)
    classes, hw = 16, (256, 160)
    image, probs = large_case(hw, classes, cells=(32, 20))
    labels = probs.argmax(dim=0) if given else None
    # The table of colors has a fixed size, which is large beside these images.
    config = RefineConfig.preset(preset, color_weight=0.0, **WINDOW)
    refiner = Refiner(random_sam, config, "32")
    predictions = next(refiner.predict([image], [probs], [labels] if given else None))
    assert "labels" not in vars(predictions.raw)  # the argmax of the whole image is not kept
    with LargestTensor([image, probs, *([labels] if given else [])]) as largest:
        refiner.fuse(predictions, with_probs=False)
    assert largest.nbytes <= max(8 * math.prod(hw), 2 * 2**18)
    assert largest.nbytes < probs.nbytes / 4


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"window": 31}, ValueError, "window must be an integer of at least 32 .*, got 31"),
        ({"window": "half"}, TypeError, "window must be .*'auto' or None, got 'half'"),
        ({"window": 512.0}, TypeError, "window must be .*, got 512.0"),
        ({"window": True}, TypeError, "window must be .*, got True"),
        ({"window_overlap": 0.6}, ValueError, r"window_overlap must be .*\[0, 0.5\], got 0.6"),
        ({"window_overlap": "a"}, TypeError, "window_overlap must be"),
    ],
)
def test_wrong_windows_are_refused(fields, error, message):
    with pytest.raises(error, match=message):
        RefineConfig.preset("fast", **fields)


def test_algorithm4_has_no_windows():
    with pytest.raises(ValueError, match="unsupported_weight must be above 0 with window"):
        RefineConfig.preset("algorithm4", window="auto")
