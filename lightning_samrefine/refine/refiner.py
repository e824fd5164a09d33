"""From an image and a raw prediction to a refined one: Algorithm 4, or the softer rules after it.

Algorithm 4, "Optimized SAM Refinement": regions → prompts → SAM → fusion. With an
``unsupported_weight`` the fusion is that of `fusion.soft`, with ``points_per_side`` the masks are
those of `mask_proposals`.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_samrefine.config import RefineConfig
from lightning_samrefine.models.base import (
    Promptable,
    Prompts,
    accepts_points,
    check_promptable_members,
    drop_derived,
    has_multimask_output,
)
from lightning_samrefine.refine.cache.embedding_cache import (
    EmbeddingCache,
    image_digest,
    make_cache,
    rounded,
)
from lightning_samrefine.refine.checks import check_image_and_probs, checked_labels, first_argmax
from lightning_samrefine.refine.class_filter import (
    check_classes,
    regions_of_refined_classes,
    restore_frozen_classes,
)
from lightning_samrefine.refine.decode import Decoded, decode_prompts, decodes_jointly
from lightning_samrefine.refine.fusion.algorithm4 import fuse_by_algorithm4
from lightning_samrefine.refine.fusion.soft import fuse_soft
from lightning_samrefine.refine.mask_proposals import MASKS_VERSION, MaskProposals, propose_masks
from lightning_samrefine.refine.non_finite import non_finite_error
from lightning_samrefine.refine.predictions import MaskPredictions
from lightning_samrefine.refine.region_prompts import prompts_of, with_masks
from lightning_samrefine.refine.regions import GridRegions, PendingSplit, begin_split
from lightning_samrefine.refine.results import Refinement
from lightning_samrefine.utils.memory import ChunkSize, images_at_once, prompts_at_once
from lightning_samrefine.utils.precision import autocast, autocast_dtype

_log = logging.getLogger(__name__)


class Refiner:
    """Refines the masks of any semantic segmenter with a promptable model.

    SAM runs without gradients under an autocast of its own; thresholds and fusion are float32.
    On CUDA the CPU waits for an image twice, however many regions it has: for its label map on the
    working grid, which it splits while the GPU encodes the image before it in the batch, and for
    SAM's predicted IoUs; for these once a batch where the model decodes prompts of several images
    together. Masks of the point grid add two waits where they are made, and what a cache keeps one.
    (tests/devices/test_waits.py counts them.)
    Where memory runs out, the model is asked for half as many prompts or images at once, from then
    on; only one prompt or image that does not fit raises.

    Args:
        sam: The model, as `load_sam` returns it. It decides the device.
        config: Thresholds; the preset ``"default"`` where None.
        precision: ``"auto"`` (bf16 where the hardware has it), ``"32"``, ``"bf16-mixed"`` or
            ``"16-mixed"``.
        cache: Keeps image embeddings, so that an image that comes again is not encoded again:
            ``"memory"`` in this process, ``"disk"`` in a folder that runs share, or an
            `EmbeddingCache` of yours. Image-driven masks are kept as well, and not decoded again
            either. None keeps nothing.
        cache_gb: Limit in 10⁹ bytes of a cache that is made here, see `EmbeddingCache`.

    Attributes:
        cache: The `EmbeddingCache`, None where nothing is kept.
        config: As given, but regions are prompted instead of points where the model cannot
            answer points: ``"default"`` turns into ``"fast"`` for a model without
            multimask output, with a warning, and into ``"fast"`` with mask prompts for one
            whose ``accepts_points`` is False, such as the tiny SAM of the demo.

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
        check_promptable_members(sam)
        if config is not None and not isinstance(config, RefineConfig):
            raise TypeError(f"config: got {type(config).__name__}, accepted is a RefineConfig")
        autocast_dtype(precision, sam.device)  # refuses an unknown precision
        self.sam = sam
        self.config = _possible(config or RefineConfig.preset("default"), sam)
        self.precision = precision
        self.cache = make_cache(cache, cache_gb)
        self._prompts_at_once, self._images_at_once = ChunkSize(), ChunkSize()
        self._told: set[str] = set()
        self.recheck_weights()

    def with_config(self, config: RefineConfig) -> Refiner:
        """Return a refiner with other thresholds that shares everything else with this one.

        That is the model, the cache, and how many prompts and images memory was found to allow.

        Args:
            config: Adapted to the model as in the constructor.
        """
        other = copy.copy(self)
        other.config = _possible(config, self.sam)
        return other

    def recheck_weights(self) -> None:
        """Find out whether the model's weights are still what they were.

        Whatever was derived from them is made anew, and a cache compares them by what they hold.
        Changes that torch counts (loading, moving, an optimizer's step) are noticed without this,
        changes through ``.data`` are not. A new refiner rechecks, and so does every evaluation of
        the callbacks; after such a change in between call this yourself.
        """
        drop_derived(self.sam)
        if self.cache is not None:
            self.cache.recheck(self.sam.module)

    def __call__(self, image: Tensor, probs: Tensor, labels: Tensor | None = None) -> Refinement:
        """Refine one image's prediction.

        Args:
            image: (3, H, W) uint8 RGB, on any device.
            probs: (C, H, W) float in [0, 1] on SAM's device, the raw per-class probabilities L.
            labels: (H, W) integer, the raw label map S; the argmax of ``probs`` where None.
                Values outside [0, C) are unknown: never refined themselves, yet an accepted mask
                may cover them.

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
        """Refine several images, each of its own size.

        Args:
            images: B × (3, H, W) uint8 RGB, a sequence or one tensor.
            probs: B × (C, H, W) float in [0, 1].
            labels: B × (H, W) integer, or None.

        Returns:
            B refinements in order.

        Raises:
            TypeError: A wrong type or dtype.
            ValueError: A wrong count, shape, device or range.
        """
        return [self.fuse(answers) for answers in self.ask(images, probs, labels)]

    @torch.no_grad()
    def ask(
        self,
        images: Sequence[Tensor] | Tensor,
        probs: Sequence[Tensor] | Tensor,
        labels: Sequence[Tensor] | Tensor | None = None,
    ) -> Iterator[MaskPredictions]:
        """Ask SAM about every region of several images (steps 0 to 7).

        Args:
            images: As for `refine_batch`.
            probs: As for `refine_batch`.
            labels: As for `refine_batch`.

        Returns:
            B answers in order; an image is decoded when its turn comes. A GPU decodes all of them
            together where the model can (`JointPromptable`) and ``max_prompts_per_batch`` is None.

        Raises:
            TypeError: A wrong type or dtype.
            ValueError: A wrong count, shape, device or range.
        """
        if len(probs) != len(images) or (labels is not None and len(labels) != len(images)):
            raise ValueError(
                f"images, probs, labels: got {len(images)}, {len(probs)} and "
                f"{'None' if labels is None else len(labels)} of them, accepted are equal counts"
            )
        raw = []
        for index in range(len(images)):
            check_image_and_probs(images[index], probs[index], self.sam.device)
            check_classes(self.config, len(probs[index]))
            image_probs = probs[index].float()
            image_labels = (
                first_argmax(image_probs)
                if labels is None
                else checked_labels(labels[index], image_probs)
            )
            raw.append((image_probs, image_labels))

        config = self.config
        # All set out for the CPU before the first is waited for.
        splits = [
            begin_split(
                image_labels,
                image_probs,
                config.score_thresh,
                config.stride,
                config.min_region_area,
                config.max_regions,
                None if self.cache is None else image,
            )
            for image, (image_probs, image_labels) in zip(images, raw, strict=True)
        ]
        regions, embeddings, digests = self._split_and_embed(images, splits)
        self._tell_of_left_out(regions)
        masks: dict[int, MaskProposals] = {}
        if config.points_per_side:
            chosen = [images[index] for index in embeddings]
            found = self._mask_proposals(chosen, list(embeddings.values()), digests)
            masks = dict(zip(embeddings, found, strict=True))

        def answered() -> Iterator[MaskPredictions]:
            at_once = len(images) if decodes_jointly(self.sam, config) else 1
            for start in range(0, len(images), at_once):
                part = range(start, min(start + at_once, len(images)))
                bare = [
                    MaskPredictions(
                        images[i],
                        *raw[i],
                        regions[i],
                        low_res_logits=[],
                        pred_iou=torch.zeros(len(regions[i])),
                        mask_proposals=masks.get(i),
                        labels_are_argmax=labels is None,
                    )
                    for i in part
                ]
                yield from self._with_region_masks(bare, [embeddings.get(i) for i in part])

        return answered()

    def _split_and_embed(
        self, images: Sequence[Tensor] | Tensor, splits: Sequence[PendingSplit]
    ) -> tuple[list[GridRegions], dict[int, Any], list[str]]:
        """Find every image's regions, and embed the images that have any.

        Returns:
            B regions in order, the embedding of each image with a region by its index (None in its
            place if no region is prompted), and these images' digests for the cache. SAM is not
            needed for the others (step 4).
        """
        regions: list[GridRegions] = []
        embeddings: dict[int, Any] = {}
        digests: list[str] = []
        at_once = images_at_once(self.sam.device, len(splits))
        for start in range(0, len(splits), at_once):
            part = range(start, min(start + at_once, len(splits)))
            regions.extend(
                regions_of_refined_classes(splits[i].finish(), self.config.classes) for i in part
            )
            with_regions = [i for i in part if len(regions[i]) > 0]
            own = (
                [] if self.cache is None else [image_digest(splits[i].image) for i in with_regions]
            )
            digests += own
            if self.config.prompt_regions:
                found = self._embed([images[i] for i in with_regions], own)
                embeddings.update(zip(with_regions, found, strict=True))
            else:
                embeddings.update(dict.fromkeys(with_regions))
        return regions, embeddings, digests

    def _tell_of_left_out(self, regions: Sequence[GridRegions]) -> None:
        worst = max(regions, key=lambda found: found.left_out, default=None)
        if worst is None or worst.left_out == 0 or "left out" in self._told:
            return
        self._told.add("left out")
        _log.warning(
            "An image has %d regions; the largest %d are prompted (max_regions), the others keep "
            "their raw prediction. Further such images are not reported.",
            len(worst) + worst.left_out,
            len(worst),
        )

    def _embed(self, images: list[Tensor], digests: list[str]) -> list[Any]:
        return self._once_an_image(images, digests, self._embed_rounded)

    def _embed_rounded(self, images: list[Tensor]) -> list[Any]:
        """Embed images as a cache would keep them, so that it makes no difference."""
        dtype = autocast_dtype(self.precision, self.sam.device)
        return [rounded(embedding, dtype) for embedding in self.sam.encode_images(images)]

    def _mask_proposals(
        self, images: list[Tensor], embeddings: list[Any], digests: list[str]
    ) -> list[MaskProposals]:
        """Return each image's masks; an embedding of None is made only where masks are."""
        side, sam = self.config.points_per_side, self.sam
        known = {id(image): e for image, e in zip(images, embeddings, strict=True)}

        def compute(chosen: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
            unknown = [image for image in chosen if known[id(image)] is None]
            if unknown:
                new = zip(unknown, self._embed_rounded(unknown), strict=True)
                known.update((id(image), embedding) for image, embedding in new)
            found = []
            for image in chosen:
                size = (image.shape[1], image.shape[2])
                masks = propose_masks(
                    sam, known[id(image)], size, side, self._batch_size(), self._prompts_at_once
                )
                if masks is None:
                    raise non_finite_error(sam.name, self.precision)
                found.append((masks.packed, masks.pred_iou))
            return found

        kept = self._once_an_image(images, digests, compute, f"masks {MASKS_VERSION} {side}")
        return [
            MaskProposals(packed, pred_iou, sam.mask_hw((image.shape[1], image.shape[2])))
            for (packed, pred_iou), image in zip(kept, images, strict=True)
        ]

    def _once_an_image(
        self,
        images: list[Tensor],
        digests: list[str],
        ask: Callable[[list[Tensor]], list[Any]],
        derived: str = "",
    ) -> list[Any]:
        """Ask SAM about images under its autocast, or the cache."""
        if not images:
            return []
        device = self.sam.device
        dtype = autocast_dtype(self.precision, device)

        def under_autocast(chosen: list[Tensor]) -> list[Any]:
            with autocast(dtype, device):
                return ask(chosen)

        def compute(chosen: list[Tensor]) -> list[Any]:
            chunks = self._images_at_once.run(
                len(chosen), len(chosen), lambda start, stop: under_autocast(chosen[start:stop])
            )
            return [result for _, _, results in chunks for result in results]

        if self.cache is None:
            return compute(images)
        return self.cache.embed(self.sam, images, dtype, compute, derived, digests)

    @torch.no_grad()
    def _with_region_masks(
        self, answers: Sequence[MaskPredictions], embeddings: Sequence[Any]
    ) -> Iterator[MaskPredictions]:
        """Prompt with the regions of images (steps 5 to 7); without a region SAM is not needed."""
        prompted = [i for i, embedding in enumerate(embeddings) if embedding is not None]
        decoded = self._decode(
            [embeddings[i] for i in prompted],
            [prompts_of(answers[i], self.config, self.sam) for i in prompted],
            [self.sam.mask_hw(answers[i].image_hw) for i in prompted],
        )
        found = dict(zip(prompted, decoded, strict=True))
        for index, bare in enumerate(answers):
            own = found.pop(index, None)
            yield bare if own is None else with_masks(bare, own, self.config, self.sam)

    @torch.no_grad()
    def fuse(self, answers: MaskPredictions) -> Refinement:
        """Accept or reject SAM's answers and fuse them into maps (steps 8 to 12).

        `ask` and this make a refinement together; answers can be fused again by a refiner of the
        same model that differs in acceptance or fusion alone, at the cost of the fusion.

        Args:
            answers: From `ask`; they are not changed.
        """
        config = self.config
        with autocast(None, self.sam.device):  # whatever the caller's
            if config.unsupported_weight and len(answers.regions) > 0:
                fused = fuse_soft(answers, config)
            else:
                fused = fuse_by_algorithm4(answers, config, self.sam)
        return restore_frozen_classes(fused, answers.probs, answers.labels, config.classes)

    def _batch_size(self) -> int:
        return self.config.max_prompts_per_batch or prompts_at_once(self.sam.device)

    def _decode(
        self,
        embeddings: Sequence[Any],
        prompts: Sequence[Prompts],
        mask_hws: Sequence[tuple[int, int]],
    ) -> list[Decoded]:
        return decode_prompts(
            self.sam,
            embeddings,
            prompts,
            self.precision,
            self._batch_size(),
            self._prompts_at_once,
            mask_hws if self.config.unsupported_weight else None,
        )


def _possible(config: RefineConfig, sam: Promptable) -> RefineConfig:
    """Return the thresholds, with region prompts instead of points where a model needs it."""
    if not config.points_per_side or (has_multimask_output(sam) and accepts_points(sam)):
        return config
    if has_multimask_output(sam):
        return replace(config, points_per_side=0, prompt_regions=True, mask_prompts=True)
    warnings.warn(
        f"points_per_side: got {config.points_per_side} for {sam.name}, which has no "
        "multimask output; its regions are prompted instead, as preset 'fast' does",
        stacklevel=3,
    )
    return replace(config, points_per_side=0, prompt_regions=True, mask_prompts=False)
