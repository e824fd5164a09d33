"""Image embeddings that outlive an epoch: every image is encoded once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lightning_samrefine.models.base import Promptable
from lightning_samrefine.models.fingerprint import checksums
from lightning_samrefine.refine.cache.keys import (
    entry_key,
    image_digest,
    key_weights,
    weights_fingerprint,
    weights_state,
)
from lightning_samrefine.refine.cache.stores import DiskStore, Entry, MemoryStore
from lightning_samrefine.utils.cache_dir import home
from lightning_samrefine.utils.device import Download, upload
from lightning_samrefine.utils.precision import rounded

# Raise this when an encoder's output changes by more than rounding: older entries never hit again.
CODE_VERSION = 1

_DEFAULT_GB = {"memory": 4.0, "disk": 20.0}


@dataclass(frozen=True)
class CacheStats:
    """Counts of a cache.

    Attributes:
        hits: Embeddings and mask proposals that were found.
        misses: Those that had to be computed.
        nbytes: Bytes held, in the whole folder for a cache on disk.
    """

    hits: int
    misses: int
    nbytes: int


class EmbeddingCache:
    """Image embeddings and mask proposals in memory or on disk, found by their inputs.

    The key is a hash of the image's pixels and shape, of the image encoder's weights, of the
    model's name and input size, of the precision, the kind of device and `CODE_VERSION`. So a
    changed augmentation or another checkpoint never hits, and the same image always does,
    whatever the order, epoch, run or process.

    Embeddings are kept in the autocast's dtype; without an autocast, and mask proposals always, as
    they are. A computed embedding is `rounded` in the same way before it is used: a miss and a hit
    have equal bits, also to those of a refiner without a cache, which rounds as well.

    No failure here stops a run: the cache warns once, and no more is kept.

    Args:
        kind: ``"memory"`` for this process and run, ``"disk"`` for a folder that processes and
            runs share.
        gb: Limit in 10⁹ bytes, beyond which the least recently used entries are removed; 4 in
            memory and 20 on disk if None. An embedding of SAM is 4 MB in float32 and 2 MB in
            bf16; an image's mask proposals are about as large.
        folder: The folder on disk, ``embeddings`` in the package's `home` if None.

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
            raise ValueError(f"cache must be 'memory', 'disk' or None, got {kind!r}")
        if gb is not None and (isinstance(gb, bool) or not isinstance(gb, int | float)):
            raise TypeError(f"cache_gb must be a number or None, got {type(gb).__name__}")
        if gb is not None and not gb > 0:
            raise ValueError(f"cache_gb must be above 0 or None, got {gb}")
        if kind == "memory" and folder is not None:
            raise ValueError(f"folder must be None for a cache in memory, got {str(folder)!r}")
        self.kind = kind
        self._arguments = (kind, gb, folder)
        self._limit = limit = int((_DEFAULT_GB[kind] if gb is None else gb) * 1e9)
        self._store: MemoryStore | DiskStore = (
            MemoryStore(limit)
            if kind == "memory"
            else DiskStore(limit, home() / "embeddings" if folder is None else Path(folder))
        )
        self._fingerprints: WeakKeyDictionary[nn.Module, dict[Any, _Fingerprint]] = (
            WeakKeyDictionary()
        )
        self._hits = self._misses = 0
        self._epoch = _Epoch()
        self._wrote: set[str] = set()
        self._writing = True
        # Computed, and stored once the outermost `fetch` has all of its values.
        self._pending: dict[str, Entry] = {}
        self._depth = 0

    def __reduce__(self) -> tuple[type[EmbeddingCache], tuple[Any, ...]]:
        # Copies, as in another process, begin empty.
        return type(self), self._arguments

    @property
    def stats(self) -> CacheStats:
        """Hits, misses and bytes since the cache was made."""
        return CacheStats(self._hits, self._misses, self._store.nbytes)

    def digests(self, images: Sequence[Tensor]) -> list[str] | None:
        """Hash images on any device, which begin to travel to the CPU together.

        Returns:
            40 hexadecimal digits an image; None if one of them cannot be hashed.
        """
        if not images:
            return []
        try:
            return [image_digest(image) for image in Download(*images).wait()]
        except Exception as error:
            self._give_up(error)
            return None

    def fetch(
        self,
        sam: Promptable,
        digests: Sequence[str] | None,
        dtype: torch.dtype | None,
        compute: Callable[[list[int]], list[Any]],
        count: int,
        derived: str = "",
    ) -> list[Any]:
        """Return a value for each of several images, computing only those that are not held.

        Values of a `fetch` inside ``compute`` are stored together with those of this one: on CUDA
        the CPU waits for them once.

        Args:
            sam: The model that ``compute`` uses.
            digests: The images' hashes, from `digests`; None computes all and keeps none.
            dtype: Of the autocast that ``compute`` runs under; None for float32.
            compute: Returns the values of the images with these indices.
            count: Number of images.
            derived: Empty for embeddings; otherwise the name of what ``compute`` returns, with its
                version and settings: tensors that depend on the image and on all of the model's
                weights.

        Returns:
            Values on the model's device: tensors or tuples of tensors, as ``compute`` returns them.
        """
        keys = None if digests is None else self._keys(sam, digests, dtype, derived)
        if keys is None:
            return compute(list(range(count)))
        found: dict[str, Any] = {}
        for key in keys:
            if key not in found and (value := self._get(key, sam.device)) is not None:
                found[key] = value
        missing = {key: index for index, key in enumerate(keys) if key not in found}
        misses = sum(key in missing for key in keys)
        self._count(len(keys) - misses, misses)
        if missing:
            self._depth += 1
            try:
                computed = compute(list(missing.values()))
            except BaseException:
                self._pending.clear()
                raise
            finally:
                self._depth -= 1
            for key, value in zip(missing, computed, strict=True):
                found[key] = self._prepare(key, value, None if derived else dtype)
            if self._depth == 0:
                self._store_pending()
        return [found[key] for key in keys]

    def recheck(self, module: nn.Module) -> None:
        """Compare a model's weights by their contents when they are needed next.

        Otherwise they are only compared after a change that torch counts, which those through
        ``.data`` are not.
        """
        for known in self._fingerprints.get(module, {}).values():
            known.state = None

    def end_epoch(self, stage: str) -> None:
        """Close an epoch, so that a cache that never hits is noticed.

        From the second epoch of a stage on, an epoch in which no image was found although an
        earlier one was kept means that the images change, by random augmentation for example, that
        SAM's weights do, or that the images do not fit. The cache then warns once and keeps no
        more.

        Args:
            stage: Distinguishes evaluations of different images, such as ``"val"``.
        """
        epoch, self._epoch = self._epoch, _Epoch(evictions=self._store.evictions)
        if stage in self._wrote and epoch.misses and not epoch.hits and self._writing:
            self._writing = False
            reason = (
                f"the images do not fit into cache_gb={self._limit / 1e9:g}: what is kept of each "
                "is larger than that, or is removed before it is needed again"
                if self._store.evictions > epoch.evictions
                else "the images or SAM's weights change from epoch to epoch (random augmentation?)"
            )
            _warn(f"not one image was found in an epoch of {stage!r}: {reason}. No more are kept.")
        if epoch.written:
            self._wrote.add(stage)

    def _keys(
        self, sam: Promptable, digests: Sequence[str], dtype: torch.dtype | None, derived: str
    ) -> list[str] | None:
        """Return a key for each image; None if the model cannot be hashed."""
        try:
            model = self._fingerprint(sam, derived)
            return [entry_key(model, digest, dtype, sam.device) for digest in digests]
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

    def _prepare(self, key: str, value: Any, dtype: torch.dtype | None) -> Any:
        """Set a value aside for `_store_pending`, and return it as a hit would."""
        try:
            tensors = _tensors(value)
            if self._writing:
                self._pending[key] = Entry(_narrowed(tensors, dtype), _note(value))
        except Exception as error:
            self._give_up(error)
            return value
        return rounded(value, dtype)

    def _store_pending(self) -> None:
        """Bring the values set aside to the CPU, in one wait, and store them."""
        pending, self._pending = self._pending, {}
        try:
            tensors = [tensor for own in pending.values() for tensor in own.tensors]
            if tensors and tensors[0].device.type != "cpu":
                # Clones, out of pinned memory: the system has little of it.
                tensors = [tensor.clone() for tensor in Download(*tensors).tensors()]
            remaining = iter(tensors)
            for key, own in pending.items():
                entry = Entry(tuple(next(remaining) for _ in own.tensors), own.note)
                self._store.put(key, entry)
                self._epoch.written += 1
        except Exception as error:
            self._give_up(error)

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
        """Hash the model that an entry depends on; again only after a change."""
        whole = bool(derived)
        about = (CODE_VERSION, sam.name, sam.image_size)
        state = weights_state(sam.module, whole)
        of_module = self._fingerprints.setdefault(sam.module, {})
        kind = (whole, *about)
        known = of_module.get(kind)
        if known is None or known.state != state:
            weights = key_weights(sam.module, whole)
            contents = checksums(weights.values())
            if known is not None and known.contents == contents:
                known.state = state
            else:
                known = _Fingerprint(state, contents, weights_fingerprint(weights.items(), about))
                of_module[kind] = known
        return f"{known.digest} {derived}" if derived else known.digest


