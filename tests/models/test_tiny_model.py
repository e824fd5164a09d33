"""The tiny SAM's architecture: shapes, prompt combinations, size."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from segment_anything.modeling import MaskDecoder, PromptEncoder, Sam

from lightning_samrefine.models.tiny import build_tiny_sam

pytestmark = pytest.mark.numerical


@pytest.fixture(scope="module")
def sam() -> Sam:
    torch.manual_seed(0)
    return build_tiny_sam().eval()


def test_is_segment_anything_behind_a_small_encoder(sam: Sam) -> None:
    assert type(sam) is Sam
    assert type(sam.prompt_encoder) is PromptEncoder
    assert type(sam.mask_decoder) is MaskDecoder
    assert sam.image_encoder.img_size == 256
    assert sam.prompt_encoder.mask_input_size == (128, 128)
    assert sam.mask_threshold == 0.0


def test_fits_in_eight_megabytes_as_half_precision(sam: Sam) -> None:
    values = sum(tensor.numel() for tensor in sam.state_dict().values())
    assert values < 4_000_000
    assert 2 * values < 8_000_000


@torch.no_grad()
def test_embedding_of_padded_image(sam: Sam) -> None:
    image = torch.randint(0, 256, (2, 3, 200, 256)).float()
    prepared = sam.preprocess(image)
    assert prepared.shape == (2, 3, 256, 256)
    embedding = sam.image_encoder(prepared)
    assert embedding.shape == (2, sam.prompt_encoder.embed_dim, 32, 32)
    assert bool(embedding.isfinite().all())


@torch.no_grad()
@pytest.mark.parametrize("multimask", [False, True])
@pytest.mark.parametrize(
    ("point", "box", "mask"), [kind for kind in product((False, True), repeat=3) if any(kind)]
)
def test_every_combination_of_prompts(
    sam: Sam, point: bool, box: bool, mask: bool, multimask: bool
) -> None:
    embedding = sam.image_encoder(torch.zeros(1, 3, 256, 256))
    sparse, dense = sam.prompt_encoder(
        points=(torch.full((5, 1, 2), 40.0), torch.ones(5, 1)) if point else None,
        boxes=torch.tensor([[10.0, 10.0, 90.0, 70.0]]).expand(5, 4) if box else None,
        masks=torch.zeros(5, 1, 128, 128) if mask else None,
    )
    logits, iou = sam.mask_decoder(
        image_embeddings=embedding,
        image_pe=sam.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=multimask,
    )
    outputs = 3 if multimask else 1
    assert logits.shape == (5, outputs, 128, 128)
    assert iou.shape == (5, outputs)
    assert bool(logits.isfinite().all())


@torch.no_grad()
def test_predicts_end_to_end_in_the_image_frame(sam: Sam) -> None:
    request = {
        "image": torch.randint(0, 256, (3, 192, 256)).float(),
        "original_size": (96, 128),
        "boxes": torch.tensor([[8.0, 8.0, 64.0, 64.0]]),
    }
    (answer,) = sam([request], multimask_output=False)
    assert answer["masks"].shape == (1, 1, 96, 128)
    assert answer["masks"].dtype == torch.bool
    assert answer["low_res_logits"].shape == (1, 1, 128, 128)
