"""``refine="auto"`` in a Trainer: who is refined by what, and what is logged beside it."""

from __future__ import annotations

import html

import pytest
import torch
from lightning.pytorch import Trainer
from lightning_stubs import NUM_CLASSES, SILENT, Blobs, Segmenter
from tiny_random_sam import build_random_sam
from torch.utils.data import DataLoader
from torchmetrics.functional.classification import multiclass_jaccard_index

from lightning_samrefine import Refiner, SAMRefineCallback, SAMRefineWriter
from lightning_samrefine.adapters.batch_adapter import BatchAdapter
from lightning_samrefine.callbacks import auto_refiner
from lightning_samrefine.callbacks.auto_refiner import AutoRefiner
from lightning_samrefine.config_files import read_refine, write_refine
from lightning_samrefine.fit.auto_fusion import MIN_GROUPS, AutoFusion
from lightning_samrefine.fusion_weights import FusionWeights
from lightning_samrefine.models.sam import SamPromptable
from lightning_samrefine.refine.cache import embedding_cache
from lightning_samrefine.refine.cache.keys import image_digest

IMAGES = 12
REFINE = {"min_region_area": 1, "pred_iou_thresh": 0.3}


COLORS = torch.tensor([[220, 40, 30], [50, 200, 60], [40, 70, 230]]) / 255


class ByColor(Segmenter):
    """Finds the classes by their colors, wrong in blocks of a fixed noise."""

    def forward(self, image):
        image = image.float() / 255
        near = -10 * (image[:, None] - COLORS[None, :, :, None, None]).square().sum(dim=2)
        noise = torch.randn(NUM_CLASSES, 8, 10, generator=torch.Generator().manual_seed(0))
        return near + 6 * torch.nn.functional.interpolate(noise[None], image.shape[-2:])

    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        return {"logits": self(batch[0])}


class ByBatch(ByColor):
    """The same for batches that are dicts."""

    def validation_step(self, batch, batch_idx):
        return {"logits": self(batch["image"])}


def loader(count=IMAGES, batch_size=2):
    return DataLoader(Blobs(count), batch_size)


def callback(sam, **arguments):
    return SAMRefineCallback(
        sam, num_classes=NUM_CLASSES, refine=REFINE, precision="32", **arguments
    )


def trainer(*callbacks, **arguments):
    return Trainer(callbacks=list(callbacks), **{**SILENT, **arguments})


def miou(labels, targets):
    return multiclass_jaccard_index(
        torch.cat([one.flatten() for one in labels]),
        torch.cat([one.flatten() for one in targets]),
        num_classes=NUM_CLASSES,
        ignore_index=255,
        average="macro",
    ).item()


def test_a_fit_is_found_logged_and_used_afterwards(random_sam, tmp_path):
    own, module = callback(random_sam), ByColor().eval()
    runner = trainer(own)
    (first,) = runner.validate(module, loader(), verbose=False)
    assert own.fitted_config is not None
    weights = own.fitted_config.weights
    assert isinstance(weights, FusionWeights)
    assert weights.images == IMAGES
    assert 0 <= first["val/miou_without_sam"] <= 1
    low, gain, high = (first[f"val/fitted_gain{end}"] for end in ("_low", "", "_high"))
    assert low <= gain <= high
    assert weights.refine == (low > 0)
    assert own.history[-1]["fitted_gain"] == pytest.approx(gain)
    by_sam = gain - first["val/fitted_gain_without_sam"]
    assert first["val/fitted_gain_by_sam"] == pytest.approx(by_sam, abs=1e-6)
    (second,) = runner.validate(module, loader(), verbose=False)
    if not weights.refine:
        assert second["val/miou_refined"] == second["val/miou_raw"]
    (tested,) = runner.test(module, loader(), verbose=False)
    assert "test/fitted_gain" not in tested
    assert "test/miou_without_sam" in tested


def test_the_report_has_what_the_fit_found(random_sam, tmp_path):
    own = callback(random_sam, report=tmp_path / "report.html")
    trainer(own).validate(ByColor().eval(), loader(), verbose=False)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert own.fitted_config.weights.found in html.unescape(page)


