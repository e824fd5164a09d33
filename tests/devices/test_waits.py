"""What makes the CPU wait for a GPU, counted without one.

`ALLOWED` is the whole list: a ``.item()``, ``.tolist()``, boolean index or blocking copy anywhere
else on the way of an image fails here, and so does one more at a place of the list.
"""

from __future__ import annotations

import copy

import pytest
import torch
from encoder_cases import vit
from random_predictions import blobs
from simulated_device import MixedDevicesError, SimulatedDevice
from tiny_random_sam import build_random_sam, small_sam_around

from lightning_samrefine import RefineConfig, Refiner
from lightning_samrefine.adapters.batch_adapter import BatchAdapter, RefineInputs
from lightning_samrefine.callbacks.auto_refiner import AutoRefiner
from lightning_samrefine.callbacks.safe_refiner import SafeRefiner
from lightning_samrefine.fit.auto_fusion import AutoFusion
from lightning_samrefine.metrics.comparison import RefinementComparison
from lightning_samrefine.models.sam import SamPromptable

# Waits an image on CUDA, by kind and function.
SPLIT = ("event", "refine/regions.py finish")  # the working grid, the range of values
HASHED = ("event", "refine/cache/embedding_cache.py digests")  # the image, for its hash
PREDICTED = ("download", "refine/decode.py decode_prompts")  # SAM's predicted IoUs
GOOD = ("download", "refine/mask_proposals.py _best")  # the number of good masks of the point grid
DUPLICATES = ("download", "refine/mask_proposals.py _first_of_duplicates")
KEPT = (
    "event",
    "refine/cache/embedding_cache.py _store_pending",
)  # an embedding and mask proposals on their way into the cache
KEYS = ("event", "callbacks/auto_refiner.py _predict")  # the images, for their keys
SAMPLED = {("nonzero", "fit/sample.py add"): 1, ("event", "fit/sample.py add"): 1}
CHANGED = ("nonzero", "metrics/changes.py __init__")  # the changed pixels
BY_REGION = ("event", "metrics/changes.py by_region")
SCORED = ("event", "metrics/calibration.py score_regions")
FINITE = (
    "download",
    "callbacks/safe_refiner.py __call__",
)  # once a batch, as are the two ends of its clock
CLOCK = ("synchronize", "callbacks/safe_refiner.py __call__")

ALLOWED = {
    ("algorithm4", "no cache"): {SPLIT: 1, PREDICTED: 1},
    ("fast", "no cache"): {SPLIT: 1, PREDICTED: 1},
    ("default", "no cache"): {SPLIT: 1, PREDICTED: 1, GOOD: 1, DUPLICATES: 1},
    ("algorithm4", "first look"): {SPLIT: 1, HASHED: 1, PREDICTED: 1, KEPT: 1},
    ("fast", "first look"): {SPLIT: 1, HASHED: 1, PREDICTED: 1, KEPT: 1},
    ("default", "first look"): {SPLIT: 1, HASHED: 1, PREDICTED: 1, GOOD: 1, DUPLICATES: 1, KEPT: 1},
    ("algorithm4", "cached"): {SPLIT: 1, HASHED: 1, PREDICTED: 1},
    ("fast", "cached"): {SPLIT: 1, HASHED: 1, PREDICTED: 1},
    ("default", "cached"): {SPLIT: 1, HASHED: 1, PREDICTED: 1},
}
METRICS = {CHANGED: 1, BY_REGION: 1, SCORED: 1}
MOST = 6
# A batch, whatever its size: are the images within the range, and what kind are the scores?
READING = {
    ("download", "adapters/denormalize.py _bounds"): 1,
    ("download", "adapters/scores.py to_probs"): 1,
    ("item", "adapters/scores.py _is_binary"): 1,
    ("download", "adapters/scores.py refuse_unclear_sums"): 1,
}

CONFIGS = {
    "algorithm4": RefineConfig(),
    "fast": RefineConfig.preset("fast", min_region_area=1),
    "default": RefineConfig.preset("default", min_region_area=1),
}
HW = (60, 80)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def on(device, *tensors):
    return [device.to_device(tensor) for tensor in tensors]


def simulated_sam(device):
    return SamPromptable(device.to_device(build_random_sam()), "random")


@pytest.mark.parametrize(("preset", "look"), ALLOWED)
def test_an_image_waits_where_the_table_has_it(preset, look):
    with SimulatedDevice("cuda") as device:
        cache = None if look == "no cache" else "memory"
        refiner = Refiner(simulated_sam(device), CONFIGS[preset], "32", cache=cache)
        refiner(*on(device, *blobs(size=HW)))  # the weights are hashed and the sides made
        inputs = on(device, *blobs(size=HW, seed=1))
        if look == "cached":
            refiner(*inputs)
        device.waits.clear()
        out = refiner(*inputs)
    assert len(out.regions) > 5
    assert dict(device.waits) == ALLOWED[preset, look]
    assert sum(device.waits.values()) <= MOST


