"""The refiner's contract beside the oracle: inputs, empties, precision, completion."""

from dataclasses import replace

import pytest
import torch
from random_predictions import blobs

from lightning_samrefine import RefineConfig, Refiner
from lightning_samrefine.config import PRESETS
from lightning_samrefine.refine import mask_predictor as predictor_module
from lightning_samrefine.refine import regions
from lightning_samrefine.utils.device import Download
from lightning_samrefine.utils.precision import autocast_dtype

pytestmark = pytest.mark.numerical


@pytest.fixture
def refiner(random_sam):
    return Refiner(random_sam, RefineConfig(), precision="32")


def bad_inputs():
    image, probs = blobs()
    labels = probs.argmax(dim=0)
    nan = probs.clone()
    nan[0, 0, 0] = float("nan")
    return {
        "numpy image": (
            (image.numpy(), probs),
            TypeError,
            "image must be a torch tensor, got ndarray",
        ),
        "float image": (
            (image.float(), probs),
            TypeError,
            "image must be .*uint8.*got torch.float32",
        ),
        "batched image": (
            (image[None], probs),
            ValueError,
            r"image must be of shape \(3, H, W\), got \(1, 3",
        ),
        "empty image": ((image[:, :0], probs[:, :0]), ValueError, "image must be of shape"),
        "integer probs": (
            (image, probs.long()),
            TypeError,
            "probs must be of a floating-point dtype, got torch.int64",
        ),
        "other size": ((image, probs[:, 1:]), ValueError, "probs must be of shape"),
        "no class": ((image, probs[:0]), ValueError, "probs must be of shape"),
        "logits": ((image, probs * 5 - 1), ValueError, "apply softmax"),
        "nan": ((image, nan), ValueError, "without NaN"),
        "float labels": (
            (image, probs, labels.float()),
            TypeError,
            "labels must be of an integer dtype",
        ),
        "labels of another size": (
            (image, probs, labels[1:]),
            ValueError,
            "labels must be of shape",
        ),
    }


@pytest.mark.parametrize("case", bad_inputs())
def test_bad_input_is_refused_before_sam_runs(refiner, case, monkeypatch):
    arguments, error, message = bad_inputs()[case]
    monkeypatch.setattr(refiner.sam, "encode_images", lambda images: pytest.fail("SAM ran"))
    with pytest.raises(error, match=message):
        refiner(*arguments)


def test_wrong_construction_is_refused(random_sam):
    with pytest.raises(
        TypeError, match="sam must be a Promptable such as load_sam returns, got Sam"
    ):
        Refiner(random_sam.module)
    with pytest.raises(TypeError, match="config must be a RefineConfig, got dict"):
        Refiner(random_sam, {"stride": 2})
    with pytest.raises(ValueError, match=r"precision must be one of 'auto', '32', .*, got 'bf16'"):
        Refiner(random_sam, precision="bf16")


def test_counts_of_a_batch_must_agree(refiner):
    image, probs = blobs()
    with pytest.raises(ValueError, match="must be equally many, got 1, 2 and None"):
        refiner.refine_batch([image], [probs, probs])


def test_an_image_without_regions_is_never_embedded(refiner, monkeypatch):
    image, probs = blobs()
    monkeypatch.setattr(refiner.sam, "encode_images", lambda images: pytest.fail("SAM ran"))
    unknown = torch.full(probs.shape[1:], 255)
    out = refiner(image, probs, unknown)
    assert torch.equal(out.labels, unknown)
    assert torch.equal(out.probs, probs)
    assert not out.covered.any()
    assert len(out.regions) == len(out.pred_iou) == 0
    assert out.boxes.shape == (0, 4)


def test_inputs_are_left_alone_and_nothing_requires_grad(refiner):
    image, probs = blobs()
    probs.requires_grad_()
    before = image.clone(), probs.detach().clone()
    out = refiner(image, probs)
    assert torch.equal(image, before[0])
    assert torch.equal(probs, before[1])
    assert not out.probs.requires_grad
    assert out.labels.dtype == torch.int64
    assert out.probs.dtype == out.pred_iou.dtype == out.boxes.dtype == torch.float32


