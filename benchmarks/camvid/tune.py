"""Does tuning on CamVid's val frames hold on its test frames?

Run from the root of the repository: ``python -m benchmarks.camvid.tune``. It tunes as
``samrefine task=tune`` does, prints what it expects, and only then looks at the test frames.
``--judge`` looks at the test frames with what an earlier run wrote.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.utils.data import DataLoader, Subset

from benchmarks.camvid.data import (
    CLASS_NAMES,
    ESPNET_WEIGHTS,
    REPOSITORY,
    RESOLUTIONS,
    SAM_WEIGHTS,
    VOID,
    camvid,
    data_root,
    missing_files,
)
from benchmarks.camvid.espnet import ESPNetSegmenter
from lightning_samrefine import RefineConfig, Refiner, load_sam
from lightning_samrefine.config_files import read_refine
from lightning_samrefine.data import FolderDataModule
from lightning_samrefine.metrics.bootstrap import class_ious
from lightning_samrefine.models import Promptable
from lightning_samrefine.refine.cache.embedding_cache import EmbeddingCache
from lightning_samrefine.reporting.summary import print_whole
from lightning_samrefine.tune.callback import TuneCallback
from lightning_samrefine.tune.choice import gain
from lightning_samrefine.tune.counts import GridCounts, Scoring, Truth
from lightning_samrefine.tune.report import tuning_summary, write_tuning
from lightning_samrefine.tune.settings import Grid, Rule
from lightning_samrefine.tune.task import tune

SCORING = Scoring(num_classes=VOID, ignore_index=VOID, trimap_width=3)
PRED_IOU_THRESH = (0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)


def main() -> None:
    """Tune on val, then judge on test, at each resolution."""
    options = _parse()
    root = data_root()
    if missing := missing_files(root):
        sys.exit(f"SAMREFINE_DATA names {root}, where {missing[0]} is missing")
    sam = load_sam("vit_t", checkpoint=root / SAM_WEIGHTS)
    grid = Grid(options.score_thresh, options.mask_prompt_scale, PRED_IOU_THRESH)
    base = RefineConfig.preset(options.preset)
    cache = EmbeddingCache("memory")
    for key in options.resolution:
        model = ESPNetSegmenter(root / ESPNET_WEIGHTS, resolution=key).eval()
        folder = options.output / key
        if not options.judge:
            folder.mkdir(parents=True, exist_ok=True)
            callback = TuneCallback(
                sam,
                num_classes=VOID,
                ignore_index=VOID,
                class_names=CLASS_NAMES,
                refine=base,
                cache=cache,
            )
            trainer = Trainer(
                logger=False, callbacks=[callback], enable_checkpointing=False, accelerator="cpu"
            )
            rule = Rule(margin=options.margin, folds=options.folds)
            with tempfile.TemporaryDirectory() as temporary:
                data = every_nth_val_frame(root, options.every, Path(temporary))
                tuning = tune(trainer, model, data, grid, rule)
            write_tuning(tuning, folder)
            print_whole(tuning_summary(tuning, folder))
        configs = {
            options.preset: base,
            "best cell": read_refine(folder / "best_cell.yaml"),
            "calibrated": read_refine(folder / "tuned.yaml"),
        }
        Console().print(judge(configs, root, sam, model, cache, options.every, key))


def every_nth_val_frame(root: Path, every: int, folder: Path) -> FolderDataModule:
    """Return CamVid with every n-th val frame alone; ``folder`` takes the list of them."""
    names = sorted(path.stem for path in (root / "camvid" / "val").iterdir())[::every]
    stems = folder / "stems.txt"
    stems.write_text("\n".join(names) + "\n", encoding="utf-8")
    val = {"images": root / "camvid" / "val", "labels": root / "camvid" / "valannot"}
    return FolderDataModule(class_names=CLASS_NAMES, ignore_index=VOID, val={**val, "stems": stems})


@torch.inference_mode()
def judge(
    configs: dict[str, RefineConfig],
    root: Path,
    sam: Promptable,
    model: ESPNetSegmenter,
    cache: EmbeddingCache,
    every: int,
    key: str,
) -> Table:
    """Refine every n-th test frame with each configuration, and tabulate the gains."""
    counts = GridCounts(SCORING, len(configs))
    data = camvid(root)
    data.setup("test")
    frames = data.test_dataloader().dataset
    loader = DataLoader(Subset(frames, range(0, len(frames), every)), batch_size=1)
    for batch in track(loader, description="test frames"):
        image, target = batch["image"][0], batch["mask"][0]
        probs = model(batch["image"])[0].softmax(dim=0)
        raw = probs.argmax(dim=0)
        truth = Truth(raw, target, SCORING)
        labels = [Refiner(sam, c, cache=cache)(image, probs).labels for c in configs.values()]
        counts.add(truth.totals, [truth.changes(refined) for refined in labels])

    table = Table(title=f"{key}: {len(counts)} test frames, gain in points", title_justify="left")
    for column in ("", "raw", *configs):
        table.add_column(column, justify="left" if column == "" else "right")
    ious = [class_ious(counts.totals(index, "miou").sum(axis=0)) for index in range(len(configs))]
    for c, name in enumerate(CLASS_NAMES):
        gains = (f"{100 * (refined[c] - raw[c]):+.2f}" for raw, refined in ious)
        table.add_row(name, f"{100 * ious[0][0][c]:.2f}", *gains)
    table.add_section()
    for name, objective in (("mIoU", "miou"), ("trimap mIoU", "trimap_miou")):
        totals = [counts.totals(index, objective) for index in range(len(configs))]
        raw = class_ious(totals[0].sum(axis=0))[0].mean()
        table.add_row(name, f"{100 * raw:.2f}", *(f"{100 * gain(t):+.2f}" for t in totals))
    losses = [[100 * min(0.0, refined[c] - raw[c]) for c in range(VOID)] for raw, refined in ious]
    table.add_row("classes that lose", "", *(str(sum(v < 0 for v in loss)) for loss in losses))
    table.add_row("their losses", "", *(f"{sum(loss):+.2f}" for loss in losses))
    return table


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.camvid.tune", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--preset", default="default", help="what the grid is laid around")
    parser.add_argument("--score-thresh", type=float, nargs="+", default=[0.0, 0.3, 0.5, 0.7])
    parser.add_argument("--mask-prompt-scale", type=float, nargs="+", default=[2.0, 4.0, 8.0, 16.0])
    parser.add_argument("--margin", type=float, default=0.0, help="see tune.margin of samrefine")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--judge", action="store_true", help="do not tune again")
    parser.add_argument("--every", type=int, default=1, help="every n-th frame of val and test")
    parser.add_argument("--resolution", nargs="+", choices=RESOLUTIONS, default=list(RESOLUTIONS))
    parser.add_argument(
        "--output", type=Path, default=REPOSITORY / "outputs" / "camvid_tune", help="the files"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
