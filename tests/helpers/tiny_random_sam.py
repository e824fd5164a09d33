"""A SAM small enough to run thousands of prompts a minute, with predictions worth testing.

Random weights give one and the same answer to every prompt: a predicted IoU in a band of a few
thousandths and masks of a single sign. `build_random_sam` therefore fits affine maps after drawing
the weights, so that over random prompts the predicted IoU spreads over (0, 1) and the mask logits
over both signs. The three masks of a point are fitted to pass the thresholds of image-driven masks
about every other time: an image would otherwise have none.
"""

from __future__ import annotations

import torch
from segment_anything.modeling import Sam
from segment_anything.modeling.common import LayerNorm2d
from torch import Tensor, nn

from lightning_samrefine.models.sam import SamPromptable
from lightning_samrefine.models.sam_around_encoder import build_sam

WEIGHT_GAIN = 2.0
PRED_IOU_MEAN = 0.5
PRED_IOU_STD = 0.2
LOGIT_STD = 3.0
# Of the three masks of a point.
MULTIMASK_IOU_MEAN = 0.65
MULTIMASK_IOU_STD = 0.1
MULTIMASK_LOGIT_STD = 12.0


class TinyImageEncoder(nn.Module):
    """Two convolutions, image (1, 3, img_size, img_size) to embedding (1, dim, side, side)."""

    def __init__(self, img_size: int, stride: int, dim: int) -> None:
        super().__init__()
        self.img_size = img_size
        self.layers = nn.Sequential(
            nn.Conv2d(3, dim, kernel_size=stride, stride=stride),
            LayerNorm2d(dim),
            nn.GELU(),
            nn.Conv2d(dim, dim, kernel_size=3, padding=1),
            LayerNorm2d(dim),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class OfficialSam(SamPromptable):
    """Computes as segment-anything's modules do, operation by operation: equal bits."""

    def __init__(self, module: Sam, name: str) -> None:
        super().__init__(module, name)
        self._encode = module.image_encoder

    def drop_derived(self) -> None:
        self._fast_decoder.drop_derived()

    def _can_be_fast(self, embedding: Tensor) -> bool:
        return False


def build_random_sam(seed: int = 0, image_size: int = 64, stride: int = 8, dim: int = 32) -> Sam:
    """Build a seeded `Sam` in eval mode without touching the global random state.

    Args:
        seed: The same seed gives the same weights.
        image_size: Side of the model's square input.
        stride: Input pixels per embedding pixel; mask prompts have side 4 * image_size / stride.
        dim: Width of the embeddings, a multiple of 16.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        encoder = TinyImageEncoder(image_size, stride, dim)
        sam = small_sam_around(encoder, image_size, stride, dim)
        spread_answers(sam)
    return sam


def small_sam_around(encoder: nn.Module, image_size: int, stride: int, dim: int) -> Sam:
    """Build a frozen `Sam` in eval mode, its sizes in proportion to ``dim``."""
    sam = build_sam(
        encoder,
        image_size=image_size,
        stride=stride,
        dim=dim,
        mask_channels=16,
        mlp_dim=2 * dim,
        num_heads=2,
        iou_head_dim=dim,
    )
    return sam.eval().requires_grad_(False)


def _random_prompts(sam: Sam, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw boxes (N, 4), points (N, 1, 2) at their centers, and blobby mask prompts."""
    corners = torch.rand(count, 2, 2) * sam.image_encoder.img_size
    low, high = corners.amin(dim=1), corners.amax(dim=1)
    coarse = (torch.rand(count, 1, 4, 4) > 0.5).float()
    masks = nn.functional.interpolate(coarse, sam.prompt_encoder.mask_input_size, mode="bilinear")
    return torch.cat([low, high], dim=1), ((low + high) / 2)[:, None], 8 * masks


def spread_answers(sam: Sam, prompts: int = 128) -> None:
    """Make the predictions depend on the prompts, then fit their scale and offset in place."""
    decoder = sam.mask_decoder
    for module in decoder.modules():
        if isinstance(module, nn.Linear):
            module.weight.mul_(WEIGHT_GAIN)

    size = sam.image_encoder.img_size
    image = nn.functional.interpolate(torch.rand(1, 3, 9, 9) * 255, (size, size), mode="bilinear")
    embedding = sam.image_encoder(sam.preprocess(image))
    boxes, points, masks = _random_prompts(sam, prompts)
    clicks = (points, torch.ones(prompts, 1))

    def predictions(multimask: bool, **prompt: Tensor | None) -> tuple[Tensor, Tensor]:
        sparse, dense = sam.prompt_encoder(points=clicks, **prompt)
        return decoder(
            image_embeddings=embedding,
            image_pe=sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=multimask,
        )

    def fit(token: int, logits: Tensor, pred_iou: Tensor, mean: float, std: float, spread: float):
        iou_layer = decoder.iou_prediction_head.layers[-1]
        gain = std / pred_iou.std()
        iou_layer.weight[token].mul_(gain)
        iou_layer.bias[token].mul_(gain).add_(mean - gain * pred_iou.mean())
        mask_layer = decoder.output_hypernetworks_mlps[token].layers[-1]
        mask_layer.weight.mul_(spread / logits.std())
        mask_layer.bias.mul_(spread / logits.std())

    logits, pred_iou = predictions(multimask=False, boxes=boxes, masks=masks)
    fit(0, logits, pred_iou, PRED_IOU_MEAN, PRED_IOU_STD, LOGIT_STD)
    logits, pred_iou = predictions(multimask=True, boxes=None, masks=None)
    for k in range(3):
        fit(
            k + 1,
            logits[:, k],
            pred_iou[:, k],
            MULTIMASK_IOU_MEAN,
            MULTIMASK_IOU_STD,
            MULTIMASK_LOGIT_STD,
        )
