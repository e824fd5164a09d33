"""Image-driven masks, soft fusion and smoothing: written out naively, and what must hold."""

import math
import warnings
from itertools import combinations

import numpy as np
import pytest
import torch
from random_predictions import blobs
from segment_anything.utils.amg import calculate_stability_score

from lightning_samrefine import RefineConfig, Refiner
from lightning_samrefine.models import Prompts
from lightning_samrefine.models.sam import SamPromptable
from lightning_samrefine.refine.fusion import mask_votes as mask_votes_module
from lightning_samrefine.refine.fusion.crf import smooth
from lightning_samrefine.refine.fusion.mask_votes import (
    MaskVotes,
    masks_at,
    mean_probs,
    on_mask_grid,
    support_factors,
    weigh,
)
from lightning_samrefine.refine.mask_proposals import (
    CompressedMasks,
    MaskProposals,
    _best,
    pack_masks,
    point_grid,
    propose_masks,
)
from lightning_samrefine.refine.windows import WindowMaps
from lightning_samrefine.utils.memory import ChunkSize

pytestmark = pytest.mark.numerical

LEVELS = (0.0, 0.27, 0.73, 1.0)


def random_masks(count=9, size=(21, 30), seed=0):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 1, 4, 5, generator=generator) * 6
    logits = torch.nn.functional.interpolate(coarse, size, mode="bilinear")[:, 0]
    pred_iou = torch.rand(count, generator=generator).sort(descending=True).values
    return logits, pred_iou


def packed_masks(**arguments):
    logits, pred_iou = random_masks(**arguments)
    return MaskProposals(pack_masks(logits), pred_iou, tuple(logits.shape[1:]))


def random_probs(num_classes=4, size=(42, 60), seed=0):
    return blobs(num_classes, size, seed)[1]


class TestMultimask:
    @pytest.mark.parametrize("kinds", ["points", "boxes", "both"])
    def test_its_predictions_are_those_of_segment_anything(self, random_sam, kinds):
        generator = torch.Generator().manual_seed(1)
        points = torch.rand(5, 2, generator=generator) * 64
        boxes = torch.cat([points - 9, points + 14], dim=1)
        given = points if kinds != "boxes" else None, boxes if kinds != "points" else None
        embedding = random_sam.encode_images([blobs()[0]])[0]
        sparse, dense = random_sam.module.prompt_encoder(
            points=None if given[0] is None else (points[:, None], torch.ones(5, 1)),
            boxes=given[1],
            masks=None,
        )
        prompts = Prompts(given[1], given[0], None, None)
        for multimask in (True, False):
            logits, pred_iou = random_sam.module.mask_decoder(
                image_embeddings=embedding,
                image_pe=random_sam.module.prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense,
                multimask_output=multimask,
            )
            if multimask:
                got = random_sam.predict_masks(embedding, prompts, multimask_output=True)
            else:
                got = tuple(part[:, None] for part in random_sam.predict_masks(embedding, prompts))
            torch.testing.assert_close(got[0], logits, atol=2e-4, rtol=1e-4)
            torch.testing.assert_close(got[1], pred_iou, atol=1e-5, rtol=1e-4)

    def test_mask_prompts_on_either_side_of_it_change_nothing(self, random_sam):
        embedding = random_sam.encode_images([blobs()[0]])[0]
        points = torch.tensor([[10.0, 20.0], [40.0, 30.0]])
        without = Prompts(None, points, None, None)
        boxes = torch.cat([points - 9, points + 14], dim=1)
        masks = torch.randn(1, random_sam.mask_size, random_sam.mask_size)
        with_mask = Prompts(boxes, points, masks, torch.zeros(2, dtype=torch.int64))
        first = random_sam.predict_masks(embedding, without, multimask_output=True)[0]
        random_sam.predict_masks(embedding, with_mask)
        assert torch.equal(
            random_sam.predict_masks(embedding, without, multimask_output=True)[0], first
        )

    def test_prompts_need_something(self):
        with pytest.raises(ValueError, match="boxes or points must be given"):
            Prompts(None, None, None, None)


