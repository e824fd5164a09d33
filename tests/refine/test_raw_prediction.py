"""The label map of probabilities."""

import pytest
import torch

from lightning_samrefine.refine.raw_prediction import first_argmax


@pytest.mark.parametrize("num_classes", [1, 2, 11, 256, 257, 400])
def test_the_first_of_the_largest(num_classes):
    generator = torch.Generator().manual_seed(num_classes)
    # Few values, so that many classes tie.
    probs = torch.randint(0, 4, (num_classes, 9, 13), generator=generator) / 4
    expected = (probs == probs.amax(dim=0)).int().argmax(dim=0)
    found = first_argmax(probs)
    assert found.dtype == torch.int64
    assert torch.equal(found, expected)


def test_the_last_class_is_found():
    probs = torch.zeros(300, 2, 2)
    probs[299, 0, 0] = probs[255, 1, 1] = probs[256, 1, 0] = 1
    assert first_argmax(probs).tolist() == [[299, 0], [256, 255]]
