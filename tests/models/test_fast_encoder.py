"""FastImageEncoder against the modules' own forward passes."""

import copy
import subprocess
import sys
from functools import partial

import pytest
import torch
from encoder_cases import randomize, vit
from segment_anything.modeling import ImageEncoderViT
from torch import nn

from lightning_samrefine.models.fast import attention as fast_attention
from lightning_samrefine.models.fast import encoder as fast_encoder
from lightning_samrefine.models.fast.encoder import FastImageEncoder
from lightning_samrefine.models.sam import SamPromptable
from lightning_samrefine.models.tiny import TinyImageEncoder, build_tiny_sam
from lightning_samrefine.models.tiny_vit import TinyVitEncoder

pytestmark = pytest.mark.numerical


def images(side: int, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1))


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    return float((actual - expected).norm() / expected.norm())


# 4 and 8 divide the grid of 8, 3 and 5 leave edges, 14 is wider than the grid.
@pytest.mark.parametrize("window", [3, 4, 5, 8, 14, 0])
@torch.no_grad()
def test_vit_equals_segment_anything(window):
    encoder, batch = vit(window), images(128, batch=2)
    expected = encoder(batch)
    assert relative_error(FastImageEncoder(encoder)(batch), expected) < 2e-6
    # The test would see an attention without its relative positions.
    for block in encoder.blocks:
        block.attn.use_rel_pos = False
    assert relative_error(encoder(batch), expected) > 1e-2


@pytest.mark.parametrize("scores", [1, 3 * 8 * 64, 2**22])
@pytest.mark.parametrize("threads", [1, 2])
@torch.no_grad()
def test_slices_of_the_global_attention_do_not_matter(monkeypatch, scores, threads):
    """Slices of 1, 3 (which leaves 2) and 8 rows; 1 and 2 of 3 heads at a time."""
    monkeypatch.setattr(fast_attention, "_CPU_SCORES", scores)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    encoder, batch = vit(window=5), images(128, batch=2)
    assert relative_error(FastImageEncoder(encoder)(batch), encoder(batch)) < 2e-6


@pytest.mark.parametrize(
    "options",
    [
        {"use_rel_pos": False},
        {"use_abs_pos": False},
        {"qkv_bias": False},
        {"act_layer": nn.ReLU},
        {"act_layer": partial(nn.GELU, approximate="tanh")},
    ],
    ids=str,
)
@torch.no_grad()
def test_vit_options(options):
    encoder, batch = vit(window=5, **options), images(128)
    assert relative_error(FastImageEncoder(encoder)(batch), encoder(batch)) < 2e-6


@torch.no_grad()
def test_the_input_and_the_weights_stay_as_they_were():
    for encoder, side in ((vit(window=5), 128), (randomize(TinyImageEncoder()), 256)):
        batch = images(side)
        before, weights = batch.clone(), copy.deepcopy(encoder.state_dict())
        fast = FastImageEncoder(encoder)
        first = fast(batch)
        assert torch.equal(fast(batch), first)
        assert torch.equal(batch, before)
        after = encoder.state_dict()
        assert list(after) == list(weights)
        assert all(torch.equal(after[key], weights[key]) for key in weights)
        assert all(after[key].stride() == weights[key].stride() for key in weights)


@torch.no_grad()
def test_vit_under_autocast_is_as_good_as_the_module_under_autocast():
    encoder, batch = vit(window=5), images(128)
    exact = encoder(batch)
    with torch.autocast("cpu", torch.bfloat16):
        mixed, reference = FastImageEncoder(encoder)(batch).float(), encoder(batch).float()
    assert relative_error(mixed, exact) <= 1.2 * relative_error(reference, exact)
    assert relative_error(mixed, exact) > 1e-4  # it did run in bf16


