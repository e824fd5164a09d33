"""A closed class keeps its raw map, and single classes have thresholds of their own."""

import dataclasses
from itertools import combinations

import pytest
import torch
from random_predictions import blobs

from lightning_samrefine import RefineConfig, Refiner
from lightning_samrefine.refine.class_filter import check_classes, restore_frozen_classes
from lightning_samrefine.refine.raw_prediction import RawPrediction
from lightning_samrefine.refine.results import Refinement

pytestmark = pytest.mark.numerical

CLASSES = 4


def refine(sam, probs_and_image, labels=None, **fields):
    image, probs = probs_and_image
    fields = {"pred_iou_thresh": 0.4, **fields}
    return Refiner(sam, RefineConfig(**fields))(image, probs, labels)


def prediction(seed):
    image, probs = blobs(CLASSES, seed=seed)
    return image, probs


def equal(first, second):
    tensors = ("labels", "probs", "covered", "pred_iou", "boxes", "classes")
    return all(torch.equal(getattr(first, name), getattr(second, name)) for name in tensors)


@pytest.mark.parametrize("gate", [g for n in range(4) for g in combinations(range(CLASSES), n)])
def test_a_closed_class_keeps_its_map_to_the_pixel(random_sam, gate):
    changed = 0
    for seed in range(3):
        image, probs = prediction(seed)
        raw = probs.argmax(dim=0)
        free = refine(random_sam, (image, probs))
        out = refine(random_sam, (image, probs), classes=gate)
        for c in set(range(CLASSES)) - set(gate):
            assert torch.equal(out.labels == c, raw == c)
            if len(gate) == 3:
                changed += int((free.labels == c).ne(raw == c).sum())
        assert set(out.regions.classes.tolist()) <= set(gate)
        kept = out.probs.argmax(dim=0)
        assert torch.equal(kept[~out.covered], raw[~out.covered])
        if not gate:
            assert torch.equal(out.labels, raw)
            assert torch.equal(out.probs, probs)
            assert len(out.regions) == 0
    assert changed or len(gate) < 3, "nothing would have changed without the gate"


def test_with_all_classes_open_the_gate_does_nothing(random_sam):
    image, probs = prediction(1)
    labels = probs.argmax(dim=0)
    labels[5:20, 5:20] = 255
    free = refine(random_sam, (image, probs), labels)
    assert (free.labels != labels)[labels == 255].any(), "no unknown pixel was refined"
    assert equal(free, refine(random_sam, (image, probs), labels, classes=range(CLASSES)))


def test_without_a_refined_class_sam_is_not_run(random_sam, monkeypatch):
    monkeypatch.setattr(random_sam, "encode_images", lambda images: pytest.fail("SAM ran"))
    image, probs = prediction(0)
    assert torch.equal(refine(random_sam, (image, probs), classes=()).labels, probs.argmax(dim=0))


def test_any_fusion_is_gated():
    """The step looks at labels alone, so a fusion that moves every pixel is held back as well."""
    raw = torch.tensor([[0, 1, 2], [2, 1, 255]])
    new = torch.tensor([[1, 2, 0], [1, 0, 2]])
    probs = torch.full((3, 2, 3), 0.25)
    moved = Refinement(new, torch.ones(3, 2, 3), torch.ones(2, 3, dtype=torch.bool), *[None] * 4)
    before = RawPrediction(torch.zeros(3, 2, 3, dtype=torch.uint8), probs, raw)
    gated = restore_frozen_classes(moved, before, (1, 2))
    expected = torch.tensor([[0, 2, 2], [1, 1, 2]])
    assert torch.equal(gated.labels, expected)
    raw_again = torch.tensor([[1, 0, 1], [0, 1, 0]], dtype=torch.bool)
    assert torch.equal((gated.probs == 0.25).all(dim=0), raw_again)
    assert torch.equal(restore_frozen_classes(moved, before, None).labels, new)


def test_a_class_has_its_own_threshold(random_sam):
    image, probs = prediction(2)
    free = refine(random_sam, (image, probs), pred_iou_thresh=0.0).regions
    own = {int(c): float(free.pred_iou[free.classes == c].median()) for c in free.classes.unique()}
    out = refine(random_sam, (image, probs), pred_iou_thresh=1.0, class_pred_iou_thresh=own)
    limits = torch.tensor([own[int(c)] for c in out.regions.classes])
    assert torch.equal(out.regions.accepted, out.regions.pred_iou > limits)
    assert out.regions.accepted.any()
    same = dict.fromkeys(range(CLASSES), 0.45)
    assert equal(
        refine(random_sam, (image, probs), pred_iou_thresh=1.0, class_pred_iou_thresh=same),
        refine(random_sam, (image, probs), pred_iou_thresh=0.45),
    )


@pytest.mark.parametrize("field", [{"classes": (0, 4)}, {"class_pred_iou_thresh": {7: 0.5}}])
def test_a_class_that_does_not_exist_is_refused(random_sam, field):
    with pytest.raises(ValueError, match=r"must be classes below num_classes=4, got [47]"):
        refine(random_sam, prediction(0), **field)


@pytest.mark.parametrize(
    ("tuned_for", "num_classes", "names", "accepted"),
    [
        (None, 6, ["a", "b", "c", "d", "e", "f"], True),
        (["a", "b", "c", "d"], 6, None, False),
        (["a", "b", "c", "d"], 6, ["a", "b", "c", "d", "e", "f"], False),
        (["a", "b", "c", "d"], 6, ["a", "b", "c", "d"], False),  # a run without names takes these
        (["0", "1", "2", "3"], 6, None, False),
        (["a", "b", "c", "d"], 4, ["a", "b", "c", "d"], True),
        (["a", "b", "c", "d"], 4, None, True),
        (["0", "1", "2", "3"], 4, ["a", "b", "c", "d"], True),
        (["a", "b", "c", "d"], 4, ["a", "c", "b", "d"], False),
        (["a", "b", "c", "d"], 4, ["e", "f", "g", "h"], False),
    ],
)
def test_thresholds_tuned_for_other_classes_are_refused(tuned_for, num_classes, names, accepted):
    config = RefineConfig(class_names=tuned_for)
    if accepted:
        check_classes(config, num_classes, names)
        return
    own = names is not None and len(names) == num_classes
    run = ", ".join(names if own else map(str, range(num_classes)))
    expected = rf"tuned for the {num_classes} classes of this run \({run}\), got .* for 4 "
    with pytest.raises(ValueError, match=expected):
        check_classes(config, num_classes, names)


@pytest.mark.parametrize("names", ["abc", [1, 2], 3])
def test_class_names_of_thresholds_are_strings(names):
    with pytest.raises(TypeError, match=r"class_names must be strings .*, got"):
        RefineConfig(class_names=names)


def test_a_gate_leaves_other_fields_alone():
    config = RefineConfig.preset("default", classes=[2])
    assert dataclasses.asdict(config) == {
        **dataclasses.asdict(RefineConfig.preset("default")),
        "classes": (2,),
    }
