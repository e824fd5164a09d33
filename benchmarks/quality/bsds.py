"""A second data set of photographs: BSDS500's human segmentations as label maps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.camvid.data import VOID

IMAGES = "bsds500/val"
SEGMENTATIONS = "bsds500/groundtruth_val.npz"


def bsds_images(root: Path, every: int, multiple: int) -> list[tuple[Tensor, Tensor]]:
    """Read every n-th image with what its first annotator drew.

    The segments have no classes. They get `VOID` of them, by their rank in area, so that large
    neighbors differ; small neighbors of one class count as one region.

    Args:
        root: The data folder.
        every: n.
        multiple: Sides are cut, right and below, to multiples of it.

    Returns:
        Images (3, H, W) uint8 RGB and labels (H, W) int64 in [0, `VOID`).
    """
    found = []
    with np.load(root / SEGMENTATIONS) as segmentations:
        for path in sorted((root / IMAGES).glob("*.jpg"))[::every]:
            segments = segmentations[f"{path.stem}_0"]
            height, width = (side // multiple * multiple for side in segments.shape)
            segments = segments[:height, :width]
            ids, inverse, areas = np.unique(segments, return_inverse=True, return_counts=True)
            ranks = np.empty(len(ids), dtype=np.int64)
            ranks[np.argsort(-areas, kind="stable")] = np.arange(len(ids))
            labels = torch.from_numpy(ranks[inverse].reshape(segments.shape) % VOID)
            image = np.asarray(Image.open(path).convert("RGB"))[:height, :width]
            found.append((torch.from_numpy(image.copy()).permute(2, 0, 1).contiguous(), labels))
    return found
