"""A set-up that fails from the first batch on is raised; later failures are warned of by kind."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import ddp_failing
import pytest
import torch
from lightning.pytorch import Trainer
from lightning_stubs import IGNORE, NUM_CLASSES, REFINE, SILENT, Blobs, Segmenter, loader
from tiny_random_sam import build_random_sam
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassJaccardIndex

from lightning_samrefine import SAMRefineCallback, SAMRefineWriter
from lightning_samrefine.models.sam import SamPromptable

SIZES = [(32, 40), (32, 44), (32, 48), (32, 52), (32, 56)]


class Mistyped(SamPromptable):
    """Has a typo in `embed`, which no image survives."""

    def encode_images(self, images):
        return super().encode_images([image.to(self.devise) for image in images])


class FailingAt(SamPromptable):
    """Raises for images of some widths, which tell the images of a test apart."""

    def __init__(self, errors):
        super().__init__(build_random_sam(), "failing")
        self.errors = errors

    def encode_images(self, images):
        for image in images:
            if (error := self.errors.get(image.shape[-1])) is not None:
                raise error
        return super().encode_images(images)


class Sizes(torch.utils.data.Dataset):
    """One image of each of `SIZES`."""

    def __len__(self):
        return len(SIZES)

    def __getitem__(self, index):
        return Blobs(1, seed=index, hw=SIZES[index])[0]


def one_by_one():
    return DataLoader(Sizes(), batch_size=1)


def attach(sam, **kwargs):
    return SAMRefineCallback(sam, num_classes=NUM_CLASSES, refine=REFINE, **kwargs)


def validate(callback, loaders, module=None):
    trainer = Trainer(**SILENT, callbacks=[callback])
    results = trainer.validate(module or Segmenter("logits"), loaders, verbose=False)
    return {key: value for one in results for key, value in one.items()}


class TestFirstBatch:
    def test_a_typo_in_embed_is_raised_with_its_traceback(self):
        sam = Mistyped(build_random_sam(), "mistyped")
        with pytest.raises(AttributeError, match="devise") as caught:
            validate(attach(sam), loader(4))
        assert any(entry.name == "encode_images" for entry in caught.traceback)
        if sys.version_info >= (3, 11):
            (note,) = caught.value.__notes__
            assert "all 2 images of the first batch" in note

    def test_a_typo_in_embed_is_raised_in_fit(self):
        sam = Mistyped(build_random_sam(), "mistyped")
        trainer = Trainer(**SILENT, max_epochs=3, callbacks=[attach(sam)])
        with pytest.raises(AttributeError, match="devise"):
            trainer.fit(Segmenter(), loader(), loader())
        assert trainer.current_epoch == 0

    def test_a_typo_in_embed_is_raised_in_predict(self, tmp_path):
        sam = Mistyped(build_random_sam(), "mistyped")
        writer = SAMRefineWriter(tmp_path / "out", sam, num_classes=NUM_CLASSES, refine=REFINE)

        class Predicting(Segmenter):
            def predict_step(self, batch, batch_idx):
                return self(batch[0])

        trainer = Trainer(**SILENT, callbacks=[writer])
        with pytest.raises(AttributeError, match="devise"):
            trainer.predict(Predicting(), loader(4), return_predictions=False)

    def test_the_error_keeps_its_cause(self):
        cause = OSError("weights on a disk that is gone")
        error = RuntimeError("encoder")
        error.__cause__ = cause
        sam = FailingAt({hw[1]: error for hw in SIZES})
        with pytest.raises(RuntimeError, match="encoder") as caught:
            validate(attach(sam), one_by_one())
        assert caught.value.__cause__ is cause

    def test_every_loader_has_a_first_batch(self):
        sam = FailingAt({56: RuntimeError("a size that the second loader alone has")})
        wide = DataLoader(Blobs(2, hw=(32, 56)), batch_size=2)
        with pytest.raises(RuntimeError, match="second loader alone"):
            validate(attach(sam), [loader(4), wide])

    def test_scores_without_a_finite_value(self):
        class Nan(Segmenter):
            def forward(self, image):
                return super().forward(image) * float("nan")

        sam = SamPromptable(build_random_sam(), "random")
        with pytest.raises(ValueError, match=r"scores must be finite, got NaN or infinite values"):
            validate(attach(sam), loader(4), Nan("logits"))

    def test_one_image_that_works_proves_the_set_up(self):
        class Pairs(Sizes):
            def __len__(self):
                return 4

            def __getitem__(self, index):
                return Blobs(1, seed=index, hw=(32, 40))[0]

        calls = iter(range(100))

        class FirstAlone(SamPromptable):
            def encode_images(self, images):
                # The batch of two, then its first image; everything from the third batch on.
                if next(calls) in {0, 1}:
                    raise RuntimeError("one image")
                return super().encode_images(images)

        with pytest.warns(RuntimeWarning, match="one image"):
            logged = validate(
                attach(FirstAlone(build_random_sam(), "x")), DataLoader(Pairs(), batch_size=2)
            )
        assert logged["val/refine_failed_images"] == 1

    def test_epochs_after_the_first_never_end_the_run(self):
        sam = FailingAt({})

        class Breaking(Segmenter):
            def on_train_epoch_end(self):
                sam.errors = {40: RuntimeError("gone")}

        trainer = Trainer(**SILENT, max_epochs=2, callbacks=[attach(sam, cache=None)])
        with pytest.warns(RuntimeWarning, match="gone"):
            trainer.fit(Breaking(), loader(4), loader(4))
        assert trainer.callback_metrics["val/refine_failed_images"] == 4


class TestKinds:
    def test_each_kind_is_warned_of_once(self):
        class Broken(Segmenter):
            def forward(self, image):
                logits = super().forward(image)
                if image.shape[-1] >= 52:
                    logits[:, :, 3] = float("nan")
                return logits

        sam = FailingAt({44: RuntimeError("a mask"), 48: KeyError("a key")})
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            logged = validate(
                attach(sam), DataLoader([*Sizes(), *Sizes()], batch_size=1), Broken("logits")
            )
        warnings_of_ours = [
            str(one.message) for one in caught if "SAMRefineCallback" in str(one.message)
        ]
        assert len(warnings_of_ours) == 3, warnings_of_ours
        for words in ("RuntimeError: a mask", "KeyError: 'a key'", "NaN or infinite"):
            assert sum(words in one for one in warnings_of_ours) == 1
        assert logged["val/refine_failed_images"] == 8

    def test_failed_images_count_as_their_raw_prediction(self):
        sam = FailingAt({width: RuntimeError("no") for width in (44, 48, 52, 56)})
        with pytest.warns(RuntimeWarning):
            logged = validate(attach(sam), one_by_one())
        module = Segmenter().eval()
        jaccard = MulticlassJaccardIndex(NUM_CLASSES, ignore_index=IGNORE)
        with torch.no_grad():
            for image, target in Sizes():
                jaccard.update(module.network(image[None] / 255 - 0.5), target[None])
        assert logged["val/miou_raw"] == pytest.approx(float(jaccard.compute()), abs=1e-6)
        assert logged["val/refine_failed_images"] == 4


@pytest.mark.skipif(sys.platform != "linux", reason="Lightning's launcher kills by signals")
@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.slow
def test_a_process_that_raises_ends_all(rank):
    done = subprocess.run(
        [sys.executable, ddp_failing.__file__, rank],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode != 0
    assert "this image fails" in done.stderr
    assert "finished" not in done.stdout
