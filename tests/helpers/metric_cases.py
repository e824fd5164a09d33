"""Random label maps for the metrics' tests, and slow definitions to compare with."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import strategies as st
from scipy import ndimage

SQUARE = np.ones((3, 3), dtype=bool)


@st.composite
def label_maps(draw, stray=True, largest=14):
    """Draw (C, ignore_index, raw, refined, target): 1-pixel and all-ignored maps included."""
    num_classes = draw(st.integers(2, 6))
    height, width = draw(st.integers(1, largest)), draw(st.integers(1, largest))
    ignore_index = draw(st.sampled_from([None, 255, -1, 0, num_classes - 1]))
    # Fewer classes on the map than there are, so that some are absent.
    present = draw(st.integers(1, num_classes))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    cell = draw(st.sampled_from([1, 3]))  # noise, or patches with an inside
    shape = (3, -(-height // cell), -(-width // cell))
    maps = torch.randint(0, present, shape, generator=generator)
    maps = maps.repeat_interleave(cell, 1).repeat_interleave(cell, 2)[:, :height, :width]
    raw, refined, target = maps.clone()
    same = torch.rand(height, width, generator=generator) < draw(st.sampled_from([0, 0.5, 1]))
    refined = torch.where(same, raw, refined)
    ignored = torch.rand(height, width, generator=generator) < draw(st.sampled_from([0, 0.3, 1]))
    if ignore_index is not None:
        target[ignored] = ignore_index
    if stray:
        for prediction in (raw, refined):
            prediction[torch.rand(height, width, generator=generator) < 0.15] = 255
        target[torch.rand(height, width, generator=generator) < 0.1] = num_classes + 3
    return num_classes, ignore_index, raw, refined, target


def scored(target, num_classes, ignore_index):
    """Return a bool array, pixel by pixel."""
    return np.array(
        [[0 <= v < num_classes and v != ignore_index for v in row] for row in target.tolist()],
        dtype=bool,
    ).reshape(target.shape)


def loop_iou(prediction, target, num_classes, ignore_index, where=None):
    """Intersection over union, pixel by pixel and class by class."""
    hits, union = np.zeros(num_classes), np.zeros(num_classes)
    for index in np.ndindex(target.shape):
        truth, guess = int(target[index]), int(prediction[index])
        if truth == ignore_index or not 0 <= truth < num_classes:
            continue
        if where is not None and not where[index]:
            continue
        for c in range(num_classes):
            hits[c] += truth == c and guess == c
            union[c] += truth == c or guess == c
    if ignore_index is not None and 0 <= ignore_index < num_classes:
        union[ignore_index] = 0
    return np.array([h / u if u else math.nan for h, u in zip(hits, union, strict=True)])


def loop_band(target, width, num_classes, ignore_index):
    """Look at every pixel's window."""
    height, columns = target.shape
    valid = scored(target, num_classes, ignore_index)
    band = np.zeros(target.shape, dtype=bool)
    for y, x in np.ndindex(height, columns):
        if valid[y, x]:
            band[y, x] = any(
                valid[v, u] and target[v, u] != target[y, x]
                for v in range(max(0, y - width), min(height, y + width + 1))
                for u in range(max(0, x - width), min(columns, x + width + 1))
            )
    return band


def mask_to_boundary(mask, known, distance):
    """Take away from a mask what ``distance`` erosions by 3×3 leave (Cheng et al., CVPR 2021).

    The authors pad the image by a frame of background before they erode. Ignored pixels are new
    here: they erode nothing, hence they go along with the mask, and are taken out at the end.
    """
    padded = np.pad(mask | ~known, 1, constant_values=False)
    eroded = ndimage.binary_erosion(padded, SQUARE, iterations=distance, border_value=1)
    return mask & ~eroded[1:-1, 1:-1]


def paper_boundary_iou(prediction, target, known, c, distance):
    """Return the numerator and denominator of eq. 1 for one class of one image."""
    truth_band = mask_to_boundary((target == c) & known, known, distance)
    band = mask_to_boundary((prediction == c) & known, known, distance)
    return (truth_band & band).sum(), (truth_band | band).sum()


def edge_of(labels, known, c):
    """Return the known pixels of a class that have a known neighbor of another label."""
    others = ndimage.binary_dilation((labels != c) & known, SQUARE)
    return (labels == c) & known & others


def edge_counts(prediction, target, known, c, distance):
    """Return predicted and true edge pixels, and how many of each the other side has near."""
    edges = [edge_of(labels, known, c) for labels in (prediction, target)]
    grown = [
        ndimage.binary_dilation(edge, SQUARE, iterations=distance) if edge.any() else edge
        for edge in edges
    ]
    return (
        edges[0].sum(),
        (edges[0] & grown[1]).sum(),
        edges[1].sum(),
        (edges[1] & grown[0]).sum(),
    )