@pytest.mark.parametrize("look", ["no cache", "first look", "cached"])
def test_an_image_without_padding_waits_no_more(look):
    module = small_sam_around(vit(window=3, out_chans=32), 128, 16, 32)
    image, probs = blobs(size=HW)
    expected = Refiner(SamPromptable(copy.deepcopy(module), "vit"), CONFIGS["fast"], "32")(
        image, probs
    )
    with SimulatedDevice("cuda") as device:
        sam = SamPromptable(device.to_device(module), "vit")
        cache = None if look == "no cache" else "memory"
        refiner = Refiner(sam, CONFIGS["fast"], "32", cache=cache)
        refiner(*on(device, *blobs(size=HW[::-1], seed=1)))
        inputs = on(device, image, probs)
        if look == "cached":
            refiner(*inputs)
        device.waits.clear()
        out = refiner(*inputs)
    assert dict(device.waits) == ALLOWED["fast", look]
    assert (out.labels.held == expected.labels).float().mean() > 0.999


@pytest.mark.parametrize("preset", CONFIGS)
def test_more_regions_and_images_wait_no_more(preset):
    """Prompts of a batch are decoded together; the CPU waits for no single region."""
    with SimulatedDevice("cuda") as device:
        refiner = Refiner(simulated_sam(device), CONFIGS[preset], "32")
        counts = []
        for grain in (1, 4):  # few regions, then many
            image, probs = blobs(num_classes=4, size=(64, 64))
            noise = torch.rand(4, 64 // 8 * grain, 64 // 8 * grain, generator=torch.Generator())
            probs = torch.nn.functional.interpolate(noise[None] * 9, (64, 64))[0].softmax(dim=0)
            device.waits.clear()
            (out,) = refiner.refine_batch(*([tensor] for tensor in on(device, image, probs)))
            counts.append((len(out.regions), sum(device.waits.values())))
        (few, waits), (many, other_waits) = counts
        assert many > 3 * few
        assert waits == other_waits

        device.waits.clear()
        scenes = [on(device, *blobs(size=HW, seed=seed)) for seed in range(3)]
        refiner.refine_batch(*map(list, zip(*scenes, strict=True)))
        assert device.waits[PREDICTED] == 1


def test_closed_classes_and_labels_wait_no_more():
    config = RefineConfig.preset("fast", min_region_area=1, classes=(0, 2))
    with SimulatedDevice("cuda") as device:
        refiner = Refiner(simulated_sam(device), config, "32")
        image, probs = blobs(size=HW)
        labels = probs.argmax(0)
        labels[:9] = 255
        refiner(*on(device, image, probs, labels))
        assert sum(device.waits.values()) <= MOST


def test_metrics_wait_where_the_table_has_it():
    with SimulatedDevice("cuda") as device:
        refiner = Refiner(simulated_sam(device), CONFIGS["fast"], "32")
        comparison = RefinementComparison(4, 255).to(device.device)
        image, probs = blobs(size=HW)
        target = torch.roll(probs.argmax(0), 1, 0)
        target[:5] = 255
        image, probs, target = on(device, image, probs, target)
        out = refiner(image, probs)
        device.waits.clear()
        comparison.update(probs.argmax(0), out.labels, target, out.regions)
        waits = dict(device.waits)
        on_device = comparison.compute()
    assert waits == METRICS

    refiner = Refiner(SamPromptable(build_random_sam(), "random"), CONFIGS["fast"], "32")
    comparison = RefinementComparison(4, 255)
    image, probs, target = image.held, probs.held, target.held
    out = refiner(image, probs)
    comparison.update(probs.argmax(0), out.labels, target, out.regions)
    assert comparison.compute() == pytest.approx(on_device, nan_ok=True, abs=1e-6)


@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_reading_a_batch_waits_where_the_table_has_it(name):
    with SimulatedDevice(name) as device:
        adapter = BatchAdapter(4)
        for first in (0, 4):  # the first batch settles what is where
            images, probs = zip(*(blobs(size=HW, seed=first + i) for i in range(4)), strict=True)
            batch = {"image": torch.stack(images) / 255, "mask": torch.stack(probs).argmax(1)}
            batch = {key: device.to_device(value) for key, value in batch.items()}
            logits = device.to_device(torch.stack(probs).log())
            device.waits.clear()
            inputs = adapter(batch, {"logits": logits})
        assert inputs.probs.device == inputs.targets.device == device.device
    assert dict(device.waits) == READING


@pytest.mark.parametrize("name", ["cuda", "mps"])
@pytest.mark.parametrize("preset", CONFIGS)
def test_no_tensor_of_the_cpu_meets_one_of_the_device(name, preset):
    """And the device computes what the CPU does."""
    image, probs = blobs(size=HW)
    expected = Refiner(SamPromptable(build_random_sam(), "random"), CONFIGS[preset], "32")(
        image, probs
    )
    with SimulatedDevice(name) as device:
        refiner = Refiner(simulated_sam(device), CONFIGS[preset], "32", cache="memory")
        for _ in range(2):  # computed, then cached
            out = refiner(*on(device, image, probs))
            assert out.labels.device == out.probs.device == device.device
            assert out.regions.boxes.device.type == "cpu"
    assert torch.equal(out.regions.accepted, expected.regions.accepted)
    assert (out.labels.held == expected.labels).float().mean() > 0.999


@pytest.mark.parametrize("points", [True, False])
@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_points_alone_and_one_pixel(name, points):
    config = RefineConfig.preset("default", prompt_regions=not points, min_region_area=1)
    with SimulatedDevice(name) as device:
        refiner = Refiner(simulated_sam(device), config, "32")
        refiner(*on(device, *blobs(size=HW)))
        refiner(*on(device, *blobs(size=(1, 1))))


def test_a_batch_is_checked_in_one_wait():
    with SimulatedDevice("cuda") as device:
        refiner = Refiner(simulated_sam(device), CONFIGS["fast"], "32")
        scenes = [on(device, *blobs(size=HW, seed=seed)) for seed in range(3)]
        images, probs = map(list, zip(*scenes, strict=True))
        labels = [own.argmax(0) for own in probs]
        safe = SafeRefiner(
            lambda inputs: refiner.refine_batch(inputs.images, inputs.probs, inputs.labels),
            device.device,
            lambda kind, reason: pytest.fail(reason),
        )
        device.waits.clear()
        outs, _ = safe(RefineInputs(images, probs, labels, None))
        assert all(out is not None for out in outs)
        assert device.waits[FINITE] == 1
        assert device.waits[CLOCK] == 2


@pytest.mark.parametrize("cache", ["memory", None])
@pytest.mark.parametrize("samples", [True, False])
def test_a_fitted_image_waits_where_the_table_has_it(samples, cache):
    with SimulatedDevice("cuda") as device:
        config = RefineConfig.preset("auto", min_region_area=1)
        auto = AutoRefiner(
            Refiner(simulated_sam(device), config, "32", cache), AutoFusion(tuple("abcd")), 255
        )
        auto.start(samples)
        for seed in (0, 1):
            image, probs = on(device, *blobs(size=HW, seed=seed))
            labels = probs.argmax(0)
            target = torch.roll(labels, 1, 0)
            device.waits.clear()
            (out,) = auto(RefineInputs([image], [probs], [labels], [target]))
    assert out.control is not None
    assert dict(device.waits) == {
        SPLIT: 1,
        PREDICTED: 1,
        **({KEYS: 1} if cache is None else {HASHED: 1, KEPT: 1}),  # once a batch
        **(SAMPLED if samples else {}),
    }
    assert sum(device.waits.values()) <= MOST


class TestTheSimulation:
    """It has to notice what a device would refuse, and what the CPU would wait for."""

    @pytest.fixture(params=["cuda", "mps"])
    def device(self, request):
        with SimulatedDevice(request.param) as device:
            yield device

    def test_mixed_devices_are_refused(self, device):
        x = device.to_device(torch.ones(3))
        with pytest.raises(MixedDevicesError):
            x + torch.ones(3)
        assert float((x + 1).sum()) == 6

    def test_mps_has_no_float64(self):
        with SimulatedDevice("mps") as device, pytest.raises(MixedDevicesError):
            torch.ones(3, dtype=torch.float64).to(device.device)

    @pytest.mark.parametrize(
        "wait",
        [
            lambda x: x.nonzero(),
            lambda x: x[x > 0],
            lambda x: x.sum().item(),
            lambda x: x.tolist(),
            lambda x: x.cpu(),
            lambda x: bool((x > 0).any()),
            lambda x: torch.bincount(x.long()),
            lambda x: torch.ones(4).to(x.device),
            lambda x: x.masked_select(x > 0),
        ],
    )
    def test_every_wait_is_counted(self, device, wait):
        x = device.to_device(torch.arange(4.0))
        device.waits.clear()
        wait(x)
        assert sum(device.waits.values()) >= 1

    def test_arithmetic_waits_for_nothing(self, device):
        x = device.to_device(torch.arange(4.0))
        y = torch.zeros(4, device=device.device)
        y += x * 2
        y[1:] = 0
        y[x > 2] = 1
        torch.where(x > 1, x, y).sum()
        assert not device.waits
        assert y.held.tolist() == [0, 0, 0, 1]
