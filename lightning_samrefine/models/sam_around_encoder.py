"""segment-anything's `Sam` around any image encoder, its own parts sized to fit."""

from __future__ import annotations

from segment_anything.modeling import MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch import nn


def build_sam(
    image_encoder: nn.Module,
    image_size: int,
    stride: int,
    dim: int,
    mask_channels: int,
    mlp_dim: int,
    num_heads: int,
    iou_head_dim: int,
) -> Sam:
    """Build a `Sam` with fresh random weights, for RGB images in [0, 255].

    Args:
        image_encoder: (B, 3, image_size, image_size) to (B, dim, side, side), side being
            ``image_size / stride``; its ``img_size`` is ``image_size``.
        image_size: Side of the square, padded input in pixels.
        stride: Pixels an embedding vector spans; masks have 4 · side pixels a side.
        dim: Channels of the embedding.
        mask_channels: Channels of the mask prompt before it is added to the embedding.
        mlp_dim: Hidden channels of the decoder's transformer.
        num_heads: Its attention heads.
        iou_head_dim: Hidden channels of the head that predicts IoU.
    """
    side = image_size // stride
    return Sam(
        image_encoder=image_encoder,
        prompt_encoder=PromptEncoder(
            embed_dim=dim,
            image_embedding_size=(side, side),
            input_image_size=(image_size, image_size),
            mask_in_chans=mask_channels,
        ),
        mask_decoder=MaskDecoder(
            transformer=TwoWayTransformer(
                depth=2, embedding_dim=dim, mlp_dim=mlp_dim, num_heads=num_heads
            ),
            transformer_dim=dim,
            iou_head_hidden_dim=iou_head_dim,
        ),
    )
