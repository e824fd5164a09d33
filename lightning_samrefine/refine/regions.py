"""From a label map to regions with boxes, points and scores (docs/algorithm4.md, steps 1 to 3)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import cc3d
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_samrefine.refine.clicks import click_positions
from lightning_samrefine.refine.raw_prediction import labels_at
from lightning_samrefine.utils.device import Download, upload
from lightning_samrefine.utils.validation import check_range


@dataclass(frozen=True)
class RegionSet:
    """N regions on the (h_d, w_d) working grid, by class, then by first pixel in row-major order.

    Attributes:
        classes: (N,) int64 in [0, C).
        boxes: (N, 4) float64 on the grid, (x_min, y_min, x_max, y_max), all inclusive.
        points: (N, 2) float64 XY, the grid pixel of the region whose probability is the largest.
        scores: (N,) float32 in [0, 1], the mean of L_d[c] over the region.
        components: (h_d, w_d) uint32, the id of the component each pixel belongs to, 0 for none.
        component_ids: (N,) int64, the id of each region in ``components``. Components that were
            dropped have ids of their own and no region.
        probs: (C, h_d, w_d) float32, L_d, on the device of the prediction.
        left_out: Number of regions that ``max_regions`` left out.
    """

    classes: np.ndarray
    boxes: np.ndarray
    points: np.ndarray
    scores: np.ndarray
    components: np.ndarray
    component_ids: np.ndarray
    probs: Tensor
    left_out: int = 0

    def __len__(self) -> int:
        return len(self.classes)

    def select(self, selected: np.ndarray) -> RegionSet:
        """Keep the (N,) bool selected regions in their order."""
        rows = ("classes", "boxes", "points", "scores", "component_ids")
        return replace(self, **{name: getattr(self, name)[selected] for name in rows})

    def larger_than(self, side: float) -> RegionSet:
        """Keep the regions with two pixels farther apart than this, in columns or rows."""
        if side <= 0:
            return self
        distances = self.boxes[:, 2:] - self.boxes[:, :2]
        return self.select((distances > side).any(axis=1))

    def without_maps(self) -> RegionSet:
        """Drop the maps of components and probabilities."""
        unused = np.broadcast_to(np.zeros(1, np.uint32), self.components.shape)
        return replace(self, components=unused, probs=self.probs.new_empty(0))

    def mask_of(self, selected: np.ndarray) -> Tensor:
        """Return the union of the (N,) bool selected regions, (h_d, w_d) bool on SAM's device."""
        table = np.zeros(int(self.components.max()) + 1, dtype=bool)
        table[self.component_ids[selected]] = True
        return upload(table[self.components], self.probs.device)

    def relative_points(self) -> Tensor:
        """Return (N, 2) float32 XY on the CPU, the pixels' centers as fractions of the sides."""
        height, width = self.components.shape
        return torch.from_numpy((self.points + 0.5) / [width, height]).float()


def begin_split(
    labels: Tensor | None,
    probs: Tensor,
    score_thresh: float,
    stride: int,
    min_region_area: int,
    max_regions: int | None = None,
) -> PendingSplit:
    """Begin to find the regions of a raw prediction (docs/algorithm4.md, steps 1 to 3).

    From CUDA the grid's labels and their probabilities begin to travel to the CPU without a wait:
    splits of several images can be begun before the first is finished.

    Args:
        labels: (H, W) int64, S; the argmax of ``probs`` if None. Values outside [0, C) are unknown.
        probs: (C, H, W) float32 in [0, 1], L.
        score_thresh: τ_c in [0, 1).
        stride: r ≥ 1.
        min_region_area: Smallest area in grid pixels that is kept.
        max_regions: Maximum number of regions (largest first; of equal ones the one whose first
            pixel comes first in row-major order). None keeps all.
    """
    num_classes = probs.shape[0]
    labels_d, probs_d = _downsample(labels, probs, stride)
    if score_thresh > 0:
        # A class whose probability is below the threshold everywhere has no region, even at pixels
        # that another class keeps above it.
        skipped = F.pad(probs_d.amax(dim=(1, 2)) < score_thresh, (0, 1))
        unsure = (probs_d.amax(dim=0) < score_thresh) | skipped[labels_d]
        labels_d = labels_d.masked_fill(unsure, num_classes)
    own = probs_d.gather(0, labels_d.clamp(max=num_classes - 1)[None])[0]
    # Background is 0 for cc3d, hence the unknown class moves there and the others up.
    shifted = ((labels_d + 1) % (num_classes + 1)).to(torch.int32)
    extremes = torch.stack(torch.aminmax(probs))
    return PendingSplit(Download(shifted, own, extremes), probs_d, min_region_area, max_regions)


