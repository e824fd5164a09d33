"""What SAM predicts for images: looks at them, whole or window by window.

split → prompt → predict, with the types `RawPrediction`, `RegionSet`, `Prompts`, `MaskPredictions`
(docs/algorithm4.md, steps 0 to 7).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import Tensor

from lightning_samrefine.config import RefineConfig
from lightning_samrefine.models.base import Embedding, Promptable
from lightning_samrefine.models.transforms import get_preprocess_shape
from lightning_samrefine.refine.cache.cached_sam import CachedSam
from lightning_samrefine.refine.cache.embedding_cache import EmbeddingCache
from lightning_samrefine.refine.class_filter import regions_of_refined_classes
from lightning_samrefine.refine.decode import (
    Decoded,
    decode_prompts,
    decodes_jointly,
    encode_images,
    images_at_once,
    prompts_at_once,
)
from lightning_samrefine.refine.mask_predictions import (
    ImagePredictions,
    MaskPredictions,
    WindowPredictions,
)
from lightning_samrefine.refine.mask_proposals import CompressedMasks, MaskProposals, propose_masks
from lightning_samrefine.refine.prompts import build_prompts
from lightning_samrefine.refine.raw_prediction import RawPrediction
from lightning_samrefine.refine.regions import PendingSplit, RegionSet, begin_split
from lightning_samrefine.refine.windows import Window, split_windows, window_side
from lightning_samrefine.utils.memory import ChunkSize
from lightning_samrefine.utils.precision import autocast, autocast_dtype

_log = logging.getLogger(__name__)

# On a GPU, which encodes and decodes them together.
_WINDOWS_AT_ONCE = 8


class MaskPredictor:
    """Prompts SAM with the regions of images and with a grid of points.

    Args:
        sam: The model.
        precision: As for `Refiner`.
        cache: Keeps embeddings and mask proposals, None for none.
    """

    def __init__(self, sam: Promptable, precision: str, cache: EmbeddingCache | None) -> None:
        self._sam, self._precision, self._cache = sam, precision, cache
        self._model = sam if cache is None else CachedSam(sam, cache)
        self._prompts_at_once, self._images_at_once = ChunkSize(), ChunkSize()
        self._warned_of_left_out = False

    def __call__(
        self, read: Sequence[RawPrediction], config: RefineConfig
    ) -> Iterator[ImagePredictions]:
        """Predict masks on B images, as `Refiner.predict` does.

        Args:
            read: B of them.
            config: The thresholds, possible for the model.
        """
        sides = [window_side(config, self._sam, raw.image_hw) for raw in read]
        if any(sides):
            return self._one_by_one(read, sides, config)
        return self._look(read, config)

    def _autocast(self) -> AbstractContextManager[None]:
        device = self._sam.device
        return autocast(autocast_dtype(self._precision, device), device)

    @torch.no_grad()
    def _one_by_one(
        self, read: Sequence[RawPrediction], sides: Sequence[int | None], config: RefineConfig
    ) -> Iterator[ImagePredictions]:
        """Look at images one after another; a side of None means the whole image at once."""
        for raw, side in zip(read, sides, strict=True):
            if side is None:
                yield from self._look([raw], config)
            else:
                yield self._look_through_windows(raw, side, config)

    def _look_through_windows(
        self, raw: RawPrediction, side: int, config: RefineConfig
    ) -> WindowPredictions:
        """Look at the windows of an image, and at the whole image for regions larger than these."""
        windows = split_windows(raw.image_hw, side, config.window_overlap)
        digests = None if self._cache is None else self._cache.digests([raw.image])
        at_once = _WINDOWS_AT_ONCE if self._sam.device.type == "cuda" else 1
        looks: list[MaskPredictions] = []
        for start in range(0, len(windows), at_once):
            part = windows[start : start + at_once]
            # The image is hashed once; their places distinguish its windows.
            keys = None if digests is None else [f"{digests[0]} {tuple(own)}" for own in part]
            found = self._look([raw.part(own) for own in part], config, keys)
            for own, look in zip(part, found, strict=True):
                looks.append(_lightened(look, raw.part(own), own))
        small = raw.resized(get_preprocess_shape(*raw.image_hw, self._sam.image_size))
        whole = Window(0, 0, *raw.image_hw)
        (look,) = self._look([small], config, larger_than=side * small.image_hw[0] / whole.height)
        if len(look.regions) > 0:
            looks.append(_lightened(look, small, whole))
        return WindowPredictions(
            raw,
            tuple(looks),
            windows=len(windows),
            overlap=round(side * config.window_overlap),
            digest=None if digests is None else digests[0],
        )

    def _look(
        self,
        read: Sequence[RawPrediction],
        config: RefineConfig,
        digests: Sequence[str] | None = None,
        larger_than: float = 0,
    ) -> Iterator[MaskPredictions]:
        """Look at images, or parts of one, as `predict` does.

        Args:
            read: B of them.
            config: The thresholds.
            digests: Tell the images apart in a cache; None hashes them.
            larger_than: Regions with no side above it, in pixels, are left out.
        """
        # All begin before the first is waited for.
        splits = [
            begin_split(
                raw.given_labels,
                raw.probs,
                config.score_thresh,
                config.stride,
                config.min_region_area,
                config.max_regions,
            )
            for raw in read
        ]
        with self._autocast():
            regions, embeddings = self._split_and_encode(read, splits, config, digests, larger_than)
            self._warn_of_left_out(regions)
            proposals = self._propose(read, embeddings, config)
        return self._decode(read, regions, embeddings, proposals, config)

    def _split_and_encode(
        self,
        read: Sequence[RawPrediction],
        splits: Sequence[PendingSplit],
        config: RefineConfig,
        digests: Sequence[str] | None,
        larger_than: float,
    ) -> tuple[list[RegionSet], dict[int, Embedding]]:
        """Find every image's regions, and encode the images that have any.

        Returns:
            B sets of regions, and the embeddings by the images' indices. Without a region an image
            is not encoded (step 4).
        """
        regions: list[RegionSet] = []
        embeddings: dict[int, Embedding] = {}
        at_once = images_at_once(self._sam.device, len(splits))
        for start in range(0, len(splits), at_once):
            part = range(start, min(start + at_once, len(splits)))
            for i in part:
                found = regions_of_refined_classes(splits[i].finish(), config.classes)
                regions.append(found.larger_than(larger_than / config.stride))
            chosen = [i for i in part if len(regions[i]) > 0]
            if chosen:
                images = [read[i].image for i in chosen]
                known = None if digests is None else [digests[i] for i in chosen]
                embeddings.update(zip(chosen, self._encode(images, known, config), strict=True))
        return regions, embeddings

    def _encode(
        self, images: Sequence[Tensor], digests: Sequence[str] | None, config: RefineConfig
    ) -> list[Embedding]:
        padding = config.encode_padding
        if digests is not None and isinstance(self._model, CachedSam):
            return self._model.encode_images(images, padding, digests)
        return encode_images(self._model, images, self._images_at_once, padding)

    def _warn_of_left_out(self, regions: Sequence[RegionSet]) -> None:
        worst = max(regions, key=lambda found: found.left_out, default=None)
        if worst is None or worst.left_out == 0 or self._warned_of_left_out:
            return
        self._warned_of_left_out = True
        _log.warning(
            "An image or window has %d regions; the largest %d are prompted (max_regions), the "
            "others keep their raw prediction. Further such images are not reported.",
            len(worst) + worst.left_out,
            len(worst),
        )

    def _propose(
        self,
        read: Sequence[RawPrediction],
        embeddings: Mapping[int, Embedding],
        config: RefineConfig,
    ) -> dict[int, MaskProposals]:
        """Return the mask proposals of the encoded images by their indices."""
        if not config.points_per_side or not embeddings:
            return {}
        settings = (config.points_per_side, self._batch_size(config), self._prompts_at_once)
        hws = [read[i].image_hw for i in embeddings]
        looked_at = list(embeddings.values())
        if isinstance(self._model, CachedSam):
            proposals = self._model.propose_masks(looked_at, hws, *settings)
        else:
            proposals = [
                propose_masks(self._model, embedding, image_hw, *settings)
                for embedding, image_hw in zip(looked_at, hws, strict=True)
            ]
        return dict(zip(embeddings, proposals, strict=True))

    @torch.no_grad()
    def _decode(
        self,
        read: Sequence[RawPrediction],
        regions: list[RegionSet],
        embeddings: Mapping[int, Embedding],
        proposals: Mapping[int, MaskProposals],
        config: RefineConfig,
    ) -> Iterator[MaskPredictions]:
        """Prompt with the images' regions (steps 5 to 7); without a region SAM is not used."""
        at_once = len(read) if decodes_jointly(self._sam, config) else 1
        for start in range(0, len(read), at_once):
            part = range(start, min(start + at_once, len(read)))
            prompted = [i for i in part if config.prompt_regions and i in embeddings]
            prompts = [
                build_prompts(regions[i], self._sam, read[i].image_hw, config) for i in prompted
            ]
            mask_hws = [self._sam.mask_hw(read[i].image_hw) for i in prompted]
            with self._autocast():
                outputs = decode_prompts(
                    self._model,
                    [embeddings[i] for i in prompted],
                    prompts,
                    self._batch_size(config),
                    self._prompts_at_once,
                    mask_hws if config.unsupported_weight else None,
                )
            decoded = dict(zip(prompted, outputs, strict=True))
            for i in part:
                own = decoded.pop(i, None) or Decoded(torch.zeros(len(regions[i])))
                if config.unsupported_weight:
                    # Only Algorithm 4 needs the maps, a quarter of the probabilities' memory.
                    regions[i] = regions[i].without_maps()
                yield MaskPredictions(
                    raw=read[i],
                    regions=regions[i],
                    pred_iou=own.pred_iou,
                    low_res_logits=own.low_res_logits,
                    region_masks=own.packed,
                    mask_proposals=proposals.get(i),
                    digest=embeddings[i].digest if self._cache and i in embeddings else None,
                )

    def _batch_size(self, config: RefineConfig) -> int:
        return config.max_prompts_per_batch or prompts_at_once(self._sam.device)


def _lightened(look: MaskPredictions, raw: RawPrediction, window: Window) -> MaskPredictions:
    """Place a look in its image, its masks compressed: those of all windows are thousands."""
    masks = look.region_masks
    # On a GPU the CPU would have to wait for them.
    if isinstance(masks, MaskProposals) and masks.packed.device.type == "cpu":
        masks = CompressedMasks.of(masks)
    return replace(look, raw=raw, window=window, region_masks=masks)