def test_the_control_is_that_of_its_weights(random_sam):
    own, module = callback(random_sam), ByColor().eval()
    (logged,) = trainer(own).validate(module, loader(), verbose=False)
    adapter = BatchAdapter(num_classes=NUM_CLASSES)
    refiner = AutoRefiner(
        Refiner(random_sam, own.refine_config, "32"),
        AutoFusion(tuple(map(str, range(NUM_CLASSES)))),
        255,
    )
    controls, targets = [], []
    with torch.no_grad():
        for index, batch in enumerate(loader()):
            inputs = adapter(batch, module.validation_step(batch, index))
            controls += [one.control for one in refiner(inputs)]
            targets += list(inputs.targets)
    assert logged["val/miou_without_sam"] == pytest.approx(miou(controls, targets), abs=1e-6)


@pytest.mark.parametrize("batch_size", [1, 5])
def test_batches_change_nothing(random_sam, batch_size):
    one, other = callback(random_sam), callback(random_sam)
    module = ByColor().eval()
    trainer(one).validate(module, loader(), verbose=False)
    trainer(other).validate(module, loader(batch_size=batch_size), verbose=False)
    first, second = one.fitted_config.weights, other.fitted_config.weights
    assert first.fusion.weights == pytest.approx(second.fusion.weights, abs=1e-4)
    assert first.fusion.biases == pytest.approx(second.fusion.biases, abs=1e-4)


@pytest.mark.parametrize("count", [1, MIN_GROUPS - 1])
def test_too_few_images_are_refined_by_the_preset(random_sam, caplog, count):
    caplog.set_level("INFO")
    own, fast = callback(random_sam), callback(random_sam)
    fast = SAMRefineCallback(
        random_sam,
        num_classes=NUM_CLASSES,
        refine={**REFINE, "preset": "fast"},
        precision="32",
        name="fast",
    )
    few = loader(count)
    (logged,) = trainer(own, fast).validate(ByColor().eval(), few, verbose=False)
    assert own.fitted_config is None
    assert logged["val/miou_refined"] == logged["val/fast/miou_refined"]
    assert "val/fitted_gain" not in logged
    assert "val/fast/miou_without_sam" not in logged
    assert "nothing was fitted to fewer than 8 labeled images" in caplog.text


class Scenes(Blobs):
    """Four frames of each scene."""

    def __getitem__(self, index):
        image, target = super().__getitem__(index)
        return {"image": image, "mask": target, "meta": {"scene": f"scene {index // 4}"}}


@pytest.mark.parametrize("batch_size", [1, 3])
def test_frames_of_a_scene_share_a_fold(random_sam, batch_size):
    module, frames = ByBatch().eval(), Scenes(40)
    own = callback(random_sam, group_key="meta.scene")
    trainer(own).validate(module, DataLoader(frames, batch_size), verbose=False)
    assert set(own._fitted.fold_of) == {f"scene {number}" for number in range(10)}
    assert own.fitted_config.weights.images == 40


def test_fewer_scenes_than_a_fit_needs_are_few_images(random_sam):
    own = callback(random_sam, group_key="meta.scene")
    frames = DataLoader(Scenes(4 * (MIN_GROUPS - 1)), 2)
    trainer(own).validate(ByBatch().eval(), frames, verbose=False)
    assert own.fitted_config is None


def test_a_group_key_that_the_batch_lacks_is_refused(random_sam):
    own = callback(random_sam, group_key="patient")
    with pytest.raises(ValueError, match=r"group_key must be the key of 2 strings, .*'patient'"):
        trainer(own).validate(ByBatch().eval(), DataLoader(Scenes(8), 2), verbose=False)
    with pytest.raises(TypeError, match="group_key must be a string such as 'scene'"):
        callback(random_sam, group_key=3)


