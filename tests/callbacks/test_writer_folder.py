"""What goes wrong with a folder of predictions: names, stale predictions, a second run."""

from __future__ import annotations

import errno
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import ddp_writer
import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_stubs import NUM_CLASSES, REFINE, Blobs
from PIL import Image
from scripts import run_script
from stub_sams import CountingSam
from torch.utils.data import DataLoader, Subset
from writer_cases import Named, contents, named, predict, rows

from lightning_samrefine import Refiner
from lightning_samrefine.adapters.sample_names import Stem
from lightning_samrefine.data import FolderDataModule
from lightning_samrefine.predictions import folder_lock
from lightning_samrefine.predictions import run as prediction_run
from lightning_samrefine.predictions.fingerprints import Fingerprint
from lightning_samrefine.predictions.folder_lock import FolderLock
from lightning_samrefine.predictions.run import PredictCounts, PredictionRun
from lightning_samrefine.predictions.store import OutputFolder
from lightning_samrefine.refine.raw_prediction import first_argmax
from lightning_samrefine.segmenters import StoredPredictions


class Stored(LightningModule):
    """Returns what the data set has brought along, as `StoredPredictions` does."""

    def predict_step(self, batch, batch_idx):
        return {"probs": batch["probs"]}


class Predicted(Blobs):
    """Images with probabilities; those of one image may be another network's."""

    def __init__(self, length=4, changed=(), labels_too=True):
        super().__init__(length)
        generator = torch.Generator().manual_seed(5)
        noise = torch.rand(length, NUM_CLASSES, *self.images.shape[2:], generator=generator)
        self.probs = (3 * noise).softmax(dim=1)
        for index in changed:
            other = self.probs[index].roll(1, dims=0)
            if not labels_too:  # a temperature changes no label
                other = (0.3 * self.probs[index].log()).softmax(dim=0)
            self.probs[index] = other

    def __getitem__(self, index):
        return {"image": self.images[index], "name": f"{index}", "probs": self.probs[index]}


def logged(caplog):
    return [record.message for record in caplog.records if "images kept" in record.message]


class TestStalePredictions:
    @pytest.mark.parametrize("labels_too", [True, False])
    def test_a_new_prediction_of_the_same_image_is_written(self, tmp_path, caplog, labels_too):
        caplog.set_level(logging.INFO)
        sam = CountingSam()
        predict(tmp_path / "out", DataLoader(Predicted()), Stored(), sam, probs="uint8")
        dataset = Predicted(changed=[2], labels_too=labels_too)
        (tmp_path / "out/labels/0.png").unlink()
        writer, embedded = predict(
            tmp_path / "out", DataLoader(dataset), Stored(), CountingSam(), probs="uint8"
        )
        assert embedded == 2
        assert (writer.counts.kept, writer.counts.redone, writer.counts.written) == (2, 2, 2)
        assert logged(caplog)[0].startswith(
            "SAMRefineWriter: 0 images kept, 0 redone, 4 new; 4 in "
        )
        assert logged(caplog)[1].startswith(
            "SAMRefineWriter: 2 images kept, 2 redone, 0 new; 4 in "
        )
        refined = Refiner(sam, REFINE)(dataset.images[2], dataset.probs[2])
        with Image.open(tmp_path / "out/labels/2.png") as picture:
            assert np.array_equal(np.array(picture), refined.labels.numpy())
        predict(tmp_path / "fresh", DataLoader(dataset), Stored(), sam, probs="uint8")
        assert contents(tmp_path / "out") == contents(tmp_path / "fresh")

    def test_a_fingerprint_matches_a_prediction_up_to_its_last_bits(self):
        rng = np.random.default_rng(0)
        image = torch.from_numpy(rng.integers(0, 256, (3, 37, 53), dtype=np.uint8))
        probs = torch.from_numpy(rng.dirichlet(np.ones(5), (37, 53)).transpose(2, 0, 1)).float()
        labels = first_argmax(probs)
        found = Fingerprint.of(image, labels, probs)
        order = np.arange(37 * 53)
        weights = 0.5 + np.modf(order * 0.6180339887498949)[0]
        expected = (probs.double().numpy().reshape(5, -1) * weights).mean(axis=1)
        assert found.raw_probs == pytest.approx(expected, abs=1e-5)
        noise = probs * (1 + 1e-7 * torch.from_numpy(rng.normal(size=probs.shape)).float())
        assert Fingerprint.of(image, labels, noise).matches(found.columns())
        mirrored = probs.flip(1)
        others = [
            (image, labels, mirrored),
            (255 - image, labels, probs),
            (image, 4 - labels, probs),
        ]
        flatter = (probs + 1e-3) / (1 + 5e-3)
        for other in [*others, (image, labels, flatter)]:
            assert not Fingerprint.of(*other).matches(found.columns())


