"""How far does the gain depend on the images drawn? A paired bootstrap of the gain in mIoU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

_CHUNK_BYTES = 4e6
_RESAMPLES, _CONFIDENCE = 2000, 0.95


@dataclass(frozen=True)
class BootstrapInterval:
    """A difference in mIoU and where it would lie for other images of the same kind.

    Attributes:
        gain: mIoU refined − raw over all images, in [-1, 1].
        low: Lower end of the percentile interval.
        high: Upper end.
        confidence: Share of the resamples inside it.
        images: N.
    """

    gain: float
    low: float
    high: float
    confidence: float
    images: int

    @property
    def is_noise(self) -> bool:
        """Whether the interval holds 0, so that neither gain nor loss is certain."""
        return self.low <= 0 <= self.high


def paired_bootstrap(
    raw: np.ndarray,
    refined: np.ndarray,
    *,
    resamples: int = _RESAMPLES,
    confidence: float = _CONFIDENCE,
    seed: int = 0,
    ignore_index: int | None = None,
) -> BootstrapInterval:
    """Bound the gain in mIoU by resampling images, both sides of an image together.

    Efron and Tibshirani, *An Introduction to the Bootstrap*, 1993, chapter 13 (percentile
    interval). mIoU is that of the summed confusion matrix of each resample. As in the mIoU of all
    images, a side's mean is over the classes that occur in the resample's targets or in that
    side's prediction: if one side alone predicts a class that no target has, the two means are over
    different classes.

    Args:
        raw: (N, C, C) or (N, C, C + 1) integer, a confusion matrix an image; rows are the true
            class, a last column C is "no class predicted".
        refined: The same for the refined prediction of the same images, in the same order.
        resamples: How many times N images are drawn with replacement.
        confidence: Share of resamples inside the interval, in (0, 1).
        seed: Of the draws; the same arrays and seed give the same interval.
        ignore_index: A class that is not scored, if it is in [0, C).

    Raises:
        ValueError: Shapes that differ or are no confusion matrices, sides that did not see the
            same targets, no image, or an argument outside its range.
    """
    totals = _image_totals(raw, refined)
    return bootstrap_totals(
        totals, resamples=resamples, confidence=confidence, seed=seed, ignore_index=ignore_index
    )


def bootstrap_totals(
    totals: np.ndarray,
    *,
    resamples: int = _RESAMPLES,
    confidence: float = _CONFIDENCE,
    seed: int = 0,
    ignore_index: int | None = None,
) -> BootstrapInterval:
    """Do as `paired_bootstrap` with the (N, 5, C) array of `ImageTotals.compute`.

    Raises:
        ValueError: No image, or an argument outside its range.
    """
    if len(totals) == 0:
        raise ValueError("totals must have at least one image, got none")
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be a number in (0, 1), got {confidence}")
    scored = np.arange(totals.shape[2]) != (-1 if ignore_index is None else ignore_index)
    totals = totals[:, :, scored]
    found = np.concatenate([mean_gain(sums) for sums in _sums(totals, resamples, seed)])
    found = found[np.isfinite(found)]  # a resample may hold no scored pixel at all
    tail = (1 - confidence) / 2
    low, high = np.quantile(found, [tail, 1 - tail]) if len(found) else (np.nan, np.nan)
    gain = mean_gain(totals.sum(axis=0))
    return BootstrapInterval(float(gain), float(low), float(high), confidence, len(totals))


def bootstrap_class_gains(raw: np.ndarray, refined: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bound each class's gain in IoU as `paired_bootstrap` bounds that in mIoU by default.

    Args:
        raw: As for `paired_bootstrap`.
        refined: As for `paired_bootstrap`.

    Returns:
        Lower and upper ends of the percentile intervals, (C,) float64 each. In a resample without
        a class on a side, its IoU there counts as 0.

    Raises:
        ValueError: As `paired_bootstrap`.
    """
    totals = _image_totals(raw, refined)
    gains = [class_gains(sums) for sums in _sums(totals, _RESAMPLES, seed=0)]
    tail = (1 - _CONFIDENCE) / 2
    low, high = np.quantile(np.concatenate(gains), [tail, 1 - tail], axis=0)
    return low, high


