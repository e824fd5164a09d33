"""Kill, starve and confuse the package, count what is lost, and write RELIABILITY.md.

python -m benchmarks.reliability                        # everything, about half an hour on a core
python -m benchmarks.reliability --parts kills memory   # these again; the others stay as they were

Each part runs in processes of its own and ends in an error if anything is lost; what was
counted is kept in reliability.json, from which the page is written. CI runs the same parts with
smaller numbers, as tests.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
HELPERS = HERE.parent / "tests" / "helpers"
RESULTS, PAGE, PLOT = (
    HERE / name for name in ("reliability.json", "RELIABILITY.md", "reliability_memory.png")
)
SETTLED, MAY_GROW = 500, 0.03  # images after which memory must stay, and how far it may stray
BAD_INPUTS = (
    "test_faults.py", "test_refiner.py", "test_scores.py", "test_adapter.py", "test_images.py",
    "test_config.py", "test_stems.py", "test_manifest.py", "test_writer.py", "test_writer_runs.py",
    "test_every_preset.py", "test_class_gate.py", "test_capture.py", "test_download.py",
)  # fmt: skip

Figures = dict[str, Any]


def main() -> None:
    """Command line: see the module's own documentation."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--kills", type=int, default=40, help="at random moments")
    parser.add_argument("--layouts", choices=("short", "all"), default="all")
    parser.add_argument("--images", type=int, default=5000, help="of the memory run")
    parser.add_argument("--seconds", type=int, default=600, help="of fuzzing")
    args = parser.parse_args()
    for part in args.parts:
        with tempfile.TemporaryDirectory() as folder:
            figures = PARTS[part](args, Path(folder))
        print(
            part,
            json.dumps({k: v for k, v in figures.items() if not k.endswith("_mib")}),
            flush=True,
        )
        results = stored() | {part: figures}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    results = stored()
    if "memory" in results:
        draw(results["memory"])
    PAGE.write_text(page(results))


