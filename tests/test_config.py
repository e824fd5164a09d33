"""RefineConfig refuses values before any work is done."""

import dataclasses
import subprocess
import sys

import pytest

from lightning_samrefine import RefineConfig


def test_algorithm4_has_the_published_thresholds_and_overrides_replace_fields():
    config = RefineConfig.preset("algorithm4", pred_iou_thresh=0.7)
    assert config == RefineConfig(0.1, 0.005, 0.7, stride=2, min_region_area=225)


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("score_thresh", 1.0, ValueError),
        ("score_thresh", -0.1, ValueError),
        ("score_thresh", float("nan"), ValueError),
        ("score_thresh", "0.5", TypeError),
        ("mask_prompt_scale", 10**400, ValueError),
        ("score_thresh", True, TypeError),
        ("mask_prompt_scale", 0, ValueError),
        ("mask_prompt_scale", float("inf"), ValueError),
        ("pred_iou_thresh", 1.01, ValueError),
        ("pred_iou_thresh", None, TypeError),
        ("stride", 0, ValueError),
        ("stride", 2.0, TypeError),
        ("min_region_area", 0, ValueError),
        ("max_regions", 0, ValueError),
        ("max_regions", 1.5, TypeError),
        ("max_prompts_per_batch", 0, ValueError),
        ("max_prompts_per_batch", 1.5, TypeError),
        ("classes", 3, TypeError),
        ("classes", "12", TypeError),
        ("classes", [1.0], TypeError),
        ("classes", [True], TypeError),
        ("classes", [-1], ValueError),
        ("classes", [2, 2], ValueError),
        ("class_pred_iou_thresh", [0.5], TypeError),
        ("class_pred_iou_thresh", {"sky": 0.5}, TypeError),
        ("class_pred_iou_thresh", {-1: 0.5}, ValueError),
        ("prompt_regions", 1, TypeError),
        ("mask_prompts", None, TypeError),
        ("encode_padding", 0, TypeError),
        ("points_per_side", -1, ValueError),
        ("points_per_side", 24, ValueError),  # without unsupported_weight
        ("unsupported_weight", 1.0, ValueError),
        ("crf_weight", -1.0, ValueError),
        ("crf_weight", 4.0, ValueError),  # without unsupported_weight
        ("color_weight", -1.0, ValueError),
        ("color_weight", 8.5, ValueError),
        ("color_weight", 1.3, ValueError),  # without unsupported_weight
        ("prompt_regions", False, ValueError),  # without points
    ],
)
def test_a_bad_value_is_refused_by_name(field, value, error):
    with pytest.raises(
        error, match=rf"{field} must be .*got|^classes must be|must be above 0 with {field}, got"
    ):
        RefineConfig(**{field: value})


def test_thresholds_of_single_classes_are_checked_and_copied():
    with pytest.raises(ValueError, match=r"class_pred_iou_thresh\[2\] must be .*, got 1.5"):
        RefineConfig(class_pred_iou_thresh={2: 1.5})
    own = {3: 0.7, 1: 0.2}
    config = RefineConfig(classes=[3, 1], class_pred_iou_thresh=own)
    own[1] = 9
    assert config.classes == (1, 3)
    assert config.class_pred_iou_thresh == {1: 0.2, 3: 0.7}
    assert list(config.class_pred_iou_thresh) == [1, 3]
    assert hash(config) == hash(RefineConfig(classes=(1, 3)))
    assert RefineConfig(classes=[]).classes == ()


def test_unknown_preset_and_field_are_refused():
    with pytest.raises(ValueError, match=r"preset must be .*'default', 'fast', got 'algoritm4'"):
        RefineConfig.preset("algoritm4")
    with pytest.raises(ValueError, match=r"preset must be .*, got \['default'\]"):
        RefineConfig.preset(["default"])
    with pytest.raises(TypeError, match=r"no field cls \(did you mean .*\), name; its"):
        RefineConfig.preset("default", **{"name": None, "cls": 1})
    with pytest.raises(TypeError, match=r"no field tau; its fields are .*pred_iou_thresh"):
        RefineConfig.preset("default", tau=0.3)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("unsuported_weight", r"unsuported_weight \(did you mean unsupported_weight\b"),
        ("iou_thresh", r"iou_thresh \(did you mean pred_iou_thresh\b"),
        ("colr_weight", r"colr_weight \(did you mean color_weight\b"),
    ],
)
def test_the_error_of_a_mistyped_field_lists_the_nearest_ones(name, hint):
    with pytest.raises(TypeError, match=rf"no field {hint}.*; its fields are "):
        RefineConfig.preset("fast", **{name: 0.1})


def test_it_is_frozen_and_hashable():
    config = RefineConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.stride = 3
    assert hash(config) == hash(RefineConfig())


def test_the_config_module_does_not_import_torch():
    code = "import sys, lightning_samrefine.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
