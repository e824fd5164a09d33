"""Weights over the evaluations of a run: who is fitted with whom, and when nothing is refined."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import multiclass_jaccard_index

from lightning_samrefine.fit.auto_fusion import MIN_GROUPS, AutoFusion, FittedFusion
from lightning_samrefine.fit.sample import ImageSample
from lightning_samrefine.fusion_weights import FEATURES, LogLinear

CLASSES = ("sky", "tree", "road")
C = len(CLASSES)


def image(index: int) -> ImageSample:
    """Pixels whose raw prediction is right for 80%, and whose votes favor the true class."""
    rng = np.random.default_rng(index)
    target = rng.integers(C, size=400)
    raw = np.where(rng.random(400) < 0.7, target, rng.integers(C, size=400))
    features = rng.normal(size=(len(FEATURES), C, 400)) * 0.5
    features[0, raw, np.arange(400)] += 1.5
    features[FEATURES.index("region_votes"), target, np.arange(400)] += 3.0
    features[FEATURES.index("presence")] = 0.0
    return ImageSample(
        key=f"image {index}",
        group=f"image {index}",
        names=FEATURES,
        features=torch.from_numpy(features).half(),
        target=torch.from_numpy(target).to(torch.int16),
        raw=torch.from_numpy(raw).to(torch.int16),
    )


def fitted(images: list[ImageSample]) -> AutoFusion:
    auto = AutoFusion(CLASSES)
    auto.sample.merge(images)
    auto.finish()
    return auto


def test_before_any_fit_the_presets_weights_count():
    auto = AutoFusion(CLASSES)
    assert auto.fitted is None
    assert auto.weights_for("image 0") is None
    control = auto.control_for("image 0").control
    assert control == LogLinear(("raw", "color", "presence"), (1.0, 1.3, 0.0), (0.0,) * C)


def test_correct_votes_are_used_and_reported():
    auto = fitted([image(index) for index in range(12)])
    final = auto.fitted.final
    assert final.images == 12
    assert final.refine
    assert final.fusion.features == FEATURES
    assert "region_votes" not in final.control.features
    assert final.found.startswith("Refining adds +")
    assert final.found.endswith(" by SAM's masks")


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
    shuffled = [replace(sample, target=targets[index - 1]) for index, sample in enumerate(images)]
    auto = fitted(shuffled)
    assert not auto.fitted.final.refine
    assert not any(weights.refine for weights in auto.fitted.folds)
    assert "every class keeps the raw prediction" in auto.fitted.final.found


def test_a_perfect_prediction_is_not_refined():
    auto = fitted([replace(sample, raw=sample.target) for sample in map(image, range(10))])
    assert not auto.fitted.final.refine


def test_too_few_images_change_nothing():
    auto = fitted([image(index) for index in range(MIN_GROUPS - 1)])
    assert auto.fitted is None
    # Frames of one video count as one image.
    assert fitted([replace(image(index), group="video") for index in range(20)]).fitted is None


def frame(scene: int, number: int, group: str | None) -> ImageSample:
    """Pixels of one class, mostly taken for another; frames of a scene differ by noise alone."""
    count, pixels = len(MANY), 300
    wanted, taken = np.random.default_rng(scene).choice(count, 2, replace=False)
    features = np.zeros((len(FEATURES), count, pixels))
    features[0] = np.random.default_rng((scene, number)).normal(size=(count, pixels)) * 0.5 - 4
    features[0, wanted] += 3.0
    features[0, taken] += 3.3
    key = f"{scene} {number}"
    return ImageSample(
        key=key,
        group=group or key,
        names=FEATURES,
        features=torch.from_numpy(features).half(),
        target=torch.full((pixels,), wanted, dtype=torch.int16),
        raw=torch.from_numpy(features[0].argmax(axis=0)).to(torch.int16),
    )


MANY = tuple(map(str, range(12)))


def gain_of(auto: AutoFusion, frames: list[ImageSample]) -> float:
    """The gain of the final weights on other images, by numpy and torchmetrics."""
    weights = auto.fitted.final.fusion
    refined = [
        np.einsum("f,fcn->cn", weights.weights, one.features.double().numpy())
        + np.array(weights.biases)[:, None]
        for one in frames
    ]
    target = torch.cat([one.target for one in frames]).long()
    sides = (
        torch.from_numpy(np.concatenate([scores.argmax(axis=0) for scores in refined])),
        torch.cat([one.raw for one in frames]).long(),
    )
    better, raw = (
        multiclass_jaccard_index(side, target, num_classes=len(MANY), average="macro")
        for side in sides
    )
    return float(better - raw)


def test_neighbors_on_both_sides_of_a_fold_promise_too_much_and_groups_do_not():
    found, verdicts = [], []
    for grouped in (False, True):
        auto = AutoFusion(MANY)
        for scene, number in product(range(10), range(4)):
            group = f"scene {scene}" if grouped else None
            auto.sample.merge([frame(scene, number, group)])
        verdicts.append(auto.finish())
        found.append(auto)
    fresh = gain_of(found[1], [frame(scene, 0, None) for scene in range(100, 300)])
    alone, together = verdicts
    assert alone.gain.low > fresh + 0.1  # certain of what is not there
    assert together.gain.low < fresh < together.gain.high
    assert together.gain.images == 10  # scenes are drawn, not frames
    assert found[1].fitted.final.images == 40


def test_a_new_image_of_a_known_group_is_refined_without_its_neighbors():
    images = [replace(image(index), group=f"scene {index // 2}") for index in range(20)]
    auto = fitted(images)
    fold = auto.fitted.fold_of["scene 3"]
    assert auto.weights_for("scene 3") == auto.fitted.folds[fold] != auto.fitted.final


def test_a_later_evaluation_without_labels_keeps_the_weights():
    auto = fitted([image(index) for index in range(10)])
    before = auto.fitted
    auto.start()
    assert auto.finish() is None
    assert auto.fitted == before


def test_processes_in_any_order_fit_the_same():
    images = [image(index) for index in range(17)]
    whole = fitted(images)
    auto = AutoFusion(CLASSES)
    auto.sample.merge(images[:1:-2])
    auto.finish(images[1::-1] + images[15::-2])
    assert auto.fitted == whole.fitted


def test_weights_survive_a_checkpoint():
    auto = fitted([image(index) for index in range(9)])
    values = json.loads(json.dumps(auto.fitted.to_mapping()))
    assert FittedFusion.from_mapping(values) == auto.fitted


def test_weights_of_other_classes_are_refused():
    auto = fitted([image(index) for index in range(9)])
    with pytest.raises(ValueError, match="classes must be those of the fitted weights, sky, tree"):
        AutoFusion(("sky", "road", "tree"), auto.fitted)
    assert AutoFusion(CLASSES, auto.fitted).weights_for("image 0") is not None


def test_many_classes_are_fitted_in_seconds():
    count, pixels = 150, 200
    rng = np.random.default_rng(0)
    samples = []
    for index in range(10):
        target = rng.integers(count, size=pixels)
        raw = np.where(rng.random(pixels) < 0.6, target, rng.integers(count, size=pixels))
        features = rng.normal(size=(len(FEATURES), count, pixels)) * 0.5
        features[0, raw, np.arange(pixels)] += 3
        features[-1, target, np.arange(pixels)] += 3
        samples.append(
            replace(
                image(index),
                features=torch.from_numpy(features).half(),
                target=torch.from_numpy(target).to(torch.int16),
                raw=torch.from_numpy(raw).to(torch.int16),
            )
        )
    auto = AutoFusion(tuple(map(str, range(count))))
    auto.sample.merge(samples)
    started = time.perf_counter()
    verdict = auto.finish()
    assert verdict is not None
    assert verdict.gain.low > 0
    assert time.perf_counter() - started < 60


def test_one_class_present_is_no_error():
    samples = [
        replace(sample, target=torch.zeros_like(sample.target)) for sample in map(image, range(9))
    ]
    auto = fitted(samples)
    assert auto.fitted.final.images == 9
    assert auto.fitted.final.fusion.biases[1:] == (0.0, 0.0)