def stored() -> dict[str, Figures]:
    """Return what the parts counted so far."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def kills(args: argparse.Namespace, folder: Path) -> Figures:
    """SIGKILL at random moments, and at every change of the disk."""
    return script("kill_trials.py", str(folder), str(args.kills), "1000000", "1")


def layouts(args: argparse.Namespace, folder: Path) -> Figures:
    """Distributed layouts against one process."""
    return script("ddp_layouts.py", str(folder), args.layouts)


def fuzz(args: argparse.Namespace, folder: Path) -> Figures:
    """Random journals, manifests, run.json files and thresholds."""
    return {"seconds": args.seconds, "inputs": script("fuzzing.py", str(args.seconds))}


def bad_inputs(args: argparse.Namespace, folder: Path) -> Figures:
    """The tests of faults and bad inputs, counted."""
    files = [str(HELPERS / name) for name in BAD_INPUTS]
    output = run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files])
    passed = re.search(r"(\d+) passed", output)
    return {"passed": int(passed[1]) if passed else 0, "files": len(files)}


def memory(args: argparse.Namespace, folder: Path) -> Figures:
    """Memory over a long prediction run, in a process of its own."""
    call = f"predict_many({args.images}, {str(folder / 'out')!r})"
    code = f"from benchmarks.reliability import predict_many; {call}"
    figures = json.loads(run([sys.executable, "-c", code]).splitlines()[-1])
    if figures["growth"] > MAY_GROW:
        sys.exit(f"memory strays by {100 * figures['growth']:.1f}%: {json.dumps(figures)}")
    return figures


PARTS: dict[str, Callable[[argparse.Namespace, Path], Figures]] = {
    "kills": kills,
    "bad_inputs": bad_inputs,
    "layouts": layouts,
    "memory": memory,
    "fuzz": fuzz,
}


def predict_many(images: int, folder: str, every: int = 50) -> Figures:
    """Predict small images that are made on the way, and look at the process's memory.

    Args:
        images: How many.
        folder: Where the predictions go.
        every: Images between two looks.

    Returns:
        ``images``, ``every``, ``rss_mib`` and ``private_mib`` (one figure a look, see
        `memory_mib`), and ``growth``: how far, after the first `SETTLED` images (or the first
        half), private memory strays from its figure there, or resident memory rises above it.
    """
    sys.path.append(str(HELPERS))
    import torch
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import Callback
    from lightning_stubs import NUM_CLASSES, REFINE, SILENT, Segmenter
    from tiny_random_sam import build_random_sam
    from torch.utils.data import DataLoader, Dataset

    from lightning_samrefine import SAMRefineWriter
    from lightning_samrefine.models.sam import SamPromptable

    class Images(Dataset):
        def __len__(self) -> int:
            return images

        def __getitem__(self, index: int) -> dict[str, Any]:
            generator = torch.Generator().manual_seed(index)
            cells = torch.rand(1, 3, 4, 5, generator=generator) * 255
            image = torch.nn.functional.interpolate(cells, (48, 60))[0].to(torch.uint8)
            return {"image": image, "name": f"{index // 1000:03d}/{index:06d}"}

    class Predicting(Segmenter):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return self(batch["image"])

    class Look(Callback):
        def __init__(self) -> None:
            self.seen: list[tuple[float, float]] = []

        def on_predict_batch_end(self, *_: Any, **__: Any) -> None:
            self.seen.append(memory_mib())

    sam = SamPromptable(build_random_sam(), "random")
    writer = SAMRefineWriter(folder, sam, num_classes=NUM_CLASSES, refine=REFINE, probs="uint8")
    look = Look()
    trainer = Trainer(**SILENT, callbacks=[writer, look])
    trainer.predict(Predicting(), DataLoader(Images()), return_predictions=False)
    settled = min(SETTLED, images // 2)
    rss, private = zip(*look.seen[every - 1 :: every], strict=True)
    steady_rss, steady = (series[settled // every - 1 :] for series in (rss, private))
    growth = max(
        *(abs(value / steady[0] - 1) for value in steady), max(steady_rss) / steady_rss[0] - 1
    )
    slope = (steady[-1] - steady[0]) / (len(steady) - 1) / every * 1e6 / 1024  # GiB a million
    figures = {
        "images": images,
        "every": every,
        "settled": settled,
        "rss_mib": rss,
        "private_mib": private,
        "growth": growth,
        "gib_per_million": slope,
        "written": writer.counts.written,
    }
    print(json.dumps(figures))
    return figures


def memory_mib() -> tuple[float, float]:
    """Return this process's resident memory in MiB, and the private part of it.

    The rest are pages of files, libraries' code for the most part. A machine that is short of
    memory takes them away and gives them back, which has nothing to do with this process.
    """
    _, resident, shared = map(int, Path("/proc/self/statm").read_text().split()[:3])
    mib = os.sysconf("SC_PAGE_SIZE") / 2**20
    return resident * mib, (resident - shared) * mib


def draw(figures: Mapping[str, Any]) -> None:
    """Plot memory over images."""
    from matplotlib.figure import Figure

    every, settled = figures["every"], figures["settled"]
    figure = Figure(figsize=(7, 2.6), layout="constrained")
    axes = figure.subplots()
    for name, label in (("rss_mib", "resident"), ("private_mib", "private part")):
        series = figures[name]
        axes.plot([every * (index + 1) for index in range(len(series))], series, label=label)
    start = figures["private_mib"][settled // every - 1]
    band = {"alpha": 0.15, "label": f"±3% of the figure after {settled} images"}
    axes.axhspan(0.97 * start, 1.03 * start, **band)
    axes.set(xlabel="images", ylabel="memory, MiB", ylim=(0, 1.25 * max(figures["rss_mib"])))
    axes.legend(loc="lower right")
    figure.savefig(PLOT, dpi=100)


def page(results: Mapping[str, Figures]) -> str:
    """Write RELIABILITY.md: a row for everything that was counted."""
    rows = [row for part in PARTS if part in results for row in ROWS[part](results[part])]
    table = "\n".join(f"| {what} | {count:,} | {lost} |" for what, count, lost in rows)
    text = f"""# What was tried, and what was lost

