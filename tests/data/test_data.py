"""Folders, torchvision's sets, stored predictions and torchvision's networks as Lightning parts."""

import re

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from PIL import Image
from torchvision.models import get_model

from lightning_samrefine.data import FolderDataModule, TorchvisionDataModule
from lightning_samrefine.data.samples import read_probs, stored_array
from lightning_samrefine.segmenters import StoredPredictions, TorchvisionSegmenter

HEIGHT, WIDTH, CLASSES = 6, 8, 3


def label_map(seed, size=(HEIGHT, WIDTH), high=CLASSES):
    return np.random.default_rng(seed).integers(0, high, size).astype(np.uint8)


def save(array, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    """Three samples, a, b and c, without predictions."""
    for seed, stem in enumerate("abc"):
        rng = np.random.default_rng(seed)
        image = rng.integers(0, 256, (HEIGHT, WIDTH, 3)).astype(np.uint8)
        save(image, tmp_path / "images" / f"{stem}.png")
        save(label_map(seed), tmp_path / "labels" / f"{stem}.png")
    return tmp_path


def split(folder, **more):
    return {"images": folder / "images", "labels": str(folder / "labels"), **more}


def samples(folder, num_classes=CLASSES, ignore_index=255, batch_size=1, **more):
    data = FolderDataModule(
        num_classes=num_classes,
        ignore_index=ignore_index,
        val=split(folder, **more),
        batch_size=batch_size,
    )
    data.setup("validate")
    return list(data.val_dataloader())


def store(folder, arrays, **kind):
    """Write one npz a sample; returns the folder."""
    out = folder / "predictions"
    out.mkdir(exist_ok=True)
    for stem, array in zip("abc", arrays, strict=True):
        np.savez_compressed(out / f"{stem}.npz", **{k: f(array) for k, f in kind.items()})
    return out


# --- folders -------------------------------------------------------------------------------------


def test_samples_hold_what_the_files_hold(folder):
    batches = samples(folder)
    assert [batch["name"] for batch in batches] == [["a"], ["b"], ["c"]]
    for seed, batch in enumerate(batches):
        assert set(batch) == {"image", "mask", "name", "folder"}
        pixels = np.array(Image.open(folder / "images" / f"{'abc'[seed]}.png"))
        assert batch["image"].dtype == torch.uint8
        assert np.array_equal(batch["image"][0].permute(1, 2, 0).numpy(), pixels)
        assert batch["mask"].dtype == torch.int64
        assert np.array_equal(batch["mask"][0].numpy(), label_map(seed))


def test_images_of_other_kinds_become_rgb(folder):
    gray = np.arange(HEIGHT * WIDTH, dtype=np.uint8).reshape(HEIGHT, WIDTH)
    (folder / "images" / "a.png").unlink()
    Image.fromarray(gray).save(folder / "images" / "a.webp", lossless=True)
    palette = Image.fromarray(gray % 2)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.save(folder / "images" / "b.png")
    first, second, _ = samples(folder)
    assert np.array_equal(first["image"][0].numpy(), np.stack([gray] * 3))
    assert second["image"][0, :, 0, 1].tolist() == [40, 50, 60]


def test_16_bit_images_are_refused(folder):
    save(np.full((HEIGHT, WIDTH), 40000, np.uint16), folder / "images" / "a.png")
    with pytest.raises(ValueError, match=r"a\.png must be an 8-bit image.*mode 'I;16'"):
        samples(folder)


@pytest.mark.parametrize("kind", ["uint16", "palette", "one bit"])
def test_label_maps_of_every_kind_become_indices(folder, kind):
    labels = label_map(7, high=2)
    path = folder / "labels" / "a.png"
    if kind == "uint16":
        labels = labels.astype(np.uint16) * 300
        save(labels, path)
    elif kind == "palette":
        image = Image.fromarray(labels)
        image.putpalette([200, 0, 0, 0, 200, 0])
        image.save(path)
    else:
        Image.fromarray(labels.astype(bool)).save(path)
    assert np.array_equal(samples(folder, num_classes=301)[0]["mask"][0].numpy(), labels)


def test_color_coded_label_maps_are_refused(folder):
    save(np.zeros((HEIGHT, WIDTH, 3), np.uint8), folder / "labels" / "b.png")
    with pytest.raises(ValueError, match=r"b\.png must have one channel.*mode 'RGB'"):
        samples(folder)


def test_unknown_label_values_are_refused_and_the_ignored_is_not(folder):
    labels = label_map(0)
    labels[0, 0] = 11
    save(labels, folder / "labels" / "a.png")
    assert samples(folder, ignore_index=11)[0]["mask"][0, 0, 0] == 11
    for ignore_index in (255, None):
        with pytest.raises(
            ValueError, match=r"a\.png: the label map must hold class indices 0 to 2.*got 11 in"
        ):
            samples(folder, ignore_index=ignore_index)


def test_stems_choose_and_order_the_samples(folder):
    (folder / "val.txt").write_text("c\n\na\n")
    names = [batch["name"][0] for batch in samples(folder, stems=folder / "val.txt")]
    assert names == ["c", "a"]
    (folder / "val.txt").write_text("c\na\nc\n")
    with pytest.raises(ValueError, match=r"val\.txt must have .*, got c more than once"):
        samples(folder, stems=folder / "val.txt")


def test_predicted_label_maps(folder):
    for seed, stem in enumerate("abc"):
        save(label_map(seed + 10), folder / "predictions" / f"{stem}.png")
    unknown = np.full((HEIGHT, WIDTH), 255, np.uint8)
    save(unknown, folder / "predictions" / "c.png")
    batches = samples(folder, predictions=folder / "predictions")
    assert np.array_equal(batches[1]["prediction"][0].numpy(), label_map(11))
    assert batches[1]["prediction"].dtype == torch.int64
    assert (batches[2]["prediction"] == 255).all()


@pytest.mark.parametrize(
    ("kind", "tolerance"),
    [
        ({"probs": lambda p: p}, 0),
        ({"probs": lambda p: p.astype(np.float16)}, 1e-3),
        ({"probs": lambda p: np.round(p * 255).astype(np.uint8)}, 8e-3),
        ({"logits": lambda p: np.log(p) + 5}, 1e-6),
    ],
)
def test_stored_scores_become_probabilities(folder, kind, tolerance):
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.ones(CLASSES), (3, HEIGHT, WIDTH)).transpose(0, 3, 1, 2)
    probs = probs.astype(np.float32)
    batches = samples(folder, predictions=store(folder, probs, **kind))
    for expected, batch in zip(probs, batches, strict=True):
        assert batch["probs"].dtype == torch.float32
        assert "prediction" not in batch
        # What the callback takes for probabilities by default.
        assert (batch["probs"].sum(dim=1) - 1).abs().max() < 5e-4
        np.testing.assert_allclose(batch["probs"][0].numpy(), expected, atol=tolerance, rtol=0)