@dataclass(frozen=True)
class PendingSplit:
    """A split whose working grid is on its way to the CPU; made by `begin_split`.

    Attributes:
        arrays: (h_d, w_d) int32 classes + 1, 0 for unknown; the class's probability, float32; (2,)
            the smallest and the largest probability of the whole image.
        probs: (C, h_d, w_d) float32, L_d.
        min_region_area: As in `begin_split`.
        max_regions: As in `begin_split`.
    """

    arrays: Download
    probs: Tensor
    min_region_area: int
    max_regions: int | None

    def finish(self) -> RegionSet:
        """Wait for this image's grid alone and split it on the CPU.

        The components of all classes are found in one pass over the grid; the rest works on the
        runs of equal component along the rows.

        Raises:
            ValueError: Probabilities outside [0, 1], NaN included.
        """
        grid, own_probs, extremes = self.arrays.wait()
        check_range(*extremes.tolist())
        components, count = cc3d.connected_components(
            grid.view(np.uint32), connectivity=8, return_N=True, out_dtype=np.uint32
        )
        runs = _Runs.of(components)
        first, area, sums = runs.first(count), runs.area(count), runs.sums(own_probs, count)
        scores = (sums / np.maximum(area, 1)).astype(np.float32)
        ids = 1 + np.flatnonzero(area[1:] >= self.min_region_area)
        found = len(ids)
        if self.max_regions is not None and found > self.max_regions:
            ids = ids[np.lexsort((first[ids], -area[ids]))[: self.max_regions]]
        ids = ids[np.lexsort((first[ids], grid.ravel()[first[ids]]))]
        positions = click_positions(own_probs, runs.starts, runs.lengths, runs.components, ids)
        y, x = np.divmod(positions, runs.width)
        return RegionSet(
            classes=grid.ravel()[first[ids]].astype(np.int64) - 1,
            boxes=runs.boxes(count)[ids],
            points=np.stack([x, y], axis=1).astype(np.float64),
            scores=scores[ids],
            components=components,
            component_ids=ids,
            probs=self.probs,
            left_out=found - len(ids),
        )


def grid_shape(height: int, width: int, stride: int) -> tuple[int, int]:
    """Return (h_d, w_d) = (⌊H/r⌋, ⌊W/r⌋), at least 1 each (step 1)."""
    return max(1, height // stride), max(1, width // stride)


def _downsample(labels: Tensor | None, probs: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """Return S_d (int64, unknown = C) and L_d (float32) on the grid (steps 1 and 2)."""
    num_classes, *image_hw = probs.shape
    size = grid_shape(image_hw[0], image_hw[1], stride)
    rows, columns = (
        _nearest(source, target, probs.device)
        for source, target in zip(image_hw, size, strict=True)
    )
    labels_d = labels_at(labels, probs, rows, columns)
    unknown = (labels_d < 0) | (labels_d >= num_classes)
    probs_d = F.interpolate(probs[None], size, mode="bilinear", align_corners=False)[0]
    return labels_d.masked_fill_(unknown, num_classes), probs_d


@lru_cache(maxsize=64)
def _nearest(source: int, target: int, device: torch.device) -> Tensor:
    """Return the (target,) int64 source pixels of torch's own nearest-neighbor resize."""
    # In float32, for torch places the pixels by the data's type; it is exact for a side's indices.
    indices = torch.arange(source, dtype=torch.float32, device=device)
    return F.interpolate(indices[None, None], target, mode="nearest")[0, 0].to(torch.int64)


@dataclass(frozen=True)
class _Runs:
    """Runs of equal component along the rows of a grid, in row-major order.

    Attributes:
        starts: (R,) int64, flat position of each run's first pixel.
        lengths: (R,) int64 in pixels.
        components: (R,) int64, component id of each run.
        width: w_d.
    """

    starts: np.ndarray
    lengths: np.ndarray
    components: np.ndarray
    width: int

    @classmethod
    def of(cls, components: np.ndarray) -> _Runs:
        """Split (h_d, w_d) component ids into runs."""
        begins = np.ones(components.shape, dtype=bool)
        np.not_equal(components[:, 1:], components[:, :-1], out=begins[:, 1:])
        starts = np.flatnonzero(begins)
        lengths = np.diff(starts, append=components.size)
        ids = components.ravel()[starts].astype(np.int64)
        return cls(starts, lengths, ids, components.shape[1])

    def first(self, count: int) -> np.ndarray:
        """Return (count + 1,) int64, the first flat position of each component."""
        first = np.full(count + 1, np.iinfo(np.int64).max)
        np.minimum.at(first, self.components, self.starts)
        return first

    def area(self, count: int) -> np.ndarray:
        """Return (count + 1,) float64, the pixels of each component: whole numbers."""
        return np.bincount(self.components, weights=self.lengths, minlength=count + 1)

    def sums(self, values: np.ndarray, count: int) -> np.ndarray:
        """Return (count + 1,) float64, the sum of (h_d, w_d) float32 values over each component.

        float64 keeps the mean of equal values at exactly that value.
        """
        sums = np.add.reduceat(values.ravel(), self.starts, dtype=np.float64)
        return np.bincount(self.components, weights=sums, minlength=count + 1)

    def boxes(self, count: int) -> np.ndarray:
        """Return (count + 1, 4) float64 XYXY boxes with inclusive ends, one for each component."""
        y, x = np.divmod(self.starts, self.width)
        low = np.full((2, count + 1), np.inf)
        high = np.zeros((2, count + 1))
        for axis, (start, end) in enumerate(((x, x + self.lengths - 1), (y, y))):
            np.minimum.at(low[axis], self.components, start)
            np.maximum.at(high[axis], self.components, end)
        return np.concatenate([low, high]).T
