"""Every command line of README and the other pages is run, on small data of the same names."""

from __future__ import annotations

import importlib
import json
import logging
import os
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from command_runs import (
    CLASSES,
    SAM,
    Pixelwise,
    composed,
    execute,
    expected_miou,
    split,
    write_folder,
)
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch import Trainer
from lightning_stubs import SILENT
from PIL import Image

from lightning_samrefine import SAMRefineCallback, load_sam
from lightning_samrefine.cli.hydra_presets import register
from lightning_samrefine.cli.main import SetupError, main, run
from lightning_samrefine.config import RefineConfig

ROOT = Path(__file__).parents[2]
# Those with a mark make an environment and run the tests or the default run: CI runs them.
BLOCK = re.compile(r"(<!-- command: \w+ -->\n)?```bash\n(.*?)```", re.DOTALL)
PAGES = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").rglob("*.md")]
SMALL = [
    "trainer.accelerator=cpu",
    "trainer.enable_progress_bar=false",
    "callback.report=false",
]
SMALL_SCENES = [
    "trainer.max_epochs=1",
    *(f"data.{name}=1" for name in ("train", "val", "test", "batch_size")),
    "data.size=64",
]

MODULE = """
from lightning_samrefine.models.sam import SamPromptable
from command_runs import Pixelwise
from tiny_random_sam import build_random_sam

class MyModel(Pixelwise):
    def __init__(self):
        super().__init__(11)

from command_runs import folder_of_validation as MyData

def MyPromptable():
    return SamPromptable(build_random_sam(0), "mine")
"""


def blocks():
    for page in PAGES:
        for mark, text in BLOCK.findall(page.read_text(encoding="utf-8")):
            lines = text.replace("\\\n", " ").strip().splitlines()
            if not mark and not all(line.startswith("pip install") for line in lines):
                yield pytest.param(lines, id=f"{page.name}: {' '.join(lines[0].split())[:60]}")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder that holds what the command lines name."""
    root = tmp_path_factory.mktemp("world")
    rng = np.random.default_rng(0)
    (root / "my").mkdir()
    (root / "my" / "module.py").write_text(MODULE)
    for images, labels, predictions in (
        ("val", "valannot", "pred/val"),
        ("test", "testannot", "pred/test"),
        ("images", None, "pred"),
    ):
        for folder in filter(None, (images, labels, predictions)):
            (root / folder).mkdir(parents=True, exist_ok=True)
        for index in range(2):
            truth = np.kron(rng.integers(0, 12, (3, 4)), np.ones((8, 8), int)).astype(np.uint8)
            colors = rng.integers(0, 256, (12, 3), dtype=np.uint8)
            Image.fromarray(colors[truth]).save(root / images / f"{index}.png")
            if labels is not None:
                Image.fromarray(truth).save(root / labels / f"{index}.png")
            guess = np.where(rng.random(truth.shape) < 0.8, truth % 11, 3).astype(np.uint8)
            Image.fromarray(guess).save(root / predictions / f"{index}.png")
    torch.save(load_sam("vit_t", "random").module.state_dict(), root / "mobile_sam.pt")
    trainer = Trainer(**SILENT)
    trainer.strategy.connect(Pixelwise(11))
    trainer.save_checkpoint(root / "last.ckpt")
    return root


@pytest.fixture
def here(world, monkeypatch):
    """Work in that folder, and leave Hydra and the logging as they were."""
    monkeypatch.chdir(world)
    monkeypatch.syspath_prepend(str(world))
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)
    monkeypatch.setenv("SAMREFINE_OFFLINE", "1")
    handlers, level = logging.getLogger().handlers[:], logging.getLogger().level
    yield world
    logging.getLogger().handlers[:] = handlers
    logging.getLogger().setLevel(level)


def samrefine(monkeypatch, arguments):
    monkeypatch.setattr(sys, "argv", ["samrefine", *arguments])
    try:
        main()
    except SystemExit as end:  # as --help ends
        if end.code:
            raise


def small(world, arguments):
    """Put small stand-ins for what is downloaded, and bound the work."""
    if "--help" in arguments:
        return arguments
    hub_id, local = "sam.model=facebook/sam2.1-hiera-small", f"sam.model={world / 'hf'}"
    stand_ins = {"sam=vit_b": "sam=tiny", hub_id: local}
    given = [stand_ins.get(argument, argument) for argument in arguments]
    weights = ["sam.checkpoint=mobile_sam.pt"] if "sam=vit_t" in arguments else []
    scenes = [] if any(argument.startswith("data=") for argument in arguments) else SMALL_SCENES
    return [*given, *weights, *SMALL, *scenes]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("lines", list(blocks()))
def test_every_command_line_runs(here, lines, monkeypatch, capsys):
    for line in lines:
        words = shlex.split(line, comments=True)
        while re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words.pop(0)
        program, arguments = Path(words[0]).name, words[1:]
        if program == "samrefine":
            if "sam=hf" in arguments:
                pytest.importorskip("transformers")
                from tiny_hf import build_tiny_hf

                build_tiny_hf("sam2").module.save_pretrained(here / "hf")
            samrefine(monkeypatch, small(here, arguments))
            out = capsys.readouterr().out
            quiet = {"task=predict", "task=check", "--help"} & set(arguments)
            assert "mIoU" in out or quiet
        elif arguments[:1] == ["train.py"]:
            check_foreign_app(arguments[1:])
        elif arguments[:1] == ["-m"]:
            # What it needs is not here: its arguments are understood.
            importlib.import_module(arguments[1])._parse(arguments[2:])
        else:
            raise AssertionError(f"no way to run {line}")


def check_foreign_app(arguments):
    """Compose somebody else's app, and build its callback."""
    register()
    searchpath = f"hydra.searchpath=[file://{ROOT / 'lightning_samrefine' / 'searchpath'}]"
    with initialize_config_dir(
        str(ROOT / "tests" / "helpers" / "foreign_configs"), version_base="1.3"
    ):
        cfg = compose("eval", overrides=[searchpath, *arguments])
    callback = instantiate(cfg.callbacks.sam_refine, num_classes=3)
    assert isinstance(callback, SAMRefineCallback)
    assert callback.refine_config == RefineConfig.preset("auto", pred_iou_thresh=0.7)
    assert (callback.shared.sam, callback.shared.checkpoint) == ("vit_t", "mobile_sam.pt")