def test_the_shape_of_a_stored_array_is_read_from_its_header(tmp_path):
    np.savez(tmp_path / "x.npz", logits=np.zeros((2, 3, 4)), other=np.zeros(1))
    assert stored_array(tmp_path / "x.npz") == ("logits", (2, 3, 4))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"probs": np.full((3, 6, 8), 1.5)}, "values from 1.5 to 1.5.*store unnormalized"),
        (
            {"probs": np.full((3, 6, 8), 0.5)},
            "must sum to 1 over the classes, .*got 1.5 to 1.5",
        ),
        ({"probs": np.full((3, 6, 8), np.nan)}, "must be finite"),
        ({"logits": np.zeros((3, 6, 8), np.int64)}, "'logits' must be floats.*got int64"),
        (
            {"scores": np.zeros((3, 6, 8))},
            "must hold either 'probs'.*got the arrays scores",
        ),
        (
            {"probs": np.zeros((3, 6, 8)), "logits": np.zeros((3, 6, 8))},
            "got the arrays probs, logits",
        ),
    ],
)
def test_unusable_stored_arrays_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(ValueError, match=rf"x\.npz:? .*{message}"):
        read_probs(tmp_path / "x.npz")


def test_missing_files_are_named_before_any_sample_is_read(folder):
    (folder / "labels" / "b.png").unlink()
    data = FolderDataModule(num_classes=CLASSES, val=split(folder))
    with pytest.raises(
        FileNotFoundError, match=r"one label map for each of 3 stems, got none for 1: b$"
    ):
        data.setup("validate")


def test_many_missing_stems_are_counted_not_listed(folder):
    (folder / "val.txt").write_text("\n".join(f"s{i}" for i in range(9)))
    with pytest.raises(
        FileNotFoundError, match=r"each of 9 stems, got none for 9: s0, .*s4 and 4 more"
    ):
        samples(folder, stems=folder / "val.txt")


