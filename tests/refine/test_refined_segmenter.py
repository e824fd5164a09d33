"""A segmenter and its refinement as one module."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from lightning_samrefine import RefineConfig, RefinedSegmenter, Refiner

CLASSES = 3
CONFIG = RefineConfig(min_region_area=4, pred_iou_thresh=0.5)


class Network(nn.Module):
    """Logits of half the image's size, alone or in a dict."""

    def __init__(self, channels=CLASSES, returns="tensor"):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.layer = nn.Conv2d(3, channels, 3, padding=1, stride=2)
        self.returns = returns

    def forward(self, images):
        scores = 4 * self.layer(images - 0.5)
        return scores if self.returns == "tensor" else {"out": scores, "aux": scores * 0}


def pictures():
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 256, (2, 3, 4, 5), generator=generator).float()
    return nn.functional.interpolate(coarse, (32, 40)).to(torch.uint8)


def expected(random_sam, network, images, mean=0.0, std=1.0):
    refiner = Refiner(random_sam, CONFIG)
    with torch.no_grad():
        scores = network.layer((images / 255 - mean) / std - 0.5) * 4
        probs = nn.functional.interpolate(scores, images.shape[-2:], mode="bilinear").softmax(dim=1)
    return [refiner(image, one) for image, one in zip(images, probs, strict=True)], probs


@pytest.mark.parametrize("returns", ["tensor", "dict"])
def test_labels_and_probabilities(random_sam, returns):
    network, images = Network(returns=returns), pictures()
    found, probs = expected(random_sam, network, images)
    arguments = {} if returns == "tensor" else {"num_classes": CLASSES}
    deployed = RefinedSegmenter(network, Refiner(random_sam, CONFIG), **arguments)
    labels = deployed(images / 255)
    assert labels.dtype == torch.int64
    assert torch.equal(labels, torch.stack([one.labels for one in found]))
    assert not torch.equal(labels, probs.argmax(dim=1))
    deployed = RefinedSegmenter(network, Refiner(random_sam, CONFIG), "probs", **arguments)
    refined = torch.stack([one.probs for one in found])
    assert torch.allclose(deployed(images / 255), refined, atol=1e-6)


def test_normalized_images(random_sam):
    network, images, mean, std = Network(), pictures(), 0.4, 0.2
    found, _ = expected(random_sam, network, images, mean, std)
    deployed = RefinedSegmenter(
        network, Refiner(random_sam, CONFIG), image_mean=mean, image_std=std, image_range="0-1"
    )
    labels = deployed((images / 255 - mean) / std)
    assert torch.equal(labels, torch.stack([one.labels for one in found]))


def test_it_is_a_module(random_sam):
    deployed = RefinedSegmenter(Network(), Refiner(random_sam, CONFIG))
    names = set(deployed.state_dict())
    assert {"module.layer.weight"} < names
    assert any(name.startswith("sam.") for name in names)
    deployed.train()
    assert deployed.module.training
    assert not deployed.sam.training
    assert not deployed(pictures() / 255).requires_grad


def test_what_it_cannot_know(random_sam):
    with pytest.raises(ValueError, match="returns must be 'labels' or 'probs', got 'masks'"):
        RefinedSegmenter(Network(), Refiner(random_sam, CONFIG), "masks")
    deployed = RefinedSegmenter(Network(returns="dict"), Refiner(random_sam, CONFIG))
    with pytest.raises(ValueError, match="num_classes must be the number of classes, got None"):
        deployed(pictures() / 255)


@pytest.mark.slow
def test_it_loads_no_lightning():
    use = "import sys, lightning_samrefine; lightning_samrefine.RefinedSegmenter"
    code = f"{use}; print('lightning' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
