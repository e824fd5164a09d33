"""Weights over the evaluations of a run: who is fitted with whom, and when nothing is refined."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from lightning_samrefine.fit import MIN_IMAGES, ImageSample
from lightning_samrefine.fit.auto import TRIAL_IMAGES, AutoFusion, FittedFusion

CLASSES = ("sky", "tree", "road")
C = len(CLASSES)
REGIONS = ("raw", "color", "presence", "region_votes")
GRID = ("raw", "color", "presence", "mask_votes", "region_votes")


def image(index: int, votes: float = 3.0, grid: float | None = None) -> ImageSample:
    """Pixels whose raw prediction is right for 70%, and whose votes favor the true class.

    Args:
        index: Seed and key.
        votes: How much more log-evidence region votes have for the true class; 0 says nothing.
        grid: The same of mask votes; None for an image without them.
    """
    rng = np.random.default_rng(index)
    target = rng.integers(C, size=400)
    raw = np.where(rng.random(400) < 0.7, target, rng.integers(C, size=400))
    names = REGIONS if grid is None else GRID
    features = rng.normal(size=(len(names), C, 400)) * 0.5
    features[0, raw, np.arange(400)] += 1.5
    features[names.index("region_votes"), target, np.arange(400)] += votes
    if grid is not None:
        features[names.index("mask_votes"), target, np.arange(400)] += grid
    features[names.index("presence")] = 0.0
    return ImageSample(
        key=f"image {index}",
        group=f"image {index}",
        names=names,
        features=torch.from_numpy(features).half(),
        target=torch.from_numpy(target).to(torch.int16),
        raw=torch.from_numpy(raw).to(torch.int16),
    )


def fitted(images: list[ImageSample], **arguments) -> AutoFusion:
    auto = AutoFusion(CLASSES, **arguments)
    auto.start(len(images))
    auto.sample.merge(images)
    auto.finish()
    return auto


def test_before_any_fit_the_presets_weights_count():
    auto = AutoFusion(CLASSES)
    assert not auto.is_fitted
    weights = auto.weights_for("image 0")
    assert weights.fusion.weights == (1.0, 1.3, 0.0, 1.0)
    assert weights.fusion.biases == (0.0,) * C
    assert weights.refine


def test_votes_that_tell_the_truth_are_used_and_told():
    auto = fitted([image(index) for index in range(12)])
    final = auto.fitted.final
    assert auto.is_fitted
    assert final.images == 12
    assert final.refine
    assert final.fusion.features == REGIONS
    assert "mask_votes" not in final.control.features
    assert "region_votes" not in final.control.features
    assert final.found.startswith("SAM adds +")


def test_an_image_is_refined_with_weights_that_never_saw_it():
    images = [image(index) for index in range(12)]
    changed = [replace(images[0], target=(images[0].target + 1) % C), *images[1:]]
    before, after = fitted(images), fitted(changed)
    fold_of = before.fitted.fold_of
    assert set(fold_of) == {sample.key for sample in images}
    for key, fold in fold_of.items():
        one, other = (auto.weights_for(key).fusion.weights for auto in (before, after))
        # Newton's method starts elsewhere and ends at the same minimum.
        assert (one == pytest.approx(other, abs=1e-6)) == (fold == fold_of["image 0"])
    assert before.fitted.final.fusion != after.fitted.final.fusion
    assert before.weights_for("another image") == before.fitted.final


def test_targets_of_other_images_end_in_refining_nothing():
    images = [image(index) for index in range(16)]
    targets = [sample.target for sample in images]
    shuffled = [
        replace(sample, target=targets[index - 1], raw=targets[index - 1])
        for index, sample in enumerate(images)
    ]
    auto = fitted(shuffled)
    assert not auto.fitted.final.refine
    assert not any(weights.refine for weights in auto.fitted.folds)
    assert "every class keeps the raw prediction" in auto.fitted.final.found


def test_a_perfect_prediction_is_not_refined():
    auto = fitted([replace(sample, raw=sample.target) for sample in map(image, range(10))])
    assert not auto.fitted.final.refine


def test_too_few_images_change_nothing():
    auto = fitted([image(index) for index in range(MIN_IMAGES - 1)])
    assert auto.verdict is None
    assert not auto.is_fitted


def test_a_later_evaluation_without_labels_keeps_the_weights():
    auto = fitted([image(index) for index in range(10)])
    before = auto.fitted
    auto.start(5)
    assert auto.finish() is None
    assert auto.fitted == before


@pytest.mark.parametrize(("grid", "used"), [(4.0, True), (0.0, False)])
def test_the_point_grid_is_used_if_it_certainly_adds(grid, used):
    images = [image(index, 1.0, grid if index < 12 else None) for index in range(30)]
    auto = fitted(images)
    assert ("mask_votes" in auto.fitted.final.fusion.features) == used
    assert auto.fitted.final.images == (12 if used else 30)
    assert all(auto.prompts_grid(f"image {index}") == used for index in range(30))


def test_the_grid_is_tried_on_a_few_images_of_many():
    auto = AutoFusion(CLASSES)
    auto.start(1000)
    tried = sum(auto.prompts_grid(f"image {index}") for index in range(1000))
    # 24 are expected, with a binomial standard deviation of 4.8.
    assert abs(tried - TRIAL_IMAGES) < 4 * 4.8
    auto.start(10)
    assert all(auto.prompts_grid(f"image {index}") for index in range(10))
    assert not AutoFusion(CLASSES, grid=False).prompts_grid("image 0")


def test_processes_in_any_order_fit_the_same():
    images = [image(index, grid=1.0 if index % 2 else None) for index in range(17)]
    whole = fitted(images)
    auto = AutoFusion(CLASSES)
    auto.start(17)
    auto.sample.merge(images[:1:-2])
    auto.finish(images[1::-1] + images[15::-2])
    assert auto.fitted == whole.fitted


def test_weights_survive_a_checkpoint():
    auto = fitted([image(index) for index in range(9)])
    values = json.loads(json.dumps(auto.fitted.to_mapping()))
    assert FittedFusion.from_mapping(values) == auto.fitted
