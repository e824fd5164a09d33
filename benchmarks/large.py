"""Large images: time and peak memory against their size, windows against whole, and mIoU of both.

Run from the root of the repository: ``python -m benchmarks.large``. SAMREFINE_DATA names the data
folder. It writes LARGE.md.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.camvid.data import REPOSITORY, SAM_WEIGHTS, data_root
from lightning_samrefine import RefineConfig, Refiner, load_sam
from lightning_samrefine.models.base import Promptable
from lightning_samrefine.utils.machine import describe_machine

PAGE = REPOSITORY / "benchmarks" / "LARGE.md"
SIZES = ((1000, 1000), (2000, 2000), (4000, 4000), (6000, 8000))  # 1, 4, 16 and 48 megapixels
CLASSES = 12
WINDOWS: dict[str, dict[str, Any]] = {
    "whole": {"window": None},
    "windows of 1024 px": {"window": 1024},
}
CASES = {
    f"{name.split()[0]}_{hw[0] * hw[1] // 10**6}": (name, hw) for hw in SIZES for name in WINDOWS
}


Tile = tuple[Tensor, Tensor, Tensor]


def aerial_tiles(root: Path, split: str) -> list[Tile]:
    """Return tiles of the aerial set for a square mosaic, cut to the size of the smallest.

    Returns:
        Each (3, h, w) uint8, (C, h, w) float32 probabilities of its network and (h, w) int64
        targets.
    """
    from benchmarks.domains.pairs import examples

    tiles = [
        (example.image, example.predict(), example.target)
        for example in examples(root, "aerial", split)
    ]
    height, width = (min(target.shape[axis] for *_, target in tiles) for axis in (0, 1))
    side = int(len(tiles) ** 0.5)
    return [
        (image[:, :height, :width], probs[:, :height, :width], target[:height, :width])
        for image, probs, target in tiles[: side * side]
    ]


def mosaic(tiles: Sequence[Tile]) -> Tile:
    """Put a square number of tiles side by side, row by row."""
    side = int(len(tiles) ** 0.5)
    parts = []
    for kind in range(3):
        rows = [
            torch.cat([tile[kind] for tile in tiles[start : start + side]], dim=-1)
            for start in range(0, len(tiles), side)
        ]
        parts.append(torch.cat(rows, dim=-2))
    image, probs, target = parts
    return image, probs, target


def fitted(sam: Promptable, tiles: Sequence[Tile], classes: Sequence[str]) -> list[RefineConfig]:
    """Fit ``"auto"`` to tiles; return the thresholds for each, fitted without it."""
    from benchmarks.domains.pairs import IGNORED
    from lightning_samrefine.adapters.batch_adapter import RefineInputs
    from lightning_samrefine.callbacks.auto_refiner import AutoRefiner
    from lightning_samrefine.fit.auto_fusion import AutoFusion

    preset, auto = RefineConfig.preset("auto"), AutoFusion(classes)
    refiner = AutoRefiner(Refiner(sam, preset), auto, IGNORED)
    for number, (image, probs, target) in enumerate(tiles):
        labels = [probs.argmax(0)]
        refiner.sample(RefineInputs([image], [probs], labels, [target], groups=[str(number)]))
    print(auto.finish(), flush=True)
    assert auto.fitted is not None, "a fit needs at least 8 tiles"
    weights = [auto.fitted.weights_for(str(number)) for number in range(len(tiles))]
    return [replace(preset, weights=own) for own in weights]


def quality(root: Path, kept: Path) -> list[dict[str, Any]]:
    """Return the mIoU of the mosaic in %, raw and refined in every way, and keep it for `measure`.

    A tile of the mosaic is refined by ``auto`` with weights that were fitted without it.

    Args:
        root: The data folder.
        kept: Where the mosaic is kept.
    """
    # Here, so that no process whose memory is measured imports them.
    from benchmarks.domains.counts import count, ious
    from benchmarks.domains.pairs import class_names

    torch.set_num_threads(1)
    tiles, classes = aerial_tiles(root, "val"), class_names(root, "aerial")
    image, probs, target = mosaic(tiles)
    np.savez(kept, image=image.numpy(), probs=probs.numpy(), target=target.numpy())
    sam = load_sam("vit_t", checkpoint=root / SAM_WEIGHTS)
    found = []

    def add(name: str, labels: Tensor) -> None:
        matrices = count(labels, target, len(classes))
        miou, trimap = (float(np.nanmean(ious(matrix))) for matrix in matrices)
        row = {"name": name, "miou": miou, "trimap": trimap, "size": list(target.shape)}
        print(row, flush=True)
        found.append(row)

    def refined(config: RefineConfig) -> Tensor:
        return Refiner(sam, config)(image, probs, with_probs=False).labels

    add("raw", probs.argmax(dim=0))
    for preset in ("fast", "default"):
        for name, fields in WINDOWS.items():
            add(f"`{preset}`, {name}", refined(RefineConfig.preset(preset, **fields)))
    configs = fitted(sam, tiles, classes)
    (height, width), side = tiles[0][2].shape, int(len(tiles) ** 0.5)
    for name, fields in WINDOWS.items():
        once = cache(lambda config, fields=fields: refined(replace(config, **fields)))
        labels = torch.empty_like(target)
        for number, config in enumerate(configs):
            top, left = number // side * height, number % side * width
            tile = slice(top, top + height), slice(left, left + width)
            labels[tile] = once(config)[tile]
        add(f"`auto`, {name}", labels)
    return found


def measure(case: str, kept: Path) -> dict[str, float]:
    """Refine one large image in this process; seconds, and bytes at the peak and of the inputs.

    Args:
        case: A key of `CASES`.
        kept: The mosaic, from `quality`.
    """
    torch.set_num_threads(1)
    name, hw = CASES[case]
    sam = load_sam("vit_t", checkpoint=data_root() / SAM_WEIGHTS)
    image, probs = _repeated(kept, hw)
    refiner = Refiner(sam, RefineConfig.preset("fast", **WINDOWS[name]))
    start, cpu = time.perf_counter(), time.process_time()
    out = refiner(image, probs, with_probs=False)
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu,
        "peak": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "inputs": image.nbytes + probs.nbytes,
        "regions": len(out.regions),
    }


def _repeated(kept: Path, hw: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Repeat the mosaic up to a size, its classes renamed from copy to copy to make `CLASSES`."""
    image = np.zeros((3, *hw), np.uint8)
    probs = np.zeros((CLASSES, *hw), np.float32)
    with np.load(kept) as arrays:
        small, maps = arrays["image"], arrays["probs"]
    height, width = small.shape[1:]
    corners = [(y, x) for y in range(0, hw[0], height) for x in range(0, hw[1], width)]
    for number, (top, left) in enumerate(corners):
        window = (slice(top, top + height), slice(left, left + width))
        rows, columns = image[0][window].shape
        image[(slice(None), *window)] = small[:, :rows, :columns]
        for c, own in enumerate(maps):
            probs[(c + len(maps) * number) % CLASSES][window] = own[:rows, :columns]
    return torch.from_numpy(image), torch.from_numpy(probs)


