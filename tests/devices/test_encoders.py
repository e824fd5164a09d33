"""Image encoders on a simulated device: no mixed devices, no waits, the embeddings of the CPU."""

from __future__ import annotations

import copy

import pytest
import torch
from encoder_cases import randomize, vit
from simulated_device import SimulatedDevice

from lightning_samrefine.models.fast.encoder import FastImageEncoder
from lightning_samrefine.models.tiny import TinyImageEncoder
from lightning_samrefine.models.tiny_vit import TinyVitEncoder

ENCODERS = {
    "ViT, windows and global": (lambda: vit(window=5), (128, 128)),
    "ViT, global alone": (lambda: vit(window=0), (128, 128)),
    "ViT, part of its square": (lambda: vit(window=5), (96, 128)),
    "TinyViT": (lambda: randomize(TinyVitEncoder()), (192, 192)),
    "TinyViT, part of its square": (lambda: randomize(TinyVitEncoder()), (192, 112)),
    "tiny": (lambda: randomize(TinyImageEncoder()), (128, 128)),
}


@pytest.mark.parametrize("device_name", ["cuda", "mps"])
@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_computes_what_it_does_on_the_cpu(name, device_name):
    make, hw = ENCODERS[name]
    image = torch.randn(1, 3, *hw, generator=torch.Generator().manual_seed(1))
    module = make()
    expected = FastImageEncoder(copy.deepcopy(module))(image)
    with torch.no_grad(), SimulatedDevice(device_name) as device:
        encoder = FastImageEncoder(device.to_device(module))
        on_device = device.to_device(image)
        encoder(on_device)  # folds its batch norms
        device.waits.clear()
        found = encoder(on_device)
    assert found.device == device.device
    assert not device.waits
    torch.testing.assert_close(found.held, expected, rtol=1e-3, atol=1e-3)
