"""The YAML files compose, agree with the code that they configure, and ship in the wheel."""

import dataclasses
import importlib.util
import inspect
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException
from hydra.utils import get_class
from omegaconf import OmegaConf

from lightning_samrefine.cli.build import INHERITED
from lightning_samrefine.cli.main import config_dir
from lightning_samrefine.config import PRESETS, RefineConfig

ROOT = Path(__file__).parents[2]


def composed(*overrides):
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return compose("samrefine", overrides=["output_dir=OUT", *overrides])


def options(group):
    return sorted(path.stem for path in (config_dir() / group).glob("*.yaml"))


GROUPS = sorted(path.name for path in config_dir().iterdir() if path.is_dir())


def test_there_are_the_promised_groups():
    assert GROUPS == [
        "callback",
        "data",
        "logger",
        "refine",
        "sam",
        "segmenter",
        "trainer",
        "writer",
    ]


@pytest.mark.parametrize("group", GROUPS)
def test_every_option_composes_and_its_targets_exist(group):
    for option in options(group):
        cfg = composed(f"{group}={option}")
        node = cfg[group]
        for target in [node, *(node.values() if group == "logger" else ())]:
            if not OmegaConf.is_dict(target) or OmegaConf.is_missing(target, "_target_"):
                continue
            if "_target_" not in target:
                continue
            accepted = inspect.signature(get_class(target._target_)).parameters
            assert {key for key in target if not key.startswith("_")} <= set(accepted), option


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_refine_presets_are_the_presets_of_the_code(name):
    refine = OmegaConf.to_container(composed(f"refine={name}").refine)
    assert refine == dataclasses.asdict(RefineConfig.preset(name))


def test_every_preset_of_the_code_has_a_file_and_the_reverse():
    assert options("refine") == sorted(PRESETS)


def test_the_callback_config_holds_the_callbacks_own_defaults():
    node = composed().callback
    parameters = inspect.signature(get_class(node._target_)).parameters
    from_groups = {"sam", "checkpoint", "refine"}
    assert {key for key in node if not key.startswith("_")} == set(parameters) - from_groups
    # The command draws panels and a report unasked; a callback in somebody's Trainer does not.
    for key in set(parameters) - from_groups - set(INHERITED) - {"panels", "report"}:
        assert node[key] == parameters[key].default, key


def test_the_writer_config_holds_the_writers_own_defaults():
    node = composed("task=predict").writer
    parameters = inspect.signature(get_class(node._target_)).parameters
    from_groups = {"sam", "checkpoint", "refine"}
    assert {key for key in node if not key.startswith("_")} == set(parameters) - from_groups
    assert node.folder == "OUT/predictions"
    for key in set(parameters) - from_groups - set(INHERITED) - {"folder"}:
        assert node[key] == parameters[key].default, key


@pytest.mark.parametrize("name", ["vit_t", "vit_b", "vit_l", "vit_h"])
def test_published_sams_need_no_checkpoint(name):
    cfg = composed(f"sam={name}")
    assert (cfg.sam.name, cfg.sam.checkpoint) == (name, None)
    assert OmegaConf.missing_keys(cfg) == set()


def test_a_model_of_transformers_needs_an_id_or_a_folder():
    cfg = composed("sam=hf")
    assert cfg.sam.name == "hf"
    assert OmegaConf.missing_keys(cfg) == {"sam.model"}


def test_both_loggers_keep_apart_in_the_output_folder():
    cfg = composed("logger=csv_tensorboard")
    assert list(cfg.logger) == ["csv", "tensorboard"]
    folders = {(node.save_dir, node.name, node.version) for node in cfg.logger.values()}
    assert folders == {("OUT", "csv", ""), ("OUT", "tensorboard", "")}


@pytest.mark.parametrize(
    "typo", ["refine.pred_iou_tresh=0.7", "data.num_clases=2", "callback.max_batch=1", "tsk=fit"]
)
def test_mistyped_keys_are_rejected(typo):
    key = typo.split("=")[0].split(".")[-1]
    with pytest.raises(ConfigCompositionException, match=typo.split("=")[0]) as info:
        composed(typo)
    assert f"Key '{key}' is not in" in str(info.value.__cause__)


def test_overrides_reach_their_place():
    cfg = composed(
        "data=folder", "refine=algorithm4", "refine.pred_iou_thresh=0.7", "data.val.images=/x"
    )
    assert (cfg.refine.min_region_area, cfg.refine.pred_iou_thresh) == (225, 0.7)
    assert cfg.data.val.images == "/x"


@pytest.mark.skipif(
    importlib.util.find_spec("hatchling") is None, reason="hatchling, the build backend, is absent"
)
@pytest.mark.slow
def test_the_wheel_holds_the_configs_where_the_app_looks(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    environment = os.environ | {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    subprocess.run([*build, "-w", str(tmp_path), str(ROOT)], check=True, env=environment)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if name.endswith(".yaml")}
        group = ROOT / "lightning_samrefine" / "searchpath"
        assert held == {
            f"lightning_samrefine/{name}/{path.relative_to(folder).as_posix()}"
            for name, folder in (("configs", config_dir()), ("searchpath", group))
            for path in folder.rglob("*.yaml")
        }
        page = {
            "lightning_samrefine/reporting/report/template.html",
            "lightning_samrefine/reporting/report/report.js",
        }
        assert page <= set(archive.namelist())
        # Hydra imports every module of hydra_plugins; of ours there is one, and no second copy.
        plugin = "hydra_plugins/lightning_samrefine_searchpath.py"
        assert plugin in archive.namelist()
        assert "lightning_samrefine/cli/hydra_plugin.py" not in archive.namelist()
        archive.extractall(tmp_path / "site")
    # Out of the checkout, without torch: where the unpacked package finds its configs.
    find = "from lightning_samrefine.cli.main import config_dir; print(config_dir())"
    isolated = environment | {"PYTHONPATH": str(tmp_path / "site")}
    found = subprocess.run(
        [sys.executable, "-c", find], env=isolated, cwd=tmp_path, capture_output=True, text=True
    )
    assert found.stdout.strip() == str(tmp_path / "site" / "lightning_samrefine" / "configs")


def test_pyproject_puts_the_configs_where_the_app_looks():
    settings = (ROOT / "pyproject.toml").read_text()
    assert '"configs" = "lightning_samrefine/configs"' in settings
    assert 'samrefine = "lightning_samrefine.cli.main:main"' in settings
