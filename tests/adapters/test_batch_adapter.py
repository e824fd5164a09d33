"""Every shape of batch and step output that users have, and errors that say what was there."""

from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass

import pytest
import torch

from lightning_samrefine.adapters.batch_adapter import BatchAdapter, RefineInputs
from lightning_samrefine.adapters.denormalize import Denormalize
from lightning_samrefine.adapters.target_values import to_labels

B, C, H, W = 2, 4, 6, 8
GENERATOR = torch.Generator().manual_seed(0)
IMAGE = torch.randint(0, 256, (B, 3, H, W), generator=GENERATOR, dtype=torch.uint8)
TARGET = torch.randint(0, C, (B, H, W), generator=GENERATOR)
LOGITS = torch.randn(B, C, H, W, generator=GENERATOR)
LOSS = torch.tensor(0.5)

Pair = namedtuple("Pair", "image mask")


@dataclass
class Sample:
    image: torch.Tensor
    mask: torch.Tensor


@pytest.fixture
def adapter() -> BatchAdapter:
    return BatchAdapter(C)


def assert_found(inputs: RefineInputs) -> None:
    assert torch.equal(inputs.images, IMAGE)
    assert torch.equal(inputs.targets, TARGET)
    torch.testing.assert_close(inputs.probs, LOGITS.softmax(dim=1))
    assert torch.equal(inputs.labels, LOGITS.argmax(dim=1))


@pytest.mark.parametrize(
    "batch",
    [
        (IMAGE, TARGET),
        [IMAGE, TARGET],
        (IMAGE, TARGET, ["a.png", "b.png"]),
        (IMAGE, TARGET[:, None]),
        {"image": IMAGE, "mask": TARGET},
        {"Image": IMAGE, "Mask": TARGET},
        {"img": IMAGE, "gt": TARGET, "name": ["a", "b"]},
        {"pixel_values": IMAGE, "labels": TARGET},
        {"input": IMAGE, "label": torch.tensor([1, 3]), "seg": TARGET},
        {"x": IMAGE, "y": TARGET.to(torch.uint8)},
        {"x": IMAGE, "y": TARGET.to(torch.uint16)},
        {"x": IMAGE, "y": TARGET.float()},
        {"data": {"image": IMAGE, "mask": TARGET}, "meta": {"id": torch.tensor([1, 2])}},
        ({"image": IMAGE}, {"mask": TARGET}),
        ({"image": IMAGE}, TARGET),
        (IMAGE, {"semantic": TARGET}),
        Pair(IMAGE, TARGET),
        Sample(IMAGE, TARGET),
        UserDict(pixel_values=IMAGE, labels=TARGET),
    ],
    ids=lambda batch: type(batch).__name__,
)
def test_batches(adapter, batch):
    assert_found(adapter(batch, LOGITS))


@pytest.mark.parametrize(
    "outputs",
    [
        LOGITS,
        {"loss": LOSS, "logits": LOGITS},
        {"loss": LOSS, "preds": LOGITS},
        {"loss": LOSS, "probs": LOGITS.softmax(dim=1)},
        {"out": LOGITS, "aux": LOGITS + 1},
        OrderedDict(out=LOGITS),
        {"loss": LOSS, "anything": LOGITS},
        {"loss": LOSS, "out": {"logits": LOGITS}},
        {"preds": LOGITS.argmax(dim=1), "logits": LOGITS},
        (LOSS, LOGITS),
        (LOSS, LOGITS, TARGET),
    ],
    ids=str,
)
def test_outputs(adapter, outputs):
    assert_found(adapter((IMAGE, TARGET), outputs))


@pytest.mark.parametrize("outputs", [None, LOSS, {"loss": LOSS}, {"tp": TARGET[:, 0, 0]}])
def test_captured_scores_stand_in_for_outputs_without_any(adapter, outputs):
    assert_found(adapter((IMAGE, TARGET), outputs, LOGITS))


def test_named_outputs_win_over_captured_and_captured_over_the_batch(adapter):
    batch = {"image": IMAGE, "mask": TARGET, "logits": LOGITS - 3 * LOGITS}
    assert_found(adapter(batch, {"logits": LOGITS}, -LOGITS))
    assert_found(adapter(batch, None, LOGITS))
    batch["logits"] = LOGITS
    assert_found(adapter(batch, None))


