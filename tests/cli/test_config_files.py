"""Thresholds from a YAML file, in Python and on the command line."""

from pathlib import Path

import pytest
from hydra.core.config_store import ConfigStore

from lightning_samrefine.callbacks.arguments import parse_refine
from lightning_samrefine.config import RefineConfig
from lightning_samrefine.config_files import check_refine_keys, read_refine, with_refine_files


def write(path, text):
    path.write_text(text)
    return str(path)


def test_what_a_file_leaves_out_is_the_default(tmp_path):
    path = write(tmp_path / "mine.yaml", "classes: [2, 0]\nclass_pred_iou_thresh: {2: 0.7}\n")
    expected = RefineConfig.preset("auto", classes=(0, 2), class_pred_iou_thresh={2: 0.7})
    assert read_refine(path) == expected
    assert parse_refine(path) == parse_refine(Path(path)) == expected
    path = write(tmp_path / "other.yml", "preset: algorithm4\nstride: 4\n")
    assert parse_refine(path) == RefineConfig.preset("algorithm4", stride=4)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("pred_iou_tresh: 0.7", TypeError, r"refine=\S+mine.yaml: RefineConfig has no field pred"),
        (
            "stride: half",
            TypeError,
            r"refine=\S+mine.yaml: stride must be .*, got 'half' of type str",
        ),
        ("- 1", ValueError, r"refine must be a file with .*, got \S+mine.yaml"),
        (None, FileNotFoundError, r"refine must be .*, got \S+mine.yaml, where there is none"),
    ],
)
def test_a_wrong_file_is_named(tmp_path, text, error, message):
    path = tmp_path / "mine.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(error, match=message):
        with_refine_files(["task=test", f"refine={path}"])


def test_files_become_options_and_other_arguments_stay(tmp_path):
    first = write(tmp_path / "tuned.yaml", "stride: 3")
    (tmp_path / "other").mkdir()
    second = write(tmp_path / "other" / "tuned.yaml", "stride: 5")
    arguments = ["-m", f"refine={first},fast,{second}", "refine.stride=2", "data=folder"]
    found = with_refine_files(arguments)
    assert [found[0], *found[2:]] == ["-m", "refine.stride=2", "data=folder"]
    one, preset, two = found[1].removeprefix("refine=").split(",")
    assert preset == "fast"
    strides = [
        ConfigStore.instance().load(f"refine/{name}.yaml").node.stride for name in (one, two)
    ]
    assert strides == [3, 5]


@pytest.mark.parametrize("sign", ["", "+", "++", "~"])
def test_a_mistyped_threshold_of_the_command_line_is_named(sign):
    with pytest.raises(
        TypeError, match=r"^refine\.unsuported: .*did you mean unsupported_weight\b"
    ):
        check_refine_keys(["-m", f"{sign}refine.unsuported=0.1,0.2"])


def test_thresholds_of_the_command_line_pass():
    check_refine_keys(
        [
            "refine=fast",
            "refine.unsupported_weight=0.1",
            "++refine.class_pred_iou_thresh.3=0.7",
            "+refine.class_pred_iou_thresh={3: 0.7}",
            "~refine.crf_weight",
            "other.refine.tau=1",
            "refiner.tau=1",
        ]
    )


@pytest.mark.parametrize("name", ["fats", "bets", "fast.yam"])
def test_the_error_of_an_unknown_preset_has_the_argument(name):
    with pytest.raises(ValueError, match=f"^refine must be .*'fast'.*\\.yaml.*, got '{name}'"):
        parse_refine(name)