@torch.no_grad()
def test_tiny_vit_equals_its_module(monkeypatch):
    """At 192 pixels every kind of edge occurs: 24, 12 and 12 tokens in windows of 7 and 14."""
    encoder, batch = randomize(TinyVitEncoder()), images(192, batch=2)
    expected = encoder(batch)
    assert relative_error(FastImageEncoder(encoder)(batch), expected) < 1e-5
    monkeypatch.setattr(fast_encoder, "_CPU_ELEMENTS", 2 * 48 * 256 * 7)  # bands of 7 rows of 48
    assert relative_error(FastImageEncoder(encoder)(batch), expected) < 1e-5


@torch.no_grad()
def test_tiny_encoder_equals_its_module():
    encoder, batch = randomize(TinyImageEncoder()), images(256, batch=2)
    assert relative_error(FastImageEncoder(encoder)(batch), encoder(batch)) < 1e-5


@torch.no_grad()
def test_folded_weights_follow_the_module():
    encoder, batch = randomize(TinyImageEncoder()), images(256)
    fast = FastImageEncoder(encoder)
    first = fast(batch)
    folded = fast._folded
    fast(batch)
    assert fast._folded is folded
    encoder.load_state_dict(randomize(TinyImageEncoder(), seed=1).state_dict())
    assert relative_error(fast(batch), encoder(batch)) < 1e-5
    assert relative_error(first, encoder(batch)) > 0.1
    encoder.double()
    assert relative_error(fast(batch.double()), encoder(batch.double())) < 1e-12
    encoder.to("meta")
    assert fast(batch.double().to("meta")).device.type == "meta"


def test_weights_loaded_in_inference_mode_work():
    with torch.inference_mode():
        encoder, batch = randomize(TinyImageEncoder()), images(256)
        assert relative_error(FastImageEncoder(encoder)(batch), encoder(batch)) < 1e-5


class _Doubled(ImageEncoderViT):
    def forward(self, x):
        return 2 * super().forward(x)


@torch.no_grad()
def test_an_unknown_encoder_runs_as_it_is():
    encoder = randomize(_Doubled(img_size=64, embed_dim=16, depth=1, num_heads=2, out_chans=8))
    batch = images(64)
    assert torch.equal(FastImageEncoder(encoder)(batch), encoder(batch))


@torch.no_grad()
def test_embed_equals_the_module_for_images_of_several_sizes():
    module = build_tiny_sam()
    randomize(module.image_encoder)
    sam = SamPromptable(module, "tiny")
    generator = torch.Generator().manual_seed(0)
    batch = [
        torch.randint(0, 256, (3, h, w), dtype=torch.uint8, generator=generator)
        for h, w in ((40, 60), (300, 200), (256, 256))
    ]
    for image, embedding in zip(batch, sam.encode_images(batch), strict=True):
        assert embedding.shape == (1, 96, 32, 32)
        expected = module.image_encoder(sam._preprocess(image))
        assert relative_error(embedding, expected) < 1e-5


_PEAK = """
import sys, torch
from pathlib import Path
from segment_anything.modeling import ImageEncoderViT
from lightning_samrefine.models.fast.encoder import FastImageEncoder
torch.set_num_threads(1)
encoder = ImageEncoderViT(img_size=1024, embed_dim=64, depth=1, num_heads=4, out_chans=8,
    use_rel_pos=True, global_attn_indexes=(0,)).eval().requires_grad_(False)
encode = FastImageEncoder(encoder) if sys.argv[1] == "fast" else encoder
def peak():
    # Not ru_maxrss: a child takes over the peak of the process that started it.
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])
image = torch.zeros(1, 3, 1024, 1024)
before = peak()
with torch.no_grad():
    encode(image)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.slow
def test_global_attention_needs_a_fifth_of_the_modules_memory():
    """4 heads on SAM's 64×64 grid: the scores alone are 256 MiB, and the module adds to them."""
    peaks = {
        kind: int(
            subprocess.run(
                [sys.executable, "-c", _PEAK, kind], capture_output=True, text=True, check=True
            ).stdout
        )
        for kind in ("fast", "module")
    }
    assert peaks["module"] > 256 * 1024
    assert peaks["fast"] < 0.2 * peaks["module"]
