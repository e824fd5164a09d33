"""The images and regions of an evaluation that the report shows, written to disk one by one.

How they look is in `template.html` and `report.js` beside this module.

Every entry is one JSON object, pictures included, written to a temporary file at once: a process
keeps only a few numbers per image. At the end the other processes' entries
are gathered on rank zero, which writes the report; no folder need be shared.
"""

from __future__ import annotations

import heapq
import json
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from torch import Tensor

from lightning_samrefine.metrics.comparison import ImageComparison
from lightning_samrefine.refine.results import Regions
from lightning_samrefine.reporting.report.thumbnails import image_tiles, region_crop

MAX_IMAGES = 1000
MAX_REGIONS = 32  # of each kind
REGION_KINDS = ("best", "worst", "rejected")


@dataclass(order=True)
class _Place:
    """Where an entry lies, ordered by how much it is worth showing."""

    worth: float
    name: str
    offset: int = field(compare=False)
    length: int = field(compare=False)


class Gallery:
    """Keeps the images that changed the most, and the best, worst and rejected regions.

    Args:
        num_classes: C.
        ignore_index: Target value that is not scored, or None.
        folder: Where the temporary file goes, which has no name and vanishes with the process;
            the system's folder if that cannot be written.
        max_images: Maximum number of images shown, the most changed first.
    """

    def __init__(
        self,
        num_classes: int,
        ignore_index: int | None = None,
        folder: Path | None = None,
        max_images: int = MAX_IMAGES,
    ) -> None:
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.max_images = max_images
        self.images_seen = 0
        self._file = _temporary_file(folder)
        self._end = 0
        self._broken = False
        self._images: list[_Place] = []
        self._regions: dict[str, list[_Place]] = {kind: [] for kind in REGION_KINDS}

    def add(
        self,
        name: str,
        image: Tensor,
        raw: Tensor,
        refined: Tensor,
        target: Tensor,
        regions: Regions,
        found: ImageComparison,
    ) -> None:
        """Add one (3, H, W) uint8 RGB image with its label maps, regions and counts."""
        self.images_seen += 1
        if self._broken:
            return
        fixed, broken, swapped = found.changes.totals()
        # What refinement did in all: an image with as much fixed as broken is worth a look.
        worth = (fixed + broken) / max(int(found.valid.sum()), 1)
        try:
            if _enters(self._images, worth, name, self.max_images):
                tiles = image_tiles(image, raw, refined, target, found.valid, self.num_classes)
                miou = found.mious(self.ignore_index)
                entry = {
                    "name": name,
                    "size": [target.shape[1], target.shape[0]],
                    "raw": _number(miou[0]),
                    "refined": _number(miou[1]),
                    "fixed": fixed,
                    "broken": broken,
                    "swapped": swapped,
                    "tiles": tiles,
                    "regions": [
                        [
                            *map(round, extent),
                            region.class_index,
                            _number(region.pred_iou),
                            region.accepted,
                        ]
                        for region, extent in zip(regions, regions.extents.tolist(), strict=True)
                    ],
                }
                self._keep(self._images, worth, name, _to_json(entry), self.max_images)
            self._add_regions(name, image, target, regions, found)
        except OSError as error:
            self._give_up(name, error)

    def _add_regions(
        self, name: str, image: Tensor, target: Tensor, regions: Regions, found: ImageComparison
    ) -> None:
        scores, changes = found.scores, found.region_changes
        if scores is None or changes is None:
            return
        raw_iou, mask_iou = scores.raw_iou, scores.mask_iou
        for index in scores.measured.nonzero()[:, 0].tolist():
            region = regions[index]
            gain = (mask_iou[index] - raw_iou[index]).item()
            key = f"{name}, region {index}"
            # The rejected ones by what they would have changed, for better or worse.
            kinds = {"best": gain, "worst": -gain} if region.accepted else {"rejected": abs(gain)}
            for kind, worth in kinds.items():
                places = self._regions[kind]
                if (kind != "rejected" and worth <= 0) or not _enters(
                    places, worth, key, MAX_REGIONS
                ):
                    continue
                fixed, broken, _ = changes[index].tolist()
                entry = {
                    "name": name,
                    "kind": kind,
                    "class": region.class_index,
                    "pred": _number(region.pred_iou),
                    "before": _number(raw_iou[index].item()),
                    "after": _number(mask_iou[index].item()),
                    "fixed": fixed,
                    "broken": broken,
                    "crop": region_crop(image, target, found.valid, regions, index),
                }
                self._keep(places, worth, key, _to_json(entry), MAX_REGIONS)

    def images(self) -> Iterator[str]:
        """Yield the images' JSON objects, the most changed first."""
        return self._read(self._images)

    def regions(self) -> Iterator[str]:
        """Yield the regions' JSON objects, kind by kind, the most extreme first."""
        for kind in REGION_KINDS:
            yield from self._read(self._regions[kind])

    def export(self) -> dict[str, Any]:
        """Return everything that is kept, for another process."""
        return {
            "images_seen": self.images_seen,
            "images": self._export(self._images),
            "regions": {kind: self._export(places) for kind, places in self._regions.items()},
        }

    def absorb(self, exported: dict[str, Any]) -> None:
        """Add what another process exported."""
        self.images_seen += exported["images_seen"]
        try:
            for worth, name, text in exported["images"]:
                self._keep(self._images, worth, name, text, self.max_images)
            for kind, entries in exported["regions"].items():
                for worth, name, text in entries:
                    self._keep(self._regions[kind], worth, name, text, MAX_REGIONS)
        except OSError as error:
            self._give_up("another process", error)

    def _give_up(self, name: str, error: OSError) -> None:
        """Stop adding images: a full disk must not end the run."""
        self._broken = True
        message = f"the report shows no image from {name} on ({error})"
        warnings.warn(f"SAMRefineCallback: {message}", RuntimeWarning, stacklevel=3)

    def close(self) -> None:
        """Free the disk's space."""
        self._file.close()

    def _export(self, places: list[_Place]) -> list[tuple[float, str, str]]:
        ranked = sorted(places, reverse=True)
        texts = self._read(places)
        return [(place.worth, place.name, text) for place, text in zip(ranked, texts, strict=True)]

    def _read(self, places: list[_Place]) -> Iterator[str]:
        for place in sorted(places, reverse=True):
            self._file.seek(place.offset)
            yield self._file.read(place.length).decode("ascii")

    def _keep(self, places: list[_Place], worth: float, name: str, text: str, most: int) -> None:
        if not _enters(places, worth, name, most):
            return
        data = text.encode("ascii")
        # An entry that is dropped leaves its place to the new one if that fits.
        left = heapq.heappop(places) if len(places) >= most else None
        offset = left.offset if left is not None and left.length >= len(data) else self._end
        self._file.seek(offset)
        self._file.write(data)
        self._end = max(self._end, offset + len(data))
        heapq.heappush(places, _Place(worth, name, offset, len(data)))


def _enters(places: list[_Place], worth: float, name: str, most: int) -> bool:
    if most == 0:
        return False
    return len(places) < most or places[0] < _Place(worth, name, 0, 0)


def _temporary_file(folder: Path | None) -> BinaryIO:
    try:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryFile(dir=folder)
    except OSError:
        return tempfile.TemporaryFile()


def _number(value: float) -> float | None:
    return round(value, 4) if np.isfinite(value) else None


def _to_json(entry: dict[str, Any]) -> str:
    # Escaped for a script element: neither "</script>" nor "<!--" can end it.
    text = json.dumps(entry, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c")
