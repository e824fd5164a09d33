"""Every metric against a slow definition of its own, on random maps."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from metric_cases import (
    edge_counts,
    label_maps,
    loop_band,
    loop_iou,
    paper_boundary_iou,
    scored,
)
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
    MulticlassJaccardIndex,
)

from lightning_samrefine.metrics import (
    BorderCounts,
    Calibration,
    ImageTotals,
    KnownLabels,
    RegionCalibration,
    matrix_scores,
    paired_bootstrap,
)
from lightning_samrefine.metrics.boundary import (
    Borders,
    border_distances,
    boundary_f1,
    boundary_iou,
)
from lightning_samrefine.metrics.calibration import score_regions
from lightning_samrefine.metrics.changes import ChangedPixels
from lightning_samrefine.metrics.comparison import RefinementComparison
from lightning_samrefine.refine.results import Regions

pytestmark = pytest.mark.numerical

FEW = settings(max_examples=40, deadline=None)


def compared(case, **kwargs):
    num_classes, ignore_index, raw, refined, target = case
    comparison = RefinementComparison(num_classes, ignore_index, **kwargs)
    comparison.update(raw, refined, target)
    return comparison.result()


# --- one confusion matrix a side -----------------------------------------------------------------


@FEW
@given(label_maps(stray=False))
def test_scores_equal_torchmetrics(case):
    num_classes, ignore_index, raw, refined, target = case
    scores = compared(case).scores
    arguments = {"num_classes": num_classes, "ignore_index": ignore_index}
    valid = torch.from_numpy(scored(target, num_classes, ignore_index))
    for side, prediction in (("raw", raw), ("refined", refined)):
        found = scores[side]
        if not valid.any():
            for name in ("miou", "mdice", "class_acc", "pixel_acc", "fwiou"):
                assert found[name].isnan()
            continue
        for name, metric in (
            ("iou", MulticlassJaccardIndex),
            ("dice", MulticlassF1Score),
            ("recall", MulticlassAccuracy),
        ):
            expected = metric(average="none", **arguments)(prediction, target)
            # torchmetrics returns 0 for a class that does not occur, where there is no score.
            occurs = ~found[name].isnan()
            torch.testing.assert_close(
                found[name][occurs].float(), expected[occurs], atol=1e-6, rtol=0
            )
        accuracy = MulticlassAccuracy(average="micro", **arguments)(prediction, target)
        assert found["pixel_acc"].item() == pytest.approx(accuracy.item(), abs=1e-6)
        weighted = MulticlassJaccardIndex(average="weighted", **arguments)(prediction, target)
        assert found["fwiou"].item() == pytest.approx(weighted.item(), abs=1e-6)
        macro = MulticlassJaccardIndex(average="macro", **arguments)(prediction, target)
        assert found["miou"].item() == pytest.approx(macro.item(), abs=1e-6)


@FEW
@given(label_maps())
def test_scores_equal_loops_over_pixels(case):
    num_classes, ignore_index, raw, _, target = case
    found = compared(case).scores["raw"]
    valid = scored(target, num_classes, ignore_index)
    truth, guess = target.numpy()[valid], raw.numpy()[valid]
    iou = loop_iou(raw, target, num_classes, ignore_index)
    np.testing.assert_allclose(found["iou"].numpy(), iou, atol=1e-12, equal_nan=True)
    for c in range(num_classes):
        hits, true, called = (
            (truth[guess == c] == c).sum(),
            (truth == c).sum(),
            (guess == c).sum(),
        )
        if c == ignore_index:
            assert found["dice"][c].isnan()
            continue
        dice = 2 * hits / (true + called) if true + called else math.nan
        assert found["dice"][c].item() == pytest.approx(dice, nan_ok=True)
        recall = hits / true if true else math.nan
        assert found["recall"][c].item() == pytest.approx(recall, nan_ok=True)
    if len(truth):
        assert found["pixel_acc"].item() == pytest.approx((truth == guess).mean())
        shares = [(truth == c).mean() for c in range(num_classes)]
        weighted = sum(s * i for s, i in zip(shares, iou, strict=True) if s > 0)
        assert found["fwiou"].item() == pytest.approx(weighted)


@FEW
@given(label_maps(), st.integers(1, 12))
def test_every_trimap_equals_loops_over_windows(case, trimap_width):
    num_classes, ignore_index, raw, _, target = case
    result = compared(case, trimap_width=trimap_width)
    assert {1, 3, 5, 10, trimap_width} == set(result.widths)
    for width in result.widths:
        band = loop_band(target, width, num_classes, ignore_index)
        iou = loop_iou(raw, target, num_classes, ignore_index, where=band)
        expected = np.nanmean(iou) if not np.isnan(iou).all() else math.nan
        assert result.trimap_miou("raw", width) == pytest.approx(expected, nan_ok=True)


# --- borders -------------------------------------------------------------------------------------


@FEW
@given(label_maps(), st.integers(1, 6), st.integers(1, 4))
def test_boundary_iou_equals_the_papers_definition(case, iou_distance, f1_distance):
    num_classes, ignore_index, raw, _, target = case
    known = scored(target, num_classes, ignore_index)
    borders = [
        Borders(
            KnownLabels(labels, torch.from_numpy(known), num_classes), iou_distance, f1_distance
        )
        for labels in (raw, target)
    ]
    metric = BorderCounts(num_classes)
    metric.update(*borders)
    iou, f1 = boundary_iou(metric.compute()), boundary_f1(metric.compute())
    guess, truth = raw.numpy(), target.numpy()
    for c in range(num_classes):
        both, either = paper_boundary_iou(guess, truth, known, c, iou_distance)
        expected = both / either if either else math.nan
        assert iou[c].item() == pytest.approx(expected, nan_ok=True)

        found, right, true, met = edge_counts(guess, truth, known, c, f1_distance)
        if found == true == 0:
            assert f1[c].isnan()
            continue
        precision, recall = right / max(found, 1), met / max(true, 1)
        total = precision + recall
        expected = 2 * precision * recall / total if total else 0
        assert f1[c].item() == pytest.approx(expected)


def test_the_distances_are_shares_of_the_diagonal():
    assert border_distances(720, 960) == (24, 9)
    assert border_distances(1, 1) == (1, 1)


@FEW
@given(label_maps(stray=False))
def test_a_perfect_prediction_scores_one_whatever_is_ignored(case):
    num_classes, ignore_index, _, _, target = case
    clean = target.clone()
    clean[~torch.from_numpy(scored(target, num_classes, ignore_index))] = num_classes - 1
    result = compared((num_classes, ignore_index, clean, clean, target))
    for name in ("boundary_iou", "boundary_f1", "iou", "dice"):
        values = result.scores["raw"][name]
        assert (values[~values.isnan()] == 1).all(), name


def test_a_class_that_is_ignored_is_in_no_mean():
    target = torch.zeros(12, 12, dtype=torch.int64)
    target[:6] = 1
    target[:, :2] = 2  # ignored
    raw = target.clone()
    raw[8:, 6:] = 2  # and predicted where it is not
    figures = compared((3, 2, raw, target, target))
    for name in ("boundary_iou", "boundary_f1", "iou", "dice", "recall"):
        assert figures.scores["raw"][name][2].isnan(), name
    assert figures.figures()["boundary_iou_refined"] == 1


def test_more_classes_than_a_word_and_a_byte_hold():
    generator = torch.Generator().manual_seed(0)
    for num_classes in (130, 300):
        coarse = torch.randint(0, num_classes, (2, 8, 8), generator=generator)
        guess, truth = coarse.repeat_interleave(5, 1).repeat_interleave(5, 2)
        guess[3:30] = truth[1:28]
        known = np.ones(truth.shape, bool)
        everywhere = torch.from_numpy(known)
        borders = [Borders(KnownLabels(m, everywhere, num_classes), 3, 2) for m in (guess, truth)]
        metric = BorderCounts(num_classes)
        metric.update(*borders)
        counts = metric.compute()
        for c in truth.unique().tolist():
            both, _ = paper_boundary_iou(guess.numpy(), truth.numpy(), known, c, 3)
            expected = edge_counts(guess.numpy(), truth.numpy(), known, c, 2)
            found, right, true, met = expected
            assert counts[:, c].tolist()[2:] == [both, true, met, found, right]


# --- changes -------------------------------------------------------------------------------------


@FEW
@given(label_maps())
def test_changes_equal_loops_over_pixels(case):
    num_classes, ignore_index, raw, refined, target = case
    expected = np.zeros((3, num_classes), int)
    for (y, x), known in np.ndenumerate(scored(target, num_classes, ignore_index)):
        before, after, truth = int(raw[y, x]), int(refined[y, x]), int(target[y, x])
        if known and before != after:
            kind = 0 if after == truth else 1 if before == truth else 2
            expected[kind, truth] += 1
    result = compared(case)
    np.testing.assert_array_equal(result.changes.numpy(), expected)
    figures = result.figures()
    assert figures["refine_fixed_px"] == expected[0].sum()
    assert figures["refine_broken_px"] == expected[1].sum()
    ratio = expected[0].sum() / max(expected[1].sum(), 1)
    assert figures["refine_fixed_broken_ratio"] == ratio


def test_changes_belong_to_the_region_that_claimed_them():
    raw = torch.zeros(6, 8, dtype=torch.int64)
    refined, target = raw.clone(), raw.clone()
    refined[1:3, 1:4] = 1
    target[1:3, 1:3] = 1
    refined[4, 6] = 2
    target[4, 6] = 1
    target[0] = 9  # not scored
    refined[0, 2] = 1
    changes = ChangedPixels(raw, refined, target, target < 3)
    windows = torch.tensor([[0.0, 0, 8, 6], [0, 0, 3, 2], [5, 3, 8, 6], [0, 0, 8, 6]])
    found = changes.by_region(windows, torch.tensor([1, 1, 2, 0]))
    assert found.tolist() == [[4, 2, 0], [2, 0, 0], [0, 0, 1], [0, 0, 0]]


# --- images: bootstrap ---------------------------------------------------------------------------


def matrices(images, num_classes, seed):
    """Two sides of the same images: in each row the same pixels, called differently."""
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 50, (images, num_classes, num_classes + 1))
    raw[rng.random(images) < 0.2] = 0
    refined = rng.permuted(raw, axis=2)
    return raw, refined


def miou(matrix):
    num_classes = len(matrix)
    hits = np.diag(matrix)
    union = matrix.sum(1) + matrix[:, :num_classes].sum(0) - hits
    return (hits[union > 0] / union[union > 0]).mean() if (union > 0).any() else math.nan


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 12), st.integers(2, 5), st.integers(0, 99))
def test_the_bootstrap_equals_a_loop_over_resamples(images, num_classes, seed):
    raw, refined = matrices(images, num_classes, seed)
    interval = paired_bootstrap(raw, refined, resamples=50, seed=seed)
    rng = np.random.default_rng(seed)
    gains = []
    for drawn in rng.integers(images, size=(50, images)):
        gains.append(miou(refined[drawn].sum(0)) - miou(raw[drawn].sum(0)))
    gains = np.array(gains)[~np.isnan(gains)]
    low, high = np.quantile(gains, [0.025, 0.975]) if len(gains) else (math.nan, math.nan)
    assert interval.low == pytest.approx(low, abs=1e-12, nan_ok=True)
    assert interval.high == pytest.approx(high, abs=1e-12, nan_ok=True)
    gain = miou(refined.sum(0)) - miou(raw.sum(0))
    assert interval.gain == pytest.approx(gain, abs=1e-12, nan_ok=True)
    assert interval.images == images


def test_the_interval_covers_the_gain_of_the_population():
    """Of 200 samples from one population, about 95 in 100 intervals hold the true gain."""
    rng = np.random.default_rng(0)
    right = rng.uniform(0.4, 0.9, 4000)
    better = np.clip(right + rng.normal(0.01, 0.1, 4000), 0, 1)

    def images(share):
        hits = np.round(share * 1000).astype(int)
        wrong = 1000 - hits
        return np.stack([np.stack([hits, wrong], 1), np.stack([wrong, hits], 1)], 1)

    raw, refined = images(right), images(better)
    truth = miou(refined.sum(0)) - miou(raw.sum(0))
    inside = 0
    for seed in range(200):
        chosen = rng.integers(4000, size=60)
        interval = paired_bootstrap(raw[chosen], refined[chosen], resamples=300, seed=seed)
        inside += interval.low <= truth <= interval.high
    assert 0.90 <= inside / 200 <= 0.99


def test_noise_is_called_noise():
    raw, shuffled = matrices(30, 4, 0)
    assert paired_bootstrap(raw, raw).is_noise
    assert paired_bootstrap(raw, shuffled).is_noise
    right = np.eye(4, 5, dtype=int) * raw.sum(axis=2)[:, :, None]
    assert not paired_bootstrap(raw, right).is_noise
    assert paired_bootstrap(raw, right).low > 0


def test_the_bootstrap_refuses_what_it_cannot_resample():
    good, _ = matrices(3, 4, 0)
    with pytest.raises(ValueError, match=r"raw must have shape \(N, C, C\).*got \(4, 5\)"):
        paired_bootstrap(good[0], good[0])
    with pytest.raises(ValueError, match=r"refined must have raw's .*got \(2, 4, 5\)"):
        paired_bootstrap(good, good[:2])
    with pytest.raises(ValueError, match=r"refined must be .* got other sums of rows than raw's"):
        paired_bootstrap(good, good + 1)
    with pytest.raises(ValueError, match="totals must have at least one image"):
        paired_bootstrap(good[:0], good[:0])
    with pytest.raises(ValueError, match=r"confidence must be .*, got 95"):
        paired_bootstrap(good, good, confidence=95)
    with pytest.raises(ValueError, match=r"resamples must be .*, got 0"):
        paired_bootstrap(good, good, resamples=0)


@FEW
@given(st.lists(label_maps(largest=6), min_size=1, max_size=4), st.randoms())
def test_image_totals_do_not_depend_on_the_order_of_images(cases, random):
    num_classes = 6
    matrix = MulticlassConfusionMatrix(num_classes + 1)
    computed = []
    for _, _, *maps in cases:
        raw, refined, target = (
            torch.where(labels < 0, 255, labels).clamp(max=6) for labels in maps
        )
        computed.append([matrix(one, target)[:num_classes] for one in (raw, refined)])
    shuffled = random.sample(computed, len(computed))
    totals = []
    for order in (computed, shuffled):
        metric = ImageTotals(num_classes)
        for pair in order:
            metric.update(*pair)
        totals.append(metric.compute())
    np.testing.assert_array_equal(*totals)
    assert len(totals[0]) == len(cases)
    summed = totals[0].sum(axis=0)
    raw = sum(pair[0] for pair in computed)
    refined = sum(pair[1] for pair in computed)
    np.testing.assert_array_equal(summed[0], raw.sum(dim=1))
    np.testing.assert_array_equal(summed[1], raw.diagonal())
    np.testing.assert_array_equal(summed[2], raw[:, :num_classes].sum(dim=0))
    np.testing.assert_array_equal(summed[3], refined.diagonal())
    np.testing.assert_array_equal(summed[4], refined[:, :num_classes].sum(dim=0))


def test_many_images_are_kept_in_few_tensors():
    metric = ImageTotals(19)
    matrix = torch.zeros(19, 20, dtype=torch.int64)
    for index in range(1000):
        matrix[index % 19, index % 7] += 1
        metric.update(matrix, matrix)
    assert len(metric.rows) <= 256
    assert sum(rows.numel() for rows in metric.rows) * 4 < 1000 * 19 * 7 * 4 + 1
    assert len(metric.compute()) == 1000


# --- regions: calibration ------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 60), st.integers(0, 999))
def test_calibration_equals_its_definitions(regions, seed):
    rng = np.random.default_rng(seed)
    pred = rng.integers(0, 4097, regions) / 4096  # what the metric's ranks tell apart
    true = np.round(rng.random(regions), 6)
    better = rng.random(regions) < pred
    metric = RegionCalibration()
    for part in np.array_split(np.arange(regions), 3):
        metric.update(*(torch.from_numpy(values[part]) for values in (pred, true, better)))
    found = Calibration.of(**metric.compute())
    assert (found.regions, found.better) == (regions, better.sum())
    ece = 0.0
    for index, (low, high) in enumerate(pairwise(np.arange(11) / 10)):
        inside = (pred >= low) & ((pred < high) | (high == 1))
        assert found.bin_regions[index] == inside.sum()
        if inside.any():
            assert found.bin_pred_iou[index].item() == pytest.approx(pred[inside].mean(), abs=1e-6)
            assert found.bin_true_iou[index].item() == pytest.approx(true[inside].mean(), abs=1e-6)
            ece += abs(pred[inside].mean() - true[inside].mean()) * inside.mean()
    assert found.ece == pytest.approx(ece if regions else math.nan, abs=1e-5, nan_ok=True)
    rank = np.minimum(pred, 4095 / 4096)
    pairs = [(a > b) + 0.5 * (a == b) for a in rank[better] for b in rank[~better]]
    expected = np.mean(pairs) if pairs else math.nan
    assert found.auroc == pytest.approx(expected, nan_ok=True)


def test_predicted_ious_outside_their_range_are_clipped():
    metric = RegionCalibration()
    metric.update(torch.tensor([1.2, -0.1]), torch.tensor([1.0, 0.0]), torch.tensor([True, False]))
    found = Calibration.of(**metric.compute())
    assert (found.ece, found.auroc) == (0, 1)


@settings(max_examples=30, deadline=None)
@given(label_maps(largest=12), st.integers(1, 4), st.integers(0, 999))
def test_region_scores_equal_sets_of_pixels(case, count, seed):
    num_classes, ignore_index, raw, _, target = case
    height, width = target.shape
    rng = np.random.default_rng(seed)
    corners = np.sort(rng.integers(0, [[[height + 1]], [[width + 1]]], (2, count, 2)), axis=2)
    (y0, y1), (x0, x1) = corners.transpose(0, 2, 1)
    masks = torch.from_numpy(rng.random((count, height, width)) < 0.4)
    regions = Regions(
        classes=torch.from_numpy(rng.integers(0, num_classes, count)),
        boxes=torch.from_numpy(np.stack([x0, y0, x1, y1], 1)).float(),
        extents=torch.from_numpy(np.stack([x0, y0, x1, y1], 1)).float(),
        points=torch.zeros(count, 2),
        scores=torch.ones(count),
        pred_iou=torch.ones(count),
        accepted=torch.ones(count, dtype=torch.bool),
        masks=masks,
    )
    known = scored(target, num_classes, ignore_index)
    found = score_regions(regions, raw, target, torch.from_numpy(known))
    for n in range(count):
        c = int(regions.classes[n])
        box = {(y, x) for y in range(y0[n], y1[n]) for x in range(x0[n], x1[n])}
        every = {(int(y), int(x)) for y, x in np.argwhere(known)}
        truth = {at for at in every if target[at] == c}
        for name, pixels in (
            ("raw_iou", {at for at in every & box if raw[at] == c}),
            ("mask_iou", {at for at in every if masks[n][at]}),
        ):
            union = len(pixels | (truth & box))
            expected = len(pixels & truth) / union if union else math.nan
            assert getattr(found, name)[n].item() == pytest.approx(expected, nan_ok=True)
        rows, columns = np.nonzero(masks[n].numpy())
        window = found.windows[n].tolist()
        if len(rows):
            assert window == [columns.min() - 1, rows.min() - 1, columns.max() + 2, rows.max() + 2]
        else:
            assert window == [0, 0, 0, 0]


def test_scores_of_an_empty_matrix_are_nan():
    scores = matrix_scores(torch.zeros(3, 4, dtype=torch.int64))
    assert {"iou", "dice"} <= set(scores)
    for name, value in scores.items():
        assert value.numel() > 0, name
        assert value.isnan().all(), name


def test_a_whole_comparison_does_not_depend_on_batches():
    generator = torch.Generator().manual_seed(1)
    raw, refined, target = torch.randint(0, 4, (3, 5, 20, 24), generator=generator)
    together, apart = RefinementComparison(4, 0), RefinementComparison(4, 0)
    together.update(raw, refined, target)
    for index in reversed(range(5)):
        apart.update(raw[index], refined[index], target[index])
    assert together.compute() == apart.compute()
