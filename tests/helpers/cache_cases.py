"""Caches, and images for them."""

from __future__ import annotations

import torch

from lightning_samrefine.refine.cache.embedding_cache import EmbeddingCache


def make_cache(kind, folder, gb=None):
    return EmbeddingCache(kind, gb, folder if kind == "disk" else None)


def images(count, size=(24, 32), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator)
        for _ in range(count)
    ]


def embed(cache, sam, batch, dtype=None, compute=None, derived=""):
    """Return what `EmbeddingCache.fetch` returns for images; ``compute`` takes the missing ones."""
    compute = compute or sam.encode_images
    return cache.fetch(
        sam,
        cache.digests(batch),
        dtype,
        lambda missing: compute([batch[i] for i in missing]),
        len(batch),
        derived,
    )
