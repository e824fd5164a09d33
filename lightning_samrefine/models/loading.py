"""`load_sam`: a named model with its weights, or an error that says what is wrong with them."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from segment_anything.build_sam import build_sam_vit_b, build_sam_vit_h, build_sam_vit_l
from segment_anything.modeling import Sam
from torch import Tensor

from lightning_samrefine.models.sam import SamPromptable
from lightning_samrefine.models.tiny import build_tiny_sam
from lightning_samrefine.models.tiny_vit import build_sam_vit_t, mobile_sam_keys

RANDOM = "random"
_RANDOM_SEED = 0

StateDict = dict[str, Tensor]


@dataclass(frozen=True)
class _Architecture:
    """How to build a model, and how its published checkpoints name their weights."""

    build: Callable[[], Sam]
    to_module_keys: Callable[[StateDict], StateDict] = lambda state_dict: state_dict
    shipped: str | None = None
    answers_points: bool = True


_ARCHITECTURES: Mapping[str, _Architecture] = {
    "tiny": _Architecture(
        build_tiny_sam, shipped="weights/tiny_sam.safetensors", answers_points=False
    ),
    "vit_t": _Architecture(build_sam_vit_t, mobile_sam_keys),
    "vit_b": _Architecture(build_sam_vit_b),
    "vit_l": _Architecture(build_sam_vit_l),
    "vit_h": _Architecture(build_sam_vit_h),
}


def load_sam(
    name: str, checkpoint: str | Path | None = None, device: str | torch.device = "cpu"
) -> SamPromptable:
    """Build a SAM and load its weights.

    Args:
        name: ``"tiny"`` (ours, shipped, for demonstrations), ``"vit_t"`` (MobileSAM's TinyViT),
            ``"vit_b"``, ``"vit_l"`` or ``"vit_h"`` (segment-anything).
        checkpoint: A ``.pt``/``.pth`` state dict or a ``.safetensors`` file; None for weights
            that are shipped; ``"random"`` for seeded random weights, in tests and benchmarks.
            Pickled code in a file is never executed.
        device: Where the weights go.

    Returns:
        The model, frozen and in eval mode, float32.

    Raises:
        ValueError: An unknown name, no checkpoint where one is needed, or weights of another
            model.
        FileNotFoundError: No file at ``checkpoint``.
    """
    if name not in _ARCHITECTURES:
        raise ValueError(f"name: got {name!r}, accepted are {', '.join(map(repr, _ARCHITECTURES))}")
    architecture = _ARCHITECTURES[name]
    if checkpoint == RANDOM:
        warnings.warn(
            f"SAM {name} has random weights: its masks mean nothing. This is for tests and "
            "benchmarks.",
            stacklevel=2,
        )
        return SamPromptable(
            _build(architecture).to(device), name, answers_points=architecture.answers_points
        )
    path = _path(name, architecture, checkpoint)
    state_dict = architecture.to_module_keys(_read(path, name))
    module = _build(architecture)
    _check_keys(state_dict, module, path, name)
    module.load_state_dict(state_dict, strict=True)
    return SamPromptable(module.to(device), name, answers_points=architecture.answers_points)


def _build(architecture: _Architecture) -> Sam:
    """Build with seeded initial weights, leaving the caller's random state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_RANDOM_SEED)
        return architecture.build()


def _path(name: str, architecture: _Architecture, checkpoint: str | Path | None) -> Path:
    if checkpoint is None and architecture.shipped is not None:
        return Path(str(resources.files("lightning_samrefine.models") / architecture.shipped))
    if checkpoint is None:
        raise ValueError(
            f"checkpoint: got None, accepted for SAM {name} is the path of its weights "
            f"(or {RANDOM!r} for random ones)"
        )
    path = Path(checkpoint).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"checkpoint: got {str(checkpoint)!r}, where there is no file; accepted is the path of "
            f"a SAM {name} state dict"
        )
    return path


def _read(path: Path, name: str) -> StateDict:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state_dict = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"checkpoint: got {str(path)!r}, which cannot be read as weights ({error}); accepted "
            f"is a SAM {name} state dict of tensors"
        ) from error
    if isinstance(state_dict, Mapping) and isinstance(state_dict.get("model"), Mapping):
        state_dict = state_dict["model"]
    if not isinstance(state_dict, Mapping) or not all(
        isinstance(value, Tensor) for value in state_dict.values()
    ):
        raise ValueError(
            f"checkpoint: got {str(path)!r}, which holds no state dict; accepted is a SAM {name} "
            "state dict of tensors"
        )
    return dict(state_dict)


def _check_keys(state_dict: StateDict, module: Sam, path: Path, name: str) -> None:
    """Refuse weights of another model, naming the model they look like."""
    expected = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    found = {key: tuple(value.shape) for key, value in state_dict.items()}
    if expected == found:
        return
    missing = sorted(expected.keys() - found.keys())
    unexpected = sorted(found.keys() - expected.keys())
    reshaped = [
        key for key in sorted(expected.keys() & found.keys()) if expected[key] != found[key]
    ]
    details = "; ".join(
        f"{len(keys)} {what} ({keys[0]}, …)"
        for what, keys in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", reshaped),
        )
        if keys
    )
    raise ValueError(
        f"checkpoint: got {str(path)!r}, which does not hold the weights of SAM {name}"
        f"{_guess(state_dict)}. Its keys: {details}. Accepted is a complete SAM {name} state dict."
    )


# Side of the image encoder's tokens, by which segment-anything's three sizes differ.
_VIT_WIDTHS = {768: "vit_b", 1024: "vit_l", 1280: "vit_h"}


def _guess(state_dict: StateDict) -> str:
    """Return ", but looks like SAM …" where the keys tell."""
    embedding = state_dict.get("image_encoder.pos_embed")
    if embedding is not None and embedding.shape[-1] in _VIT_WIDTHS:
        return f", but looks like SAM {_VIT_WIDTHS[embedding.shape[-1]]}"
    if any(key.startswith("image_encoder.backbone.stages.") for key in state_dict) or any(
        key.startswith("image_encoder.layers.") for key in state_dict
    ):
        return ", but looks like SAM vit_t"
    return ""
