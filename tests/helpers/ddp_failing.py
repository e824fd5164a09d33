"""Validates on two processes with a SAM that fails on one of them.

python ddp_failing.py 0|1
"""

from __future__ import annotations

import sys

import torch
from lightning.pytorch import Trainer
from lightning_stubs import NUM_CLASSES, REFINE, SILENT, Segmenter, loader
from stub_sams import FailingSam

from lightning_samrefine import SAMRefineCallback


def run(failing: str) -> None:
    sam = FailingSam(lambda images: str(torch.distributed.get_rank()) == failing)
    callback = SAMRefineCallback(sam, num_classes=NUM_CLASSES, refine=REFINE)
    trainer = Trainer(**SILENT, strategy="ddp", devices=2, callbacks=[callback])
    trainer.validate(Segmenter("logits"), loader(8), verbose=False)
    print("finished")


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(sys.argv[1])
