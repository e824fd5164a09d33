"""What every preset costs per image, at its first look and once SAM's embedding is cached.

    python -m benchmarks.speed_presets            # prints the table: some minutes
    python -m benchmarks.speed_presets --write    # and keeps it, in SPEED.md

Images and raw predictions are real: the first validation images of three pairs of
`benchmarks.domains` in ``SAMREFINE_DATA``. Presets are interleaved image by image on one thread,
each beside the forward of segment-anything's own float32 encoder that it is divided by.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from itertools import islice
from typing import Any

import torch

from benchmarks.camvid.data import SAM_WEIGHTS, data_root
from benchmarks.domains.pairs import IGNORED, Example, class_names, examples
from benchmarks.speed import keep, machine, medians
from benchmarks.speed_clock import seconds
from benchmarks.speed_encoders import Costs
from benchmarks.speed_report import presets_section
from lightning_samrefine import RefineConfig, Refiner, load_sam
from lightning_samrefine.adapters.batch_adapter import RefineInputs
from lightning_samrefine.callbacks.auto_refiner import AutoRefiner
from lightning_samrefine.config import PRESETS
from lightning_samrefine.fit.auto_fusion import AutoFusion, FittedFusion
from lightning_samrefine.models.sam import SamPromptable
from lightning_samrefine.utils.precision import autocast, autocast_dtype

PAIRS = ("CamVid ESPNet", "clothes", "scenes")
ENCODER = "our encoder"

Refine = Callable[[RefineInputs], Any]


def main() -> None:
    """Measure, print and, if wanted, keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--images", type=int, default=4, help="of each pair")
    parser.add_argument("--write", action="store_true", help="keep it, and write SPEED.md anew")
    options = parser.parse_args()
    torch.set_num_threads(1)
    root = data_root()
    sam = load_sam("vit_t", root / SAM_WEIGHTS)
    costs: dict[str, Costs] = {}
    for pair in PAIRS:
        ways = refinements(sam, class_names(root, pair))
        ratios: Costs = defaultdict(list)
        for number, example in enumerate(islice(examples(root, pair, "val"), options.images + 1)):
            found = image_costs(sam, example, ways)
            if number > 0:  # the first look at the first image also hashes the weights
                for name, ratio in found.items():
                    ratios[name].append(ratio)
        costs[pair] = ratios
        print(f"{pair}: {medians(ratios)}", flush=True)
    every: Costs = defaultdict(list)
    for ratios in costs.values():
        for name, values in ratios.items():
            every[name] += values
    figures = {
        "machine": machine(sam.device, f"{options.images} images of each pair, medians"),
        "pairs": {pair: medians(of_pair) for pair, of_pair in costs.items()}
        | {"all": medians(every)},
    }
    print(presets_section(figures))
    if options.write:
        keep({"presets": figures})


def refinements(sam: SamPromptable, classes: tuple[str, ...]) -> dict[str, Refine]:
    """Return every preset's refinement, each with an empty cache in memory."""
    found = {}
    for preset in PRESETS:
        refiner = Refiner(sam, RefineConfig.preset(preset), cache="memory")
        found[preset] = _auto(refiner, classes) if preset == "auto" else _plain(refiner)
    return found


@torch.no_grad()
def image_costs(
    sam: SamPromptable, example: Example, ways: Mapping[str, Refine]
) -> dict[str, float]:
    """Return the costs of one image, in forwards of segment-anything's float32 encoder.

    Returns:
        By `ENCODER`, and by ``"<preset> cold"`` and ``"<preset> cached"``.
    """
    probs = example.predict()
    inputs = RefineInputs([example.image], [probs], [probs.argmax(dim=0)], [example.target])
    pixels = torch.randn(1, 3, sam.image_size, sam.image_size)
    unit = seconds(sam.device, lambda: sam.module.image_encoder(pixels))
    with autocast(autocast_dtype("auto", sam.device), sam.device):
        spent = {ENCODER: seconds(sam.device, lambda: sam.encode_images(inputs.images))}
    for preset, refine in ways.items():
        for epoch in ("cold", "cached"):
            spent[f"{preset} {epoch}"] = seconds(sam.device, partial(refine, inputs))
    return {name: value / unit for name, value in spent.items()}


def _plain(refiner: Refiner) -> Refine:
    return lambda inputs: refiner.refine_batch(inputs.images, inputs.probs, inputs.labels)


def _auto(refiner: Refiner, classes: tuple[str, ...]) -> Refine:
    """Return the refinement of a validation: fitted, with the control, and pixels sampled."""
    auto = AutoFusion(classes)
    auto.fitted = FittedFusion(auto.control_for(""))
    refine = AutoRefiner(refiner, auto, IGNORED)

    def run(inputs: RefineInputs) -> Any:
        refine.start(samples=True)
        return refine(inputs)

    return run


if __name__ == "__main__":
    main()
