"""Random raw predictions for the comparison of refiner and oracle.

A `Case` is a handful of numbers that hypothesis can shrink; `Case.inputs` turns them into an
image, probabilities and labels, always the same ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor

# A kind that is named twice is chosen twice as often.
PROBS = (
    *("softmax", "one-hot", "constant", "zero", "at threshold", "uniform"),
    *("softmax", "softmax", "softmax", "softmax", "one-hot", "one-hot"),
)
LABELS = (
    *("argmax", "blobs", "speckled", "noise", "one class"),
    *("argmax", "blobs", "speckled", "speckled"),
)
UNKNOWN = (255, -1, None)  # None is C, the first value past the classes
NOISE_SIDE = 9  # on the grid; every pixel of it may be a region of its own
BIG_PIXELS = 40_000


@dataclass(frozen=True)
class Case:
    """One input and one configuration.

    Attributes:
        probs_kind: One of `PROBS`.
        labels_kind: One of `LABELS`; "argmax" passes None to the refiner.
        classes: C.
        height: H.
        width: W.
        patches: How many rectangles of the label map are overwritten by out-of-range values.
        seed: Of the arrays' content.
        score_thresh: τ_c.
        mask_prompt_scale: τ_m.
        pred_iou_thresh: τ_iou.
        stride: r.
        min_region_area: In grid pixels.
    """

    probs_kind: str = "softmax"
    labels_kind: str = "argmax"
    classes: int = 4
    height: int = 40
    width: int = 48
    patches: int = 0
    seed: int = 0
    score_thresh: float = 0.0
    mask_prompt_scale: float = 8.0
    pred_iou_thresh: float = 0.5
    stride: int = 2
    min_region_area: int = 1

    def thresholds(self) -> dict[str, float]:
        """Return the fields that `RefineConfig` and the oracle name alike."""
        return {
            "score_thresh": self.score_thresh,
            "mask_prompt_scale": self.mask_prompt_scale,
            "pred_iou_thresh": self.pred_iou_thresh,
            "stride": self.stride,
            "min_region_area": self.min_region_area,
        }

    def inputs(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return image (3, H, W) uint8, probs (C, H, W) float32 and labels (H, W) or None."""
        rng = np.random.default_rng(self.seed)
        image = smooth_noise(rng, 3, self.height, self.width) * 60 + 128
        image += rng.normal(0, 20, image.shape)
        labels = self._labels(rng)
        probs = torch.from_numpy(self._probs(rng, labels))
        for _ in range(self.patches):
            value = UNKNOWN[rng.integers(len(UNKNOWN))]
            y, x = rng.integers(self.height), rng.integers(self.width)
            h, w = rng.integers(1, self.height + 1) // 2 + 1, rng.integers(1, self.width + 1) // 2
            labels[y : y + h, x : x + w + 1] = self.classes if value is None else value
        return (
            torch.from_numpy(image.clip(0, 255).astype(np.uint8)),
            probs,
            None if self.labels_kind == "argmax" else torch.from_numpy(labels),
        )

    def _labels(self, rng: Generator) -> NDArray[np.int64]:
        size = (self.height, self.width)
        if self.labels_kind == "one class":
            return np.full(size, rng.integers(self.classes), np.int64)
        if self.labels_kind == "noise":
            return rng.integers(0, self.classes, size)
        # Half of the classes stay empty now and then.
        present = rng.permutation(self.classes)[: rng.integers(1, self.classes + 1)]
        labels = present[smooth_noise(rng, len(present), *size).argmax(axis=0)].astype(np.int64)
        if self.labels_kind == "speckled":
            for _ in range(12):
                y, x = rng.integers(self.height), rng.integers(self.width)
                h, w = rng.integers(1, 2 * self.stride + 1, size=2)
                labels[y : y + h, x : x + w] = rng.integers(self.classes)
        return labels

    def _probs(self, rng: Generator, labels: NDArray[np.int64]) -> NDArray[np.float32]:
        shape = (self.classes, self.height, self.width)
        if self.probs_kind == "zero":
            return np.zeros(shape, np.float32)
        if self.probs_kind == "constant":
            return np.full(shape, 1 / self.classes, np.float32)
        if self.probs_kind == "softmax":
            noise = smooth_noise(rng, *shape) * rng.choice([1.0, 3.0, 8.0])
            if self.labels_kind != "argmax":  # labels and probabilities agree in most places
                noise += 3.0 * one_hot(labels, self.classes)
            exp = np.exp(noise - noise.max(axis=0))
            return (exp / exp.sum(axis=0)).astype(np.float32)
        if self.probs_kind == "uniform":
            return smooth_noise(rng, *shape).astype(np.float32).clip(0, 1)
        own = one_hot(labels, self.classes)
        if self.probs_kind == "one-hot":
            return own
        # A class is constant at the threshold, or one float32 below or above it.
        at = np.float32(self.score_thresh)
        levels = np.array([np.nextafter(at, np.float32(0)), at, np.nextafter(at, np.float32(1))])
        return own * rng.choice(levels, self.classes).astype(np.float32)[:, None, None]


