"""Every way to refine a prediction that is compared: (image, probabilities) to labels."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_samrefine import RefineConfig
from lightning_samrefine.refine.fusion.color_model import color_ratios, weigh_by_color
from lightning_samrefine.refine.fusion.crf import smooth

Refine = Callable[[Tensor, Tensor], Tensor]

# Of 15 settings the largest mean gain over the val splits of eight data sets.
BEST_ON_VAL = {
    "score_thresh": 0.5,
    "mask_prompt_scale": 8.0,
    "pred_iou_thresh": 0.5,
    "min_region_area": 16,
}
_MIN_PROB = 1e-6


def dense_crf(
    gaussian: tuple[float, float], bilateral: tuple[float, float, float], rounds: int = 10
) -> Refine:
    """Build Krähenbühl and Koltun's fully connected CRF (NIPS 2011).

    Args:
        gaussian: Standard deviation in pixels and weight of the smoothness kernel.
        bilateral: Standard deviations in pixels and in color, and weight of the appearance kernel.
        rounds: Of mean-field inference.
    """

    def refine(image: Tensor, probs: Tensor) -> Tensor:
        from pydensecrf.densecrf import DenseCRF2D

        num_classes, height, width = probs.shape
        crf = DenseCRF2D(width, height, num_classes)
        unary = -probs.clamp(min=_MIN_PROB).log().flatten(1)
        crf.setUnaryEnergy(np.ascontiguousarray(unary.numpy(), dtype=np.float32))
        crf.addPairwiseGaussian(sxy=gaussian[0], compat=gaussian[1])
        rgb = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
        crf.addPairwiseBilateral(
            sxy=bilateral[0], srgb=bilateral[1], rgbim=rgb, compat=bilateral[2]
        )
        beliefs = np.array(crf.inference(rounds)).reshape(num_classes, height, width)
        return torch.from_numpy(beliefs).argmax(dim=0)

    return refine


def without_sam(image: Tensor, probs: Tensor) -> Tensor:
    """Do what `default` does besides asking SAM: what remains of its gain is SAM's."""
    config = RefineConfig.preset("default")
    ratios = color_ratios(probs, image, config.stride)
    weighted = weigh_by_color(probs, image, ratios, config.color_weight)
    return smooth(weighted, image, config.crf_weight).argmax(dim=0)


def mode_filter(image: Tensor, probs: Tensor, side: int = 5) -> Tensor:
    """Give each pixel the most frequent raw label around it: what removing speckle alone does."""
    labels = F.one_hot(probs.argmax(dim=0), len(probs)).permute(2, 0, 1).float()
    around = F.avg_pool2d(labels[None], side, 1, side // 2, count_include_pad=False)[0]
    return around.argmax(dim=0)