def test_a_predicted_mask_in_the_outputs_is_not_taken_for_the_target(adapter):
    outputs = {"logits": LOGITS, "mask": LOGITS.argmax(dim=1), "labels": LOGITS.argmax(dim=1)}
    assert_found(adapter((IMAGE, TARGET), outputs))
    with pytest.raises(ValueError, match="No target found"):
        adapter({"image": IMAGE}, outputs)


def test_target_and_image_may_come_from_the_step(adapter):
    assert_found(adapter([], {"image": IMAGE, "target": TARGET, "preds": LOGITS}))


def test_label_maps_as_predictions(adapter):
    labels = LOGITS.argmax(dim=1)
    for outputs in (labels, {"preds": labels}, {"prediction": labels[:, None].to(torch.uint8)}):
        inputs = adapter((IMAGE, TARGET), outputs)
        assert torch.equal(inputs.labels, labels)
        assert torch.equal(inputs.probs.argmax(dim=1), labels)


def test_binary_models():
    adapter = BatchAdapter(2)
    target = (TARGET > 1).long()
    logits = LOGITS[:, :1]
    for batch in ((IMAGE, target), (IMAGE, target[:, None].float()), (IMAGE, target.bool())):
        for outputs in (logits, {"logits": logits[:, 0]}, {"loss": LOSS, "seen": logits}):
            inputs = adapter(batch, outputs)
            torch.testing.assert_close(inputs.probs[:, 1], logits[:, 0].sigmoid())
            assert torch.equal(inputs.targets, target)


def test_keys_can_be_named():
    adapter = BatchAdapter(
        C, image_key="inner.rgb", target_key="2", scores_key="teacher.0", scores_kind="logits"
    )
    with pytest.raises(ValueError, match="No target under target_key='2' found"):
        adapter({"inner": {"rgb": IMAGE}}, {"teacher": [LOGITS]})
    adapter = BatchAdapter(C, image_key="0.rgb", target_key="2", scores_key="teacher.1")
    outputs = {"logits": -LOGITS, "teacher": (LOSS, LOGITS)}
    assert_found(adapter(({"rgb": IMAGE, "image": 255 - IMAGE}, LOSS, TARGET), outputs))


def test_scores_key_reaches_the_batch():
    adapter = BatchAdapter(C, scores_key="stored")
    assert_found(adapter({"image": IMAGE, "mask": TARGET, "stored": LOGITS}, -LOGITS))


