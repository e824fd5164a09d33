"""Clicks, boxes and image tokens are encoded as segment-anything does, without a matrix product."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_random_sam import build_random_sam
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_samrefine.models.base import Prompts
from lightning_samrefine.models.fast.point_encoding import (
    dense_encoding,
    exact_coordinates,
    prompt_tokens,
)
from lightning_samrefine.models.sam import SamPromptable

PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "mv", "dot", "matmul"}


class NoProducts(TorchDispatchMode):
    """Refuses what ``torch.set_float32_matmul_precision`` may round to TF32."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in PRODUCTS, func
        return func(*args, **(kwargs or {}))


@pytest.fixture
def encoder(random_sam):
    return random_sam.module.prompt_encoder


def prompts(count, side, seed=0):
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, 2, generator=generator) * side
    boxes = torch.cat([corners.amin(1), corners.amax(1)], dim=1)
    return torch.rand(count, 2, generator=generator) * side, boxes


@pytest.mark.parametrize("kind", ["both", "points", "boxes"])
def test_tokens_equal_segment_anythings(encoder, kind):
    points, boxes = prompts(7, encoder.input_image_size[0])
    points = None if kind == "boxes" else points
    boxes = None if kind == "points" else boxes
    labeled = None if points is None else (points[:, None], torch.ones(7, 1))
    expected, _ = encoder(points=labeled, boxes=boxes, masks=None)
    with NoProducts():
        found = prompt_tokens(encoder, points, boxes)
    if kind == "boxes":
        # Ours has no token for a missing click either, as segment-anything has none.
        assert found.shape == (7, 2, expected.shape[-1])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_the_dense_encoding_equals_segment_anythings(encoder):
    expected = encoder.get_dense_pe()
    with NoProducts():
        found = dense_encoding(encoder)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_no_products_notices_segment_anythings_own(encoder):
    with pytest.raises(AssertionError), NoProducts():
        encoder.get_dense_pe()


class NoProductsOverTwo(TorchDispatchMode):
    """Refuses the matrix products that TF32 and autocast round, where they sum two elements."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in PRODUCTS:
            left = args[1] if name in ("addmm", "baddbmm") else args[0]
            assert left.shape[-1] != 2, f"{func} of coordinates"
            self.products += 1
        return func(*args, **(kwargs or {}))


def prompts_of(size: int, mask_size: int, with_masks: bool) -> Prompts:
    generator = torch.Generator().manual_seed(0)
    low, high = (torch.rand(3, 2, 2, generator=generator) * size).sort(dim=1).values.unbind(1)
    masks = torch.rand(2, mask_size, mask_size, generator=generator) if with_masks else None
    index = torch.tensor([0, 1, 0]) if with_masks else None
    return Prompts(torch.cat([low, high], dim=1), (low + high) / 2, masks, index)


@pytest.mark.parametrize("with_masks", [True, False])
@pytest.mark.parametrize("by_module", [False, True])
def test_no_decoder_of_sam_multiplies_coordinates_by_a_matrix(with_masks, by_module, monkeypatch):
    sam = SamPromptable(build_random_sam(), "tiny")
    if by_module:
        monkeypatch.setattr(sam, "_can_be_fast", lambda _: False)
    side = sam.module.prompt_encoder.image_embedding_size
    embedding = torch.randn(1, sam.module.prompt_encoder.embed_dim, *side)
    prompts = prompts_of(sam.image_size, sam.mask_size, with_masks)
    with NoProductsOverTwo() as seen:
        sam.predict_masks(embedding, prompts)
        sam.predict_masks_jointly([embedding, embedding + 1], [prompts, prompts])
        sam.predict_masks(embedding, prompts, multimask_output=True)
    assert seen.products > 0


@pytest.mark.parametrize("family", ["sam", "sam_hq", "sam2", "edgetam", "sam3_tracker"])
def test_no_model_of_transformers_multiplies_coordinates_by_a_matrix(family):
    pytest.importorskip("transformers")
    from tiny_hf import build_tiny_hf, random_image

    sam = build_tiny_hf(family)
    (embedding,) = sam.encode_images([random_image(48, 64)])
    with NoProductsOverTwo() as seen:
        sam.predict_masks(embedding, prompts_of(sam.image_size, sam.mask_size, with_masks=True))
    assert seen.products > 0


def test_a_surrounding_autocast_is_switched_off():
    coordinates, frequencies = torch.rand(4, 7, 2), torch.randn(2, 16)
    with torch.autocast("cpu", torch.bfloat16), exact_coordinates(torch.device("cpu")):
        product = coordinates @ frequencies
        wide = torch.rand(3, 5) @ torch.rand(5, 2)
    assert product.dtype == wide.dtype == torch.float32
    expected = coordinates.double().numpy() @ frequencies.double().numpy()
    np.testing.assert_allclose(product.numpy(), expected, atol=1e-6)
