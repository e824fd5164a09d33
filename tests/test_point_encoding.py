"""Clicks, boxes and image tokens are encoded as segment-anything does, without a matrix product."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_samrefine.models.point_encoding import dense_encoding, prompt_tokens

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
    labelled = None if points is None else (points[:, None], torch.ones(7, 1))
    expected, _ = encoder(points=labelled, boxes=boxes, masks=None)
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
