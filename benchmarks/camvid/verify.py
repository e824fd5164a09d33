"""The raw prediction before anything is refined: is this the network the data came with?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from torchmetrics.classification import MulticlassConfusionMatrix

from benchmarks.camvid.data import ESPNET_WEIGHTS, STORED_PREDICTIONS, VOID, camvid
from benchmarks.camvid.espnet import ESPNetSegmenter
from lightning_samrefine.metrics import class_iou

# mIoU over the test frames that came with the data, 12-way argmax, a predicted void is wrong.
EXPECTED_MIOU: Mapping[str, float] = MappingProxyType({"full": 0.5705, "half": 0.4721})
# Convolution kernels differ between machines in the last bit, which decides ties only.
MIN_EQUAL = 0.999
MIOU_TOLERANCE = 5e-4


@dataclass(frozen=True)
class Verification:
    """How a network's label maps compare with the stored ones.

    Attributes:
        resolution: ``"full"`` or ``"half"``.
        frames: number of frames compared.
        equal: share of all pixels with equal labels.
        worst_equal: the same share on the worst frame.
        miou: of the argmax over all 12 outputs against the ground truth.
        whole_split: every test frame was compared, so `miou` has a known value.
    """

    resolution: str
    frames: int
    equal: float
    worst_equal: float
    miou: float
    whole_split: bool

    @property
    def passed(self) -> bool:
        """Label maps agree on every frame, and so does mIoU where its value is known."""
        agrees = abs(self.miou - EXPECTED_MIOU[self.resolution]) <= MIOU_TOLERANCE
        return self.worst_equal >= MIN_EQUAL and (agrees or not self.whole_split)

    def __str__(self) -> str:
        expected = f", known {EXPECTED_MIOU[self.resolution]:.4f}" if self.whole_split else ""
        return (
            f"{self.resolution}: {self.frames} frames, {self.equal:.5%} of pixels equal to "
            f"{STORED_PREDICTIONS[self.resolution]} (worst frame {self.worst_equal:.4%}), "
            f"12-way mIoU {self.miou:.4f}{expected}: {'agrees' if self.passed else 'DIFFERS'}"
        )


@torch.inference_mode()
def verify(root: Path, resolution: str, max_frames: int | None = None) -> Verification:
    """Compare ESPNet's 12-way argmax on test frames with the label maps stored beside them.

    Args:
        root: the data folder.
        resolution: ``"full"`` or ``"half"``.
        max_frames: maximum number; None takes all.
    """
    data = camvid(root, stored_predictions=resolution)
    data.setup("test")
    model = ESPNetSegmenter(root / ESPNET_WEIGHTS, resolution=resolution, drop_void=False).eval()
    confusion, shares = MulticlassConfusionMatrix(VOID + 1, ignore_index=VOID), []
    loader = data.test_dataloader()
    for index, batch in enumerate(loader):
        if index == max_frames:
            break
        predicted = model(batch["image"]).argmax(dim=1)
        shares.append((predicted == batch["prediction"]).double().mean().item())
        confusion.update(predicted, batch["mask"])
    return Verification(
        resolution=resolution,
        frames=len(shares),
        equal=sum(shares) / len(shares),
        worst_equal=min(shares),
        miou=class_iou(confusion.compute()[:VOID]).nanmean().item(),
        whole_split=len(shares) == len(loader),
    )