class TestImageMasks:
    @pytest.mark.parametrize("size", [(21, 30), (5, 3), (8, 16)])
    def test_packing_keeps_the_four_levels(self, size):
        logits, _ = random_masks(size=size)
        expected = np.array(LEVELS)[np.digitize(logits.numpy(), [-2, 0, 2], right=True)]
        masks = packed_masks(size=size)
        assert masks.packed.dtype == torch.uint8
        assert masks.packed.shape == (9, math.ceil(size[0] * size[1] / 4))
        np.testing.assert_allclose(masks.probs().numpy(), expected, atol=1e-6)

    def test_points_are_in_the_middle_of_cells_no_closer_than_16_pixels(self):
        points = point_grid((360, 480), (768, 1024), 24)
        assert len(points) == 24 * 18
        assert points[0].tolist() == pytest.approx([1024 / 48, 768 / 36])
        assert points[1, 0] > points[0, 0]
        assert len(point_grid((256, 256), (256, 256), 24)) == 16 * 16
        assert len(point_grid((5, 400), (13, 1024), 24)) == 24

    def test_what_is_kept_is_good_sorted_and_unlike_the_rest(self, random_sam):
        image = blobs()[0]
        embedding = random_sam.encode_images([image])[0]
        masks = propose_masks(random_sam, embedding, (48, 60), 24, 4, ChunkSize())
        assert len(masks) > 3  # of a sensible model, or there is nothing to look at
        assert (masks.pred_iou > 0.7).all()
        assert (masks.pred_iou.diff() <= 0).all()
        inside = (masks.probs() > 0.5).double()
        small = torch.nn.functional.avg_pool2d(inside, 2, ceil_mode=True) > 0.5
        assert 0 < max(_iou(a, b) for a, b in combinations(small, 2)) <= 0.8

    @pytest.mark.parametrize("seed", [4, 21, 25, 27])
    def test_a_callers_autocast_finds_the_same_duplicates(self, seed):
        """In bf16, with 8 bits, an overlap near the threshold falls on either side of it."""
        generator = torch.Generator().manual_seed(seed)
        logits = torch.full((40, 128, 128), -9.0)
        for mask in logits:
            top, left, *size = torch.randint(0, 18, (4,), generator=generator).tolist()
            mask[top : 110 + size[0], left : 110 + size[1]] = 9.0
        masks = MaskProposals(pack_masks(logits), torch.linspace(0.99, 0.75, 40), (128, 128))
        small = torch.nn.functional.avg_pool2d((logits > 0).double(), 2, ceil_mode=True) > 0.5
        expected: list[int] = []
        for index in range(40):
            if all(_iou(small[index], small[other]) <= 0.8 for other in expected):
                expected.append(index)
        assert 1 < len(expected) < 40
        with torch.autocast("cpu", torch.bfloat16):
            found = _best(masks, torch.ones(40))
        assert torch.equal(found.pred_iou, masks.pred_iou[expected])

    def test_duplicates_and_bad_masks_go(self):
        logits, pred_iou = random_masks(6, seed=3)
        logits = 10 * logits  # stable
        logits = torch.cat([logits, logits + 0.01, -torch.ones_like(logits[:1])])
        pred_iou = 0.75 + 0.2 * torch.cat([pred_iou, pred_iou.flip(0), torch.tensor([1.0])])
        pred_iou[2] = 0.69
        stability = calculate_stability_score(logits, 0, 1.0)
        kept = _best(MaskProposals(pack_masks(logits), pred_iou, (21, 30)), stability)

        inside = torch.nn.functional.avg_pool2d((logits > 0).float(), 2, ceil_mode=True) > 0.5
        expected = []
        for index in pred_iou.argsort(descending=True).tolist():
            good = pred_iou[index] > 0.7 and stability[index] > 0.7
            if good and all(_iou(inside[index], inside[other]) <= 0.8 for other in expected):
                expected.append(index)
        assert 0 < len(expected) <= 6
        assert torch.equal(kept.pred_iou, pred_iou[expected])
        assert torch.equal(kept.packed, pack_masks(logits[expected]))

    def test_no_good_mask_is_no_mask(self):
        logits, pred_iou = random_masks()
        masks = _best(MaskProposals(pack_masks(logits), 0 * pred_iou, (21, 30)), torch.ones(9))
        assert len(masks) == 0
        assert masks.probs().shape == (0, 21, 30)


def _iou(a, b):
    return (a & b).sum() / max((a | b).sum(), 1)


def weighed(probs, votes):
    factors = WindowMaps.whole(support_factors([votes], [0.05]), probs.shape[1:])
    return weigh(probs, factors, slice(0, probs.shape[1]))


