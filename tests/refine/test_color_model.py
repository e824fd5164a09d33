"""What colors say: written out naively, and what must hold."""

import numpy as np
import pytest
import torch
from random_predictions import blobs

from lightning_samrefine.refine.fusion.color_model import color_ratios, weigh_by_color

pytestmark = pytest.mark.numerical


def weighed(probs, image, weight, stride):
    return weigh_by_color(probs, image, color_ratios(probs, image, stride), weight)


def naively(probs, image, weight, stride):
    """The docstring of `weigh_by_color`, a pixel and a bin at a time."""
    num_classes, height, width = probs.shape
    rgb = image.long().numpy()

    def bin_of(y, x):
        red, green, blue = (int(value) for value in rgb[:, y, x])
        return (
            (red + green + blue) * 24 // 768,
            (red - blue + 256) * 24 // 512,
            (2 * green - red - blue + 512) * 24 // 1024,
        )

    counts = np.zeros((24, 24, 24, num_classes))
    counted = 0
    shares = np.zeros(num_classes)
    for y in range(0, height, stride):
        for x in range(0, width, stride):
            counts[bin_of(y, x)] += probs[:, y, x].numpy()
            shares += probs[:, y, x].numpy()
            counted += 1
    shares = shares / counted + 1e-4
    for axis in range(3):
        padded = np.pad(counts, [(int(i == axis),) * 2 for i in range(4)], mode="edge")
        below, above = (np.delete(padded, ends, axis) for ends in ([-1, -2], [0, 1]))
        counts = (below + 2 * counts + above) / 4
    result = np.zeros(probs.shape)
    for y in range(height):
        for x in range(width):
            of_bin = counts[bin_of(y, x)]
            given_color = (of_bin + 5 * shares) / (of_bin.sum() + 5)
            factors = np.maximum(given_color / shares, 0.01) ** weight
            weighted = probs[:, y, x].numpy() * factors
            result[:, y, x] = weighted / max(weighted.sum(), 1e-30)
    return result


def sky_behind_a_tree(seed=0):
    """Green all over with blue holes; the prediction calls the whole tree, and blue on top sky."""
    generator = torch.Generator().manual_seed(seed)
    sky = torch.zeros(60, 80, dtype=torch.bool)
    sky[:20] = True
    holes = torch.rand(60, 80, generator=generator) < 0.1
    blue, green = torch.tensor([120, 160, 230]), torch.tensor([50, 110, 40])
    image = torch.where((sky | holes)[None], blue[:, None, None], green[:, None, None])
    noise = torch.randint(-8, 9, image.shape, generator=generator)
    probs = torch.where(sky, 0.9, 0.3)
    return (image + noise).to(torch.uint8), torch.stack([probs, 1 - probs]), sky | holes


class TestColors:
    @pytest.mark.parametrize("stride", [1, 2, 3])
    def test_it_is_the_formula(self, stride):
        image, probs = blobs(4, (23, 31))
        image = (image // 3 + 60).to(torch.uint8)  # few bins, so that many pixels share one
        expected = naively(probs, image, 1.3, stride)
        before = probs.clone()
        found = weighed(probs, image, 1.3, stride)
        np.testing.assert_allclose(found.numpy(), expected, atol=2e-4)
        assert torch.equal(probs, before)
        assert (found - probs).abs().max() > 0.05

    def test_the_sky_between_branches_is_found(self):
        image, probs, sky = sky_behind_a_tree()
        assert (probs.argmax(0) == 0).sum() < sky.sum()
        assert torch.equal(weighed(probs, image, 1.3, 2).argmax(0) == 0, sky)

    def test_a_rare_class_is_no_worse_for_being_rare(self):
        """A pole of the street's own gray keeps its prediction."""
        image = torch.full((3, 40, 40), 128, dtype=torch.uint8)
        probs = torch.full((2, 40, 40), 0.01)
        probs[0] = 0.99
        probs[:, :, 20] = torch.tensor([0.4, 0.6])[:, None]
        assert torch.equal(weighed(probs, image, 1.3, 1).argmax(0), probs.argmax(0))

    def test_pixels_without_probabilities_stay_without(self):
        image, probs = blobs()
        probs[:, :5] = 0
        found = weighed(probs, image, 1.3, 2)
        assert (found[:, :5] == 0).all()
        torch.testing.assert_close(found[:, 5:].sum(0), torch.ones_like(found[0, 5:]))

    def test_every_color_has_a_bin(self):
        corners = torch.tensor([[r, g, b] for r in (0, 255) for g in (0, 255) for b in (0, 255)])
        image = corners.T[:, :, None].to(torch.uint8)
        found = weighed(torch.full((3, 8, 1), 1 / 3), image, 1.0, 1)
        torch.testing.assert_close(found, torch.full((3, 8, 1), 1 / 3))

    def test_a_permutation_of_the_classes_permutes_the_result(self):
        image, probs = blobs(4)
        order = torch.tensor([2, 0, 3, 1])
        found = weighed(probs[order], image, 1.3, 2)
        torch.testing.assert_close(found, weighed(probs, image, 1.3, 2)[order])

    def test_the_largest_weight_gives_numbers(self):
        image, probs = blobs(4)
        probs[3] = 0
        probs[3, 0, 0] = 1e-6
        found = weighed(probs, image, 8.0, 1)
        torch.testing.assert_close(found.sum(0), torch.ones_like(found[0]))
