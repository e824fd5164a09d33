"""Every way to refine a prediction that is compared: (image, probabilities) to labels."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from lightning_samrefine import RefineConfig, Refiner
from lightning_samrefine.models import Promptable
from lightning_samrefine.refine.cache.embedding_cache import EmbeddingCache
from lightning_samrefine.refine.fusion.color_model import weigh_by_color
from lightning_samrefine.refine.fusion.crf import smooth

Refine = Callable[[Tensor, Tensor], Tensor]

SAMREFINER_DIR = "SAMREFINER_DIR"
# Of 15 settings the largest mean gain over the val splits of eight data sets.
BEST_ON_VAL = {
    "score_thresh": 0.5,
    "mask_prompt_scale": 8.0,
    "pred_iou_thresh": 0.5,
    "min_region_area": 16,
}
_MIN_PROB = 1e-6


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        name: As in the table.
        refine: (3, H, W) uint8 RGB and (C, H, W) float32 probabilities to (H, W) int64 labels.
        every: Run on every n-th frame only, for time.
        cached: Timed the second time that it sees a frame.
    """

    name: str
    refine: Refine
    every: int = 1
    cached: bool = False


def build_methods(sam: Promptable, cache: EmbeddingCache, device: torch.device) -> list[Method]:
    """Return all methods that can run here; what cannot is named on standard error.

    Args:
        sam: The model that all of SAM's methods share.
        cache: Their embeddings and image-driven masks.
        device: Where the probabilities are to be.
    """

    def preset(name: str, **fields: object) -> Refine:
        refiner = Refiner(sam, RefineConfig.preset(name, **fields), cache=cache)
        return lambda image, probs: refiner(image, probs.to(device)).labels.cpu()

    methods = [
        Method("raw", lambda image, probs: probs.argmax(dim=0)),
        Method("`algorithm4`", preset("algorithm4")),
        Method("`algorithm4`, thresholds best on val", preset("algorithm4", **BEST_ON_VAL)),
        Method("`fast`", preset("fast"), cached=True),
        Method("`default`", preset("default"), cached=True),
        Method(
            "`default` without region prompts",
            preset("default", prompt_regions=False),
            every=3,
            cached=True,
        ),
        Method(
            "`default` without smoothing", preset("default", crf_weight=0.0), every=9, cached=True
        ),
        Method(
            "`default` without colors", preset("default", color_weight=0.0), every=9, cached=True
        ),
        Method("its colors and smoothing without SAM", without_sam),
        Method("guided filter, radius 4", guided_filter, every=9),
    ]
    try:
        import pydensecrf.densecrf  # noqa: F401  (only whether it is there)
    except ImportError:
        print("DenseCRF is left out: pip install pydensecrf2", file=sys.stderr)
    else:
        methods.append(Method("DenseCRF (1, 3) (67, 3, 4)", dense_crf((1, 3), (67, 3, 4))))
        methods.append(
            Method("DenseCRF (3, 3) (80, 13, 10)", dense_crf((3, 3), (80, 13, 10)), every=9)
        )
    checkout = os.environ.get(SAMREFINER_DIR)
    if checkout:
        methods.append(Method("SAMRefiner", sam_refiner(Path(checkout), sam), every=15))
    else:
        print(f"SAMRefiner is left out: {SAMREFINER_DIR} names no checkout", file=sys.stderr)
    return methods


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
    weighted = weigh_by_color(probs, image, config.color_weight, config.stride)
    return smooth(weighted, image, config.crf_weight).argmax(dim=0)


def mode_filter(image: Tensor, probs: Tensor, side: int = 5) -> Tensor:
    """Give each pixel the most frequent raw label around it: what removing speckle alone does."""
    labels = F.one_hot(probs.argmax(dim=0), len(probs)).permute(2, 0, 1).float()
    around = F.avg_pool2d(labels[None], side, 1, side // 2, count_include_pad=False)[0]
    return around.argmax(dim=0)


def guided_filter(image: Tensor, probs: Tensor, radius: int = 4, eps: float = 1e-3) -> Tensor:
    """Filter each class's probability with the gray image as guide (He et al., ECCV 2010)."""
    weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    guide = (image.float() / 255 * weights).sum(dim=0)[None, None]

    def mean(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2 * radius + 1, 1, radius, count_include_pad=False)

    maps = probs[:, None]
    mean_guide, mean_maps = mean(guide), mean(maps)
    slope = (mean(guide * maps) - mean_guide * mean_maps) / (
        mean(guide * guide) - mean_guide**2 + eps
    )
    offset = mean_maps - slope * mean_guide
    return (mean(slope) * guide + mean(offset))[:, 0].argmax(dim=0)


def sam_refiner(checkout: Path, sam: Promptable) -> Refine:
    """Build SAMRefiner (Lin et al., arXiv 2502.06756) from its authors' code, with its defaults.

    It refines binary masks. Each class's mask is refined on its own; where refined masks overlap
    the most probable of their classes wins, and where there is none the raw class stays.

    Args:
        checkout: The authors' repository, whose own requirements are installed.
        sam: The model; its module is handed over.
    """
    sys.path.insert(0, str(checkout))
    from sam_refiner import sam_refiner as authors_refiner

    def refine(image: Tensor, probs: Tensor) -> Tensor:
        labels = probs.argmax(dim=0)
        classes = labels.unique()
        masks = [(labels == c).numpy().astype(np.uint8) for c in classes]
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / "image.png")
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
            refined = np.asarray(authors_refiner(path, masks, sam.module)[0]) > 0
        scores = probs[classes] * torch.from_numpy(refined)
        best = classes[scores.argmax(dim=0)]
        return torch.where(scores.amax(dim=0) > 0, best, labels)

    return refine
