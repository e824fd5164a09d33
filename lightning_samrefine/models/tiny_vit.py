"""SAM with a TinyViT-5M image encoder: MobileSAM's layout, built on timm's TinyViT."""

from __future__ import annotations

import re
from typing import Any

from segment_anything.modeling import Sam
from segment_anything.modeling.common import LayerNorm2d
from timm.models.tiny_vit import TinyVit
from torch import Tensor, nn

from lightning_samrefine.models.sam_around_encoder import build_sam

_WIDTHS = (64, 128, 160, 320)
_EMBED_DIM = 256
_IMAGE_SIZE = 1024
_STRIDE = 16


class TinyVitEncoder(nn.Module):
    """TinyViT-5M with the stride of its last stage taken out, and SAM's neck.

    From "Faster Segment Anything" (MobileSAM, arXiv 2306.14289): the last stage works at
    stride 16 instead of 32, so that the embedding has the size SAM's decoder expects.
    """

    def __init__(self) -> None:
        super().__init__()
        self.img_size = _IMAGE_SIZE
        backbone: Any = TinyVit(
            num_classes=0,
            embed_dims=_WIDTHS,
            depths=(2, 2, 6, 2),
            num_heads=(2, 4, 5, 10),
            window_sizes=(7, 7, 14, 7),
            drop_path_rate=0.0,
        )
        backbone.head = nn.Identity()
        backbone.stages[3].downsample.conv2.conv.stride = (1, 1)
        self.backbone = backbone
        self.neck = nn.Sequential(
            nn.Conv2d(_WIDTHS[-1], _EMBED_DIM, 1, bias=False),
            LayerNorm2d(_EMBED_DIM),
            nn.Conv2d(_EMBED_DIM, _EMBED_DIM, 3, padding=1, bias=False),
            LayerNorm2d(_EMBED_DIM),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Embed (B, 3, 1024, 1024) float, normalized and padded, as (B, 256, 64, 64)."""
        return self.neck(self.backbone.stages(self.backbone.patch_embed(x)))


def build_sam_vit_t() -> Sam:
    """Build the model with PyTorch's initial weights."""
    return build_sam(
        TinyVitEncoder(),
        image_size=_IMAGE_SIZE,
        stride=_STRIDE,
        dim=_EMBED_DIM,
        mask_channels=16,
        mlp_dim=2048,
        num_heads=8,
        iou_head_dim=256,
    )


def mobile_sam_keys(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename MobileSAM's keys to those of `build_sam_vit_t`.

    The classifier of the ImageNet pre-training (``norm_head``, ``head``) is left out, since SAM
    does not use it. Keys of any other layout come back as they are.
    """
    if "image_encoder.patch_embed.seq.0.c.weight" not in state_dict:
        return state_dict
    return {
        _rename(key): value
        for key, value in state_dict.items()
        if not key.startswith(("image_encoder.norm_head.", "image_encoder.head."))
    }


def _rename(key: str) -> str:
    if not key.startswith("image_encoder.") or key.startswith("image_encoder.neck."):
        return key
    key = key.replace("image_encoder.patch_embed.seq.0.", "image_encoder.patch_embed.conv1.")
    key = key.replace("image_encoder.patch_embed.seq.2.", "image_encoder.patch_embed.conv2.")
    # MobileSAM down-samples at the end of a layer, timm at the start of the next stage.
    key = re.sub(r"layers\.(\d)\.downsample", lambda m: f"stages.{int(m[1]) + 1}.downsample", key)
    key = re.sub(r"layers\.(\d)\.", r"stages.\1.", key)
    key = key.replace(".c.weight", ".conv.weight")
    return key.replace("image_encoder.", "image_encoder.backbone.", 1)
