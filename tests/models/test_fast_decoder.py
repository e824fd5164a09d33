"""The fast decoder against segment-anything's own prompt encoder and mask decoder."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from decoder_cases import draw_embedding, draw_prompts, official, shaken
from segment_anything.modeling import MaskDecoder
from tiny_random_sam import build_random_sam
from torch import Tensor, nn

from lightning_samrefine.models.base import Prompts
from lightning_samrefine.models.fast.decoder import FastMaskDecoder, supports
from lightning_samrefine.models.sam import SamPromptable
from lightning_samrefine.models.tiny import build_tiny_sam
from lightning_samrefine.models.tiny_vit import build_sam_vit_t

pytestmark = pytest.mark.numerical


def assert_equal(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """Within 1e-4 at a magnitude of 10, and relatively so beyond."""
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)


def decoded(decode: FastMaskDecoder, embedding: Tensor, prompts: Prompts) -> tuple[Tensor, Tensor]:
    """Single masks of one image."""
    logits, pred_iou = decode([embedding], [prompts])
    return logits[:, 0], pred_iou[:, 0]


BUILDERS = {"random": build_random_sam, "tiny": build_tiny_sam, "vit_t": build_sam_vit_t}


@pytest.fixture(scope="module", params=BUILDERS)
def sam(request):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return shaken(BUILDERS[request.param]())


@pytest.fixture
def small():
    return shaken(build_random_sam())


def test_it_equals_the_official_decoder(sam):
    embedding, prompts = draw_embedding(sam), draw_prompts(sam, 3, 2)
    expected = official(sam, embedding, prompts)
    # Otherwise the comparison would prove nothing.
    assert 1 < expected[0].std() < 50
    assert (expected[0] > 0).any()
    assert (expected[0] < 0).any()
    assert_equal(decoded(FastMaskDecoder(sam), embedding, prompts), expected)


@pytest.mark.parametrize("multimask", [False, True], ids=["single", "multimask"])
@pytest.mark.parametrize("kind", ["all", "box, mask", "point, mask", "box, point", "box", "point"])
def test_any_prompts_and_either_output_equal_the_modules(small, kind, multimask):
    embedding, drawn = draw_embedding(small), draw_prompts(small, 5, 3)
    with_masks = kind == "all" or "mask" in kind
    prompts = Prompts(
        drawn.boxes if kind == "all" or "box" in kind else None,
        drawn.points if kind == "all" or "point" in kind else None,
        drawn.masks if with_masks else None,
        drawn.mask_index if with_masks else None,
    )
    expected = SamPromptable(small, "small")._predict_by_module(embedding, prompts, multimask)
    assert expected[0].shape[1] == (3 if multimask else 1)
    assert_equal(FastMaskDecoder(small)([embedding], [prompts], multimask), expected)


def test_the_same_image_in_chunks(small):
    embedding, prompts = draw_embedding(small), draw_prompts(small, 33, 5)
    expected = official(small, embedding, prompts)
    decode = FastMaskDecoder(small)
    for size in (1, 2, 7, 33):
        chunks = [prompts.chunk(k, k + size) for k in range(0, 33, size)]
        logits, pred_iou = zip(
            *(decoded(decode, embedding, chunk) for chunk in chunks), strict=True
        )
        assert_equal((torch.cat(logits), torch.cat(pred_iou)), expected)


def test_another_image_or_other_masks_are_never_confused(small):
    decode = FastMaskDecoder(small)
    for seed in range(4):
        # The first two share the image, the last two the mask prompts.
        embedding = draw_embedding(small, max(seed, 1))
        prompts = draw_prompts(small, 3, 2, min(seed, 2))
        assert_equal(decoded(decode, embedding, prompts), official(small, embedding, prompts))
    first = official(small, embedding, prompts)
    embedding.mul_(-1)
    assert_equal(decoded(decode, embedding, prompts), official(small, embedding, prompts))
    prompts.masks.mul_(-3)
    expected = official(small, embedding, prompts)
    assert_equal(decoded(decode, embedding, prompts), expected)
    assert (expected[0] - first[0]).abs().max() > 0.1


@pytest.mark.parametrize("change", ["write", "load", "replace", "move", "buffer", "deep copy"])
def test_changed_weights_are_noticed(small, change):
    embedding, prompts = draw_embedding(small), draw_prompts(small, 3, 2)
    decode = FastMaskDecoder(small)
    before, _ = decoded(decode, embedding, prompts)
    attention = small.mask_decoder.transformer.layers[1].cross_attn_image_to_token
    if change == "write":
        attention.q_proj.weight.mul_(-1)
    elif change == "load":
        small.load_state_dict(shaken(build_random_sam(), seed=1).state_dict())
    elif change == "replace":
        attention.q_proj = nn.Linear(32, 16).requires_grad_(False)
    elif change == "move":
        # What `module.to(device)` does, on one device: other storage; the factor makes it seen.
        small.mask_decoder._apply(lambda weight: 0.5 * weight)
    elif change == "buffer":
        small.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix.mul_(2)
    else:
        decode = copy.deepcopy(decode)
        small = decode._sam
        small.mask_decoder.output_upscaling[0].weight.mul_(-1)
    expected = official(small, embedding, prompts)
    assert (expected[0] - before).abs().max() > 0.1
    assert_equal(decoded(decode, embedding, prompts), expected)


def test_inference_mode_and_no_grad_mix(small):
    embedding, prompts = draw_embedding(small), draw_prompts(small, 4, 2)
    expected = official(small, embedding, prompts)
    decode = FastMaskDecoder(small)
    with torch.inference_mode():
        assert_equal(decoded(decode, embedding, prompts), expected)
        assert_equal(decoded(decode, embedding.clone(), prompts), expected)
    assert_equal(decoded(decode, embedding, prompts), expected)


def test_it_survives_pickling(small):
    sam = SamPromptable(small, "small")
    embedding, prompts = draw_embedding(small), draw_prompts(small, 2, 2)
    expected = sam.predict_masks(embedding, prompts)
    again = pickle.loads(pickle.dumps(sam))
    assert again._fast_decoder._sam is again.module
    assert_equal(again.predict_masks(embedding, prompts), expected)


def test_bf16_masks_agree():
    sam = build_random_sam(dim=64)
    embedding, prompts = draw_embedding(sam), draw_prompts(sam, 12, 3)
    exact, exact_iou = official(sam, embedding, prompts)
    decode = FastMaskDecoder(sam)
    with torch.autocast("cpu", torch.bfloat16):
        mixed, mixed_iou = decoded(decode, embedding, prompts)
    assert mixed.dtype == mixed_iou.dtype == torch.float32
    assert not torch.equal(mixed, exact)
    union = ((mixed > 0) | (exact > 0)).sum()
    assert ((mixed > 0) & (exact > 0)).sum() / union > 0.95
    # Constants kept from autocast must not serve a call without it.
    assert_equal(decoded(decode, embedding, prompts), (exact, exact_iou))


def test_prompts_are_encoded_in_float32_under_autocast(small):
    """Coordinates in bf16 would move points by whole pixels."""
    prompts = draw_prompts(small, 3, 2)
    decode = FastMaskDecoder(small)
    exact = decode._tokens(prompts)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(decode._tokens(prompts), exact)


class OtherDecoder(MaskDecoder):
    """A subclass whose forward pass nobody can know."""

    def forward(self, **arguments):
        logits, pred_iou = super().forward(**arguments)
        return logits + 100, pred_iou


@pytest.mark.parametrize("difference", ["subclass", "adapter", "hook", "type", "gradient"])
def test_an_unusual_model_takes_its_own_forward_pass(small, difference):
    embedding, prompts = draw_embedding(small), draw_prompts(small, 3, 2)
    assert supports(small)
    seen = []
    if difference == "subclass":
        small.mask_decoder.__class__ = OtherDecoder
    elif difference == "adapter":
        mlp = small.mask_decoder.iou_prediction_head
        mlp.layers[0] = nn.Sequential(mlp.layers[0], nn.Tanh())
    elif difference == "hook":
        small.mask_decoder.register_forward_hook(lambda *_: seen.append(1))
    elif difference == "type":
        small.double()
        embedding = embedding.double()
        prompts = Prompts(
            prompts.boxes.double(),
            prompts.points.double(),
            prompts.masks.double(),
            prompts.mask_index,
        )
        assert not supports(small)
        return
    else:
        embedding.requires_grad_(True)
    sam = SamPromptable(small, "small")
    expected = official(small, embedding, prompts)
    logits, pred_iou = sam.predict_masks(embedding, prompts)
    # Not to the bit: coordinates meet the random matrix element by element, not in a product.
    torch.testing.assert_close(logits, expected[0], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(pred_iou, expected[1], rtol=1e-4, atol=1e-3)
    assert supports(small) == (difference == "gradient")
    assert logits.requires_grad == (difference == "gradient")
    assert len(seen) == (2 if difference == "hook" else 0)
