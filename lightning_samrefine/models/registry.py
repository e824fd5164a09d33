"""`load_sam`: builds a model by name, and checks and loads its weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch
from segment_anything.build_sam import build_sam_vit_b, build_sam_vit_h, build_sam_vit_l
from segment_anything.modeling import Sam
from torch import Tensor

from lightning_samrefine.models.base import Promptable
from lightning_samrefine.models.download import RemoteFile, fetch
from lightning_samrefine.models.hf import load_hf
from lightning_samrefine.models.sam import SamPromptable
from lightning_samrefine.models.tiny import build_tiny_sam
from lightning_samrefine.models.tiny_vit import build_sam_vit_t, mobile_sam_keys
from lightning_samrefine.utils.state_dicts import differing_keys, read_state_dict

HF = "hf"
RANDOM = "random"
_RANDOM_SEED = 0

StateDict = dict[str, Tensor]


@dataclass(frozen=True)
class _Architecture:
    """Constructor, weights and key names of the published checkpoints of a model."""

    build: Callable[[], Sam]
    to_module_keys: Callable[[StateDict], StateDict] = lambda state_dict: state_dict
    shipped: str | None = None
    published: RemoteFile | None = None
    accepts_points: bool = True


# The digits in the names of segment-anything's files begin their MD5, not their SHA-256.
_SEGMENT_ANYTHING = "https://dl.fbaipublicfiles.com/segment_anything"
# A commit, because the file of a branch may change.
_MOBILE_SAM = (
    "https://github.com/ChaoningZhang/MobileSAM/raw/f706ad9c4eb7f219c00d9050e46328518ffb65d2"
)

_ARCHITECTURES: Mapping[str, _Architecture] = {
    "tiny": _Architecture(
        build_tiny_sam, shipped="weights/tiny_sam.safetensors", accepts_points=False
    ),
    "vit_t": _Architecture(
        build_sam_vit_t,
        mobile_sam_keys,
        published=RemoteFile(
            f"{_MOBILE_SAM}/weights/mobile_sam.pt",
            "6dbb90523a35330fedd7f1d3dfc66f995213d81b29a5ca8108dbcdd4e37d6c2f",
            40_728_226,
        ),
    ),
    "vit_b": _Architecture(
        build_sam_vit_b,
        published=RemoteFile(
            f"{_SEGMENT_ANYTHING}/sam_vit_b_01ec64.pth",
            "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
            375_042_383,
        ),
    ),
    "vit_l": _Architecture(
        build_sam_vit_l,
        published=RemoteFile(
            f"{_SEGMENT_ANYTHING}/sam_vit_l_0b3195.pth",
            "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
            1_249_524_607,
        ),
    ),
    "vit_h": _Architecture(
        build_sam_vit_h,
        published=RemoteFile(
            f"{_SEGMENT_ANYTHING}/sam_vit_h_4b8939.pth",
            "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
            2_564_550_879,
        ),
    ),
}


# Names accepted by `load_sam`.
SAM_NAMES = (*_ARCHITECTURES, HF)


def load_sam(
    name: str, checkpoint: str | Path | None = None, device: str | torch.device = "cpu"
) -> Promptable:
    """Build a SAM and load its weights.

    Published weights are downloaded once, into ``$SAMREFINE_HOME/weights`` or, without it,
    ``lightning-samrefine/weights`` in the user's cache folder; ``SAMREFINE_OFFLINE=1`` disables
    downloads. If several processes need the weights, one downloads and the others wait.

    Args:
        name: ``"tiny"`` (ours, included, for demonstrations), ``"vit_t"`` (MobileSAM's TinyViT),
            ``"vit_b"``, ``"vit_l"`` or ``"vit_h"`` (segment-anything), or ``"hf"`` for a model of
            transformers: SAM, SAM-HQ, SAM 2 and 2.1, EdgeTAM, SAM 3's tracker.
        checkpoint: A ``.pt``/``.pth`` state dict or a ``.safetensors`` file; None for the included
            or published weights; ``"random"`` for seeded random weights, in tests and benchmarks.
            With ``"hf"`` a hub id, such as ``"facebook/sam2.1-hiera-small"``, or a folder written
            by ``save_pretrained``. Pickled code in a file is never executed.
        device: Device of the weights.

    Returns:
        The model, frozen and in eval mode, float32.

    Raises:
        ValueError: An unknown name, no checkpoint although one is needed, or weights of another
            model.
        FileNotFoundError: ``checkpoint`` does not exist, or the published weights could not be
            downloaded.
        ImportError: ``"hf"`` without the extra ``[hf]``.
    """
    if name == HF:
        if checkpoint is None:
            raise ValueError(
                "checkpoint must be a hub id for SAM hf, such as 'facebook/sam2.1-hiera-small', or "
                "a folder written by save_pretrained, got None"
            )
        return load_hf(checkpoint, device)
    if name not in _ARCHITECTURES:
        raise ValueError(f"name must be one of {', '.join(map(repr, SAM_NAMES))}, got {name!r}")
    architecture = _ARCHITECTURES[name]
    if checkpoint == RANDOM:
        warnings.warn(
            f"SAM {name} has random weights: its masks mean nothing. This is for tests and "
            "benchmarks.",
            stacklevel=2,
        )
        return SamPromptable(
            _build(architecture).to(device), name, accepts_points=architecture.accepts_points
        )
    path = _path(architecture, checkpoint)
    what = f"a complete SAM {name} state dict"
    state_dict = architecture.to_module_keys(read_state_dict(path, what))
    module = _build(architecture)
    if details := differing_keys(state_dict, module):
        raise ValueError(
            f"checkpoint must be {what}, got {str(path)!r}, which does not hold its weights"
            f"{_guess(state_dict)}. Its keys: {details}."
        )
    module.load_state_dict(state_dict, strict=True)
    return SamPromptable(module.to(device), name, accepts_points=architecture.accepts_points)


def _build(architecture: _Architecture) -> Sam:
    """Build with seeded initial weights, without changing the caller's random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_RANDOM_SEED)
        return architecture.build()


def _path(architecture: _Architecture, checkpoint: str | Path | None) -> Path:
    if checkpoint is not None:
        return Path(checkpoint).expanduser()
    if architecture.shipped is not None:
        return Path(str(resources.files("lightning_samrefine.models") / architecture.shipped))
    assert architecture.published is not None  # weights are included or published
    return fetch(architecture.published)


# Width of the image encoder's tokens in segment-anything's three sizes.
_VIT_WIDTHS = {768: "vit_b", 1024: "vit_l", 1280: "vit_h"}


def _guess(state_dict: StateDict) -> str:
    """Return ", but looks like SAM …" if the keys fit another model."""
    embedding = state_dict.get("image_encoder.pos_embed")
    if embedding is not None and embedding.shape[-1] in _VIT_WIDTHS:
        return f", but looks like SAM {_VIT_WIDTHS[embedding.shape[-1]]}"
    of_tiny_vit = ("image_encoder.backbone.stages.", "image_encoder.layers.")
    if any(key.startswith(of_tiny_vit) for key in state_dict):
        return ", but looks like SAM vit_t"
    return ""
