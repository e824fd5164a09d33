"""What differs on other GPUs than the one at hand: memory, the clock, missing kernels, bf16."""

from __future__ import annotations

import pytest
import torch
from random_predictions import blobs
from simulated_device import SimulatedDevice
from tiny_random_sam import build_random_sam
from torch.torch_version import TorchVersion

from lightning_samrefine import RefineConfig, Refiner
from lightning_samrefine.adapters.batch_adapter import RefineInputs
from lightning_samrefine.callbacks.safe_refiner import SafeRefiner
from lightning_samrefine.models import transforms as frames
from lightning_samrefine.models.sam import SamPromptable
from lightning_samrefine.refine.decode import prompts_at_once
from lightning_samrefine.utils import memory as memory_module
from lightning_samrefine.utils.memory import ChunkSize, is_out_of_memory
from lightning_samrefine.utils.precision import autocast_dtype


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
        "GET was unable to find an engine to execute this computation",
        "FIND was unable to find an engine to execute this computation",
        "MPS backend out of memory (MPS allocated: 18.00 GB, max allowed: 18.13 GB)",
        "Invalid buffer size: 24.00 GB",
    ],
)
def test_errors_of_full_gpus_halve_the_chunk(message):
    assert is_out_of_memory(RuntimeError(message))
    chunks = []

    def process(start, stop):
        chunks.append(stop - start)
        if stop - start > 2:
            raise RuntimeError(message)
        return stop

    assert [stop for _, stop, _ in ChunkSize().run(5, 8, process)] == [2, 4, 5]
    assert chunks == [5, 2, 2, 1]


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_running_out_of_memory_releases_what_the_allocator_keeps(device, monkeypatch):
    released = []
    monkeypatch.setattr(memory_module.torch.cuda, "is_initialized", lambda: device == "cuda")
    monkeypatch.setattr(memory_module.torch.backends.mps, "is_available", lambda: device == "mps")
    monkeypatch.setattr(memory_module.torch.cuda, "empty_cache", lambda: released.append("cuda"))
    monkeypatch.setattr(memory_module.torch.mps, "empty_cache", lambda: released.append("mps"))

    def process(start, stop):
        if stop - start > 1:
            raise MemoryError
        return stop

    list(ChunkSize().run(2, 2, process))
    assert released == [device]


def test_what_training_left_in_the_allocator_does_not_shrink_batches_of_prompts(monkeypatch):
    # The driver has 2 GB left of 80, for torch keeps the rest for later.
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (2 * 10**9, 80 * 10**9))
    assert prompts_at_once(torch.device("cuda")) == 32


@pytest.mark.parametrize(("version", "where"), [("2.6.0", "cpu"), ("2.7.0", "mps")])
def test_old_versions_resize_for_mps_on_the_cpu(version, where, monkeypatch):
    found, interpolate = [], frames.F.interpolate

    def recorded(image, *args, **kwargs):
        found.append(image.device.type)
        return interpolate(image, *args, **kwargs)

    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    monkeypatch.setattr(frames.F, "interpolate", recorded)
    image = torch.randint(0, 256, (3, 30, 40), dtype=torch.uint8)
    expected = interpolate(
        image[None].float(), (48, 64), mode="bilinear", align_corners=False, antialias=True
    )
    with SimulatedDevice("mps") as simulated:
        resized = frames.resize(image, (48, 64), simulated.device)
        assert resized.device.type == "mps"
        assert found == [where]
        assert torch.equal(resized.cpu(), expected)


def test_the_clock_waits_for_mps():
    image, probs = blobs()
    with torch.no_grad(), SimulatedDevice("mps") as simulated:
        sam = SamPromptable(simulated.to_device(build_random_sam()), "random")
        image, probs = simulated.to_device(image), simulated.to_device(probs)
        inputs = RefineInputs([image], [probs], [probs.argmax(dim=0)], None)
        refiner = Refiner(sam, RefineConfig())
        safe = SafeRefiner(
            lambda given: refiner.refine_batch(given.images, given.probs, given.labels),
            simulated.device,
            lambda kind, reason: None,
        )
        safe(inputs)
        assert simulated.waits["synchronize", "callbacks/safe_refiner.py __call__"] == 2


def test_bf16_is_decided_by_the_device_given(monkeypatch):
    # Two cards: the current one computes in bf16, the other does not.
    capabilities = {0: (9, 0), 1: (7, 5)}
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device: capabilities[device.index]
    )
    assert autocast_dtype("auto", torch.device("cuda:0")) is torch.bfloat16
    assert autocast_dtype("auto", torch.device("cuda:1")) is torch.float16
