"""Prompts on several images in one batch: the same predictions as image by image, on any device."""

from __future__ import annotations

import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from decoder_cases import draw_embedding, draw_prompts, shaken
from tiny_random_sam import OfficialSam, build_random_sam

from lightning_samrefine import RefineConfig, Refiner
from lightning_samrefine.models.base import Prompts
from lightning_samrefine.models.sam import SamPromptable
from lightning_samrefine.refine import mask_predictor as predictor_module
from lightning_samrefine.refine.decode import decode_prompts, decodes_jointly
from lightning_samrefine.utils.memory import ChunkSize

pytestmark = pytest.mark.numerical

COUNTS = (5, 1, 12, 3)


@pytest.fixture(scope="module")
def sam():
    return SamPromptable(shaken(build_random_sam()), "random")


def without_masks(prompts):
    return Prompts(prompts.boxes, prompts.points)


KINDS = {
    "box, point and mask": lambda prompts: prompts,
    "box and point": without_masks,
    "point": lambda prompts: Prompts(None, prompts.points),
    "box": lambda prompts: Prompts(prompts.boxes, None),
    "box and mask": lambda prompts: Prompts(prompts.boxes, None, prompts.masks, prompts.mask_index),
}


def several(sam, kind="box, point and mask"):
    """Images of their own, with prompts of their own and another number of classes each."""
    embeddings = [draw_embedding(sam.module, seed) for seed in range(len(COUNTS))]
    prompts = [
        KINDS[kind](draw_prompts(sam.module, count, 1 + seed, seed))
        for seed, count in enumerate(COUNTS)
    ]
    return embeddings, prompts


def assert_near(actual, expected):
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_joint_predictions_are_those_of_each_image(sam, kind):
    embeddings, prompts = several(sam, kind)
    apart = [sam.predict_masks(*pair) for pair in zip(embeddings, prompts, strict=True)]
    expected = [torch.cat(part) for part in zip(*apart, strict=True)]
    # Images differ, so that a mix-up would be seen.
    other = sam.predict_masks(embeddings[1], prompts[0])[0]
    assert (apart[0][0] - other).abs().max() > 0.1
    assert_near(sam.predict_masks_jointly(embeddings, prompts), expected)
    if "mask" not in kind or "point" in kind:
        unlike = OfficialSam(sam.module, "official").predict_masks_jointly(embeddings, prompts)
        torch.testing.assert_close(unlike[0], expected[0], atol=1e-4, rtol=1e-5)


def test_a_joint_call_leaves_nothing_behind(sam):
    embeddings, prompts = several(sam)
    first = sam.predict_masks(embeddings[0], prompts[0])
    sam.predict_masks_jointly(embeddings, prompts)
    assert_near(sam.predict_masks(embeddings[0], prompts[0]), first)


def test_a_subclass_that_overrides_predict_masks_is_used(sam):
    class Certain(SamPromptable):
        def predict_masks(self, embedding, prompts, multimask_output=False):
            logits, pred_iou = super().predict_masks(embedding, prompts, multimask_output)
            return logits, torch.ones_like(pred_iou)

    _, pred_iou = Certain(sam.module, "certain").predict_masks_jointly(*several(sam))
    assert pred_iou.tolist() == [1] * sum(COUNTS)


def test_under_autocast_joint_masks_agree(sam):
    embeddings, prompts = several(sam)
    with torch.autocast("cpu", torch.bfloat16):
        logits, pred_iou = sam.predict_masks_jointly(embeddings, prompts)
        apart = [sam.predict_masks(*pair) for pair in zip(embeddings, prompts, strict=True)]
    expected = torch.cat([logits for logits, _ in apart])
    assert logits.dtype == pred_iou.dtype == torch.float32
    assert ((logits > 0) == (expected > 0)).float().mean() > 0.99


def counting(module, limit=None):
    """Return a SAM that notes how many prompts of each image a call brings, and the notes.

    More than ``limit`` prompts of several images do not fit into its memory.
    """
    sam, calls = SamPromptable(module, "counting"), []
    predict, predict_jointly = sam.predict_masks, sam.predict_masks_jointly

    def one(embedding, prompts, multimask_output=False):
        if not multimask_output:
            calls.append([len(prompts)])
        return predict(embedding, prompts, multimask_output)

    def several(embeddings, prompts):
        if limit is not None and sum(map(len, prompts)) > limit:
            raise MemoryError
        calls.append([len(own) for own in prompts])
        return predict_jointly(embeddings, prompts)

    sam.predict_masks, sam.predict_masks_jointly = one, several
    return sam, calls


