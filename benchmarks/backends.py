"""What each model costs an image and a region, in multiples of vit_t: for docs/choosing.md.

    taskset -c 0 env OMP_NUM_THREADS=1 python -m benchmarks.backends [MODEL ...]

Weights are random: time does not depend on them. Each model is measured beside a vit_t of its own
run, in turns, and the medians are divided. A region is one box, one click and one mask prompt,
decoded in the batches that the refiner uses. Needs the extra ``[hf]``, and 4 GB for the largest.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

from lightning_samrefine import load_sam
from lightning_samrefine.models import Promptable, Prompts
from lightning_samrefine.models.base import accepts_masks
from lightning_samrefine.models.hf import HfPromptable
from lightning_samrefine.refine.decode import prompts_at_once
from lightning_samrefine.utils.precision import PRECISIONS, autocast, autocast_dtype

IMAGE_HW = (720, 960)
REGIONS = 8
BASE = "vit_t"


def _native(name: str) -> Promptable:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # random weights are meant here
        return load_sam(name, "random")


def _sam(config: str, model: str) -> Any:
    import transformers

    return getattr(transformers, model)(getattr(transformers, config)())


def _sam2(**backbone: Any) -> Any:
    """Build a SAM 2 of the published sizes; the default configuration is the tiny one."""
    from transformers import Sam2Config, Sam2Model

    widths = backbone.setdefault("embed_dim_per_stage", [96, 192, 384, 768])
    vision = {
        "model_type": "sam2_vision_model",
        "backbone_config": {
            "model_type": "sam2_hiera_det_model",
            "hidden_size": widths[0],
            **backbone,
        },
        "backbone_channel_list": widths[::-1],
    }
    return Sam2Model(Sam2Config(vision_config=vision))


def _edgetam() -> Any:
    from transformers import EdgeTamConfig, EdgeTamModel

    backbone = {
        "model_type": "timm_wrapper",
        "architecture": "repvit_m1",
        "num_classes": 2,  # not used here, but required
        "model_args": {"in_chans": 3, "features_only": True, "out_indices": [0, 1, 2, 3]},
    }
    return EdgeTamModel(EdgeTamConfig(vision_config={"backbone_config": backbone}))


_TRANSFORMERS: dict[str, Callable[[], Any]] = {
    "SAM-HQ ViT-B": lambda: _sam("SamHQConfig", "SamHQModel"),
    "SAM ViT-B (hf)": lambda: _sam("SamConfig", "SamModel"),
    "SAM 2.1 tiny": _sam2,
    "SAM 2.1 small": lambda: _sam2(
        blocks_per_stage=[1, 2, 11, 2], global_attention_blocks=[7, 10, 13]
    ),
    "SAM 2.1 base+": lambda: _sam2(
        blocks_per_stage=[2, 3, 16, 3],
        embed_dim_per_stage=[112, 224, 448, 896],
        num_attention_heads_per_stage=[2, 4, 8, 16],
        global_attention_blocks=[12, 16, 20],
        window_positional_embedding_background_size=[14, 14],
    ),
    "SAM 2.1 large": lambda: _sam2(
        blocks_per_stage=[2, 6, 36, 4],
        embed_dim_per_stage=[144, 288, 576, 1152],
        num_attention_heads_per_stage=[2, 4, 8, 16],
        global_attention_blocks=[23, 33, 43],
        window_size_per_stage=[8, 4, 16, 8],
    ),
    "EdgeTAM": _edgetam,
    "SAM 3 tracker": lambda: _sam("Sam3TrackerConfig", "Sam3TrackerModel"),
}
NAMES = ("tiny", "vit_t", "vit_b", "vit_l", "vit_h", *_TRANSFORMERS)


def build(name: str) -> Promptable:
    """Build a model of `NAMES` with random weights."""
    if name in _TRANSFORMERS:
        return HfPromptable(_TRANSFORMERS[name](), name)
    return _native(name)


def prompts_for(sam: Promptable) -> Prompts:
    """Return `REGIONS` boxes with their centers, and as many mask prompts of two classes."""
    size = torch.tensor(sam.input_hw(IMAGE_HW)[::-1], dtype=torch.float32)
    low = torch.rand(REGIONS, 2) * 0.6
    boxes = torch.cat([low * size, (low + 0.3) * size], dim=1)
    points = (boxes[:, :2] + boxes[:, 2:]) / 2
    if not accepts_masks(sam):
        return Prompts(boxes, points, None, None)
    masks = 8 * torch.rand(2, sam.mask_size, sam.mask_size)
    return Prompts(boxes, points, masks, torch.arange(REGIONS) % 2)


@torch.no_grad()
def seconds(sam: Promptable, image: torch.Tensor, precision: str) -> tuple[float, float]:
    """Return CPU seconds to embed an image, and to decode one region."""
    prompts, batch = prompts_for(sam), prompts_at_once(sam.device)
    with autocast(autocast_dtype(precision, sam.device), sam.device):
        start = time.process_time()  # not disturbed by what else runs
        (embedding,) = sam.encode_images([image])
        embedded = time.process_time()
        for begin in range(0, REGIONS, batch):
            sam.predict_masks(embedding, prompts.chunk(begin, begin + batch))
        decoded = time.process_time()
    return embedded - start, (decoded - embedded) / REGIONS


def row(name: str, repeats: int, precision: str) -> str:
    """Return a model's row of the table."""
    image = torch.randint(0, 256, (3, *IMAGE_HW), dtype=torch.uint8)
    sam, base = build(name), build(BASE)
    for model in (sam, base):
        seconds(model, image, precision)  # the first call also packs weights
    costs = [
        (seconds(sam, image, precision), seconds(base, image, precision)) for _ in range(repeats)
    ]
    encoder, region = (
        statistics.median(own[part] for own, _ in costs)
        / statistics.median(other[part] for _, other in costs)
        for part in (0, 1)
    )
    parameters = sum(p.numel() for p in sam.module.parameters()) / 1e6
    masks = "yes" if accepts_masks(sam) else "no"
    return f"| {name} | {parameters:.1f} | {masks} | {encoder:.2f} | {region:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=NAMES, metavar="MODEL", help=", ".join(NAMES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--precision", choices=PRECISIONS, default="auto")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.models) - set(NAMES))
    if unknown:
        parser.error(f"no model {', '.join(unknown)}; there are {', '.join(NAMES)}")
    torch.manual_seed(0)
    print("| model | parameters (M) | mask prompts | encoder | region |\n|---|---|---|---|---|")
    for name in arguments.models:
        print(row(name, arguments.repeats, arguments.precision), flush=True)


if __name__ == "__main__":
    main()
