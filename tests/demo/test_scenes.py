"""Procedural scenes: exact maps, deterministic, every class drawn."""

from __future__ import annotations

import pytest
import torch

from lightning_samrefine.demo.scenes import CLASS_NAMES, ScenesDataset, make_scene


def test_same_arguments_same_scene() -> None:
    first = make_scene(3, 7)
    make_scene(3, 8)
    again = make_scene(3, 7)
    assert torch.equal(first.image, again.image)
    assert torch.equal(first.labels, again.labels)
    assert torch.equal(first.instances, again.instances)


@pytest.mark.parametrize(("seed", "index"), [(3, 8), (4, 7)])
def test_other_arguments_other_scene(seed: int, index: int) -> None:
    assert not torch.equal(make_scene(3, 7).image, make_scene(seed, index).image)


@pytest.mark.parametrize("size", [64, 96, 256])
def test_shapes_types_and_ranges(size: int) -> None:
    scene = make_scene(0, 0, size)
    assert scene.image.shape == (3, size, size)
    assert scene.image.dtype == torch.uint8
    assert scene.labels.shape == scene.instances.shape == (size, size)
    assert scene.labels.dtype == scene.instances.dtype == torch.int64
    assert 0 <= int(scene.labels.min()) <= int(scene.labels.max()) < len(CLASS_NAMES)
    assert int(scene.instances.min()) >= 0


def test_every_class_occurs_and_background_leads() -> None:
    counts = torch.zeros(len(CLASS_NAMES), dtype=torch.int64)
    for index in range(24):
        labels = make_scene(1, index).labels
        counts += torch.bincount(labels.flatten(), minlength=len(CLASS_NAMES))
    shares = counts / counts.sum()
    assert CLASS_NAMES[0] == "background"
    assert len(CLASS_NAMES) >= 6
    assert 0.5 < float(shares[0]) < 0.9
    assert bool((shares[1:] > 0.01).all())


@pytest.mark.parametrize("index", range(8))
def test_instances_agree_with_labels(index: int) -> None:
    scene = make_scene(2, index)
    assert torch.equal(scene.instances == 0, scene.labels == 0)
    for instance in scene.instances.unique().tolist():
        assert len(scene.labels[scene.instances == instance].unique()) == 1


def test_objects_stand_out_from_their_surroundings() -> None:
    distances = []
    for index in range(12):
        scene = make_scene(5, index)
        image = scene.image.float()
        background = image[:, scene.labels == 0].mean(1)
        for instance in scene.instances.unique().tolist()[1:]:
            distances.append((image[:, scene.instances == instance].mean(1) - background).norm())
    assert float(torch.stack(distances).median()) > 50


def test_color_alone_does_not_determine_the_class() -> None:
    # Nearest class mean in color, on objects it was fitted to: shape has to do the rest.
    colors, classes = [], []
    for index in range(60):
        scene = make_scene(6, index)
        for instance in scene.instances.unique().tolist()[1:]:
            inside = scene.instances == instance
            colors.append(scene.image[:, inside].float().mean(1))
            classes.append(int(scene.labels[inside][0]))
    color, label = torch.stack(colors), torch.tensor(classes)
    means = torch.stack([color[label == k].mean(0) for k in range(1, len(CLASS_NAMES))])
    guess = torch.cdist(color, means).argmin(1) + 1
    assert float((guess == label).float().mean()) < 0.65


def test_dataset_gives_the_scenes() -> None:
    dataset = ScenesDataset(seed=9, length=3, size=64)
    assert len(dataset) == 3
    item = dataset[2]
    scene = make_scene(9, 2, 64)
    assert set(item) == {"image", "mask"}
    assert torch.equal(item["image"], scene.image)
    assert torch.equal(item["mask"], scene.labels)
    with pytest.raises(IndexError, match="index"):
        dataset[3]
    assert len(list(dataset)) == 3


@pytest.mark.parametrize("arguments", [(-1, 0, 64), (0, -1, 64), (0, 0, 63)])
def test_bad_scene_arguments(arguments: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="got"):
        make_scene(*arguments)


@pytest.mark.parametrize("arguments", [(-1, 1, 64), (0, 0, 64), (0, 1, 8)])
def test_bad_dataset_arguments(arguments: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="got"):
        ScenesDataset(*arguments)
