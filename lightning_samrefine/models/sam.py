"""Any model in segment-anything's `Sam` layout, behind the `Promptable` protocol."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from segment_anything.modeling import Sam
from torch import Tensor

from lightning_samrefine.models.base import Prompts
from lightning_samrefine.models.fast.decoder import FastMaskDecoder, supports
from lightning_samrefine.models.fast.encoder import FastImageEncoder, takes_parts
from lightning_samrefine.models.fast.point_encoding import exact_coordinates
from lightning_samrefine.models.transforms import get_preprocess_shape, resize


class SamPromptable:
    """A `Sam` module as a `Promptable`: frozen, in eval mode, with tensors for inputs.

    Args:
        module: The model; its image encoder has ``img_size``, as all of this family do.
        name: Short name for logs.
        accepts_points: Whether a single point gets masks worth having. False for a model that was
            trained for whole regions, box, point and mask together.
    """

    def __init__(self, module: Sam, name: str, accepts_points: bool = True) -> None:
        self.module = module.eval().requires_grad_(False)
        self.name = name
        self.accepts_points = accepts_points
        self._encode = FastImageEncoder(self.module.image_encoder)
        self.image_size = int(module.image_encoder.img_size)
        self.mask_size = int(module.prompt_encoder.mask_input_size[0])
        self._fast_decoder = FastMaskDecoder(module)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.module.device

    def drop_derived(self) -> None:
        """Drop the copies and products of the weights that are kept between calls."""
        self._encode.drop_derived()
        self._fast_decoder.drop_derived()

    def input_hw(self, image_hw: tuple[int, int]) -> tuple[int, int]:
        """Return (h_in, w_in): the long side becomes the model's input size (step 6)."""
        return get_preprocess_shape(*image_hw, self.image_size)

    def mask_hw(self, image_hw: tuple[int, int]) -> tuple[int, int]:
        """Return (h_n, w_n): the long side becomes the mask prompt's size (step 5)."""
        return get_preprocess_shape(*image_hw, self.mask_size)

    def encode_images(self, images: Sequence[Tensor], padding: bool = True) -> list[Tensor]:
        """Encode images, each uint8 (3, H, W) RGB of its own size (step 0).

        One at a time, which keeps ViT's attention matrices from piling up; a GPU is busy with one.

        Args:
            images: The images.
            padding: Whether the padding is encoded, as published. Otherwise the encoder works on
                the patches that show the image, and all others get one constant embedding of
                padding. Encoders other than segment-anything's ViT and TinyViT always encode it.

        Returns:
            One (1, D, h_e, w_e) float32 embedding an image.
        """
        if padding or not takes_parts(self.module.image_encoder):
            return [self._encode(self._preprocess(image)).float() for image in images]
        return [self._encode_shown(image).float() for image in images]

    def _encode_shown(self, image: Tensor) -> Tensor:
        """Encode the patches that show an image, and fill in the rest: (1, D, h_e, w_e)."""
        square, grid = self._preprocess(image), self.module.prompt_encoder.image_embedding_size
        patch = self.image_size // grid[0]
        height, width = self.input_hw((image.shape[1], image.shape[2]))
        rows, columns = -(-height // patch), -(-width // patch)
        shown = self._encode(square[..., : rows * patch, : columns * patch])
        if (rows, columns) == grid:
            return shown
        embedding = self._encode.of_padding(square, patch).repeat(1, 1, *grid)
        embedding[..., :rows, :columns] = shown
        return embedding

    def predict_masks(
        self, embedding: Tensor, prompts: Prompts, multimask_output: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Predict the masks of N ≥ 1 prompts on one image (step 7).

        Segment-anything's own parts are computed by `FastMaskDecoder`; other parts, parts with
        hooks and an embedding that requires a gradient by the module's forward pass.
        """
        if self._can_be_fast(embedding):
            logits, pred_iou = self._fast_decoder([embedding], [prompts], multimask_output)
        else:
            logits, pred_iou = self._predict_by_module(embedding, prompts, multimask_output)
        return (logits, pred_iou) if multimask_output else (logits[:, 0], pred_iou[:, 0])

    def predict_masks_jointly(
        self, embeddings: Sequence[Tensor], prompts: Sequence[Prompts]
    ) -> tuple[Tensor, Tensor]:
        """Predict masks on several images, in one batch if their parts are segment-anything's."""
        # A subclass that overrides `predict_masks` is to have its effect here too.
        own = type(self).predict_masks is SamPromptable.predict_masks
        if own and all(self._can_be_fast(embedding) for embedding in embeddings):
            logits, pred_iou = self._fast_decoder(embeddings, prompts)
            return logits[:, 0], pred_iou[:, 0]
        results = [self.predict_masks(*pair) for pair in zip(embeddings, prompts, strict=True)]
        logits_of_images, ious_of_images = zip(*results, strict=True)
        return torch.cat(logits_of_images), torch.cat(ious_of_images)

    def _can_be_fast(self, embedding: Tensor) -> bool:
        needs_gradient = torch.is_grad_enabled() and embedding.requires_grad
        return supports(self.module) and not needs_gradient

    def _predict_by_module(
        self, embedding: Tensor, prompts: Prompts, multimask: bool
    ) -> tuple[Tensor, Tensor]:
        encoder = self.module.prompt_encoder
        points = masks = None
        if prompts.points is not None:
            points = (
                prompts.points[:, None],
                torch.ones(len(prompts), 1, device=embedding.device),
            )
        if prompts.masks is not None:
            masks = prompts.masks[prompts.mask_index][:, None]
        # A reduced type would move points by pixels: the encoder multiplies coordinates by a
        # random matrix before sin and cos.
        with exact_coordinates(embedding.device):
            sparse, dense = encoder(points=points, boxes=prompts.boxes, masks=masks)
            image_pe = encoder.get_dense_pe()
        low_res_logits, pred_iou = self.module.mask_decoder(
            image_embeddings=embedding,
            image_pe=image_pe,
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=multimask,
        )
        return low_res_logits.float(), pred_iou.float()

    def postprocess_masks(self, low_res_logits: Tensor, image_hw: tuple[int, int]) -> Tensor:
        """Bring (N, m, m) logits to (N, H, W) float32 by SAM's two-step rule (step 9)."""
        return self.module.postprocess_masks(
            low_res_logits[:, None].float(), self.input_hw(image_hw), image_hw
        )[:, 0]

    def _preprocess(self, image: Tensor) -> Tensor:
        resized = resize(image, self.input_hw((image.shape[1], image.shape[2])), self.device)
        return self.module.preprocess(resized)
