"""From an image and a raw prediction to a refined one.

read → split → prompt → predict → fuse, each a step with a type of its own: `RawPrediction`,
`RegionSet`, `Prompts`, `MaskPredictions`, `Refinement`. Algorithm 4, "Optimized SAM Refinement", is
the fusion of `fusion.algorithm4`; with an ``unsupported_weight`` that of `fusion.soft` takes its
place, and with fitted ``weights`` that of `fusion.fitted`. With ``points_per_side`` the masks of
`mask_proposals` take part.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from lightning_samrefine.config import RefineConfig
from lightning_samrefine.fusion_weights import FusionWeights
from lightning_samrefine.models.base import (
    Promptable,
    accepts_points,
    drop_derived,
    has_multimask_output,
)
from lightning_samrefine.refine.cache.embedding_cache import EmbeddingCache, make_cache
from lightning_samrefine.refine.class_filter import check_classes, restore_frozen_classes
from lightning_samrefine.refine.fusion.algorithm4 import fuse_by_algorithm4
from lightning_samrefine.refine.fusion.fitted import fuse_fitted
from lightning_samrefine.refine.fusion.soft import fuse_soft
from lightning_samrefine.refine.mask_predictions import ImagePredictions
from lightning_samrefine.refine.mask_predictor import MaskPredictor
from lightning_samrefine.refine.raw_prediction import read_predictions
from lightning_samrefine.refine.results import Refinement
from lightning_samrefine.utils.precision import autocast, autocast_dtype


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
        ValueError: An unknown precision or cache, a limit that does not apply, or weights that were
            fitted with another model.

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
        self._predictor = MaskPredictor(sam, precision, self.cache)
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

    def __call__(
        self,
        image: Tensor,
        probs: Tensor,
        labels: Tensor | None = None,
        with_probs: bool = True,
    ) -> Refinement:
        """Refine one image's prediction.

        Args:
            image: (3, H, W) uint8 RGB, on any device.
            probs: (C, H, W) float in [0, 1] on SAM's device, the raw per-class probabilities L.
            labels: (H, W) integer, the raw label map S; the argmax of ``probs`` if None. Values
                outside [0, C) are unknown: no regions of their own, yet a mask may cover them.
            with_probs: Whether the refinement has refined probabilities, which take as much memory
                as ``probs``; labels alone are computed in strips.

        Raises:
            TypeError: A wrong type or dtype.
            ValueError: A wrong shape, device or range, NaN included.
        """
        given = None if labels is None else [labels]
        return self.refine_batch([image], [probs], given, with_probs)[0]

    @torch.no_grad()
    def refine_batch(
        self,
        images: Sequence[Tensor] | Tensor,
        probs: Sequence[Tensor] | Tensor,
        labels: Sequence[Tensor] | Tensor | None = None,
        with_probs: bool = True,
    ) -> list[Refinement]:
        """Refine B images, each of its own size, in order; arguments as for one image.

        Raises:
            TypeError: A wrong type or dtype.
            ValueError: A wrong count, shape, device or range.
        """
        predicted = self.predict(images, probs, labels)
        return [self.fuse(predictions, with_probs=with_probs) for predictions in predicted]

    @torch.no_grad()
    def predict(
        self,
        images: Sequence[Tensor] | Tensor,
        probs: Sequence[Tensor] | Tensor,
        labels: Sequence[Tensor] | Tensor | None = None,
        config: RefineConfig | None = None,
    ) -> Iterator[ImagePredictions]:
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
        return self._predictor(read, config)

    @torch.no_grad()
    def fuse(
        self,
        predictions: ImagePredictions,
        config: RefineConfig | None = None,
        with_probs: bool = True,
    ) -> Refinement:
        """Accept or reject regions and fuse their masks into maps (steps 8 to 12).

        Args:
            predictions: From `predict`; they are not changed, so they can be fused again with
                another acceptance or fusion at the cost of the fusion.
            config: In place of the refiner's own.
            with_probs: As for a call with one image.
        """
        config, raw = self._acting(config), predictions.raw
        if isinstance(config.weights, FusionWeights):
            fusion: Callable[..., Refinement] = fuse_fitted
        else:
            fusion = fuse_soft if config.unsupported_weight else fuse_by_algorithm4
        with autocast(None, self.sam.device):  # whatever the caller's
            fused = fusion(predictions, config, self.sam, with_probs)
        return restore_frozen_classes(fused, raw, config.classes)

    def _acting(self, config: RefineConfig | None) -> RefineConfig:
        return self.config if config is None else _possible(config, self.sam)


def _possible(config: RefineConfig, sam: Promptable) -> RefineConfig:
    """Return the configuration, with region prompts instead of points if the model needs it.

    Raises:
        ValueError: Its weights were fitted with another model.
    """
    if isinstance(config.weights, FusionWeights):
        config.weights.check_sam(sam.name)
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
