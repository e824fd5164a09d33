"""Image embeddings that outlive an epoch: the encoder looks at every image once."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lightning_samrefine.cache_store import DiskStore, Entry, MemoryStore, Store
from lightning_samrefine.home import home
from lightning_samrefine.models.identity import all_weights, stamp
from lightning_samrefine.models.protocol import Promptable

# Raise this when an encoder's output changes by more than rounding: older entries never hit again.
CODE_VERSION = 1

_DEFAULT_GB = {"memory": 4.0, "disk": 20.0}


@dataclass(frozen=True)
class CacheStats:
    """What a cache has done so far.

    Attributes:
        hits: Embeddings that were found.
        misses: Embeddings that had to be computed.
        nbytes: Bytes held, in the whole folder for a cache on disk.
        prompt_hits: Prompts of regions whose answers were found.
        prompt_misses: Prompts of regions that the model had to answer.
    """

    hits: int
    misses: int
    nbytes: int
    prompt_hits: int = 0
    prompt_misses: int = 0

    @property
    def hit_rate(self) -> float:
        """Hits among all lookups; NaN before the first."""
        lookups = self.hits + self.misses
        return self.hits / lookups if lookups else float("nan")


class EmbeddingCache:
    """Image embeddings in memory or on disk, found again by what they were computed from.

    The key is a hash of the image's pixels and shape, of the image encoder's weights, of the
    model's name and input size, of the precision, the kind of device and `CODE_VERSION`. So a
    changed augmentation or another checkpoint never hits, and the same image always does,
    whatever the order, epoch, run or process.

    Embeddings are kept in the autocast's dtype, float32 where there is none. A computed embedding
    is rounded in the same way before it is used: a miss and a hit give equal bits.

    Nothing that goes wrong here stops a run: the cache says so once and goes on without.

    Args:
        kind: ``"memory"`` for this process and run, ``"disk"`` for a folder that processes and
            runs share.
        gb: Limit in 10⁹ bytes, beyond which what was used longest ago is removed; 4 in memory and
            20 on disk where None. An embedding of SAM is 4 MB in float32 and 2 MB in bf16,
            and so are the image-driven masks that are kept in its place.
        folder: The folder on disk, `default_folder` where None.

    Raises:
        ValueError: An unknown kind, a limit not above 0, or a folder for a cache in memory.
        TypeError: A limit that is no number.
    """

    def __init__(
        self,
        kind: Literal["memory", "disk"],
        gb: float | None = None,
        folder: str | Path | None = None,
    ) -> None:
        if kind not in _DEFAULT_GB:
            raise ValueError(f"cache: got {kind!r}, accepted are 'memory', 'disk' and None")
        if gb is not None and (isinstance(gb, bool) or not isinstance(gb, int | float)):
            raise TypeError(f"cache_gb: got {type(gb).__name__}, accepted is a number or None")
        if gb is not None and not gb > 0:
            raise ValueError(f"cache_gb: got {gb}, accepted is a number above 0, or None")
        if kind == "memory" and folder is not None:
            raise ValueError("folder: got one for a cache in memory, accepted is None there")
        self.kind = kind
        self._arguments = (kind, gb, folder)
        limit = int((_DEFAULT_GB[kind] if gb is None else gb) * 1e9)
        self._store: Store = (
            MemoryStore(limit)
            if kind == "memory"
            else DiskStore(limit, default_folder() if folder is None else Path(folder))
        )
        self._fingerprints: WeakKeyDictionary[nn.Module, dict[str, tuple[Any, str]]] = (
            WeakKeyDictionary()
        )
        self._hits = self._misses = 0
        self._prompt_hits = self._prompt_misses = 0
        self._epoch = _Epoch()
        self._wrote: set[str] = set()
        self._writing = True

    def __reduce__(self) -> tuple[type[EmbeddingCache], tuple[Any, ...]]:
        # Copies, in another process say, begin empty.
        return type(self), self._arguments

    @property
    def stats(self) -> CacheStats:
        """Hits, misses and bytes since the cache was made."""
        return CacheStats(
            self._hits,
            self._misses,
            self._store.nbytes,
            self._prompt_hits,
            self._prompt_misses,
        )

    def embed(
        self,
        sam: Promptable,
        images: Sequence[Tensor],
        dtype: torch.dtype | None,
        compute: Callable[[list[Tensor]], list[Any]],
        derived: str = "",
    ) -> list[Any]:
        """Return an embedding for each image, computing only those that are not held.

        Args:
            sam: The model that ``compute`` asks.
            images: (3, H, W) uint8 each.
            dtype: Of the autocast that ``compute`` runs under; None for float32.
            compute: Embeds images, all in one call.
            derived: Names, with its version and settings, what ``compute`` returns instead of
                embeddings: tensors that depend on the image and on all of the model's weights.

        Returns:
            Embeddings on the model's device: a tensor or a tuple of tensors, as ``compute`` gives.
        """
        keys = self._keys(sam, images, dtype, derived)
        if keys is None:
            return compute(list(images))
        found: dict[str, Any] = {}
        for key in keys:
            if key not in found and (embedding := self._get(key, sam.device)) is not None:
                found[key] = embedding
        missing = {key: image for key, image in zip(keys, images, strict=True) if key not in found}
        misses = sum(key in missing for key in keys)
        self._count(len(keys) - misses, misses)
        computed = compute(list(missing.values())) if missing else []
        for key, embedding in zip(missing, computed, strict=True):
            found[key] = self._put(key, embedding, dtype)
        return [found[key] for key in keys]

    def recall(
        self, sam: Promptable, image: Tensor, dtype: torch.dtype | None, derived: str
    ) -> tuple[Tensor, ...] | None:
        """Return what `keep` was last given for an image, on the CPU; None where nothing is held.

        Args:
            sam: The model that the tensors come from.
            image: (3, H, W) uint8.
            dtype: Of the autocast that they were made under; None for float32.
            derived: As for `embed`.
        """
        keys = self._keys(sam, [image], dtype, derived)
        return None if keys is None else self._get(keys[0], torch.device("cpu"))

    def keep(
        self,
        sam: Promptable,
        image: Tensor,
        dtype: torch.dtype | None,
        derived: str,
        tensors: tuple[Tensor, ...],
    ) -> None:
        """Hold tensors for `recall`, in place of those that are held.

        Args:
            sam: The model that the tensors come from.
            image: (3, H, W) uint8.
            dtype: Of the autocast that they were made under; None for float32.
            derived: As for `embed`.
            tensors: Integers, for floats would be rounded to ``dtype``.
        """
        if self._writing and (keys := self._keys(sam, [image], dtype, derived)) is not None:
            self._put(keys[0], tensors, dtype)

    def count_prompts(self, hits: int, misses: int) -> None:
        """Count prompts whose answers were found, and those that were not."""
        self._prompt_hits += hits
        self._prompt_misses += misses

    def end_epoch(self, stage: str) -> None:
        """Close an epoch, so that a cache that never hits is noticed.

        From the second epoch of a stage on, an epoch in which no image was found although an
        earlier one was kept means that the images change, by random augmentation for example, or
        that they do not fit. The cache then says so once and keeps no more.

        Args:
            stage: What tells evaluations of different images apart, such as ``"val"``.
        """
        epoch, self._epoch = self._epoch, _Epoch(evictions=self._store.evictions)
        if stage in self._wrote and epoch.misses and not epoch.hits and self._writing:
            self._writing = False
            reason = (
                "the images do not fit into cache_gb: each is removed before it is asked for again"
                if self._store.evictions > epoch.evictions
                else "the images change from epoch to epoch (random augmentation?)"
            )
            _warn(f"not one image was found in an epoch of {stage!r}: {reason}. No more are kept.")
        if epoch.written:
            self._wrote.add(stage)

    def _keys(
        self, sam: Promptable, images: Sequence[Tensor], dtype: torch.dtype | None, derived: str
    ) -> list[str] | None:
        """Return a key for each image; None where the model or an image cannot be hashed."""
        try:
            model = self._fingerprint(sam, derived)
            return [_key(model, image, dtype, sam.device) for image in images]
        except Exception as error:
            self._give_up(error)
            return None

    def _get(self, key: str, device: torch.device) -> Any:
        try:
            entry = self._store.get(key)
            return None if entry is None else _unpack(entry, device)
        except Exception as error:
            self._give_up(error)
            return None

    def _put(self, key: str, embedding: Any, dtype: torch.dtype | None) -> Any:
        """Keep an embedding and return it as a hit would."""
        try:
            rounded, entry = _pack(embedding, dtype or torch.float32, keep=self._writing)
        except Exception as error:
            self._give_up(error)
            return embedding
        if entry is not None:
            try:
                self._store.put(key, entry)
                self._epoch.written += 1
            except Exception as error:
                self._give_up(error)
        return rounded

    def _count(self, hits: int, misses: int) -> None:
        self._hits += hits
        self._misses += misses
        self._epoch.hits += hits
        self._epoch.misses += misses

    def _give_up(self, error: Exception) -> None:
        if self._writing:
            self._writing = False
            _warn(f"{type(error).__name__}: {error}. The run goes on; no more embeddings are kept.")

    def _fingerprint(self, sam: Promptable, derived: str) -> str:
        """Hash what an entry depends on besides the image; anew only after a change."""
        state = _state(sam.module, whole=bool(derived))
        of_module = self._fingerprints.setdefault(sam.module, {})
        known = of_module.get(derived)
        if known is None or known[0] != state:
            about = (CODE_VERSION, sam.name, sam.image_size, *([derived] if derived else []))
            weights = _weights(sam.module, whole=bool(derived))
            known = (state, weights_fingerprint(weights.items(), about))
            of_module[derived] = known
        return known[1]


def make_cache(
    cache: Literal["memory", "disk"] | EmbeddingCache | None, gb: float | None = None
) -> EmbeddingCache | None:
    """Make a cache of a kind; one that exists and None are handed back.

    Raises:
        TypeError: Neither a kind nor a cache, or a limit that is no number.
        ValueError: An unknown kind, or a limit out of range or where none applies.
    """
    if isinstance(cache, str):
        return EmbeddingCache(cache, gb)
    if cache is not None and not isinstance(cache, EmbeddingCache):
        raise TypeError(
            f"cache: got {type(cache).__name__}, accepted are 'memory', 'disk', an EmbeddingCache "
            "and None"
        )
    if gb is not None:
        reason = "beside no cache" if cache is None else "beside an EmbeddingCache, which has one"
        raise ValueError(f"cache_gb: got {gb} {reason}, accepted is None there")
    return cache


@dataclass
class _Epoch:
    """Counts of the running epoch; ``evictions`` as they stood at its start."""

    hits: int = 0
    misses: int = 0
    written: int = 0
    evictions: int = 0


def default_folder() -> Path:
    """Return ``embeddings`` in the package's `home`."""
    return home() / "embeddings"