class Choices(Protocol):
    """Where a case's numbers come from."""

    def integer(self, low: int, high: int) -> int: ...

    def one_of(self, values: Sequence[Any]) -> Any: ...


class RandomChoices:
    """Uniform choices: rich, ordinary cases."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def integer(self, low: int, high: int) -> int:
        return int(self.rng.integers(low, high + 1))

    def one_of(self, values: Sequence[Any]) -> Any:
        return values[self.rng.integers(len(values))]


class DrawnChoices:
    """Hypothesis' choices: many corners, few regions, and a failing case shrinks."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw

    def integer(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))

    def one_of(self, values: Sequence[Any]) -> Any:
        return self.draw(st.sampled_from(values))


@st.composite
def drawn_cases(draw: st.DrawFn) -> Case:
    """Let hypothesis draw a case."""
    return choose_case(DrawnChoices(draw))


def random_cases(count: int, seed: int) -> list[Case]:
    """Return the same ``count`` cases for the same seed."""
    choices = RandomChoices(seed)
    return [choose_case(choices) for _ in range(count)]


def choose_case(choices: Choices) -> Case:
    """Choose a case; simple values come first, so that a failing case shrinks to them."""
    stride = choices.integer(1, 5)
    labels_kind = choices.one_of(LABELS)
    if labels_kind == "noise":
        height = choices.integer(1, NOISE_SIDE * stride)
        width = choices.integer(1, NOISE_SIDE * stride)
    else:
        height, width = choose_size(choices)
    return Case(
        probs_kind=choices.one_of(PROBS),
        labels_kind=labels_kind,
        classes=choices.one_of([3, 1, 2, 4, 5, 8, 12, 19, 30]),
        height=height,
        width=width,
        patches=choices.integer(0, 3) if labels_kind != "argmax" else 0,
        seed=choices.integer(0, 2**31 - 1),
        score_thresh=choices.one_of([0.0, 0.5, 0.25, 0.1, 0.0, 0.0, 0.0, 0.9]),
        mask_prompt_scale=choices.one_of([8.0, 1.0, 0.3, 20.0, 100.0]),
        pred_iou_thresh=choices.one_of([0.5, 0.55, 0.4, 0.6, 0.65, 0.55, 0.5, 0.6, 0.0, 1.0]),
        stride=stride,
        min_region_area=choices.one_of([1, 1, 1, 1, 2, 5, 16]),
    )


def choose_size(choices: Choices) -> tuple[int, int]:
    """Choose (H, W): a few pixels, a row or column, a thumbnail, or up to 300 long."""
    kind = choices.one_of(["small", "thumbnail", "thumbnail", "thumbnail", "thin", "large"])
    if kind == "thin":
        line = (choices.integer(1, 3), choices.integer(1, 300))
        return line if choices.one_of([True, False]) else line[::-1]
    low, high = {"small": (1, 12), "thumbnail": (13, 90), "large": (91, 300)}[kind]
    height = choices.integer(low, high)
    return height, min(choices.integer(low, high), BIG_PIXELS // height)


def one_hot(labels: NDArray[np.int64], classes: int) -> NDArray[np.float32]:
    """Return (C, H, W) float32."""
    return (labels == np.arange(classes)[:, None, None]).astype(np.float32)


def smooth_noise(rng: Generator, channels: int, height: int, width: int) -> NDArray[np.float32]:
    """Return (channels, H, W) standard normal noise, interpolated from a few cells."""
    cells = rng.integers(2, 7, size=2)
    coarse = torch.from_numpy(rng.normal(size=(1, channels, *cells)).astype(np.float32))
    return F.interpolate(coarse, (height, width), mode="bicubic")[0].numpy()
