"""A bounded sample of labeled pixels, the same for any batch size, order and number of processes.

Which pixels of an image are drawn depends on the image's key alone. Which images are kept if there
are too many depends on the set of keys alone: each key has a random priority, and the lowest ones
stay. So the union of what several processes collected is what one process would have collected.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_samrefine.fusion_weights import FEATURES
from lightning_samrefine.metrics.trimap import valid_pixels
from lightning_samrefine.refine.fusion.features import FeatureMaps
from lightning_samrefine.utils.device import Download, upload

_PIXELS = 3000  # of an image; more of them change weights less than other images do
_MIN_PIXELS = 256
_FEATURE_BYTES = 2  # float16 resolves the logarithms in question to 0.01


@dataclass(frozen=True)
class ImageSample:
    """Labeled pixels of one image, on the CPU.

    Attributes:
        key: Identity of the image.
        group: Images of one group never sit on both sides of a fold; the key if none was given.
        names: The F features.
        features: (F, C, N) float16.
        target: (N,) int16, the true classes in [0, C).
        raw: (N,) int16, the raw label map's values; outside [0, C) no class is predicted.
    """

    key: str
    group: str
    names: tuple[str, ...]
    features: Tensor
    target: Tensor
    raw: Tensor

    def __len__(self) -> int:
        return len(self.target)

    def select(self, names: Sequence[str]) -> Tensor:
        """Return the named features, (F, C, N) float64."""
        return self.features[[self.names.index(name) for name in names]].double()


class PixelSample:
    """Collects pixels of an evaluation's images in one pass, within a bound on memory.

    Args:
        num_classes: C ≥ 1.
        max_images: Maximum number of images kept.
        max_bytes: Maximum memory of all features together. With many classes fewer pixels of an
            image are drawn, at least 256.
    """

    def __init__(
        self, num_classes: int, max_images: int = 256, max_bytes: int = 256_000_000
    ) -> None:
        self.num_classes = num_classes
        self.max_images = max_images
        self.max_bytes = max_bytes
        self._images: dict[str, ImageSample] = {}

    def __len__(self) -> int:
        return len(self._images)

    def __iter__(self) -> Iterator[ImageSample]:
        """Iterate over the images in the order of their priorities, which the keys decide."""
        return (self._images[key] for key in sorted(self._images, key=priority))

    def wants(self, key: str) -> bool:
        """Return whether an image would be kept, before its features are computed."""
        if key in self._images or len(self._images) < self.max_images:
            return key not in self._images
        return priority(key) < max(map(priority, self._images))

    def add(
        self,
        key: str,
        maps: FeatureMaps,
        target: Tensor,
        raw: Tensor,
        group: str | None = None,
        ignore_index: int | None = None,
    ) -> bool:
        """Draw pixels of an image, or ignore it if its key is known or its priority too high.

        On a GPU the CPU waits for the number of labeled pixels and for the features.

        Returns whether it was added; an image without labeled pixels is not.

        Args:
            key: Identity of the image, such as its path or a hash of its pixels.
            maps: The image's features.
            target: (H, W) integer; pixels of ``ignore_index`` or outside [0, C) are not labeled.
            raw: (H, W) integer, the raw label map.
            group: Images of one scene, patient or video share a group; the key if None.
            ignore_index: A value of ``target`` that is not a class, even in [0, C).
        """
        if not self.wants(key):
            return False
        flat = target.flatten()
        labeled = valid_pixels(flat, self.num_classes, ignore_index).nonzero()[:, 0]
        if len(labeled) == 0:
            return False
        rng = np.random.default_rng(priority(key))
        count = min(len(labeled), self._pixels)
        drawn = np.sort(rng.choice(len(labeled), size=count, replace=False))
        pixels = labeled[upload(drawn, labeled.device)]
        known = raw.flatten()[pixels]
        known = torch.where((known >= 0) & (known < self.num_classes), known, -1)
        drawn_pixels = Download(
            maps.at(pixels).half(), flat[pixels].to(torch.int16), known.to(torch.int16)
        )
        own_group = key if group is None else group
        self._keep(ImageSample(key, own_group, FEATURES, *drawn_pixels.tensors()))
        return True

    def merge(self, others: Iterable[ImageSample]) -> None:
        """Add what another process collected, its images in any order."""
        for image in others:
            if self.wants(image.key):
                self._keep(image)

    def _keep(self, image: ImageSample) -> None:
        self._images[image.key] = image
        if len(self._images) > self.max_images:
            del self._images[max(self._images, key=priority)]

    @property
    def _pixels(self) -> int:
        """How many pixels of an image fit, were all ``max_images`` to come."""
        pixel_bytes = len(FEATURES) * self.num_classes * _FEATURE_BYTES
        fits = self.max_bytes // (self.max_images * pixel_bytes)
        return min(_PIXELS, max(_MIN_PIXELS, fits))


def assign_folds(samples: Sequence[ImageSample], count: int) -> np.ndarray:
    """Deal groups of images to folds of nearly equal numbers of groups.

    Which fold a group goes to depends on the set of groups alone, not on the order of the images.

    Args:
        samples: N images.
        count: Number of folds, at least 2; fewer are used if there are fewer groups.

    Returns:
        (N,) int64, the fold of each image.
    """
    groups = sorted({sample.group for sample in samples}, key=priority)
    fold = {group: index % count for index, group in enumerate(groups)}
    return np.array([fold[sample.group] for sample in samples], dtype=np.int64)


def priority(key: str) -> int:
    """Return a number in [0, 2^128) that depends on the key alone, as good as random."""
    check = hashlib.blake2b(key.encode(), digest_size=16)
    return int.from_bytes(check.digest(), "big")