def make_cache(
    cache: Literal["memory", "disk"] | EmbeddingCache | None, gb: float | None = None
) -> EmbeddingCache | None:
    """Make a cache of a kind; an existing one and None are returned as they are.

    Raises:
        TypeError: Neither a kind nor a cache, or a limit that is no number.
        ValueError: An unknown kind, a limit out of range, or a limit without a new cache.
    """
    if isinstance(cache, str):
        return EmbeddingCache(cache, gb)
    if cache is not None and not isinstance(cache, EmbeddingCache):
        raise TypeError(
            f"cache must be 'memory', 'disk', an EmbeddingCache or None, got {type(cache).__name__}"
        )
    if gb is not None:
        reason = "beside no cache" if cache is None else "beside an EmbeddingCache, which has one"
        raise ValueError(f"cache_gb must be None {reason}, got {gb}")
    return cache


@dataclass
class _Fingerprint:
    """The hash of a model's weights, and how to check whether it still holds.

    Attributes:
        state: As `weights_state` returned it; None if the contents have to be compared.
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


def _tensors(value: Any) -> tuple[Tensor, ...]:
    """Return the tensors of a value.

    Raises:
        TypeError: The value is neither a tensor nor a tuple of tensors.
    """
    tensors = (value,) if isinstance(value, Tensor) else value
    # A named tuple would come back without its names.
    if type(tensors) is not tuple or not all(isinstance(t, Tensor) for t in tensors):
        raise TypeError(
            f"embedding must be a tensor or a tuple of tensors, got {type(value).__name__}"
        )
    return tensors


def _narrowed(tensors: Sequence[Tensor], dtype: torch.dtype | None) -> tuple[Tensor, ...]:
    """Return copies with floats in ``dtype``; views would hold on to their whole batch."""
    narrow = [dtype if dtype and t.is_floating_point() else t.dtype for t in tensors]
    return tuple(
        t.detach().to(kept_as, copy=True, memory_format=torch.contiguous_format)
        for t, kept_as in zip(tensors, narrow, strict=True)
    )


def _note(value: Any) -> str:
    """Return what `_unpack` needs to rebuild a value: its layout and dtypes."""
    names = [str(t.dtype).removeprefix("torch.") for t in _tensors(value)]
    return " ".join(["tensor" if isinstance(value, Tensor) else "tuple", *names])


def _unpack(entry: Entry, device: torch.device) -> Any:
    layout, *names = entry.note.split()
    tensors = tuple(
        upload(tensor, device).to(getattr(torch, name), copy=device.type == tensor.device.type)
        for tensor, name in zip(entry.tensors, names, strict=True)
    )
    return tensors[0] if layout == "tensor" else tensors


def _warn(message: str) -> None:
    warnings.warn(f"Embedding cache: {message}", RuntimeWarning, stacklevel=2)