def shrunk(probs):
    return on_mask_grid(probs, (21, 30))


def whole_probs(mask, small):
    """The mean probability of each class inside a mask."""
    sums = np.array([(mask * c).sum() for c in small])
    return sums / sums.sum()


@pytest.mark.parametrize("grid", [(21, 30), (5, 7), (1, 1)])
def test_mean_probabilities_inside_masks(grid):
    mask_probs = torch.rand(5, *grid, generator=torch.Generator().manual_seed(0))
    mask_probs[1] = 1  # fills the image
    small = on_mask_grid(random_probs(), grid)
    found = mean_probs(mask_probs, small)
    expected = [whole_probs(mask, small.numpy()) for mask in mask_probs.numpy()]
    np.testing.assert_allclose(found.numpy(), np.stack(expected, axis=1), atol=1e-5)


class TestSupport:
    def test_masks_in_parts_of_a_cpus_cache_or_at_once(self, monkeypatch):
        masks, small = packed_masks(), shrunk(random_probs())
        expected = MaskVotes.of_image(masks, small)
        monkeypatch.setattr(mask_votes_module, "_CPU_MASKS", 2)
        found = MaskVotes.of_image(masks, small)
        torch.testing.assert_close(found[0].classes, expected[0].classes)
        assert torch.equal(found[0].inside, masks.probs().amax(dim=0))
        assert torch.equal(found[1], expected[1])

    def test_image_masks_support_their_purest_class(self):
        masks, probs = packed_masks(), random_probs()
        small = shrunk(probs)
        support, stands_for = MaskVotes.of_image(masks, small)

        small = torch.nn.functional.interpolate(probs[None], (21, 30), mode="bilinear")[0].numpy()
        expected = np.zeros((4, 21, 30))
        for mask, pred_iou in zip(masks.probs().numpy(), masks.pred_iou.numpy(), strict=True):
            purity = whole_probs(mask, small)
            c = int(np.argmax(purity))
            expected[c] = np.maximum(expected[c], pred_iou * purity[c] ** 3 * mask)
        np.testing.assert_allclose(support.classes.numpy(), expected, atol=1e-5)

        for x, y, c in [(0.5, 0.5, 0), (0.99, 0.01, 3), (0.2, 0.7, 1)]:
            at = masks.probs()[:, int(y * 21), int(x * 30)] > 0.5
            holding = masks.pred_iou[at & (stands_for == c)]
            best, at_point = masks_at(masks, stands_for, torch.tensor([[x, y]]), torch.tensor([c]))
            found = at_point.inside()
            assert best.item() == (holding.max().item() if len(holding) else 0)
            assert found[0, int(y * 21), int(x * 30)] == (len(holding) > 0)
            chosen = masks.probs()[masks.pred_iou == best] > 0.5
            assert torch.equal(found, chosen) if len(holding) else not found.any()

    def test_regions_support_their_own_class(self):
        masks, small = packed_masks(), shrunk(random_probs())
        classes, accepted = np.arange(9) % 4, np.arange(9) != 4
        votes = MaskVotes.of_regions(masks, classes, accepted, small)

        expected, inside = np.zeros(small.shape), np.zeros(small.shape[1:])
        for i in np.flatnonzero(accepted):
            mask, c = masks.probs()[i].numpy(), classes[i]
            weight = float(masks.pred_iou[i]) * whole_probs(mask, small.numpy())[c]
            expected[c] = np.maximum(expected[c], weight * mask)
            inside = np.maximum(inside, mask)
        np.testing.assert_allclose(votes.classes.numpy(), expected, atol=1e-5)
        np.testing.assert_array_equal(votes.inside.numpy(), inside.astype(np.float32))

    def test_a_rejected_region_supports_nothing(self):
        masks, small = packed_masks(), shrunk(random_probs())
        votes = MaskVotes.of_regions(masks, np.arange(9) % 4, np.zeros(9, dtype=bool), small)
        assert not votes.classes.any()
        assert not votes.inside.any()

    def test_regions_among_the_masks_of_the_image_count_for_less(self):
        masks, small = packed_masks(), shrunk(random_probs())
        image, _ = MaskVotes.of_image(masks, small)
        before = image.classes.clone(), image.inside.clone()
        classes = np.arange(9) % 4
        MaskVotes.of_regions(masks, classes, np.ones(9, dtype=bool), small, image)

        expected = before[0].numpy()
        for i, c in enumerate(classes):
            mask = masks.probs()[i].numpy()
            weight = 0.3 * float(masks.pred_iou[i]) * whole_probs(mask, small.numpy())[c] ** 3
            expected[c] = np.maximum(expected[c], weight * mask)
        np.testing.assert_allclose(image.classes.numpy(), expected, atol=1e-5)
        assert torch.equal(image.inside, before[1])

    def test_compressed_masks_are_the_same(self):
        masks = packed_masks()
        compressed = CompressedMasks.of(masks)
        again = compressed.decompressed()
        assert torch.equal(again.packed, masks.packed)
        assert torch.equal(again.probs(), masks.probs())
        assert len(CompressedMasks.of(masks[:0]).decompressed()) == 0

    def test_a_class_keeps_its_floor_and_pixels_without_support_their_probabilities(self):
        probs = random_probs()
        classes = torch.zeros(4, 42, 60)
        classes[1, :20] = 0.6
        refined = weighed(probs, MaskVotes(classes, (classes[1] > 0).float()))
        torch.testing.assert_close(refined[:, 25:], probs[:, 25:])
        weighted = probs[:, :15] * torch.tensor([0.05, 0.65, 0.05, 0.05]).view(4, 1, 1)
        torch.testing.assert_close(refined[:, :15], weighted / weighted.sum(0))

    def test_a_permutation_of_the_classes_permutes_the_result(self):
        masks, probs, order = packed_masks(), random_probs(), torch.tensor([2, 0, 3, 1])
        image = blobs(size=(42, 60))[0]

        def refine(maps):
            refined = weighed(maps, MaskVotes.of_image(masks, shrunk(maps))[0])
            return smooth(refined, image, 4.0)

        torch.testing.assert_close(refine(probs[order]), refine(probs)[order])


