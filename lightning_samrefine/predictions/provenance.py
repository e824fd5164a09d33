"""The settings and weights behind a folder of predictions; equal ones may share the folder."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from lightning_samrefine.config import RefineConfig
from lightning_samrefine.models.base import Promptable
from lightning_samrefine.refine.cache.keys import weights_fingerprint

# Raise this when the files change for the same settings.
FORMAT = 2

# A bound on memory, and names that are checked against the run: neither changes the result.
_NOT_RESULT = ("max_prompts_per_batch", "class_names")


@dataclass(frozen=True)
class Provenance:
    """Everything but the image that a prediction depends on.

    Attributes:
        refine: The thresholds that change the result, by name.
        sam: Name of SAM, fingerprint of its weights, and the dtype it computes in.
        segmenter: Class and fingerprint of the segmenter's weights, which is None if they
            could not be read.
        inputs: How images and scores are read, and what is written.
    """

    refine: Mapping[str, Any]
    sam: Mapping[str, Any]
    segmenter: Mapping[str, Any]
    inputs: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        config: RefineConfig,
        sam: Promptable,
        precision: str,
        segmenter: nn.Module,
        inputs: Mapping[str, Any],
    ) -> Provenance:
        """Describe a run.

        On a sharded segmenter this is a collective call.
        """
        refine = {key: value for key, value in asdict(config).items() if key not in _NOT_RESULT}
        # JSON is how a later run sees this one: tuples become lists here as well.
        return cls.parse(
            json.dumps(
                {
                    "format": FORMAT,
                    "refine": refine,
                    "sam": {
                        "name": sam.name,
                        "weights": weights_fingerprint(_tensors(sam.module)),
                        "precision": precision,
                    },
                    "segmenter": {
                        "class": _class_name(segmenter),
                        "weights": _fingerprint(segmenter),
                    },
                    "inputs": dict(inputs),
                }
            )
        )

    @classmethod
    def parse(cls, text: str | bytes) -> Provenance:
        """Read the text of `dumps`.

        Raises:
            ValueError: Something else, or of another format.
        """
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"text must be JSON, got {error}") from error
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            got = found.get("format") if isinstance(found, dict) else type(found).__name__
            raise ValueError(f"format must be {FORMAT}, got {got!r}")
        parts = {key: found.get(key) for key in ("refine", "sam", "segmenter", "inputs")}
        if not all(isinstance(part, dict) for part in parts.values()):
            raise ValueError("refine, sam, segmenter and inputs must be objects, got others")
        return cls(**parts)  # type: ignore[arg-type]

    def dumps(self) -> str:
        """Return JSON, equal for equal runs."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=2, sort_keys=True) + "\n"

    def differences(self, other: Provenance) -> list[str]:
        """Describe how another run differs; a value that is unknown on one side counts as equal."""
        mine, theirs = dict(_flat(asdict(self))), dict(_flat(asdict(other)))
        return [
            f"{key}: {theirs.get(key)!r} there, {mine.get(key)!r} now"
            for key in sorted(mine.keys() | theirs.keys())
            if mine.get(key) != theirs.get(key)
            and not (key.endswith(".weights") and None in (mine.get(key), theirs.get(key)))
        ]

    @property
    def refine_hash(self) -> str:
        """16 hexadecimal digits of the thresholds."""
        text = json.dumps(self.refine, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _class_name(module: nn.Module) -> str:
    """Name a module's class as its author wrote it: ``fully_shard`` derives another from it."""
    own = next(cls for cls in type(module).__mro__ if not cls.__module__.startswith("torch."))
    return f"{own.__module__}.{own.__qualname__}"


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        yield name.replace("_orig_mod.", ""), tensor  # which torch.compile puts in


def _fingerprint(segmenter: nn.Module) -> str | None:
    """Hash a segmenter's weights, None if they cannot be read as plain tensors."""
    try:
        return weights_fingerprint((name, _whole(tensor)) for name, tensor in _tensors(segmenter))
    except Exception as error:  # quantized, sparse, lazy, flattened by a strategy …
        warnings.warn(
            f"The segmenter's weights cannot be read ({type(error).__name__}: {error}); whether "
            "a later run has the same ones will not be checked.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def _whole(tensor: Tensor) -> Tensor:
    """Return a sharded tensor's whole value."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()
