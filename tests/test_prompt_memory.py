"""Prompts on a lattice, and the answers that are remembered for them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_refiner import blobs

from lightning_samrefine import RefineConfig, Refiner
from lightning_samrefine import prompt_memory as memory_module
from lightning_samrefine.cache import EmbeddingCache
from lightning_samrefine.image_masks import ImageMasks
from lightning_samrefine.prompt_memory import KnownMasks
from lightning_samrefine.prompts import lattice_prompts
from lightning_samrefine.regions import split_regions

pytestmark = pytest.mark.numerical

FAST = RefineConfig.preset("fast", min_region_area=1)


def regions_of(labels):
    probs = torch.nn.functional.one_hot(labels, 4).permute(2, 0, 1).float()
    return split_regions(labels, probs, 0.0, 1, 1)


def rectangle(x0, y0, x1, y1, hw=(96, 128)):
    labels = torch.zeros(hw, dtype=torch.int64)
    labels[y0:y1, x0:x1] = 1
    regions = regions_of(labels)
    return lattice_prompts(regions.select(regions.classes == 1))


class TestLattice:
    @settings(max_examples=60, deadline=None)
    @given(st.integers(0, 10**6), st.integers(1, 70), st.integers(1, 70), st.integers(1, 16))
    def test_points_stay_inside_and_boxes_move_little(self, seed, height, width, scale):
        generator = torch.Generator().manual_seed(seed)
        coarse = torch.randint(0, 4, (height // scale + 1, width // scale + 1), generator=generator)
        labels = coarse.repeat_interleave(scale, 0).repeat_interleave(scale, 1)[:height, :width]
        regions = regions_of(labels)
        prompts = lattice_prompts(regions) / 2
        assert prompts.shape == (len(regions), 6)
        x, y = np.floor(prompts[:, 4:]).astype(int).T
        assert (regions.components[y, x] == regions.component_ids).all()
        sides = (regions.boxes[:, 2:] - regions.boxes[:, :2])[:, [0, 1, 0, 1]]
        assert (np.abs(prompts[:, :4] - regions.boxes) <= sides / 8).all()
        assert (prompts[:, 2:4] > prompts[:, :2]).all()
        assert (prompts[:, :2] >= 0).all()
        assert (prompts[:, 2:4] <= [width, height]).all()

    def test_small_regions_are_asked_exactly(self):
        assert rectangle(5, 7, 8, 10).tolist() == [[10, 14, 16, 20, 14, 18]]
        assert rectangle(5, 7, 6, 8).tolist() == [[10, 14, 12, 16, 11, 15]]

    def test_regions_that_differ_a_little_ask_the_same(self):
        asked = rectangle(16, 16, 80, 80)
        assert np.array_equal(asked, rectangle(18, 15, 81, 79))
        assert not np.array_equal(asked, rectangle(32, 16, 80, 64))


def known(count, start=0):
    prompts = np.arange(start, start + count, dtype=np.int32)[:, None].repeat(6, axis=1)
    packed = torch.arange(start, start + count, dtype=torch.int64).to(torch.uint8)[:, None]
    return prompts, ImageMasks(packed, torch.arange(start, start + count) / 100, (2, 2))


class TestKnownMasks:
    def test_every_prompt_gets_its_own_mask(self):
        prompts, masks = known(5)
        some = KnownMasks.nothing().extended(prompts[:3], ImageMasks(*part(masks, slice(0, 3))))
        every = some.extended(prompts[3:], ImageMasks(*part(masks, slice(3, 5))))
        wanted = prompts[[4, 0, 2, 0]]
        assert np.array_equal(some.missing(wanted), prompts[[4]])
        assert len(every.missing(wanted)) == 0
        found = every.masks(wanted, (2, 2))
        assert found.packed[:, 0].tolist() == [4, 0, 2, 0]
        assert torch.equal(found.pred_iou, masks.pred_iou[[4, 0, 2, 0]])

    def test_each_missing_prompt_is_named_once_in_order(self):
        prompts, _ = known(3)
        missing = KnownMasks.nothing().missing(prompts[[2, 0, 2, 1, 0]])
        assert np.array_equal(missing, prompts[[2, 0, 1]])

    def test_what_was_used_longest_ago_is_forgotten_and_nothing_that_was_just_used(
        self, monkeypatch
    ):
        monkeypatch.setattr(memory_module, "_MAX_KNOWN", 4)
        some = KnownMasks.nothing().extended(*known(3))
        both = some.extended(*known(3, start=10))
        assert len(both.missing(known(3)[0])) == 0
        kept = both.used_last(known(3, start=10)[0][:2])
        assert kept.prompts[:, 0].tolist() == [10, 11, 0, 1]
        assert kept.packed[:, 0].tolist() == [10, 11, 0, 1]
        assert torch.equal(kept.pred_iou, torch.tensor([10, 11, 0, 1]) / 100)
        every = both.used_last(both.prompts)
        assert len(every.prompts) == len(every.packed) == len(every.pred_iou) == 6


def part(masks, rows):
    return masks.packed[rows], masks.pred_iou[rows], masks.mask_hw


def moved(probs):
    """Return a prediction with most regions as they were: one part of it changes its class."""
    probs = probs.clone()
    probs[:, :12, :12] = probs[:, :12, :12].roll(1, dims=0)
    return probs


class TestRefiner:
    @pytest.fixture
    def counted(self, random_sam, monkeypatch):
        counts = {"embed": 0, "prompts": 0}
        embed, decode = random_sam.embed, random_sam.decode

        def count_embed(images):
            counts["embed"] += len(images)
            return embed(images)

        def count_decode(embedding, prompts):
            # A chunk is filled up with its last prompt.
            different = torch.cat([prompts.boxes, prompts.points], dim=1).unique(dim=0)
            counts["prompts"] += len(different)
            return decode(embedding, prompts)

        monkeypatch.setattr(random_sam, "embed", count_embed)
        monkeypatch.setattr(random_sam, "decode", count_decode)
        return counts

    @pytest.mark.parametrize("kind", ["memory", "disk"])
    def test_a_changed_prediction_asks_what_is_new(self, random_sam, counted, tmp_path, kind):
        folder = tmp_path if kind == "disk" else None
        refiner = Refiner(random_sam, FAST, "32", cache=EmbeddingCache(kind, folder=folder))
        image, probs = blobs()
        first = refiner(image, probs)
        assert counted == {"embed": 1, "prompts": len(first.regions)}
        changed = refiner(image, moved(probs))
        new = counted["prompts"] - len(first.regions)
        assert 0 < new < len(changed.regions)
        assert counted["embed"] == 1
        stats = refiner.cache.stats
        assert stats.prompt_misses == counted["prompts"]
        assert stats.prompt_hits == len(changed.regions) - new

        again = refiner(image, probs)
        assert counted["prompts"] == len(first.regions) + new
        assert torch.equal(again.labels, first.labels)
        assert torch.equal(again.regions.pred_iou, first.regions.pred_iou)

    @pytest.mark.parametrize("precision", ["32", "bf16-mixed"])
    def test_what_was_asked_before_makes_no_difference(self, random_sam, precision):
        image, probs = blobs()
        refiner = Refiner(random_sam, FAST, precision, cache="memory")
        refiner(image, moved(probs))
        after, alone = refiner(image, probs), Refiner(random_sam, FAST, precision)(image, probs)
        assert refiner.cache.stats.prompt_hits > 0
        assert torch.equal(after.regions.pred_iou, alone.regions.pred_iou)
        assert torch.equal(after.regions.masks, alone.regions.masks)
        assert torch.equal(after.probs, alone.probs)

    def test_a_memory_that_is_too_short_forgets_and_asks_again(self, random_sam, monkeypatch):
        monkeypatch.setattr(memory_module, "_MAX_KNOWN", 2)
        image, probs = blobs()
        refiner = Refiner(random_sam, FAST, "32", cache="memory")
        alone = Refiner(random_sam, FAST, "32")
        for prediction in (probs, moved(probs), probs, probs.flip(0), moved(probs)):
            found, expected = refiner(image, prediction), alone(image, prediction)
            assert torch.equal(found.regions.pred_iou, expected.regions.pred_iou)
            assert torch.equal(found.regions.masks, expected.regions.masks)

    def test_another_image_model_or_grid_knows_nothing(self, random_sam, counted):
        image, probs = blobs()
        cache = EmbeddingCache("memory")

        def asked(image=image, config=FAST):
            before = counted["prompts"]
            Refiner(random_sam, config, "32", cache=cache)(image, probs)
            return counted["prompts"] - before

        assert asked() > 0
        assert asked() == 0
        other = image.clone()
        other[0, 0, 0] ^= 1
        assert asked(other) > 0
        assert asked(config=RefineConfig.preset("fast", min_region_area=1, stride=1)) > 0
        weight = random_sam.module.mask_decoder.iou_token.weight
        kept = weight.clone()
        try:
            weight.add_(0.01)
            assert asked() > 0
        finally:
            weight.copy_(kept)
        assert asked() == 0

    def test_mask_prompts_and_algorithm4_are_asked_exactly(self, random_sam, counted):
        image, probs = blobs()
        for config in (RefineConfig(), RefineConfig.preset("fast", mask_prompts=True)):
            assert not config.on_lattice
            refiner = Refiner(random_sam, config, "32", cache="memory")
            first = counted["prompts"]
            refiner(image, probs)
            second = counted["prompts"]
            refiner(image, probs)
            assert counted["prompts"] - second == second - first > 0
