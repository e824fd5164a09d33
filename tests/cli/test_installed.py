"""The wheel, installed: in somebody else's Hydra app, in LightningCLI, and in sweeps."""

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from command_runs import overrides
from omegaconf import OmegaConf

from lightning_samrefine.cli.hydra_presets import storable_type
from lightning_samrefine.config import PRESETS, RefineConfig

ROOT = Path(__file__).parents[2]
HELPERS = ROOT / "tests" / "helpers"
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
TINY = [
    "callbacks.sam_refine.sam=tiny",
    "callbacks.sam_refine.num_classes=2",
    "callbacks.sam_refine.refine.min_region_area=4",
]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("hatchling") is None,
        reason="hatchling, the build backend, is absent",
    ),
]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder that the wheel was installed to; it hides the checkout."""
    built, target = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("site")
    build = [*PIP, "wheel", "--no-index", "--no-deps", "--no-build-isolation", "-w", str(built)]
    subprocess.run([*build, str(ROOT)], check=True)
    (wheel,) = built.glob("*.whl")
    install = [*PIP, "install", "--no-index", "--no-deps", "--target", str(target)]
    subprocess.run([*install, str(wheel)], check=True)
    return target


def call(site, cwd, *arguments, **environment):
    paths = os.pathsep.join([str(site), str(HELPERS)])
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": paths, "COLUMNS": "120"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def composed(site, cwd, *arguments):
    done = call(site, cwd, HELPERS / "foreign_app.py", *arguments, "--cfg", "job")
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout)


# --- in somebody else's app ----------------------------------------------------------------------


def test_the_group_composes_where_it_is_put(site, tmp_path):
    cfg = composed(site, tmp_path, "+samrefine@callbacks.sam_refine=algorithm4")
    node = cfg["callbacks"]["sam_refine"]
    assert node["_target_"] == "lightning_samrefine.SAMRefineCallback"
    assert node["refine"] == asdict(RefineConfig.preset("algorithm4"))
    assert "_target_" in cfg["callbacks"]["rich_progress_bar"]

    cfg = composed(
        site,
        tmp_path,
        "+samrefine=default",
        "samrefine/refine=fast",
        "samrefine.refine.classes=[1,4]",
        "samrefine.refine.class_pred_iou_thresh={4:0.7}",
    )
    expected = RefineConfig.preset("fast", classes=(1, 4), class_pred_iou_thresh={4: 0.7})
    assert RefineConfig(**cfg["samrefine"]["refine"]) == expected


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("refine.pred_iou_tresh=0.7", r"Key 'pred_iou_tresh' not in 'Refine'"),
        ("refine.stride=half", r"Value 'half' of type 'str' could not be converted to Integer"),
        ("refine.classes=[sky]", r"Value 'sky' of type 'str' could not be converted to Integer"),
        ("precison=32", r"Key 'precison' is not in struct"),
    ],
)
def test_typos_and_wrong_types_are_refused_while_composing(site, tmp_path, override, message):
    key = "callbacks.sam_refine"
    done = call(
        site, tmp_path, HELPERS / "foreign_app.py", f"+samrefine@{key}=default", f"{key}.{override}"
    )
    assert done.returncode == 1
    assert re.search(message, done.stderr), done.stderr
    assert f"full_key: {key}.{override.split('=')[0]}" in done.stderr


def test_the_plugin_loads_nothing_heavy(site, tmp_path):
    code = (
        "import sys; from hydra.core.plugins import Plugins; "
        "from hydra.plugins.search_path_plugin import SearchPathPlugin; "
        "found = Plugins.instance().discover(SearchPathPlugin); "
        "from hydra._internal.utils import create_config_search_path as path; print(path(None)); "
        "print([p.__name__ for p in found], [m for m in ('torch', 'lightning', 'numpy', "
        "'lightning_samrefine.callbacks.refine_callback') if m in sys.modules])"
    )
    done = call(site, tmp_path, "-c", code)
    assert "'SAMRefineSearchPath'" in done.stdout, done.stderr
    assert done.stdout.strip().endswith("[]"), done.stdout
    assert f"file://{site}/lightning_samrefine/searchpath" in done.stdout


def test_the_group_holds_the_presets_and_the_callbacks_arguments():
    group = ROOT / "lightning_samrefine" / "searchpath" / "samrefine"
    assert sorted(path.stem for path in group.glob("*.yaml")) == sorted(PRESETS)
    files = (group / "callback" / "sam_refine.yaml", ROOT / "configs/callback/sam_refine.yaml")
    own, commands = (OmegaConf.to_container(OmegaConf.load(file)) for file in files)
    differing = {"sam", "checkpoint", "ignore_index", "panels", "report"}
    assert set(own) == set(commands) | differing
    assert {k: v for k, v in own.items() if k not in differing} == {
        k: v for k, v in commands.items() if k not in differing
    }


def test_types_that_omegaconf_lacks_are_any():
    assert storable_type(int | None) == int | None
    assert storable_type(tuple[int, ...] | None) == list[int] | None
    assert storable_type(Mapping[int, float] | None) is Any
    assert storable_type(Literal["a", "b"]) is str
    assert storable_type(tuple[int, str]) is Any
    assert storable_type(int | str) is Any


def test_it_runs_in_somebody_elses_app(site, tmp_path):
    done = call(
        site,
        tmp_path,
        HELPERS / "foreign_app.py",
        "+samrefine@callbacks.sam_refine=default",
        *TINY,
    )
    assert done.returncode == 0, done.stderr
    assert "'val/miou_refined'" in done.stdout
    assert "'RichProgressBar', 'SAMRefineCallback'" in done.stdout


def test_it_runs_in_lightning_cli(site, tmp_path):
    (tmp_path / "tuned.yaml").write_text("pred_iou_thresh: 0.4\nclasses: [0, 1]\n")
    config = {
        "trainer": {
            "accelerator": "cpu",
            "logger": False,
            "callbacks": [
                {
                    "class_path": "lightning_samrefine.SAMRefineCallback",
                    "init_args": {"sam": "tiny", "refine": "tuned.yaml"},
                }
            ],
        }
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    done = call(site, tmp_path, HELPERS / "foreign_parts.py", "validate", "--config", "run.yaml")
    assert done.returncode == 0, done.stderr
    assert "'val/miou_refined'" in done.stdout
    assert "pred_iou_thresh=0.4" in done.stdout + done.stderr
    assert "classes=(0, 1)" in done.stdout + done.stderr


# --- sweeps of the command -----------------------------------------------------------------------

COUNTED = """
import os
from command_runs import small_sam

