"""From SAM's masks to features: votes by numpy, and labels by the weights."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from random_predictions import blobs

from lightning_samrefine import RefineConfig, Refiner
from lightning_samrefine.fusion_weights import FusionWeights, LogLinear
from lightning_samrefine.refine.fusion.fitted import (
    control_labels,
    feature_maps,
    fuse_fitted,
)
from lightning_samrefine.refine.fusion.mask_votes import mean_probs
from lightning_samrefine.refine.mask_predictions import MaskPredictions
from lightning_samrefine.refine.results import Refinement

C = 4
THRESH = 0.55
NO_SAM = None  # the fusion prompts nothing
CONFIG = RefineConfig.preset("fast", min_region_area=1, pred_iou_thresh=THRESH, stride=1)


@pytest.fixture(scope="module")
def predicted(random_sam):
    def predict(config: RefineConfig, labels: torch.Tensor | None = None) -> MaskPredictions:
        image, probs = blobs(C, seed=3)
        given = None if labels is None else [labels]
        (found,) = Refiner(random_sam, config, "32").predict([image], [probs], given)
        return found

    return predict


def votes(masks: np.ndarray, weight: np.ndarray, classes: np.ndarray) -> np.ndarray:
    found = np.zeros((C, *masks.shape[1:]))
    for mask, of_mask, c in zip(masks, weight, classes, strict=True):
        found[c] = np.maximum(found[c], of_mask * mask)
    return found


def inside(masks: np.ndarray, probs: torch.Tensor) -> np.ndarray:
    small = F.interpolate(probs[None], masks.shape[1:], mode="bilinear")[0].numpy()
    sums = np.einsum("chw,khw->ck", small.astype(np.float64), masks)
    return sums / sums.sum(axis=0)


def regions(found: MaskPredictions) -> tuple[np.ndarray, ...]:
    accepted = found.pred_iou.numpy() > THRESH
    assert 0 < accepted.sum() < len(accepted), found.pred_iou
    masks = found.region_masks.probs().numpy().astype(np.float64)
    classes = found.regions.classes
    purity = inside(masks, found.raw.probs)[classes, np.arange(len(classes))]
    pred_iou = found.region_masks.pred_iou.numpy()
    return masks[accepted], pred_iou[accepted], purity[accepted], classes[accepted]


def test_region_votes_are_pred_iou_times_the_mean_probability_inside(predicted):
    found = predicted(CONFIG)
    maps = feature_maps(found, CONFIG)
    masks, pred_iou, purity, classes = regions(found)
    want = votes(masks, pred_iou * purity, classes)
    np.testing.assert_allclose(maps.region_votes.maps(0).numpy(), want, atol=1e-5)


def test_mean_probs_of_one_hot_masks_are_the_pixels_own():
    _, probs = blobs(C)
    masks = torch.eye(48 * 60)[:5].unflatten(1, (48, 60))
    torch.testing.assert_close(mean_probs(masks, probs), probs.flatten(1)[:, :5])


def refine(found: MaskPredictions, config: RefineConfig, weights: FusionWeights) -> Refinement:
    return fuse_fitted(found, replace(config, weights=weights), NO_SAM)


def fusion_weights(**changes: object) -> FusionWeights:
    features = ("raw", "color", "presence", "region_votes")
    values = {
        "fusion": LogLinear(features, (0.6, 1.0, 0.2, 1.2), (0.3, -0.2, 0.0, 0.1)),
        "control": LogLinear(features[:3], (0.8, 0.4, 0.1), (0.0,) * C),
        "classes": tuple("abcd"),
        **changes,
    }
    return FusionWeights(**values)


def test_labels_are_the_argmax_of_the_fused_probabilities(predicted):
    found = predicted(CONFIG)
    weights, maps = fusion_weights(), feature_maps(found, CONFIG)
    refined = refine(found, CONFIG, weights)
    torch.testing.assert_close(refined.probs, maps.fuse(weights.fusion))
    assert torch.equal(refined.labels, refined.probs.argmax(dim=0))
    assert not torch.equal(refined.labels, found.raw.labels)
    control = control_labels(found.raw, maps, weights)
    assert torch.equal(control, maps.fuse(weights.control).argmax(dim=0))


def test_weights_that_refine_nothing_give_the_raw_prediction(predicted):
    found = predicted(CONFIG)
    refined = refine(found, CONFIG, fusion_weights(refine=False))
    assert torch.equal(refined.labels, found.raw.labels)
    assert torch.equal(refined.probs, found.raw.probs)
    assert len(refined.regions) == len(found.regions)


def test_frozen_classes_keep_their_pixels(predicted):
    found = predicted(CONFIG)
    free = refine(found, CONFIG, fusion_weights())
    kept = refine(found, CONFIG, fusion_weights(frozen_classes=(1,)))
    touches = (free.labels != found.raw.labels) & ((free.labels == 1) | (found.raw.labels == 1))
    assert touches.any()
    assert torch.equal(kept.labels, torch.where(touches, found.raw.labels, free.labels))
    assert torch.equal(kept.probs, torch.where(touches, found.raw.probs, free.probs))


def test_unknown_labels_are_replaced_and_others_kept_if_nothing_changes(predicted):
    labels = blobs(C, seed=3)[1].argmax(dim=0)
    labels[:4] = 255
    labels[10:12] = 2  # post-processed: not the argmax
    found = predicted(CONFIG, labels)
    same = LogLinear(("raw",), (1.0,), (0.0,) * C)
    refined = refine(found, CONFIG, fusion_weights(fusion=same))
    assert torch.equal(refined.labels[4:], labels[4:])
    assert torch.equal(refined.labels[:4], found.raw.probs.argmax(dim=0)[:4])


def test_an_image_without_masks_is_fused_by_what_it_has(predicted):
    config = replace(CONFIG, pred_iou_thresh=1.0)
    found = predicted(config)
    maps = feature_maps(found, config)
    assert not maps.region_votes.maps(0).any()
    refined = refine(found, config, fusion_weights())
    assert torch.equal(refined.labels, maps.fuse(fusion_weights().fusion).argmax(dim=0))
