"""Which tensor of a user's run is the image, the target and the scores; what is ambiguous."""

from __future__ import annotations

import logging
from collections import UserDict
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import CombinedLoader
from lightning_stubs import HW, IGNORE, NUM_CLASSES, REFINE, SILENT, Blobs, DictBlobs, Segmenter
from torch import Tensor, nn
from torch.nn import functional as nnf
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassJaccardIndex

from lightning_samrefine import SAMRefineCallback
from lightning_samrefine.adapters.batch_adapter import BatchAdapter
from lightning_samrefine.adapters.denormalize import Denormalize
from lightning_samrefine.adapters.forward_hooks import ScoresCapture
from lightning_samrefine.adapters.sample_names import find_stems
from lightning_samrefine.adapters.scores import to_probs

B, C, H, W = 2, 4, 8, 12
GENERATOR = torch.Generator().manual_seed(0)
IMAGE = torch.randint(0, 256, (B, 3, H, W), generator=GENERATOR, dtype=torch.uint8)
OTHER_IMAGE = 255 - IMAGE
TARGET = torch.randint(0, C, (B, H, W), generator=GENERATOR)
VALID = (TARGET > 0).long()
LOGITS = torch.randn(B, C, H, W, generator=GENERATOR)
OTHER = torch.randn(B, C, H, W, generator=GENERATOR)
LOSS = torch.tensor(0.5)


@pytest.fixture
def adapter() -> BatchAdapter:
    return BatchAdapter(C)


class Binary(DictBlobs):
    """Class 0 against the others, with targets (1, H, W) in floats."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample = super().__getitem__(index)
        return {**sample, "mask": (sample["mask"] % IGNORE > 0).float()[None]}


class Step(Segmenter):
    """Returns what a function makes of batch, logits and loss."""

    def __init__(self, make: Any, channels: int = NUM_CLASSES) -> None:
        super().__init__(channels=channels)
        self.make = make

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        logits, target = self.logits_and_target(batch)
        return self.make(batch, logits, self.loss(logits, target.reshape(-1, *HW)))


class ImagesAlone(DictBlobs):
    """Samples without a target."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"image": super().__getitem__(index)["image"]}


class Silent(Segmenter):
    """Its validation step returns nothing."""

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self(batch["image"])


@dataclass(frozen=True)
class Frozen:
    image: Tensor


class Two(NamedTuple):
    image: Tensor
    other: int


