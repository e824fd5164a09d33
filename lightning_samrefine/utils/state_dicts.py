"""State dicts of weights: read from files, and compared with those of a module."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn


def read_state_dict(path: Path, what: str) -> dict[str, Tensor]:
    """Read a ``.safetensors`` file, or a state dict of torch, alone or under the key ``"model"``.

    Args:
        path: The file. Pickled code in it is never executed.
        what: What the file must hold, for errors, such as ``"a SAM vit_b state dict"``.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A file of anything else.
    """
    refusal = f"checkpoint must be {what}, got {str(path)!r}, which"
    if not path.is_file():
        raise FileNotFoundError(f"{refusal} is not a file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # Memory-mapped, so that a node's processes share one copy; not possible for torch's old
        # format.
        mmap = zipfile.is_zipfile(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError) as error:
        raise ValueError(f"{refusal} cannot be read as weights ({error})") from error
    if isinstance(state, Mapping) and isinstance(state.get("model"), Mapping):
        state = state["model"]
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{refusal} holds no state dict")
    return dict(state)


def differing_keys(state: Mapping[str, Tensor], module: nn.Module) -> str:
    """Return how a state dict's keys and shapes differ from a module's; empty if they do not."""
    expected = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    found = {key: tuple(value.shape) for key, value in state.items()}
    both = expected.keys() & found.keys()
    kinds = {
        "missing": expected.keys() - found.keys(),
        "unexpected": found.keys() - expected.keys(),
        "of another shape": {key for key in both if expected[key] != found[key]},
    }
    return "; ".join(f"{len(keys)} {kind} ({min(keys)}, …)" for kind, keys in kinds.items() if keys)