def test_the_pages_have_command_lines():
    assert len(list(blocks())) >= 6


# --- stored predictions, and paths ---------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data"))


def folder_overrides(folder, *more):
    names = ",".join(CLASSES)
    quiet = ["trainer.accelerator=cpu", "trainer.enable_progress_bar=false"]
    return ["data=folder", *split(folder), f"data.class_names=[{names}]", *quiet, *SAM, *more]


def test_stored_predictions_that_are_given_are_refined(folder, tmp_path):
    values = folder_overrides(folder, "refine=algorithm4", "refine.pred_iou_thresh=0.45")
    _, metrics = execute(tmp_path, *values)
    for side, value in expected_miou(folder, RefineConfig(pred_iou_thresh=0.45)).items():
        assert metrics[f"val/miou_{side}"] == pytest.approx(value, abs=1e-6)


def test_a_network_that_would_ignore_the_predictions_or_is_for_scenes_is_refused(folder, tmp_path):
    with pytest.raises(SetupError, match=r"segmenter must be stored .* got small, which is for sc"):
        run(composed(tmp_path, *folder_overrides(folder, "segmenter=small")))
    with pytest.raises(SetupError, match=r"with TorchvisionDataModule, got small"):
        run(composed(tmp_path, "data=voc", f"data.root={tmp_path}"))
    with pytest.raises(SetupError, match=r"given \(data\.val\.predictions\), got torchvision"):
        run(composed(tmp_path, *folder_overrides(folder, "segmenter=torchvision")))
    assert not (tmp_path / "config.yaml").exists()


@pytest.mark.slow
def test_relative_paths_hold_where_hydra_changes_the_folder(folder, here, monkeypatch):
    relative = os.path.relpath(folder, here)
    arguments = [word.replace(str(folder), relative) for word in folder_overrides(folder)]
    arguments += ["hydra.job.chdir=true", "hydra.run.dir=changed"]
    arguments += ["callback.report=report.html"]
    samrefine(monkeypatch, arguments)
    monkeypatch.chdir(here)
    metrics = json.loads((here / "changed" / "metrics.json").read_text())
    assert metrics["val/miou_raw"] == pytest.approx(expected_miou(folder, RefineConfig())["raw"])
    assert (here / "report.html").is_file()


def test_a_missing_folder_is_named_by_its_whole_path(here, folder, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=f"images must be a folder, got {re.escape(str(here))}/nowhere"
    ):
        run(composed(tmp_path, *folder_overrides(folder, "data.val.images=nowhere")))