class TestSmoothing:
    @pytest.mark.parametrize("size", [(20, 34), (19, 3)])
    def test_it_is_a_step_of_mean_field(self, size):
        probs = random_probs(size=size)
        image = torch.randint(100, 140, (3, *size), dtype=torch.uint8)
        color = image.float() / 10
        height, width = size
        message = torch.zeros_like(probs)
        for y in range(height):
            for x in range(width):
                total = 1e-3
                for dy, dx in [(0, 1), (1, 0), (0, -1), (-1, 0)]:
                    for radius in (1, 3):
                        v, u = y + dy * radius, x + dx * radius
                        if 0 <= v < height and 0 <= u < width:
                            distance = (color[:, y, x] - color[:, v, u]).square().sum()
                            affinity = math.exp(-0.5 * distance)
                            total += affinity
                            message[:, y, x] += affinity * probs[:, v, u]
                message[:, y, x] *= 3.0 / total
        expected = (probs.clamp(min=1e-4).log() + message).softmax(dim=0)
        found = smooth(probs.clone(), image, 3.0)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
        assert (found - probs).abs().max() > 0.1

    def test_weight_0_changes_nothing_but_rounding(self):
        probs = random_probs().clamp(min=1e-3)
        probs = probs / probs.sum(0)
        torch.testing.assert_close(smooth(probs.clone(), blobs(size=(42, 60))[0], 0.0), probs)