@pytest.mark.parametrize("cache", ["memory", None])
def test_an_image_is_hashed_once_an_epoch(random_sam, monkeypatch, cache):
    hashed = []

    def counted(image):
        hashed.append(image_digest(image))
        return hashed[-1]

    monkeypatch.setattr(auto_refiner, "image_digest", counted)
    monkeypatch.setattr(embedding_cache, "image_digest", counted)
    own = callback(random_sam, cache=cache)
    runner = trainer(own, max_epochs=2, num_sanity_val_steps=0)
    runner.fit(Segmenter(), loader(4), loader())
    assert len(hashed) == 2 * IMAGES
    assert set(hashed[:IMAGES]) == set(hashed[IMAGES:])
    assert len(set(hashed)) == IMAGES


def test_weights_travel_in_a_checkpoint(random_sam, tmp_path):
    own, module = callback(random_sam), ByColor().eval()
    runner = trainer(own)
    runner.validate(module, loader(), verbose=False)
    other = callback(random_sam)
    other.load_state_dict(own.state_dict())
    assert other.fitted_config == own.fitted_config
    (expected,) = runner.test(module, loader(6), verbose=False)
    (found,) = trainer(other).test(module, loader(6), verbose=False)
    assert found["test/miou_refined"] == expected["test/miou_refined"]


def test_a_checkpoint_that_is_tested_brings_its_weights(random_sam, tmp_path):
    own, module = callback(random_sam), ByColor().eval()
    runner = trainer(own)
    runner.validate(module, loader(), verbose=False)
    runner.save_checkpoint(tmp_path / "fitted.ckpt")
    (expected,) = runner.test(module, loader(6), verbose=False)
    fresh = callback(random_sam)
    (found,) = trainer(fresh).test(
        module, loader(6), ckpt_path=tmp_path / "fitted.ckpt", verbose=False
    )
    assert found["test/miou_refined"] == expected["test/miou_refined"]
    assert fresh.fitted_config == own.fitted_config


def test_a_checkpoint_of_another_sam_is_refused(random_sam, tmp_path):
    own, module = callback(random_sam), ByColor().eval()
    runner = trainer(own)
    runner.validate(module, loader(), verbose=False)
    runner.save_checkpoint(tmp_path / "fitted.ckpt")
    other = SamPromptable(build_random_sam(), "other")
    expected = f"sam must be '{random_sam.name}', the model that .* fitted with, got 'other'"
    tested = trainer(callback(other))
    with pytest.raises(ValueError, match=expected):
        tested.test(module, loader(6), ckpt_path=tmp_path / "fitted.ckpt", verbose=False)


@pytest.mark.slow
def test_log_and_report_have_the_weights_in_use(random_sam, tmp_path, caplog):
    caplog.set_level("INFO")
    page, module = tmp_path / "report.html", ByColor().eval()
    own = callback(random_sam, report=page)
    runner = trainer(own)
    preset = "with the weights of preset 'fast', not with fitted ones: there are none yet"
    fitted = f"fitted to {IMAGES} images: "
    runner.validate(module, loader(), verbose=False)
    assert f"refines {preset}" in caplog.text
    assert preset in html.unescape(page.read_text(encoding="utf-8"))
    assert fitted not in caplog.text
    runner.save_checkpoint(tmp_path / "fitted.ckpt")
    runner.validate(module, loader(), verbose=False)
    assert f"refines with weights from this run, {fitted}" in caplog.text
    assert f"with weights from this run, {fitted}" in page.read_text(encoding="utf-8")
    trainer(callback(random_sam)).test(
        module, loader(6), ckpt_path=tmp_path / "fitted.ckpt", verbose=False
    )
    assert f"refines with weights from a checkpoint, {fitted}" in caplog.text
    write_refine(own.fitted_config, tmp_path / "fitted.yaml")
    given = SAMRefineCallback(
        random_sam, num_classes=NUM_CLASSES, refine=str(tmp_path / "fitted.yaml")
    )
    assert "class_names are those of refine: 0, 1, 2" in caplog.text
    trainer(given).test(module, loader(6), verbose=False)
    assert f"with weights from refine, {fitted}" in caplog.text