def class_ious(sums: np.ndarray) -> np.ndarray:
    """Return each class's IoU on both sides, (…, 2, C) float64, raw first.

    NaN for a class that neither the targets nor the side's prediction have.

    Args:
        sums: (…, 5, C), sums over images of what `ImageTotals.compute` returns.
    """
    true, raw_hits, raw_predicted, hits, predicted = np.moveaxis(sums, -2, 0)
    with np.errstate(invalid="ignore"):
        raw = raw_hits / (true + raw_predicted - raw_hits)
        refined = hits / (true + predicted - hits)
    return np.stack([raw, refined], axis=-2)


def class_gains(sums: np.ndarray) -> np.ndarray:
    """Return refined − raw IoU of (…, 5, C) sums, (…, C); an absent class has an IoU of 0."""
    ious = np.nan_to_num(class_ious(sums))
    return ious[..., 1, :] - ious[..., 0, :]


def mean_ious(sums: np.ndarray) -> np.ndarray:
    """Return the mIoU of both sides, (…, 2), of (…, 5, C) sums, each over the classes of its side.

    NaN for a side without any class.
    """
    ious = class_ious(sums)
    classes = (~np.isnan(ious)).sum(axis=-1)
    total = np.nan_to_num(ious).sum(axis=-1)
    return np.divide(total, classes, out=np.full(classes.shape, np.nan), where=classes > 0)


def mean_gain(sums: np.ndarray) -> np.ndarray:
    """Return refined − raw mIoU of (…, 5, C) sums, see `mean_ious`."""
    mious = mean_ious(sums)
    return mious[..., 1] - mious[..., 0]


def _image_totals(raw: np.ndarray, refined: np.ndarray) -> np.ndarray:
    """Return the (N, 5, C) totals of two sets of confusion matrices."""
    raw, refined = np.asarray(raw), np.asarray(refined)
    for name, matrices in (("raw", raw), ("refined", refined)):
        if matrices.ndim != 3 or matrices.shape[2] - matrices.shape[1] not in (0, 1):
            raise ValueError(
                f"{name} must have shape (N, C, C) or (N, C, C + 1), got {matrices.shape}"
            )
    if raw.shape != refined.shape:
        raise ValueError(f"refined must have raw's shape {raw.shape}, got {refined.shape}")
    if not np.array_equal(raw.sum(axis=2), refined.sum(axis=2)):
        raise ValueError("refined must be of the same images, got other sums of rows than raw's")
    num_classes = raw.shape[1]
    diagonals = (np.diagonal(matrices, axis1=1, axis2=2) for matrices in (raw, refined))
    raw_hits, refined_hits = diagonals
    return np.stack(
        [
            raw.sum(axis=2),
            raw_hits,
            raw[:, :, :num_classes].sum(axis=1),
            refined_hits,
            refined[:, :, :num_classes].sum(axis=1),
        ],
        axis=1,
    )


def _sums(totals: np.ndarray, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Yield the summed totals of resamples, (R, 5, C) float64, some of them at once."""
    images = len(totals)
    # Counts of pixels are whole numbers below 2^53, so that no order of addition changes a sum.
    flat = totals.reshape(images, -1).astype(np.float64)
    rng = np.random.default_rng(seed)
    chunk = max(1, int(_CHUNK_BYTES / 8 / max(images, flat.shape[1])))
    for start in range(0, resamples, chunk):
        count = min(chunk, resamples - start)
        drawn = rng.integers(images, size=(count, images))
        drawn += np.arange(count)[:, None] * images
        often = np.bincount(drawn.ravel(), minlength=count * images).reshape(count, images)
        yield (often.astype(np.float64) @ flat).reshape(count, *totals.shape[1:])
