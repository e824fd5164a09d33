"""Kills prediction runs and restarts them; `test_kills.py` and `benchmarks.reliability` start it.

    python kill_trials.py FOLDER RANDOM_KILLS STEP_KILLS SEED

This process imports everything once and then forks a child for each run, so a kill costs no more
than the run itself. It holds no thread and has computed nothing when it forks. Prints one JSON
object; ends with an error where a folder differs from that of an undisturbed run.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from lightning_stubs import NUM_CLASSES, REFINE, SILENT, Blobs, Segmenter
from tiny_random_sam import build_random_sam
from torch.utils.data import DataLoader

from lightning_samrefine import SAMRefineWriter
from lightning_samrefine.models.sam import SamPromptable

IMAGES = 25  # neither batches of 2 nor 2 processes divide it
STEP_IMAGES = 3
_PR_SET_CHILD_SUBREAPER = 36


class Named(Blobs):
    def __getitem__(self, index):
        return {"image": self.images[index], "name": f"{index:03d}"}


class Predicting(Segmenter):
    def predict_step(self, batch, batch_idx):
        return self(batch["image"])


@dataclass
class Trials:
    """What was tried, and how it ended."""

    random_kills: int = 0
    of_two_processes: int = 0
    step_kills: int = 0
    folders: int = 0
    files_compared: int = 0
    torn_files_seen: int = 0


def predict(folder: Path, processes: int, images: int) -> None:
    """Predict as a user does, on one process or on two."""
    strategy = {"strategy": "ddp_fork", "devices": 2} if processes == 2 else {"devices": 1}
    sam = SamPromptable(build_random_sam(), "random")
    writer = SAMRefineWriter(
        folder, sam, num_classes=NUM_CLASSES, refine=REFINE, probs="uint8", queue_size=3
    )
    trainer = Trainer(**SILENT, **strategy, callbacks=[writer])
    loader = DataLoader(Named(images), batch_size=2)
    trainer.predict(Predicting(), loader, return_predictions=False)


def start(log: Path, work: Callable[[], None]) -> int:
    """Fork a child that does some work in a process group of its own, and return its id."""
    child = os.fork()
    if child:
        with contextlib.suppress(OSError):  # whoever is first
            os.setpgid(child, child)
        return child
    code = 1
    try:
        os.setpgid(0, 0)
        with log.open("w") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            torch.set_num_threads(1)
            work()
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def finish(child: int, log: Path) -> None:
    """Wait for a child that must succeed."""
    _, status = os.waitpid(child, 0)
    assert status == 0, log.read_text()[-4000:]


def kill(child: int) -> bool:
    """Kill a child with all that it started, and wait until they are gone; False if it is done."""
    done, status = os.waitpid(child, os.WNOHANG)
    if done:
        assert status == 0, f"a run failed by itself with status {status}"
        return False
    os.killpg(child, signal.SIGKILL)
    # Grandchildren come to this process, their subreaper.
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-child, 0)
    return True


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def compare(folder: Path, reference: dict[str, bytes], trials: Trials) -> None:
    found = contents(folder)
    assert found.keys() == reference.keys(), sorted(found.keys() ^ reference.keys())
    different = [name for name in found if found[name] != reference[name]]
    assert not different, f"other bytes in {different}"
    trials.folders += 1
    trials.files_compared += len(found)


def look(folder: Path, reference: dict[str, bytes], trials: Trials) -> None:
    """Count the files that are visible after a kill and hold something else than at the end."""
    trials.torn_files_seen += sum(
        content != reference[name]
        for name, content in contents(folder).items()
        if name in reference
    )


def random_kills(folder: Path, count: int, seed: int, trials: Trials) -> None:
    """Kill at uniformly random moments until ``count`` is reached and the last run is through."""
    log, rng = folder / "log.txt", random.Random(seed)
    duration = {}
    for processes in (1, 2):
        began = time.perf_counter()
        target = folder / f"reference_{processes}"
        finish(start(log, lambda p=processes, t=target: predict(t, p, IMAGES)), log)
        duration[processes] = time.perf_counter() - began
    reference = contents(folder / "reference_1")
    compare(folder / "reference_2", reference, trials)

    target = folder / "killed"
    while True:
        processes = rng.choice([1, 1, 2])
        child = start(log, lambda p=processes: predict(target, p, IMAGES))
        if trials.random_kills == count:
            finish(child, log)
        else:
            time.sleep(rng.uniform(0, duration[processes]))
            if kill(child):
                trials.random_kills += 1
                trials.of_two_processes += processes == 2
                look(target, reference, trials)
                continue
        compare(target, reference, trials)
        if trials.random_kills == count:
            return
        shutil.rmtree(target)


class Dying:
    """Stands in for functions that change the disk, and kills its process at one of the calls."""

    def __init__(self, call: int) -> None:
        self.call, self.calls = call, 0

    def wrap(self, owner: object, name: str) -> None:
        function = getattr(owner, name)

        def wrapped(*args, **kwargs):
            self.count()
            result = function(*args, **kwargs)
            self.count()
            return result

        setattr(owner, name, wrapped)

    def count(self) -> None:
        self.calls += 1
        if self.calls == self.call:
            os.kill(os.getpid(), signal.SIGKILL)


def dying_predict(folder: Path, call: int) -> None:
    dying = Dying(call)
    dying.wrap(os, "fsync")
    dying.wrap(Path, "replace")
    dying.wrap(shutil, "rmtree")
    predict(folder, 1, STEP_IMAGES)
    (folder.parent / "calls.txt").write_text(str(dying.calls))


def step_kills(folder: Path, count: int, trials: Trials) -> None:
    """Kill right before and right after each change of the disk, ``count`` of them from the end."""
    log, steps = folder / "log.txt", folder / "steps"
    steps.mkdir()
    finish(start(log, lambda: dying_predict(steps / "reference", 0)), log)
    reference = contents(steps / "reference")
    calls = int((steps / "calls.txt").read_text())
    for call in range(max(1, calls - count + 1), calls + 1):
        target = steps / f"{call}"
        child = start(log, lambda t=target, c=call: dying_predict(t, c))
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), f"call {call} of {calls} did not come"
        trials.step_kills += 1
        look(target, reference, trials)
        finish(start(log, lambda t=target: predict(t, 1, STEP_IMAGES)), log)
        compare(target, reference, trials)
        shutil.rmtree(target)


def main() -> None:
    folder, random_count, step_count, seed = Path(sys.argv[1]), *map(int, sys.argv[2:5])
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    trials = Trials()
    step_kills(folder, step_count, trials)
    random_kills(folder, random_count, seed, trials)
    assert trials.torn_files_seen == 0, "a file was visible before it was whole"
    print(json.dumps(asdict(trials)))


if __name__ == "__main__":
    main()
