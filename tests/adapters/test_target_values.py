"""Targets that hold other values than the classes: refused, and the likely mend is named."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_stubs import IGNORE, NUM_CLASSES, REFINE, SILENT, Blobs, Segmenter
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchmetrics.classification import MulticlassJaccardIndex

from lightning_samrefine import SAMRefineCallback, SAMRefineWriter
from lightning_samrefine.adapters.batch_adapter import BatchAdapter, RefineInputs
from lightning_samrefine.adapters.target_values import TargetCheck, mend, to_labels
from lightning_samrefine.data import FolderDataModule
from lightning_samrefine.segmenters import StoredPredictions, TorchvisionSegmenter

HW = (24, 32)


class Binary(Dataset):
    """Bright squares on black; masks of 0 and ``foreground``, every image with a foreground."""

    def __init__(self, foreground: int = 1, length: int = 4) -> None:
        rng = np.random.default_rng(0)
        self.truth = np.zeros((length, *HW), np.int64)
        for mask in self.truth:
            y, x = rng.integers(2, 8, size=2)
            mask[y : y + 12, x : x + 14] = 1
        self.images = (self.truth[:, None].repeat(3, axis=1) * 180 + 30).astype(np.uint8)
        self.foreground = foreground

    def __len__(self) -> int:
        return len(self.truth)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        mask = torch.from_numpy(self.truth[index] * self.foreground)
        return {"image": torch.from_numpy(self.images[index]), "mask": mask}


class Threshold(LightningModule):
    """Predicts the foreground a column to the right of where it is."""

    def logits(self, batch):
        shifted = batch["image"].float().mean(dim=1).roll(2, dims=-1)
        return torch.stack([100 - shifted, shifted - 100], dim=1) / 20

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        return {"logits": self.logits(batch)}


def validate(callback, dataset, module=None, batch_size=2, **kwargs):
    trainer = Trainer(**{**SILENT, **kwargs}, callbacks=[callback])
    loaders = DataLoader(dataset, batch_size=batch_size)
    return trainer.validate(module or Threshold(), loaders, verbose=False)[0]


def jaccard(dataset):
    metric = MulticlassJaccardIndex(2, average="macro")
    for index in range(len(dataset)):
        batch = {"image": torch.from_numpy(dataset.images[index])[None]}
        prediction = Threshold().logits(batch).argmax(dim=1)
        metric.update(prediction, torch.from_numpy(dataset.truth[index])[None])
    return metric.compute().item()


class Blobby(Blobs):
    """Blobs whose targets are changed by a function, from one image on."""

    def __init__(self, change, first: int = 0, **kwargs) -> None:
        super().__init__(**kwargs)
        for index in range(first, len(self)):
            self.targets[index] = change(self.targets[index])


class TestCallback:
    def test_masks_of_0_and_1_are_measured_as_torchmetrics_does(self, random_sam):
        dataset = Binary()
        logged = validate(SAMRefineCallback(random_sam, num_classes=2, refine=REFINE), dataset)
        assert logged["val/miou_raw"] == pytest.approx(jaccard(dataset), abs=1e-6)

    @pytest.mark.parametrize("ignore", ["auto", None])
    def test_masks_of_0_and_255_are_refused_with_the_likely_fix(self, random_sam, ignore):
        callback = SAMRefineCallback(random_sam, num_classes=2, ignore_index=ignore, refine=REFINE)
        share = 100 * np.mean(Binary().truth[:2])
        message = rf"got 255 in {share:.3g}% of the pixels\. .*divide them by 255, or set ignore_i"
        with pytest.raises(ValueError, match=message):
            validate(callback, Binary(255))

    def test_an_ignored_value_that_the_user_wrote_is_obeyed(self, random_sam):
        callback = SAMRefineCallback(random_sam, num_classes=2, ignore_index=255, refine=REFINE)
        assert "val/miou_raw" in validate(callback, Binary(255))

    def test_the_default_is_obeyed_where_both_classes_are_seen(self, random_sam):
        dataset = Binary()
        dataset.truth[:, :2] = 255
        callback = SAMRefineCallback(random_sam, num_classes=2, refine=REFINE)
        logged = validate(callback, dataset)
        metric = MulticlassJaccardIndex(2, average="macro", ignore_index=255)
        batch = {"image": torch.from_numpy(dataset.images)}
        metric.update(Threshold().logits(batch).argmax(dim=1), torch.from_numpy(dataset.truth))
        assert logged["val/miou_raw"] == pytest.approx(metric.compute().item(), abs=1e-6)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda t: torch.where(t == IGNORE, t, t + 1), "got 3 in .*labels 1 to 3: subtract 1"),
            (lambda t: torch.where(t == IGNORE, -1, t), "got -1 in .*ignore_index=-1"),
            (lambda t: t * 7, r"got 7, 14.* Map the labels"),
        ],
    )
    @pytest.mark.parametrize("sanity", [False, True])
    def test_other_values_are_refused_at_the_first_batch(self, random_sam, change, message, sanity):
        callback = SAMRefineCallback(random_sam, num_classes=NUM_CLASSES, refine=REFINE)
        loaders = DataLoader(Blobby(change), batch_size=2)
        trainer = Trainer(**SILENT, callbacks=[callback], max_epochs=1)
        module = Segmenter("logits")
        module.loss = lambda logits, target: logits.sum()
        with pytest.raises(ValueError, match=f"target must hold class indices 0 to 2.*{message}"):
            trainer.fit(module, loaders, loaders) if sanity else trainer.validate(module, loaders)
        assert trainer.global_step == 0

    def test_a_later_batch_of_the_first_pass_is_refused_as_well(self, random_sam):
        callback = SAMRefineCallback(random_sam, num_classes=NUM_CLASSES, refine=REFINE)
        dataset = Blobby(lambda t: torch.where(t == IGNORE, t, t + 1), first=3)
        module = Segmenter("logits")
        module.loss = lambda logits, target: logits.sum()
        with pytest.raises(ValueError, match="subtract 1"):
            validate(callback, dataset, module, batch_size=1)

    def test_a_later_epoch_leaves_the_batch_out_and_counts_it(self, random_sam):
        """A loader that was right for a whole epoch does not end a training run."""

        class Turning(Blobs):
            reads = 0

            def __getitem__(self, index):
                image, target = super().__getitem__(index)
                Turning.reads += 1
                return image, target + 1 if Turning.reads == 8 else target

        callback = SAMRefineCallback(random_sam, num_classes=NUM_CLASSES, refine=REFINE)
        trainer = Trainer(**SILENT, callbacks=[callback], max_epochs=2, num_sanity_val_steps=0)
        module = Segmenter("logits")
        module.loss = lambda logits, target: logits.mean()
        with pytest.warns(RuntimeWarning, match="left out .*target must hold class indices 0 to 2"):
            trainer.fit(module, DataLoader(Blobs(2), 2), DataLoader(Turning(4), batch_size=1))
        assert [one["refine_failed_images"] for one in callback.history] == [0, 1]

    def test_a_user_s_own_inputs_are_checked_too(self, random_sam):
        def adapter(batch, outputs, captured):
            labels = outputs["logits"].argmax(dim=1)
            probs = outputs["logits"].softmax(dim=1)
            return RefineInputs(batch["image"], probs, labels, batch["mask"])

        callback = SAMRefineCallback(random_sam, num_classes=2, refine=REFINE, adapter=adapter)
        with pytest.raises(ValueError, match="divide them by 255"):
            validate(callback, Binary(255))


class TestPredictedMasks:
    """A step may return its prediction as a mask of 0 and 255."""

    class Masks(Threshold):
        def __init__(self, foreground):
            super().__init__()
            self.foreground = foreground

        def validation_step(self, batch, batch_idx):
            return {"preds": self.logits(batch).argmax(dim=1) * self.foreground}

    def test_0_and_1_are_measured_as_torchmetrics_does(self, random_sam):
        dataset = Binary()
        callback = SAMRefineCallback(random_sam, num_classes=2, refine=REFINE)
        logged = validate(callback, dataset, self.Masks(1))
        assert logged["val/miou_raw"] == pytest.approx(jaccard(dataset), abs=1e-6)

    def test_0_and_255_are_refused(self, random_sam):
        callback = SAMRefineCallback(random_sam, num_classes=2, refine=REFINE)
        with pytest.raises(ValueError, match=r"scores must be 0 and 1 .* divide masks"):
            validate(callback, Binary(), self.Masks(255))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda labels: labels + 1, "label map must hold .* got 2 in .*subtract 1"),
            (lambda labels: 2 * labels - 1, "scores must be 0 and 1 .* no pixel of 0"),
            (lambda labels: 100 * labels + 7, "label map must hold .* got 7, 107 in 100% of"),
        ],
    )
    def test_other_values_are_refused(self, random_sam, change, message):
        class Changed(Threshold):
            def validation_step(self, batch, batch_idx):
                return {"preds": change(self.logits(batch).argmax(dim=1))}

        callback = SAMRefineCallback(random_sam, num_classes=2, refine=REFINE)
        with pytest.raises(ValueError, match=message):
            validate(callback, Binary(), Changed())

    @pytest.mark.parametrize("factor", [1, 127])
    def test_other_values_of_several_classes(self, random_sam, factor):
        class Changed(Segmenter):
            def validation_step(self, batch, batch_idx):
                labels = self.logits_and_target(batch)[0].argmax(dim=1)
                return {"preds": factor * labels + (factor == 1)}

        callback = SAMRefineCallback(random_sam, num_classes=NUM_CLASSES, refine=REFINE)
        message = "subtract 1" if factor == 1 else "gray levels 127 apart"
        with pytest.raises(ValueError, match=f"predicted label map .* 0 to 2 and .*{message}"):
            validate(callback, Blobs(), Changed())

    def test_values_of_unknown_pixels_are_not(self):
        check = TargetCheck(3, 7)
        check.predictions(torch.tensor([[[0, 1, 2, 7, -1, -100, 255, 65_535]]]))
        with pytest.raises(ValueError, match="got 256 in 50% of"):
            TargetCheck(256, None).predictions(torch.tensor([[[256, 255]]]))

    def test_unknown_pixels_beside_a_foreground_stay_unknown(self):
        check = TargetCheck(2, None)
        check.predictions(torch.tensor([[[0, 1, 255]]]))
        check.predictions(torch.tensor([[[0, 0, 255]]]))
        check.predictions(torch.tensor([[[0, 0, -1]]]), loader=1)


class TestDefaultIgnoreIndex:
    """D24: a default must not make one of the classes vanish."""

    class Many(LightningModule):
        def validation_step(self, batch, batch_idx):
            return {"preds": batch["mask"].roll(1, dims=-1)}

    @staticmethod
    def dataset():
        dataset = Binary()
        dataset.truth = np.where(dataset.truth == 1, 255, 7)
        return dataset

    def test_it_is_refused_where_it_is_a_class(self, random_sam):
        callback = SAMRefineCallback(random_sam, num_classes=300, refine=REFINE)
        message = "ignore_index must be set where num_classes=300, got its default 255"
        with pytest.raises(MisconfigurationException, match=message):
            validate(callback, self.dataset(), self.Many())

    def test_what_the_user_wrote_is_obeyed(self, random_sam):
        for ignore, present in ((255, {"7"}), (None, {"7", "255"})):
            callback = SAMRefineCallback(
                random_sam, num_classes=300, ignore_index=ignore, refine=REFINE, log=["iou_raw/*"]
            )
            logged = validate(callback, self.dataset(), self.Many())
            found = {key.split("/")[-1] for key in logged if key.startswith("val/iou_raw/")}
            assert found == present

    def test_255_classes_are_none_of_it(self, random_sam):
        callback = SAMRefineCallback(random_sam, num_classes=255, refine=REFINE, log="all")
        dataset = self.dataset()
        dataset.truth[dataset.truth == 255] = 254
        assert "val/iou_raw/254" in validate(callback, dataset, self.Many())

    def test_data_module_and_segmenter_refuse_it_as_well(self):
        for build in (FolderDataModule, TorchvisionSegmenter):
            with pytest.raises(ValueError, match="ignore_index must be set where num_classes=300"):
                build(num_classes=300)
            assert build(num_classes=300, ignore_index=255).ignore_index == 255
            assert build(num_classes=255).ignore_index == 255

    def test_the_writer_keeps_class_255(self, random_sam, tmp_path):
        class Predicts(LightningModule):
            def predict_step(self, batch, batch_idx):
                return {"preds": batch["mask"].roll(1, dims=-1)}

        dataset = self.dataset()
        writer = SAMRefineWriter(tmp_path, random_sam, num_classes=300, refine={"classes": []})
        trainer = Trainer(**SILENT, callbacks=[writer])
        trainer.predict(Predicts(), DataLoader(dataset), return_predictions=False)
        written = np.stack([np.array(Image.open(path)) for path in sorted(tmp_path.rglob("*.png"))])
        assert np.array_equal(written, np.roll(dataset.truth, 1, axis=2))


class TestFolders:
    """`samrefine data=folder` reads labels and predictions from files."""

    @staticmethod
    def module(root, labels, predictions, num_classes=2, **kwargs):
        for name, maps in (("labels", labels), ("predictions", predictions)):
            for index, one in enumerate(maps):
                (root / name).mkdir(exist_ok=True)
                Image.fromarray(one.astype(np.uint8)).save(root / name / f"{index}.png")
                image = np.repeat(one[..., None] % 255, 3, axis=2).astype(np.uint8)
                (root / "images").mkdir(exist_ok=True)
                Image.fromarray(image).save(root / "images" / f"{index}.png")
        split = {key: root / key for key in ("images", "labels", "predictions")}
        return FolderDataModule(num_classes=num_classes, val=split, **kwargs)

    @staticmethod
    def read(data):
        data.setup("validate")
        return list(data.val_dataloader())

    def test_labels_of_0_and_255_are_refused_before_any_work(self, tmp_path):
        truth = Binary().truth
        with pytest.raises(ValueError, match=r"labels: label maps of two classes.*ignore_index"):
            self.module(tmp_path, truth * 255, truth).setup("validate")

    def test_a_single_label_map_with_a_foreground_settles_it(self, tmp_path):
        truth = Binary().truth
        truth[:3] = np.where(truth[:3] == 1, 255, 0)
        assert len(self.read(self.module(tmp_path, truth, Binary().truth))) == 4

    def test_what_the_user_wrote_is_obeyed(self, tmp_path):
        truth = Binary().truth
        data = self.module(tmp_path, truth * 255, truth, ignore_index=255)
        assert set(self.read(data)[0]["mask"].unique().tolist()) == {0, 255}

    @pytest.mark.parametrize("ignore", ["auto", 255, None])
    def test_predictions_of_0_and_255_are_refused_before_any_work(self, tmp_path, ignore):
        truth = Binary().truth
        data = self.module(tmp_path, truth, truth * 255, ignore_index=ignore)
        with pytest.raises(ValueError, match="predictions: label maps of two classes"):
            data.setup("validate")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda maps: maps + 1, "labels 1 to 3: subtract 1"),
            (lambda maps: maps * 11, "got 11, 22 in"),
        ],
    )
    @pytest.mark.parametrize("which", ["labels", "predictions"])
    def test_other_values_name_file_and_mend(self, tmp_path, change, message, which):
        maps = np.random.default_rng(1).integers(0, 3, (2, *HW))
        wrong = change(maps)
        labels, predictions = (wrong, maps) if which == "labels" else (maps, wrong)
        data = self.module(tmp_path, labels, predictions, num_classes=3)
        with pytest.raises(ValueError, match=rf"{which}/0\.png: .*{message}"):
            self.read(data)

    def test_unknown_pixels_of_a_prediction_stay_unknown(self, tmp_path):
        maps = np.random.default_rng(1).integers(0, 3, (2, *HW))
        predicted = maps.copy()
        predicted[:, :3] = 255
        data = self.module(tmp_path, maps, predicted, num_classes=3, ignore_index=None)
        batches = self.read(data)
        assert np.array_equal(batches[1]["prediction"][0].numpy(), predicted[1])

    def test_the_figure_of_stored_predictions_is_torchmetrics(self, tmp_path, random_sam):
        truth = Binary().truth
        predicted = np.roll(truth, 2, axis=2)
        data = self.module(tmp_path, truth, predicted)
        callback = SAMRefineCallback(random_sam, num_classes=2, refine=REFINE)
        trainer = Trainer(**SILENT, callbacks=[callback])
        logged = trainer.validate(StoredPredictions(), datamodule=data, verbose=False)[0]
        metric = MulticlassJaccardIndex(2, average="macro")
        metric.update(torch.from_numpy(predicted), torch.from_numpy(truth))
        assert logged["val/miou_raw"] == pytest.approx(metric.compute().item(), abs=1e-6)


@pytest.mark.parametrize(
    ("values", "num_classes", "expected"),
    [
        ([0, 255], 2, "masks of 0 and 255: divide them by 255"),
        ([0, 85, 255], 4, "gray levels 85 apart: divide them by 85"),
        ([1, 2, 3], 3, "subtract 1"),
        ([0, 150], 150, "num_classes=151, or ignore_index=150"),
        ([-1, 7, 11, 33], 19, "Cityscapes"),
        ([0, 1, 2, 255], 3, "Set ignore_index=255 if"),
        ([-100, 0], 3, "Set ignore_index=-100 if"),
        ([0, 7, 90, 200], 30, "Map the labels"),
    ],
)
def test_each_pattern_has_its_mend(values, num_classes, expected):
    assert expected in mend(values, num_classes)


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.uint16, torch.uint32, torch.int16, torch.bool]
)
def test_targets_of_every_integer_type(dtype):
    target = torch.tensor([[[0, 1, 1]]]).to(dtype)
    assert to_labels(target, torch.zeros(1, 1, 3)).tolist() == [[[0, 1, 1]]]


def test_the_error_of_a_mask_through_to_tensor_explains_it():
    target = torch.tensor([[[0.0, 1.0, 2.0, 255.0]]]) / 255
    with pytest.raises(ValueError, match="indices divided by 255, as ToTensor does"):
        to_labels(target, torch.zeros(1, 1, 4))


class TestMasksOf0And255AmongSeveralClasses:
    """With 255 as the default ignored value a class stored as 255 vanishes from every figure."""

    MASK = torch.tensor([0, 255]).repeat(2, 3, 2)

    def test_are_refused(self, random_sam):
        check = TargetCheck(3, "auto")
        with pytest.raises(ValueError, match=r"got 255 in 50% .*Set ignore_index=255 if that"):
            check(self.MASK)
        dataset = Blobby(lambda t: torch.where(t > 0, 255, t))
        callback = SAMRefineCallback(random_sam, num_classes=3, refine=REFINE)
        with pytest.raises(ValueError, match="got 255 in"):
            validate(callback, dataset, Segmenter("logits"))

    @pytest.mark.parametrize(
        ("ignore_index", "batches"),
        [
            ("auto", [MASK.clamp(max=1), MASK, MASK]),
            ("auto", [[MASK[0], MASK[0] * 0 + 2], MASK, MASK]),
            ("auto", [MASK * 0, MASK * 0 + 255, MASK * 0 + 2, MASK]),
            (255, [MASK, MASK]),
        ],
    )
    def test_others_are_not(self, ignore_index, batches):
        check = TargetCheck(3, ignore_index)
        for batch in batches:
            check(batch)


def test_samples_of_different_sizes_are_checked_together():
    check = TargetCheck(2, "auto")
    check([torch.tensor([[0, 255]]), torch.tensor([[1], [0]])])
    check([torch.tensor([[0, 255]])])
    with pytest.raises(ValueError, match=re.escape("got 255 in 50% of the pixels")):
        check([torch.tensor([[0, 255]])], loader=1)


C18 = {
    "images": torch.zeros(2, 3, *HW, dtype=torch.uint8),
    "probs": torch.full((2, 2, *HW), 0.5),
    "labels": torch.zeros(2, *HW, dtype=torch.int64),
    "targets": torch.ones(2, *HW, dtype=torch.int64),
}


class TestOwnInputs:
    """C18: a user's `RefineInputs` are checked for dtypes and ranges, not for shapes alone."""

    @staticmethod
    def read(**changed):
        inputs = RefineInputs(**{**C18, **changed})
        return BatchAdapter(2, function=lambda *_: inputs)(None, None)

    @pytest.mark.parametrize("name", ["labels", "targets"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.uint8, torch.int32])
    def test_exact_labels_are_converted(self, name, dtype):
        read = getattr(self.read(**{name: C18[name].to(dtype)}), name)
        assert read.dtype == torch.int64
        assert torch.equal(read, C18[name])

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"labels": C18["labels"] + 0.3}, r"adapter: labels must .*fractions"),
            ({"targets": C18["targets"] * torch.nan}, r"adapter: targets must .*NaN"),
            ({"images": C18["images"].float()}, "adapter: images must be uint8 RGB.*float32"),
            ({"images": C18["images"][:, :1]}, r"adapter: images must be uint8 RGB.*1, 24, 32"),
            ({"probs": C18["probs"].long()}, "adapter: probs must be floats.*int64"),
            ({"probs": C18["probs"] * 9}, r"adapter: probs must be in \[0, 1\], got .*'logits'"),
        ],
    )
    @pytest.mark.parametrize("as_list", [False, True])
    def test_what_does_not_fit_is_refused_by_name(self, changed, message, as_list):
        if as_list:
            changed = {name: list(value) for name, value in changed.items()}
        with pytest.raises(ValueError, match=message):
            self.read(**changed)

    def test_half_precision_is_widened(self):
        assert self.read(probs=C18["probs"].bfloat16()).probs.dtype == torch.float32

    def test_a_broken_image_stays_a_matter_of_its_own(self):
        probs = C18["probs"].clone()
        probs[0] = torch.nan
        assert self.read(probs=probs).probs[0].isnan().all()
