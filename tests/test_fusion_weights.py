"""Fitted weights survive a file, and a damaged file is refused by name."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from stub_sams import FixedSam

from lightning_samrefine import Refiner, SAMRefineCallback, SAMRefineWriter
from lightning_samrefine.config import RefineConfig
from lightning_samrefine.config_files import read_refine, write_refine
from lightning_samrefine.fusion_weights import (
    FEATURES,
    FusionWeights,
    LogLinear,
)

CLASSES = ("road", "sky", "true")  # YAML takes an unquoted true for a bool
NUMBERS = st.floats(-1e6, 1e6)


def weights() -> FusionWeights:
    return FusionWeights(
        fusion=LogLinear(FEATURES, (0.1, 1.0, 1e-05, -2.5), (0.1 + 0.2, 0.0, -1e-12)),
        control=LogLinear(("raw", "color"), (0.9, 0.3), (0.0, 0.25, 0.0)),
        classes=CLASSES,
        frozen_classes=(0, 2),
        images=31,
        found="Refining adds +2.1 (1.6…2.7) to mIoU: +0.4 without SAM",
        sam="vit_t",
    )


def test_a_file_gives_back_what_was_saved(tmp_path: Path):
    path = tmp_path / "fitted.yaml"
    config = RefineConfig.preset("auto", pred_iou_thresh=0.6, weights=weights())
    write_refine(config, path, ["fitted to 31 images"])
    assert read_refine(path) == config
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# fitted to 31 images\n")
    assert yaml.safe_load(text)["weights"]["frozen_classes"] == ["road", "true"]


@given(st.lists(NUMBERS, min_size=4, max_size=4), st.lists(NUMBERS, min_size=3, max_size=3))
def test_every_number_survives_yaml(values: list[float], biases: list[float]):
    given_weights = FusionWeights(
        fusion=LogLinear(FEATURES, tuple(values), tuple(biases)),
        control=LogLinear(("raw",), (values[0],), tuple(biases)),
        classes=CLASSES,
        refine=False,
    )
    text = yaml.safe_dump(given_weights.to_mapping())
    assert FusionWeights.from_mapping(yaml.safe_load(text)) == given_weights


def damaged(key: str, value: object) -> dict:
    values = copy.deepcopy(weights().to_mapping())
    *outer, last = key.split(".")
    inside = values
    for name in outer:
        inside = inside[name]
    if value is KeyError:
        del inside[last]
    else:
        inside[last] = value
    return values


@pytest.mark.parametrize(
    ("key", "value", "error", "message"),
    [
        ("features", KeyError, ValueError, "keys must be refine, classes, features"),
        ("speed", 3, ValueError, "keys must be .* got .*speed"),
        ("features", [1, 2], TypeError, "features must be a mapping"),
        ("features.raw", "much", TypeError, "features.raw must be a number, got 'much'"),
        ("features.raw", True, TypeError, "features.raw must be a number, got True"),
        ("features.raw", float("nan"), ValueError, "weights must be finite"),
        ("features.entropy", 1.0, ValueError, "features must be 'raw' and any of"),
        ("biases.sky", KeyError, ValueError, "biases must be road, sky, true, got road, true"),
        ("biases.tree", 0.0, ValueError, "biases must be road, sky, true"),
        ("control", None, TypeError, "control must be a mapping, got None"),
        ("control.biases", KeyError, ValueError, "control must be features, biases"),
        ("control.features.region_votes", 1.0, ValueError, "control.features must be without SAM"),
        ("classes", "road", TypeError, "classes must be a list of strings"),
        ("classes", ["road", "sky", True], TypeError, "classes must be a list of strings"),
        ("classes", ["road", "sky", "sky", "true"], ValueError, "classes must be different"),
        ("classes", [], ValueError, "frozen_classes must be among"),
        ("frozen_classes", ["tree"], ValueError, "frozen_classes must be among .*, got tree"),
        ("frozen_classes", ["sky", "sky"], ValueError, "frozen_classes must be different"),
        ("frozen_classes", "sky", TypeError, "frozen_classes must be a list"),
        ("refine", "yes", TypeError, "refine must be true or false, got 'yes'"),
        (
            "images",
            2.5,
            TypeError,
            "images must be an integer of at least 0, got 2.5 of type float",
        ),
        ("images", -1, ValueError, "images must be an integer of at least 0, got -1"),
        ("found", 7, TypeError, "found must be a string, got 7"),
    ],
)
def test_a_damaged_file_is_refused(key, value, error, message, tmp_path: Path):
    path = tmp_path / "damaged.yaml"
    path.write_text(yaml.safe_dump({"weights": damaged(key, value)}), encoding="utf-8")
    with pytest.raises(error, match=f"damaged.yaml: weights: .*{message}"):
        read_refine(path)


@pytest.mark.parametrize("value", [3, "fitted", [1, 2]])
def test_what_is_no_weights_is_refused(value: object):
    with pytest.raises(TypeError, match="weights must be FusionWeights, a mapping"):
        RefineConfig.preset("auto", weights=value)


def test_weights_decide_the_classes():
    assert RefineConfig.preset("auto", weights=weights()).class_names == CLASSES
    with pytest.raises(ValueError, match="class_names must be those of weights, road, sky, true"):
        RefineConfig.preset("auto", weights=weights(), class_names=("road", "sky"))


@pytest.mark.parametrize(
    "fields", [{"points_per_side": 8}, {"points_per_side": 8, "prompt_regions": False}]
)
def test_weights_go_with_region_prompts_alone(fields: dict):
    with pytest.raises(ValueError, match="weights must be None without region prompts"):
        RefineConfig.preset("auto", **fields)


def test_another_sam_is_refused_before_it_is_loaded(tmp_path: Path):
    path = tmp_path / "fitted.yaml"
    write_refine(RefineConfig.preset("auto", weights=weights()), path)
    expected = "sam must be 'vit_t', the model that the weights were fitted with, got "
    with pytest.raises(ValueError, match=f"{expected}'tiny'"):
        SAMRefineCallback("tiny", refine=str(path))
    with pytest.raises(ValueError, match=f"{expected}'tiny'"):
        SAMRefineWriter(tmp_path / "labels", "tiny", refine=str(path))
    with pytest.raises(ValueError, match=f"{expected}'stub'"):
        Refiner(FixedSam((4, 4)), read_refine(path))
    assert SAMRefineCallback("vit_t", refine=str(path)).class_names == list(CLASSES)


def test_a_file_without_a_sam_is_read():
    values = weights().to_mapping()
    del values["sam"]
    assert FusionWeights.from_mapping(values) == replace(weights(), sam="")


def test_weights_need_the_soft_masks():
    with pytest.raises(ValueError, match="unsupported_weight must be above 0 with weights"):
        RefineConfig(weights="auto")
