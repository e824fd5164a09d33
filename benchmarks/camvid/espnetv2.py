"""ESPNetv2 at width 2.0, with the decoder of its trained weights.

Mehta et al., "ESPNetv2: A Light-Weight, Power Efficient, and General Purpose Convolutional Neural
Network", CVPR 2019. Module names follow the checkpoint's keys, which load strictly. The network
takes R, G, B images in [0, 1], normalized by ImageNet's statistics.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.camvid.espnet import NormAct, check_sides

SIDE_MULTIPLE = 16  # the encoder halves the image four times

_BRANCHES = 4  # of a pyramid, each a group of channels
_WIDTHS = (32, 128, 256, 512)  # at strides 2, 4, 8 and 16
_WIDE, _NARROW = (1, 2, 3, 4), (1, 1, 2, 3)  # dilations of the branches
_DECODER_WIDTHS = (64, 48, 32)  # at strides 16, 8 and 4
_POOLING_SCALES = (2.0, 1.5, 1.0, 0.5, 0.1)
_SMALLEST_SIDE = 5  # of a pooled map
_EPS = 1e-5  # of batch normalization, as torch has it


class ConvNorm(nn.Module):
    """Convolution without bias that keeps the size apart from the stride, then normalization."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__()
        self.conv = _conv(inputs, outputs, kernel, stride, groups)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, inputs, H, W) to (B, outputs, ⌈H/stride⌉, ⌈W/stride⌉)."""
        return self.bn(self.conv(x))


class ConvNormAct(ConvNorm):
    """The same, then a PReLU with one slope a channel."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__(inputs, outputs, kernel, stride, groups)
        self.act = nn.PReLU(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, inputs, H, W) to (B, outputs, ⌈H/stride⌉, ⌈W/stride⌉)."""
        return self.act(super().forward(x))


class EESP(nn.Module):
    """Extremely efficient spatial pyramid: depthwise branches of growing dilation, summed up.

    At stride 1 the input is added to the output before its activation; at stride 2 neither
    happens, as `DownSampler` does both.
    """

    def __init__(self, inputs: int, outputs: int, dilations: tuple[int, ...], stride: int) -> None:
        super().__init__()
        width = outputs // _BRANCHES
        self.proj_1x1 = ConvNormAct(inputs, width, groups=_BRANCHES)
        self.spp_dw = nn.ModuleList(
            nn.ModuleDict({"conv": _conv(width, width, 3, stride, width, dilation)})
            for dilation in dilations
        )
        self.br_after_cat = NormAct(outputs, _EPS)
        self.conv_1x1_exp = ConvNorm(outputs, outputs, groups=_BRANCHES)
        self.module_act = nn.PReLU(outputs)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, inputs, H, W) to (B, outputs, ⌈H/stride⌉, ⌈W/stride⌉)."""
        reduced = self.proj_1x1(x)
        sums = [self.spp_dw[0]["conv"](reduced)]
        for branch in self.spp_dw[1:]:
            sums.append(sums[-1] + branch["conv"](reduced))
        y = self.conv_1x1_exp(self.br_after_cat(torch.cat(sums, dim=1)))
        return y if self.stride == 2 else self.module_act(x + y)


class DownSampler(nn.Module):
    """Pooled input beside a pyramid at stride 2, and the shrunken image added to both."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.eesp = EESP(inputs, outputs - inputs, _WIDE, stride=2)
        self.inp_reinf = nn.Sequential(ConvNormAct(3, 3, 3), ConvNorm(3, outputs))
        self.act = nn.PReLU(outputs)

    def forward(self, x: Tensor, image: Tensor) -> Tensor:
        """Map (B, inputs, H, W) to (B, outputs, ⌈H/2⌉, ⌈W/2⌉); image (B, 3, ·, ·) is larger."""
        pooled = _halved(x)
        while image.shape[-2:] != pooled.shape[-2:]:
            image = _halved(image)
        return self.act(torch.cat([pooled, self.eesp(x)], dim=1) + self.inp_reinf(image))


class Encoder(nn.Module):
    """The network of the classifier up to stride 16."""

    def __init__(self) -> None:
        super().__init__()
        self.level1 = ConvNormAct(3, _WIDTHS[0], 3, stride=2)
        self.level2_0 = DownSampler(*_WIDTHS[0:2])
        self.level3_0 = DownSampler(*_WIDTHS[1:3])
        self.level3 = nn.Sequential(*(EESP(_WIDTHS[2], _WIDTHS[2], _WIDE, 1) for _ in range(3)))
        self.level4_0 = DownSampler(*_WIDTHS[2:4])
        self.level4 = nn.Sequential(*(EESP(_WIDTHS[3], _WIDTHS[3], _NARROW, 1) for _ in range(7)))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the features of (B, 3, H, W) at strides 2, 4, 8 and 16."""
        stride2 = self.level1(image)
        stride4 = self.level2_0(stride2, image)
        stride8 = self.level3(self.level3_0(stride4, image))
        return stride2, stride4, stride8, self.level4(self.level4_0(stride8, image))