`python -m benchmarks.reliability` on CPU, with a tiny random SAM and images of 40 by 32 and
60 by 48 pixels. Every part ends in an error if something is lost, so a row exists only if
nothing was.

| tried | count | lost |
|---|---|---|
{table}
"""
    if "memory" in results:
        images, slope = (results["memory"][key] for key in ("images", "gib_per_million"))
        text += f"""
![Memory over {images:,} images]({PLOT.name})

Private memory changed at a rate of {slope:.2f} GiB a million images over these {images:,}. Resident
memory also holds pages of files, of libraries for the most part, which a machine that is short of
memory takes away: a fall comes from that; a rise would count.
"""
    return text


Row = tuple[str, int, str]


def _kill_rows(figures: Figures) -> list[Row]:
    return [
        (
            f"prediction runs killed (SIGKILL) at random moments, {figures['of_two_processes']} of "
            "them on two processes; started again with one or two, by chance",
            figures["random_kills"],
            "0 files",
        ),
        (
            "kills right before and right after every change of the disk, the merge included",
            figures["step_kills"],
            "0 files",
        ),
        (
            f"files of the {figures['folders']} completed folders, compared byte for byte with an "
            "undisturbed run's",
            figures["files_compared"],
            "0 differ",
        ),
        (
            "looks into a folder right after a kill, for files that are not whole",
            figures["random_kills"] + figures["step_kills"],
            f"{figures['torn_files_seen']} torn",
        ),
    ]


def _bad_input_rows(figures: Figures) -> list[Row]:
    what = f"tests of faults and bad inputs, in {figures['files']} files"
    return [(what, figures["passed"], "0 wrong numbers")]


def _layout_rows(figures: Figures) -> list[Row]:
    by_strategy = ", ".join(f"{n} under {name}" for name, n in figures["by_strategy"].items())
    what = (
        f"distributed layouts against one process ({by_strategy}): {figures['figures']:,} figures "
        f"of {figures['processes']} processes, bit for bit (among the processes where "
        f"`max_batches` counts batches of each), with images that fail or have no region on one "
        f"process; {figures['predicted_files']} files predicted with sharded weights"
    )
    return [(what, figures["layouts"], "0 differ, 0 hang")]


def _memory_rows(figures: Figures) -> list[Row]:
    what = (
        f"images predicted in one process; private memory after the first {figures['settled']} "
        f"stays within {100 * figures['growth']:.1f}%"
    )
    return [(what, figures["written"], "0 images")]


def _fuzz_rows(figures: Figures) -> list[Row]:
    inputs = ", ".join(f"{n:,} {name}" for name, n in figures["inputs"].items())
    what = f"fuzzed inputs in {figures['seconds']} s ({inputs})"
    return [(what, sum(figures["inputs"].values()), "0 unexpected errors")]


ROWS: dict[str, Callable[[Figures], list[Row]]] = {
    "kills": _kill_rows,
    "bad_inputs": _bad_input_rows,
    "layouts": _layout_rows,
    "memory": _memory_rows,
    "fuzz": _fuzz_rows,
}


def script(name: str, *arguments: str) -> Any:
    """Run a script of the tests, and read the JSON object that it ends with."""
    return json.loads(run([sys.executable, str(HELPERS / name), *arguments]).splitlines()[-1])


def run(command: list[str]) -> str:
    """Run a command on one thread; show its output if it fails."""
    root = str(HERE.parent)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    return done.stdout


if __name__ == "__main__":
    main()