class TestNames:
    def test_one_image_with_two_predictions_is_refused(self, tmp_path):
        class Twice(Predicted):
            def __getitem__(self, index):
                return {**super().__getitem__(index), "image": self.images[0], "name": "same"}

        with pytest.raises(ValueError, match=r"stem must differ .* got 'same' for two diff"):
            predict(tmp_path, DataLoader(Twice()), Stored())

    def test_an_image_that_comes_twice_is_refined_once(self, tmp_path):
        class Again(Named):
            def __getitem__(self, index):
                return super().__getitem__(index % 2)

        writer, embedded = predict(tmp_path, DataLoader(Again(6)))
        assert (embedded, writer.counts.written, len(rows(tmp_path))) == (2, 2, 2)

    def test_names_that_differ_only_in_their_suffix_are_refused_at_the_second(self, tmp_path):
        class Suffixed(Named):
            def __getitem__(self, index):
                name = ["a.png", "b.png", "a.jpg", "c.png"][index]
                return {**super().__getitem__(index), "name": name}

        sam = CountingSam()
        with pytest.raises(ValueError, match=r"stem must differ .*suffix.* got 'a' for two diff"):
            predict(tmp_path, DataLoader(Suffixed(4)), sam=sam)
        assert sam.embedded == 2

    def test_a_clash_with_another_process_is_noticed_on_both(self, tmp_path, monkeypatch):
        monkeypatch.setattr(prediction_run, "_LOOK_SECONDS", 0.0)
        files = OutputFolder(tmp_path)
        runs = [PredictionRun(files, 0, rank, None, 2, PredictCounts()) for rank in (0, 1)]
        dataset = Predicted()
        found = [
            Fingerprint.of(image, first_argmax(probs), probs)
            for image, probs in zip(dataset.images, dataset.probs, strict=True)
        ]
        for rank, run in enumerate(runs):
            run._journal.add({"stem": f"own {rank}", **found[rank].columns()})
        assert not runs[0].is_done("x", found[0])
        runs[0]._journal.add({"stem": "x", **found[0].columns()})
        assert not runs[1].is_done("y", found[1])
        with pytest.raises(ValueError, match=r"stem must differ .* got 'x' for two diff"):
            runs[1].is_done("x", found[1])
        with pytest.raises(ValueError, match=r"stem must differ .* got 'x' for two diff"):
            runs[0].is_done("z", found[2])
        for run in runs:
            run.close()

    @pytest.mark.parametrize("listed", [True, False])
    @pytest.mark.parametrize("folds_case", [True, False])
    def test_names_that_differ_only_in_case(self, tmp_path, monkeypatch, folds_case, listed):
        class Cased(Named):
            names = [Stem("scene/A"), Stem("b"), Stem("scene/a")]  # noqa: RUF012

            def __getitem__(self, index):
                return {**super().__getitem__(index), "name": self.names[index]}

        loader = DataLoader(Cased(3) if listed else Subset(Cased(3), range(3)))
        if not folds_case:
            if (tmp_path / "x").mkdir() or (tmp_path / "X").exists():
                pytest.skip("this file system takes both for one")
            predict(tmp_path / "out", loader)
            assert {row["stem"] for row in rows(tmp_path / "out")} == set(Cased.names)
            return

        def exists(path, **kwargs):  # as on most disks of macOS and Windows
            found = path.parent.iterdir() if path.parent.is_dir() else ()
            return any(other.name.lower() == path.name.lower() for other in found)

        monkeypatch.setattr(Path, "exists", exists)
        sam, kind = CountingSam(), MisconfigurationException if listed else ValueError
        with pytest.raises(kind, match=r"stem must .*case.*, got 'scene/A' and 'scene/a'"):
            predict(tmp_path / "out", loader, sam=sam)
        assert sam.embedded == (0 if listed else 2)

    def test_names_of_a_folder_are_taken_as_they_are(self, tmp_path):
        dataset = Predicted(3)
        names = ["a.tif.png", "a.png", "größe.0.bmp"]
        for folder in ("images", "predictions"):
            (tmp_path / folder).mkdir()
        for index, name in enumerate(names):
            image = dataset.images[index].permute(1, 2, 0).numpy()
            Image.fromarray(image).save(tmp_path / "images" / name)
            np.savez(
                tmp_path / "predictions" / Path(name).with_suffix(".npz"),
                probs=dataset.probs[index].numpy(),
            )
        split = {key: str(tmp_path / key) for key in ("images", "predictions")}
        data = FolderDataModule(num_classes=NUM_CLASSES, predict=split)
        data.setup("predict")
        predict(tmp_path / "out", data.predict_dataloader(), StoredPredictions())
        written = {row["stem"]: row for row in rows(tmp_path / "out")}
        assert set(written) == {"a.tif", "a", "größe.0"}
        sam = Refiner(CountingSam(), REFINE)
        for index, stem in enumerate(("a.tif", "a", "größe.0")):
            expected = sam(dataset.images[index], dataset.probs[index]).labels
            with Image.open(tmp_path / "out/labels" / f"{stem}.png") as picture:
                assert np.array_equal(np.array(picture), expected.numpy())

    @pytest.mark.parametrize(
        ("name", "probs", "fits"),
        [
            ("x" * 250, "uint8", False),
            ("x" * 250, None, True),
            ("x" * 252, None, False),
            ("é" * 126, None, False),
            ("f" * 256 + "/x", None, False),
            ("/".join(["d" * 200] * 25), None, False),
        ],
    )
    def test_a_name_that_is_too_long_is_refused_before_any_work(self, tmp_path, name, probs, fits):
        class Long(Named):
            names = [Stem("short"), Stem(name)]  # noqa: RUF012

            def __getitem__(self, index):
                return {**super().__getitem__(index), "name": self.names[index]}

        for dataset, before in ((Long(2), 0), (Subset(Long(2), [0, 1]), 1)):
            if fits:
                predict(tmp_path / "out", DataLoader(dataset), probs=probs)
                assert {row["stem"] for row in rows(tmp_path / "out")} == {"short", name}
                continue
            sam = CountingSam()
            kind = MisconfigurationException if before == 0 else ValueError
            with pytest.raises(kind, match=r"stem must be shorter, got '"):
                predict(tmp_path / "out", DataLoader(dataset), sam=sam, probs=probs)
            assert sam.embedded == before