class PyramidPooling(nn.Module):
    """Depthwise convolutions of the map at five sizes, merged across sizes channel by channel."""

    def __init__(self, inputs: int, outputs: int, classes: int, last: bool = False) -> None:
        super().__init__()
        width, sizes = classes // 2, len(_POOLING_SCALES)
        self.projection_layer = _named("cbr", _conv_norm_act(inputs, width, 1))
        self.stages = nn.ModuleList(_conv(width, width, 3, groups=width) for _ in range(sizes))
        self.merge_layer = nn.Sequential(
            _named("br", _norm_act(sizes * width)),
            nn.ChannelShuffle(sizes),
            _named("cbr", _conv_norm_act(sizes * width, width, 3, groups=width)),
            nn.Conv2d(width, outputs, 1, bias=last),
        )
        self.br = nn.Identity() if last else _named("br", _norm_act(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, inputs, H, W) to (B, outputs, H, W)."""
        x = self.projection_layer(x)
        size = x.shape[-2:]
        maps = []
        for scale, stage in zip(_POOLING_SCALES, self.stages, strict=True):
            scaled = [max(math.ceil(side * scale), _SMALLEST_SIDE) for side in size]
            if scale > 1:
                maps.append(F.adaptive_avg_pool2d(stage(_resized(x, scaled)), size))
            elif scale < 1:
                maps.append(_resized(stage(F.adaptive_avg_pool2d(x, scaled)), size))
            else:
                maps.append(stage(x))
        return self.br(self.merge_layer(torch.cat(maps, dim=1)))


class Skip(nn.Module):
    """Encoder features for the decoder, each channel weighted by what the whole map holds."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.wt_layer = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(inputs, outputs, 1, bias=False), nn.Sigmoid()
        )
        groups = math.gcd(inputs, outputs)
        self.expansion_layer = _named("cbr", _conv_norm_act(inputs, outputs, 3, groups=groups))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, inputs, H, W) to (B, outputs, H, W)."""
        return self.expansion_layer(x) * self.wt_layer(x)


class ESPNetv2(nn.Module):
    """ESPNetv2 for segmentation.

    Args:
        classes: channels of the logits.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        widths = _DECODER_WIDTHS
        self.base_net = Encoder()
        self.bu_dec_l1 = PyramidPooling(_WIDTHS[3], widths[0], classes)
        self.bu_dec_l2 = PyramidPooling(widths[0], widths[1], classes)
        self.bu_dec_l3 = PyramidPooling(widths[1], widths[2], classes)
        self.bu_dec_l4 = PyramidPooling(widths[2], classes, classes, last=True)
        self.merge_enc_dec_l2 = Skip(_WIDTHS[2], widths[0])
        self.merge_enc_dec_l3 = Skip(_WIDTHS[1], widths[1])
        self.merge_enc_dec_l4 = Skip(_WIDTHS[0], widths[2])
        self.bu_br_l2 = _norm_act(widths[0])
        self.bu_br_l3 = _norm_act(widths[1])
        self.bu_br_l4 = _norm_act(widths[2])

    def forward(self, image: Tensor) -> Tensor:
        """Compute logits.

        Args:
            image: (B, 3, H, W) float, normalized; H and W multiples of 16.

        Returns:
            (B, classes, H, W) float logits.

        Raises:
            ValueError: a side that is no multiple of 16.
        """
        check_sides("image", image, SIDE_MULTIPLE)
        stride2, stride4, stride8, stride16 = self.base_net(image)
        z = self.bu_dec_l1(stride16)
        z = self.bu_dec_l2(self.bu_br_l2(self.merge_enc_dec_l2(stride8) + _doubled(z)))
        z = self.bu_dec_l3(self.bu_br_l3(self.merge_enc_dec_l3(stride4) + _doubled(z)))
        z = self.bu_dec_l4(self.bu_br_l4(self.merge_enc_dec_l4(stride2) + _doubled(z)))
        return _doubled(z)


def _conv(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, dilation: int = 1
) -> nn.Conv2d:
    padding = dilation * (kernel // 2)
    return nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, groups, bias=False)


def _norm_act(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(channels), nn.PReLU(channels))


def _conv_norm_act(inputs: int, outputs: int, kernel: int, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(_conv(inputs, outputs, kernel, groups=groups), *_norm_act(outputs))


def _named(key: str, module: nn.Module) -> nn.Sequential:
    """Return a module under one more key, which the checkpoint has."""
    named = nn.Sequential()
    named.add_module(key, module)
    return named


def _halved(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=2, padding=1)


def _doubled(x: Tensor) -> Tensor:
    return _resized(x, [2 * side for side in x.shape[-2:]])


def _resized(x: Tensor, size: list[int] | torch.Size) -> Tensor:
    return F.interpolate(x, size, mode="bilinear", align_corners=True)
