"""Every Python snippet of README and docs/ is run, page by page, on a small model and data."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader
from torchmetrics.functional.classification import multiclass_jaccard_index

from lightning_samrefine import RefineConfig
from lightning_samrefine.config_files import write_refine
from lightning_samrefine.demo.scenes import ScenesDataset
from lightning_samrefine.demo.segmenter import SmallSegmenter
from lightning_samrefine.models import load_sam, registry

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
PAGES = {
    page.relative_to(ROOT).as_posix(): BLOCK.findall(page.read_text(encoding="utf-8"))
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
}
PAGES = {page: blocks for page, blocks in PAGES.items() if blocks}

pytestmark = pytest.mark.slow


def names_of_a_reader(num_classes: int) -> dict[str, Any]:
    """Return what the snippets take for granted: a model, loaders, and one image's prediction."""
    torch.manual_seed(0)
    model = SmallSegmenter(num_classes, width=4)
    model.num_classes = num_classes
    data = ScenesDataset(1, 2, size=64)
    image = data[0]["image"]
    with torch.no_grad():
        probs = model.eval()(image[None]).softmax(dim=1)[0]
    loaders = ("loader", "train_loader", "val_loader", "test_loader")
    return {
        "Trainer": Trainer,
        "model": model.train(),
        "image": image,
        "probs": probs,
        **{name: DataLoader(data, batch_size=2) for name in loaders},
    }


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Work in a folder that holds the files that snippets name, without downloads."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAMREFINE_OFFLINE", "1")
    # Their weights are not here.
    for name in ("vit_t", "vit_b"):
        monkeypatch.setitem(registry._ARCHITECTURES, name, registry._ARCHITECTURES["tiny"])
    torch.save(load_sam("tiny").module.state_dict(), "mobile_sam.pt")
    write_refine(RefineConfig.preset("fast"), tmp_path / "fitted.yaml")
    write_refine(RefineConfig.preset("fast"), tmp_path / "tuned.yaml")
    return tmp_path


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.filterwarnings("ignore")
def test_snippets_run(page, here):
    names, measured = names_of_a_reader(6), 0
    for block in PAGES[page]:
        classes = re.search(r"num_classes=(\d+)", block)
        if classes and int(classes[1]) != names["model"].num_classes:
            names |= names_of_a_reader(int(classes[1]))
        exec(compile(block, page, "exec"), names)
        history = getattr(names.get("callback"), "history", [])
        if len(history) > measured:
            assert history[-1]["miou_raw"] == pytest.approx(raw_miou(names), abs=1e-5)
        measured = len(history)


@torch.no_grad()
def raw_miou(names: dict[str, Any]) -> float:
    """Return torchmetrics' mIoU of the model on the images that it was last validated on."""
    (batch,) = names["val_loader"]
    predicted = names["model"].eval()(batch["image"]).argmax(dim=1)
    count = names["model"].num_classes
    return multiclass_jaccard_index(predicted, batch["mask"], num_classes=count).item()


def test_there_are_snippets():
    assert {"README.md", "docs/quickstart.md", "docs/dashboards.md"} <= PAGES.keys()
