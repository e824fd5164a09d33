"""ESPNet (Mehta et al., "ESPNet: Efficient Spatial Pyramid of Dilated Convolutions", ECCV 2018).

The network with p = 2, q = 8 as its trained weights name it, and the LightningModule that the
benchmark hands to the Trainer. Module names follow the checkpoint's keys, which load strictly.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

Resolution = Literal["full", "half"]

BN_EPS = 1e-3
DILATIONS = (1, 2, 4, 8, 16)
SIDE_MULTIPLE = 8  # the encoder halves the image three times
OUTPUTS = 12  # channels of the logits; the last one is void
# Of CamVid's training images in B, G, R order, in 0 to 255.
_MEAN = (110.33102643, 108.40886315, 105.03319369)
_STD = (72.12571015, 72.69074534, 69.90434816)


class Conv(nn.Module):
    """Convolution without bias that keeps the size apart from the stride."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, dilation: int = 1
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            inputs,
            outputs,
            kernel,
            stride,
            padding=dilation * (kernel // 2),
            dilation=dilation,
            bias=False,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, inputs, H, W) to (B, outputs, ⌈H/stride⌉, ⌈W/stride⌉)."""
        return self.conv(x)


class NormAct(nn.Module):
    """Batch normalization, then a PReLU with one slope a channel; the shape stays."""

    def __init__(self, channels: int, eps: float = BN_EPS) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels, eps=eps)
        self.act = nn.PReLU(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, channels, H, W) to the same shape."""
        return self.act(self.bn(x))


class ConvNormAct(NormAct):
    """3×3 convolution followed by `NormAct`."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__(outputs)
        self.conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, inputs, H, W) to (B, outputs, ⌈H/stride⌉, ⌈W/stride⌉)."""
        return super().forward(self.conv(x))


class Pyramid(nn.Module):
    """Spatial pyramid: reduce the channels, convolve at five dilations, fuse hierarchically.

    The running sums of the branches from dilation 2 on remove the gridding of wide dilations.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        width = outputs // len(DILATIONS)
        self.c1 = Conv(inputs, width, kernel, stride)
        # The undilated branch takes the channels that the division leaves over.
        first = outputs - (len(DILATIONS) - 1) * width
        for dilation in DILATIONS:
            branch = Conv(width, first if dilation == 1 else width, 3, dilation=dilation)
            self.add_module(f"d{dilation}", branch)

    def pyramid(self, x: Tensor) -> Tensor:
        """Map (B, inputs, H, W) to (B, outputs, ⌈H/stride⌉, ⌈W/stride⌉), not normalized."""
        reduced = self.c1(x)
        first, *rest = (self.get_submodule(f"d{d}")(reduced) for d in DILATIONS)
        sums = [rest[0]]
        for branch in rest[1:]:
            sums.append(sums[-1] + branch)
        return torch.cat([first, *sums], dim=1)


class DownSampler(Pyramid):
    """Pyramid at stride 2."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, kernel=3, stride=2)
        self.bn = nn.BatchNorm2d(outputs, eps=BN_EPS)
        self.act = nn.PReLU(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, inputs, H, W) to (B, outputs, ⌈H/2⌉, ⌈W/2⌉)."""
        return self.act(self.bn(self.pyramid(x)))


class ESP(Pyramid):
    """Efficient spatial pyramid: pyramid at stride 1, with the input added where `residual`."""

    def __init__(self, inputs: int, outputs: int, residual: bool = True) -> None:
        super().__init__(inputs, outputs, kernel=1)
        self.bn = NormAct(outputs)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, inputs, H, W) to (B, outputs, H, W)."""
        y = self.pyramid(x)
        return self.bn(x + y if self.residual else y)


