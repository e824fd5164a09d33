"""The fit against a general optimizer, finite differences and cases whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import logsumexp

from lightning_samrefine.fit.sample import ImageSample
from lightning_samrefine.fit.solve import cross_validate, fit
from lightning_samrefine.fusion_weights import PRESET_WEIGHTS, LogLinear
from lightning_samrefine.refine.fusion.features import class_scores

NAMES = ("raw", "color", "region_votes")
C = 4


def image(index: int, truth: LogLinear, pixels: int = 300) -> ImageSample:
    """Pixels whose classes are drawn from the probabilities of a known fusion."""
    rng = np.random.default_rng(index)
    features = rng.normal(size=(len(truth.features), truth.num_classes, pixels)).astype(np.float16)
    scores = class_scores(truth, torch.from_numpy(features))
    target = torch.from_numpy((scores.numpy() + rng.gumbel(size=scores.shape)).argmax(axis=0))
    return ImageSample(
        key=f"image {index}",
        group=f"image {index}",
        names=truth.features,
        features=torch.from_numpy(features),
        target=target.to(torch.int16),
        raw=torch.from_numpy(features[0].argmax(axis=0)).to(torch.int16),
    )


TRUTH = LogLinear(NAMES, (0.5, 1.5, -0.3), (0.4, -0.2, 0.1, -0.3))


@pytest.fixture(scope="module")
def images() -> list[ImageSample]:
    return [image(index, TRUTH) for index in range(10)]


def objective(theta: np.ndarray, images: list[ImageSample], names: tuple[str, ...]) -> float:
    weights, biases = theta[: len(names)], theta[len(names) :]
    losses = []
    for sample in images:
        features = sample.features.numpy().astype(np.float64)
        rows = [sample.names.index(name) for name in names]
        scores = np.einsum("f,fcn->cn", weights, features[rows]) + biases[:, None]
        target = sample.target.numpy()
        losses.append(logsumexp(scores, axis=0) - scores[target, np.arange(len(target))])
    preset = np.array([PRESET_WEIGHTS[name] for name in names])
    ridge = ((weights - preset) ** 2).sum() + (biases**2).sum()
    return float(np.concatenate(losses).mean() + 0.01 * ridge)


@pytest.mark.parametrize("names", [NAMES, ("raw", "color"), ("raw",)])
def test_the_minimum_is_that_of_a_general_optimizer(images: list[ImageSample], names: tuple):
    found = fit(images, names, C)
    start = np.array([*(PRESET_WEIGHTS[name] for name in names), *[0.0] * C])
    best = minimize(objective, start, (images, names), "BFGS", options={"gtol": 1e-7})
    np.testing.assert_allclose([*found.weights, *found.biases], best.x, atol=1e-4)
    assert objective(np.array([*found.weights, *found.biases]), images, names) <= best.fun + 1e-10


def test_known_weights_are_found_again_but_for_the_ridge():
    many = [image(index, TRUTH, pixels=4000) for index in range(30)]
    found = fit(many, NAMES, C)
    # The ridge pulls the weights by about its strength over the curvature.
    np.testing.assert_allclose(found.weights, TRUTH.weights, atol=0.1)
    centered = np.array(TRUTH.biases) - np.mean(TRUTH.biases)
    np.testing.assert_allclose(found.biases, centered, atol=0.1)


def test_the_minimum_does_not_depend_on_the_start(images: list[ImageSample]):
    far = LogLinear(NAMES, (9.0, -5.0, 3.0), (2.0, -2.0, 5.0, 1.0))
    one, other = fit(images, NAMES, C), fit(images, NAMES, C, start=far)
    np.testing.assert_allclose(
        [*one.weights, *one.biases], [*other.weights, *other.biases], atol=1e-8
    )


def test_a_second_fit_has_equal_bits(images: list[ImageSample]):
    assert fit(images, NAMES, C) == fit(images, NAMES, C)


def test_a_class_that_no_pixel_has_keeps_bias_zero(images: list[ImageSample]):
    without = []
    for sample in images:
        seen = sample.target != 2
        without.append(
            ImageSample(
                sample.key,
                sample.group,
                sample.names,
                sample.features[:, :, seen],
                sample.target[seen],
                sample.raw[seen],
            )
        )
    found = fit(without, NAMES, C)
    assert found.biases[2] == 0
    assert 0 not in found.biases[:2] + found.biases[3:]


def test_separable_classes_and_one_class_alone_stay_finite():
    for truth_class in (None, 1):
        samples = []
        for index in range(8):
            base = image(index, TRUTH, pixels=50)
            target = (
                base.features[0].argmax(dim=0)
                if truth_class is None
                else torch.full((50,), truth_class)
            )
            samples.append(
                ImageSample(
                    base.key, base.group, NAMES, base.features, target.to(torch.int16), base.raw
                )
            )
        found = fit(samples, NAMES, C)
        assert np.isfinite([*found.weights, *found.biases]).all()
        scores = class_scores(found, samples[0].select(NAMES))
        assert (scores.argmax(dim=0) == samples[0].target).float().mean() > 0.95


def test_predictions_come_from_weights_fitted_without_the_image():
    images = [image(index, TRUTH, pixels=150) for index in range(12)]  # folds of three
    found = cross_validate(images, NAMES, C)
    assert found.weights == fit(images, NAMES, C)
    for sample, prediction in zip(images, found.predictions, strict=True):
        fold = found.fold_of[sample.group]
        own = found.fold_weights[fold]
        others = [s for s in images if found.fold_of[s.group] != fold]
        assert len(others) < len(images)
        by_hand = fit(others, NAMES, C)
        np.testing.assert_allclose(own.weights, by_hand.weights, atol=1e-8)
        np.testing.assert_allclose(own.biases, by_hand.biases, atol=1e-8)
        scores = np.einsum("f,fcn->cn", by_hand.weights, sample.features.double().numpy())
        want = (scores + np.array(by_hand.biases)[:, None]).argmax(axis=0)
        assert (prediction.numpy() == want).mean() > 0.999


def test_labels_shuffled_between_images_predict_a_loss_or_nothing(images):
    targets = [sample.target for sample in images]
    shuffled = [
        ImageSample(s.key, s.group, s.names, s.features, target, s.raw)
        for s, target in zip(images, targets[1:] + targets[:1], strict=True)
    ]
    found = fit(shuffled, NAMES, C)
    # Nothing in the features depends on the class: the weights shrink towards 0.
    assert np.abs(found.weights).max() < 0.2


def test_many_classes_are_fitted_in_little_memory():
    truth = LogLinear(("raw",), (1.0,), (0.0,) * 150)
    samples = [image(index, truth, pixels=600) for index in range(8)]
    found = fit(samples, ("raw",), 150)
    assert abs(found.weights[0] - 1) < 0.1
