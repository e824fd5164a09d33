"""The decision on constructed images, with gains computed by torchmetrics."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import multiclass_jaccard_index

from lightning_samrefine.fit.verdict import PixelLabels, judge
from lightning_samrefine.fusion_weights import LogLinear

C = 4


def images(count: int, errors: dict[str, float], seed: int = 0) -> list[PixelLabels]:
    """Images whose predictions are wrong at given shares of the pixels.

    A side's errors are nested: the fewer, the more of them are also those of the others.
    """
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        target = rng.integers(C, size=500)
        chance, wrong = rng.random(500), (target + rng.integers(1, C, size=500)) % C
        sides = {
            name: torch.from_numpy(np.where(chance < share, wrong, target))
            for name, share in errors.items()
        }
        found.append(PixelLabels(torch.from_numpy(target), **sides))
    return found


def miou(found: list[PixelLabels], side: str) -> float:
    predictions = torch.cat([getattr(image, side) for image in found])
    targets = torch.cat([image.target for image in found])
    return float(multiclass_jaccard_index(predictions, targets, num_classes=C, average="macro"))


def class_ious(found: list[PixelLabels], side: str) -> torch.Tensor:
    predictions = torch.cat([getattr(image, side) for image in found])
    targets = torch.cat([image.target for image in found])
    return multiclass_jaccard_index(predictions, targets, num_classes=C, average="none")


def test_a_certain_gain_is_refined_and_reported_beside_the_control():
    found = images(20, {"raw": 0.3, "refined": 0.1, "control": 0.25})
    verdict = judge(found, C)
    assert verdict.refine
    assert verdict.frozen_classes == ()
    gain, control = (miou(found, side) - miou(found, "raw") for side in ("refined", "control"))
    assert verdict.gain.gain == pytest.approx(gain, abs=1e-6)
    assert verdict.control.gain == pytest.approx(control, abs=1e-6)
    assert 0 < verdict.gain.low < gain < verdict.gain.high
    low, high = 100 * verdict.gain.low, 100 * verdict.gain.high
    assert verdict.sentence() == (
        f"Refining adds +{100 * gain:.1f} ({low:.1f}…{high:.1f}) to mIoU: +{100 * control:.1f} "
        f"without SAM, +{100 * (gain - control):.1f} "
        f"({100 * verdict.over_control.low:.1f}…{100 * verdict.over_control.high:.1f}) "
        "by SAM's masks"
    )
    figures = verdict.figures()
    assert figures["fitted_gain"] == verdict.gain.gain
    assert figures["fitted_gain_by_sam"] == pytest.approx(
        figures["fitted_gain"] - figures["fitted_gain_without_sam"], abs=1e-12
    )


def test_a_gain_that_is_not_certain_refines_nothing():
    rng = np.random.default_rng(3)
    found = []
    for image in images(20, {"raw": 0.2, "control": 0.2, "refined": 0.2}):
        # Other pixels are wrong, but as many.
        wrong = torch.from_numpy(rng.random(500) < 0.2)
        refined = torch.where(wrong, (image.target + 1) % C, image.target)
        found.append(replace(image, refined=refined))
    verdict = judge(found, C)
    assert not verdict.refine
    assert verdict.gain.low < 0 < verdict.gain.high
    gain = miou(found, "refined") - miou(found, "raw")
    low, high = 100 * verdict.gain.low, 100 * verdict.gain.high
    assert verdict.sentence() == (
        f"Refining adds nothing certain to mIoU: {100 * gain:+.1f} ({low:.1f}…{high:.1f}), "
        "and +0.0 without SAM; every class keeps the raw prediction"
    )


def test_a_loss_is_reported_and_nothing_is_refined():
    verdict = judge(images(20, {"raw": 0.1, "refined": 0.3, "control": 0.1}), C)
    assert not verdict.refine
    assert verdict.frozen_classes == ()
    assert verdict.gain.high < 0
    assert verdict.sentence().startswith(f"Refining costs mIoU {100 * verdict.gain.gain:.1f} (")


def test_a_class_that_certainly_loses_keeps_its_raw_pixels():
    found = images(20, {"raw": 0.2, "refined": 0.05, "control": 0.2})
    rng = np.random.default_rng(1)
    broken = []
    for image in found:  # class 2 is lost to class 3
        refined = image.refined.clone()
        refined[(image.target == 2) & torch.from_numpy(rng.random(500) < 0.5)] = 3
        broken.append(PixelLabels(image.target, image.raw, refined, image.control))
    verdict = judge(broken, C)
    assert verdict.refine
    assert 2 in verdict.frozen_classes
    assert 0 not in verdict.frozen_classes
    kept = [image.with_frozen(verdict.frozen_classes, C) for image in broken]
    for before, after in zip(broken, kept, strict=True):
        for c in verdict.frozen_classes:
            assert torch.equal(after.refined == c, before.raw == c)
        free = ~torch.isin(before.raw, torch.tensor(verdict.frozen_classes))
        free &= ~torch.isin(before.refined, torch.tensor(verdict.frozen_classes))
        assert torch.equal(after.refined[free], before.refined[free])
    assert verdict.gain.gain == pytest.approx(miou(kept, "refined") - miou(found, "raw"), abs=1e-6)
    names = ["road", "sky", "fence", "car"]
    listed = " and ".join(names[c] for c in verdict.frozen_classes)
    verb = "keep" if len(verdict.frozen_classes) > 1 else "keeps"
    assert verdict.sentence(names).endswith(f"; {listed} {verb} the raw prediction")


def test_a_gain_by_the_frequencies_of_classes_alone_refines_nothing():
    found = images(20, {"raw": 0.3, "refined": 0.1, "control": 0.1})
    names = ("raw", "color", "region_votes")
    unrelated = LogLinear(names, (-0.08, 0.07, 0.7), (0.0,) * C)
    verdict = judge(found, C, unrelated)
    assert verdict.gain.low > 0
    assert not verdict.refine
    assert verdict.sentence().startswith("The raw prediction is hardly related to the targets")
    # A network after its first epoch is wrong about most pixels, less so about colors.
    for weights in ((0.02, 1.1, 2.7), (0.4, 0.0, 0.7)):
        assert judge(found, C, LogLinear(names, weights, (0.0,) * C)).refine


def test_two_classes_are_refined_though_one_certainly_loses():
    """Freezing it would freeze every pixel, and with it the gain of the other."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(20):
        target = torch.ones(1000, dtype=torch.int64)
        target[:100] = 0
        raw, refined = target.clone(), target.clone()
        raw[: rng.integers(35, 45)] = 1
        refined[-rng.integers(40, 50) :] = 0
        found.append(PixelLabels(target, raw, refined, raw))
    verdict = judge(found, 2)
    first, second = (class_ious(found, "refined") - class_ious(found, "raw"))[:2]
    assert first > 0.05 > -0.005 > second
    assert verdict.refine
    assert verdict.frozen_classes == ()
    assert verdict.gain.gain == pytest.approx(float(first + second) / 2, abs=1e-6)