class TestRefiner:
    @pytest.mark.parametrize("preset", ["default", "fast"])
    def test_what_comes_back_is_complete(self, random_sam, preset):
        image, probs = blobs()
        out = Refiner(random_sam, RefineConfig.preset(preset, min_region_area=1))(image, probs)
        torch.testing.assert_close(out.probs.sum(0), torch.ones(48, 60))
        assert torch.equal(out.labels, out.probs.argmax(0))
        assert len(out.regions) > 0
        assert [r.accepted for r in out.regions] == [r.pred_iou > 0.5 for r in out.regions]
        assert len(out.pred_iou) == int(out.regions.accepted.sum())

    def test_masks_of_the_image_make_a_difference(self, random_sam):
        image, probs = blobs()
        fast, default = (
            Refiner(random_sam, RefineConfig.preset(preset, min_region_area=1))(image, probs)
            for preset in ("fast", "default")
        )
        assert torch.equal(fast.regions.accepted, default.regions.accepted)
        assert (fast.labels != default.labels).any()
        assert (default.covered & ~fast.covered).any()

    def test_no_masks_no_change(self, random_sam, monkeypatch):
        image, probs = blobs()
        predict = random_sam.predict_masks

        def hopeless(embedding, prompts, multimask_output=False):
            logits, pred_iou = predict(embedding, prompts, multimask_output)
            return logits, 0 * pred_iou

        monkeypatch.setattr(random_sam, "predict_masks", hopeless)
        config = RefineConfig.preset("default", prompt_regions=False)
        out = Refiner(random_sam, config)(image, probs)
        assert torch.equal(out.probs, probs)
        assert torch.equal(out.labels, probs.argmax(0))
        assert not out.covered.any()
        assert not out.regions.accepted.any()

    @pytest.mark.parametrize("preset", ["default", "fast", "points alone"])
    def test_a_cached_image_is_decoded_for_its_regions_alone(self, random_sam, monkeypatch, preset):
        config = (
            RefineConfig.preset("default", prompt_regions=False, min_region_area=1)
            if preset == "points alone"
            else RefineConfig.preset(preset, min_region_area=1)
        )
        refiner = Refiner(random_sam, config, cache="memory")
        image, probs = blobs()
        first = refiner(image, probs)
        uncached = Refiner(random_sam, config)(image, probs)
        monkeypatch.setattr(
            random_sam,
            "encode_images",
            lambda images, padding=True: pytest.fail("embedded again"),
        )
        predict = random_sam.predict_masks

        def regions_only(embedding, prompts, multimask_output=False):
            assert preset != "points alone"
            assert not multimask_output
            return predict(embedding, prompts)

        monkeypatch.setattr(random_sam, "predict_masks", regions_only)
        again = refiner(image, probs)
        assert torch.equal(first.probs, again.probs)
        assert torch.equal(first.probs, uncached.probs)
        assert refiner.cache.stats.misses == (1 if preset == "fast" else 2)

    def test_cached_masks_depend_on_the_decoder_and_the_grid(self, random_sam):
        image, probs = blobs()
        cache = Refiner(random_sam, cache="memory").cache

        def misses(**fields):
            before = cache.stats.misses
            config = RefineConfig.preset("default", prompt_regions=False, **fields)
            Refiner(random_sam, config, cache=cache)(image, probs)
            return cache.stats.misses - before

        assert misses() == 2  # the embedding and the masks
        assert misses() == 0
        assert misses(points_per_side=2) == 1
        weight = random_sam.module.mask_decoder.iou_token.weight
        kept = weight.clone()
        try:
            weight.add_(0.01)
            assert misses() == 1
        finally:
            weight.copy_(kept)

    def test_unknown_labels_change_only_under_a_mask(self, random_sam):
        image, probs = blobs()
        labels = probs.argmax(0)
        labels[:, :30] = 255
        out = Refiner(random_sam, RefineConfig.preset("default", min_region_area=1))(
            image, probs, labels
        )
        unknown = labels == 255
        assert torch.equal(out.labels == 255, unknown & ~out.covered)
        assert (unknown & out.covered).any()
        assert (labels[:, 30:] != out.labels[:, 30:]).any()

    def test_a_model_without_multimask_is_prompted_by_regions(self, random_sam):
        class Plain:
            def __init__(self, sam):
                self.module, self.name, self.device = sam.module, "plain", sam.device
                self.image_size, self.mask_size = sam.image_size, sam.mask_size
                self.input_hw, self.mask_hw = sam.input_hw, sam.mask_hw
                self.encode_images, self.predict_masks = sam.encode_images, sam.predict_masks
                self.postprocess_masks = sam.postprocess_masks
                self.has_multimask_output = False

        plain = Plain(random_sam)
        with pytest.warns(UserWarning, match="plain, which has no multimask output"):
            refiner = Refiner(plain)
        assert refiner.config == RefineConfig.preset("fast")
        image, probs = blobs()
        expected = Refiner(random_sam, RefineConfig.preset("fast"))(image, probs)
        assert torch.equal(refiner(image, probs).labels, expected.labels)

    def test_a_model_without_useful_masks_for_points_is_prompted_by_regions(self, random_sam):
        only_regions = SamPromptable(random_sam.module, "regions", accepts_points=False)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            refiner = Refiner(only_regions)
        assert refiner.config == RefineConfig.preset("fast", mask_prompts=True)
