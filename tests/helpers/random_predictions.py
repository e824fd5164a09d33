"""Random images with predictions of them."""

from __future__ import annotations

import torch


def blobs(num_classes=4, size=(48, 60), seed=0):
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator)
    noise = torch.randn(1, num_classes, 5, 6, generator=generator) * 4
    logits = torch.nn.functional.interpolate(noise, size, mode="bilinear")[0]
    return image, logits.softmax(dim=0)


def noisy(classes=3, hw=(40, 48), seed=0):
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (3, *hw), dtype=torch.uint8, generator=generator)
    coarse = torch.randn(1, classes, 7, 8, generator=generator) * 4
    return image, torch.nn.functional.interpolate(coarse, hw, mode="bilinear")[0].softmax(dim=0)
