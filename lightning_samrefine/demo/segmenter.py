"""A small segmenter with the typical errors of real ones: correct regions, coarse borders."""

from __future__ import annotations

import lightning as lit
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from lightning_samrefine.demo.scenes import CLASS_NAMES


class SmallSegmenter(lit.LightningModule):
    """A convolutional network with logits at stride 8, resized bilinearly.

    Borders are coarse and parts thinner than its stride are missing: the errors of any segmenter
    with a low-resolution head, and those that SAM can correct.

    Args:
        num_classes: C.
        width: Channels at stride 4; deeper levels have more.
        learning_rate: Peak of a one-cycle schedule over AdamW.
        weight_decay: AdamW's.
    """

    def __init__(
        self,
        num_classes: int = len(CLASS_NAMES),
        width: int = 48,
        learning_rate: float = 4e-3,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            _block(3, width // 2, stride=2),
            _block(width // 2, width, stride=2),
            _block(width, 2 * width, stride=2),
            *(_Residual(2 * width, dilation) for dilation in (1, 2, 4, 8, 1, 2, 4, 1)),
            nn.Conv2d(2 * width, num_classes, 1),
        )

    def forward(self, image: Tensor) -> Tensor:
        """Segment (B, 3, H, W) uint8 RGB as logits (B, C, H, W) float32."""
        coarse = self.net(image.float() / 127.5 - 1)
        return F.interpolate(coarse, image.shape[-2:], mode="bilinear", align_corners=False)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of one batch of ``image`` and ``mask``."""
        loss = F.cross_entropy(self(batch["image"]), batch["mask"])
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Return the logits for the callback."""
        return {"logits": self(batch["image"])}

    test_step = validation_step
    predict_step = validation_step

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW with a one-cycle schedule over all steps of the run."""
        optimizer = torch.optim.AdamW(
            self.parameters(),
            lr=self.hparams["learning_rate"],
            weight_decay=self.hparams["weight_decay"],
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            max_lr=self.hparams["learning_rate"],
            total_steps=int(self.trainer.estimated_stepping_batches),
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


class _Residual(nn.Module):
    """A residual block with one dilated 3×3 convolution: large receptive field at low cost."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.conv = _block(width, width, dilation=dilation)

    def forward(self, x: Tensor) -> Tensor:
        """Keep the shape (B, width, H, W)."""
        return x + self.conv(x)


def _block(cin: int, cout: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(cin, cout, 3, stride, padding=dilation, dilation=dilation, bias=False),
        nn.BatchNorm2d(cout),
        nn.ReLU(inplace=True),
    )
