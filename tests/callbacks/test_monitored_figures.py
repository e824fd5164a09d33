"""Figures that cannot be logged are warned of before an epoch, and NaN is described in words."""

from __future__ import annotations

import shutil
import warnings

import numpy as np
import pytest
import torch
from command_runs import composed, overrides, rendered
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping
from lightning_stubs import IGNORE, NUM_CLASSES, REFINE, SILENT, Blobs, Segmenter, loader
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from lightning_samrefine import SAMRefineCallback
from lightning_samrefine.callbacks.logged_figures import warn_copies, warn_shifted
from lightning_samrefine.cli.main import run
from lightning_samrefine.metrics.comparison import RefinementComparison
from lightning_samrefine.reporting.summary import summary


class AtStart(Callback):
    """Notes which warnings had come when training began."""

    def __init__(self, caught):
        self.caught, self.seen = caught, []

    def on_train_start(self, trainer, pl_module):
        self.seen = [str(one.message) for one in self.caught]


def data(change=lambda targets: targets):
    dataset = Blobs(2)
    dataset.targets = change(dataset.targets)
    return DataLoader(dataset, batch_size=2)


def without_class_2(targets):
    return torch.where(targets == 2, 1, targets)


def warned(random_sam, val, *others, module=None, **kwargs):
    """Train an epoch, and return what the callback had warned of before."""
    callback = SAMRefineCallback(random_sam, num_classes=NUM_CLASSES, refine=REFINE, **kwargs)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        start = AtStart(caught)
        trainer = Trainer(**SILENT, max_epochs=1, callbacks=[callback, start, *others])
        trainer.fit(module or Segmenter("logits"), loader(2), val)
    return [message for message in start.seen if message.startswith("SAMRefineCallback")]


def stopping(monitor):
    return EarlyStopping(monitor, mode="max", strict=False)


def test_a_class_without_pixels_is_warned_of_before_training(random_sam):
    monitor = "val/iou_refined/2"
    (message,) = warned(random_sam, data(without_class_2), stopping(monitor))
    assert "EarlyStopping monitors 'val/iou_refined/2', which may never be logged" in message
    assert "no target of the 2 images of the sanity check holds class 2" in message
    assert warned(random_sam, data(), stopping(monitor)) == []
    assert warned(random_sam, data(without_class_2), stopping("val/iou_refined/1")) == []


@pytest.mark.parametrize(
    ("monitor", "kwargs", "words"),
    [
        ("val/iou_refined/sky", {}, "the classes are 0, 1, 2"),
        ("val/iou_raw/1", {"ignore_index": 1}, "class 1 is ignore_index"),
        ("val/miou_refined/dataloader_idx_0", {}, "of one dataloader end without a number"),
        ("val/fast/iou_raw/7", {"name": "fast"}, "the classes are 0, 1, 2"),
    ],
)
def test_monitored_names_that_cannot_be_logged(random_sam, monitor, kwargs, words):
    # With another ignore_index, 255 is no value of a target.
    val = data(lambda targets: targets.clamp(max=2)) if "ignore_index" in kwargs else data()
    (message,) = warned(random_sam, val, stopping(monitor), **kwargs)
    assert words in message


@pytest.mark.parametrize("monitor", ["val/my_own", "val/refine_iou_auroc", "other/miou_refined"])
def test_what_others_log_is_not_judged(random_sam, monitor):
    assert warned(random_sam, data(), stopping(monitor)) == []


def test_schedulers_monitor_too(random_sam):
    class Plateau(Segmenter):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {
                    "scheduler": scheduler, "monitor": "val/iou_raw/2", "strict": False,
                },
            }  # fmt: skip

    (message,) = warned(random_sam, data(without_class_2), module=Plateau("logits"))
    assert "ReduceLROnPlateau monitors 'val/iou_raw/2'" in message


def test_all_ignored_targets_are_warned_of(random_sam):
    val = data(lambda targets: torch.full_like(targets, IGNORE))
    (message,) = warned(random_sam, val)
    assert "no pixel of the 2 images of the sanity check is scored" in message
    assert "ignore_index=255" in message
    callback = SAMRefineCallback(random_sam, num_classes=NUM_CLASSES, refine=REFINE)
    with pytest.warns(UserWarning, match="no pixel of the 2 images of this evaluation is scored"):
        Trainer(**SILENT, callbacks=[callback]).validate(Segmenter("logits"), val, verbose=False)


def test_a_summary_without_a_scored_pixel(tmp_path):
    metrics = {"val/refine_failed_images": 0.0, "val/refine_regions_per_image": 3.0}
    assert "No pixel was scored" in rendered(summary(metrics, tmp_path))


