"""Image embeddings that outlive an epoch: the encoder looks at every image once."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from lightning_samrefine.models.base import Promptable
from lightning_samrefine.models.fingerprint import all_weights, checksums, raw_bytes, stamp
from lightning_samrefine.refine.cache.stores import DiskStore, Entry, MemoryStore, Store
from lightning_samrefine.utils.cache_dir import home
from lightning_samrefine.utils.device import Download, upload

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
    """

    hits: int
    misses: int
    nbytes: int

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

    Embeddings are kept in the autocast's dtype; where there is none, and everything but embeddings,
    as they are. A computed embedding is `rounded` in the same way before it is used: a miss and a
    hit give equal bits, and a refiner without a cache, which rounds as well, gives them too.

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
        self._limit = limit = int((_DEFAULT_GB[kind] if gb is None else gb) * 1e9)
        self._store: Store = (
            MemoryStore(limit)
            if kind == "memory"
            else DiskStore(limit, default_folder() if folder is None else Path(folder))
        )
        self._fingerprints: WeakKeyDictionary[nn.Module, dict[Any, _Fingerprint]] = (
            WeakKeyDictionary()
        )
        self._hits = self._misses = 0
        self._epoch = _Epoch()
        self._wrote: set[str] = set()
        self._writing = True

    def __reduce__(self) -> tuple[type[EmbeddingCache], tuple[Any, ...]]:
        # Copies, in another process say, begin empty.
        return type(self), self._arguments

    @property
    def stats(self) -> CacheStats:
        """Hits, misses and bytes since the cache was made."""
        return CacheStats(self._hits, self._misses, self._store.nbytes)

    def embed(
        self,
        sam: Promptable,
        images: Sequence[Tensor],
        dtype: torch.dtype | None,
        compute: Callable[[list[Tensor]], list[Any]],
        derived: str = "",
        digests: Sequence[str] | None = None,
    ) -> list[Any]:
        """Return an embedding for each image, computing only those that are not held.

        Args:
            sam: The model that ``compute`` asks.
            images: (3, H, W) uint8 each.
            dtype: Of the autocast that ``compute`` runs under; None for float32.
            compute: Embeds images, all in one call.
            derived: Names, with its version and settings, what ``compute`` returns instead of
                embeddings: tensors that depend on the image and on all of the model's weights.
            digests: The images' `image_digest`, where the caller has them already.

        Returns:
            Embeddings on the model's device: a tensor or a tuple of tensors, as ``compute`` gives.
        """
        keys = self._keys(sam, images, dtype, derived, digests)
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
            found[key] = self._put(key, embedding, None if derived else dtype)
        return [found[key] for key in keys]

    def recheck(self, module: nn.Module) -> None:
        """Compare a model's weights by what they hold when they are needed next.

        Otherwise they are only where torch has counted a change, and none through ``.data``.
        """
        for known in self._fingerprints.get(module, {}).values():
            known.state = None

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
                f"the images do not fit into cache_gb={self._limit / 1e9:g}: what is kept of each "
                "is larger than that, or is removed before it is needed again"
                if self._store.evictions > epoch.evictions
                else "the images change from epoch to epoch (random augmentation?)"
            )
            _warn(f"not one image was found in an epoch of {stage!r}: {reason}. No more are kept.")
        if epoch.written:
            self._wrote.add(stage)

    def _keys(
        self,
        sam: Promptable,
        images: Sequence[Tensor],
        dtype: torch.dtype | None,
        derived: str,
        digests: Sequence[str] | None,
    ) -> list[str] | None:
        """Return a key for each image; None where the model or an image cannot be hashed."""
        try:
            model = self._fingerprint(sam, derived)
            if digests is None:
                digests = [image_digest(image.detach().cpu().numpy()) for image in images]
            return [_key(model, digest, dtype, sam.device) for digest in digests]
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
            found, entry = _pack(embedding, dtype, keep=self._writing)
        except Exception as error:
            self._give_up(error)
            return embedding
        if entry is not None:
            try:
                self._store.put(key, entry)
                self._epoch.written += 1
            except Exception as error:
                self._give_up(error)
        return found

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
        whole = bool(derived)
        about = (CODE_VERSION, sam.name, sam.image_size)
        state = _state(sam.module, whole)
        of_module = self._fingerprints.setdefault(sam.module, {})
        known = of_module.get((whole, *about))
        if known is None or known.state != state:
            weights = _weights(sam.module, whole)
            contents = checksums(weights.values())
            if known is not None and known.contents == contents:
                known.state = state
            else:
                known = _Fingerprint(state, contents, weights_fingerprint(weights.items(), about))
                of_module[(whole, *about)] = known
        return f"{known.digest} {derived}" if derived else known.digest


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
class _Fingerprint:
    """The hash of a model's weights, and what tells whether it still holds.

    Attributes:
        state: As `_state` returned it; None where the contents have to be compared.
        contents: As `checksums` returned them.
        digest: As `weights_fingerprint` returned it.
    """

    state: tuple[Any, ...] | None
    contents: tuple[int, ...]
    digest: str


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
        digest.update(raw_bytes(tensor))
    return digest.hexdigest()