def test_a_perfect_segmenter_is_not_touched():
    verdict = judge(images(12, {"raw": 0.0, "refined": 0.01, "control": 0.0}), C)
    assert not verdict.refine


def test_one_image_decides_by_itself_without_an_error():
    verdict = judge(images(1, {"raw": 0.3, "refined": 0.1, "control": 0.3}), C)
    assert verdict.gain.images == 1
    assert verdict.gain.low == verdict.gain.high == verdict.gain.gain


def test_pixels_without_a_predicted_class_count_as_errors():
    target = torch.tensor([0, 0, 1, 1])
    raw = torch.tensor([-1, 0, 1, 7])
    verdict = judge([PixelLabels(target, raw, target, target)] * 3, 2)
    assert verdict.gain.gain == pytest.approx(0.5)


def test_a_class_in_one_image_alone_is_not_certainly_lost():
    found = images(20, {"raw": 0.2, "refined": 0.05, "control": 0.2})
    rare = torch.zeros(500, dtype=torch.int64)
    rare[:5] = 3
    without = [
        PixelLabels(
            *(torch.where(side == 3, 0, side) for side in (i.target, i.raw, i.refined, i.control))
        )
        for i in found
    ]
    odd = PixelLabels(rare, rare, torch.zeros_like(rare), rare)
    assert 3 not in judge([*without, odd], C).frozen_classes
