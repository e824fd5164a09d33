"""The pairs of data set and network that quality is judged on.

Seven data sets come with a network each (`domains/README.md` in the data folder); CamVid has
ESPNet at two resolutions and ESPNetv2, which never saw it.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.camvid.data import CLASS_NAMES, ESPNET_WEIGHTS, VOID, camvid
from benchmarks.camvid.espnet import ESPNetSegmenter
from benchmarks.domains.cityscapes import CITYSCAPES_WEIGHTS, CityscapesESPNetv2

IGNORED = 255  # target value of pixels that are not scored
DOMAINS = {
    "clothes": "clothes_ccp",
    "horses": "horses_weizmann",
    "scenes": "scenes_msrc21",
    "aerial": "aerial_dubai",
    "nuclei": "nuclei_dsb2018",
    "leaves": "leaf_coffee",
    "tile defects": "tile_defects",
}
CAMVID = {"CamVid ESPNet": "full", "CamVid ESPNet, half": "half", "CamVid ESPNetv2": "cityscapes"}
# One pair a data set; the other two of CamVid stand beside them.
JUDGED = ("CamVid ESPNet", *DOMAINS)


@dataclass(frozen=True)
class Example:
    """One image with its raw prediction.

    Attributes:
        name: Unique in its split.
        image: (3, H, W) uint8 RGB.
        target: (H, W) int64 in [0, C), `IGNORED` where it is not scored.
        predict: Returns the raw probabilities, (C, H, W) float32.
    """

    name: str
    image: Tensor
    target: Tensor
    predict: Callable[[], Tensor]


def class_names(root: Path, pair: str) -> tuple[str, ...]:
    """Return the names of a pair's classes."""
    if pair in CAMVID:
        return CLASS_NAMES
    return tuple(
        json.loads((root / "domains" / DOMAINS[pair] / "segmenter.json").read_text())["classes"]
    )


def examples(root: Path, pair: str, split: str) -> Iterator[Example]:
    """Yield the examples of a pair's split in a fixed order.

    Args:
        root: The data folder.
        pair: A key of `CAMVID` or `DOMAINS`.
        split: ``"val"`` or ``"test_shared"``.
    """
    yield from (_camvid if pair in CAMVID else _domain)(root, pair, split)


def _camvid(root: Path, pair: str, split: str) -> Iterator[Example]:
    data = camvid(root)
    data.setup("validate" if split == "val" else "test")
    loader = data.val_dataloader() if split == "val" else data.test_dataloader()
    for sample in loader.dataset:
        target = sample["mask"].masked_fill(sample["mask"] == VOID, IGNORED)
        image = sample["image"]

        def predict(image: Tensor = image) -> Tensor:
            return _camvid_network(root, CAMVID[pair])(image[None])[0].softmax(dim=0)

        yield Example(sample["name"], image, target, predict)


@cache
def _camvid_network(root: Path, key: str) -> nn.Module:
    if key == "cityscapes":
        return CityscapesESPNetv2(root / CITYSCAPES_WEIGHTS).eval()
    return ESPNetSegmenter(root / ESPNET_WEIGHTS, resolution=key).eval()


def _domain(root: Path, pair: str, split: str) -> Iterator[Example]:
    folder = root / "domains" / DOMAINS[pair]
    code = _segmenter_code(root)
    model, meta = code.load(str(folder))
    for path in sorted((folder / split / "images").iterdir()):
        with Image.open(path) as file:
            picture = file.convert("RGB")
        labels = np.array(Image.open(folder / split / "labels" / f"{path.stem}.png"))

        def predict(picture: Image.Image = picture) -> Tensor:
            return code.probabilities(model, picture, meta["long_side"]).float()

        image = torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()
        yield Example(path.stem, image, torch.from_numpy(labels).long(), predict)


@cache
def _segmenter_code(root: Path) -> ModuleType:
    """Load the networks' definition, which comes with the data."""
    spec = importlib.util.spec_from_file_location("segmenter", root / "domains" / "segmenter.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
