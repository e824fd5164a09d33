"""docs/reading.md: every error that it quotes is the error of its situation."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_samrefine.adapters.batch_adapter import BatchAdapter
from lightning_samrefine.adapters.candidates import Found, after_step
from lightning_samrefine.adapters.forward_hooks import ScoresCapture
from lightning_samrefine.adapters.network_view import NetworkCall
from lightning_samrefine.adapters.target_values import TargetCheck

PAGE = Path(__file__).parents[2] / "docs" / "reading.md"
B, C, H, W = 2, 4, 16, 24
IMAGE = torch.zeros(B, 3, H, W, dtype=torch.uint8)
TARGET = torch.arange(H * W).reshape(1, H, W).repeat(B, 1, 1) % C
NOISE = torch.randint(0, 256, (B, 3, H, W), dtype=torch.uint8)
PADDED = NOISE.clone()
PADDED[:, :, 9:] = 0
LEFT = torch.ones(B, H, W)
LEFT[..., 9:] = 0
VALID = (TARGET > 0).long()
LOGITS = nn.functional.one_hot(TARGET, C).permute(0, 3, 1, 2) * 3.0 - 1
OTHER = LOGITS.roll(1, dims=1)
SAMPLE = {"image": IMAGE, "mask": TARGET}
LOSS = torch.tensor(0.5)


def seen_of(module: nn.Module, calls: int) -> tuple[Any, str]:
    """Return what a hook reports of a module whose child or self is called so often."""
    capture = ScoresCapture(module, C)
    capture.arm()
    for _ in range(calls):
        module(torch.rand(B, 3, H, W))
    return capture.take()


class Scripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.jit.script(nn.Conv2d(3, C, 1))


QUERIES = {
    "class_queries_logits": torch.randn(B, C, C + 1),
    "masks_queries_logits": torch.randn(B, C, 4, 6),
}
# Batch, outputs and captured scores of every row, in the order of the page.
SITUATIONS = [
    lambda: ({"image": IMAGE, "img": IMAGE + 1, "mask": TARGET}, LOGITS),
    lambda: ({"a": SAMPLE, "b": {"image": IMAGE + 1, "mask": VALID}}, LOGITS),
    lambda: ({"image": IMAGE, "label": TARGET, "mask": VALID}, LOGITS),
    lambda: ((IMAGE, VALID, TARGET), LOGITS),
    lambda: (SAMPLE, {"pred": OTHER, "output": LOGITS}),
    lambda: (SAMPLE, OTHER, LOGITS),
    lambda: (SAMPLE, {"loss": LOSS, "final": OTHER.argmax(dim=1)}, LOGITS),
    lambda: (SAMPLE, LOSS, LOGITS, "", None, (), [Found("self.ema(…)", (), OTHER)]),
    lambda: (SAMPLE, LOSS, LOGITS, "", None, (), [Found("self(…)", (), OTHER.argmax(dim=1))]),
    lambda: (SAMPLE, None, *seen_of(nn.Sequential(nn.Conv2d(3, C, 1)), 2)),
    lambda: (SAMPLE, None, *seen_of(Scripted(), 0)),
    lambda: (
        {"image": NOISE, "mask": TARGET % 3},
        None,
        NOISE / 60 - 2,
        "",
        None,
        [NetworkCall(NOISE / 60 - 2, [[NOISE]])],
    ),
    lambda: (SAMPLE, QUERIES),
    lambda: (
        {"image": torch.zeros(B, 3, 100, 130, dtype=torch.uint8), "mask": torch.zeros(B, 100, 130)},
        {"logits": torch.randn(B, C, 32, 40)},
    ),
    lambda: (
        {"image": NOISE, "mask": TARGET},
        None,
        LOGITS,
        "scores from forward",
        None,
        [NetworkCall(LOGITS, [[NOISE.flip(-1).float()]])],
    ),
    lambda: (SAMPLE, {"logits": LOGITS[..., :8, :12], "target": TARGET[:, :8, :12]}),
    lambda: (SAMPLE, {"logits": LOGITS, "target": TARGET.clamp(max=2)}),
    lambda: ({**SAMPLE, "orig_size": torch.tensor([[9, 9], [9, 9]])}, LOGITS),
    lambda: (
        {**SAMPLE, "image": PADDED, "size": torch.tensor([[9, W]] * B), "pixel_mask": LEFT},
        LOGITS,
    ),
    lambda: ({**SAMPLE, "pixel_mask": VALID}, LOGITS),
    lambda: ({"image": IMAGE, "mask": ((LOGITS + OTHER) > -1).long()}, LOGITS),
    lambda: (SAMPLE, {"pred": LOGITS.clamp(min=0)}),
    lambda: (SAMPLE, {"pred": (LOGITS + OTHER > -1).float()}),
    lambda: (SAMPLE, {"pred": LOGITS.sigmoid()}),
    lambda: (SAMPLE, {"pred": 2 * LOGITS.softmax(dim=1)}),
    lambda: ({"image": IMAGE}, LOGITS),
]


def read(batch: Any, outputs: Any, *others: Any) -> None:
    target = BatchAdapter(C).read(batch, outputs, *others).roles.target
    TargetCheck(C, "auto").against(target, after_step(target, batch, outputs))


def quoted() -> list[str]:
    rows = re.findall(r"^\|[^|]+\| `([^|]+)` \|", PAGE.read_text(), flags=re.MULTILINE)
    assert len(rows) > 10
    return rows


@pytest.mark.parametrize("row", range(len(SITUATIONS)))
def test_errors_are_those_that_are_quoted(row):
    pattern = ".*".join(map(re.escape, re.split(r" ?… ?(?!')", quoted()[row])))
    with pytest.raises(ValueError, match=pattern):
        read(*SITUATIONS[row]())


def test_every_row_is_tried():
    assert len(quoted()) == len(SITUATIONS)


def test_readme_links_the_page():
    assert "(docs/reading.md)" in (PAGE.parents[1] / "README.md").read_text()