def cloned(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Collate without sharing memory with the data set, so that a step may change the batch."""
    return {key: torch.stack([one[key] for one in samples]) for key in samples[0]}


def raw_miou(module: Segmenter, dataset: Blobs) -> float:
    """Compute the raw mIoU with torchmetrics."""
    binary = isinstance(dataset, Binary)
    metric = MulticlassJaccardIndex(2 if binary else NUM_CLASSES, ignore_index=IGNORE)
    module.eval()
    with torch.no_grad():
        logits = module.network(dataset.images / 255 - 0.5)
    targets = dataset.targets % IGNORE > 0 if binary else dataset.targets
    labels = logits[:, 0] > 0 if binary else logits.argmax(dim=1)
    return float(metric(labels.long(), targets.long()))


def validate(random_sam, module, loaders, **kwargs):
    arguments = {"num_classes": NUM_CLASSES, "refine": REFINE, "log": "all", **kwargs}
    callback = SAMRefineCallback(random_sam, **arguments)
    results = Trainer(**SILENT, callbacks=[callback]).validate(module, loaders, verbose=False)
    return {key: value for one in results for key, value in one.items()}


class TestBesideTheLoss:
    """What a step returns beside its loss is not taken for scores because of its shape."""

    @pytest.mark.parametrize(
        "make",
        [
            lambda batch, logits, loss: {"loss": loss, "mask": batch["mask"]},
            lambda batch, logits, loss: {"loss": loss, "truth": batch["mask"].clone()},
            lambda batch, logits, loss: (loss, batch["mask"]),
            lambda batch, logits, loss: {"loss": loss, "uncertainty": 1 - logits.sigmoid()},
            lambda batch, logits, loss: {"loss": loss, "u": logits.sigmoid() / 2},
            lambda batch, logits, loss: {"loss": loss, "loss_map": nnf.softplus(-logits)},
            lambda batch, logits, loss: {"loss": loss, "l": nnf.softplus(-logits)},
            lambda batch, logits, loss: {"loss": loss, "edges": logits - 1},
        ],
    )
    def test_binary(self, random_sam, make):
        module, dataset = Step(make, channels=1), Binary(4)
        logged = validate(random_sam, module, DataLoader(dataset, 2), num_classes=2)
        assert logged["val/miou_raw"] == pytest.approx(raw_miou(module, dataset), abs=1e-6)

    @pytest.mark.parametrize(
        "make",
        [
            lambda batch, logits, loss: {"loss": loss, "image": batch["image"] / 255},
            lambda batch, logits, loss: {"loss": loss, "x": batch["image"].float()},
            lambda batch, logits, loss: {"loss": loss, "shown": batch["image"].float()},
            lambda batch, logits, loss: (loss, batch["image"].float()),
            lambda batch, logits, loss: {"loss": loss, "rgb": 1 - batch["image"] / 255},
            lambda batch, logits, loss: {"loss": loss, "features": -logits},
        ],
    )
    def test_three_classes(self, random_sam, make):
        module, dataset = Step(make), DictBlobs(4)
        logged = validate(random_sam, module, DataLoader(dataset, 2))
        assert logged["val/miou_raw"] == pytest.approx(raw_miou(module, dataset), abs=1e-6)

    @pytest.mark.parametrize("name", ["mask", "uncertainty", "loss_map", "distance", "image"])
    def test_without_a_hook_nothing_is_guessed(self, name):
        outputs = {"loss": LOSS, name: torch.rand(B, 1, H, W)}
        batch = {"image": IMAGE, "mask": VALID}
        with pytest.raises(ValueError, match=rf"No scores found.*'{name}': float32.*scores_key"):
            BatchAdapter(2)(batch, outputs)

    def test_the_batch_s_own_tensors_are_never_scores(self):
        image = IMAGE.float()
        batch = {"image": image, "mask": TARGET}
        adapter = BatchAdapter(3)
        for outputs in (image, {"out": image}, {"pred": TARGET}, [LOSS, image.clone()]):
            with pytest.raises(ValueError, match="No scores found"):
                adapter(batch, outputs)

    def test_a_perfect_prediction_under_its_name_is_one(self, adapter):
        inputs = adapter((IMAGE, TARGET), {"preds": TARGET.clone()})
        assert torch.equal(inputs.labels, TARGET)

    def test_one_tensor_that_contradicts_the_hook_is_ambiguous(self, adapter):
        with pytest.raises(ValueError, match=r"scores must be one tensor.*forward.*scores_key"):
            adapter((IMAGE, TARGET), OTHER, LOGITS)
        keyed = BatchAdapter(C, scores_key="forward")
        assert torch.equal(keyed((IMAGE, TARGET), OTHER, LOGITS).labels, LOGITS.argmax(dim=1))


class TestChangesInPlace:
    """What a step does to its tensors after the network does not reach what is measured."""

    @pytest.mark.parametrize(
        "change",
        [
            lambda batch, logits: logits.sigmoid_(),
            lambda batch, logits: logits.neg_(),
            lambda batch, logits: logits[:, 0].sub_(100),
            lambda batch, logits: batch["mask"].masked_fill_(batch["mask"] == IGNORE, 0),
            lambda batch, logits: batch["image"].zero_(),
        ],
        ids=["sigmoid", "sign", "one class", "target", "image"],
    )
    @pytest.mark.parametrize("call", ["self", "child"])
    def test_figures_are_those_of_before(self, random_sam, change, call):
        def make(batch, logits, loss):
            change(batch, logits)
            return loss

        module, dataset = Step(make), DictBlobs(4)
        module.call = call
        expected = raw_miou(module, dataset)
        unchanged = validate(random_sam, Segmenter("loss"), DataLoader(dataset, 2))
        loader = DataLoader(dataset, 2, collate_fn=cloned)
        logged = validate(random_sam, module, loader)
        assert logged["val/miou_raw"] == pytest.approx(expected, abs=1e-6)
        assert logged["val/miou_refined"] == pytest.approx(unchanged["val/miou_refined"], abs=1e-6)

    @pytest.mark.parametrize(
        "change",
        [
            lambda mask: mask.masked_fill_(mask == 2, 1),
            lambda mask: mask.masked_fill_(mask == 2, IGNORE),
            lambda mask: mask.copy_(mask.flip(-1)),
        ],
    )
    def test_other_classes_are_ambiguous(self, random_sam, change):
        def make(batch, logits, loss):
            change(batch["mask"])
            return loss

        dataset = DictBlobs(4)
        loader = DataLoader(dataset, 2, collate_fn=cloned)
        message = r"target must be one tensor.*batch\['mask'\].* before .*target_key='mask'"
        with pytest.raises(ValueError, match=message):
            validate(random_sam, Step(make), loader)
        logged = validate(random_sam, Step(make), loader, target_key="mask")
        assert logged["val/miou_raw"] == pytest.approx(raw_miou(Step(make), dataset), abs=1e-6)

    def test_a_tensor_alone_a_frozen_dataclass_and_a_tuple(self):
        for wrap, read in (
            (lambda image: image, lambda batch: batch),
            (lambda image: Frozen(image), lambda batch: batch.image),
            (lambda image: ({"a": {"b": image}}, 1), lambda batch: batch[0]["a"]["b"]),
            (lambda image: Two(image, 1), lambda batch: batch.image),
        ):
            image = torch.rand(2, 3, 4, 4)
            image[0, 0, 0, 0] = float("nan")
            before, batch = image.clone(), wrap(image)
            capture = ScoresCapture(nn.Identity(), C)
            capture.arm(batch)
            assert read(capture.whole(batch)) is image
            image[1:] *= 2
            assert torch.equal(read(capture.whole(batch))[1], before[1])
            assert torch.equal(read(batch)[1], 2 * before[1])  # the user's own stays


class TestReturnedTargets:
    """A step that evaluates another target than the batch's, and returns it."""

    @staticmethod
    def merged(mask: Tensor) -> Tensor:
        return torch.where(mask == 2, 1, mask)

    def test_are_ambiguous(self, random_sam):
        module = Step(lambda b, logits, loss: {"preds": logits, "target": self.merged(b["mask"])})
        dataset = DictBlobs(4)
        message = r"got 2 that differ in .*batch\['mask'\].*outputs\['target'\].*_key='target'"
        with pytest.raises(ValueError, match=message):
            validate(random_sam, module, DataLoader(dataset, 2))
        logged = validate(random_sam, module, DataLoader(dataset, 2), target_key="target")
        metric = MulticlassJaccardIndex(NUM_CLASSES, ignore_index=IGNORE)
        with torch.no_grad():
            labels = module.eval().network(dataset.images / 255 - 0.5).argmax(dim=1)
        expected = float(metric(labels, self.merged(dataset.targets)))
        assert logged["val/miou_raw"] == pytest.approx(expected, abs=1e-6)

    @pytest.mark.parametrize(
        "change",
        [
            lambda mask: mask,
            lambda mask: mask.float()[:, None],
            lambda mask: torch.where(mask == IGNORE, 0, mask),
            lambda mask: mask[:, ::2, ::2],
            lambda mask: mask / 2,
        ],
    )
    def test_others_are_not(self, random_sam, change):
        module = Step(lambda b, logits, loss: {"preds": logits, "target": change(b["mask"])})
        dataset = DictBlobs(4)
        logged = validate(random_sam, module, DataLoader(dataset, 2))
        assert logged["val/miou_raw"] == pytest.approx(raw_miou(module, dataset), abs=1e-6)


class Averaged(Step):
    """A network beside another one, called by a function."""

    def __init__(self, call: Any) -> None:
        super().__init__(lambda batch, logits, loss: loss)
        self.ema = nn.Conv2d(3, NUM_CLASSES, 3, padding=1)
        self.step = call

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self.step(self, batch["image"].float())


class TestOtherPredictions:
    """A step that returns a loss, and several predictions that it may evaluate."""

    @pytest.mark.parametrize(
        ("step", "other"),
        [
            (lambda module, x: (module.ema(x), module(x))[1].mean(), "self.ema"),
            (lambda module, x: (module(x), module.ema(x))[1].mean(), "self.ema"),
            (lambda module, x: (module(x), module.network(-x))[0].mean(), "self.network"),
        ],
    )
    def test_of_another_network_are_ambiguous(self, random_sam, step, other):
        loader = DataLoader(DictBlobs(4), 2)
        with pytest.raises(ValueError, match=rf"scores must be one tensor.*{other}.*'forward'"):
            validate(random_sam, Averaged(step), loader)
        named = Averaged(lambda module, x: {"preds": (module(x), module.ema(x))[0]})
        for module, arguments in ((named, {}), (Averaged(step), {"scores_key": "forward"})):
            logged = validate(random_sam, module, loader, **arguments)
            expected = raw_miou(module, DictBlobs(4))
            assert logged["val/miou_raw"] == pytest.approx(expected, abs=1e-6)

    @pytest.mark.parametrize("threshold", [0.4, 0.5])
    def test_of_a_forward_that_returns_labels(self, random_sam, threshold):
        class Labels(Step):
            def forward(self, image):
                return self.network(image / 255 - 0.5).sigmoid()[:, 0] > threshold

            def validation_step(self, batch, batch_idx, dataloader_idx=0):
                self(batch["image"])

        module, loader = Labels(None, channels=1), DataLoader(Binary(4), 2)
        if threshold != 0.5:
            with pytest.raises(ValueError, match=r"different labels: self\(…\) bool .*'forward'"):
                validate(random_sam, module, loader, num_classes=2, scores_kind="logits")
            return
        logged = validate(random_sam, module, loader, num_classes=2, scores_kind="logits")
        assert logged["val/miou_raw"] == pytest.approx(raw_miou(module, Binary(4)), abs=1e-6)


class TestLabelMapsBesideALoss:
    """A step that post-processes its classes and returns them under a name of its own."""

    @pytest.mark.parametrize(
        "wrap",
        [
            lambda loss, labels: {"loss": loss, "segmentation": labels},
            lambda loss, labels: {"loss": loss, "final": labels[:, None]},
            lambda loss, labels: {"loss": loss, "refined": labels.to(torch.uint8)},
            lambda loss, labels: {"loss": loss, "result": labels, "u": torch.rand(2, *HW)},
            lambda loss, labels: {"loss": loss, "mask": labels},
            lambda loss, labels: {"loss": loss, "labels": labels},
            lambda loss, labels: (loss, labels),
        ],
    )
    def test_are_ambiguous_where_they_contradict_the_network(self, random_sam, wrap):
        def make(batch, logits, loss):
            return wrap(loss, nnf.avg_pool2d(logits, 9, 1, 4).argmax(dim=1))

        dataset = DictBlobs(4)
        with pytest.raises(ValueError, match=r"scores must be one tensor.*scores_key='forward'"):
            validate(random_sam, Step(make), DataLoader(dataset, 2))

    @pytest.mark.parametrize("key", ["1", "forward"])
    def test_a_key_decides(self, random_sam, key):
        module = Step(lambda batch, logits, loss: (loss, batch["mask"] * 0))
        logged = validate(random_sam, module, DataLoader(DictBlobs(4), 2), scores_key=key)
        dataset = DictBlobs(4)
        metric = MulticlassJaccardIndex(NUM_CLASSES, ignore_index=IGNORE)
        zeros = float(metric(torch.zeros(4, *HW).long(), dataset.targets))
        expected = zeros if key == "1" else raw_miou(module, dataset)
        assert logged["val/miou_raw"] == pytest.approx(expected, abs=1e-6)

    @pytest.mark.parametrize(
        "extra",
        [
            lambda mask, logits: {"final": logits.argmax(dim=1)},
            lambda mask, logits: {"segmentation": mask},
            lambda mask, logits: {"seg": torch.where(mask == IGNORE, 0, mask)},
            lambda mask, logits: {"target_of_today": torch.where(mask > 1, 0, mask)},
            lambda mask, logits: {"instances": mask * 0 + 1},
            lambda mask, logits: {"segments": torch.arange(40).expand(2, *HW)},
            lambda mask, logits: {"valid": mask != IGNORE},
            lambda mask, logits: {"final": mask == 1},
            lambda mask, logits: {"errors": (logits.argmax(dim=1) != mask).long()},
            lambda mask, logits: {"final": (mask == 1).float()},
        ],
    )
    def test_other_maps_stay_out_of_it(self, random_sam, extra):
        def make(batch, logits, loss):
            return {"loss": loss, **extra(batch["mask"], logits)}

        module, dataset = Step(make), DictBlobs(4)
        logged = validate(random_sam, module, DataLoader(dataset, 2))
        assert logged["val/miou_raw"] == pytest.approx(raw_miou(module, dataset), abs=1e-6)

    def test_thresholds_of_two_classes(self, random_sam):
        def make(batch, logits, loss):
            return {"loss": loss, "final": logits.sigmoid() > 0.7}

        with pytest.raises(ValueError, match=r"scores must be one tensor.*scores_key='final'"):
            validate(random_sam, Step(make, 1), DataLoader(Binary(4), 2), num_classes=2)


class TestHardPredictions:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64, torch.bool])
    def test_one_hot_scores_are_label_maps(self, dtype):
        labels = LOGITS.argmax(dim=1)
        hot = nnf.one_hot(labels, C).permute(0, 3, 1, 2).to(dtype)
        for kind in ("auto", "probs") if dtype.is_floating_point else ("auto",):
            probs, found = to_probs(hot, kind, C, (H, W))
            assert torch.equal(found, labels)
            assert 0 < float(probs.min()) < 0.001
            assert 0.99 < float(probs.amax(dim=1).min()) < 1

    @pytest.mark.parametrize("channel", [False, True])
    def test_thresholded_binary_scores_are_label_maps(self, channel):
        labels = (LOGITS[:, 0] > 0.5).float()
        probs, found = to_probs(labels[:, None] if channel else labels, "auto", 2, (H, W))
        assert torch.equal(found, labels.long())
        assert 0 < float(probs.min()) < 0.01

    def test_small_ones_are_enlarged_to_the_nearest(self):
        hard = torch.tensor([[[[0.0, 1.0]]]])
        probs, found = to_probs(hard, "auto", 2, (2, 4))
        assert found.tolist() == [[[0, 0, 1, 1], [0, 0, 1, 1]]]
        assert len(probs.unique()) == 2

    def test_classes_that_overlap_need_their_kind_named(self):
        hard = (LOGITS > 0).float()
        with pytest.raises(ValueError, match=r"scores must.* values of 0 and 1.*scores_kind"):
            to_probs(hard, "auto", C, (H, W))
        assert torch.equal(to_probs(hard, "probs", C, (H, W))[0], hard)

    @pytest.mark.parametrize("key", ["preds", "probs"])
    def test_refinement_can_change_pixels(self, random_sam, key):
        def hard(batch, logits, loss):
            hot = nnf.one_hot(logits.argmax(dim=1), NUM_CLASSES).permute(0, 3, 1, 2)
            return {"loss": loss, key: hot.float()}

        module, dataset = Step(hard), DictBlobs(4)
        logged = validate(random_sam, module, DataLoader(dataset, 2))
        assert logged["val/miou_raw"] == pytest.approx(raw_miou(module, dataset), abs=1e-6)
        assert logged["val/refine_fixed_px"] + logged["val/refine_broken_px"] > 0

        maps = Step(lambda batch, logits, loss: {"preds": logits.argmax(dim=1)})
        expected = validate(random_sam, maps, DataLoader(dataset, 2))
        assert logged["val/miou_refined"] == expected["val/miou_refined"]

    def test_binary_refinement_can_change_pixels(self, random_sam):
        module = Step(lambda batch, logits, loss: {"preds": (logits > 0).float()}, channels=1)
        dataset = Binary(4)
        logged = validate(random_sam, module, DataLoader(dataset, 2), num_classes=2)
        assert logged["val/miou_raw"] == pytest.approx(raw_miou(module, dataset), abs=1e-6)
        assert logged["val/refine_fixed_px"] + logged["val/refine_broken_px"] > 0


