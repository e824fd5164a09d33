"""Algorithm 4, "Optimized SAM Refinement": regions → prompts → SAM → fusion."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lightning_samrefine.cache import EmbeddingCache, make_cache
from lightning_samrefine.class_gate import (
    accepted_regions,
    check_classes,
    keep_closed,
    open_regions,
)
from lightning_samrefine.config import RefineConfig
from lightning_samrefine.fusion import MapRefinement
from lightning_samrefine.models.protocol import Promptable, Prompts
from lightning_samrefine.precision import autocast, autocast_dtype
from lightning_samrefine.prompts import build_prompts
from lightning_samrefine.refinement import Refinement, Regions
from lightning_samrefine.regions import GridRegions, split_regions
from lightning_samrefine.upscaling import WindowedUpscale, extents

# Four prompts at once fit a core's cache and beat one, eight and forty (measured, FP32 and BF16).
_CPU_PROMPTS = 4
_BYTES_PER_PROMPT = 3e9  # the seed's b_size: one prompt for every 3·10⁹ bytes that are free
_MAX_PROMPTS = 32


@dataclass(frozen=True)
class Answers:
    """What SAM says about the regions of one image, before any of it is accepted.

    Attributes:
        probs: (C, H, W) float32, the raw L.
        labels: (H, W) int64, the raw S.
        regions: N regions on the working grid.
        low_res_logits: N maps (m, m) float32.
        pred_iou: (N,) float32 on the CPU.
        extents: (N, 2, m) bool, see `lightning_samrefine.upscaling.extents`; None on a GPU.
        masks: (N, h, w) bool, see `Regions.masks`; None without a region.
    """

    probs: Tensor
    labels: Tensor
    regions: GridRegions
    low_res_logits: list[Tensor]
    pred_iou: Tensor
    extents: np.ndarray | None
    masks: Tensor | None = None


class Refiner:
    """Refines the masks of any semantic segmenter with a promptable model.

    SAM runs without gradients under an autocast of its own; thresholds and fusion are float32.
    On CUDA the CPU waits for an image three times, however many regions it has: for the range of
    its probabilities, for its label map on the working grid, and for SAM's predicted IoUs. A
    cache adds the image itself where that is on the GPU, and an embedding that is to be kept.

    Args:
        sam: The model, as `load_sam` returns it. It decides the device.
        config: Thresholds; the preset ``"default"`` where None.
        precision: ``"auto"`` (bf16 where the hardware has it), ``"32"``, ``"bf16-mixed"`` or
            ``"16-mixed"``.
        cache: Keeps image embeddings, so that an image that comes again is not encoded again:
            ``"memory"`` in this process, ``"disk"`` in a folder that runs share, or an
            `EmbeddingCache` of yours. None keeps nothing.
        cache_gb: Limit in 10⁹ bytes of a cache that is made here, see `EmbeddingCache`.

    Attributes:
        cache: The `EmbeddingCache`, None where nothing is kept.

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
        self.config = config if config is not None else RefineConfig.preset("default")
        self.precision = precision
        self.cache = make_cache(cache, cache_gb)

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
    ) -> Iterator[Answers]:
        """Ask SAM about every region of several images (steps 0 to 7).

        Args:
            images: As for `refine_batch`.
            probs: As for `refine_batch`.
            labels: As for `refine_batch`.

        Returns:
            B answers in order; an image is decoded when its turn comes.

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
            _check(images[index], probs[index], self.sam.device)
            check_classes(self.config, len(probs[index]))
            image_probs = probs[index].float()
            image_labels = (
                _argmax(image_probs)
                if labels is None
                else _checked_labels(labels[index], image_probs)
            )
            raw.append((image_probs, image_labels))

        config = self.config
        regions = [
            open_regions(
                split_regions(
                    image_labels,
                    image_probs,
                    config.score_thresh,
                    config.stride,
                    config.min_region_area,
                ),
                config.classes,
            )
            for image_probs, image_labels in raw
        ]
        # An image without a region asks SAM nothing, so it is not embedded either (step 4).
        prompted = [index for index, found in enumerate(regions) if len(found) > 0]
        embeddings = dict(zip(prompted, self._embed([images[i] for i in prompted]), strict=True))
        return (
            self._answers(embeddings.get(index), *raw[index], regions[index])
            for index in range(len(images))
        )

    def _embed(self, images: list[Tensor]) -> list[Any]:
        if not images:
            return []
        device = self.sam.device
        dtype = autocast_dtype(self.precision, device)

        def compute(chosen: list[Tensor]) -> list[Any]:
            with autocast(dtype, device):
                return self.sam.embed(chosen)

        if self.cache is None:
            return compute(images)
        return self.cache.embed(self.sam, images, dtype, compute)

    @torch.no_grad()
    def _answers(
        self, embedding: Any, probs: Tensor, labels: Tensor, regions: GridRegions
    ) -> Answers:
        """Steps 5 to 7 for one image; without a region SAM is not asked (step 4)."""
        if len(regions) == 0:
            return Answers(probs, labels, regions, [], torch.empty(0), None)
        config, image_hw = self.config, (labels.shape[0], labels.shape[1])
        prompts = build_prompts(
            regions, self.sam, image_hw, config.score_thresh, config.mask_prompt_scale
        )
        low_res_logits, pred_iou, mask_extents = self._decode(embedding, prompts)
        rows, columns = self.sam.mask_hw(image_hw)
        masks = torch.stack([logits[:rows, :columns] > 0 for logits in low_res_logits])
        return Answers(probs, labels, regions, low_res_logits, pred_iou, mask_extents, masks)

    @torch.no_grad()
    def fuse(self, answers: Answers) -> Refinement:
        """Accept or reject SAM's answers and fuse them into maps (steps 8 to 12).

        `ask` and this make a refinement together; answers can be fused again by a refiner of the
        same model whose ``pred_iou_thresh`` or ``class_pred_iou_thresh`` is another, at the cost
        of the fusion alone.

        Args:
            answers: From `ask`; they are not changed.
        """
        config, probs, labels = self.config, answers.probs, answers.labels
        regions, image_hw = answers.regions, (labels.shape[0], labels.shape[1])
        accepted = accepted_regions(config, regions.classes, answers.pred_iou)
        table = _table(regions, answers.pred_iou, accepted, config.stride, image_hw)
        table = replace(table, masks=answers.masks)
        if not accepted.any():
            return _untouched(probs, labels, table)

        fused = MapRefinement(probs, labels)
        windowed = None if answers.extents is None else WindowedUpscale.of(self.sam, image_hw)
        for index in np.flatnonzero(accepted):
            c, mask = int(regions.classes[index]), answers.low_res_logits[index]
            if windowed is None:
                fused.add(self.sam.upscale(mask[None], image_hw)[0], c)
            else:
                logits, window = windowed(mask, answers.extents[index])
                if window:
                    fused.add(logits, c, window)
        if accepted.all():
            new_labels, new_probs, covered = fused.finish()
        else:
            new_labels, new_probs, covered = fused.finish(
                regions.mask_of(~accepted), regions.boxes[~accepted]
            )
        kept = torch.from_numpy(accepted)
        refinement = Refinement(
            labels=new_labels,
            probs=new_probs,
            covered=covered,
            pred_iou=table.pred_iou[kept].to(probs.device),
            boxes=table.boxes[kept].to(probs.device),
            classes=table.classes[kept].to(probs.device),
            regions=table,
        )
        return keep_closed(refinement, probs, labels, config.classes)

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


def _argmax(probs: Tensor) -> Tensor:
    """Return the (H, W) int64 first class of the largest of (C, H, W) probabilities, no NaN."""
    if probs.device.type != "cpu":
        return probs.argmax(dim=0)
    # torch's own walks across the planes, which takes several times as long on a CPU.
    best = probs[0].clone()
    labels = torch.zeros(best.shape, dtype=torch.int64)
    for c in range(1, len(probs)):
        labels.masked_fill_(probs[c] > best, c)
        torch.maximum(best, probs[c], out=best)
    return labels


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


def _check(image: Tensor, probs: Tensor, device: torch.device) -> None:
    """Refuse an image or probabilities that the algorithm is not defined for."""
    for name, value in (("image", image), ("probs", probs)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: got {type(value).__name__}, accepted is a torch tensor")
    if image.dtype != torch.uint8:
        raise TypeError(f"image: got dtype {image.dtype}, accepted is uint8 (RGB, 0 to 255)")
    if image.ndim != 3 or image.shape[0] != 3 or image.numel() == 0:
        raise ValueError(f"image: got shape {tuple(image.shape)}, accepted is (3, H, W)")
    if not probs.is_floating_point():
        raise TypeError(f"probs: got dtype {probs.dtype}, accepted is a floating-point type")
    if probs.ndim != 3 or probs.shape[1:] != image.shape[1:] or probs.shape[0] == 0:
        raise ValueError(
            f"probs: got shape {tuple(probs.shape)}, accepted is (C, H, W) with the image's "
            f"(H, W) = {tuple(image.shape[1:])}"
        )
    if probs.device != device:
        raise ValueError(f"probs: got device {probs.device}, accepted is SAM's, {device}")
    # One download: each would make the CPU wait for the GPU.
    low, high = torch.stack(torch.aminmax(probs)).tolist()
    # NaN fails both comparisons; float16 softmax may exceed 1 by its last bit.
    if not (low >= 0 and high <= 1 + 1e-3):
        raise ValueError(
            f"probs: got values from {low:.4g} to {high:.4g}, accepted are probabilities in "
            "[0, 1] without NaN (apply softmax to logits)"
        )


def _checked_labels(labels: Tensor, probs: Tensor) -> Tensor:
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels: got {type(labels).__name__}, accepted is a torch tensor")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels: got dtype {labels.dtype}, accepted is an integer type")
    if labels.shape != probs.shape[1:]:
        raise ValueError(
            f"labels: got shape {tuple(labels.shape)}, accepted is (H, W) = "
            f"{tuple(probs.shape[1:])}, that of the probabilities"
        )
    return labels.to(device=probs.device, dtype=torch.int64)
