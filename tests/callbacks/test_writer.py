"""SAMRefineWriter under a real Trainer: what lies in the folder, and what a restart does."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_stubs import NUM_CLASSES, REFINE, SILENT, Blobs
from PIL import Image
from safetensors.torch import load_file
from stub_sams import CountingSam
from tiny_random_sam import build_random_sam
from torch.utils.data import DataLoader, Subset
from writer_cases import Named, Predicting, contents, named, predict, rows

from lightning_samrefine import RefineConfig, Refiner, SAMRefineWriter
from lightning_samrefine.models.sam import SamPromptable
from lightning_samrefine.predictions.store import OutputFolder
from lightning_samrefine.utils.background_writer import BackgroundWriter

pytestmark = pytest.mark.numerical


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """The folder of an undisturbed run, for tests that copy it."""
    folder = tmp_path_factory.mktemp("complete") / "out"
    predict(folder, probs="uint8")
    return folder


@pytest.fixture
def copy(complete, tmp_path):
    return Path(shutil.copytree(complete, tmp_path / "copy"))


class TestFiles:
    def test_label_maps_are_what_the_refiner_gives(self, complete, random_sam):
        dataset, module, refiner = Named(5), Predicting().eval(), Refiner(random_sam, REFINE)
        changed = 0
        for index in range(5):
            with torch.no_grad():
                probs = module.network(dataset.images[index][None] / 255 - 0.5)[0].softmax(dim=0)
            out = refiner(dataset.images[index], probs)
            with Image.open(complete / f"labels/scene/{index:03d}.png") as picture:
                assert picture.mode == "P"
                assert np.array_equal(np.array(picture), out.labels.numpy())
            stored = load_file(complete / f"probs/scene/{index:03d}.safetensors")["probs"]
            expected = (out.probs * 255).round().to(torch.uint8)
            assert torch.equal(stored, expected)
            row = rows(complete)[index]
            assert row["stem"] == f"scene/{index:03d}"
            assert (row["height"], row["width"]) == dataset.images.shape[-2:]
            assert row["regions"] == len(out.regions)
            assert row["accepted"] == len(out.pred_iou)
            assert row["pred_iou"] == out.regions.pred_iou.tolist()
            changed += not torch.equal(out.labels, probs.argmax(dim=0))
        assert changed

    def test_the_folder_holds_nothing_else(self, complete):
        names = {f"labels/scene/{i:03d}.png" for i in range(5)}
        names |= {f"probs/scene/{i:03d}.safetensors" for i in range(5)}
        assert contents(complete).keys() == names | {"manifest.parquet", "run.json"}
        hashes = {(r["thresholds_hash"], r["sam_fingerprint"]) for r in rows(complete)}
        assert len(hashes) == 1
        assert all(hashes.pop())

    def test_float16_probabilities_and_none(self, tmp_path):
        predict(tmp_path / "half", named(1), probs="float16")
        (path,) = (tmp_path / "half/probs").rglob("*.safetensors")
        assert load_file(path)["probs"].dtype == torch.float16
        predict(tmp_path / "none", named(1))
        assert not (tmp_path / "none/probs").exists()
        assert rows(tmp_path / "none")[0]["probs_bytes"] is None

    def test_many_classes_are_16_bit(self, tmp_path):
        module = Predicting(channels=300)
        predict(tmp_path, named(1), module, num_classes=300, refine="algorithm4")
        with Image.open(tmp_path / "labels/scene/000.png") as picture:
            assert picture.mode == "I;16"
            assert np.array(picture).max() > 255

    @pytest.mark.parametrize(("classes", "unknown"), [(3, 255), (300, 65535)])
    def test_unknown_pixels_have_a_value_of_their_own(self, tmp_path, classes, unknown):
        class Labels(Predicting):
            def predict_step(self, batch, batch_idx):
                labels = super().predict_step(batch, batch_idx).argmax(dim=1)
                labels[:, :5] = -1
                labels[:, 5:8] = 70_000
                return {"preds": labels}

        predict(tmp_path, named(1), Labels(), num_classes=classes, refine={"min_region_area": 9999})
        with Image.open(tmp_path / "labels/scene/000.png") as picture:
            assert (np.array(picture)[:8] == unknown).all()
            assert (np.array(picture)[8:] < classes).all()

    def test_images_without_names_are_numbered(self, tmp_path):
        class Bare(Blobs):
            def __getitem__(self, index):
                return self.images[index]

        predict(tmp_path, DataLoader(Bare(3), batch_size=2))
        assert [row["stem"] for row in rows(tmp_path)] == ["00000000", "00000001", "00000002"]

    def test_a_target_that_does_not_fit_is_nobodys_business(self, tmp_path):
        class WithTarget(Named):
            def __getitem__(self, index):
                return {**super().__getitem__(index), "mask": torch.zeros(7, 9).long()}

        predict(tmp_path, DataLoader(WithTarget(2)))
        assert len(rows(tmp_path)) == 2

    def test_several_loaders_have_folders_of_their_own(self, tmp_path):
        predict(tmp_path, [named(1), named(1, seed=4)])
        assert [row["stem"] for row in rows(tmp_path)] == ["0/scene/000", "1/scene/000"]

    def test_16_images_in_another_order_and_batch_size_give_the_same_bytes(self, tmp_path):
        predict(tmp_path / "a", named(16, batch_size=1))
        order = torch.randperm(16, generator=torch.Generator().manual_seed(1)).tolist()
        predict(tmp_path / "b", DataLoader(Subset(Named(16), order), batch_size=3))
        assert contents(tmp_path / "a") == contents(tmp_path / "b")


class TestRestart:
    def test_what_is_complete_is_not_refined_again(self, copy):
        before = contents(copy)
        writer, embedded = predict(copy, probs="uint8")
        assert embedded == 0
        assert (writer.counts.kept, writer.counts.written) == (5, 0)
        assert contents(copy) == before

    @pytest.mark.parametrize("how", ["missing", "torn", "another content", "probs missing"])
    def test_what_is_damaged_is_written_again(self, copy, how):
        before = contents(copy)
        path = copy / "labels/scene/002.png"
        if how == "missing":
            path.unlink()
        elif how == "torn":
            path.write_bytes(path.read_bytes()[:40])
        elif how == "another content":
            path.write_bytes(bytes(len(path.read_bytes())))
        else:
            (copy / "probs/scene/002.safetensors").unlink()
        writer, embedded = predict(copy, probs="uint8")
        assert (embedded, writer.counts.kept) == (1, 4)
        assert contents(copy) == before

    @pytest.mark.parametrize("damage", [b"", b"PAR1 nothing of the kind PAR1"])
    def test_a_damaged_manifest_costs_work_and_nothing_else(self, copy, damage):
        before = contents(copy)
        (copy / "manifest.parquet").write_bytes(damage)
        _, embedded = predict(copy, probs="uint8")
        assert embedded == 5
        assert contents(copy) == before

    def test_an_image_that_changed_is_refined_again(self, copy):
        dataset = Named(5)
        dataset.images[3] = 255 - dataset.images[3]
        writer, _ = predict(copy, DataLoader(dataset, batch_size=2), probs="uint8")
        assert (writer.counts.kept, writer.counts.written) == (4, 1)

    def test_an_interrupted_run_goes_on_where_it_was(self, complete, tmp_path):
        class Stopping(Predicting):
            def predict_step(self, batch, batch_idx):
                if batch_idx == 2:
                    raise KeyError("stop")
                return super().predict_step(batch, batch_idx)

        sam = CountingSam()
        with pytest.raises(KeyError):
            predict(tmp_path, module=Stopping(), sam=sam, probs="uint8")
        assert sam.embedded == 4
        assert not (tmp_path / "manifest.parquet").exists()
        # Its class is another, its weights are equal: that is not what a restart looks like.
        with pytest.raises(MisconfigurationException, match=r"segmenter\.class: .*Stopping"):
            predict(tmp_path, probs="uint8")
        shutil.rmtree(tmp_path / "labels")
        (tmp_path / "run.json").write_bytes((complete / "run.json").read_bytes())
        predict(tmp_path, probs="uint8")
        assert contents(tmp_path) == contents(complete)

    def test_failed_images_are_tried_again(self, copy, complete):
        class Failing(CountingSam):
            def encode_images(self, images):
                if torch.equal(images[0], Named(5).images[1]):
                    raise RuntimeError("an image")
                return super().encode_images(images)

        shutil.rmtree(copy)
        with pytest.warns(RuntimeWarning, match="keeps its raw prediction") as caught:
            writer, _ = predict(copy, named(batch_size=1), sam=Failing(), probs="uint8")
        assert sum(_says_writer(w) for w in caught) == 1
        assert writer.counts.failed == 1
        assert [row["failed"] for row in rows(copy)] == [False, True, False, False, False]
        # It is the first that is refined now, but others of its loader have been.
        with pytest.warns(RuntimeWarning, match="keeps its raw prediction"):
            writer, _ = predict(copy, named(batch_size=1), sam=Failing(), probs="uint8")
        assert (writer.counts.failed, writer.counts.kept) == (1, 4)
        _, embedded = predict(copy, probs="uint8")
        assert embedded == 1
        assert not any(row["failed"] for row in rows(copy))

    def test_a_part_of_the_data_keeps_the_rest_listed(self, copy):
        predict(copy, DataLoader(Subset(Named(5), [1])), probs="uint8")
        assert len(rows(copy)) == 5
        (copy / "labels/scene/004.png").unlink()
        predict(copy, DataLoader(Subset(Named(5), [1])), probs="uint8")
        assert [row["stem"][-1] for row in rows(copy)] == ["0", "1", "2", "3"]


def _says_writer(warning):
    return "SAMRefineWriter" in str(warning.message)


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "difference"),
        [
            ({"refine": RefineConfig(min_region_area=4, pred_iou_thresh=0.4)}, "pred_iou_thresh"),
            ({"sam": SamPromptable(build_random_sam(5), "counting")}, r"sam\.weights"),
            ({"probs": None}, r"inputs\.probs"),
            ({"module": Predicting("logits", "child")}, None),
        ],
    )
    def test_results_of_other_settings_are_not_mixed(self, copy, arguments, difference):
        arguments = {"probs": "uint8", "sam": CountingSam(), **arguments}
        module = arguments.pop("module", None)
        sam = arguments.pop("sam")
        sam.embedded = 0
        if difference is None:  # other weights of the segmenter
            with torch.no_grad():
                module.network.bias += 0.5
            difference = r"segmenter\.weights"
        before = contents(copy)
        with pytest.raises(MisconfigurationException, match=rf"{difference}: .* there, .* now"):
            predict(copy, module=module, sam=sam, **arguments)
        assert contents(copy) == before
        predict(copy, named(2), module, sam, overwrite=True, **arguments)
        assert len(rows(copy)) == 2
        assert sum(name.startswith("labels") for name in contents(copy)) == 2
        predict(copy, named(2), module, sam, **arguments)

    def test_overwrite_keeps_results_of_the_same_settings(self, copy):
        assert predict(copy, probs="uint8", overwrite=True)[1] == 0

    def test_max_prompts_per_batch_is_no_other_setting(self, copy):
        refine = RefineConfig(min_region_area=4, pred_iou_thresh=0.5, max_prompts_per_batch=1)
        assert predict(copy, probs="uint8", refine=refine)[1] == 0

    def test_a_folder_of_something_else_is_left_alone(self, tmp_path):
        (tmp_path / "labels").mkdir()
        (tmp_path / "labels" / "truth.png").write_text("precious")
        for overwrite in (False, True):
            with pytest.raises(MisconfigurationException, match=r"holds labels and no run\.json"):
                predict(tmp_path, overwrite=overwrite)
        assert contents(tmp_path) == {"labels/truth.png": b"precious"}

    def test_a_damaged_run_json_is_refused(self, copy):
        (copy / "run.json").write_text("{")
        with pytest.raises(
            MisconfigurationException, match=r"run\.json cannot be read: text must be JSON"
        ):
            predict(copy, probs="uint8")
        assert predict(copy, probs="uint8", overwrite=True)[1] == 5

    def test_one_name_for_two_images_is_refused_at_the_second(self, tmp_path):
        class Same(Named):
            def __getitem__(self, index):
                return {**super().__getitem__(index), "name": "same" if index in (0, 3) else "x"}

        dataset, sam = Subset(Same(6), [0, 1, 3, 4, 5]), CountingSam()
        with pytest.raises(ValueError, match=r"stem must differ .* got 'same' for two different i"):
            predict(tmp_path, DataLoader(dataset), sam=sam)
        assert sam.embedded == 2
        # A kill between the two does not hide it.
        with pytest.raises(ValueError, match=r"stem must differ .* got 'same' for two different i"):
            predict(tmp_path, DataLoader(dataset), sam=sam)
        assert sam.embedded == 2
        assert not (tmp_path / "manifest.parquet").exists()

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"probs": "float64"}, ValueError, "probs must be .*, got 'float64'"),
            ({"queue_size": 0}, ValueError, "queue_size must be .*, got 0"),
            ({"stem_key": 3}, TypeError, "stem_key must be .*, got 3"),
            ({"num_classes": 70_000}, ValueError, "num_classes must be at most 65535.*got 70000"),
            ({"sam": 3}, TypeError, "sam must be a name for load_sam or a Promptable, got int"),
            ({"checkpoint": "x.pt"}, ValueError, "checkpoint must be None beside"),
            ({"refine": "bets"}, ValueError, "refine must be .*, got 'bets'"),
        ],
    )
    def test_bad_arguments_name_themselves(self, tmp_path, random_sam, arguments, error, message):
        with pytest.raises(error, match=message):
            SAMRefineWriter(tmp_path, **{"sam": random_sam, "num_classes": 3, **arguments})


class TestFaults:
    def test_a_batch_that_cannot_be_read_is_left_out_and_counted(self, tmp_path):
        class Changing(Predicting):
            def predict_step(self, batch, batch_idx):
                scores = super().predict_step(batch, batch_idx)
                return torch.cat([scores, scores], dim=2) if batch_idx == 1 else scores

        with pytest.warns(RuntimeWarning) as caught:
            writer, _ = predict(tmp_path, module=Changing())
        messages = [str(w.message) for w in caught if _says_writer(w)]
        assert "a batch could not be read" in messages[0]
        assert "2 images were in batches that could not be read" in messages[1]
        assert writer.counts.unread == 2
        assert [row["stem"][-1] for row in rows(tmp_path)] == ["0", "1", "4"]

    def test_an_empty_loader_writes_nothing(self, tmp_path):
        with pytest.warns(UserWarning, match="no batch came"):
            predict(tmp_path / "out", DataLoader([]))
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("flags", [{"fast_dev_run": True}, {"limit_predict_batches": 1}])
    def test_parts_of_a_run(self, tmp_path, flags):
        predict(tmp_path, trainer=flags, loaders=named(batch_size=1))
        assert len(rows(tmp_path)) == 1
        predict(tmp_path)
        assert len(rows(tmp_path)) == 5

    def test_predictions_that_lightning_keeps_are_pointed_out(self, tmp_path, random_sam):
        writer = SAMRefineWriter(tmp_path, random_sam, num_classes=NUM_CLASSES)
        with pytest.warns(UserWarning, match="return_predictions=False"):
            Trainer(**SILENT, callbacks=[writer]).predict(Predicting(), named(1))

    def test_a_full_disk_ends_the_run(self, tmp_path, monkeypatch):
        def full(self, path, content):
            if "002" in str(path):
                raise OSError(28, "No space left on device")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

        monkeypatch.setattr(OutputFolder, "write", full)
        with pytest.raises(OSError, match="No space left"):
            predict(tmp_path, named(40, batch_size=1))

    def test_everything_is_let_go(self, tmp_path):
        module = Predicting()
        writer, _ = predict(tmp_path, module=module)
        assert writer._attached is None
        assert writer._writing is None
        assert not any(m._forward_hooks for m in module.modules())
        assert not [t for t in threading.enumerate() if t.name == "samrefine-writer"]


class TestBackground:
    def test_the_queue_has_a_bound_and_order(self):
        gate, done, waiting = threading.Event(), [], []
        writer = BackgroundWriter(2)

        def job(index):
            gate.wait()
            done.append(index)

        def produce():
            for index in range(20):
                writer.put(lambda index=index: job(index))
                waiting.append(index)

        producer = threading.Thread(target=produce)
        producer.start()
        time.sleep(0.2)
        assert len(waiting) <= 3  # one at work, two in the queue
        gate.set()
        producer.join()
        writer.close()
        assert done == list(range(20))

    def test_an_error_reaches_the_producer_and_nobody_waits_forever(self):
        def fail():
            raise OSError("full")

        writer = BackgroundWriter(1)

        def produce():
            for _ in range(100):
                writer.put(fail)

        with pytest.raises(OSError, match="full"):
            produce()
        with pytest.raises(OSError, match="full"):
            writer.close()