def weights_fingerprint(weights: Iterable[tuple[str, Tensor]], about: tuple[Any, ...] = ()) -> str:
    """Hash tensors with their names, dtypes and shapes, in their order.

    Args:
        weights: Names and tensors on any device.
        about: What else the hash depends on.

    Returns:
        40 hexadecimal digits.
    """
    digest = hashlib.blake2b(digest_size=20)
    digest.update(repr(about).encode())
    for name, tensor in weights:
        digest.update(repr((name, tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _key(model: str, image: Tensor, dtype: torch.dtype | None, device: torch.device) -> str:
    digest = hashlib.blake2b(digest_size=20)
    digest.update(repr((model, dtype, device.type, image.dtype, tuple(image.shape))).encode())
    digest.update(_bytes(image))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())


def _weights(module: nn.Module, whole: bool) -> dict[str, Tensor]:
    """Return all that the encoder computes with, the model's own buffers (its mean) included.

    Or all that the whole model computes with.
    """
    if whole:
        return {**dict(module.named_parameters()), **dict(module.named_buffers())}
    encoder = getattr(module, "image_encoder", module)
    own = module.named_buffers(recurse=False)
    return {
        **{f"encoder.{name}": tensor for name, tensor in encoder.named_parameters()},
        **{f"encoder.{name}": tensor for name, tensor in encoder.named_buffers()},
        **dict(own),
    }


def _state(module: nn.Module, whole: bool) -> tuple[tuple[Any, ...], ...]:
    """Return what changes when one of `_weights` is replaced, moved or written to."""
    if whole:
        return stamp(all_weights(module))
    encoder = getattr(module, "image_encoder", module)
    return stamp([*all_weights(encoder), *module.buffers(recurse=False)])


def _pack(embedding: Any, dtype: torch.dtype, keep: bool) -> tuple[Any, Entry | None]:
    """Round an embedding; return it as it goes on being used, and as it is kept.

    Raises:
        TypeError: The embedding is neither a tensor nor a tuple of tensors.
    """
    tensors = (embedding,) if isinstance(embedding, Tensor) else embedding
    if not isinstance(tensors, tuple) or not all(isinstance(t, Tensor) for t in tensors):
        raise TypeError(f"embeddings of type {type(embedding).__name__} cannot be kept")
    stored = tuple(t.to(dtype) if t.is_floating_point() else t for t in tensors)
    rounded = tuple(s.to(t.dtype) for s, t in zip(stored, tensors, strict=True))
    entry = None
    if keep:
        # Copies: a view would hold on to its whole batch, and a reader might write into it.
        copies = tuple(
            s.detach().to("cpu", copy=True, memory_format=torch.contiguous_format) for s in stored
        )
        names = [str(t.dtype).removeprefix("torch.") for t in tensors]
        layout = "tensor" if isinstance(embedding, Tensor) else "tuple"
        entry = Entry(copies, " ".join([layout, *names]))
    return (rounded[0] if isinstance(embedding, Tensor) else rounded), entry


def _unpack(entry: Entry, device: torch.device) -> Any:
    layout, *names = entry.note.split()
    tensors = tuple(
        tensor.to(device, getattr(torch, name), copy=True)
        for tensor, name in zip(entry.tensors, names, strict=True)
    )
    return tensors[0] if layout == "tensor" else tensors


def _warn(message: str) -> None:
    warnings.warn(f"Embedding cache: {message}", RuntimeWarning, stacklevel=2)
