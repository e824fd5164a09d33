"""SAM's prompt encoder and mask decoder for many regions of one image, by exact algebra.

Cross attention is between SAM's 4096 image tokens and 8 prompt tokens, so queries, keys and values
of the image tokens are not needed: with X the image tokens and W_k the key weights of a head,
q·(X W_k)ᵀ = (q W_kᵀ)·Xᵀ, and softmax(A)·(X W_v) = (softmax(A)·X) W_v; likewise in the other
direction. Each projection is thereby applied to 8 tokens instead of 4096. Per region only products
of X with 8 tokens × heads remain.

In the first layer X = E + M W + b, with E the image's embedding and M the 16 channels of the
region's mask prompt, if it has one. The projections of E are computed once per image, and a region
needs 16 channels instead of 256, or none.
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

from lightning_samrefine.models.base import Prompts
from lightning_samrefine.models.fast.decoder_state import ImageSide, Memo, ModelSide, beside, cast
from lightning_samrefine.models.fast.folded_attention import (
    attend_to_image,
    fold,
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
from lightning_samrefine.utils.precision import active_autocast, autocast

# Image tokens upscaled at once on a CPU: their 16 mask pixels × 32 channels stay in its cache.
_CPU_TILE = 512
_SINGLE, _MULTI = slice(0, 1), slice(1, 4)  # of SAM's four mask tokens


class FastMaskDecoder:
    """Decodes prompts like segment-anything's prompt encoder and mask decoder.

    The weights are those of the module: tensors derived from them are computed at the first call,
    and again after the weights have changed or moved. Tensors of an image are kept for calls with
    the same embedding tensor. In inference mode torch does not count in-place changes, so a caller
    must not write into an embedding between calls.

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
    def __call__(
        self, embeddings: Sequence[Tensor], prompts: Sequence[Prompts], multimask: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Decode prompts on one or several images in one batch.

        Matrix products follow an enclosing autocast; the prompts are encoded in float32.

        Args:
            embeddings: K × (1, C, h, w) float32.
            prompts: K of them, N_k ≥ 1 each, on the embeddings' device; either all have masks or
                none has, and the same of boxes and points.
            multimask: SAM's three masks for ambiguous prompts; otherwise the single one.

        Returns:
            Low-resolution logits (Σ N_k, M, 4h, 4w) float32 and predicted IoU (Σ N_k, M) float32,
            M = 3 or 1.
        """
        with_masks = prompts[0].masks is not None
        memos = [self._recall(embedding, with_masks) for embedding in embeddings]
        model = memos[-1].model
        image = memos[0].image if len(memos) == 1 else beside(memos, prompts)
        masks = self._mask_channels(prompts) if with_masks else None
        tokens = torch.cat([self._tokens(own) for own in prompts])

        decoder = self._mask_decoder
        transformer = decoder.transformer
        queries, keys = self._first_layer(transformer.layers[0], tokens, image, masks)
        for layer, pe_keys, pe_queries in zip(
            transformer.layers[1:], model.pe_keys[:-1], model.pe_queries, strict=True
        ):
            queries, keys = _later_layer(layer, queries, tokens, keys, pe_keys, pe_queries)

        chosen = _MULTI if multimask else _SINGLE
        outputs = 1 + chosen.stop  # the other final tokens are not used
        queries = queries[:, :outputs]
        attention = transformer.final_attn_token_to_image
        queries = queries + attend_to_image(
            attention, queries + tokens[:, :outputs], keys, model.pe_keys[-1]
        )
        queries = transformer.norm_final_attn(queries)
        pred_iou = decoder.iou_prediction_head(queries[:, 0])[:, chosen]
        networks = list(decoder.output_hypernetworks_mlps)[chosen]
        mixing = torch.stack(
            [network(queries[:, 1 + chosen.start + i]) for i, network in enumerate(networks)],
            dim=-1,
        )  # (N, C/8, M)
        logits = self._upscale(keys, mixing, model, *embeddings[0].shape[-2:])
        return logits.float(), pred_iou.float()

    def _tokens(self, prompts: Prompts) -> Tensor:
        """Return (N, P, C): the output tokens, then those of points and boxes."""
        decoder = self._mask_decoder
        sparse = prompt_tokens(self._prompt_encoder, prompts.points, prompts.boxes)
        output = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
        return torch.cat([output.expand(len(prompts), -1, -1), sparse], dim=1)

    def _mask_channels(self, prompts: Sequence[Prompts]) -> Tensor:
        """Return (N, 16, T), the mask prompts before their last 1×1 convolution."""
        masks = torch.cat([own.masks[own.mask_index] for own in prompts if own.masks is not None])
        dtype = active_autocast(masks.device) or torch.float32
        with autocast(None, masks.device):
            return self._prompt_encoder.mask_downscaling[:-1](masks[:, None]).flatten(2).to(dtype)

    def _first_layer(
        self, layer: TwoWayAttentionBlock, tokens: Tensor, image: ImageSide, masks: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Run the first layer, whose image tokens are the embedding plus the mask prompt.

        Args:
            layer: The layer; its self attention has no positional encoding.
            tokens: (N, P, C).
            image: Products of the embedding.
            masks: (N, 16, T), or None.

        Returns:
            Tokens (N, P, C) and image tokens (N, T, C).
        """
        last = self._prompt_encoder.mask_downscaling[-1].weight[:, :, 0, 0]  # (C, 16)
        queries = layer.norm1(layer.self_attn(q=tokens, k=tokens, v=tokens))

        attention = layer.cross_attn_token_to_image
        q = project(attention.q_proj, queries + tokens, attention) * query_scale(attention)
        scores = per_head(q, image.keys)
        if masks is not None:
            of_masks = fold(q, attention.k_proj.weight @ last)
            scores = torch.baddbmm(scores.flatten(1, 2), of_masks, masks).view_as(scores)
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(scores.dtype)
        value = per_head(weights, image.values)
        if masks is not None:
            from_masks = (weights.flatten(1, 2) @ masks.mT).unflatten(1, weights.shape[1:3])
            value = unfold(from_masks, attention.v_proj.weight @ last) + value
        queries = layer.norm2(queries + attention.out_proj(value.transpose(1, 2).flatten(2)))
        queries = layer.norm3(queries + layer.mlp(queries))

        attention = layer.cross_attn_image_to_token
        k = project(attention.k_proj, queries + tokens, attention) * query_scale(attention)
        scores = per_head(k, image.queries).flatten(1, 2)
        if masks is not None:
            scores = torch.baddbmm(scores, fold(k, attention.q_proj.weight @ last), masks)
        weights = softmax_over_tokens(scores, attention)
        outputs = token_outputs(attention, queries).to(weights.dtype)
        if masks is not None:
            # The mask prompt's part of X is appended as 16 more rows.
            weights = torch.cat([weights, masks], dim=1)
            rows = last.T.to(outputs.dtype).expand(len(outputs), -1, -1)
            outputs = torch.cat([outputs, rows], dim=1)
        keys = torch.baddbmm(image.tokens.expand(len(outputs), -1, -1), weights.mT, outputs)
        return queries, layer.norm4(keys)

    def _upscale(
        self, keys: Tensor, mixing: Tensor, model: ModelSide, height: int, width: int
    ) -> Tensor:
        """Upscale image tokens fourfold, once for all M masks of a prompt.

        A transposed convolution with a stride equal to its kernel's size is one matrix product per
        token.

        Args:
            keys: (N, T, C) image tokens.
            mixing: (N, C/8, M) weights of the masks.
            model: The convolutions as matrices.
            height: h.
            width: w, T = h · w.

        Returns:
            (N, M, 4h, 4w) logits.
        """
        _, norm, first_act, _, second_act = self._mask_decoder.output_upscaling
        count, _, masks = mixing.shape
        on_cpu = keys.device.type == "cpu"
        rows = _CPU_TILE if on_cpu else height * width
        parts = []
        for n in range(count) if on_cpu else (slice(None),):
            for tile in keys[n].split(rows, dim=-2):
                x = F.linear(tile, model.up1, model.up1_bias).unflatten(-1, (4, -1))
                x = first_act(F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps))
                x = second_act(F.linear(x, model.up2, model.up2_bias))
                # (..., 16 · tile, C/8): each token has 2×2 pixels, and each of these 2×2 again.
                x = x.unflatten(-1, (4, -1)).flatten(-4, -2)
                parts.append((x @ mixing[n].to(x.dtype)).flatten())
        logits = torch.cat(parts).view(count, height, width, 2, 2, 2, 2, masks)
        logits = logits.permute(0, 7, 1, 3, 5, 2, 4, 6)
        return logits.reshape(count, masks, 4 * height, 4 * width)

    def _recall(self, embedding: Tensor, with_masks: bool) -> Memo:
        """Return the constant parts of this call, recomputed if an input has changed."""
        dtype = active_autocast(embedding.device) or torch.float32
        weights = stamp(all_weights(self._prompt_encoder, self._mask_decoder))
        state = (dtype, with_masks, weights)
        old = self._memo if self._memo is not None and self._memo.state == state else None
        own = Identity(embedding)
        if old is None or old.embedding != own:
            with autocast(None, embedding.device):
                model = cast(self._model_side(), dtype) if old is None else old.model
                image = cast(self._image_side(embedding, with_masks), dtype)
            # A new memo instead of a changed one: another thread may be reading the old one.
            old = self._memo = Memo(state, model, own, image)
        return old

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

    def _image_side(self, embedding: Tensor, with_masks: bool) -> ImageSide:
        encoder, layer = self._prompt_encoder, self._mask_decoder.transformer.layers[0]
        to_image, from_image = layer.cross_attn_token_to_image, layer.cross_attn_image_to_token
        # The dense prompt, or its bias, is added to every image token.
        bias = encoder.mask_downscaling[-1].bias if with_masks else encoder.no_mask_embed.weight[0]
        x = embedding[0].flatten(1).float() + bias[:, None]  # (C, T)
        with_pe = x + dense_encoding(encoder)[0].flatten(1)
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
