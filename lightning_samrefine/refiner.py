"""From an image and a raw prediction to a refined one: Algorithm 4, or the softer rules after it.

Algorithm 4, "Optimized SAM Refinement": regions → prompts → SAM → fusion. With a ``soft_floor`` the
fusion is that of `support`, with ``points_per_side`` the masks are those of `image_masks`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lightning_samrefine.cache import EmbeddingCache
from lightning_samrefine.config import RefineConfig
from lightning_samrefine.fusion import MapRefinement
from lightning_samrefine.image_masks import MASKS_VERSION, ImageMasks, generate_masks
from lightning_samrefine.inputs import check_image_and_probs, checked_labels, first_argmax
from lightning_samrefine.models.protocol import MultimaskPromptable, Promptable, Prompts
from lightning_samrefine.precision import autocast, autocast_dtype
from lightning_samrefine.prompts import build_prompts
from lightning_samrefine.refinement import Refinement, Regions
from lightning_samrefine.regions import GridRegions, split_regions
from lightning_samrefine.smoothing import smooth
from lightning_samrefine.support import Support
from lightning_samrefine.upscaling import WindowedUpscale, extents

# Two prompts at once fit a core's cache and beat both one and forty (measured, FP32 and BF16).
_CPU_PROMPTS = 2
_BYTES_PER_PROMPT = 3e9  # the seed's b_size: one prompt for every 3·10⁹ bytes that are free
_MAX_PROMPTS = 32


class Refiner:
    """Refines the masks of any semantic segmenter with a promptable model.

    SAM runs without gradients under an autocast of its own; thresholds and fusion are float32.
    On CUDA the CPU waits for an image three times, however many regions it has: for the range of
    its probabilities, for its label map on the working grid, and for SAM's predicted IoUs.
    Image-driven masks add their classes, and two waits where they are made. A cache adds the
    image itself where that is on the GPU, and an embedding that is to be kept.

    Args:
        sam: The model, as `load_sam` returns it. It decides the device.
        config: Thresholds; the preset ``"default"`` where None.
        precision: ``"auto"`` (bf16 where the hardware has it), ``"32"``, ``"bf16-mixed"`` or
            ``"16-mixed"``.
        cache: Keeps image embeddings, so that an image that comes again is not encoded again:
            ``"memory"`` in this process, ``"disk"`` in a folder that runs share, or an
            `EmbeddingCache` of yours. Image-driven masks are kept instead of the embedding, and
            such an image is not decoded again either. None keeps nothing.
        cache_gb: Limit in 10⁹ bytes of a cache that is made here, see `EmbeddingCache`.

    Attributes:
        cache: The `EmbeddingCache`, None where nothing is kept.
        config: As given, but regions are prompted instead of points where the model cannot
            answer points: ``"default"`` turns into ``"fast"`` for a model without
            ``decode_multimask``, with a warning, and into ``"fast"`` with mask prompts for one
            whose ``answers_points`` is False, such as the tiny SAM of the demo.

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
                f"sam: got {type(sam).__name__}, accepted is a Promptable such as load_sam returns"
            )
        if config is not None and not isinstance(config, RefineConfig):
            raise TypeError(f"config: got {type(config).__name__}, accepted is a RefineConfig")
        autocast_dtype(precision, sam.device)
        self.sam = sam
        self.config = _possible(config or RefineConfig.preset("default"), sam)
        self.precision = precision
        self.cache = _cache(cache, cache_gb)

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
        if len(probs) != len(images) or (labels is not None and len(labels) != len(images)):
            raise ValueError(
                f"images, probs, labels: got {len(images)}, {len(probs)} and "
                f"{'None' if labels is None else len(labels)} of them, accepted are equal counts"
            )
        raw = []
        for index in range(len(images)):
            check_image_and_probs(images[index], probs[index], self.sam.device)
            image_probs = probs[index].float()
            image_labels = (
                first_argmax(image_probs)
                if labels is None
                else checked_labels(labels[index], image_probs)
            )
            raw.append((image_probs, image_labels))

        config = self.config
        regions = [
            split_regions(
                image_labels,
                image_probs,
                config.score_thresh,
                config.stride,
                config.min_region_area,
            )
            for image_probs, image_labels in raw
        ]
        # An image without a region asks SAM nothing, so it is not embedded either (step 4).
        prompted = [index for index, found in enumerate(regions) if len(found) > 0]
        chosen = [images[index] for index in prompted]
        nothing = [None] * len(chosen)
        embeddings = self._embed(chosen) if config.prompt_regions else nothing
        masks = self._image_masks(chosen, embeddings) if config.points_per_side else nothing
        refined = {
            index: self._refine_softly(of_image, found, images[index], *raw[index], regions[index])
            if config.soft_floor
            else self._refine(of_image, *raw[index], regions[index])
            for index, of_image, found in zip(prompted, embeddings, masks, strict=True)
        }
        return [
            refined[index] if index in refined else self._nothing_to_do(*raw[index], regions[index])
            for index in range(len(images))
        ]

    def _embed(self, images: list[Tensor]) -> list[Any]:
        return self._once_an_image(images, self.sam.embed)

    def _image_masks(self, images: list[Tensor], embeddings: list[Any]) -> list[ImageMasks]:
        """Return each image's masks; an embedding of None is made only where masks are."""
        side, sam = self.config.points_per_side, self.sam
        known = {id(image): e for image, e in zip(images, embeddings, strict=True)}

        def compute(chosen: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
            unknown = [image for image in chosen if known[id(image)] is None]
            if unknown:
                new = zip(unknown, sam.embed(unknown), strict=True)
                known.update((id(image), embedding) for image, embedding in new)
            found = []
            for image in chosen:
                size = (image.shape[1], image.shape[2])
                masks = generate_masks(sam, known[id(image)], size, side)
                found.append((masks.packed, masks.pred_iou))
            return found

        kept = self._once_an_image(images, compute, f"masks {MASKS_VERSION} {side}")
        return [
            ImageMasks(packed, pred_iou, sam.mask_hw((image.shape[1], image.shape[2])))
            for (packed, pred_iou), image in zip(kept, images, strict=True)
        ]

    def _once_an_image(
        self, images: list[Tensor], ask: Callable[[list[Tensor]], list[Any]], derived: str = ""
    ) -> list[Any]:
        """Ask SAM about images under its autocast, or the cache."""
        if not images:
            return []
        device = self.sam.device
        dtype = autocast_dtype(self.precision, device)

        def compute(chosen: list[Tensor]) -> list[Any]:
            with autocast(dtype, device):
                return ask(chosen)

        if self.cache is None:
            return compute(images)
        return self.cache.embed(self.sam, images, dtype, compute, derived)

    def _nothing_to_do(self, probs: Tensor, labels: Tensor, regions: GridRegions) -> Refinement:
        """Step 4: not one region."""
        nothing = np.empty(0, dtype=bool)
        table = _table(regions, torch.empty(0), nothing, self.config.stride, labels.shape)
        return _untouched(probs, labels, table)

    def _refine_softly(
        self,
        embedding: Any,
        masks: ImageMasks | None,
        image: Tensor,
        probs: Tensor,
        labels: Tensor,
        regions: GridRegions,
    ) -> Refinement:
        """Fuse image-driven masks, the masks of prompted regions, or both in turn."""
        config, image_hw = self.config, (labels.shape[0], labels.shape[1])
        refined, covered = probs, torch.zeros(labels.shape, dtype=torch.bool, device=probs.device)
        pred_iou = torch.zeros(len(regions))
        if masks is not None and len(masks) > 0:
            support, votes = Support.of_image(masks, probs)
            refined, covered = support.apply(refined, config.soft_floor)
            points, classes = regions.relative_points(), torch.from_numpy(regions.classes)
            pred_iou = votes.at(points.to(probs.device), classes.to(probs.device)).cpu()
        if config.prompt_regions:
            logits, pred_iou, _ = self._decode(embedding, self._prompts(regions, image_hw))
        accepted = pred_iou.numpy() > np.float32(config.pred_iou_thresh)
        table = _table(regions, pred_iou, accepted, config.stride, image_hw)
        if config.prompt_regions and accepted.any():
            support = self._support_of_regions(logits, accepted, regions, image_hw)
            refined, inside = support.apply(refined, config.soft_floor)
            covered = covered | inside
        if refined is probs:
            return _untouched(probs, labels, table)
        if config.smoothing:
            refined = smooth(refined, image, config.smoothing, config.stride)
        best = first_argmax(refined)
        unknown = (labels < 0) | (labels >= len(probs))
        # Labels that are not the probabilities' argmax stay where the refinement changes nothing.
        changed = torch.where(unknown, covered, best != first_argmax(probs))
        kept = table.accepted
        return Refinement(
            labels=torch.where(changed, best, labels),
            probs=refined,
            covered=covered,
            pred_iou=table.pred_iou[kept].to(probs.device),
            boxes=table.boxes[kept].to(probs.device),
            classes=table.classes[kept].to(probs.device),
            regions=table,
        )

    def _support_of_regions(
        self,
        low_res_logits: list[Tensor],
        accepted: np.ndarray,
        regions: GridRegions,
        image_hw: tuple[int, int],
    ) -> Support:
        """Collect accepted regions' masks; a rejected region stands for itself."""
        height, width = self.sam.mask_hw(image_hw)
        device = regions.probs.device
        chosen = [low_res_logits[index] for index in np.flatnonzero(accepted)]
        mask_probs = torch.stack(chosen)[:, :height, :width].sigmoid()
        own = None
        if not accepted.all():
            own = torch.zeros_like(regions.probs)
            for c in np.unique(regions.classes[~accepted]):
                own[c] = regions.mask_of(~accepted & (regions.classes == c))
        classes = torch.from_numpy(regions.classes[accepted]).to(device)
        return Support.of_regions(mask_probs, classes, len(regions.probs), own)

    def _prompts(self, regions: GridRegions, image_hw: tuple[int, int]) -> Prompts:
        config = self.config
        with_masks = config.mask_prompts and getattr(self.sam, "accepts_masks", True)
        return build_prompts(
            regions, self.sam, image_hw, config.score_thresh, config.mask_prompt_scale, with_masks
        )

    def _refine(
        self, embedding: Any, probs: Tensor, labels: Tensor, regions: GridRegions
    ) -> Refinement:
        """Steps 5 to 12 for one image with at least one region."""
        config, image_hw = self.config, (labels.shape[0], labels.shape[1])
        prompts = self._prompts(regions, image_hw)
        low_res_logits, pred_iou, mask_extents = self._decode(embedding, prompts)
        accepted = pred_iou.numpy() > np.float32(config.pred_iou_thresh)
        table = _table(regions, pred_iou, accepted, config.stride, image_hw)
        if not accepted.any():
            return _untouched(probs, labels, table)

        fused = MapRefinement(probs, labels)
        windowed = None if mask_extents is None else WindowedUpscale.of(self.sam, image_hw)
        for index in np.flatnonzero(accepted):
            c, mask = int(regions.classes[index]), low_res_logits[index]
            if windowed is None:
                fused.add(self.sam.upscale(mask[None], image_hw)[0], c)
            else:
                logits, window = windowed(mask, mask_extents[index])
                if window:
                    fused.add(logits, c, window)
        if accepted.all():
            new_labels, new_probs, covered = fused.finish()
        else:
            new_labels, new_probs, covered = fused.finish(
                regions.mask_of(~accepted), regions.boxes[~accepted]
            )
        kept = torch.from_numpy(accepted)
        return Refinement(
            labels=new_labels,
            probs=new_probs,
            covered=covered,
            pred_iou=table.pred_iou[kept].to(probs.device),
            boxes=table.boxes[kept].to(probs.device),
            classes=table.classes[kept].to(probs.device),
            regions=table,
        )

    def _decode(
        self, embedding: Any, prompts: Prompts
    ) -> tuple[list[Tensor], Tensor, np.ndarray | None]:
        """Return one (m, m) float32 logit map a prompt, and what is needed of them on the CPU.

        That is the (N,) float32 IoUs, and (N, 2, m) bool extents of the masks where SAM is on the
        CPU. On a GPU whole frames cost less than the many small launches of windows.
        """
        device = self.sam.device
        logits, ious, masks_extents = [], [], []
        size = self.config.max_prompts_per_batch or _prompts_per_batch(device)
        with autocast(autocast_dtype(self.precision, device), device):
            for start in range(0, len(prompts), size):
                chunk_logits, chunk_iou = self.sam.decode(
                    embedding, prompts.chunk(start, start + size)
                )
                logits.extend(chunk_logits.float())
                ious.append(chunk_iou.float())
                if device.type == "cpu":
                    masks_extents.append(extents(chunk_logits))
        on_cpu = torch.cat(masks_extents).numpy() if masks_extents else None
        return logits, torch.cat(ious).cpu(), on_cpu


def _possible(config: RefineConfig, sam: Promptable) -> RefineConfig:
    """Return the thresholds, with region prompts instead of points where a model needs it."""
    has_method = isinstance(sam, MultimaskPromptable)
    if not config.points_per_side or (has_method and getattr(sam, "answers_points", True)):
        return config
    if has_method:
        return replace(config, points_per_side=0, prompt_regions=True)
    warnings.warn(
        f"points_per_side: got {config.points_per_side} for {sam.name}, which has no "
        "decode_multimask; its regions are prompted instead, as preset 'fast' does",
        stacklevel=3,
    )
    return replace(config, points_per_side=0, prompt_regions=True, mask_prompts=False)


def _cache(cache: str | EmbeddingCache | None, cache_gb: float | None) -> EmbeddingCache | None:
    if isinstance(cache, str):
        return EmbeddingCache(cache, cache_gb)  # type: ignore[arg-type]
    if cache is not None and not isinstance(cache, EmbeddingCache):
        raise TypeError(
            f"cache: got {type(cache).__name__}, accepted are 'memory', 'disk', an EmbeddingCache "
            "and None"
        )
    if cache_gb is not None and cache is not None:
        raise ValueError(
            "cache_gb: got one beside an EmbeddingCache, which has its own, accepted is None"
        )
    return cache


def _prompts_per_batch(device: torch.device) -> int:
    """Return the seed's b_size on CUDA (step 7), and what suits a cache elsewhere."""
    if device.type != "cuda":
        return _CPU_PROMPTS
    free, _ = torch.cuda.mem_get_info(device)
    return min(_MAX_PROMPTS, max(1, int(free // _BYTES_PER_PROMPT)))


def _table(
    regions: GridRegions,
    pred_iou: Tensor,
    accepted: np.ndarray,
    stride: int,
    image_hw: tuple[int, ...],
) -> Regions:
    """Bring regions from the working grid to image pixels (step 12)."""
    height, width = image_hw
    boxes = np.minimum(regions.boxes * stride, [width, height, width, height])
    points = np.minimum(regions.points * stride, [width, height])
    return Regions(
        classes=torch.from_numpy(regions.classes),
        boxes=torch.from_numpy(boxes.astype(np.float32)),
        points=torch.from_numpy(points.astype(np.float32)),
        scores=torch.from_numpy(regions.scores),
        pred_iou=pred_iou,
        accepted=torch.from_numpy(accepted),
    )


def _untouched(probs: Tensor, labels: Tensor, table: Regions) -> Refinement:
    """Return the inputs as they came (steps 4 and 8)."""
    device = probs.device
    return Refinement(
        labels=labels,
        probs=probs,
        covered=torch.zeros(labels.shape, dtype=torch.bool, device=device),
        pred_iou=torch.empty(0, device=device),
        boxes=torch.empty((0, 4), device=device),
        classes=torch.empty(0, dtype=torch.int64, device=device),
        regions=table,
    )
