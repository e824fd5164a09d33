"""A promptable model that keeps what depends on images alone: embeddings and mask proposals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_samrefine.models.base import (
    Embedding,
    JointPromptable,
    Promptable,
    Prompts,
    accepts_masks,
    accepts_points,
    can_skip_padding,
    has_multimask_output,
)
from lightning_samrefine.refine.cache.embedding_cache import EmbeddingCache
from lightning_samrefine.refine.decode import encode_images
from lightning_samrefine.refine.mask_proposals import MASKS_VERSION, MaskProposals, propose_masks
from lightning_samrefine.utils.memory import ChunkSize
from lightning_samrefine.utils.precision import active_autocast, autocast


@dataclass
class _ImageBatch:
    """Images that were encoded in one call, and their embeddings as far as they were needed."""

    images: list[Tensor]
    digests: list[str] | None
    keys: list[str] | None
    dtype: torch.dtype | None
    padding: bool
    embeddings: dict[int, Embedding] = field(default_factory=dict)


@dataclass(frozen=True)
class LazyEmbedding:
    """An embedding that is read from the cache, or computed, when it is first needed."""

    batch: _ImageBatch
    index: int

    @property
    def digest(self) -> str | None:
        """The image's hash, None if it could not be hashed."""
        return None if self.batch.digests is None else self.batch.digests[self.index]

    @property
    def key(self) -> str | None:
        """The embedding's key, None if the image could not be hashed."""
        return None if self.batch.keys is None else self.batch.keys[self.index]


class CachedSam:
    """A model in front of a cache, itself a `Promptable`.

    `encode_images` hashes the images and returns embeddings that are looked up when they are first
    needed: if an image's mask proposals are cached and its regions are not prompted, its embedding
    is never read. Embeddings are `rounded` to the autocast's dtype, in which the cache keeps them.

    Args:
        sam: The model.
        cache: Its key includes the model's weights and the autocast in effect.
    """

    def __init__(self, sam: Promptable, cache: EmbeddingCache) -> None:
        self.sam, self.cache = sam, cache
        self._images_at_once = ChunkSize()
        # The rest is the model's own.
        self.name, self.module = sam.name, sam.module
        self.image_size, self.mask_size = sam.image_size, sam.mask_size
        self.input_hw, self.mask_hw = sam.input_hw, sam.mask_hw
        self.postprocess_masks = sam.postprocess_masks
        self.accepts_masks, self.accepts_points = accepts_masks(sam), accepts_points(sam)
        self.has_multimask_output = has_multimask_output(sam)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.sam.device

    def encode_images(
        self,
        images: Sequence[Tensor],
        padding: bool = True,
        digests: Sequence[str] | None = None,
    ) -> list[Embedding]:
        """Hash images, each uint8 (3, H, W); on CUDA the CPU waits once for all of them.

        Args:
            images: The images.
            padding: See `lightning_samrefine.models.base.UnpaddedPromptable`. An image that has
                other embeddings without padding has other keys as well.
            digests: The images' hashes if they are known.

        Returns:
            A `LazyEmbedding` an image.
        """
        images = list(images)
        digests = self.cache.digests(images) if digests is None else list(digests)
        keys = digests
        if digests is not None and not padding and can_skip_padding(self.sam):
            keys = [
                f"{digest} without padding" if self._is_padded(image) else digest
                for digest, image in zip(digests, images, strict=True)
            ]
        batch = _ImageBatch(images, digests, keys, active_autocast(self.device), padding)
        return [LazyEmbedding(batch, index) for index in range(len(images))]

    def predict_masks(
        self, embedding: Embedding, prompts: Prompts, multimask_output: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Predict masks, with the embeddings of all images that were encoded together."""
        batch = embedding.batch
        everything = [LazyEmbedding(batch, index) for index in range(len(batch.images))]
        own = self.resolve(everything)[embedding.index]
        return self.sam.predict_masks(own, prompts, multimask_output)

    def predict_masks_jointly(
        self, embeddings: Sequence[Embedding], prompts: Sequence[Prompts]
    ) -> tuple[Tensor, Tensor]:
        """Predict masks on several images, in one batch if the model is a `JointPromptable`."""
        own = self.resolve(embeddings)
        if isinstance(self.sam, JointPromptable):
            return self.sam.predict_masks_jointly(own, prompts)
        results = [self.sam.predict_masks(*pair) for pair in zip(own, prompts, strict=True)]
        return torch.cat([logits for logits, _ in results]), torch.cat([iou for _, iou in results])

    def propose_masks(
        self,
        embeddings: Sequence[Embedding],
        image_hws: Sequence[tuple[int, int]],
        points_per_side: int,
        prompts_per_batch: int,
        at_once: ChunkSize,
    ) -> list[MaskProposals]:
        """Return the mask proposals of B images; those not in the cache are made and kept.

        See `lightning_samrefine.refine.mask_proposals.propose_masks` for the arguments.
        """

        def compute(missing: list[int]) -> list[Embedding]:
            settings = (points_per_side, prompts_per_batch, at_once)
            resolved = self.resolve([embeddings[i] for i in missing])
            proposals = [
                propose_masks(self.sam, own, image_hws[i], *settings)
                for i, own in zip(missing, resolved, strict=True)
            ]
            return [(masks.packed, masks.pred_iou) for masks in proposals]

        kept = self.cache.fetch(
            self.sam,
            _keys(embeddings),
            active_autocast(self.device),
            compute,
            len(embeddings),
            derived=f"masks {MASKS_VERSION} {points_per_side}",
        )
        return [
            MaskProposals(packed, pred_iou, self.sam.mask_hw(image_hw))
            for (packed, pred_iou), image_hw in zip(kept, image_hws, strict=True)
        ]

    def _is_padded(self, image: Tensor) -> bool:
        height, width = self.sam.input_hw((image.shape[1], image.shape[2]))
        return height != width

    def resolve(self, embeddings: Sequence[LazyEmbedding]) -> list[Embedding]:
        """Return the embeddings themselves; those not in the cache are encoded in one call."""
        pending = [one for one in embeddings if one.index not in one.batch.embeddings]
        if pending:
            dtype, padding = pending[0].batch.dtype, pending[0].batch.padding

            def compute(missing: list[int]) -> list[Embedding]:
                images = [pending[i].batch.images[pending[i].index] for i in missing]
                with autocast(dtype, self.device):
                    return encode_images(self.sam, images, self._images_at_once, padding)

            found = self.cache.fetch(self.sam, _keys(pending), dtype, compute, len(pending))
            for one, embedding in zip(pending, found, strict=True):
                one.batch.embeddings[one.index] = embedding
        return [one.batch.embeddings[one.index] for one in embeddings]


def _keys(embeddings: Sequence[LazyEmbedding]) -> list[str] | None:
    """Return the embeddings' keys; None if an image could not be hashed."""
    found = [one.key for one in embeddings if one.key is not None]
    return found if len(found) == len(embeddings) else None