def test_chunks_reach_over_the_ends_of_images():
    sam, calls = counting(shaken(build_random_sam()))
    embeddings, prompts = several(sam)
    decoded = decode_prompts(sam, embeddings, prompts, 8, ChunkSize())
    assert calls == [[5, 1, 2], [8], [2, 3]]
    for one, embedding, own in zip(decoded, embeddings, prompts, strict=True):
        logits, pred_iou = sam.predict_masks(embedding, own)
        assert_near((torch.stack(one.low_res_logits), one.pred_iou), (logits, pred_iou))


def test_where_memory_runs_out_fewer_prompts_come_together():
    sam, calls = counting(shaken(build_random_sam()), limit=4)
    embeddings, prompts = several(sam)
    decoded = decode_prompts(sam, embeddings, prompts, 8, ChunkSize())
    assert calls == [[4], [1, 1, 2], [4], [4], [2, 2], [1]]
    assert [len(one.pred_iou) for one in decoded] == list(COUNTS)


def scenes():
    generator = torch.Generator().manual_seed(0)
    images, probs, labels = [], [], []
    for size in ((48, 60), (40, 40), (60, 48)):
        images.append(torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator))
        noise = torch.randn(1, 4, 5, 6, generator=generator) * 4
        probs.append(torch.nn.functional.interpolate(noise, size, mode="bilinear")[0].softmax(0))
        labels.append(probs[-1].argmax(dim=0))
    labels[1].fill_(255)
    return images, probs, labels


@pytest.mark.parametrize(
    "config",
    [RefineConfig(), RefineConfig.preset("fast"), RefineConfig.preset("default")],
    ids=["algorithm4", "fast", "default"],
)
def test_a_refiner_that_decodes_jointly_gives_the_same(config, monkeypatch):
    config = replace(config, pred_iou_thresh=0.3, min_region_area=4)
    sam, calls = counting(build_random_sam())
    apart = Refiner(sam, config, "32").refine_batch(*scenes())
    assert {len(call) for call in calls} == {1}
    calls.clear()
    monkeypatch.setattr(predictor_module, "decodes_jointly", lambda sam, config: True)
    monkeypatch.setattr(predictor_module, "prompts_at_once", lambda device: 32)
    together = Refiner(sam, config, "32").refine_batch(*scenes())
    assert config.prompt_regions == any(len(call) == 2 for call in calls)
    for one, other in zip(apart, together, strict=True):
        assert_near([other.regions.pred_iou, other.probs], [one.regions.pred_iou, one.probs])
        assert (one.labels == other.labels).float().mean() > 0.999
    assert len(apart[1].regions) == 0 < len(apart[0].regions)


@pytest.mark.parametrize(
    ("device", "has_method", "bound", "expected"),
    [
        ("cuda", True, None, True),
        ("cpu", True, None, False),
        ("cuda", False, None, False),
        ("cuda", True, 8, False),  # batches are to be equal from run to run
    ],
)
def test_only_a_gpu_without_a_bound_decodes_jointly(sam, device, has_method, bound, expected):
    names = [
        name for name in dir(sam) if not name.startswith("_") and name != "predict_masks_jointly"
    ]
    members = dict.fromkeys(names + ["predict_masks_jointly"] * has_method, print)
    stub = SimpleNamespace(**{**members, "device": torch.device(device)})
    config = RefineConfig(max_prompts_per_batch=bound)
    assert decodes_jointly(stub, config) is expected


def test_logits_of_a_chunk_are_let_go_before_the_next(sam, monkeypatch):
    """All regions' logits together took gigabytes; their packed masks take a twentieth."""
    alive, most = [], []
    predict = sam.predict_masks

    def watched(embedding, prompts, multimask_output=False):
        most.append(sum(ref() is not None for ref in alive))
        logits, ious = predict(embedding, prompts, multimask_output)
        alive.append(weakref.ref(logits))
        return logits, ious

    monkeypatch.setattr(sam, "predict_masks", watched)
    config = RefineConfig.preset("fast", min_region_area=1, max_prompts_per_batch=2)
    images, probs, _ = scenes()
    out = Refiner(sam, config, "32")(images[0], probs[0])
    assert len(out.regions) > 6
    assert len(most) > 3
    assert max(most) <= 1
