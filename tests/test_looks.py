"""What masks that look alike say about one another: written out naively, and what must hold."""

import numpy as np
import pytest
import torch
from test_refiner import blobs
from test_soft_refinement import packed_masks, random_probs

from lightning_samrefine import RefineConfig, Refiner
from lightning_samrefine.looks import by_likeness, image_features, looks_of
from lightning_samrefine.naming import class_probs, name_masks, planes_of


def heard(alone, looks, middles, pred_iou):
    """Ask one mask after another, three times."""
    names = alone
    for _ in range(3):
        weight = pred_iou * names.max(axis=0) ** 3
        share = (names * weight).sum(axis=1) / weight.sum()
        renamed = np.zeros_like(names)
        for i in range(names.shape[1]):
            total, among = 1.0, share.copy()
            for j in range(names.shape[1]):
                if i != j:
                    cosine = looks[i] @ looks[j]
                    cosine /= np.linalg.norm(looks[i]) * np.linalg.norm(looks[j])
                    distance = ((middles[i] - middles[j]) ** 2).sum()
                    counts = weight[j] * np.exp((cosine - 1) / 0.1 - distance / (2 * 0.1**2))
                    total, among = total + counts, among + counts * names[:, j]
            renamed[:, i] = alone[:, i] * (among / total + 0.01) / (share + 0.01)
        names = renamed / renamed.sum(axis=0)
    return names


class TestByLikeness:
    @pytest.mark.parametrize("count", [1, 2, 12])
    def test_it_is_what_is_written(self, count):
        generator = torch.Generator().manual_seed(2)
        looks = torch.randint(-127, 128, (count, 3), generator=generator, dtype=torch.int8)
        middles = 0.4 * torch.rand(count, 2, generator=generator)
        alone = (3 * torch.rand(4, count, generator=generator)).softmax(0)
        pred_iou = torch.rand(count, generator=generator)
        found = by_likeness(alone, looks, middles, pred_iou)
        arrays = (part.double().numpy() for part in (alone, looks, middles, pred_iou))
        np.testing.assert_allclose(found.numpy(), heard(*arrays), atol=1e-5)
        assert count < 12 or not torch.allclose(found, alone, atol=1e-2)

    def test_an_unsure_mask_is_called_what_its_like_is_called(self):
        # A mask that nobody is sure of, beside two unlike it, two like it, and two far away.
        looks = torch.tensor([[9, 0], [0, 9], [0, 9], [9, 1], [9, -1], [9, 0], [9, 0]])
        middles = torch.tensor([[0.5, 0.5]] * 5 + [[0.9, 0.1]] * 2)
        for like in (0.05, 0.95):
            first = torch.tensor([0.5, 1 - like, 1 - like, like, like, 1 - like, 1 - like])
            names = by_likeness(
                torch.stack([first, 1 - first]), looks.to(torch.int8), middles, torch.ones(7)
            )
            assert (names[0, 0] > 0.8) == (like > 0.5)
            assert (names[0, 0] < 0.2) == (like < 0.5)

    def test_without_anybody_near_the_name_stays(self):
        names = torch.tensor([[0.3, 0.2], [0.7, 0.8]])
        looks = torch.tensor([[1, 0], [-1, 0]], dtype=torch.int8)
        middles = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
        found = by_likeness(names, looks, middles, torch.ones(2))
        torch.testing.assert_close(found, names, atol=1e-5, rtol=0)


class TestLooksOf:
    def test_they_point_from_the_image_to_the_mask(self):
        generator = torch.Generator().manual_seed(0)
        features = torch.randn(6, 5, 7, generator=generator)
        masks = torch.nn.functional.interpolate(
            torch.rand(4, 1, 5, 7, generator=generator), scale_factor=2, mode="nearest"
        )[:, 0]
        looks = looks_of(masks, features)
        assert looks.dtype == torch.int8
        assert (looks.abs().amax(dim=1) == 127).all()
        for mask, look in zip(masks[:, ::2, ::2], looks.float(), strict=True):
            mean = (features * mask).sum(dim=(1, 2)) / mask.sum()
            off = mean - features.mean(dim=(1, 2))
            assert torch.nn.functional.cosine_similarity(off, look, dim=0) > 0.9995

    def test_nothing_looks_like_nothing(self):
        features = torch.randn(6, 5, 7)
        assert looks_of(torch.zeros(0, 10, 14), features).shape == (0, 6)
        assert (looks_of(torch.ones(1, 10, 14), features).float().abs() <= 127).all()
        assert looks_of(torch.zeros(1, 10, 14), 0 * features).tolist() == [[0] * 6]


class TestNameMasks:
    def test_masks_without_looks_go_by_themselves(self):
        masks, planes = packed_masks(), planes_of(random_probs(), (21, 30))
        alone, _ = class_probs(masks.halved(), planes)
        assert torch.equal(name_masks(masks, planes).names, alone)
        torch.testing.assert_close(alone.sum(dim=0), torch.ones(9))

    def test_masks_with_looks_hear_one_another(self):
        masks, planes = packed_masks(), planes_of(random_probs(), (21, 30))
        features = torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(0))
        masks = masks.looked_at(features)
        named = name_masks(masks, planes)
        alone, middles = class_probs(masks.halved(), planes)
        expected = by_likeness(alone, masks.looks, middles, masks.pred_iou)
        torch.testing.assert_close(named.names, expected)
        assert not torch.equal(named.names, alone)
        assert torch.equal(named[2:5].classes, named.classes[2:5])
        assert torch.equal(named[2:5].masks.packed, masks.packed[2:5])

    def test_middles_are_centres_of_mass(self):
        masks = packed_masks()
        _, middles = class_probs(masks.halved(), planes_of(random_probs(), (21, 30)))
        halved = masks.halved().numpy()
        rows, columns = (np.arange(11) + 0.5) / 11, (np.arange(15) + 0.5) / 15
        total = halved.sum(axis=(1, 2))
        y = (halved.sum(axis=2) * rows).sum(axis=1) / total
        x = (halved.sum(axis=1) * columns).sum(axis=1) / total
        np.testing.assert_allclose(middles.numpy(), np.stack([y, x], axis=1), atol=1e-5)


class TestRefiner:
    def test_the_features_of_the_padding_are_left_out(self, random_sam):
        wide, tall = (
            image_features(random_sam, random_sam.embed([blobs(size=size)[0]])[0], mask_hw)
            for size, mask_hw in [((32, 64), (16, 32)), ((64, 32), (32, 16))]
        )
        side = random_sam.embed([blobs()[0]])[0].shape[-1]
        assert wide.shape[1:] == (side // 2, side)
        assert tall.shape[1:] == (side, side // 2)

    @pytest.mark.parametrize("preset", ["default", "fast"])
    def test_a_model_that_shows_no_features_refines_without(self, random_sam, preset):
        class Hidden:
            def __init__(self, sam):
                self._sam = sam

            def __getattr__(self, name):
                if name in ("_sam", "features"):
                    raise AttributeError(name)
                return getattr(self._sam, name)

        image, probs = blobs()
        config = RefineConfig.preset(preset, min_region_area=1, pred_iou_thresh=0.0)
        shown = Refiner(random_sam, config, "32")(image, probs)
        hidden = Refiner(Hidden(random_sam), config, "32")(image, probs)
        torch.testing.assert_close(hidden.probs.sum(0), torch.ones(48, 60))
        assert torch.equal(hidden.regions.pred_iou, shown.regions.pred_iou)
        assert not torch.equal(hidden.probs, shown.probs)
