"""Predicts on two processes, one of which fails; `test_writer_folder.py` starts it.

    python ddp_writer.py FOLDER

In every case every rank leaves the error that ended it in FOLDER/CASE/RANK.txt.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import torch
from ddp_layouts import Layout, Step, fork, trainer_of
from kill_trials import Named
from lightning_stubs import NUM_CLASSES, REFINE
from tiny_random_sam import build_random_sam
from torch.utils.data import DataLoader

from lightning_samrefine import SAMRefineWriter
from lightning_samrefine.models.sam import SamPromptable
from lightning_samrefine.predictions.store import OutputFolder

# What fails on process 0, or on 1, and what both say.
CASES = {
    "prepare": "prepare broke",
    "contents": "contents broke",
    "finish": "finish broke",
    "write": "the disk broke",
    "names": "got 'same' for two different images",
}


class Same(Named):
    """The last images of both processes have one name."""

    def __getitem__(self, index):
        name = "same" if index >= len(self) - 2 else f"{index}"
        return {**super().__getitem__(index), "name": name}


def failing(message: str):
    def fail(*args, **kwargs):
        raise LookupError(message)

    return fail


def predict(case: str, folder: Path, rank: int) -> None:
    layout = Layout(2, 4, 1)
    if case in ("prepare", "contents", "finish") and rank == 0:
        setattr(OutputFolder, case, failing(f"{case} broke"))
    if case == "write" and rank == 0:
        write = OutputFolder.write_prediction

        def last_fails(self, row, labels, probs):
            if row["stem"] == "002":
                raise LookupError("the disk broke")
            return write(self, row, labels, probs)

        OutputFolder.write_prediction = last_fails
    sam = SamPromptable(build_random_sam(), "random")
    writer = SAMRefineWriter(folder / "out", sam, num_classes=NUM_CLASSES, refine=REFINE)
    trainer = trainer_of(layout, False, writer)
    dataset = Same(4) if case == "names" else Named(4)
    try:
        trainer.predict(Step(False), DataLoader(dataset), return_predictions=False)
        message = "no error"
    except Exception as error:
        message = str(error)
    (folder / f"{rank}.txt").write_text(message)


def main() -> None:
    for case in CASES:  # in one script, for its imports take longer than a case
        folder = Path(sys.argv[1]) / case
        folder.mkdir()
        fork(Layout(2, 4, 1), folder, partial(predict, case, folder))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