def rounded(embedding: Any, dtype: torch.dtype | None) -> Any:
    """Round the floats of an embedding to what a cache keeps; their own dtype comes back.

    Args:
        embedding: A tensor or a tuple of tensors; anything else is returned as it is.
        dtype: Of the autocast that made it; None rounds nothing.
    """
    if dtype is None:
        return embedding
    if isinstance(embedding, Tensor):
        is_float = embedding.is_floating_point()
        return embedding.to(dtype).to(embedding.dtype) if is_float else embedding
    if type(embedding) is tuple and all(isinstance(part, Tensor) for part in embedding):
        return tuple(rounded(part, dtype) for part in embedding)
    return embedding


def image_digest(image: np.ndarray) -> str:
    """Hash an image on the CPU, its dtype and shape included."""
    digest = hashlib.blake2b(digest_size=20)
    digest.update(repr((str(image.dtype), image.shape)).encode())
    digest.update(np.ascontiguousarray(image).data)
    return digest.hexdigest()


def _key(model: str, image: str, dtype: torch.dtype | None, device: torch.device) -> str:
    about = repr((model, dtype, device.type, image))
    return hashlib.blake2b(about.encode(), digest_size=20).hexdigest()


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


def _pack(embedding: Any, dtype: torch.dtype | None, keep: bool) -> tuple[Any, Entry | None]:
    """Round an embedding to ``dtype``; return it as it goes on being used, and as it is kept.

    Raises:
        TypeError: The embedding is neither a tensor nor a tuple of tensors.
    """
    tensors = (embedding,) if isinstance(embedding, Tensor) else embedding
    # A named tuple would come back without its names.
    if type(tensors) is not tuple or not all(isinstance(t, Tensor) for t in tensors):
        raise TypeError(f"embeddings of type {type(embedding).__name__} cannot be kept")
    entry = None
    if keep:
        narrow = [dtype if dtype and t.is_floating_point() else t.dtype for t in tensors]
        # Copies: a view would hold on to its whole batch, and a reader might write into it.
        narrowed = [
            t.detach().to(kept_as, copy=True, memory_format=torch.contiguous_format)
            for t, kept_as in zip(tensors, narrow, strict=True)
        ]
        if narrowed[0].device.type != "cpu":
            # In one wait; and out of pinned memory, which the system has little of.
            narrowed = [tensor.clone() for tensor in Download(*narrowed).tensors()]
        copies = tuple(narrowed)
        names = [str(t.dtype).removeprefix("torch.") for t in tensors]
        layout = "tensor" if isinstance(embedding, Tensor) else "tuple"
        entry = Entry(copies, " ".join([layout, *names]))
    return rounded(embedding, dtype), entry


def _unpack(entry: Entry, device: torch.device) -> Any:
    layout, *names = entry.note.split()
    tensors = tuple(
        upload(tensor, device).to(getattr(torch, name), copy=device.type == tensor.device.type)
        for tensor, name in zip(entry.tensors, names, strict=True)
    )
    return tensors[0] if layout == "tensor" else tensors


def _warn(message: str) -> None:
    warnings.warn(f"Embedding cache: {message}", RuntimeWarning, stacklevel=2)