def page(scores: Sequence[Mapping[str, Any]], cases: Mapping[str, Mapping[str, float]]) -> str:
    """Write the page."""
    height, width = scores[0]["size"]
    raw = scores[0]
    lines = [
        "# Large images: windows against whole",
        "",
        f"`python -m benchmarks.large`, `vit_t`, one thread of {cpu_name()}.",
        "",
        f"## mIoU on a mosaic of the aerial set's val tiles, {width} x {height} pixels",
        "",
        "| | mIoU | gain | trimap, 3 px | gain |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for row in scores:
        gains = [
            f"{row[key] - raw[key]:+.2f}" if row is not raw else "" for key in ("miou", "trimap")
        ]
        lines.append(
            f"| {row['name']} | {row['miou']:.2f} | {gains[0]} | {row['trimap']:.2f} | {gains[1]} |"
        )
    lines += [
        "",
        f"## Time and memory, `fast`, {CLASSES} classes",
        "",
        "Peak memory is that of the whole process, with torch, SAM, the image and the "
        "probabilities (float32); refined labels are wanted, refined probabilities are not "
        "(`with_probs=False`). Seconds are the process's CPU time.",
        "",
        "| | megapixels | image and probabilities, GB | peak, GB | seconds | seconds a megapixel "
        "| prompted regions |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for case, found in cases.items():
        name, hw = CASES[case]
        pixels, seconds = hw[0] * hw[1] / 1e6, found["cpu_seconds"]
        lines.append(
            f"| {name} | {pixels:.0f} | {found['inputs'] / 1e9:.2f} | {found['peak'] / 1e9:.2f} "
            f"| {seconds:.1f} | {seconds / pixels:.1f} | {found['regions']} |"
        )
    missing = [f"{name} at {hw[0] * hw[1] / 1e6:.0f} megapixels" for name, hw in _left(cases)]
    if missing:
        lines += ["", f"Not measured yet: {', '.join(missing)}."]
    return "\n".join(lines) + "\n"


def _left(cases: Mapping[str, Any]) -> list[tuple[str, tuple[int, int]]]:
    return [CASES[case] for case in CASES if case not in cases]


def cpu_name() -> str:
    """Return the processor's name."""
    return describe_machine(torch.device("cpu"))["CPU"].split(",")[0]


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, run what is missing and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=CASES, help="one measurement, printed")
    parser.add_argument("--output", type=Path, default=Path("outputs/large"))
    options = parser.parse_args(arguments)
    kept = options.output / "mosaic.npz"
    if options.case:
        print(json.dumps(measure(options.case, kept)))
        return
    options.output.mkdir(parents=True, exist_ok=True)
    scores = _known(options.output / "quality.json", lambda: quality(data_root(), kept))
    cases: dict[str, Any] = {}
    for case in CASES:
        # In a process of its own, whose peak memory is the case's.
        command = [sys.executable, "-m", "benchmarks.large", "--case", case]
        command += ["--output", str(options.output)]

        def run(command: list[str] = command) -> Any:
            return json.loads(subprocess.check_output(command, cwd=REPOSITORY))

        cases[case] = _known(options.output / f"{case}.json", run)
        print(case, cases[case], flush=True)
        # After each, for the large ones take minutes.
        PAGE.write_text(page(scores, cases), encoding="utf-8")


def _known(path: Path, compute: Callable[[], Any]) -> Any:
    """Return what a file holds; without the file compute it and write it."""
    if not path.exists():
        path.write_text(json.dumps(compute()), encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
