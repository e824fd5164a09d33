"""Masks to a map one after another, against tensors of all masks at once."""

import pytest
import torch
import torch.nn.functional as F

from lightning_samrefine.models.transforms import get_preprocess_shape
from lightning_samrefine.refine.fusion.algorithm4 import MapRefinement

pytestmark = pytest.mark.numerical


@pytest.fixture(autouse=True)
def one_thread():
    """Equal operations give equal bits only where they are split over equally many threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def upscale_whole(logits, image_size, image_hw):
    """SAM's rule as segment-anything writes it, one (m, m) mask to (H, W)."""
    in_h, in_w = get_preprocess_shape(*image_hw, image_size)
    size = (image_size, image_size)
    frame = F.interpolate(logits[None, None], size, mode="bilinear", align_corners=False)
    frame = frame[..., :in_h, :in_w]
    return F.interpolate(frame, image_hw, mode="bilinear", align_corners=False)[0, 0]


def random_mask(size, generator, filled=None):
    """Logits of both signs in a box that begins in the filled part, negative outside."""
    logits = -torch.rand(size, size, generator=generator) * 5 - 1e-6
    y0, x0 = (int(torch.randint(0, n, (1,), generator=generator)) for n in filled or (size, size))
    height, width = torch.randint(1, max(2, size // 2), (2,), generator=generator).tolist()
    part = logits[y0 : y0 + height, x0 : x0 + width]
    part += 8 * torch.rand(part.shape, generator=generator).lt(0.4)
    return logits


def fuse_whole(masks, classes, probs, labels, failed):
    """Steps 10 and 11 as docs/algorithm4.md writes them, with all N × H × W values at once."""
    refined = torch.zeros_like(probs)
    for mask, c in zip(masks, classes, strict=True):
        value = torch.where(mask > 0, mask.sigmoid() * probs[c], 0.0)
        refined[c] = torch.maximum(refined[c], value)
    covered = refined.sum(dim=0) > 0
    new = torch.where(covered, refined.argmax(dim=0), labels)
    return new, torch.maximum(refined, probs * failed), covered


@pytest.mark.parametrize("image_hw", [(96, 130), (41, 33)])
def test_masks_one_by_one_equal_all_at_once(image_hw):
    generator = torch.Generator().manual_seed(3)
    num_classes, grid_hw = 5, (image_hw[0] // 2, image_hw[1] // 2)
    overlaps = raised = 0
    for round_ in range(8):
        probs = torch.rand(num_classes, *image_hw, generator=generator).softmax(dim=0)
        if round_ % 2:
            probs.fill_(1 / num_classes)  # classes tie where masks saturate
        labels = torch.randint(-1, num_classes + 1, image_hw, generator=generator)
        classes = sorted(torch.randint(0, num_classes, (9,), generator=generator).tolist())
        low_res = [random_mask(32, generator) * (10 if round_ % 2 else 1) for _ in classes]
        masks = [upscale_whole(mask, 128, image_hw) for mask in low_res]
        failed = torch.rand(grid_hw, generator=generator) > 0.7
        inside = F.interpolate(failed[None, None].float(), image_hw, mode="nearest")[0, 0] > 0

        fused = MapRefinement(probs, labels)
        for mask, c in zip(masks, classes, strict=True):
            fused.add(mask, c)
        got = fused.finish(failed)
        expected = fuse_whole(masks, classes, probs, labels, inside)
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[2], expected[2])
        torch.testing.assert_close(got[1], expected[1], rtol=0, atol=1e-6)
        overlaps += int(((expected[1] > 0).sum(dim=0) > 1).sum())
        raised += int((inside & expected[2]).sum())
    assert overlaps > 100
    assert raised > 100


def test_equal_values_go_to_the_lowest_class_and_inputs_stay():
    probs = torch.full((3, 4, 4), 0.25)
    labels = torch.full((4, 4), 2)
    fused = MapRefinement(probs, labels)
    fused.add(torch.full((4, 4), 1.0), 0)
    second = torch.full((4, 4), -1.0)
    second[:2], second[3, 3] = 1.0, 2.0
    fused.add(second, 1)
    new_labels, new_probs, covered = fused.finish()
    assert new_labels[:2].tolist() == [[0] * 4] * 2
    assert new_labels[3].tolist() == [0, 0, 0, 1]
    assert (new_probs[2] == 0).all()
    assert covered.all()
    assert (labels == 2).all()
    assert (probs == 0.25).all()


def test_classes_that_descend_are_refused():
    fused = MapRefinement(torch.ones(3, 2, 2), torch.zeros(2, 2, dtype=torch.int64))
    fused.add(torch.ones(2, 2), 2)
    with pytest.raises(ValueError, match="c must not be below 2, the class before, got 1"):
        fused.add(torch.ones(2, 2), 1)
