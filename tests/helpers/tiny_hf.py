"""transformers' promptable models with random weights, small enough to run in a second.

As with `tiny_random_sam`, the decoders are scaled after drawing their weights, so that predicted
IoUs spread over (0, 1) and mask logits over both signs.
"""

from __future__ import annotations

from typing import Any

import torch
from tiny_random_sam import LOGIT_STD, PRED_IOU_MEAN, PRED_IOU_STD
from torch import Tensor, nn

from lightning_samrefine.models.base import Prompts
from lightning_samrefine.models.hf import HfPromptable

DIM = 32
# transformers draws narrower weights than PyTorch does.
WEIGHT_GAIN = 8.0
FAMILIES = ("sam", "sam_hq", "sam2", "edgetam", "sam3_tracker")


def build_tiny_hf(family: str, seed: int = 0) -> HfPromptable:
    """Build a seeded model without touching the global random state.

    Args:
        family: One of `FAMILIES`.
        seed: The same seed gives the same weights.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        sam = HfPromptable(_BUILDERS[family](), f"tiny {family}")
        for parameter in sam.module.parameters():
            # transformers starts tables such as positions from zero, where a mistake in using
            # them would not show.
            if not parameter.any():
                parameter.normal_(std=0.1)
        _spread_predictions(sam)
    return sam


def random_image(height: int, width: int) -> Tensor:
    """Draw a uint8 (3, height, width) image of large blobs."""
    coarse = torch.rand(1, 3, 9, 9) * 255
    return nn.functional.interpolate(coarse, (height, width), mode="bilinear")[0].to(torch.uint8)


def random_prompts(sam: HfPromptable, count: int) -> Prompts:
    """Draw boxes, points at their centers, and as many blobby mask prompts."""
    corners = torch.rand(count, 2, 2) * sam.image_size
    low, high = corners.amin(dim=1), corners.amax(dim=1)
    coarse = (torch.rand(1, count, 4, 4) > 0.5).float()
    masks = nn.functional.interpolate(coarse, (sam.mask_size, sam.mask_size), mode="bilinear")[0]
    boxes = torch.cat([low, high], dim=1)
    return Prompts(boxes, (low + high) / 2, 8 * masks, torch.arange(count))


def _spread_predictions(sam: HfPromptable, count: int = 64) -> None:
    """Make the predictions depend on the prompts, then fit their scale and offset in place."""
    decoder = sam.module.mask_decoder
    for module in decoder.modules():
        if isinstance(module, nn.Linear):
            module.weight.mul_(WEIGHT_GAIN)
    (embedding,) = sam.encode_images([random_image(sam.image_size, sam.image_size)])
    prompts = random_prompts(sam, count)
    upscaled = []
    handle = decoder.activation.register_forward_hook(lambda *call: upscaled.append(call[2]))
    decoder.dynamic_multimask_via_stability = False
    predictions = [sam.predict_masks(embedding, prompts, several) for several in (False, True)]
    decoder.dynamic_multimask_via_stability = True
    handle.remove()

    head = decoder.iou_prediction_head.proj_out
    pred_iou = torch.cat([predictions[0][1][:, None], predictions[1][1]], dim=1)
    mean, std = PRED_IOU_MEAN, PRED_IOU_STD
    if decoder.iou_prediction_head.sigmoid_output:
        pred_iou, mean, std = pred_iou.logit(), 0.0, 1.0
    gain = std / pred_iou.std(dim=0)
    head.weight.mul_(gain[:, None])
    head.bias.mul_(gain).add_(mean - gain * pred_iou.mean(dim=0))

    # A mask is a product with these features; without their mean it has both signs.
    features = next(f for f in upscaled if f.shape[1:] == (DIM // 8, *2 * (sam.mask_size,)))
    mean = nn.functional.normalize(features.mean(dim=(0, 2, 3)), dim=0)
    without_mean = torch.eye(len(mean)) - mean[:, None] * mean
    for mlp in decoder.output_hypernetworks_mlps:
        mlp.proj_out.weight.copy_(without_mean @ mlp.proj_out.weight)
        mlp.proj_out.bias.copy_(without_mean @ mlp.proj_out.bias)
    logits, _ = sam.predict_masks(embedding, prompts, multimask_output=True)
    for mlp in decoder.output_hypernetworks_mlps:
        mlp.proj_out.weight.mul_(LOGIT_STD / logits.std())
        mlp.proj_out.bias.mul_(LOGIT_STD / logits.std())


def _heads() -> dict[str, Any]:
    decoder = {
        "hidden_size": DIM,
        "mlp_dim": 2 * DIM,
        "num_attention_heads": 2,
        "iou_head_hidden_dim": DIM,
    }
    return {"mask_decoder_config": decoder}


def _prompts(image_size: int, patch_size: int) -> dict[str, Any]:
    return {"hidden_size": DIM, "image_size": image_size, "patch_size": patch_size}


def _vit(**more: Any) -> dict[str, Any]:
    return {
        "hidden_size": DIM,
        "output_channels": DIM,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 64,
        "patch_size": 8,
        "window_size": 3,
        "global_attn_indexes": [1],
        "num_pos_feats": DIM // 2,
        "initializer_range": 0.1,
        **more,
    }


def _sam() -> Any:
    from transformers import SamConfig, SamModel

    prompts = _prompts(64, 8)
    return SamModel(SamConfig(vision_config=_vit(), prompt_encoder_config=prompts, **_heads()))


def _sam_hq() -> Any:
    from transformers import SamHQConfig, SamHQModel

    heads = _heads()
    heads["mask_decoder_config"]["vit_dim"] = DIM
    return SamHQModel(
        SamHQConfig(vision_config=_vit(), prompt_encoder_config=_prompts(64, 8), **heads)
    )


def _sam2() -> Any:
    from transformers import Sam2Config, Sam2Model

    backbone = {
        "model_type": "sam2_hiera_det_model",
        "hidden_size": 16,
        "image_size": [128, 128],
        "blocks_per_stage": [1, 1, 2, 1],
        "embed_dim_per_stage": [16, 32, 64, 128],
        "num_attention_heads_per_stage": [1, 1, 2, 2],
        "window_size_per_stage": [8, 4, 4, 2],
        "global_attention_blocks": [3],
    }
    vision = {
        "model_type": "sam2_vision_model",
        "backbone_config": backbone,
        "backbone_channel_list": [128, 64, 32, 16],
        "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
        "fpn_hidden_size": DIM,
    }
    return Sam2Model(
        Sam2Config(vision_config=vision, prompt_encoder_config=_prompts(128, 16), **_heads())
    )


def _edgetam() -> Any:
    from transformers import EdgeTamConfig, EdgeTamModel

    widths = [8, 16, 32, 64]
    backbone = {
        "model_type": "timm_wrapper",
        "architecture": "repvit_m1",
        "num_classes": 2,  # of no use here, but required
        "model_args": {
            "in_chans": 3,
            "features_only": True,
            "out_indices": [0, 1, 2, 3],
            "embed_dim": widths,
            "depth": [1, 1, 1, 1],
        },
    }
    vision = {
        "backbone_config": backbone,
        "backbone_channel_list": widths[::-1],
        "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
        "fpn_hidden_size": DIM,
    }
    return EdgeTamModel(
        EdgeTamConfig(vision_config=vision, prompt_encoder_config=_prompts(128, 16), **_heads())
    )


def _sam3_tracker() -> Any:
    from transformers import Sam3TrackerConfig, Sam3TrackerModel

    backbone = {
        "model_type": "sam3_vit_model",
        "hidden_size": DIM,
        "intermediate_size": 2 * DIM,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 112,
        "pretrain_image_size": 56,
        "window_size": 4,
        "global_attn_indexes": [1],
    }
    vision = {
        "model_type": "sam3_vision_model",
        "backbone_config": backbone,
        "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
        "fpn_hidden_size": DIM,
    }
    prompts = _prompts(112, 14)
    return Sam3TrackerModel(
        Sam3TrackerConfig(vision_config=vision, prompt_encoder_config=prompts, **_heads())
    )


_BUILDERS = {
    "sam": _sam,
    "sam_hq": _sam_hq,
    "sam2": _sam2,
    "edgetam": _edgetam,
    "sam3_tracker": _sam3_tracker,
}
