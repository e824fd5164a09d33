"""SAM's masks for prompts without a mask prompt, by the algebra of `fast.decoder`.

Without a mask prompt all prompts of an image share the same image tokens, so the products of the
image in the first layer are computed once. The three multimask outputs differ only in their last
product: all four masks cost little more than one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from segment_anything.modeling import TwoWayTransformer
from segment_anything.modeling.transformer import TwoWayAttentionBlock
from torch import Tensor

from lightning_samrefine.models.base import Prompts, join
from lightning_samrefine.models.fast.decoder import _CPU_TILE, FastMaskDecoder, _later_layer
from lightning_samrefine.models.fast.decoder_state import ImageSide, ModelSide, beside
from lightning_samrefine.models.fast.folded_attention import (
    attend_to_image,
    per_head,
    project,
    query_scale,
    softmax_over_tokens,
    token_outputs,
)
from lightning_samrefine.models.fast.point_encoding import prompt_tokens

_SINGLE, _MULTI = slice(0, 1), slice(1, 4)  # of SAM's four mask tokens


class FastMultimaskDecoder(FastMaskDecoder):
    """Decodes points, boxes or both like segment-anything without a mask prompt.

    Values kept between calls, and the restriction on callers, are as in `FastMaskDecoder`.
    """

    _empty_masks: Tensor | None = None

    def drop_derived(self) -> None:
        """Drop the tensors kept between calls."""
        super().drop_derived()
        self._empty_masks = None

    @torch.no_grad()
    def __call__(
        self, embedding: Tensor, prompts: Prompts, multimask: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Decode N ≥ 1 prompts on one image.

        Args:
            embedding: (1, C, h, w) float32.
            prompts: Without masks, on the embedding's device.
            multimask: SAM's three masks for ambiguous prompts; otherwise the single one.

        Returns:
            Low-resolution logits (N, M, 4h, 4w) float32 and predicted IoU (N, M) float32, M = 3
            or 1.
        """
        memo = self._recall(embedding, self._no_masks(embedding))
        return self._forward_without_masks(
            memo.model, memo.image, prompts, multimask, *embedding.shape[-2:]
        )

    def predict_jointly(
        self, embeddings: Sequence[Tensor], prompts: Sequence[Prompts], multimask: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Decode prompts on several images in one batch.

        Args:
            embeddings: K × (1, C, h, w) float32.
            prompts: As many, without masks; N_k ≥ 1 each.
            multimask: As for one image.

        Returns:
            The outputs of a call for each image, one after the other.
        """
        memos = [self._recall(e, self._no_masks(e)) for e in embeddings]
        image, joined = beside(memos, prompts), join(prompts)
        return self._forward_without_masks(
            memos[-1].model, image, joined, multimask, *embeddings[0].shape[-2:]
        )

    def _forward_without_masks(
        self,
        model: ModelSide,
        image: ImageSide,
        prompts: Prompts,
        multimask: bool,
        height: int,
        width: int,
    ) -> tuple[Tensor, Tensor]:
        """Decode N prompts on images of h × w tokens."""
        decoder = self._mask_decoder
        chosen = _MULTI if multimask else _SINGLE
        tokens = self._tokens(prompts)
        transformer: TwoWayTransformer = decoder.transformer
        queries, keys = self._first_layer_without_mask(transformer.layers[0], tokens, image)
        for layer, pe_keys, pe_queries in zip(
            transformer.layers[1:], model.pe_keys[:-1], model.pe_queries, strict=True
        ):
            queries, keys = _later_layer(layer, queries, tokens, keys, pe_keys, pe_queries)

        outputs = 1 + decoder.num_mask_tokens
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
        return self._upscale_all(keys, mixing, model, height, width).float(), pred_iou.float()

    def _no_masks(self, embedding: Tensor) -> Tensor:
        """Return the same empty stack of mask prompts in every call, for reuse in `_recall`."""
        empty = self._empty_masks
        if empty is None or empty.device != embedding.device:
            side = self._prompt_encoder.mask_input_size
            empty = self._empty_masks = torch.empty(0, *side, device=embedding.device)
        return empty

    def _tokens(self, prompts: Prompts) -> Tensor:
        """Return (N, P, C): the output tokens, then those of points and boxes."""
        decoder = self._mask_decoder
        sparse = prompt_tokens(self._prompt_encoder, prompts.points, prompts.boxes)
        output = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
        return torch.cat([output.expand(len(prompts), -1, -1), sparse], dim=1)

    def _dense_bias(self) -> Tensor:
        return self._prompt_encoder.no_mask_embed.weight[0]

    def _first_layer_without_mask(
        self, layer: TwoWayAttentionBlock, tokens: Tensor, image: ImageSide
    ) -> tuple[Tensor, Tensor]:
        queries = layer.norm1(layer.self_attn(q=tokens, k=tokens, v=tokens))

        attention = layer.cross_attn_token_to_image
        q = project(attention.q_proj, queries + tokens, attention) * query_scale(attention)
        scores = per_head(q, image.keys)
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(scores.dtype)
        value = per_head(weights, image.values)
        queries = layer.norm2(queries + attention.out_proj(value.transpose(1, 2).flatten(2)))
        queries = layer.norm3(queries + layer.mlp(queries))

        attention = layer.cross_attn_image_to_token
        k = project(attention.k_proj, queries + tokens, attention) * query_scale(attention)
        scores = per_head(k, image.queries).flatten(1, 2)
        weights = softmax_over_tokens(scores, attention)
        outputs = token_outputs(attention, queries).to(weights.dtype)
        tokens_of_image = image.tokens.expand(len(outputs), -1, -1)
        keys = torch.baddbmm(tokens_of_image, weights.mT, outputs)
        return queries, layer.norm4(keys)

    def _upscale_all(
        self, keys: Tensor, mixing: Tensor, model: ModelSide, height: int, width: int
    ) -> Tensor:
        """Upscale image tokens fourfold, once for all M masks of a prompt.

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
