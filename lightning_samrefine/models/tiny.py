"""Architecture of the tiny SAM: segment-anything's own classes behind a convolutional encoder."""

from __future__ import annotations

from segment_anything.modeling import Sam
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_samrefine.models.sam_around_encoder import build_sam

IMAGE_SIZE = 256
EMBED_STRIDE = 8
EMBED_DIM = 96

# Stride 2, 4, 8, 16 and 32.
WIDTHS: tuple[int, ...] = (24, 48, 96, 128, 160)
DEPTHS: tuple[int, ...] = (0, 1, 2, 2, 1)


def _conv(cin: int, cout: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(cin, cout, kernel, stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(cout),
    )


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions around an identity: (B, width, H, W) to the same shape."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = _conv(width, width)
        self.second = _conv(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Transform (B, width, H, W) features, same shape out."""
        return F.relu(x + self.second(F.relu(self.first(x))))


class TinyImageEncoder(nn.Module):
    """Residual pyramid with all its levels fused at stride 8.

    The finer levels enter by space-to-depth instead of pooling: the decoder must draw 4×4 mask
    pixels from each embedding vector, so where exactly a border crosses the cell has to survive.

    Attributes:
        img_size: Side of the square, padded input in pixels; segment-anything reads it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.img_size = IMAGE_SIZE
        inputs = (3, *WIDTHS[:-1])
        self.stages = nn.ModuleList(
            nn.Sequential(
                _conv(cin, cout, stride=2),
                nn.ReLU(),
                *(ResidualBlock(cout) for _ in range(depth)),
            )
            for cin, cout, depth in zip(inputs, WIDTHS, DEPTHS, strict=True)
        )
        cells = (4, 2, 1, 1, 1)
        self.unshuffles = nn.ModuleList(nn.PixelUnshuffle(cell) for cell in cells)
        self.laterals = nn.ModuleList(
            _conv(width * cell * cell, EMBED_DIM, kernel=1)
            for width, cell in zip(WIDTHS, cells, strict=True)
        )
        self.fuse = nn.Sequential(nn.ReLU(), ResidualBlock(EMBED_DIM), ResidualBlock(EMBED_DIM))
        self.neck = nn.Conv2d(EMBED_DIM, EMBED_DIM, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Embed (B, 3, 256, 256) float, normalized and padded, as (B, 96, 32, 32)."""
        levels = []
        for stage in self.stages:
            x = stage(x)
            levels.append(x)
        sides = zip(levels, self.unshuffles, self.laterals, strict=True)
        stride2, stride4, stride8, stride16, stride32 = (
            lateral(unshuffle(level)) for level, unshuffle, lateral in sides
        )
        up16 = stride16 + F.interpolate(stride32, scale_factor=2.0, mode="nearest")
        up8 = F.interpolate(up16, scale_factor=2.0, mode="bilinear", align_corners=False)
        return self.neck(self.fuse(stride2 + stride4 + stride8 + up8))


def build_tiny_sam() -> Sam:
    """Build the tiny SAM with fresh random weights, in training mode.

    Input side 256, embedding 96×32×32, mask prompts and low-resolution logits 128×128. Images are
    RGB in 0 to 255. Everything but the image encoder is segment-anything's own code.
    """
    return build_sam(
        TinyImageEncoder(),
        image_size=IMAGE_SIZE,
        stride=EMBED_STRIDE,
        dim=EMBED_DIM,
        mask_channels=32,
        mlp_dim=256,
        num_heads=4,
        iou_head_dim=128,
    )
