"""The comparison: what it counts, names and leaves out. Its metrics: `test_metrics.py`."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from metric_cases import label_maps, loop_band, loop_iou

from lightning_samrefine.metrics import class_iou, trimap_band
from lightning_samrefine.metrics.comparison import RefinementComparison
from lightning_samrefine.metrics.overlapping import OverlappingComparison
from lightning_samrefine.metrics.same_classes import different_classes

pytestmark = pytest.mark.numerical


@settings(max_examples=60, deadline=None)
@given(label_maps(), st.integers(1, 5))
def test_trimap_band_equals_loops_over_windows(case, width):
    num_classes, ignore_index, _, _, target = case
    band = trimap_band(target, width, num_classes, ignore_index)
    np.testing.assert_array_equal(band.numpy(), loop_band(target, width, num_classes, ignore_index))


def test_trimap_band_of_a_batch_is_that_of_its_images():
    target = torch.randint(0, 3, (4, 9, 11), generator=torch.Generator().manual_seed(0))
    band = trimap_band(target, 2, 3)
    for index in range(4):
        assert torch.equal(band[index], trimap_band(target[index], 2, 3))


def matrices(raw, refined, target, num_classes, ignore_index=None):
    """Return the confusion matrices of the whole image, raw and refined."""
    comparison = RefinementComparison(num_classes, ignore_index)
    comparison.update(raw, refined, target)
    found = comparison.result().matrices
    return [found[side][-1] for side in ("raw", "refined")]


def test_a_prediction_outside_the_classes_is_wrong_for_the_target_only():
    prediction, target = torch.tensor([[[0, 255, -1, 7]], [[0, 0, 1, 1]]])
    for matrix in matrices(prediction, prediction, target, 3, 255):
        assert matrix.tolist() == [[1, 0, 0, 1], [0, 0, 0, 2], [0, 0, 0, 0]]
        iou = class_iou(matrix, 255)
        assert iou[:2].tolist() == [0.5, 0.0]
        assert iou[2].isnan()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_every_integer_type_counts_alike(dtype):
    generator = torch.Generator().manual_seed(0)
    maps = torch.randint(0, 5, (3, 3, 8, 8), generator=generator)
    maps[2, 0, :4] = 255
    found, expected = matrices(*maps.to(dtype), 5, 255), matrices(*maps, 5, 255)
    assert all(map(torch.equal, found, expected))


def test_counting_is_legal_and_exact_under_deterministic_algorithms():
    maps = torch.randint(0, 4, (3, 50, 50), generator=torch.Generator().manual_seed(0))
    expected = matrices(*maps, 4)
    torch.use_deterministic_algorithms(True)
    try:
        found = matrices(*maps, 4)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, found, expected))
    assert [int(matrix.sum()) for matrix in found] == [2500, 2500]


@pytest.mark.parametrize("name", ["raw", "refined", "control"])
def test_shapes_that_differ_are_refused(name):
    maps = {"raw": torch.zeros(3, 2).long(), "refined": torch.zeros(3, 2).long()}
    maps[name] = torch.zeros(2, 3).long()
    with pytest.raises(ValueError, match=rf"{name} must have .*\(3, 2\), got shape \(2, 3\)"):
        RefinementComparison(3).update(**maps, target=torch.zeros(3, 2).long())


def test_the_control_is_counted_like_a_prediction():
    raw, control, target = torch.randint(
        0, 4, (3, 9, 7), generator=torch.Generator().manual_seed(0)
    )
    comparison = RefinementComparison(3, ignore_index=2)
    comparison.update(raw, raw, target, control=control)
    expected, _ = matrices(control, raw, target, 3, ignore_index=2)
    assert torch.equal(comparison.result().control, expected)


def test_batches_and_images_of_different_sizes_add_up():
    generator = torch.Generator().manual_seed(1)
    maps = [torch.randint(0, 4, (3, 7 + i, 9), generator=generator) for i in range(3)]
    together = RefinementComparison(4, trimap_width=2)
    for raw, refined, target in maps:
        together.update(raw, refined, target)
    figures = together.compute()
    raw, refined, target = (
        torch.cat([stack[i].flatten() for stack in maps]).numpy() for i in range(3)
    )
    band = np.concatenate([loop_band(stack[2].numpy(), 2, 4, None).ravel() for stack in maps])
    for side, prediction in (("raw", raw), ("refined", refined)):
        iou = loop_iou(prediction, target, 4, None)
        assert figures[f"miou_{side}"] == pytest.approx(np.nanmean(iou), abs=1e-12)
        assert [figures[f"iou_{side}/{c}"] for c in range(4)] == pytest.approx(iou.tolist())
        in_band = loop_iou(prediction, target, 4, None, where=band)
        assert figures[f"trimap_miou_{side}"] == pytest.approx(np.nanmean(in_band), abs=1e-12)
    assert figures["miou_gain"] == figures["miou_refined"] - figures["miou_raw"]
    assert figures["trimap_miou_gain"] == pytest.approx(
        figures["trimap_miou_refined"] - figures["trimap_miou_raw"]
    )


def test_figures_are_named_by_class_and_absent_classes_left_out():
    comparison = RefinementComparison(3, 255, class_names=["sky", "road", "pole"])
    target = torch.tensor([[0, 0, 1, 255]])
    comparison.update(torch.tensor([[0, 0, 0, 2]]), torch.tensor([[0, 0, 1, 2]]), target)
    figures = comparison.compute()
    per_class = {name for name in figures if name.startswith("iou_")}
    assert per_class == {"iou_raw/sky", "iou_raw/road", "iou_refined/sky", "iou_refined/road"}
    assert figures["iou_raw/sky"] == pytest.approx(2 / 3)
    assert figures["iou_raw/road"] == 0.0
    assert figures["miou_raw"] == pytest.approx(1 / 3)
    assert figures["miou_refined"] == 1.0


def test_counts_become_rates():
    comparison = RefinementComparison(2)
    comparison.update(*torch.zeros(3, 2, 2).long())
    comparison.counts.update(images=3, seconds=0.6)
    comparison.counts.update(regions=5, accepted=4)
    comparison.counts.update(regions=3, accepted=2)
    comparison.counts.update(failed=1)
    figures = comparison.compute()
    assert figures["measured_images"] == 1.0
    assert figures["refine_accept_rate"] == 0.75
    assert figures["refine_regions_per_image"] == 4.0
    assert figures["refine_ms_per_image"] == pytest.approx(200)
    assert figures["refine_failed_images"] == 1.0


def test_without_a_single_valid_pixel_no_mean_is_invented():
    comparison = RefinementComparison(3, 255)
    comparison.update(*torch.full((3, 4, 4), 255))
    comparison.counts.update(images=1, failed=1)
    figures = comparison.compute()
    assert not any("miou" in name for name in figures)
    assert all(math.isfinite(value) for value in figures.values())
    assert figures["refine_accept_rate"] == 0.0


def test_reset_forgets_everything():
    comparison = RefinementComparison(3)
    comparison.update(*torch.randint(0, 3, (3, 5, 5)))
    comparison.counts.update(images=1, regions=2)
    comparison.reset()
    comparison.update(*torch.zeros(3, 5, 5).long())
    comparison.counts.update(images=1)
    figures = comparison.compute()
    assert figures["miou_raw"] == 1.0
    assert figures["refine_regions_per_image"] == 0.0


def test_bad_arguments_name_themselves():
    with pytest.raises(ValueError, match=r"class_names must be 3 names, got 2"):
        RefinementComparison(3, class_names=["a", "b"])
    with pytest.raises(ValueError, match="trimap_width must be at least 1, got 0"):
        RefinementComparison(3, trimap_width=0)


@settings(max_examples=60, deadline=None)
@given(label_maps())
def test_the_gain_over_the_classes_of_both_means(case):
    num_classes, ignore_index, raw, refined, target = case
    comparison = RefinementComparison(num_classes, ignore_index)
    comparison.update(raw, refined, target)
    result = comparison.result()
    sides = [loop_iou(labels, target, num_classes, ignore_index) for labels in (raw, refined)]
    both = ~np.isnan(sides[0]) & ~np.isnan(sides[1])
    expected = sides[1][both].mean() - sides[0][both].mean() if both.any() else math.nan
    figures = result.figures()
    assert figures.get("miou_gain_same_classes", math.nan) == pytest.approx(
        expected, abs=1e-12, nan_ok=True
    )
    if np.array_equal(np.isnan(sides[0]), np.isnan(sides[1])):
        assert figures.get("miou_gain_same_classes") == figures.get("miou_gain")
        assert different_classes(result) is None


def test_classes_of_one_mean_alone_are_named():
    comparison = RefinementComparison(5, class_names=["sky", "road", "book", "face", "car"])
    target = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]])
    raw = torch.tensor([[0, 0, 2, 2, 1, 1, 1, 0]])
    refined = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 3]])
    comparison.update(raw, refined, target)
    # By hand: sky 2/5 → 1, road 3/4 → 3/4, and a third class of 0 on each side.
    assert comparison.compute()["miou_gain_same_classes"] == pytest.approx(0.3)
    assert comparison.compute()["miou_gain"] == pytest.approx(0.2)
    assert different_classes(comparison.result()) == (
        "a class in no target counts, with an IoU of 0, in the mIoU of a prediction that has it "
        "(raw: book; refined: face); over the 2 classes of both means the gain is +30.00 points, "
        "not +20.00"
    )


def test_classes_that_leave_the_gain_as_it_is_are_not_named():
    """As those of a network before its training, which has no class right."""
    comparison = RefinementComparison(3)
    target = torch.zeros(1, 1, 4, dtype=torch.long)
    comparison.update(target + 2, target + 1, target)
    assert comparison.compute()["miou_gain_same_classes"] == comparison.compute()["miou_gain"] == 0
    assert different_classes(comparison.result()) is None


@settings(max_examples=60, deadline=None)
@given(label_maps())
def test_an_images_miou_is_that_of_its_targets_classes(case):
    num_classes, ignore_index, raw, refined, target = case
    target = target.where(target != 1, 0)  # predictions often hold a class that it lacks
    comparison = RefinementComparison(num_classes, ignore_index)
    (image,) = comparison.update(raw, refined, target)
    present = np.isin(np.arange(num_classes), target.numpy())
    expected = []
    for labels in (raw, refined):
        iou = loop_iou(labels, target, num_classes, ignore_index)[present]
        expected.append(np.nanmean(iou) if not np.isnan(iou).all() else math.nan)
    assert image.mious(ignore_index) == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_stray_pixels_that_vanish_are_no_gain_of_75_points():
    target = torch.zeros(100, 100).long()
    raw = target.clone()
    raw[0, :31] = torch.arange(31) % 3 + 1
    (image,) = RefinementComparison(4).update(raw, target, target)
    assert image.mious(None) == (1 - 31 / 10_000, 1.0)


@pytest.mark.parametrize("comparison", [RefinementComparison, OverlappingComparison])
@pytest.mark.filterwarnings("error")
def test_without_an_image_nothing_is_counted_and_no_metric_warns(comparison):
    result = comparison(3).result()
    assert result.totals.shape == (0, 5, 3)
    assert not result.control.any()
