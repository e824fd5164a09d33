"""What must hold for every input of the whole refiner, on Algorithm 4."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import drawn_cases
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stub_sams import BrightSam, PerfectSam

from lightning_samrefine import RefineConfig, Refiner
from lightning_samrefine.models.base import Promptable
from lightning_samrefine.refine.regions import begin_split

pytestmark = pytest.mark.numerical

quick = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


@st.composite
def predictions(draw):
    """An image, probabilities without ties, and their labels."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    classes, height, width = (
        draw(st.integers(low, high)) for low, high in ((1, 9), (1, 40), (1, 48))
    )
    coarse = torch.from_numpy(rng.normal(size=(1, classes, *rng.integers(1, 7, 2))))
    smooth = F.interpolate(coarse * 4, (height, width), mode="bilinear")[0]
    probs = (smooth + torch.from_numpy(rng.normal(size=smooth.shape)) * 0.3).softmax(dim=0)
    image = torch.from_numpy(rng.integers(0, 256, (3, height, width), dtype=np.uint8))
    return image, probs.float(), probs.float().argmax(dim=0)


def refine(sam, image, probs, labels=None, **thresholds):
    assert isinstance(sam, Promptable)
    return Refiner(sam, RefineConfig(**thresholds))(image, probs, labels)


def tied(out):
    """The covered pixels on which two classes come to the same product, but for rounding."""
    if len(out.literal_probs) < 2:
        return torch.zeros_like(out.covered)
    first, second = out.literal_probs.topk(2, dim=0).values
    return (first - second <= 1e-6 * first) & out.covered


@quick
@given(predictions(), st.integers(1, 4))
def test_a_perfect_sam_gives_back_the_raw_prediction(prediction, stride):
    image, probs, labels = prediction
    out = refine(PerfectSam(labels, stride), image, probs, stride=stride)
    assert torch.equal(out.labels, labels)
    assert len(out.pred_iou) == len(out.regions) > 0
    if stride == 1:
        assert out.covered.all()


@quick
@given(predictions(), st.sampled_from([(1,), (2,), (1, 2)]))
def test_flipping_the_image_flips_the_result(prediction, axes):
    image, probs, labels = prediction
    flipped = [tensor.flip(*(a - 3 for a in axes)) for tensor in (image, probs, labels[None])]
    out = refine(BrightSam(), image, probs, labels, stride=1)
    mirror = refine(BrightSam(), flipped[0], flipped[1], flipped[2][0], stride=1)
    back = [a - 3 for a in axes]
    # Vectorised and scalar sigmoid differ in the last bit, and a mirror moves pixels between them.
    torch.testing.assert_close(
        mirror.literal_probs.flip(*back), out.literal_probs, rtol=1e-6, atol=0
    )
    assert torch.equal(mirror.covered[None].flip(*back)[0], out.covered)
    clear = ~tied(out)
    assert torch.equal(mirror.labels[None].flip(*back)[0][clear], out.labels[clear])


@quick
@given(predictions(), st.randoms(use_true_random=False))
def test_permuting_the_classes_permutes_the_result(prediction, random):
    image, probs, labels = prediction
    order = list(range(len(probs)))
    random.shuffle(order)
    new_of_old = torch.tensor(order)
    permuted = torch.empty_like(probs)
    permuted[new_of_old] = probs
    out = refine(BrightSam(), image, probs, labels)
    other = refine(BrightSam(), image, permuted, new_of_old[labels])
    assert torch.equal(other.literal_probs[new_of_old], out.literal_probs)
    assert torch.equal(other.covered, out.covered)
    clear = ~tied(out)  # on ties the lowest class wins, whichever that is
    assert torch.equal(other.labels[clear], new_of_old[out.labels][clear])


@quick
@given(predictions(), st.integers(1, 7), st.integers(1, 7))
def test_prompt_chunks_change_nothing(prediction, size, other_size):
    image, probs, _ = prediction
    sam = BrightSam()
    out = refine(sam, image, probs, max_prompts_per_batch=size)
    other = refine(BrightSam(), image, probs, max_prompts_per_batch=other_size)
    assert max(sam.chunks) <= size
    assert torch.equal(out.probs, other.probs)
    assert torch.equal(out.labels, other.labels)
    assert torch.equal(out.regions.pred_iou, other.regions.pred_iou)


@settings(quick, max_examples=5)
@given(st.lists(predictions(), min_size=2, max_size=4), st.randoms(use_true_random=False))
def test_the_order_of_a_batch_changes_nothing(random_sam, batch, random):
    order = list(range(len(batch)))
    random.shuffle(order)
    refiner = Refiner(random_sam, RefineConfig())
    images, probs, _ = zip(*batch, strict=True)
    outs = refiner.refine_batch(images, probs)
    others = refiner.refine_batch([images[i] for i in order], [probs[i] for i in order])
    for position, index in enumerate(order):
        assert torch.equal(others[position].probs, outs[index].probs)
        assert torch.equal(others[position].labels, outs[index].labels)


@settings(quick, max_examples=30)
@given(drawn_cases())
def test_what_no_accepted_mask_covers_is_raw(random_sam, case):
    image, probs, labels = case.inputs()
    config = RefineConfig(**case.thresholds())
    out = Refiner(random_sam, config)(image, probs, labels)
    raw = probs.argmax(dim=0) if labels is None else labels
    assert torch.equal(out.labels[~out.covered], raw[~out.covered])
    accepted = out.regions.accepted.numpy()
    if not accepted.any():
        assert torch.equal(out.labels, raw)
        assert torch.equal(out.literal_probs, probs)
        return
    grid = begin_split(
        raw, probs, config.score_thresh, config.stride, config.min_region_area
    ).finish()
    failed = F.interpolate(grid.mask_of(~accepted)[None, None].float(), raw.shape)[0, 0] > 0
    assert (out.literal_probs >= probs * failed).all()
    only_failed = failed & ~out.covered
    assert torch.equal(out.literal_probs[:, only_failed], probs[:, only_failed])
    free = out.covered & ~failed
    assert torch.equal(out.labels[free], out.literal_probs.argmax(dim=0)[free])
    decided = out.covered & ~tied(out)
    assert torch.equal(out.labels[decided], out.probs.argmax(dim=0)[decided])
    assert torch.equal(out.probs[:, ~out.covered], probs[:, ~out.covered])
    assert not out.literal_probs[:, ~out.covered & ~failed].any()


@pytest.mark.parametrize("stride", [1, 2])
def test_the_perfect_stub_would_notice_a_wrong_label(stride):
    """The stub must be able to fail: one that predicts another map changes the result."""
    labels = torch.zeros(20, 24, dtype=torch.int64)
    labels[5:15, 6:18] = 1
    wider = torch.zeros_like(labels)
    wider[3:17, 4:20] = 1
    probs = torch.full((2, 20, 24), 0.2)
    probs.scatter_(0, labels[None], 0.8)
    probs[1, 3:17, 4:20] = 0.9
    out = refine(PerfectSam(wider, stride), torch.zeros(3, 20, 24).byte(), probs, labels)
    assert not torch.equal(out.labels, labels)
