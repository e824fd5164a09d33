"""A user's own torchmetrics metrics, computed for raw and for refined label maps."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from lightning_samrefine.metrics.comparison import FIGURES_OF_SIDES, SIDES


def parse_metrics(metrics: Metric | MetricCollection | None) -> MetricCollection | None:
    """Return the metrics as a collection, in which a single one has its class's name.

    Raises:
        TypeError: Neither a `Metric` nor a `MetricCollection`.
        ValueError: A metric that does not take label maps, or with the name of a figure of ours.
    """
    if metrics is None:
        return None
    if not isinstance(metrics, Metric | MetricCollection):
        raise TypeError(
            f"metrics must be a torchmetrics Metric or MetricCollection, got {type(metrics)}"
        )
    collection = metrics if isinstance(metrics, MetricCollection) else MetricCollection([metrics])
    for name, metric in collection.items(copy_state=False):
        kind = type(metric).__name__
        # With one-hot inputs a label map's rows would count as classes, without an error.
        if (form := getattr(metric, "input_format", "index")) != "index":
            raise ValueError(
                f"metrics must take label maps, {kind} with input_format='index', got {form!r}"
            )
        if hasattr(metric, "num_labels"):
            raise ValueError(f"metrics must take one class a pixel, got {kind}")
        if hasattr(metric, "thresholds"):  # AUROC and the like; some accept label maps
            raise ValueError(f"metrics must take label maps, got {kind}, which takes probabilities")
        if name in FIGURES_OF_SIDES:
            raise ValueError(
                f"metrics must not have the name of another figure, got {name!r}; "
                f"MetricCollection({{'my_{name}': …}}) gives another"
            )
    return collection


class PairedMetrics(nn.Module):
    """Copies of metrics for the raw and for the refined prediction of the same images.

    They are updated image by image with label maps, (1, H, W) int64, and with the targets as they
    are: which pixels are ignored is each metric's own rule.

    Args:
        metrics: Copied and reset.
        class_names: C names, for metrics that return a value for each class.

    Attributes:
        failed: Whether a later update failed: the sides may differ by an image, and no figure of
            this evaluation is valid.
    """

    def __init__(self, metrics: MetricCollection, class_names: Sequence[str]) -> None:
        super().__init__()
        self.class_names = list(class_names)
        self.sides = nn.ModuleDict({side: metrics.clone() for side in SIDES})
        for side in SIDES:
            self._side(side).reset()
        self.failed = False
        self._proven = False

    def update(self, raw: Tensor, refined: Tensor, target: Tensor) -> None:
        """Add one image.

        Args:
            raw: (H, W) int64.
            refined: (H, W) int64.
            target: (H, W) int64.

        Raises:
            ValueError: A metric fails on the first image, or returns neither numbers nor one value
                for each class. A later failure is a warning.
        """
        if not self._proven:
            self._try(raw[None], target[None])
            self._proven = True
        if self.failed:
            return
        try:
            for side, labels in zip(SIDES, (raw, refined), strict=True):
                self._side(side).update(labels[None], target[None])
        except Exception as error:  # of any metric
            self.failed = True
            message = f"metrics are left out of this evaluation ({type(error).__name__}: {error})"
            warnings.warn(f"SAMRefineCallback: {message}", RuntimeWarning, stacklevel=2)

    def figures(self) -> dict[str, float]:
        """Return ``<name>_raw``, ``<name>_refined`` and ``<name>_gain`` of every metric.

        The gain is positive where refined is better: raw − refined if the metric's
        ``higher_is_better`` is False, else refined − raw. The names of classes follow after a
        ``/``. NaN is left out. A collective call: every process must make it.
        """
        figures: dict[str, float] = {}
        sides = [dict(self._side(side).items()) for side in SIDES]
        for name, metric in sides[0].items():
            sign = -1 if metric.higher_is_better is False else 1
            raw, refined = (self._values(name, side[name].compute()) for side in sides)
            for (stem, ending), value in raw.items():
                other = refined[stem, ending]
                found = (value, other, sign * (other - value))
                for part, figure in zip((*SIDES, "gain"), found, strict=True):
                    figures[f"{stem}_{part}{ending}"] = figure
        return {name: value for name, value in figures.items() if not math.isnan(value)}

    def _try(self, labels: Tensor, target: Tensor) -> None:
        """Compute every metric of one image, on copies and without the other processes."""
        for name, metric in self._side("raw").clone().items(copy_state=False):
            try:
                self._values(name, metric(labels, target))
            except Exception as error:  # of any metric
                raise ValueError(
                    f"metrics must take label maps and targets, (B, H, W) int64, and return a "
                    f"number or one value for each class, got from {name}: "
                    f"{type(error).__name__}: {error}"
                ) from error

    def _values(self, name: str, value: Any) -> dict[tuple[str, str], float]:
        """Return a metric's values by name and ending: ``""``, or ``/`` and the class's name."""
        if isinstance(value, Mapping):
            parts = [self._values(str(key), part) for key, part in value.items()]
            return {key: number for part in parts for key, number in part.items()}
        value = torch.as_tensor(value)
        if value.numel() == 1:
            return {(name, ""): value.item()}
        if value.shape != (len(self.class_names),):
            raise ValueError(f"{name} returned values of shape {tuple(value.shape)}")
        labels = zip(self.class_names, value.tolist(), strict=True)
        return {(name, f"/{label}"): number for label, number in labels}

    def _side(self, side: str) -> MetricCollection:
        return cast(MetricCollection, self.sides[side])