class Encoder(nn.Module):
    """ESPNet-C without its own upsampling; the pooled image enters at strides 2 and 4."""

    def __init__(self, outputs: int, p: int, q: int) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(3, stride=2, padding=1)
        self.level1 = ConvNormAct(3, 16, stride=2)
        self.b1 = NormAct(16 + 3)
        self.level2_0 = DownSampler(16 + 3, 64)
        self.level2 = nn.Sequential(*(ESP(64, 64) for _ in range(p)))
        self.b2 = NormAct(64 + 64 + 3)
        self.level3_0 = DownSampler(64 + 64 + 3, 128)
        self.level3 = nn.Sequential(*(ESP(128, 128) for _ in range(q)))
        self.b3 = NormAct(128 + 128)
        self.classifier = Conv(128 + 128, outputs, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Encode (B, 3, H, W).

        Returns:
            Stride-2 features with the pooled image (B, 19, H/2, W/2); stride-4 features
            (B, 131, H/4, W/4); coarse logits (B, outputs, H/8, W/8).
        """
        image2 = self.pool(x)
        image4 = self.pool(image2)
        fused = self.b1(torch.cat([self.level1(x), image2], dim=1))
        entry2 = self.level2_0(fused)
        stride4 = self.b2(torch.cat([self.level2(entry2), entry2, image4], dim=1))
        entry3 = self.level3_0(stride4)
        stride8 = self.b3(torch.cat([entry3, self.level3(entry3)], dim=1))
        return fused, stride4, self.classifier(stride8)


class ESPNet(nn.Module):
    """ESPNet with its light decoder.

    Args:
        p: ESP modules at stride 4.
        q: ESP modules at stride 8.
    """

    def __init__(self, p: int = 2, q: int = 8) -> None:
        super().__init__()
        outputs = OUTPUTS
        self.encoder = Encoder(outputs, p, q)
        self.br = nn.BatchNorm2d(outputs, eps=BN_EPS)
        self.level3_C = Conv(64 + 64 + 3, outputs, 1)
        self.up_l3 = nn.Sequential(_double(outputs))
        self.combine_l2_l3 = nn.Sequential(
            NormAct(2 * outputs), ESP(2 * outputs, outputs, residual=False)
        )
        self.up_l2 = nn.Sequential(_double(outputs), NormAct(outputs))
        self.conv = ConvNormAct(outputs + 16 + 3, outputs)
        self.classifier = _double(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits.

        Args:
            x: (B, 3, H, W) float, B, G, R order, normalized; H and W multiples of 8.

        Returns:
            (B, outputs, H, W) float logits.

        Raises:
            ValueError: a side that is no multiple of 8.
        """
        check_sides("x", x, SIDE_MULTIPLE)
        fused, stride4, coarse = self.encoder(x)
        z = torch.cat([self.level3_C(stride4), self.up_l3(self.br(coarse))], dim=1)
        z = self.up_l2(self.combine_l2_l3(z))
        z = self.conv(torch.cat([z, fused], dim=1))
        return self.classifier(z)


def check_sides(name: str, image: Tensor, multiple: int) -> None:
    """Refuse (…, H, W) whose H or W a network cannot halve as often as it does.

    Raises:
        ValueError: a side that is no multiple.
    """
    if any(side % multiple for side in image.shape[-2:]):
        raise ValueError(
            f"{name}: height and width must be multiples of {multiple}, got "
            f"{tuple(image.shape[-2:])}"
        )


def _double(channels: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(channels, channels, 2, stride=2, bias=False)


class ESPNetSegmenter(LightningModule):
    """ESPNet behind uint8 RGB batches, for validation and testing.

    Batches are dicts with ``image``, (B, 3, H, W) uint8 RGB; H and W multiples of 8. Both steps
    return ``{"logits": (B, C, H, W) float32}`` at the size of the image.

    Args:
        checkpoint: file of trained weights, loaded strictly.
        resolution: ``"full"`` runs the network on the image as it is. ``"half"`` runs it on the
            image shrunk to half the size, rounded down to multiples of 8 (480×360 to 240×176,
            antialiased bilinear), and enlarges the logits bilinearly: coarser borders from the
            same network.
        drop_void: leave the last output out. C counts the real classes alone then, and every
            pixel gets one of them; otherwise the network may predict "void".

    Raises:
        FileNotFoundError: no file at `checkpoint`.
        ValueError: an unknown `resolution`.
        RuntimeError: a checkpoint with other keys or shapes than the network.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        resolution: Resolution = "full",
        drop_void: bool = True,
    ) -> None:
        super().__init__()
        if resolution not in ("full", "half"):
            raise ValueError(f"resolution must be 'full' or 'half', got {resolution!r}")
        if not Path(checkpoint).is_file():
            raise FileNotFoundError(f"checkpoint: no file at {checkpoint}")
        self.resolution = resolution
        self.drop_void = drop_void
        self.network = ESPNet()
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        self.network.load_state_dict(state, strict=True)
        self.network.eval()
        self.register_buffer("mean", torch.tensor(_MEAN).view(1, 3, 1, 1), False)
        self.register_buffer("std", torch.tensor(_STD).view(1, 3, 1, 1), False)

    def forward(self, image: Tensor) -> Tensor:
        """Compute logits (B, C, H, W) float32 of images (B, 3, H, W) uint8 RGB.

        Raises:
            TypeError: an image that is not uint8.
            ValueError: a side that is no multiple of 8.
        """
        if image.dtype != torch.uint8:
            raise TypeError(f"image must be torch.uint8 in R, G, B order, got {image.dtype}")
        x = image.flip(1).float()
        if self.resolution == "half":
            small = [side // 2 // SIDE_MULTIPLE * SIDE_MULTIPLE for side in image.shape[-2:]]
            x = F.interpolate(x, small, mode="bilinear", align_corners=False, antialias=True)
        # The division by 255 comes after the normalization: the weights were trained so.
        logits = self.network((x - self.mean) / self.std / 255).float()
        if self.drop_void:
            logits = logits[:, :-1]
        if self.resolution == "half":
            size = image.shape[-2:]
            logits = F.interpolate(logits, size, mode="bilinear", align_corners=False)
        return logits

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """Return the logits of a batch."""
        return {"logits": self(batch["image"])}

    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """Return the logits of a batch."""
        return {"logits": self(batch["image"])}