def test_a_fit_of_epochs_uses_the_weights_of_the_epoch_before(random_sam, tmp_path):
    own = callback(random_sam)
    runner = trainer(own, max_epochs=2, logger=True, default_root_dir=tmp_path)
    runner.fit(Segmenter(), loader(4), loader())
    epochs = [entry for entry in own.history if entry["stage"] == "val"]
    assert len(epochs) == 2
    assert all("fitted_gain" in entry for entry in epochs)
    written = list(tmp_path.rglob("fitted.yaml"))
    assert [read_refine(path) for path in written] == [own.fitted_config]


def test_the_writer_takes_the_weights_of_the_callback(random_sam, tmp_path):
    own, module = callback(random_sam), ByColor().eval()
    writer = SAMRefineWriter(
        tmp_path / "pseudo", random_sam, num_classes=NUM_CLASSES, refine=REFINE, precision="32"
    )
    runner = trainer(own, writer)
    runner.validate(module, loader(), verbose=False)
    runner.predict(module, loader(3), return_predictions=False)
    assert writer.refine_config == own.fitted_config
    assert writer.counts.written == 3


def test_a_checkpoint_that_is_predicted_with_brings_its_weights(random_sam, tmp_path):
    own, module = callback(random_sam), ByColor().eval()
    runner = trainer(own)
    runner.validate(module, loader(), verbose=False)
    runner.save_checkpoint(tmp_path / "fitted.ckpt")
    writer = SAMRefineWriter(
        tmp_path / "pseudo", random_sam, num_classes=NUM_CLASSES, refine=REFINE, precision="32"
    )
    trainer(callback(random_sam), writer).predict(
        module, loader(3), ckpt_path=tmp_path / "fitted.ckpt", return_predictions=False
    )
    assert writer.refine_config == own.fitted_config
    assert writer.counts.written == 3


def test_the_writer_without_weights_refines_by_the_preset(random_sam, tmp_path):
    writer = SAMRefineWriter(
        tmp_path / "pseudo", random_sam, num_classes=NUM_CLASSES, refine=REFINE, precision="32"
    )
    trainer(writer).predict(ByColor().eval(), loader(3), return_predictions=False)
    assert writer.refine_config.weights is None
    assert writer.counts.written == 3


def test_ignored_targets_end_without_a_fit(random_sam):
    own = callback(random_sam)

    class Ignored(Blobs):
        def __getitem__(self, index):
            image, target = super().__getitem__(index)
            return image, torch.full_like(target, 255)

    trainer(own).validate(ByColor().eval(), DataLoader(Ignored(IMAGES), 2), verbose=False)
    assert own.fitted_config is None


class Perfect(ByColor):
    """Finds every class."""

    def forward(self, image):
        image = image.float() / 255
        return -99 * (image[:, None] - COLORS[None, :, :, None, None]).square().sum(dim=2)


class Shuffled(Blobs):
    """Every image with the labels of another one."""

    def __getitem__(self, index):
        return super().__getitem__(index)[0], super().__getitem__(index - 1)[1]


@pytest.mark.parametrize(("module", "data"), [(Perfect, Blobs), (ByColor, Shuffled)])
def test_nothing_to_gain_refines_nothing(random_sam, module, data):
    own, network = callback(random_sam), module().eval()
    runner, images = trainer(own), DataLoader(data(IMAGES), 2)
    runner.validate(network, images, verbose=False)
    assert not own.fitted_config.weights.refine
    (second,) = runner.validate(network, images, verbose=False)
    assert second["val/miou_refined"] == second["val/miou_raw"]


def test_classes_that_the_user_freezes_keep_their_pixels(random_sam):
    own = SAMRefineCallback(
        random_sam,
        num_classes=NUM_CLASSES,
        refine={**REFINE, "classes": [0, 2]},
        log="all",
        precision="32",
    )
    module, runner = ByColor().eval(), trainer(own)
    runner.validate(module, loader(), verbose=False)
    (logged,) = runner.validate(module, loader(), verbose=False)
    assert logged["val/iou_refined/1"] == logged["val/iou_raw/1"]
    assert own.fitted_config.classes == (0, 2)
