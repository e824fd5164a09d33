"""A second segmenter: ESPNetv2 trained on Cityscapes, its classes mapped to CamVid's."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.camvid.data import CLASS_NAMES
from benchmarks.camvid.espnetv2 import ESPNetv2

CITYSCAPES_WEIGHTS = "weights/espnetv2_s_2.0_city_1024x512.pth"

_INPUT_HW = (512, 672)
# ImageNet's statistics, R, G, B in [0, 1].
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# CamVid's class for each Cityscapes train id, road first and bicycle last; void follows.
_TO_CAMVID = (
    *("Road", "Pavement", "Building", "Building", "Fence", "Pole", "SignSymbol", "SignSymbol"),
    *("Tree", "Tree", "Sky", "Pedestrian", "Bicyclist", "Car", "Car", "Car", "Car", "Car"),
    "Bicyclist",
)


class CityscapesESPNetv2(nn.Module):
    """Log-probabilities of CamVid's classes from a network that never saw CamVid.

    Args:
        checkpoint: The network's trained weights.
    """

    def __init__(self, checkpoint: Path) -> None:
        super().__init__()
        self.network = ESPNetv2(len(_TO_CAMVID) + 1)
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        self.network.load_state_dict(state, strict=True)
        self.register_buffer("mean", torch.tensor(_MEAN).view(3, 1, 1), False)
        self.register_buffer("std", torch.tensor(_STD).view(3, 1, 1), False)
        self.register_buffer(
            "classes", torch.tensor([CLASS_NAMES.index(name) for name in _TO_CAMVID]), False
        )

    def forward(self, image: Tensor) -> Tensor:
        """Map (B, 3, H, W) uint8 RGB to (B, 11, H, W) float32 log-probabilities."""
        x = F.interpolate(
            image.float(), _INPUT_HW, mode="bilinear", align_corners=False, antialias=True
        )
        probs = self.network((x / 255 - self.mean) / self.std)[:, :-1].softmax(dim=1)
        probs = F.interpolate(
            probs, image.shape[-2:], mode="bilinear", align_corners=False, antialias=True
        )
        mapped = probs.new_zeros(len(probs), len(CLASS_NAMES), *probs.shape[2:])
        return mapped.index_add_(1, self.classes, probs).clamp(min=1e-6).log()