HOLD = """
import sys, time
from pathlib import Path
from lightning_samrefine.predictions.folder_lock import FolderLock
lock = FolderLock(Path(sys.argv[1]))
lock.acquire(int(sys.argv[2]))
print("held", flush=True)
sys.stdin.readline()
time.sleep(0.3)
lock.release()
"""


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(folder_lock, "WAIT_SECONDS", 0.2)


def holder(folder, rank):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder / ".locks"), str(rank)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(folder_lock.__file__).parents[1])},
    )
    assert process.stdout.readline() == "held\n"
    return process


class TestLock:
    @pytest.mark.slow
    @pytest.mark.parametrize("rank", [0, 3])
    def test_a_second_run_is_refused_and_a_killed_ones_lock_is_none(
        self, tmp_path, impatient, rank
    ):
        first = holder(tmp_path, rank)
        try:
            who = f"process {first.pid} on " if rank == 0 else "unknown process"
            with pytest.raises(MisconfigurationException, match=f"another run is writing.*{who}"):
                predict(tmp_path)
            assert contents(tmp_path).keys() <= {f".locks/{rank:05d}.lock", ".locks/owner.txt"}
        finally:
            first.send_signal(signal.SIGKILL)
            first.wait()
        predict(tmp_path)
        assert len(rows(tmp_path)) == 5
        assert not (tmp_path / ".locks").exists()

    @pytest.mark.slow
    @pytest.mark.parametrize("ending", ["killed", "finished"])
    def test_a_run_that_ends_meanwhile_is_waited_for(self, tmp_path, monkeypatch, ending):
        first, logged = holder(tmp_path, 0), []

        def end_first(message):
            logged.append(message)
            if ending == "killed":
                first.kill()
                first.wait()
            else:  # a moment later it removes its lock, and the folder of locks
                first.stdin.close()

        monkeypatch.setattr(folder_lock, "rank_zero_info", end_first)
        predict(tmp_path)
        first.wait()
        assert len(logged) == 1
        assert f"is held by another run (process {first.pid} on " in logged[0]
        assert len(rows(tmp_path)) == 5
        assert not (tmp_path / ".locks").exists()

    def test_two_writers_of_one_process_are_two_runs(self, tmp_path, impatient):
        lock = FolderLock(tmp_path / ".locks")
        lock.acquire(0)
        with pytest.raises(MisconfigurationException, match="another run is writing"):
            predict(tmp_path, overwrite=True)
        lock.release()
        lock.release()
        predict(tmp_path)

    def test_a_refused_run_leaves_no_lock(self, tmp_path, impatient):
        predict(tmp_path, named(1))
        for _ in range(2):
            with pytest.raises(MisconfigurationException, match=r"inputs\.probs"):
                predict(tmp_path, named(1), probs="uint8")
            assert not (tmp_path / ".locks").exists()

    def test_a_file_system_without_locks_is_pointed_out(self, tmp_path, monkeypatch):
        def refuse(self, *args, **kwargs):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(folder_lock.FileLock, "acquire", refuse)
        with pytest.warns(RuntimeWarning, match="has no locks"):
            predict(tmp_path, named(1))
        assert len(rows(tmp_path)) == 1


@pytest.fixture(scope="module")
def failed_on_two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    run_script(ddp_writer, folder)  # a process that waited for the other would end in its timeout
    return folder


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs fork")
@pytest.mark.parametrize("case", list(ddp_writer.CASES))
def test_an_error_of_one_process_reaches_the_other(failed_on_two, case):
    messages = [(failed_on_two / case / f"{rank}.txt").read_text() for rank in (0, 1)]
    found = [ddp_writer.CASES[case] in message for message in messages]
    # Between two batches the processes do not wait for one another: the first to notice ends.
    assert any(found) if case == "names" else all(found), messages
    assert "no error" not in messages
