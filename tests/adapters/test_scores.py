"""Logits, probabilities and label maps become one thing."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as nnf

from lightning_samrefine.adapters.scores import refuse_unclear_sums, to_probs

pytestmark = pytest.mark.numerical

HW = (8, 10)


@pytest.fixture
def logits() -> torch.Tensor:
    return 4 * torch.randn(3, 5, *HW, generator=torch.Generator().manual_seed(0))


def test_logits_get_a_softmax(logits):
    probs, labels = to_probs(logits, "auto", 5, HW)
    torch.testing.assert_close(probs, logits.softmax(dim=1))
    assert torch.equal(labels, logits.argmax(dim=1))
    assert probs.dtype == torch.float32
    assert labels.dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_probabilities_are_recognized_in_every_precision(logits, dtype):
    given = logits.softmax(dim=1).to(dtype)
    probs, labels = to_probs(given, "auto", 5, HW)
    assert torch.equal(probs, given.float())
    assert torch.equal(labels, given.float().argmax(dim=1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_widened_before_the_softmax(logits, dtype):
    probs, _ = to_probs(logits.to(dtype), "auto", 5, HW)
    torch.testing.assert_close(probs, logits.to(dtype).float().softmax(dim=1))


def test_a_kind_that_is_named_is_believed(logits):
    given = logits.softmax(dim=1)
    assert torch.equal(to_probs(given, "probs", 5, HW)[0], given)
    torch.testing.assert_close(to_probs(given, "logits", 5, HW)[0], given.softmax(dim=1))
    with pytest.raises(ValueError, match=r"scores must be in .* scores_kind='probs', got values"):
        to_probs(logits, "probs", 5, HW)


def test_masked_classes_at_minus_infinity_are_logits(logits):
    logits[:, 2] = -math.inf
    probs, _ = to_probs(logits, "auto", 5, HW)
    torch.testing.assert_close(probs, logits.softmax(dim=1))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_broken_image_does_not_change_the_others(logits, bad):
    given = logits.softmax(dim=1)
    given[1] = bad
    probs, _ = to_probs(given, "auto", 5, HW)
    assert torch.equal(probs[[0, 2]], given[[0, 2]])
    assert not probs[1].isfinite().all()


@pytest.mark.parametrize("total", [2, 100])
def test_constant_sums_are_probabilities_that_were_not_divided(logits, total):
    probs = logits.softmax(dim=1)
    with pytest.raises(ValueError, match=rf"must sum to 1 .* got {total} in every pixel of x"):
        refuse_unclear_sums(total * probs, "x")
    broken = probs.clone()
    broken[1, 0, 0, 0] = math.inf
    for one in (probs, list(probs), broken, logits, logits.exp(), total * probs.log()):
        refuse_unclear_sums(one, "x")


def test_small_logits_are_enlarged_before_the_softmax(logits):
    small = logits[..., :4, :5]
    probs, labels = to_probs(small, "auto", 5, HW)
    enlarged = nnf.interpolate(small, HW, mode="bilinear", align_corners=False)
    torch.testing.assert_close(probs, enlarged.softmax(dim=1))
    assert torch.equal(labels, enlarged.argmax(dim=1))


def test_scores_larger_than_the_image_are_refused(logits):
    with pytest.raises(ValueError, match=r"scores must .*image's \(8, 9\), got .*\(8, 10\)"):
        to_probs(logits, "auto", 5, (8, 9))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("channel", [False, True])
def test_label_maps_become_almost_one_hot_and_keep_unknown_values(dtype, channel):
    labels = torch.randint(0, 5, (2, *HW), generator=torch.Generator().manual_seed(0))
    labels[0, 0] = 255 if dtype == torch.uint8 else -1
    given = labels.to(dtype)
    probs, found = to_probs(given[:, None] if channel else given, "auto", 5, HW)
    assert torch.equal(found, labels)
    torch.testing.assert_close(probs[0, :, 0], torch.full((5, HW[1]), 0.2))
    assert torch.equal(probs[1].argmax(dim=0), labels[1])
    assert probs[1].amax(dim=0).min() == probs.max() == pytest.approx(0.999)
    assert probs.min() > 0
    torch.testing.assert_close(probs.sum(dim=1), torch.ones(2, *HW))


def test_label_maps_in_floats_need_their_kind_named():
    labels = torch.randint(0, 5, (2, *HW)).float()
    assert torch.equal(to_probs(labels, "labels", 5, HW)[1], labels.long())
    with pytest.raises(ValueError, match=r"must be \(B, 5, h, w\) for num_classes=5"):
        to_probs(labels, "auto", 5, HW)


def test_label_maps_are_enlarged_to_the_nearest():
    _, labels = to_probs(torch.tensor([[[0, 3]]]), "auto", 4, (2, 4))
    assert labels.tolist() == [[[0, 0, 3, 3], [0, 0, 3, 3]]]


@pytest.mark.parametrize("channel", [False, True])
def test_one_channel_logits_get_a_sigmoid(channel):
    given = 3 * torch.randn(2, *HW, generator=torch.Generator().manual_seed(0))
    probs, labels = to_probs(given[:, None] if channel else given, "auto", 2, HW)
    torch.testing.assert_close(probs[:, 1], given.sigmoid())
    torch.testing.assert_close(probs.sum(dim=1), torch.ones(2, *HW))
    assert torch.equal(labels, (given > 0).long())


def test_one_channel_in_0_to_1_is_a_probability_unless_named_logits():
    given = torch.rand(2, 1, *HW, generator=torch.Generator().manual_seed(0))
    probs, labels = to_probs(given, "auto", 2, HW)
    assert torch.equal(probs[:, 1:], given)
    assert torch.equal(labels, (given[:, 0] > 0.5).long())
    probs, labels = to_probs(given, "logits", 2, HW)
    torch.testing.assert_close(probs[:, 1:], given.sigmoid())
    assert torch.equal(labels, (given[:, 0] > 0).long())


@pytest.mark.parametrize("shape", [(2, 4, *HW), (2, 1, *HW), (2, 5, 1, *HW), (5,)])
def test_other_numbers_of_channels_are_refused(shape):
    with pytest.raises(ValueError, match=r"scores must be .* for num_classes=5, got shape \("):
        to_probs(torch.randn(shape), "auto", 5, HW)


def test_integers_are_no_logits():
    with pytest.raises(ValueError, match=r"scores must be floats as logits, got dtype torch.int64"):
        to_probs(torch.zeros(2, *HW).long(), "logits", 5, HW)