def sam():
    model = small_sam()
    embed = model.encode_images
    def counted(images):
        with open(os.environ["EMBEDDED"], "a") as file:
            file.write("x" * len(images))
        return embed(images)
    model.encode_images = counted
    return model
"""


def sweep(site, cwd, folder, *arguments):
    """Run a sweep; returns its output and how many images SAM embedded."""
    (cwd / "counted.py").write_text(COUNTED)
    values = overrides(folder, "sam._target_=counted.sam", f"hydra.sweep.dir={cwd / 'sweep'}")
    done = call(
        site,
        cwd,
        *("-m", "lightning_samrefine.cli.main", "-m", *values, *arguments),
        EMBEDDED=str(cwd / "embedded"),
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr, len((cwd / "embedded").read_text())


def test_the_jobs_of_a_sweep_share_embeddings_and_read_files(site, folder, tmp_path):
    (tmp_path / "mine.yaml").write_text("preset: algorithm4\nmin_region_area: 2\nclasses: [0, 1]\n")
    thresholds = "refine.pred_iou_thresh=0.3,1.0"
    _, embedded = sweep(site, tmp_path, folder, f"refine={tmp_path / 'mine.yaml'},fast", thresholds)
    assert embedded == 2, "each of the two images is embedded once"
    jobs = [OmegaConf.load(tmp_path / "sweep" / str(n) / "config.yaml").refine for n in range(4)]
    assert [job.pred_iou_thresh for job in jobs] == [0.3, 1.0, 0.3, 1.0]
    assert [job.min_region_area for job in jobs] == [2, 2, 16, 16]
    assert [job.classes for job in jobs] == [[0, 1], [0, 1], None, None]


def test_optuna_sweeps_the_command(site, folder, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    _printed, embedded = sweep(
        site,
        tmp_path,
        folder,
        "hydra/sweeper=optuna",
        "hydra/sweeper/sampler=random",
        "hydra.sweeper.n_trials=3",
        "hydra.sweeper.direction=maximize",
        "hydra.sweeper.sampler.seed=0",
        "refine.pred_iou_thresh=interval(0.2,0.9)",
    )
    assert embedded == 2
    found = OmegaConf.load(tmp_path / "sweep" / "optimization_results.yaml")
    assert 0.2 <= found.best_params["refine.pred_iou_thresh"] <= 0.9
    metrics = [(tmp_path / "sweep" / str(n) / "metrics.json").read_text() for n in range(3)]
    values = [yaml.safe_load(text)["val/miou_refined"] for text in metrics]
    assert found.best_value == pytest.approx(max(values))
