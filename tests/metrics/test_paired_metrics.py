"""A user's metrics on raw and refined label maps, compared with torchmetrics by itself."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import (
    BinaryAUROC,
    BinaryCalibrationError,
    MulticlassAccuracy,
    MulticlassConfusionMatrix,
    MulticlassJaccardIndex,
    MultilabelJaccardIndex,
)
from torchmetrics.wrappers import ClasswiseWrapper

from lightning_samrefine.metrics.paired_metrics import PairedMetrics, parse_metrics

segmentation = pytest.importorskip("torchmetrics.segmentation")
if not hasattr(segmentation, "HausdorffDistance"):
    pytest.skip("this torchmetrics has no HausdorffDistance", allow_module_level=True)
DiceScore, HausdorffDistance = segmentation.DiceScore, segmentation.HausdorffDistance
MeanIoU = segmentation.MeanIoU

CLASSES = 3
NAMES = ["sky", "road", "pole"]


def images(count=4, ignored=True):
    generator = torch.Generator().manual_seed(1)
    maps = torch.randint(0, CLASSES, (count, 3, 12, 14), generator=generator)
    maps[:, 1] = torch.where(
        torch.rand(maps[:, 1].shape, generator=generator) < 0.4, *maps[:, 1:].unbind(1)
    )
    if ignored:
        maps[:, 2, :2] = 255
    return maps  # raw, refined, target


def paired(metrics, maps):
    both = PairedMetrics(parse_metrics(metrics), NAMES)
    for raw, refined, target in maps:
        both.update(raw, refined, target)
    return both.figures()


def alone(metric, maps, side):
    """Return what torchmetrics computes of the whole data set."""
    metric = metric.clone()
    for one in maps:
        metric.update(one[side][None], one[2][None])
    return metric.compute()


def test_a_metric_has_its_class_name_and_its_own_ignore_rule():
    metric = MulticlassJaccardIndex(CLASSES, ignore_index=255)
    raw, refined = (alone(metric, images(), side).item() for side in (0, 1))
    assert raw != refined
    assert paired(metric, images()) == pytest.approx(
        {
            "MulticlassJaccardIndex_raw": raw,
            "MulticlassJaccardIndex_refined": refined,
            "MulticlassJaccardIndex_gain": refined - raw,
        }
    )
    assert metric.update_count == 0, "the user's own metric was updated"


def test_collections_keep_their_names_and_their_groups():
    jaccard = MulticlassJaccardIndex(CLASSES, ignore_index=255)
    accuracy = MulticlassAccuracy(CLASSES, ignore_index=255, average="micro")
    jaccard.update(images()[0, :1], images()[0, 2:])  # in use elsewhere
    group = MetricCollection(
        {"my_iou": jaccard, "my_iou_again": jaccard.clone(), "acc": accuracy}, prefix="seg_"
    )
    figures = paired(group, images())
    for name, metric in (("my_iou", jaccard), ("my_iou_again", jaccard), ("acc", accuracy)):
        fresh = metric.clone()
        fresh.reset()
        for side, number in (("raw", 0), ("refined", 1)):
            expected = alone(fresh, images(), number).item()
            assert figures[f"seg_{name}_{side}"] == pytest.approx(expected)


def test_a_smaller_distance_is_a_gain():
    metric = HausdorffDistance(CLASSES, input_format="index", include_background=True)
    maps = images(2, ignored=False)
    raw, refined = (alone(metric, maps, side).item() for side in (0, 1))
    figures = paired(metric, maps)
    assert figures["HausdorffDistance_gain"] == pytest.approx(raw - refined)


def test_classes_have_their_names():
    figures = paired(
        DiceScore(CLASSES, average="none", input_format="index"), images(ignored=False)
    )
    dice = DiceScore(CLASSES, average="none", input_format="index")
    expected = alone(dice, images(ignored=False), 1)
    for name, value in zip(NAMES, expected.tolist(), strict=True):
        assert figures[f"DiceScore_refined/{name}"] == pytest.approx(value)
    wrapped = ClasswiseWrapper(
        MulticlassJaccardIndex(CLASSES, ignore_index=255, average=None), NAMES
    )
    figures = paired(wrapped, images())
    iou = alone(MulticlassJaccardIndex(CLASSES, ignore_index=255, average=None), images(), 0)
    assert figures["multiclassjaccardindex_road_raw"] == pytest.approx(iou[1].item())


@pytest.mark.parametrize(
    ("metrics", "error", "words"),
    [
        (nn.Identity(), TypeError, "metrics must be a torchmetrics Metric or MetricCollection"),
        (MeanIoU(CLASSES), ValueError, "MeanIoU with input_format='index', got 'one-hot'"),
        (
            MultilabelJaccardIndex(CLASSES),
            ValueError,
            "one class a pixel, got MultilabelJaccardIndex",
        ),
        (BinaryAUROC(), ValueError, "got BinaryAUROC, which takes probabilities"),
        *(
            (MetricCollection({name: MulticlassJaccardIndex(CLASSES)}), ValueError, f"got '{name}'")
            for name in ("miou", "iou", "dice", "class_boundary_iou", "trimap_3px_miou")
        ),
    ],
)
def test_metrics_that_do_not_fit(metrics, error, words):
    with pytest.raises(error, match=words):
        parse_metrics(metrics)


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        (BinaryCalibrationError(), "BinaryCalibrationError: RuntimeError"),
        (MulticlassJaccardIndex(CLASSES), "got from MulticlassJaccardIndex: RuntimeError"),
        (
            MulticlassConfusionMatrix(CLASSES, ignore_index=255),
            r"returned values of shape \(3, 3\)",
        ),
    ],
)
def test_metrics_that_fail_on_the_first_image(metric, words):
    with pytest.raises(ValueError, match=f"metrics must take label maps and targets.*{words}"):
        paired(metric, images())


class FailsOnThird(Metric):
    def __init__(self):
        super().__init__()
        self.add_state("images", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, preds, target):
        self.images += 1
        if self.images == 3:
            raise RuntimeError("no third image")

    def compute(self):
        return self.images


def test_a_later_failure_is_a_warning():
    both = PairedMetrics(parse_metrics(FailsOnThird()), NAMES)
    maps = images()
    for one in maps[:2]:
        both.update(*one)
    assert not both.failed
    with pytest.warns(RuntimeWarning, match="left out of this evaluation .*no third image"):
        both.update(*maps[2])
    both.update(*maps[3])
    assert both.failed
