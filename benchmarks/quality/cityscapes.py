"""A second segmenter: ESPNet trained on Cityscapes, its classes mapped to CamVid's."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.camvid.data import CLASS_NAMES
from benchmarks.camvid.espnet import ESPNetSegmenter

CITYSCAPES_WEIGHTS = "weights/espnet_p_2_q_8_cityscapes.pth"

_INPUT_HW = (512, 672)
# CamVid's class for each Cityscapes train id, road first and bicycle last.
_TO_CAMVID = (
    *("Road", "Pavement", "Building", "Building", "Fence", "Pole", "SignSymbol", "SignSymbol"),
    *("Tree", "Tree", "Sky", "Pedestrian", "Bicyclist", "Car", "Car", "Car", "Car", "Car"),
    "Bicyclist",
)


class CityscapesESPNet(nn.Module):
    """Log-probabilities of CamVid's classes from a network that never saw CamVid.

    Args:
        checkpoint: The network's trained weights.
    """

    def __init__(self, checkpoint: Path) -> None:
        super().__init__()
        self.segmenter = ESPNetSegmenter(checkpoint, variant="cityscapes")
        self.register_buffer(
            "classes", torch.tensor([CLASS_NAMES.index(name) for name in _TO_CAMVID]), False
        )

    def forward(self, image: Tensor) -> Tensor:
        """Map (B, 3, H, W) uint8 RGB to (B, 11, H, W) float32 log-probabilities."""
        x = F.interpolate(
            image.float(), _INPUT_HW, mode="bilinear", align_corners=False, antialias=True
        )
        probs = self.segmenter(x.round().clamp(0, 255).to(torch.uint8)).softmax(dim=1)
        probs = F.interpolate(
            probs, image.shape[-2:], mode="bilinear", align_corners=False, antialias=True
        )
        mapped = probs.new_zeros(len(probs), len(CLASS_NAMES), *probs.shape[2:])
        return mapped.index_add_(1, self.classes, probs).clamp(min=1e-6).log()
