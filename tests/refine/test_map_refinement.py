"""Masks to a map inside their own extents, against the whole-frame tensors they stand for."""

import pytest
import torch
import torch.nn.functional as F

from lightning_samrefine.models.sam import SamPromptable
from lightning_samrefine.refine.fusion.map_refinement import MapRefinement
from lightning_samrefine.refine.fusion.upscaling import Window, WindowedUpscale, extents
from lightning_samrefine.utils.geometry import get_preprocess_shape

pytestmark = pytest.mark.numerical

CPU = torch.device("cpu")

# Model sides (m, input) and image sizes: up- and down-scaling, equal sides, slivers, tiny frames.
FRAMES = [
    ((64, 256), (360, 480)),
    ((64, 256), (90, 121)),
    ((32, 64), (100, 70)),
    ((32, 64), (40, 48)),
    ((32, 128), (128, 96)),
    ((20, 128), (3, 200)),
    ((64, 256), (200, 1)),
    ((64, 256), (1, 1)),
]


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


def windowed(sizes, image_hw):
    mask_size, image_size = sizes
    input_hw = get_preprocess_shape(*image_hw, image_size)
    return WindowedUpscale(mask_size, image_size, input_hw, image_hw, CPU)


@pytest.mark.parametrize(("sizes", "image_hw"), FRAMES)
def test_a_window_holds_every_positive_pixel_and_the_same_logits(sizes, image_hw):
    generator = torch.Generator().manual_seed(0)
    upscale = windowed(sizes, image_hw)
    smaller = positive = 0
    for _ in range(40):
        mask = random_mask(sizes[0], generator, get_preprocess_shape(*image_hw, sizes[0]))
        whole = upscale_whole(mask, sizes[1], image_hw)
        logits, window = upscale(mask, extents(mask[None])[0].numpy())
        outside = whole.clone()
        if window:
            assert logits.shape == whole[window.slices].shape
            torch.testing.assert_close(logits, whole[window.slices], rtol=0, atol=1e-6)
            outside[window.slices] = -1
            # Signs decide labels, so they must agree even where a logit is next to 0.
            assert torch.equal(logits > 0, whole[window.slices] > 0)
        assert not (outside > 0).any()
        smaller += logits.numel() < whole.numel()
        positive += bool((whole > 0).any())
    assert positive >= 1
    assert smaller > 10 or min(image_hw) == 1


def test_a_window_grows_with_its_mask_only():
    upscale = windowed((256, 1024), (720, 960))
    mask = torch.full((256, 256), -1.0)
    mask[10:15, 20:28] = 1
    _, window = upscale(mask, extents(mask[None])[0].numpy())
    # One low-resolution pixel is 3.75 image pixels; the rim is one such pixel and a little more.
    assert 5 * 3.75 <= window.y1 - window.y0 <= 7 * 3.75 + 3
    assert 8 * 3.75 <= window.x1 - window.x0 <= 10 * 3.75 + 3


def test_masks_that_are_positive_nowhere_or_in_the_padding_have_no_window():
    upscale = windowed((64, 256), (100, 200))
    nowhere = torch.full((64, 64), -1.0)
    padding = nowhere.clone()
    padding[50:, :] = 9  # the image fills 32 rows
    nan = torch.full((64, 64), float("nan"))
    for mask in (nowhere, padding, nan):
        logits, window = upscale(mask, extents(mask[None])[0].numpy())
        assert not window
        assert logits.numel() == 0
        assert not (upscale_whole(mask, 256, (100, 200)) > 0).any()


def test_a_model_with_a_rule_of_its_own_is_asked_for_whole_frames(random_sam):
    class Other(SamPromptable):
        def postprocess_masks(self, low_res_logits, image_hw):
            return super().postprocess_masks(low_res_logits, image_hw) + 1

    assert WindowedUpscale.of(random_sam, (40, 60)) is not None
    assert WindowedUpscale.of(Other(random_sam.module, "other"), (40, 60)) is None


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
def test_fused_windows_equal_the_whole_tensors(image_hw):
    generator = torch.Generator().manual_seed(3)
    num_classes, grid_hw = 5, (image_hw[0] // 2, image_hw[1] // 2)
    overlaps = raised = 0
    for round_ in range(8):
        probs = torch.rand(num_classes, *image_hw, generator=generator).softmax(dim=0)
        if round_ % 2:
            probs.fill_(1 / num_classes)  # classes tie where masks saturate
        labels = torch.randint(-1, num_classes + 1, image_hw, generator=generator)
        upscale = windowed((32, 128), image_hw)
        classes = sorted(torch.randint(0, num_classes, (9,), generator=generator).tolist())
        low_res = [random_mask(32, generator) * (10 if round_ % 2 else 1) for _ in classes]
        masks = [upscale_whole(mask, 128, image_hw) for mask in low_res]
        failed = torch.rand(grid_hw, generator=generator) > 0.7
        inside = F.interpolate(failed[None, None].float(), image_hw, mode="nearest")[0, 0] > 0

        fused = MapRefinement(probs, labels)
        for mask, c in zip(low_res, classes, strict=True):
            logits, window = upscale(mask, extents(mask[None])[0].numpy())
            if window:
                fused.add(logits, c, window)
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
    fused.add(torch.full((2, 4), 1.0), 1, Window(0, 2, 0, 4))
    fused.add(torch.tensor([[2.0]]), 1, Window(3, 4, 3, 4))
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
    with pytest.raises(ValueError, match="c: got 1 after 2"):
        fused.add(torch.ones(2, 2), 1)
