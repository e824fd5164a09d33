"""SAM's prompt encoder and mask decoder for many regions of one image, by exact algebra.

Cross attention is between SAM's 4096 image tokens and 8 prompt tokens, so queries, keys and values
of the image tokens are not needed: with X the image tokens and W_k the key weights of a head,
q·(X W_k)ᵀ = (q W_kᵀ)·Xᵀ, and softmax(A)·(X W_v) = (softmax(A)·X) W_v; likewise in the other
direction. Each projection is thereby applied to 8 tokens instead of 4096. Per region only products
of X with 8 tokens × heads remain.

In the first layer X = E + M W + b, with E the image's embedding and M the 16 channels of the
class's mask prompt. The projections of E are computed once per image, and each region needs 16
channels instead of 256.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from segment_anything.modeling import MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from segment_anything.modeling.common import LayerNorm2d, MLPBlock
from segment_anything.modeling.mask_decoder import MLP
from segment_anything.modeling.prompt_encoder import PositionEmbeddingRandom
from segment_anything.modeling.transformer import Attention, TwoWayAttentionBlock
from torch import Tensor, nn

from lightning_samrefine.models.base import Prompts, join
from lightning_samrefine.models.fast.decoder_state import ImageSide, Memo, ModelSide, beside, cast
from lightning_samrefine.models.fast.folded_attention import (
    attend_to_image,
    folded_scores,
    per_head,
    project,
    query_scale,
    softmax_over_tokens,
    token_outputs,
    unfold,
)
from lightning_samrefine.models.fast.point_encoding import dense_encoding, prompt_tokens
from lightning_samrefine.models.fingerprint import Identity, all_weights, stamp
from lightning_samrefine.utils.precision import autocast

# Image tokens upscaled at once on a CPU: their 16 mask pixels × 32 channels stay in its cache.
_CPU_TILE = 512


class FastMaskDecoder:
    """Decodes box, point and mask prompts like segment-anything, with single-mask output.

    The weights are those of the module: tensors derived from them are computed at the first call,
    and again after the weights have changed or moved. Tensors of an image are kept for calls with
    the same embedding tensor, and those of its mask prompts for calls with the same ``masks`` (as
    from `Prompts.chunk`). In inference mode torch does not count in-place changes, so a caller must
    not write into either between calls.

    Args:
        sam: The model. `supports` must hold for it whenever the decoder is called.
    """

    def __init__(self, sam: Sam) -> None:
        self._sam = sam
        self._memo: Memo | None = None

    @property
    def _prompt_encoder(self) -> PromptEncoder:
        return self._sam.prompt_encoder

    @property
    def _mask_decoder(self) -> MaskDecoder:
        return self._sam.mask_decoder

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_memo": None}

    def drop_derived(self) -> None:
        """Drop the tensors kept between calls."""
        self._memo = None

    @torch.no_grad()
    def __call__(self, embedding: Tensor, prompts: Prompts) -> tuple[Tensor, Tensor]:
        """Decode N ≥ 1 prompts on one image.

        Matrix products follow an enclosing autocast; the prompts are encoded in float32.

        Args:
            embedding: (1, C, h, w) float32.
            prompts: On the embedding's device.

        Returns:
            Low-resolution logits (N, 4h, 4w) float32 and predicted IoU (N,) float32.
        """
        memo, masks = self._recall_masks(embedding, prompts)
        height, width = embedding.shape[-2:]
        return self._forward(memo.model, memo.image, masks, prompts, height, width)

    def predict_jointly(
        self, embeddings: Sequence[Tensor], prompts: Sequence[Prompts]
    ) -> tuple[Tensor, Tensor]:
        """Decode prompts on several images in one batch.

        Args:
            embeddings: K × (1, C, h, w) float32.
            prompts: As many; N_k ≥ 1 each.

        Returns:
            The outputs of a call for each image, one after the other.
        """
        recalled = [self._recall_masks(*pair) for pair in zip(embeddings, prompts, strict=True)]
        memos, masks = zip(*recalled, strict=True)
        image, joined = beside(memos, prompts), join(prompts)
        height, width = embeddings[0].shape[-2:]
        return self._forward(memos[-1].model, image, torch.cat(masks), joined, height, width)

    def _forward(
        self,
        model: ModelSide,
        image: ImageSide,
        masks: Tensor,
        prompts: Prompts,
        height: int,
        width: int,
    ) -> tuple[Tensor, Tensor]:
        """Decode N prompts with masks (N, 16, T) on images of h × w tokens."""
        decoder = self._mask_decoder
        tokens = self._tokens(prompts)
        layers = decoder.transformer.layers

        queries, keys = self._first_layer(layers[0], tokens, image, masks)
        for layer, pe_keys, pe_queries in zip(
            layers[1:], model.pe_keys[:-1], model.pe_queries, strict=True
        ):
            queries, keys = _later_layer(layer, queries, tokens, keys, pe_keys, pe_queries)

        # Only the final tokens of IoU and of the single mask are used.
        queries = queries[:, :2]
        attention = decoder.transformer.final_attn_token_to_image
        queries = queries + attend_to_image(
            attention, queries + tokens[:, :2], keys, model.pe_keys[-1]
        )
        queries = decoder.transformer.norm_final_attn(queries)
        pred_iou = decoder.iou_prediction_head(queries[:, 0])[:, 0]
        mixing = decoder.output_hypernetworks_mlps[0](queries[:, 1])  # (N, C/8)
        return self._upscale(keys, mixing, model, height, width).float(), pred_iou.float()

    def _tokens(self, prompts: Prompts) -> Tensor:
        """Return (N, P, C): the output tokens, the point, the box's corners."""
        decoder = self._mask_decoder
        sparse = prompt_tokens(self._prompt_encoder, prompts.points, prompts.boxes)
        output = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
        return torch.cat([output.expand(len(prompts), -1, -1), sparse], dim=1)

    def _first_layer(
        self, layer: TwoWayAttentionBlock, tokens: Tensor, image: ImageSide, masks: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Run the first layer, whose image tokens are the embedding plus a class's mask prompt.

        Args:
            layer: The layer; its self attention has no positional encoding.
            tokens: (N, P, C).
            image: Products of the embedding.
            masks: (N, 16, T), the mask prompts before their last 1×1 convolution.

        Returns:
            Tokens (N, P, C) and image tokens (N, T, C).
        """
        last = self._prompt_encoder.mask_downscaling[-1].weight[:, :, 0, 0]  # (C, 16)
        queries = layer.norm1(layer.self_attn(q=tokens, k=tokens, v=tokens))

        attention = layer.cross_attn_token_to_image
        q = project(attention.q_proj, queries + tokens, attention) * query_scale(attention)
        scores = folded_scores(q, image.keys, attention.k_proj.weight @ last, masks)
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(scores.dtype)
        heads = weights.unflatten(1, (attention.num_heads, -1))
        from_embedding = per_head(heads, image.values)
        from_masks = (weights @ masks.mT).unflatten(1, (attention.num_heads, -1))
        value = unfold(from_masks, attention.v_proj.weight @ last) + from_embedding
        queries = layer.norm2(queries + attention.out_proj(value.transpose(1, 2).flatten(2)))
        queries = layer.norm3(queries + layer.mlp(queries))

        attention = layer.cross_attn_image_to_token
        k = project(attention.k_proj, queries + tokens, attention) * query_scale(attention)
        scores = folded_scores(k, image.queries, attention.q_proj.weight @ last, masks)
        weights = softmax_over_tokens(scores, attention)
        # The mask prompt's part of X is appended as 16 more rows.
        weights = torch.cat([weights, masks], dim=1)
        outputs = token_outputs(attention, queries)
        outputs = torch.cat([outputs, last.T.to(outputs.dtype).expand(len(outputs), -1, -1)], dim=1)
        keys = torch.baddbmm(image.tokens, weights.mT, outputs)
        return queries, layer.norm4(keys)

    def _upscale(
        self, keys: Tensor, mixing: Tensor, model: ModelSide, height: int, width: int
    ) -> Tensor:
        """Upscale image tokens fourfold and mix their channels into one mask.

        A transposed convolution with a stride equal to its kernel's size is one matrix product per
        token.

        Args:
            keys: (N, T, C) image tokens.
            mixing: (N, C/8) weights of the mask.
            model: The convolutions as matrices.
            height: h.
            width: w, T = h · w.

        Returns:
            (N, 4h, 4w) logits.
        """
        _, norm, first_act, _, second_act = self._mask_decoder.output_upscaling
        count = len(keys)
        rows = _CPU_TILE if keys.device.type == "cpu" else height * width
        masks = []
        for n in range(count) if keys.device.type == "cpu" else (slice(None),):
            for tile in keys[n].split(rows, dim=-2):
                x = F.linear(tile, model.up1, model.up1_bias).unflatten(-1, (4, -1))
                x = first_act(F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps))
                x = second_act(F.linear(x, model.up2, model.up2_bias))
                x = x.unflatten(-1, (4, -1)).flatten(-4, -2)
                masks.append(x @ mixing[n].unsqueeze(-1).to(x.dtype))
        # Each token has 2×2 pixels, and each of these 2×2 again.
        mask = torch.cat([m.flatten() for m in masks]).view(count, height, width, 2, 2, 2, 2)
        return mask.permute(0, 1, 3, 5, 2, 4, 6).reshape(count, 4 * height, 4 * width)

    def _recall_masks(self, embedding: Tensor, prompts: Prompts) -> tuple[Memo, Tensor]:
        """Return the constant parts of a call with masks, and its masks' channels, (N, 16, T)."""
        if prompts.masks is None or prompts.mask_index is None:
            raise ValueError("prompts must have masks, got None")
        memo = self._recall(embedding, prompts.masks)
        return memo, memo.mask_channels[prompts.mask_index]

    def _recall(self, embedding: Tensor, masks: Tensor) -> Memo:
        """Return the constant parts of this call, recomputed if an input has changed."""
        device = embedding.device
        dtype = torch.float32
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        state = (dtype, stamp(all_weights(self._prompt_encoder, self._mask_decoder)))
        old = self._memo
        if old is not None and old.state != state:
            old = None
        own, own_masks = Identity(embedding), Identity(masks)
        with autocast(None, device):
            model = cast(self._model_side(), dtype) if old is None else old.model
            if old is not None and old.embedding == own:
                image = old.image
            else:
                image = cast(self._image_side(embedding), dtype)
            if old is not None and old.masks == own_masks:
                mask_channels = old.mask_channels
            else:
                channels = self._prompt_encoder.mask_downscaling[:-1](masks[:, None])
                mask_channels = channels.flatten(2).to(dtype)
        # A new memo instead of a changed one: another thread may be reading the old one.
        self._memo = Memo(state, model, own, image, own_masks, mask_channels)
        return self._memo

    def _model_side(self) -> ModelSide:
        transformer = self._mask_decoder.transformer
        pe = dense_encoding(self._prompt_encoder)[0].flatten(1)  # (C, T)
        later = transformer.layers[1:]
        to_image = [layer.cross_attn_token_to_image for layer in later]
        from_image = [layer.cross_attn_image_to_token for layer in later]
        up1, _, _, up2, _ = self._mask_decoder.output_upscaling
        return ModelSide(
            pe_keys=[
                (a.k_proj.weight @ pe).unflatten(0, (a.num_heads, -1))
                for a in (*to_image, transformer.final_attn_token_to_image)
            ],
            pe_queries=[
                (a.q_proj.weight @ pe + a.q_proj.bias[:, None]).unflatten(0, (a.num_heads, -1))
                for a in from_image
            ],
            up1=up1.weight.permute(2, 3, 1, 0).flatten(0, 2).contiguous(),
            up1_bias=up1.bias.repeat(4),
            up2=up2.weight.permute(2, 3, 1, 0).flatten(0, 2).contiguous(),
            up2_bias=up2.bias.repeat(4),
        )

    def _dense_bias(self) -> Tensor:
        """Return (C,), the dense prompt's bias, which is added to every image token."""
        return self._prompt_encoder.mask_downscaling[-1].bias

    def _image_side(self, embedding: Tensor) -> ImageSide:
        layer = self._mask_decoder.transformer.layers[0]
        to_image, from_image = layer.cross_attn_token_to_image, layer.cross_attn_image_to_token
        bias = self._dense_bias()
        x = embedding[0].flatten(1).float() + bias[:, None]  # (C, T)
        with_pe = x + dense_encoding(self._prompt_encoder)[0].flatten(1)
        heads = (to_image.num_heads, -1)
        v = F.linear(x.T, to_image.v_proj.weight, to_image.v_proj.bias)
        q = from_image.q_proj.weight @ with_pe + from_image.q_proj.bias[:, None]
        return ImageSide(
            tokens=x.T.contiguous()[None],
            keys=(to_image.k_proj.weight @ with_pe).unflatten(0, heads),
            values=v.unflatten(1, heads).transpose(0, 1).contiguous(),
            queries=q.unflatten(0, heads),
        )


def _later_layer(
    layer: TwoWayAttentionBlock,
    queries: Tensor,
    tokens: Tensor,
    keys: Tensor,
    pe_keys: Tensor,
    pe_queries: Tensor,
) -> tuple[Tensor, Tensor]:
    """Run a layer after the first: tokens (N, P, C), image tokens (N, T, C), same shapes out."""
    q = queries + tokens
    queries = layer.norm1(queries + layer.self_attn(q=q, k=q, v=queries))
    attention = layer.cross_attn_token_to_image
    queries = layer.norm2(queries + attend_to_image(attention, queries + tokens, keys, pe_keys))
    queries = layer.norm3(queries + layer.mlp(queries))

    attention = layer.cross_attn_image_to_token
    k = project(attention.k_proj, queries + tokens, attention) * query_scale(attention)
    scores = folded_scores(k, pe_queries, attention.q_proj.weight, keys.mT)
    weights = softmax_over_tokens(scores, attention)
    keys = torch.baddbmm(keys, weights.mT, token_outputs(attention, queries))
    return queries, layer.norm4(keys)


_KNOWN = {PromptEncoder, PositionEmbeddingRandom, MaskDecoder, TwoWayTransformer}
_KNOWN |= {TwoWayAttentionBlock, Attention, MLPBlock, MLP, LayerNorm2d}
_KNOWN |= {nn.Linear, nn.Conv2d, nn.ConvTranspose2d, nn.LayerNorm, nn.Embedding}
_KNOWN |= {nn.ModuleList, nn.Sequential, nn.GELU, nn.ReLU}


def supports(sam: Sam) -> bool:
    """Return whether the algebra holds for a model's prompt encoder and mask decoder.

    It holds for segment-anything's own classes in float32. Subclasses, replaced layers (adapters,
    quantization) and hooks may change the forward pass.
    """
    parts = (sam.prompt_encoder, sam.mask_decoder)
    for module in (module for part in parts for module in part.modules()):
        if type(module) not in _KNOWN or module._forward_hooks or module._forward_pre_hooks:
            return False
    if any(tensor.dtype != torch.float32 for tensor in all_weights(*parts)):
        return False
    layers = sam.mask_decoder.transformer.layers
    return [layer.skip_first_layer_pe for layer in layers] == [True] + [False] * (len(layers) - 1)
