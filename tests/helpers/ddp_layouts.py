"""Evaluates the same images in many distributed layouts; `test_callback_ddp.py` and
`benchmarks.reliability` start it.

    python ddp_layouts.py FOLDER LAYOUTS

LAYOUTS is ``short`` or ``all``. This process imports everything once and forks the processes of
each layout, which find one another as torchrun's would. Prints one JSON object; ends with an error
where a process logs anything but what a single process logs, or hangs.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from kill_trials import Named, contents, start
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning_stubs import NUM_CLASSES, REFINE, SILENT, Blobs, Segmenter
from stub_sams import FailingSam
from tiny_random_sam import build_random_sam
from torch.utils.data import DataLoader

from lightning_samrefine import SAMRefineCallback, SAMRefineWriter
from lightning_samrefine.models.sam import SamPromptable

# Images without a region, and that SAM fails at, wherever they are; never the first of a process.
UNREGIONED, FAILING = 1, 4
SECONDS = 120


class Step(Segmenter):
    """Predicts nothing at all for one image, and shards its weights if that is wanted."""

    def __init__(self, sharded: bool) -> None:
        super().__init__()
        self.sharded = sharded

    def configure_model(self) -> None:
        if self.sharded:
            from torch.distributed.fsdp import fully_shard

            fully_shard(self.network, mesh=self.device_mesh["data_parallel"])
            fully_shard(self, mesh=self.device_mesh["data_parallel"])

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        images, _ = batch
        # Through the child, whose weights are gathered for it where they are sharded.
        labels = self.network(images / 255 - 0.5).argmax(dim=1)
        labels[(images == Blobs(8).images[UNREGIONED]).flatten(1).all(dim=1)] = 255
        return {"preds": labels}

    def predict_step(self, batch, batch_idx):
        return {"logits": self.network(batch["image"] / 255 - 0.5)}


@dataclass(frozen=True)
class Layout:
    """How many images, how they are dealt out, and under which strategy."""

    processes: int
    images: int
    batch_size: int
    strategy: str = "ddp"
    max_batches: int | None = None
    shuffle: bool = False


def layouts(which: str) -> list[Layout]:
    short = [
        Layout(2, 5, 2),
        Layout(3, 7, 2),
        Layout(2, 1, 1),
        Layout(2, 5, 1, "model_parallel"),
        Layout(2, 7, 2, max_batches=1),
    ]
    if which == "short":
        return short
    more = [
        Layout(processes, images, batch_size, shuffle=processes == 2 and batch_size == 2)
        for processes in (2, 3, 4)
        for images in (3, 5, 8)
        for batch_size in (1, 2, 3)
    ]
    more += [Layout(2, images, 2, "model_parallel") for images in (3, 8)]
    more += [Layout(3, 8, 1, max_batches=2)]
    return list(dict.fromkeys(short + more))


def trainer_of(layout: Layout, single: bool, callback: Callback) -> Trainer:
    strategy = "auto" if single else layout.strategy
    if strategy == "model_parallel":
        strategy = ModelParallelStrategy(layout.processes, 1, process_group_backend="gloo")
    devices = 1 if single else layout.processes
    return Trainer(**SILENT, strategy=strategy, devices=devices, callbacks=[callback])


def evaluate(layout: Layout, single: bool, path: Path) -> None:
    """Run one process of a layout, and leave what it logged."""
    failing = Blobs(8).images[FAILING]
    sam = FailingSam(lambda images: any(torch.equal(image, failing) for image in images))
    callback = SAMRefineCallback(
        sam,
        num_classes=NUM_CLASSES,
        refine=REFINE,
        log="all",
        max_batches=None if single else layout.max_batches,
    )
    trainer = trainer_of(layout, single, callback)
    dataset = Blobs(8)
    dataset.images, dataset.targets = (
        dataset.images[: layout.images],
        dataset.targets[: layout.images],
    )
    loader = DataLoader(dataset, layout.batch_size, shuffle=layout.shuffle and not single)
    module = Step(sharded=layout.strategy == "model_parallel" and not single)
    trainer.validate(module, loader, verbose=False)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    path.write_text(json.dumps(metrics))


def predict(layout: Layout, single: bool, folder: Path, kept: int) -> None:
    """Predict into a folder in which ``kept`` images are complete already."""
    sam = SamPromptable(build_random_sam(), "random")
    writer = SAMRefineWriter(folder, sam, num_classes=NUM_CLASSES, refine=REFINE)
    trainer = trainer_of(layout, single, writer)
    module = Step(sharded=layout.strategy == "model_parallel" and not single)
    loader = DataLoader(Named(layout.images), batch_size=layout.batch_size)
    trainer.predict(module, loader, return_predictions=False)
    assert writer.counts.kept == (kept if single else len(range(trainer.global_rank, kept, 2)))


def compare_predictions(folder: Path) -> int:
    """Write with sharded weights what one process has written, and go on where it ended."""
    layout = Layout(2, 5, 2, "model_parallel")
    log, one, two = folder / "single.log", folder / "one", folder / "two"
    wait([(start(log, lambda: predict(layout, True, one, 0)), log)], layout)
    expected = contents(one)
    fork(layout, folder, lambda rank: predict(layout, False, two, 0))
    assert contents(two) == expected
    fork(layout, folder, lambda rank: predict(layout, False, one, layout.images))
    assert contents(one) == expected
    return len(expected)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def fork(layout: Layout, folder: Path, work: Callable[[int], None]) -> None:
    """Run some work in all processes of a layout."""
    port, children = free_port(), []
    for rank in range(layout.processes):

        def work_of_rank(rank: int = rank) -> None:
            where = {"LOCAL_RANK": rank, "NODE_RANK": 0, "WORLD_SIZE": layout.processes}
            where |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ.update({key: str(value) for key, value in where.items()})
            work(rank)

        log = folder / f"{rank}.log"
        children.append((start(log, work_of_rank), log))
    wait(children, layout)


def run_layout(layout: Layout, folder: Path) -> list[dict[str, float]]:
    """Run a layout, and return what each of its processes logged."""
    fork(layout, folder, lambda rank: evaluate(layout, False, folder / f"{rank}.json"))
    return [untimed(folder / f"{rank}.json") for rank in range(layout.processes)]


def wait(children: list[tuple[int, Path]], layout: Layout) -> None:
    end = time.monotonic() + SECONDS
    for child, log in children:
        while (result := os.waitpid(child, os.WNOHANG)) == (0, 0):
            if time.monotonic() > end:
                for other, _ in children:
                    os.killpg(other, 9)
                raise AssertionError(f"{layout} hangs: {log.read_text()[-2000:]}")
            time.sleep(0.02)
        assert result[1] == 0, f"{layout}: {log.read_text()[-4000:]}"


def untimed(path: Path) -> dict[str, float]:
    metrics = json.loads(path.read_text())
    return {name: value for name, value in metrics.items() if "refine_ms" not in name}


def main() -> None:
    folder = Path(sys.argv[1])
    compared = {"layouts": 0, "processes": 0, "figures": 0, "failed_images": 0}
    by_strategy: dict[str, int] = {}
    for layout in layouts(sys.argv[2]):
        log = folder / "single.log"
        wait(
            [(start(log, lambda one=layout: evaluate(one, True, folder / "single.json")), log)],
            layout,
        )
        single, ranks = untimed(folder / "single.json"), run_layout(layout, folder)
        for rank, logged in enumerate(ranks):
            assert logged == ranks[0], f"{layout}: rank {rank} differs from rank 0"
            if layout.max_batches is None:
                assert logged == single, (
                    f"{layout}: rank {rank} logs {logged}, one process {single}"
                )
            else:  # it counts batches of each process, so only the names are the same
                assert logged.keys() == single.keys()
            compared["figures"] += len(logged)
        compared["layouts"] += 1
        compared["processes"] += layout.processes
        compared["failed_images"] += int(single["val/refine_failed_images"])
        by_strategy[layout.strategy] = by_strategy.get(layout.strategy, 0) + 1
    assert compared["failed_images"] > 0, "no process ever skipped SAM"
    compared["predicted_files"] = compare_predictions(folder)
    print(json.dumps({**compared, "by_strategy": by_strategy, "last": asdict(layout)}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