def test_labels_come_from_probabilities_that_sum_to_1_where_refined_and_are_raw_elsewhere(refiner):
    image, probs = blobs()
    out = refiner(image, probs)
    assert out.covered.any()
    assert not out.covered.all()
    assert not torch.equal(out.literal_probs, out.probs)
    assert torch.equal(out.probs[:, ~out.covered], probs[:, ~out.covered])
    torch.testing.assert_close(out.probs.sum(0)[out.covered], torch.ones(int(out.covered.sum())))
    assert torch.equal(out.labels, out.probs.argmax(dim=0))


def test_regions_read_as_plain_python(refiner):
    image, probs = blobs()
    out = refiner(image, probs)
    region = out.regions[0]
    assert isinstance(region.accepted, bool)
    assert region.accepted == (region.pred_iou > refiner.config.pred_iou_thresh)
    x0, y0, x1, y1 = region.box
    assert x0 <= region.point[0] <= x1
    assert y0 <= region.point[1] <= y1
    assert sum(r.accepted for r in out.regions) == len(out.pred_iou) == len(out.classes)


def test_half_precision_and_small_integer_types_mean_the_same(refiner):
    image, probs = blobs()
    rounded = probs.bfloat16()
    labels = probs.argmax(dim=0)
    expected = refiner(image, rounded.float(), labels)
    got = refiner(image, rounded, labels.to(torch.uint8))
    assert torch.equal(got.labels, expected.labels)
    assert torch.equal(got.probs, expected.probs)
    assert got.labels.dtype == torch.int64


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("preset", sorted(PRESETS))
@pytest.mark.parametrize("where", ["one logit", "one pred_iou"])
def test_non_finite_outputs_are_an_error(random_sam, monkeypatch, preset, where, bad):
    image, probs = blobs()

    def spoil(answer):
        logits, pred_iou = (part.clone() for part in answer)
        if where == "one logit":
            logits[-1].view(-1)[0] = bad
        else:
            pred_iou.view(-1)[-1] = bad
        return logits, pred_iou

    predict = random_sam.predict_masks
    monkeypatch.setattr(
        random_sam, "predict_masks", lambda *args, **options: spoil(predict(*args, **options))
    )
    config = RefineConfig.preset(preset, min_region_area=1, score_thresh=0.0)
    refiner = Refiner(random_sam, config, "32", cache="memory")
    for _ in range(2):  # nor are they kept
        with pytest.raises(FloatingPointError, match="NaN or infinity, or a mask with such logits"):
            refiner(image, probs)


def test_auto_precision_is_bf16_only_where_the_cpu_has_it(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True}, raising=False)
    assert autocast_dtype("auto", cpu) is None
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    assert autocast_dtype("auto", cpu) is torch.bfloat16
    assert autocast_dtype("32", cpu) is None
    assert autocast_dtype("16-mixed", cpu) is torch.float16


@pytest.mark.parametrize(
    "config",
    [RefineConfig(), RefineConfig.preset("fast"), RefineConfig.preset("default")],
    ids=["algorithm4", "fast", "default"],
)
def test_bf16_changes_few_labels_and_a_surrounding_autocast_none(random_sam, config):
    image, probs = blobs(size=(60, 80))
    exact = Refiner(random_sam, config, precision="32")(image, probs)
    with torch.autocast("cpu", torch.bfloat16):
        surrounded = Refiner(random_sam, config, precision="32")(image, probs)
    assert torch.equal(surrounded.labels, exact.labels)
    assert torch.equal(surrounded.probs, exact.probs)
    mixed = Refiner(random_sam, config, precision="bf16-mixed")(image, probs)
    assert mixed.probs.dtype == torch.float32
    assert (mixed.labels != exact.labels).float().mean() < 0.1