def test_tuning_on_ignored_targets_is_reported_in_words(folder, tmp_path, capsys):
    labels = tmp_path / "labels"
    shutil.copytree(folder / "labels", labels)
    for path in labels.iterdir():
        size = Image.open(path).size
        Image.fromarray(np.full(size[::-1], 255, np.uint8)).save(path)
    values = ["task=tune", "tune.score_thresh=[0.0]", "tune.pred_iou_thresh=[0.5]"]
    values += ["tune.mask_prompt_scale=[8.0]", f"data.val.labels={labels}"]
    out = tmp_path / "out"
    assert run(composed(out, *overrides(folder, *values))) is None
    printed = capsys.readouterr().out
    written = (out / "tuned.yaml").read_text() + (out / "best_cell.yaml").read_text()
    assert "nan" not in (printed + written).lower().replace(str(tmp_path).lower(), "")
    assert "No pixel of the 2 validation images is scored" in " ".join(printed.split())
    assert "no pixel of the validation images is scored" in written


@pytest.mark.parametrize(
    ("copies", "processes", "wrong", "warned"),
    [
        (2, 2, 3, True),
        (4, 2, 3, True),
        (1, 2, 3, False),
        (3, 2, 3, False),
        (2, 1, 3, False),
        (2, 2, 1, False),  # all images but one are right: equal counts may be those of two images
        (2, 2, 0, False),
    ],
)
def test_images_that_every_process_measures_are_warned_of(copies, processes, wrong, warned):
    dataset = Blobs(3)
    raw = dataset.targets.clone()
    raw[:wrong, :8] = 0
    raw[raw == IGNORE] = 0
    comparison = RefinementComparison(NUM_CLASSES, IGNORE)
    for _ in range(copies):
        comparison.update(raw, raw, dataset.targets)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_copies(comparison.result(), processes)
    expected = f"images were measured {processes} times each"
    assert [expected in str(one.message) for one in caught] == [True] * warned


class TestShiftedLabels:
    """Labels that the step shifts: in the batch they are not those that the network learned."""

    class Learned(Segmenter):
        """Predicts the labels of `LabeledBlobs` moved by ``shift``, but for some wrong pixels."""

        shift = -1

        def forward(self, image):
            labels = (image[:, 0].long() + self.shift).clamp(0, NUM_CLASSES - 1)
            labels[:, ::5] = 0
            return nn.functional.one_hot(labels, NUM_CLASSES).movedim(-1, 1) * 9.0 - 4

    def warnings_of(self, random_sam, targets, shift):
        dataset = Blobs(len(targets))
        dataset.targets = targets
        dataset.images = targets[:, None].repeat(1, 3, 1, 1).to(torch.uint8)
        callback = SAMRefineCallback(random_sam, num_classes=NUM_CLASSES, refine=REFINE)
        module = self.Learned("none")
        module.shift = shift
        module.loss = lambda logits, target: torch.tensor(0.0)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer = Trainer(**SILENT, callbacks=[callback])
            trainer.validate(module, DataLoader(dataset, batch_size=2), verbose=False)
        return [str(one.message) for one in caught if "shifted" in str(one.message)]

    # Columns of classes.
    ALL = torch.arange(40).mul(NUM_CLASSES).div(40, rounding_mode="floor").expand(2, 32, 40)

    def test_labels_from_1_on(self, random_sam):
        (message,) = self.warnings_of(random_sam, self.ALL.clamp(min=1), -1)
        assert "1 less" in message
        assert "data set or in an adapter" in message

    def test_labels_that_the_step_raises(self, random_sam):
        (message,) = self.warnings_of(random_sam, self.ALL.clamp(max=1), 1)
        assert "1 more" in message

    @pytest.mark.parametrize(
        ("targets", "shift"),
        [
            (ALL.clamp(min=1), 0),  # class 0 does not occur, and the network is right
            (ALL, -1),  # class 0 occurs
            (torch.ones_like(ALL), -1),  # a network that predicts one class is no evidence
        ],
    )
    def test_no_evidence(self, random_sam, targets, shift):
        assert self.warnings_of(random_sam, targets, shift) == []

    def test_an_untrained_network_is_no_evidence(self):
        """It predicts the neighbors of two classes, and most pixels as anything else."""
        targets = torch.tensor([0, 1, 3, 4]).repeat_interleave(10)[None, None]
        raw = torch.tensor([1] * 6 + [3] * 14 + [4] * 6 + [2] * 4 + [1] * 10)[None, None]
        comparison = RefinementComparison(6, IGNORE)
        comparison.update(raw, raw, targets)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warn_shifted(comparison.result())