@pytest.mark.parametrize("key", ["images", "labels", "predictions", "stems"])
def test_missing_folders_are_named(folder, key):
    data = FolderDataModule(num_classes=CLASSES, val=split(folder) | {key: folder / "nowhere"})
    with pytest.raises(FileNotFoundError, match=rf"{key} must be a f\w+, got .*nowhere"):
        data.setup("validate")


def test_two_images_of_one_stem_are_refused(folder):
    save(np.zeros((HEIGHT, WIDTH, 3), np.uint8), folder / "images" / "a.jpg")
    with pytest.raises(ValueError, match=r"one file for each stem, got a\.jpg and a\.png"):
        samples(folder)


@pytest.mark.parametrize("what", ["labels", "png prediction", "npz prediction"])
def test_sizes_that_differ_are_named_before_any_sample_is_read(folder, what):
    other = label_map(0, size=(HEIGHT, WIDTH + 1))
    more = {}
    if what == "labels":
        path = save(other, folder / "labels" / "b.png")
    else:
        more = {"predictions": store(folder, np.zeros((3, CLASSES, HEIGHT, WIDTH)), probs=np.copy)}
        path = folder / "predictions" / "b.npz"
        if what == "npz prediction":
            np.savez(path, probs=np.zeros((CLASSES + 1, HEIGHT, WIDTH)))
        else:
            path.unlink()
            path = save(other, path.with_suffix(".png"))
    data = FolderDataModule(num_classes=CLASSES, val=split(folder, **more))
    with pytest.raises(ValueError, match=rf"{path.parent.name}/{path.name} must .* its image b"):
        data.setup("validate")


def test_batches_need_images_of_one_size(folder):
    assert samples(folder, batch_size=3)[0]["image"].shape == (3, 3, HEIGHT, WIDTH)
    save(np.zeros((HEIGHT + 1, WIDTH, 3), np.uint8), folder / "images" / "b.png")
    save(label_map(0, size=(HEIGHT + 1, WIDTH)), folder / "labels" / "b.png")
    assert len(samples(folder)) == 3
    # Found in setup, before any sample is read.
    data = FolderDataModule(num_classes=CLASSES, val=split(folder), batch_size=2)
    with pytest.raises(ValueError, match=r"batch_size must be 1 .*got 2: a is 8x6, b is 8x7"):
        data.setup("validate")


def test_the_error_of_a_stage_without_its_split_has_its_name(folder):
    data = FolderDataModule(num_classes=CLASSES, val=split(folder), test={"images": None})
    assert data.has_split("val")
    assert not data.has_split("test")
    for stage, name in (("test", "test"), ("fit", "train")):
        with pytest.raises(
            MisconfigurationException, match=rf"data\.{name} must be set.*, got val"
        ):
            data.setup(stage)