# --- the order of the work on a GPU, played through on the CPU ---


@pytest.fixture
def events(refiner, monkeypatch):
    """What a batch of three makes happen, in order; the second image has no region."""
    happened = []

    class Recorded(Download):
        def __init__(self, *tensors):
            super().__init__(*tensors)
            self.number = sum(name == "enqueue" for name, _ in happened)
            happened.append(("enqueue", self.number))

        def wait(self):
            happened.append(("wait", self.number))
            return super().wait()

    def embed(images):
        happened.append(("embed", tuple(int(image[0, 0, 0]) for image in images)))
        return type(refiner.sam).encode_images(refiner.sam, images)

    monkeypatch.setattr(regions, "Download", Recorded)
    monkeypatch.setattr(refiner.sam, "encode_images", embed)
    return happened


def three(size=(48, 60)):
    images, probs = zip(*(blobs(size=size, seed=seed) for seed in range(3)), strict=True)
    for index, image in enumerate(images):
        image[0, 0, 0] = index
    labels = [p.argmax(dim=0) for p in probs]
    labels[1].fill_(255)
    return images, probs, labels


def test_on_a_gpu_an_image_is_split_while_the_one_before_is_encoded(refiner, events, monkeypatch):
    monkeypatch.setattr(predictor_module, "images_at_once", lambda device, count: 1)
    refiner.refine_batch(*three())
    assert events == [
        *(("enqueue", i) for i in range(3)),
        *[("wait", 0), ("embed", (0,))],
        ("wait", 1),  # and SAM does not see an image without a region
        *[("wait", 2), ("embed", (2,))],
    ]


def test_on_the_cpu_all_images_are_embedded_in_one_call(refiner, events):
    refiner.refine_batch(*three())
    assert events[:6] == [*(("enqueue", i) for i in range(3)), *(("wait", i) for i in range(3))]
    assert events[6:] == [("embed", (0, 2))]


@pytest.mark.parametrize(
    "config", [RefineConfig(), RefineConfig.preset("default")], ids=["algorithm4", "default"]
)
def test_the_order_of_the_work_changes_no_bit(random_sam, config, monkeypatch):
    config = replace(config, pred_iou_thresh=0.3, min_region_area=1)
    together = Refiner(random_sam, config, "32").refine_batch(*three())
    monkeypatch.setattr(predictor_module, "images_at_once", lambda device, count: 1)
    in_steps = Refiner(random_sam, config, "32").refine_batch(*three())
    for one, other in zip(together, in_steps, strict=True):
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.probs, other.probs)
        assert torch.equal(one.regions.pred_iou, other.regions.pred_iou)
    assert len(together[1].regions) == 0 < len(together[0].regions)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_download_waits_for_its_own_tensors_alone():
    source = torch.arange(10**6, device="cuda", dtype=torch.int32)
    download = Download(source, source.float())
    big = torch.randn(8192, 8192, device="cuda")
    for _ in range(50):
        big = big @ big
    end = torch.cuda.Event()
    end.record()
    integers, floats = download.wait()
    assert not end.query()
    assert integers.tolist() == floats.tolist() == list(range(10**6))


def test_an_image_is_refined_to_the_same_bits_in_any_batch(random_sam):
    """On a CPU, whatever its instructions: SAM takes one image at a time."""
    scenes = [blobs(seed=seed) for seed in range(3)]
    refiner = Refiner(random_sam, RefineConfig.preset("algorithm4", min_region_area=1))
    together = refiner.refine_batch(*map(list, zip(*scenes, strict=True)))
    assert any(len(out.regions) > 1 for out in together)
    for (image, probs), out in zip(scenes, together, strict=True):
        alone = refiner(image, probs)
        assert torch.equal(alone.labels, out.labels)
        assert torch.equal(alone.regions.pred_iou, out.regions.pred_iou)
        assert torch.equal(alone.probs, out.probs)
        assert torch.equal(alone.literal_probs, out.literal_probs)
