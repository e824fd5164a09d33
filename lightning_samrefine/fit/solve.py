"""Multinomial logistic regression of the true class on the features, near the preset's weights.

The objective is the mean cross-entropy of the sampled pixels plus a ridge that pulls the weights to
`PRESET_WEIGHTS` and the biases to 0. It is strictly convex and has a few dozen unknowns, so that
Newton's method finds its one minimum in some ten steps, to the last digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_samrefine.fit.sample import ImageSample, assign_folds
from lightning_samrefine.fusion_weights import LogLinear
from lightning_samrefine.refine.fusion.features import class_scores

FOLDS = 4

_RIDGE = 0.01
_MAX_PIXELS = 120_000
_MAX_ENTRIES = 4_000_000  # pixels times classes
_MAX_STEPS = 50
_TOLERANCE = 1e-9  # of the gradient's largest entry
_SUFFICIENT_DECREASE = 1e-4


@dataclass(frozen=True)
class CrossValidation:
    """Fitted weights, and predictions of images from weights fitted without them.

    Attributes:
        weights: Fitted to all images.
        fold_weights: For each fold, fitted to the images outside it.
        fold_of: The fold of each group of images.
        predictions: For each image, (N,) int16, the classes of its pixels by the weights of its
            fold.
    """

    weights: LogLinear
    fold_weights: tuple[LogLinear, ...]
    fold_of: dict[str, int]
    predictions: tuple[Tensor, ...]


def fit(
    samples: Sequence[ImageSample],
    features: Sequence[str],
    num_classes: int,
    start: LogLinear | None = None,
) -> LogLinear:
    """Fit weights and biases to labeled pixels.

    The bias of a class that no pixel has stays 0.

    Args:
        samples: N images, in an order that their keys decide: sums round by the order.
        features: Names of features that all images have.
        num_classes: C.
        start: Where the search starts; the minimum does not depend on it.
    """
    return _minimize(_Problem(samples, tuple(features), num_classes), start)


def cross_validate(
    samples: Sequence[ImageSample], features: Sequence[str], num_classes: int
) -> CrossValidation:
    """Fit to all images and, fold by fold, to all images outside the fold.

    Args:
        samples: N images of at least two groups.
        features: Names of features that all images have.
        num_classes: C.
    """
    weights = fit(samples, features, num_classes)
    folds = assign_folds(samples, FOLDS).tolist()
    fold_weights = [
        fit(
            [s for s, own in zip(samples, folds, strict=True) if own != fold],
            features,
            num_classes,
            weights,
        )
        for fold in range(FOLDS)
    ]
    predictions = [
        class_scores(fold_weights[fold], sample.select(weights.features)).argmax(dim=0)
        for sample, fold in zip(samples, folds, strict=True)
    ]
    return CrossValidation(
        weights,
        tuple(fold_weights),
        {sample.group: fold for sample, fold in zip(samples, folds, strict=True)},
        tuple(prediction.to(torch.int16) for prediction in predictions),
    )


class _Problem:
    """The objective over one set of pixels, in float64.

    Args:
        samples: At least one image.
        names: The F features.
        num_classes: C.
    """

    def __init__(
        self, samples: Sequence[ImageSample], names: tuple[str, ...], num_classes: int
    ) -> None:
        most = min(_MAX_PIXELS, max(1, _MAX_ENTRIES // num_classes))
        every = max(1, -(-sum(map(len, samples)) // most))
        self.names = names
        self.parts: list[tuple[Tensor, Tensor]] = []
        for sample in samples:
            self.parts.append((sample.select(names)[:, :, ::every], sample.target[::every].long()))
        self.pixels = sum(len(target) for _, target in self.parts)
        self.prior = torch.tensor(
            [*LogLinear.preset(names, num_classes).weights, *[0.0] * num_classes],
            dtype=torch.float64,
        )
        counts = sum(torch.bincount(target, minlength=num_classes) for _, target in self.parts)
        assert isinstance(counts, Tensor)
        weighs = torch.ones(len(names), dtype=torch.bool)
        self.free = torch.cat([weighs, counts > 0])

    def loss(self, theta: Tensor) -> float:
        """Return the objective at (F + C,) weights and biases."""
        total = 0.0
        for features, target in self.parts:
            scores = self._scores(features, theta)
            right = scores.gather(0, target[None])[0]
            total += float((scores.logsumexp(dim=0) - right).sum())
        return total / self.pixels + _RIDGE * float((theta - self.prior).square().sum())

    def derivatives(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradient, (F + C,), and the Hessian, (F + C, F + C)."""
        count = len(self.names)
        gradient = 2 * _RIDGE * (theta - self.prior)
        hessian = 2 * _RIDGE * torch.eye(len(theta), dtype=torch.float64)
        for features, target in self.parts:
            probs = self._scores(features, theta).softmax(dim=0)
            residuals = probs.clone()
            residuals[target, torch.arange(len(target))] -= 1
            gradient[:count] += torch.einsum("cn,fcn->f", residuals, features) / self.pixels
            gradient[count:] += residuals.sum(dim=1) / self.pixels
            weighted = probs * features
            means = weighted.sum(dim=1)
            of_weights = weighted.flatten(1) @ features.flatten(1).T - means @ means.T
            mixed = weighted.sum(dim=2) - means @ probs.T
            of_biases = torch.diag(probs.sum(dim=1)) - probs @ probs.T
            hessian[:count, :count] += of_weights / self.pixels
            hessian[:count, count:] += mixed / self.pixels
            hessian[count:, :count] += mixed.T / self.pixels
            hessian[count:, count:] += of_biases / self.pixels
        return gradient, hessian

    def _scores(self, features: Tensor, theta: Tensor) -> Tensor:
        count = len(self.names)
        return torch.einsum("f,fcn->cn", theta[:count], features) + theta[count:, None]


def _minimize(problem: _Problem, start: LogLinear | None) -> LogLinear:
    """Minimize the objective by Newton's method with a backtracking line search."""
    theta = problem.prior.clone()
    if start is not None:
        theta[:] = torch.tensor([*start.weights, *start.biases], dtype=torch.float64)
        theta[~problem.free] = 0.0
    free = problem.free
    loss = problem.loss(theta)
    for _ in range(_MAX_STEPS):
        gradient, hessian = problem.derivatives(theta)
        if gradient[free].abs().max() < _TOLERANCE:
            break
        step = torch.zeros_like(theta)
        step[free] = torch.linalg.solve(hessian[free][:, free], gradient[free])
        slope = float(gradient[free] @ step[free])
        size = 1.0
        new_loss = problem.loss(theta - step)
        while new_loss > loss - _SUFFICIENT_DECREASE * size * slope and size > 1e-6:
            size /= 2
            new_loss = problem.loss(theta - size * step)
        if new_loss >= loss:  # rounding: the minimum is reached
            break
        theta, loss = theta - size * step, new_loss
    count = len(problem.names)
    found = theta.tolist()
    return LogLinear(problem.names, tuple(found[:count]), tuple(found[count:]))