def test_train_is_shuffled_by_the_seed_and_val_is_optional(folder):
    data = FolderDataModule(num_classes=CLASSES, train=split(folder))
    data.setup("fit")
    assert data.val_dataloader() == []
    orders = set()
    for seed in range(8):
        torch.manual_seed(seed)
        orders.add("".join(batch["name"][0] for batch in data.train_dataloader()))
    assert len(orders) > 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "num_classes or class_names must be set, got neither"),
        (
            {"num_classes": 2, "class_names": ["a"]},
            ValueError,
            "class_names must be .*, got 1",
        ),
        ({"num_classes": 2, "batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        (
            {"num_classes": 2, "val": "images"},
            TypeError,
            "val must be a mapping .*, got 'images'",
        ),
        ({"num_classes": 2, "val": {"image": "x"}}, TypeError, "val must be a mapping with images"),
        (
            {"num_classes": 2, "val": {"images": "x"}},
            ValueError,
            "val must have images and labels, got images",
        ),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        FolderDataModule(**arguments)


def test_class_names_give_the_number_of_classes():
    data = FolderDataModule(class_names=("sky", "road"))
    assert (data.num_classes, data.class_names) == (2, ["sky", "road"])


# --- torchvision's sets --------------------------------------------------------------------------


def fake_voc(root, stems, image_set="val", year="2012"):
    base = root / "VOCdevkit" / f"VOC{year}"
    (base / "ImageSets" / "Segmentation").mkdir(parents=True, exist_ok=True)
    (base / "ImageSets" / "Segmentation" / f"{image_set}.txt").write_text("\n".join(stems) + "\n")
    for seed, stem in enumerate(stems):
        size = (HEIGHT + seed, WIDTH)
        save(np.zeros((*size, 3), np.uint8), base / "JPEGImages" / f"{stem}.jpg")
        labels = label_map(seed, size, high=21)
        labels[0, 0] = 255
        image = Image.fromarray(labels)
        image.putpalette([value for value in range(256) for _ in range(3)])
        (base / "SegmentationClass").mkdir(exist_ok=True)
        image.save(base / "SegmentationClass" / f"{stem}.png")


def test_voc_has_its_classes_and_ignores_the_border(tmp_path):
    fake_voc(tmp_path, ["2007_000033", "2007_000042"])
    data = TorchvisionDataModule("voc", tmp_path)
    assert (data.num_classes, data.class_names[15], data.ignore_index) == (21, "person", 255)
    for stage, loader in (("validate", data.val_dataloader), ("test", data.test_dataloader)):
        data.setup(stage)
        batches = list(loader())
        assert [batch["name"][0] for batch in batches] == ["2007_000033", "2007_000042"]
        assert batches[1]["image"].shape == (1, 3, HEIGHT + 1, WIDTH)
        expected = label_map(1, (HEIGHT + 1, WIDTH), high=21)
        expected[0, 0] = 255
        assert np.array_equal(batches[1]["mask"][0].numpy(), expected)


def test_voc_2007_has_a_test_set_of_its_own(tmp_path):
    fake_voc(tmp_path, ["000001"], image_set="test", year="2007")
    data = TorchvisionDataModule("voc", tmp_path, year="2007")
    data.setup("test")
    assert [batch["name"] for batch in data.test_dataloader()] == [["000001"]]


def test_voc_images_of_different_sizes_cannot_share_a_batch(tmp_path):
    fake_voc(tmp_path, ["x", "y"])
    data = TorchvisionDataModule("voc", tmp_path, batch_size=2)
    with pytest.raises(ValueError, match=r"batch_size must be 1 .*got 2: x is 8x6, y is 8x7"):
        next(iter(data.val_dataloader()))


def fake_pets(root, count):
    base = root / "oxford-iiit-pet"
    (base / "annotations" / "trimaps").mkdir(parents=True)
    for image_set, prefix in (("trainval", "Beagle"), ("test", "Pug")):
        stems = [f"{prefix}_{i}" for i in range(count)]
        rows = [f"{stem} 1 2 1" for stem in stems]
        (base / "annotations" / f"{image_set}.txt").write_text("\n".join(rows) + "\n")
        for stem in stems:
            save(np.zeros((1, 3, 3), np.uint8), base / "images" / f"{stem}.jpg")
            trimap = np.array([[1, 2, 3]], np.uint8)
            save(trimap, base / "annotations" / "trimaps" / f"{stem}.png")


@pytest.mark.parametrize(
    ("border", "classes", "mask"), [("ignore", 2, [1, 0, 255]), ("class", 3, [1, 0, 2])]
)
def test_pets_map_their_trimaps(tmp_path, border, classes, mask):
    fake_pets(tmp_path, 2)
    data = TorchvisionDataModule("pet", tmp_path, border=border)
    assert data.num_classes == len(data.class_names) == classes
    data.setup("test")
    batches = list(data.test_dataloader())
    assert [batch["name"] for batch in batches] == [["Pug_0"], ["Pug_1"]]
    assert batches[0]["mask"].tolist() == [[mask]]


def test_pets_keep_every_tenth_image_for_validation(tmp_path):
    fake_pets(tmp_path, 21)
    data = TorchvisionDataModule("pet", tmp_path)
    data.setup("fit")
    names = {
        split: {batch["name"][0] for batch in loader()}
        for split, loader in (("train", data.train_dataloader), ("val", data.val_dataloader))
    }
    assert names["val"] == {"Beagle_0", "Beagle_10", "Beagle_20"}
    assert len(names["train"]) == 18
    assert not names["train"] & names["val"]


@pytest.mark.parametrize(("dataset", "folder"), [("voc", "VOCdevkit"), ("pet", "oxford-iiit-pet")])
def test_the_error_of_an_absent_set_has_what_the_root_should_hold(tmp_path, dataset, folder):
    data = TorchvisionDataModule(dataset, tmp_path)
    message = rf"root must hold .* {dataset} .*{folder}, got {re.escape(str(tmp_path))}.*download="
    with pytest.raises(FileNotFoundError, match=message):
        data.setup("validate")


@pytest.mark.parametrize("wrong", [{"dataset": "coco"}, {"border": "skip"}, {"year": "2013"}])
def test_unknown_choices(tmp_path, wrong):
    (key,) = wrong
    with pytest.raises(ValueError, match=rf"{key} must be one of '.*, got '\w+'"):
        TorchvisionDataModule(**{"dataset": "voc", "root": tmp_path} | wrong)


# --- segmenters ----------------------------------------------------------------------------------


def test_stored_predictions_come_back_as_they_are():
    segmenter = StoredPredictions()
    batch = {"image": torch.zeros(1, 3, 2, 2), "probs": torch.rand(1, 2, 2, 2)}
    for step in (segmenter.validation_step, segmenter.test_step):
        out = step(batch, 0)
        assert set(out) == {"probs"}
        assert out["probs"] is batch["probs"]
        with pytest.raises(MisconfigurationException, match=r"prediction or probs, got image"):
            step({"image": batch["image"]}, 0)


@pytest.fixture(scope="module")
def lraspp():
    torch.manual_seed(0)
    return TorchvisionSegmenter(4, "lraspp_mobilenet_v3_large").eval()


def test_torchvision_segmenter_normalizes_and_ignores(lraspp):
    image = torch.randint(0, 256, (2, 3, 32, 40), dtype=torch.uint8)
    mask = torch.randint(0, 4, (2, 32, 40))
    mask[:, :5] = 255
    out = lraspp.validation_step({"image": image, "mask": mask}, 0)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = (image / 255 - mean[:, None, None]) / std[:, None, None]
    expected = lraspp.network(x)["out"]
    torch.testing.assert_close(out["logits"], expected)
    log_probs = expected.log_softmax(dim=1)[:, :, 5:].gather(1, mask[:, None, 5:])
    torch.testing.assert_close(out["loss"], -log_probs.mean())
    nothing = lraspp.validation_step({"image": image, "mask": torch.full_like(mask, 255)}, 0)
    assert nothing["loss"] == 0


def test_torchvision_checkpoint_comes_back(lraspp, tmp_path):
    torch.save({"model": lraspp.network.state_dict()}, tmp_path / "w.pth")
    torch.manual_seed(1)
    again = TorchvisionSegmenter(4, "lraspp_mobilenet_v3_large", checkpoint=tmp_path / "w.pth")
    image = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    torch.testing.assert_close(again.eval()(image), lraspp(image))


def test_torchvision_checkpoint_with_an_auxiliary_head_trains_it(tmp_path):
    torch.manual_seed(0)
    trained = get_model(
        "deeplabv3_mobilenet_v3_large", weights_backbone=None, num_classes=2, aux_loss=True
    )
    torch.save(trained.state_dict(), tmp_path / "w.pth")
    segmenter = TorchvisionSegmenter(2, checkpoint=tmp_path / "w.pth")
    batch = {
        "image": torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8),
        "mask": torch.randint(0, 2, (2, 32, 32)),
    }
    segmenter.training_step(batch, 0).backward()
    heads = (segmenter.network.classifier, segmenter.network.aux_classifier)
    assert all(head[-1].weight.grad.abs().sum() > 0 for head in heads)


def test_wrong_torchvision_checkpoints_are_explained(lraspp, tmp_path):
    torch.save(lraspp.network.state_dict(), tmp_path / "w.pth")
    with pytest.raises(
        ValueError, match=r"state dict of lraspp.* does not fit: \d+ of another shape"
    ):
        TorchvisionSegmenter(5, "lraspp_mobilenet_v3_large", checkpoint=tmp_path / "w.pth")
    (tmp_path / "text.pth").write_text("no tensors")
    with pytest.raises(ValueError, match=r"got .*text\.pth., which cannot be read as weights"):
        TorchvisionSegmenter(4, "lraspp_mobilenet_v3_large", checkpoint=tmp_path / "text.pth")
    with pytest.raises(FileNotFoundError, match=r"checkpoint must .*nowhere., which is not a"):
        TorchvisionSegmenter(4, "lraspp_mobilenet_v3_large", checkpoint=tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"architecture must be one of .*lraspp.*, got 'unet'"):
        TorchvisionSegmenter(4, "unet")
