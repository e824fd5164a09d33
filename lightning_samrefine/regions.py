"""SplitRegions: from a label map to regions, their boxes, points and scores (steps 1 to 3)."""

from __future__ import annotations

from dataclasses import dataclass

import cc3d
import edt
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_samrefine.geometry import grid_shape


@dataclass(frozen=True)
class GridRegions:
    """N regions on the (h_d, w_d) working grid, by class, then by first pixel in row-major order.

    Attributes:
        classes: (N,) int64 in [0, C).
        boxes: (N, 4) float64 XYXY on the grid, exclusive ends.
        points: (N, 2) float64 XY on the grid, pixel centres.
        scores: (N,) float32 in [0, 1], the mean of L_d[c] over the region.
        components: (h_d, w_d) int64 on the device of the prediction; the id of the component
            each pixel belongs to, 0 for none.
        component_ids: (N,) int64, the id of each region in ``components``. Components that were
            dropped have ids of their own and no region.
        probs: (C, h_d, w_d) float32, L_d.
    """

    classes: np.ndarray
    boxes: np.ndarray
    points: np.ndarray
    scores: np.ndarray
    components: Tensor
    component_ids: np.ndarray
    probs: Tensor

    def __len__(self) -> int:
        return len(self.classes)

    def mask_of(self, selected: np.ndarray) -> Tensor:
        """Return the union of the selected regions on the grid.

        Args:
            selected: (N,) bool.

        Returns:
            (h_d, w_d) bool on the device of ``components``.
        """
        table = torch.zeros(int(self.components.max()) + 1, dtype=torch.bool)
        table[torch.from_numpy(self.component_ids[selected])] = True
        return table.to(self.components.device)[self.components]


def split_regions(
    labels: Tensor, probs: Tensor, score_thresh: float, stride: int, min_region_area: int
) -> GridRegions:
    """Find the regions of a raw prediction (ALGORITHM.md steps 1 to 3).

    Only the label map of the grid travels to the CPU, where all classes' components are found in
    one pass, and all regions' distance transforms in another.

    Args:
        labels: (H, W) int64, S. Values outside [0, C) are unknown.
        probs: (C, H, W) float32 in [0, 1], L.
        score_thresh: τ_c in [0, 1).
        stride: r ≥ 1.
        min_region_area: Smallest area in grid pixels that is kept.
    """
    labels_d, probs_d = _downsample(labels, probs, stride)
    num_classes = probs.shape[0]
    if score_thresh > 0:
        labels_d = labels_d.masked_fill(probs_d.amax(dim=0) < score_thresh, num_classes)

    # Background is 0 for cc3d and edt, hence the unknown class moves there and the others up.
    grid = ((labels_d + 1) % (num_classes + 1)).to(torch.int32).cpu().numpy().astype(np.uint32)
    components, count = cc3d.connected_components(
        grid, connectivity=8, return_N=True, out_dtype=np.uint32
    )
    components_d = torch.from_numpy(components.astype(np.int64)).to(probs.device)
    ids, first = _order(grid, components, count, min_region_area)
    scores = _mean_scores(probs_d, labels_d, components_d, count)[ids]

    kept = scores > np.float32(score_thresh)
    ids, first, scores = ids[kept], first[kept], scores[kept]
    return GridRegions(
        classes=grid.ravel()[first].astype(np.int64) - 1,
        boxes=_boxes(components)[ids],
        points=_interior_points(components, count)[ids],
        scores=scores,
        components=components_d,
        component_ids=ids,
        probs=probs_d,
    )


def _downsample(labels: Tensor, probs: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """Return S_d (int64, unknown = C) and L_d (float32) on the grid (steps 1 and 2)."""
    num_classes = probs.shape[0]
    size = grid_shape(*labels.shape, stride)
    unknown = (labels < 0) | (labels >= num_classes)
    # Classes are exact in float32 once values such as an int64 ignore label are out of the way.
    known = labels.masked_fill(unknown, num_classes).to(torch.float32)
    labels_d = F.interpolate(known[None, None], size, mode="nearest")[0, 0].to(torch.int64)
    probs_d = F.interpolate(probs[None], size, mode="bilinear", align_corners=False)[0]
    return labels_d, probs_d


def _order(
    grid: np.ndarray, components: np.ndarray, count: int, min_region_area: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return ids and first pixels of the large enough components, in the order of step 3."""
    flat = components.ravel()
    first = np.full(count + 1, flat.size, np.int64)
    np.minimum.at(first, flat, np.arange(flat.size))
    area = np.bincount(flat, minlength=count + 1)
    ids = np.flatnonzero(area >= min_region_area)
    ids = ids[ids > 0]
    ids = ids[np.lexsort((first[ids], grid.ravel()[first[ids]]))]
    return ids, first[ids]


def _mean_scores(probs_d: Tensor, labels_d: Tensor, components: Tensor, count: int) -> np.ndarray:
    """Return (count + 1,) float32, the mean of L_d[c] over each component of class c."""
    # MPS has no float64; elsewhere it keeps a region of equal values at exactly that value.
    dtype = torch.float32 if probs_d.device.type == "mps" else torch.float64
    own = labels_d.clamp(max=probs_d.shape[0] - 1)
    values = probs_d.gather(0, own[None])[0].to(dtype).flatten()
    index = components.flatten()
    sums = torch.zeros(count + 1, dtype=dtype, device=index.device).index_add_(0, index, values)
    area = torch.zeros_like(sums).index_add_(0, index, torch.ones_like(values))
    return (sums / area.clamp(min=1)).to(torch.float32).cpu().numpy()


def _boxes(components: np.ndarray) -> np.ndarray:
    """Return (count + 1, 4) float64 XYXY boxes with exclusive ends, one a component id."""
    statistics = cc3d.statistics(components, no_slice_conversion=True)
    rows_and_columns = statistics["bounding_boxes"].astype(np.float64)
    y0, y1, x0, x1 = rows_and_columns.T
    return np.stack([x0, y0, x1 + 1, y1 + 1], axis=1)


def _interior_points(components: np.ndarray, count: int) -> np.ndarray:
    """Return (count + 1, 2) float64 XY, the centre of each component's innermost pixel.

    Innermost is the largest Euclidean distance to the outside of the component, the outside of
    the grid included; ties go to the first pixel in row-major order. Squared distances are whole
    numbers, so distance and position pack into one key that a single maximum decides exactly.
    """
    flat = components.ravel()
    squared = edt.edtsq(components, black_border=True, parallel=1).ravel().astype(np.int64)
    key = squared * flat.size + (flat.size - 1 - np.arange(flat.size))
    best = np.zeros(count + 1, np.int64)
    np.maximum.at(best, flat, key)
    position = flat.size - 1 - best % flat.size
    y, x = np.divmod(position, components.shape[1])
    return np.stack([x + 0.5, y + 0.5], axis=1)
