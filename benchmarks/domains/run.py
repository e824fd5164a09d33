"""Every preset on every pair of data set and network, figures to a table.

Run from the root of the repository: ``python -m benchmarks.domains.run --split val``.
SAMREFINE_DATA names the data folder. Counts, embeddings and masks stay in the output folder: a run
that was stopped goes on where it was, and after a change of fusion only that is computed anew
(``--again fast``).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.progress import track

from benchmarks.camvid.data import REPOSITORY, SAM_WEIGHTS, data_root
from benchmarks.domains.counts import count
from benchmarks.domains.fitted import FittedOnVal
from benchmarks.domains.methods import BEST_ON_VAL, Refine, dense_crf, mode_filter, without_sam
from benchmarks.domains.page import RAW, page
from benchmarks.domains.pairs import CAMVID, DOMAINS, JUDGED, class_names, examples
from lightning_samrefine import RefineConfig, Refiner, load_sam
from lightning_samrefine.models import Promptable
from lightning_samrefine.refine.cache.embedding_cache import EmbeddingCache

PAGE = REPOSITORY / "benchmarks" / "QUALITY.md"
TRIED = Path(__file__).with_name("tried.md")  # what was tried on val, by hand
AUTO, CONTROL = "`auto`, fitted on val", "the same without SAM"


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, run what is missing and write the page."""
    options = _parse(arguments)
    root = data_root()
    options.output.mkdir(parents=True, exist_ok=True)
    cache = EmbeddingCache("disk", gb=40, folder=options.output / "cache")
    sam = load_sam("vit_t", checkpoint=root / SAM_WEIGHTS)
    methods = build_methods(sam, cache)
    refiner = Refiner(sam, RefineConfig.preset("auto"), cache=cache)
    fitted = FittedOnVal(root, refiner, options.output / "fits")
    counts = {}
    for pair in options.pairs or ((*CAMVID, *DOMAINS) if options.all else JUDGED):
        of_pair = methods | {
            AUTO: partial(fitted.refined, pair),
            CONTROL: partial(fitted.control, pair),
        }
        chosen = {n: of_pair[n] for n in (RAW, *(options.methods or of_pair)) if n in of_pair}
        if options.kept:
            counts[pair] = kept_counts(pair, options.split, chosen, options.output)
        else:
            counts[pair] = count_pair(root, pair, options.split, chosen, options)
    text = page(counts, {pair: class_names(root, pair) for pair in counts}, options.split)
    if all(AUTO in of_pair for of_pair in counts.values()):
        found = [f"- {pair}: {fitted.found(pair)}" for pair in counts]
        text += "\n".join(
            ["", "## What the fit of `auto` found on the validation split", "", *found, ""]
        )
    text += "\n" + TRIED.read_text(encoding="utf-8")
    whole = not (options.limit or options.pairs) and options.split == "test_shared"
    path = PAGE if whole else options.output / "QUALITY.md"
    path.write_text(text, encoding="utf-8")
    print(text, f"Written to {path}", sep="\n")


def build_methods(sam: Promptable, cache: EmbeddingCache) -> dict[str, Refine]:
    """Return every method by its name in the table."""

    def preset(name: str, **fields: object) -> Refine:
        refiner = Refiner(sam, RefineConfig.preset(name, **fields), cache=cache)
        return lambda image, probs: refiner(image, probs).labels

    methods: dict[str, Refine] = {
        RAW: lambda image, probs: probs.argmax(dim=0),
        "mode filter, 5 px": mode_filter,
        "DenseCRF": dense_crf((1, 3), (67, 3, 4)),
        "colors and smoothing without SAM": without_sam,
        "algorithm4": preset("algorithm4"),
        "algorithm4, thresholds best on val": preset("algorithm4", **BEST_ON_VAL),
        "fast": preset("fast"),
        "default": preset("default"),
    }
    try:
        import pydensecrf.densecrf  # noqa: F401  (only whether it is there)
    except ImportError:
        del methods["DenseCRF"]
    return methods


def kept_counts(
    pair: str, split: str, methods: Iterable[str], output: Path
) -> dict[str, np.ndarray]:
    """Return as `count_pair` does what earlier runs have counted on every image of a pair."""
    kept = [dict(np.load(path)) for path in sorted(_folder(output, split, pair).glob("*.npz"))]
    whole = [name for name in methods if kept and all(name in image for image in kept)]
    return {name: np.stack([image[name] for image in kept]) for name in whole}


def _folder(output: Path, split: str, pair: str) -> Path:
    return output / split / pair.replace(" ", "_").replace(",", "")


@torch.no_grad()
def count_pair(
    root: Path, pair: str, split: str, methods: dict[str, Refine], options: argparse.Namespace
) -> dict[str, np.ndarray]:
    """Return, for every method, (N, 2, C, C) int64 of a pair's N images.

    Args:
        root: The data folder.
        pair: The pair.
        split: Its split.
        methods: What to run; counts that are kept in the output folder are read instead.
        options: The command line's.
    """
    num_classes = len(class_names(root, pair))
    collected: dict[str, list[np.ndarray]] = {name: [] for name in methods}
    folder = _folder(options.output, split, pair)
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    for number, example in enumerate(track(examples(root, pair, split), description=pair)):
        if options.limit and number >= options.limit:
            break
        kept = folder / f"{example.name}.npz"
        known = dict(np.load(kept)) if kept.exists() else {}
        missing = [n for n in methods if n not in known or n in (options.again or ())]
        if missing:
            probs = example.predict()
            for name in missing:
                labels = methods[name](example.image, probs)
                known[name] = count(labels, example.target, num_classes)
            np.savez(kept, **known)
        for name in methods:
            collected[name].append(known[name])
    print(f"{pair}: {time.perf_counter() - started:.0f} s")
    return {name: np.stack(matrices) for name, matrices in collected.items()}


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--split", choices=("val", "test_shared"), default="val")
    parser.add_argument("--pairs", nargs="+", choices=(*CAMVID, *DOMAINS), help="instead of all")
    parser.add_argument("--all", action="store_true", help="CamVid's other two pairs as well")
    parser.add_argument("--methods", nargs="+", help="besides raw, instead of all")
    parser.add_argument("--again", nargs="+", help="methods to run anew")
    parser.add_argument("--kept", action="store_true", help="run nothing, show earlier runs")
    parser.add_argument("--limit", type=int, help="images of each pair, to see that it runs")
    parser.add_argument("--output", type=Path, default=Path("outputs/domains"))
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