def test_images_of_different_sizes_come_as_lists(adapter):
    sizes = [(4, 6), (8, 5)]
    images = [torch.zeros(3, h, w, dtype=torch.uint8) for h, w in sizes]
    targets = [torch.ones(h, w).long() for h, w in sizes]
    logits = [torch.randn(C, h // 2, -(-w // 2)) for h, w in sizes]
    for batch, outputs in (
        ((images, targets), {"logits": logits}),
        ({"image": images, "mask": [t[None] for t in targets]}, {"logits": tuple(logits)}),
    ):
        inputs = adapter(batch, outputs)
        assert len(inputs) == 2
        assert [tuple(p.shape) for p in inputs.probs] == [(C, h, w) for h, w in sizes]
        assert [tuple(t.shape) for t in inputs.targets] == sizes
        assert [tuple(label.shape) for label in inputs.labels] == sizes
        assert len(inputs.first(1)) == 1
    with pytest.raises(ValueError, match="equal numbers of samples, got 2, 1, 2"):
        adapter((images, targets), {"logits": logits[:1]})


@pytest.mark.parametrize(
    ("batch", "outputs", "missing", "listed"),
    [
        ({"picture": IMAGE, "mask": TARGET}, LOGITS, "No image", "'picture': uint8 (2, 3, 6, 8)"),
        ({"image": IMAGE}, LOGITS, "No target", "dict of {'image': uint8 (2, 3, 6, 8)}"),
        ((IMAGE, TARGET), {"loss": LOSS}, "No scores", "dict of {'loss': float32 scalar}"),
        ((IMAGE, TARGET), None, "No scores", "the step returned None"),
        ("text", None, "No image and target and scores", "The batch is str"),
    ],
)
def test_what_is_missing_is_named_with_what_was_there(adapter, batch, outputs, missing, listed):
    with pytest.raises(ValueError, match=missing) as error:
        adapter(batch, outputs)
    assert listed in str(error.value)
    assert "scores_key" in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_the_error_of_a_one_hot_target_explains_it(adapter, dtype):
    one_hot = torch.nn.functional.one_hot(TARGET, C).permute(0, 3, 1, 2).to(dtype)
    for batch in ((IMAGE, one_hot), {"image": IMAGE, "mask": one_hot}):
        with pytest.raises(ValueError, match=r"target must .*shape .*one-hot.*argmax.* over dim 1"):
            adapter(batch, LOGITS)


def test_a_target_is_optional_where_none_is_needed():
    assert BatchAdapter(C, needs_target=False)({"image": IMAGE}, LOGITS).targets is None


@pytest.mark.parametrize(
    ("batch", "outputs", "message"),
    [
        ((IMAGE, TARGET), LOGITS[:, :3], r"No scores"),
        (
            (IMAGE, TARGET),
            {"logits": LOGITS[:, :3]},
            r"scores must be .*, got shape \(2, 3, 6, 8\)",
        ),
        ((IMAGE, TARGET[:, :3]), LOGITS, r"target must be .*, got shape \(2, 3, 8\)"),
        ((IMAGE, LOGITS), LOGITS, r"target must be .*, got shape \(2, 4, 6, 8\).*one-hot"),
        ((IMAGE, TARGET / 3), LOGITS, r"target must be whole.*got torch.float32 with fractions"),
        (
            (IMAGE, TARGET * float("nan")),
            LOGITS,
            r"target must .*got torch.float32 .*NaN or infinity",
        ),
        (
            (IMAGE, TARGET.float() + float("inf")),
            LOGITS,
            r"target must .*, got .*NaN or infinity",
        ),
        ((IMAGE, TARGET), LOGITS[:1], r"scores must be of the image's 2 samples, got 1$"),
        (
            (IMAGE, TARGET),
            torch.cat([LOGITS, LOGITS.flip(-1)]),
            r"scores must be of the image's 2 samples, got 4: .*test-time augmentation.*'logits'",
        ),
        (
            (IMAGE[:, :2], TARGET),
            LOGITS,
            r"image must .* \(2, 2, 6, 8\).*two gray images",
        ),
        ((LOGITS, TARGET), LOGITS, r"image must be .*, got shape \(2, 4, 6, 8\).*adapter"),
        ((IMAGE / 64 - 2, TARGET), LOGITS, r"image must be .*, got values .* set image_mean"),
    ],
)
def test_what_does_not_fit_is_named(adapter, batch, outputs, message):
    with pytest.raises(ValueError, match=message):
        adapter(batch, outputs)


GRAY = IMAGE[:, :1]


@pytest.mark.parametrize(
    ("batch", "keys"),
    [
        ({"image1": IMAGE, "image2": IMAGE.flip(-1), "mask": TARGET}, ("image1", "image2")),
        ({"A": GRAY, "B": GRAY.flip(-1), "label": TARGET}, ("A", "B")),
        ({"before": {"t1": GRAY / 255, "t2": GRAY / 256}, "mask": TARGET}, ("before.t1",)),
    ],
)
def test_two_images_are_named_where_none_has_a_usual_name(adapter, batch, keys):
    with pytest.raises(ValueError, match=r"^No image found") as info:
        adapter(batch, LOGITS)
    for key in keys:
        assert f"image_key={key!r}" in str(info.value)
    with pytest.raises(ValueError, match=r"^No image found") as info:
        adapter({"mask": TARGET}, LOGITS)  # which has the shape of no image
    assert "image_key=" not in str(info.value)


@pytest.mark.parametrize(
    "batch",
    [
        (IMAGE[0], TARGET[0]),
        {"image": IMAGE[0] / 255, "mask": TARGET[0]},
        {"image": GRAY[0], "mask": TARGET[0], "name": "a"},
        {"image": IMAGE[0], "mask": TARGET[0][None]},
    ],
)
def test_a_sample_without_its_batch_dimension_is_recognized(adapter, batch):
    with pytest.raises(ValueError, match=r"batch dimension.*batch_size=None"):
        adapter(batch, LOGITS[:1])


def test_a_misfit_captured_from_the_network_is_named(adapter):
    with pytest.raises(ValueError, match=r"scores must .*num_classes=4, got .*\(2, 3, 6, 8\)"):
        adapter((IMAGE, TARGET), None, LOGITS[:, :3])


def test_normalization_is_undone():
    adapter = BatchAdapter(C, rgb=Denormalize(0.5, 0.25))
    assert_found(adapter(((IMAGE / 255 - 0.5) / 0.25, TARGET), LOGITS))


def test_scores_carry_no_gradient(adapter):
    assert not adapter((IMAGE, TARGET), LOGITS.clone().requires_grad_()).probs.requires_grad


@pytest.mark.parametrize(
    "found",
    [
        {"image": IMAGE, "target": TARGET, "logits": LOGITS},
        {"image": IMAGE / 255, "target": TARGET[:, None], "probs": LOGITS.softmax(dim=1)},
        RefineInputs(IMAGE, LOGITS.softmax(dim=1), LOGITS.argmax(dim=1), TARGET),
    ],
)
def test_a_custom_adapter_replaces_the_search(found):
    seen = []

    def function(batch, outputs, captured):
        seen.append((batch, outputs, captured))
        return found

    assert_found(BatchAdapter(C, function=function)("batch", "outputs", LOGITS))
    assert seen[0][:2] == ("batch", "outputs")
    assert seen[0][2] is LOGITS


def test_a_custom_adapter_may_return_label_maps():
    adapter = BatchAdapter(
        C, function=lambda *_: {"image": IMAGE, "target": TARGET, "labels": TARGET}
    )
    assert torch.equal(adapter(None, None).labels, TARGET)


@pytest.mark.parametrize(
    ("found", "error", "message"),
    [
        (None, TypeError, "adapter must return RefineInputs or a mapping .*, got None"),
        ({"image": IMAGE}, TypeError, "one of logits, probs and labels"),
        ({"image": IMAGE, "logits": LOGITS}, ValueError, "No target"),
        (
            {"image": IMAGE, "logits": LOGITS, "probs": LOGITS},
            TypeError,
            "adapter must .* got dict",
        ),
        (RefineInputs(IMAGE, LOGITS, TARGET, None), ValueError, "must return targets"),
        (
            RefineInputs(IMAGE, LOGITS[:, :3], TARGET, TARGET),
            ValueError,
            r"probs .* got \(3, 6, 8\)",
        ),
        (RefineInputs(IMAGE, LOGITS, TARGET, TARGET[:, 1:]), ValueError, r"target .*\(5, 8\)"),
        (
            RefineInputs(IMAGE, LOGITS, TARGET, torch.cat([TARGET, TARGET])),
            ValueError,
            "equal numbers of samples, got 2, 2, 2, 4",
        ),
        (RefineInputs(IMAGE, LOGITS[:1], TARGET, TARGET), ValueError, "samples, got 2, 1, 2, 2"),
    ],
)
def test_a_custom_adapter_that_returns_something_else_is_an_error(found, error, message):
    with pytest.raises(error, match=message):
        BatchAdapter(C, function=lambda *_: found)(None, None)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"scores_kind": "softmax"}, ValueError, "scores_kind must be one of .*, got 'softmax'"),
        ({"image_key": 0}, TypeError, "image_key must be a string .*, got 0 of type int"),
        ({"function": "module.adapter"}, TypeError, "adapter must be a callable .*, got str"),
    ],
)
def test_bad_arguments_name_themselves(arguments, error, message):
    with pytest.raises(error, match=message):
        BatchAdapter(C, **arguments)


def test_targets_keep_ignored_values():
    target = torch.tensor([[[0.0, 255.0, 1.0]]])
    assert to_labels(target, torch.zeros(1, 1, 3)).tolist() == [[[0, 255, 1]]]


def test_later_batches_are_read_from_the_places_of_the_first(adapter):
    first = adapter.read((IMAGE, TARGET), LOGITS, LOGITS)
    settled = first.roles.places()
    assert settled.scores.place == "outputs"
    later = adapter.read((IMAGE, TARGET), LOGITS, -LOGITS, settled=settled)
    assert_found(later.inputs)
    with pytest.raises(ValueError, match="No target found"):
        adapter.read((IMAGE,), LOGITS, settled=settled)
    hooked = adapter.read((IMAGE, TARGET), {"loss": LOSS}, LOGITS).roles.places()
    with pytest.raises(ValueError, match="No scores found"):
        adapter.read((IMAGE, TARGET), {"loss": LOSS, "anything": LOGITS}, settled=hooked)
