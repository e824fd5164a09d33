"""Resizing to a model's input."""

import pytest
import torch

from lightning_samrefine.models import transforms


@pytest.mark.parametrize("size", [(96, 70), (11, 260), (1, 1)])
def test_a_large_image_is_resized_some_rows_at_a_time_with_the_same_result(monkeypatch, size):
    image = torch.randint(0, 256, (3, 301, 203), generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.interpolate(
        image[None].float(), size, mode="bilinear", align_corners=False, antialias=True
    )
    monkeypatch.setattr(transforms, "_CPU_ROWS", 64)
    found = transforms.resize(image.to(torch.uint8), size, torch.device("cpu"))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
