"""From an image and a raw prediction to a refined one.

read → split → prompt → predict → fuse, each a step with a type of its own: `RawPrediction`,
`RegionSet`, `Prompts`, `MaskPredictions`, `Refinement`. Algorithm 4, "Optimized SAM Refinement", is
the fusion of `fusion.algorithm4`; with an ``unsupported_weight`` that of `fusion.soft` takes its
place, and with fitted ``weights`` that of `fusion.fitted`. With ``points_per_side`` the masks of
`mask_proposals` take part.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from lightning_samrefine.config import RefineConfig
from lightning_samrefine.fusion_weights import FusionWeights
from lightning_samrefine.models.base import (
    Embedding,
    Promptable,
    accepts_points,
    drop_derived,
    has_multimask_output,
)
from lightning_samrefine.refine.cache.cached_sam import CachedSam
from lightning_samrefine.refine.cache.embedding_cache import EmbeddingCache, make_cache
from lightning_samrefine.refine.class_filter import (
    check_classes,
    regions_of_refined_classes,
    restore_frozen_classes,
)
from lightning_samrefine.refine.decode import (
    Decoded,
    decode_prompts,
    decodes_jointly,
    encode_images,
)
from lightning_samrefine.refine.fusion.algorithm4 import fuse_by_algorithm4
from lightning_samrefine.refine.fusion.fitted import fuse_fitted
from lightning_samrefine.refine.fusion.soft import fuse_soft
from lightning_samrefine.refine.mask_predictions import MaskPredictions
from lightning_samrefine.refine.mask_proposals import MaskProposals, propose_masks_of_images
from lightning_samrefine.refine.prompts import build_prompts
from lightning_samrefine.refine.raw_prediction import RawPrediction, read_predictions
from lightning_samrefine.refine.regions import PendingSplit, RegionSet, begin_split
from lightning_samrefine.refine.results import Refinement
from lightning_samrefine.utils.memory import ChunkSize, images_at_once, prompts_at_once
from lightning_samrefine.utils.precision import autocast, autocast_dtype

_log = logging.getLogger(__name__)


class Refiner:
    """Refines the masks of any semantic segmenter with a promptable model.

    SAM runs without gradients under an autocast of its own; thresholds and fusion are float32.
    On CUDA the CPU waits for an image twice, however many regions it has: for its label map on the
    working grid, which it splits (without a cache while the GPU encodes the image before it in the
    batch), and for SAM's predicted IoUs, once a batch if the model decodes prompts of several
    images together. New mask proposals add two waits, and a cache one for the image and one to
    store (tests/devices/test_waits.py counts them).
    If memory runs out, half as many prompts or images are processed at once from then on; only one
    prompt or image that does not fit raises.

    Args:
        sam: The model, as `load_sam` returns it. It decides the device.
        config: Thresholds; the preset ``"default"`` if None.
        precision: ``"auto"`` (bf16 if the hardware has it), ``"32"``, ``"bf16-mixed"`` or
            ``"16-mixed"``.
        cache: Keeps image embeddings, so that an image that comes again is not encoded again:
            ``"memory"`` in this process, ``"disk"`` in a folder that runs share, or an
            `EmbeddingCache` of yours. Mask proposals are kept as well and not decoded again. None
            keeps nothing.
        cache_gb: Limit in 10⁹ bytes of a cache that is made here, see `EmbeddingCache`.

    Attributes:
        sam: As given.
        cache: The `EmbeddingCache`, or None.
        config: As given, but regions are prompted instead of points if the model has no useful
            masks for points: ``"default"`` turns into ``"fast"`` for a model without multimask
            output, with a warning, and into ``"fast"`` with mask prompts for one whose
            ``accepts_points`` is False, such as the tiny SAM of the demo.

    Raises:
        TypeError: ``sam`` is no `Promptable`, ``config`` no `RefineConfig`, ``cache`` no cache.
        ValueError: An unknown precision or cache, or a limit that does not apply.

    Example:
        >>> sam = load_sam("vit_t", checkpoint="mobile_sam.pt")  # doctest: +SKIP
        >>> out = Refiner(sam)(image, probs)  # doctest: +SKIP
        >>> out.labels, [region for region in out.regions if not region.accepted]  # doctest: +SKIP
    """

    def __init__(
        self,
        sam: Promptable,
        config: RefineConfig | None = None,
        precision: str = "auto",
        cache: Literal["memory", "disk"] | EmbeddingCache | None = None,
        cache_gb: float | None = None,
    ) -> None:
        if not isinstance(sam, Promptable):
            raise TypeError(
                f"sam must be a Promptable such as load_sam returns, got {type(sam).__name__}"
            )
        if config is not None and not isinstance(config, RefineConfig):
            raise TypeError(f"config must be a RefineConfig, got {type(config).__name__}")
        autocast_dtype(precision, sam.device)  # raises for an unknown precision
        self.sam = sam
        self.config = _possible(config or RefineConfig.preset("default"), sam)
        self.precision = precision
        self.cache = make_cache(cache, cache_gb)
        self._model = sam if self.cache is None else CachedSam(sam, self.cache)
        self._prompts_at_once, self._images_at_once = ChunkSize(), ChunkSize()
        self._warned_of_left_out = False
        self.recheck_weights()

    def recheck_weights(self) -> None:
        """Recompute what was derived from the model's weights, in case they have changed.

        A cache compares them by their contents. Changes that torch counts (loading, moving, an
        optimizer's step) are noticed without this, changes through ``.data`` are not. A new refiner
        rechecks, and so does every evaluation of the callbacks; after such a change in between call
        this yourself.
        """
        drop_derived(self.sam)
        if self.cache is not None:
            self.cache.recheck(self.sam.module)

    def __call__(self, image: Tensor, probs: Tensor, labels: Tensor | None = None) -> Refinement:
        """Refine one image's prediction.

        Args:
            image: (3, H, W) uint8 RGB, on any device.
            probs: (C, H, W) float in [0, 1] on SAM's device, the raw per-class probabilities L.
            labels: (H, W) integer, the raw label map S; the argmax of ``probs`` if None. Values
                outside [0, C) are unknown: no regions of their own, yet a mask may cover them.

        Raises:
            TypeError: A wrong type or dtype.
            ValueError: A wrong shape, device or range, NaN included.
        """
        return self.refine_batch([image], [probs], None if labels is None else [labels])[0]

    @torch.no_grad()
    def refine_batch(
        self,
        images: Sequence[Tensor] | Tensor,
        probs: Sequence[Tensor] | Tensor,
        labels: Sequence[Tensor] | Tensor | None = None,
    ) -> list[Refinement]:
        """Refine B images, each of its own size, in order; arguments as for one image.

        Raises:
            TypeError: A wrong type or dtype.
            ValueError: A wrong count, shape, device or range.
        """
        return [self.fuse(predictions) for predictions in self.predict(images, probs, labels)]

    @torch.no_grad()
    def predict(
        self,
        images: Sequence[Tensor] | Tensor,
        probs: Sequence[Tensor] | Tensor,
        labels: Sequence[Tensor] | Tensor | None = None,
        config: RefineConfig | None = None,
    ) -> Iterator[MaskPredictions]:
        """Predict the masks of every region and of the point grid on several images (steps 0 to 7).

        Args:
            images: As for `refine_batch`.
            probs: As for `refine_batch`.
            labels: As for `refine_batch`.
            config: In place of the refiner's own.

        Returns:
            B predictions in order; an image is decoded when its turn comes. A GPU decodes all of
            them together if the model can (`JointPromptable`) and ``max_prompts_per_batch`` is
            None.

        Raises:
            TypeError: A wrong type or dtype.
            ValueError: A wrong count, shape, device or range.
        """
        config = self._acting(config)
        read = read_predictions(images, probs, labels, self.sam.device)
        for raw in read:
            check_classes(config, len(raw.probs))
        # All begin before the first is waited for.
        splits = [
            begin_split(
                raw.labels,
                raw.probs,
                config.score_thresh,
                config.stride,
                config.min_region_area,
                config.max_regions,
            )
            for raw in read
        ]
        with self._autocast():
            regions, embeddings = self._split_and_encode(read, splits, config)
            self._warn_of_left_out(regions)
            proposals = self._propose(read, embeddings, config)
        return self._decode(read, regions, embeddings, proposals, config)

    @torch.no_grad()
    def fuse(self, predictions: MaskPredictions, config: RefineConfig | None = None) -> Refinement:
        """Accept or reject regions and fuse their masks into maps (steps 8 to 12).

        Args:
            predictions: From `predict`; they are not changed, so they can be fused again with
                another acceptance or fusion at the cost of the fusion.
            config: In place of the refiner's own.
        """
        config, raw = self._acting(config), predictions.raw
        if isinstance(config.weights, FusionWeights):
            fusion: Callable[..., Refinement] = fuse_fitted
        else:
            fusion = fuse_soft if config.unsupported_weight else fuse_by_algorithm4
        with autocast(None, self.sam.device):  # whatever the caller's
            fused = fusion(predictions, config, self.sam)
        return restore_frozen_classes(fused, raw.probs, raw.labels, config.classes)

    def _acting(self, config: RefineConfig | None) -> RefineConfig:
        return self.config if config is None else _possible(config, self.sam)

    def _autocast(self) -> AbstractContextManager[None]:
        device = self.sam.device
        return autocast(autocast_dtype(self.precision, device), device)

    def _split_and_encode(
        self,
        read: Sequence[RawPrediction],
        splits: Sequence[PendingSplit],
        config: RefineConfig,
    ) -> tuple[list[RegionSet], dict[int, Embedding]]:
        """Find every image's regions, and encode the images that have any.

        Returns:
            B sets of regions, and the embeddings by the images' indices. Without a region an image
            is not encoded (step 4).
        """
        regions: list[RegionSet] = []
        embeddings: dict[int, Embedding] = {}
        at_once = images_at_once(self.sam.device, len(splits))
        for start in range(0, len(splits), at_once):
            part = range(start, min(start + at_once, len(splits)))
            regions.extend(
                regions_of_refined_classes(splits[i].finish(), config.classes) for i in part
            )
            chosen = [i for i in part if len(regions[i]) > 0]
            if chosen:
                images = [read[i].image for i in chosen]
                encoded = encode_images(
                    self._model, images, self._images_at_once, config.encode_padding
                )
                embeddings.update(zip(chosen, encoded, strict=True))
        return regions, embeddings

    def _warn_of_left_out(self, regions: Sequence[RegionSet]) -> None:
        worst = max(regions, key=lambda found: found.left_out, default=None)
        if worst is None or worst.left_out == 0 or self._warned_of_left_out:
            return
        self._warned_of_left_out = True
        _log.warning(
            "An image has %d regions; the largest %d are prompted (max_regions), the others keep "
            "their raw prediction. Further such images are not reported.",
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
        proposals = propose_masks_of_images(
            self._model,
            list(embeddings.values()),
            [read[i].image_hw for i in embeddings],
            config.points_per_side,
            self._batch_size(config),
            self._prompts_at_once,
        )
        return dict(zip(embeddings, proposals, strict=True))

    @torch.no_grad()
    def _decode(
        self,
        read: Sequence[RawPrediction],
        regions: Sequence[RegionSet],
        embeddings: Mapping[int, Embedding],
        proposals: Mapping[int, MaskProposals],
        config: RefineConfig,
    ) -> Iterator[MaskPredictions]:
        """Prompt with the images' regions (steps 5 to 7); without a region SAM is not used."""
        at_once = len(read) if decodes_jointly(self.sam, config) else 1
        for start in range(0, len(read), at_once):
            part = range(start, min(start + at_once, len(read)))
            prompted = [i for i in part if config.prompt_regions and i in embeddings]
            prompts = [
                build_prompts(regions[i], self.sam, read[i].image_hw, config) for i in prompted
            ]
            mask_hws = [self.sam.mask_hw(read[i].image_hw) for i in prompted]
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
                yield MaskPredictions(
                    raw=read[i],
                    regions=regions[i],
                    pred_iou=own.pred_iou,
                    low_res_logits=own.low_res_logits,
                    region_masks=own.packed,
                    mask_proposals=proposals.get(i),
                    digest=embeddings[i].digest if self.cache and i in embeddings else None,
                )

    def _batch_size(self, config: RefineConfig) -> int:
        return config.max_prompts_per_batch or prompts_at_once(self.sam.device)


def _possible(config: RefineConfig, sam: Promptable) -> RefineConfig:
    """Return the configuration, with region prompts instead of points if the model needs it."""
    if config.weights is not None and not accepts_points(sam):
        return replace(config, mask_prompts=True)
    if not config.points_per_side or (has_multimask_output(sam) and accepts_points(sam)):
        return config
    if has_multimask_output(sam):
        return replace(config, points_per_side=0, prompt_regions=True, mask_prompts=True)
    warnings.warn(
        f"points_per_side must be 0 for {sam.name}, which has no multimask output, got "
        f"{config.points_per_side}: its regions are prompted instead, as preset 'fast' does",
        stacklevel=3,
    )
    return replace(config, points_per_side=0, prompt_regions=True, mask_prompts=False)