class TestOneContainer:
    def test_two_targets_are_ambiguous(self, adapter):
        batch = {"image": IMAGE, "label": TARGET, "mask": VALID}
        with pytest.raises(ValueError, match=r"^target must be one tensor, got 2") as error:
            adapter(batch, LOGITS)
        for part in ("batch['label'] int64 (2, 8, 12)", "batch['mask'] int64", "target_key"):
            assert part in str(error.value)
        for key, expected in (("label", TARGET), ("mask", VALID)):
            inputs = BatchAdapter(C, target_key=key)(batch, LOGITS)
            assert torch.equal(inputs.targets, expected)

    @pytest.mark.parametrize(
        "mask",
        [
            VALID.bool(),
            torch.rand(B, H, W),
            torch.ones(B, H // 2, W, dtype=torch.long),
            torch.ones(B, 3, H, W),
        ],
    )
    def test_what_cannot_be_a_target_is_none(self, adapter, mask):
        batch = {"image": IMAGE, "mask": mask, "label": TARGET}
        assert torch.equal(adapter(batch, LOGITS).targets, TARGET)

    def test_bool_may_be_a_binary_target(self):
        batch = {"image": IMAGE, "mask": VALID.bool(), "label": 1 - VALID}
        with pytest.raises(ValueError, match="target must be one tensor, got 2"):
            BatchAdapter(2)(batch, LOGITS[:, :2])

    def test_one_tensor_under_two_names_is_one_candidate(self, adapter):
        batch = {"image": IMAGE, "img": IMAGE.clone(), "mask": TARGET, "labels": TARGET.clone()}
        assert torch.equal(adapter(batch, LOGITS).targets, TARGET)

    def test_two_images_are_ambiguous(self, adapter):
        batch = {"image": IMAGE, "img": OTHER_IMAGE, "mask": TARGET}
        with pytest.raises(ValueError, match=r"image must be .*batch\['img'\].*image_key"):
            adapter(batch, LOGITS)
        inputs = BatchAdapter(C, image_key="img")(batch, LOGITS)
        assert torch.equal(inputs.images, OTHER_IMAGE)

    @pytest.mark.parametrize("first", ["unlabeled", "labeled"])
    def test_image_and_target_are_siblings(self, adapter, first):
        parts = {
            "unlabeled": {"image": OTHER_IMAGE},
            "labeled": {"image": IMAGE, "mask": TARGET},
        }
        batch = dict(sorted(parts.items(), key=lambda part: part[0] != first))
        for given in (batch, list(batch.values())):
            inputs = adapter(given, LOGITS)
            assert torch.equal(inputs.images, IMAGE)
            assert torch.equal(inputs.targets, TARGET)

    def test_a_samples_own_keys_come_before_nested_ones(self, adapter):
        extra = {"image": OTHER_IMAGE, "mask": VALID}
        batch = {"extra": extra, "image": IMAGE, "mask": TARGET}
        inputs = adapter(batch, LOGITS)
        assert torch.equal(inputs.images, IMAGE)
        assert torch.equal(inputs.targets, TARGET)

    def test_two_samples_are_ambiguous(self, adapter):
        batch = {
            "a": {"image": IMAGE, "mask": TARGET},
            "b": {"image": OTHER_IMAGE, "mask": VALID},
        }
        with pytest.raises(ValueError, match=r"image must be .*\['a'\]\['image'\].*image_key"):
            adapter(batch, LOGITS)
        inputs = BatchAdapter(C, image_key="b.image")(batch, LOGITS)
        assert torch.equal(inputs.targets, VALID)

    def test_combined_loaders(self, random_sam):
        labeled, unlabeled = DictBlobs(4), DictBlobs(4, seed=5)

        class Labeled(Segmenter):
            def logits_and_target(self, batch):
                return super().logits_and_target(batch["labeled"])

        class Images(DictBlobs):
            def __getitem__(self, index):
                return {"image": unlabeled[index]["image"]}

        loaders = {"unlabeled": DataLoader(Images(4), 2), "labeled": DataLoader(labeled, 2)}
        module = Labeled("none")
        logged = validate(random_sam, module, CombinedLoader(loaders, "max_size"))
        expected = validate(random_sam, Segmenter("none"), DataLoader(labeled, 2))
        assert logged["val/miou_raw"] == pytest.approx(raw_miou(module, labeled), abs=1e-6)
        assert logged["val/miou_refined"] == expected["val/miou_refined"]

    def test_logits_come_before_the_label_map_made_of_them(self, adapter):
        outputs = {"pred": LOGITS.argmax(dim=1), "output": LOGITS}
        torch.testing.assert_close(adapter((IMAGE, TARGET), outputs).probs, LOGITS.softmax(dim=1))

    @pytest.mark.parametrize("pred", [OTHER, OTHER.argmax(dim=1)])
    def test_scores_that_contradict_one_another_are_ambiguous(self, adapter, pred):
        outputs = {"pred": pred, "output": LOGITS}
        with pytest.raises(ValueError, match=r"^scores must be one tensor, got 2") as error:
            adapter((IMAGE, TARGET), outputs)
        for part in ("outputs['pred']", "outputs['output'] float32 (2, 4, 8, 12)", "scores_key"):
            assert part in str(error.value)
        for key, labels in (("pred", OTHER.argmax(dim=1)), ("output", LOGITS.argmax(dim=1))):
            assert torch.equal(
                BatchAdapter(C, scores_key=key)((IMAGE, TARGET), outputs).labels, labels
            )


class TestSizes:
    @pytest.mark.parametrize(
        ("image_hw", "scores_hw"),
        [
            ((100, 130), (32, 40)),  # a quarter of 128×160
            ((90, 90), (24, 24)),  # a quarter of 96×96
            ((33, 64), (16, 16)),
            ((572, 572), (388, 388)),  # convolutions without padding
        ],
    )
    def test_scores_of_a_padded_or_cropped_image_are_refused(self, image_hw, scores_hw):
        with pytest.raises(ValueError, match=r"scores must have .*no integer stride.*crop"):
            to_probs(torch.randn(1, C, *scores_hw), "auto", C, image_hw)

    @pytest.mark.parametrize(
        ("image_hw", "scores_hw"),
        [
            ((1, 1), (1, 1)),
            ((8, 900), (2, 225)),
            ((8, 900), (1, 57)),
            ((513, 1025), (129, 257)),
            ((513, 1025), (128, 256)),
            ((10, 7), (3, 2)),
            ((10, 7), (10, 7)),
        ],
    )
    def test_whole_strides_are_enlarged(self, image_hw, scores_hw):
        scores = torch.randn(1, C, *scores_hw)
        probs, _ = to_probs(scores, "auto", C, image_hw)
        expected = nnf.interpolate(scores, image_hw, mode="bilinear", align_corners=False)
        torch.testing.assert_close(probs, expected.softmax(dim=1))

    def test_windows_that_a_hook_saw_are_not_the_images_scores(self, adapter):
        window = torch.randn(B, C, 16, 16)
        inputs = adapter((IMAGE, TARGET), {"loss": LOSS, "whole": LOGITS}, window)
        assert torch.equal(inputs.labels, LOGITS.argmax(dim=1))


class TestQueriesAndDistances:
    QUERIES: ClassVar = {
        "class_queries_logits": torch.randn(B, C, C + 1),
        "masks_queries_logits": torch.randn(B, C, H // 4, W // 4),
    }
    DETR: ClassVar = {
        "pred_logits": torch.randn(B, C, C + 1),
        "pred_masks": torch.randn(B, C, H // 4, W // 4),
    }

    @pytest.mark.parametrize("queries", [QUERIES, DETR])
    def test_query_outputs_need_post_processing(self, adapter, queries):
        for outputs in (queries, {"loss": LOSS, "outputs": queries}, (LOSS, queries)):
            with pytest.raises(ValueError, match=r"queries.*post-process.*adapter"):
                adapter((IMAGE, TARGET), outputs)

    @pytest.mark.parametrize("queries", [4, 7])
    def test_queries_that_a_network_returns(self, random_sam, queries):
        class Queries(nn.Conv2d):
            def forward(self, image):
                masks = super().forward(image)
                return SimpleNamespace(
                    class_queries_logits=masks.mean(dim=(2, 3))[..., None].repeat(1, 1, 4),
                    masks_queries_logits=masks,
                )

        class Module(Segmenter):
            def __init__(self):
                super().__init__()
                self.network = Queries(3, queries, 1)

            def validation_step(self, batch, batch_idx):
                self.network(batch["image"].float())

        with pytest.raises(ValueError, match=r"queries.*post-process.*adapter"):
            validate(random_sam, Module(), DataLoader(DictBlobs(2)), num_classes=queries)

    def test_processed_queries_are_scores(self, adapter):
        outputs = {"queries": self.QUERIES, "logits": LOGITS}
        assert torch.equal(adapter((IMAGE, TARGET), outputs).labels, LOGITS.argmax(dim=1))

    def test_distance_maps_are_no_logits(self):
        distances = nnf.relu(torch.randn(B, C, 40, 60)) * 9
        batch = (torch.zeros(B, 3, 40, 60, dtype=torch.uint8), torch.zeros(B, 40, 60).long())
        for channels, classes in ((1, 2), (C, C)):
            scores = distances[:, :channels]
            message = r"scores must be .* values from 0 to .*, none below 0.*scores_kind"
            with pytest.raises(ValueError, match=message):
                BatchAdapter(classes)(batch, None, scores)
            with pytest.raises(ValueError, match=message):
                BatchAdapter(classes)(batch, {"pred": scores})
            named = BatchAdapter(classes, scores_kind="logits")
            assert len(named(batch, None, scores)) == B
            assert len(BatchAdapter(classes)(batch, {"logits": scores})) == B


class Attributes:
    __slots__ = ("image", "mask")

    def __init__(self, image: Tensor, mask: Tensor) -> None:
        self.image, self.mask = image, mask


class KeysOnly:
    """Neither mapping nor dataclass, as TensorDict is."""

    def __init__(self, **values: Tensor) -> None:
        self._values = values

    def keys(self):
        return self._values.keys()

    def __getitem__(self, key: str) -> Tensor:
        return self._values[key]


class TestPositions:
    @pytest.mark.parametrize("other", [VALID, VALID.float(), torch.zeros_like(TARGET)])
    def test_two_maps_that_may_be_the_target_are_an_error(self, adapter, other):
        for batch in ((IMAGE, other, TARGET), (IMAGE, TARGET, other)):
            with pytest.raises(ValueError, match=r"target_key='1' or target_key='2'"):
                adapter(batch, LOGITS)
        inputs = BatchAdapter(C, target_key="2")((IMAGE, other, TARGET), LOGITS)
        assert torch.equal(inputs.targets, TARGET)

    def test_what_cannot_be_the_target_is_no_candidate(self, adapter):
        weights = torch.rand(TARGET.shape)
        for batch in ((IMAGE, weights, TARGET), (IMAGE, TARGET, weights, ["a", "b"])):
            assert torch.equal(adapter(batch, LOGITS).targets, TARGET)


class TestContainers:
    @pytest.mark.parametrize(
        "make",
        [SimpleNamespace, Attributes, KeysOnly, UserDict],
        ids=lambda make: make.__name__,
    )
    def test_batches_and_outputs_of_any_kind(self, adapter, make):
        inputs = adapter(make(image=IMAGE, mask=TARGET), SimpleNamespace(logits=LOGITS))
        assert torch.equal(inputs.images, IMAGE)
        assert torch.equal(inputs.targets, TARGET)
        assert torch.equal(inputs.labels, LOGITS.argmax(dim=1))
        keyed = BatchAdapter(C, image_key="image", target_key="mask")
        assert torch.equal(keyed(make(image=IMAGE, mask=TARGET), LOGITS).targets, TARGET)

    def test_modules_and_functions_are_no_containers(self, adapter):
        batch = {"image": IMAGE, "mask": TARGET, "model": nn.Linear(2, 2), "collate": len}
        assert torch.equal(adapter(batch, LOGITS).targets, TARGET)

    @pytest.mark.parametrize("dataset", ["dict", "list"])
    def test_steps_that_pop_from_the_batch(self, random_sam, dataset):
        class Popping(Segmenter):
            def logits_and_target(self, batch):
                if isinstance(batch, dict):
                    return self(batch.pop("image")), batch.pop("mask")
                target, image = batch.pop(), batch.pop()
                return self(image), target

        data = DictBlobs(4) if dataset == "dict" else Blobs(4)
        module = Popping("none")
        logged = validate(random_sam, module, DataLoader(data, 2))
        assert logged["val/miou_raw"] == pytest.approx(raw_miou(module, data), abs=1e-6)

    def test_what_a_step_puts_in_place_stays(self, random_sam):
        class Cropping(Segmenter):
            def logits_and_target(self, batch):
                batch["image"], batch["mask"] = batch["image"][..., :20], batch["mask"][..., :20]
                return super().logits_and_target(batch)

        dataset = DictBlobs(4)
        logged = validate(random_sam, Cropping("none"), DataLoader(dataset, 2))
        dataset.images, dataset.targets = dataset.images[..., :20], dataset.targets[..., :20]
        expected = raw_miou(Segmenter(), dataset)
        assert logged["val/miou_raw"] == pytest.approx(expected, abs=0.05)

    @pytest.mark.parametrize("position", [0, 1])
    def test_a_loader_without_targets_is_left_out(self, random_sam, position):
        dataset, module = DictBlobs(4), Silent()
        loaders = [DataLoader(dataset, 2), DataLoader(ImagesAlone(4, seed=3), 2)]
        if position == 0:
            loaders.reverse()
        with pytest.warns(RuntimeWarning, match="no target") as caught:
            logged = validate(random_sam, module, loaders)
        ours = [str(one.message) for one in caught if "SAMRefineCallback" in str(one.message)]
        assert len(ours) == 1
        assert f"dataloader {position}" in ours[0]
        assert not any("before the ``update``" in str(one.message) for one in caught)
        key = f"val/miou_raw/dataloader_idx_{1 - position}"
        assert logged[key] == pytest.approx(raw_miou(module, dataset), abs=1e-6)
        assert not any(name.endswith(f"dataloader_idx_{position}") for name in logged)

    def test_no_loader_with_targets_is_an_error(self, random_sam):
        for count in (1, 2):
            with pytest.raises(ValueError, match="No target found"):
                validate(
                    random_sam, Silent(), [DataLoader(ImagesAlone(2), 2) for _ in range(count)]
                )

    def test_scripted_children(self, random_sam):
        class Scripted(Segmenter):
            def __init__(self, returns, script):
                super().__init__(returns)
                self.network = script(self.network)

        dataset = DictBlobs(4)
        traced = Scripted("none", lambda net: torch.jit.trace(net.eval(), torch.zeros(1, 3, *HW)))
        for module in (Scripted("none", torch.jit.script), traced):
            logged = validate(random_sam, module, DataLoader(dataset, 2))
            assert logged["val/miou_raw"] == pytest.approx(raw_miou(module, dataset), abs=1e-6)

    @pytest.mark.parametrize("call", ["scripted", "forward"])
    def test_a_normalization_before_a_network_without_hooks_is_none(self, random_sam, call):
        class Normalize(nn.Module):
            def forward(self, image):
                return (image - 120) / 60

        class Normalizing(Silent):
            def __init__(self) -> None:
                super().__init__("none")
                self.normalize, network = Normalize(), self.network
                self.network = torch.jit.script(network) if call == "scripted" else network

            def validation_step(self, batch, batch_idx, dataloader_idx=0):
                image = self.normalize(batch["image"].float())
                self.network(image) if call == "scripted" else self.network.forward(image)

        with pytest.raises(ValueError, match="a linear map of the image's colors"):
            validate(random_sam, Normalizing(), DataLoader(DictBlobs(2), 2))

    def test_scripted_children_called_by_the_step_are_named(self, random_sam):
        module = Segmenter("none", call="child")
        module.network = torch.jit.script(module.network)
        with pytest.raises(ValueError, match=r"'network'.*takes no forward hooks"):
            validate(random_sam, module, DataLoader(DictBlobs(2)))


class TestNumbers:
    def test_numpy_and_tensor_integers(self, random_sam):
        import numpy as np

        for number in (np.int64, np.array, torch.tensor):
            callback = SAMRefineCallback(
                random_sam,
                num_classes=number(NUM_CLASSES),
                ignore_index=number(IGNORE),
                every_n_epochs=number(1),
                max_batches=number(2),
            )
            assert type(callback.shared.num_classes) is int
            assert type(callback.ignore_index) is int
            assert callback.max_batches == 2

    def test_of_the_module(self, random_sam):
        import numpy as np

        for number in (np.int64(NUM_CLASSES), np.array(NUM_CLASSES), torch.tensor(NUM_CLASSES)):
            module = Segmenter()
            module.num_classes = number
            logged = validate(random_sam, module, DataLoader(DictBlobs(2)), num_classes=None)
            assert logged["val/miou_raw"] == pytest.approx(raw_miou(module, DictBlobs(2)))

    def test_of_a_normalization(self):
        import numpy as np

        mean = np.array([0.25, 0.5, 0.75])
        for given in (mean, torch.tensor(mean), list(mean), list(mean.astype(np.float32))):
            assert Denormalize(given, np.float32(0.5)).mean == (0.25, 0.5, 0.75)
        assert Denormalize(np.array(0.5), np.float64(0.25)).std == (0.25,)

    def test_of_names(self):
        import numpy as np

        for ids in (np.array([7, 8]), [np.int64(7), np.int64(8)], torch.tensor([7, 8])):
            assert find_stems({"image": IMAGE, "image_id": ids}, 2) == ["7", "8"]
        assert find_stems({"image": IMAGE, "name": np.array(["a", "b"])}, 2) == ["a", "b"]
        with pytest.raises(ValueError, match="No names found"):
            find_stems({"image": IMAGE, "image_id": np.array([0.5, 1.5])}, 2)

    def test_others_are_refused(self, random_sam):
        import numpy as np

        for number in (np.float64(3), np.array([3]), np.bool_(True), torch.tensor(3.0)):
            with pytest.raises(TypeError, match=r"num_classes must be .*, got"):
                SAMRefineCallback(random_sam, num_classes=number)


class TestLine:
    def lines(self, caplog):
        return [r.message for r in caplog.records if "reads image" in r.message]

    def test_what_was_read_is_shown_once_an_evaluation(self, random_sam, caplog):
        callback = SAMRefineCallback(random_sam, num_classes=NUM_CLASSES, refine=REFINE)
        trainer = Trainer(**SILENT, max_epochs=2, num_sanity_val_steps=0, callbacks=[callback])
        with caplog.at_level(logging.INFO):
            trainer.fit(Segmenter("none"), DataLoader(DictBlobs(2)), DataLoader(DictBlobs(4), 2))
        lines = self.lines(caplog)
        assert len(lines) == 2
        ignored = 2 / HW[0]
        for part in (
            "image batch['image'] uint8 (2, 3, 32, 40)",
            "0 to 2",
            "target batch['mask'] int64 (2, 32, 40)",
            "scores forward hook float32 (2, 3, 32, 40), logits",
            f"{ignored:.1%} of the target's pixels ignored",
            "0.0% of the pixels predicted outside [0, 3)",
        ):
            assert part in lines[0]

    @pytest.mark.parametrize(
        ("make", "described"),
        [
            (lambda b, logits, _: {"probs": logits.softmax(dim=1)}, "['probs'] float32"),
            (lambda b, logits, _: {"probs": logits.softmax(dim=1)}, "probabilities"),
            (lambda b, logits, _: {"preds": logits.argmax(dim=1)}, "label map"),
            (lambda b, logits, _: (torch.tensor(0.0), logits), "forward hook"),
        ],
    )
    def test_kinds(self, random_sam, caplog, make, described):
        with caplog.at_level(logging.INFO):
            validate(random_sam, Step(make), DataLoader(DictBlobs(2)))
        (line,) = self.lines(caplog)
        assert described in line

    def test_sigmoids(self, random_sam, caplog):
        module = Step(lambda b, logits, _: {"probs": logits.sigmoid()}, channels=1)
        with caplog.at_level(logging.INFO):
            validate(random_sam, module, DataLoader(Binary(2)), num_classes=2)
        assert "probabilities of class 1" in self.lines(caplog)[0]


class TestNetworks:
    """What leaves a network, and what only passes by its children."""

    @pytest.mark.parametrize("name", ["seg", "mask", "masks", "semantic"])
    def test_networks_may_call_scores_by_a_targets_name(self, random_sam, name):
        class Network(nn.Conv2d):
            def forward(self, image):
                scores = super().forward(image)
                return {name: scores, "depth": scores[:, :1], "image": image}

        class Module(Segmenter):
            def __init__(self):
                super().__init__()
                network = self.network
                self.network = Network(3, NUM_CLASSES, 3, padding=1)
                self.network.load_state_dict(network.state_dict())

            def validation_step(self, batch, batch_idx):
                self.network(batch["image"] / 255 - 0.5)

        dataset = DictBlobs(4)
        logged = validate(random_sam, Module(), DataLoader(dataset, 2))
        assert logged["val/miou_raw"] == pytest.approx(raw_miou(Segmenter(), dataset), abs=1e-6)

    def test_losses_of_pixels_do_not_replace_the_logits(self, random_sam):
        class Module(Segmenter):
            def __init__(self):
                super().__init__(channels=1)
                self.criterion = nn.BCEWithLogitsLoss(reduction="none")

            def validation_step(self, batch, batch_idx):
                logits = self.network(batch["image"] / 255 - 0.5)
                return self.criterion(logits, batch["mask"]).mean()

        module, dataset = Module(), Binary(4)
        logged = validate(random_sam, module, DataLoader(dataset, 2), num_classes=2)
        assert logged["val/miou_raw"] == pytest.approx(raw_miou(module, dataset), abs=1e-6)

    def test_a_label_map_returned_alone_gives_way_to_its_scores(self, adapter):
        inputs = adapter((IMAGE, TARGET), LOGITS.argmax(dim=1), LOGITS)
        torch.testing.assert_close(inputs.probs, LOGITS.softmax(dim=1))

    def test_a_label_map_of_another_rule_stands(self, adapter):
        labels = LOGITS.argmax(dim=1)
        labels[0, 0, 0] = (labels[0, 0, 0] + 1) % C
        assert torch.equal(adapter((IMAGE, TARGET), labels, LOGITS).labels, labels)

    def test_objects_that_fail_when_looked_at_are_no_containers(self, adapter):
        class Broken:
            @property
            def __dict__(self):
                raise RuntimeError("closed")

        batch = {"image": IMAGE, "mask": TARGET, "file": Broken()}
        assert torch.equal(adapter(batch, LOGITS).targets, TARGET)


def test_stored_hard_probabilities_can_change(random_sam, tmp_path):
    import numpy as np
    from PIL import Image

    from lightning_samrefine.data import FolderDataModule
    from lightning_samrefine.segmenters import StoredPredictions

    dataset, module = DictBlobs(4), Segmenter().eval()
    with torch.no_grad():
        labels = module.network(dataset.images / 255 - 0.5).argmax(dim=1)
    hot = nnf.one_hot(labels, NUM_CLASSES).permute(0, 3, 1, 2).numpy()
    for name in ("images", "labels", "hard"):
        (tmp_path / name).mkdir()
    for index in range(4):
        image = dataset.images[index].permute(1, 2, 0).numpy()
        Image.fromarray(image).save(tmp_path / "images" / f"{index}.png")
        target = dataset.targets[index].numpy().astype(np.uint8)
        Image.fromarray(target).save(tmp_path / "labels" / f"{index}.png")
        np.savez(tmp_path / "hard" / f"{index}.npz", probs=hot[index].astype(np.float32))
    names = {"images": "images", "labels": "labels", "predictions": "hard"}
    folders = {key: tmp_path / name for key, name in names.items()}
    data = FolderDataModule(NUM_CLASSES, val=folders, ignore_index=IGNORE)
    callback = SAMRefineCallback(
        random_sam, num_classes=NUM_CLASSES, refine=REFINE, log=["refine_*"]
    )
    trainer = Trainer(**SILENT, callbacks=[callback])
    (logged,) = trainer.validate(StoredPredictions(), datamodule=data, verbose=False)
    assert callback.history[0]["miou_raw"] == pytest.approx(
        raw_miou(Segmenter(), dataset), abs=1e-6
    )
    assert logged["val/refine_fixed_px"] + logged["val/refine_broken_px"] > 0


class TestRareForeground:
    """Few pixels of all are many of a small class: two rules may not pass for one."""

    @staticmethod
    def scores() -> tuple[Tensor, Tensor]:
        """Return logits of one channel with 4 pixels above 0, and 4 below that a rule adds."""
        logits = torch.full((1, 1, 32, 40), -6.0)
        logits[..., 10, 10:14] = 2
        logits[..., 11, 10:14] = -1
        return logits, (logits[:, 0] > -2).long()

    @pytest.mark.parametrize("soft", [True, False])
    def test_another_threshold_is_another_prediction(self, soft):
        logits, labels = self.scores()
        other = {"pred": logits + 2} if soft else {"preds": labels}
        batch = {"image": torch.zeros(1, 3, 32, 40, dtype=torch.uint8), "mask": 1 - labels}
        with pytest.raises(ValueError, match=r"scores must be one tensor, got 2.*scores_key="):
            BatchAdapter(2)(batch, {"logits": logits, **other})

    @pytest.mark.parametrize("name", ["preds", "pred_mask"])
    def test_so_is_one_that_happens_to_be_perfect(self, name):
        logits, labels = self.scores()
        batch = {"image": torch.zeros(1, 3, 32, 40, dtype=torch.uint8), "mask": labels}
        with pytest.raises(ValueError, match=r"scores must be one tensor, got 2.*scores_key="):
            BatchAdapter(2)(batch, {name: labels.clone()}, logits)

    def test_ties_and_rounding_are_none(self):
        generator = torch.Generator().manual_seed(1)
        logits = torch.randn(1, 3, 64, 64, generator=generator)
        rounded = {"logits": logits, "probs": logits.bfloat16().softmax(1)}
        labels = {"logits": logits, "preds": logits.bfloat16().argmax(1)}
        assert not torch.equal(logits.argmax(1), labels["preds"])
        image = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
        for outputs in (rounded, labels):
            inputs = BatchAdapter(3)({"image": image, "mask": labels["preds"]}, outputs)
            assert torch.equal(inputs.labels, logits.argmax(1))


class TestNamesThatTell:
    """A name such as seg_logits or pred_mask means scores; the network's must not hide them."""

    @pytest.mark.parametrize("name", ["prob", "logit", "seg_logits", "pred_mask", "y_prob"])
    def test_alone_they_are_scores(self, adapter, name):
        given = OTHER.argmax(1) if name == "pred_mask" else OTHER
        inputs = adapter((IMAGE, TARGET), {"loss": LOSS, name: given})
        assert torch.equal(inputs.labels, OTHER.argmax(1))

    @pytest.mark.parametrize("name", ["prob", "logit", "seg_logits", "pred_mask", "y_prob"])
    def test_against_the_network_they_are_ambiguous(self, adapter, name):
        given = OTHER.argmax(1) if name == "pred_mask" else OTHER
        outputs = {"loss": LOSS, name: given}
        with pytest.raises(ValueError, match=rf"scores must be one tensor.*{name}.*scores_key"):
            adapter((IMAGE, TARGET), outputs, LOGITS)
        keyed = BatchAdapter(C, scores_key=name)((IMAGE, TARGET), outputs, LOGITS)
        assert torch.equal(keyed.labels, OTHER.argmax(1))

    @pytest.mark.parametrize("copied", [False, True])
    def test_lists_of_samples_are_compared_with_the_target(self, adapter, copied):
        batch = {"image": list(IMAGE), "mask": list(TARGET)}
        one_hot = nnf.one_hot(TARGET, C).permute(0, 3, 1, 2).float()
        outputs = {"loss": LOSS, "seg_pred": list(one_hot if copied else OTHER)}
        if copied:
            with pytest.raises(ValueError, match="No scores found"):
                adapter(batch, outputs)
        else:
            labels = torch.stack(list(adapter(batch, outputs).labels))
            assert torch.equal(labels, OTHER.argmax(1))

    def test_a_label_map_gives_way_to_the_scores_it_was_made_of(self, adapter):
        outputs = {"loss": LOSS, "pred_mask": LOGITS.argmax(1)}
        inputs = adapter((IMAGE, TARGET), outputs, LOGITS)
        assert torch.equal(inputs.probs, to_probs(LOGITS, "auto", C, (H, W))[0])

    @pytest.mark.parametrize("name", ["aux_logits", "teacher_pred", "pred_depth"])
    def test_auxiliary_heads_are_no_scores(self, adapter, name):
        inputs = adapter((IMAGE, TARGET), {"loss": LOSS, name: OTHER}, LOGITS)
        assert torch.equal(inputs.labels, LOGITS.argmax(1))


def test_one_sample_s_two_channels_are_no_batch_of_two():
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(2, 2, H, W, generator=generator)
    logits[1] = logits[0] + 0.01 * logits[1]
    outputs = [{"logits": one} for one in logits]
    batch = (IMAGE, VALID)
    assert torch.equal(BatchAdapter(2)(batch, outputs, logits).labels, logits.argmax(1))
    with pytest.raises(ValueError, match="No scores found"):
        BatchAdapter(2)(batch, outputs)


def test_an_example_that_the_step_returns_is_not_the_batch():
    """Its first sample, for a picture."""
    labels = LOGITS.argmax(dim=1)
    outputs = {"loss": LOSS, "input": IMAGE[:1], "prediction": labels[:1], "gt": TARGET[:1]}
    inputs = BatchAdapter(C)((IMAGE, TARGET), outputs, LOGITS)
    assert torch.equal(inputs.labels, labels)
    assert torch.equal(inputs.targets, TARGET)


class TestOneChannel:
    """Logits of one channel may lie in [0, 1] by accident, as an untrained network's do."""

    LOW: ClassVar = 0.4 * torch.rand(B, 1, H, W, generator=GENERATOR) + 0.05
    BATCH: ClassVar = (IMAGE, VALID)

    @pytest.mark.parametrize("as_list", [False, True])
    def test_logits_stay_logits(self, as_list):
        adapter = BatchAdapter(2)
        adapter(self.BATCH, None, LOGITS[:, :1])
        scores = self.LOW
        if as_list:
            scores = [LOGITS[0, :1], self.LOW[1]]
            inputs = BatchAdapter(2)(self.BATCH, {"preds": scores})
            assert torch.equal(inputs.labels[1], (self.LOW[1, 0] > 0).long())
        else:
            assert torch.equal(adapter(self.BATCH, None, scores).labels, (scores[:, 0] > 0).long())

    def test_what_was_read_as_probabilities_is_contradicted(self):
        adapter = BatchAdapter(2)
        adapter(self.BATCH, None, (4 * LOGITS[:, :1]).sigmoid())
        with pytest.raises(ValueError, match=r"scores must be in \[0, 1\].*scores_kind='logits'"):
            adapter(self.BATCH, None, LOGITS[:, :1])

    def test_values_that_may_be_either_are_ambiguous(self):
        with pytest.raises(ValueError, match=r"scores_kind must be 'logits' or 'probs'"):
            BatchAdapter(2)(self.BATCH, None, self.LOW)
        for kind, threshold in (("logits", 0), ("probs", 0.5)):
            labels = BatchAdapter(2, scores_kind=kind)(self.BATCH, None, self.LOW).labels
            assert torch.equal(labels, (self.LOW[:, 0] > threshold).long())
        labels = BatchAdapter(2)(self.BATCH, {"probs": self.LOW}).labels
        assert torch.equal(labels, (self.LOW[:, 0] > 0.5).long())

    def test_the_sigmoid_of_an_untrained_networks_scores_is_a_probability(self):
        logits = LOGITS[:, :1] / LOGITS.abs().max()
        for outputs in (logits.sigmoid(), {"y_hat": logits.sigmoid()[:, 0]}):
            labels = BatchAdapter(2)(self.BATCH, outputs, logits).labels
            assert torch.equal(labels, (logits[:, 0] > 0).long())

    @pytest.mark.parametrize("name", ["logits", "seg_logits"])
    def test_a_name_and_values_that_contradict_each_other_are_ambiguous(self, name):
        with pytest.raises(ValueError, match=r"scores_kind must be.*logits.*0\.\d+ to 0\.\d+"):
            BatchAdapter(2)(self.BATCH, {name: self.LOW})
        for kind, threshold in (("logits", 0), ("probs", 0.5)):
            inputs = BatchAdapter(2, scores_kind=kind)(self.BATCH, {name: self.LOW})
            assert torch.equal(inputs.labels, (self.LOW[:, 0] > threshold).long())

    @pytest.mark.parametrize("name", ["preds", "logits"])
    @pytest.mark.parametrize("percent", [True, False])
    def test_percentages_and_log_probabilities_are_no_logits(self, name, percent):
        logits = torch.linspace(-9, 9, B * H * W).view(B, 1, H, W)
        scores = 100 * logits.sigmoid() if percent else nnf.logsigmoid(logits)
        adapter, outputs = BatchAdapter(2), {name: scores}
        if name == "logits":
            assert bool((adapter((IMAGE, VALID), outputs).labels == percent).all())
        else:
            with pytest.raises(ValueError, match=rf"all of class {int(percent)}, got 'auto'"):
                adapter((IMAGE, VALID), outputs)

    def test_hard_maps_settle_nothing(self):
        adapter = BatchAdapter(2)
        hard = (LOGITS[:, :1] > 0).float()
        assert torch.equal(adapter(self.BATCH, {"pred": hard}).labels, hard[:, 0].long())
        assert torch.equal(adapter(self.BATCH, {"pred": 1 - hard}).labels, 1 - hard[:, 0].long())

    def test_every_loader_and_run_settles_its_own(self, random_sam):
        dataset = Binary(8)
        module = Step(lambda batch, logits, loss: loss, channels=1)
        with torch.no_grad():
            module.network.weight.mul_(0.02)
            module.network.bias.fill_(-0.003)
        logged = validate(random_sam, module, DataLoader(dataset, 1), num_classes=2)
        assert logged["val/miou_raw"] == pytest.approx(raw_miou(module, dataset), abs=1e-6)
