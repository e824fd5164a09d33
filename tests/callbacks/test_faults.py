"""Memory that runs out and inputs that nobody expects: an error before work, or a fall-back."""

from __future__ import annotations

import gc
import logging
import weakref

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from lightning_stubs import IGNORE, NUM_CLASSES, REFINE, SILENT, Blobs, Segmenter, loader
from random_predictions import noisy
from stub_sams import FixedSam, SmallSam
from tiny_random_sam import build_random_sam
from torch.utils.data import DataLoader

from lightning_samrefine import RefineConfig, Refiner, SAMRefineCallback
from lightning_samrefine.adapters.batch_adapter import BatchAdapter
from lightning_samrefine.adapters.scores import to_probs
from lightning_samrefine.models.sam import SamPromptable
from lightning_samrefine.refine.regions import begin_split
from lightning_samrefine.utils.memory import ChunkSize, is_out_of_memory

OUT_OF_MEMORY = [
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't "
                 "allocate memory: you tried to allocate 99 bytes."),
    MemoryError(),
]  # fmt: skip


class AfterFirstBatch(Callback):
    """Changes a SAM when the first batch is done."""

    def __init__(self, sam, **changes):
        self.sam, self.changes = sam, changes

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, *_):
        if batch_idx == 0:
            vars(self.sam).update(self.changes)


def validate(callback, module=None, loaders=None, others=(), **kwargs):
    trainer = Trainer(**{**SILENT, **kwargs}, callbacks=[callback, *others])
    results = trainer.validate(
        module or Segmenter(), loader() if loaders is None else loaders, verbose=False
    )
    return {key: value for one in results for key, value in one.items()}


class TestMemory:
    @pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
    def test_the_decoder_gets_fewer_prompts_and_the_size_is_kept(self, error):
        image, probs = noisy(5)
        config = RefineConfig(max_prompts_per_batch=8)
        expected = Refiner(SmallSam(error), config, "32")(image, probs)
        sam = SmallSam(error, prompts=3)
        refiner = Refiner(sam, config, "32")
        out = refiner(image, probs)
        assert sam.prompt_counts[:3] == [8, 4, 2]
        assert len(out.regions) > 8
        torch.testing.assert_close(out.regions.pred_iou, expected.regions.pred_iou)
        assert (out.labels != expected.labels).float().mean() < 1e-3
        sam.prompt_counts.clear()
        refiner(image, probs)
        assert max(sam.prompt_counts) == 2

    @pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
    def test_the_encoder_gets_fewer_images(self, error):
        images, probs = zip(*(noisy(seed=seed) for seed in range(5)), strict=True)
        sam = SmallSam(error, images=1)
        refiner = Refiner(sam, precision="32")
        outs = refiner.refine_batch(images, probs)
        assert sam.image_counts == [5, 2, 1, 1, 1, 1, 1]
        for image, prob, out in zip(images, probs, outs, strict=True):
            assert torch.equal(out.labels, Refiner(sam, precision="32")(image, prob).labels)

    @pytest.mark.parametrize("where", ["prompts", "images"])
    def test_one_that_does_not_fit_keeps_raw_and_is_counted(self, where):
        sam = SmallSam(OUT_OF_MEMORY[1])
        callback = SAMRefineCallback(sam, num_classes=NUM_CLASSES, refine=REFINE)
        full = AfterFirstBatch(sam, **{where: 0})
        with pytest.warns(RuntimeWarning, match="allocate memory") as caught:
            logged = validate(callback, loaders=loader(5, batch_size=2), others=[full])
        assert sum("SAMRefineCallback" in str(one.message) for one in caught) == 1
        assert logged["val/refine_failed_images"] == 3
        with pytest.raises(RuntimeError, match="allocate memory"):
            validate(callback, loaders=loader(5, batch_size=2))

    def test_another_error_is_not_retried(self):
        chunks = []

        def process(start, stop):
            chunks.append((start, stop))
            raise RuntimeError("size mismatch")

        with pytest.raises(RuntimeError, match="size mismatch"):
            list(ChunkSize().run(8, 4, process))
        assert chunks == [(0, 4)]
        assert not is_out_of_memory(ValueError("out of memory"))

    def test_what_the_failed_call_held_is_let_go_before_the_retry(self):
        held = []

        def process(start, stop):
            assert not [one for one in held if one() is not None]
            big = torch.zeros(10)
            held.append(weakref.ref(big))
            if stop - start > 1:
                raise MemoryError
            return stop

        assert [stop for _, stop, _ in ChunkSize().run(3, 4, process)] == [1, 2, 3]


class TestModelOutput:
    @pytest.mark.parametrize(
        "refine", [REFINE, "default", "fast"], ids=["plain", "default", "fast"]
    )
    @pytest.mark.parametrize("part", [0, 1], ids=["logits", "pred_iou"])
    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    def test_a_non_finite_output_is_counted(self, refine, part, bad):
        class Broken(SamPromptable):
            is_broken = False

            def predict_masks(self, embedding, prompts, multimask_output=False):
                return self.spoil(super().predict_masks(embedding, prompts, multimask_output))

            def spoil(self, answer):
                if not self.is_broken:
                    return answer
                return tuple(
                    torch.full_like(v, bad) if i == part else v for i, v in enumerate(answer)
                )

        sam = Broken(build_random_sam(), "broken")
        callback = SAMRefineCallback(sam, num_classes=NUM_CLASSES, refine=refine)
        breaking = AfterFirstBatch(sam, is_broken=True)
        with pytest.warns(RuntimeWarning, match="IoU of NaN or infinity, or a mask"):
            logged = validate(callback, others=[breaking])
        assert logged["val/refine_failed_images"] == 2
        with pytest.raises(FloatingPointError, match="IoU of NaN or infinity, or a mask"):
            validate(callback)

    @pytest.mark.parametrize("bad", [float("nan"), -float("inf")])
    def test_upscaled_logits_that_are_no_numbers_cover_nothing(self, bad):
        image, probs = noisy()
        sam = FixedSam(lambda hw: torch.full(hw, bad))
        out = Refiner(sam, RefineConfig())(image, probs)
        assert not out.covered.any()
        assert torch.equal(out.labels, probs.argmax(dim=0))
        assert out.probs.isfinite().all()


class TestSizes:
    @pytest.mark.parametrize("hw", [(1, 1), (1, 300), (300, 1), (2, 3), (7, 1024)])
    def test_slivers(self, random_sam, hw):
        image, probs = noisy(hw=hw)
        out = Refiner(random_sam, RefineConfig())(image, probs)
        assert out.labels.shape == hw
        assert len(out.regions) > 0
        assert torch.equal(out.labels[~out.covered], probs.argmax(dim=0)[~out.covered])

    @pytest.mark.slow
    def test_8192_by_8192(self):
        side = 8192
        labels = torch.zeros(side, side, dtype=torch.uint8)
        labels[1000:5000, 2000:7000] = 1
        probs = torch.full((2, side, side), 0.3)
        probs[0][labels == 0] = 0.7
        probs[1][labels == 1] = 0.7
        image = torch.zeros(3, 1, 1, dtype=torch.uint8).expand(3, side, side)

        def everything(hw):
            return torch.tensor(2.0).expand(hw)

        out = Refiner(FixedSam(everything), RefineConfig.preset("fast", crf_weight=0.0))(
            image, probs
        )
        # Each of the two masks covers all, and the raw probabilities settle who wins.
        assert torch.equal(out.labels, labels.long())
        assert out.covered.all()
        assert out.regions.extents.tolist() == [[0, 0, 8192, 8192], [2000, 1000, 7000, 5000]]

    @pytest.mark.parametrize("classes", [1, 2, 300])
    def test_numbers_of_classes(self, random_sam, classes):
        image, probs = noisy(classes)
        out = Refiner(random_sam, RefineConfig())(image, probs)
        assert out.probs.shape == probs.shape
        assert out.labels.max() < classes
        if classes > 1:
            callback = SAMRefineCallback(
                random_sam, num_classes=classes, ignore_index=None, refine=REFINE
            )
            module = Segmenter(channels=classes)
            targets = Blobs(2)
            targets.targets.clamp_(max=classes - 1)
            logged = validate(callback, module, DataLoader(targets))
            assert logged["val/refine_failed_images"] == 0

    def test_5000_speckles_are_capped_by_area(self, caplog):
        labels = torch.zeros(300, 300, dtype=torch.int64)
        labels[2::4, 2::4] = 1  # 75 × 75 single pixels, and two squares
        labels[100:110, 100:110] = 2
        labels[200:205, 200:205] = 2
        probs = torch.full((3, 300, 300), 0.1).scatter(0, labels[None], 0.8)
        image = torch.zeros(3, 300, 300, dtype=torch.uint8)
        sam = FixedSam(lambda hw: torch.full(hw, -1.0))
        config = RefineConfig.preset("default", stride=1, min_region_area=1)
        refiner = Refiner(sam, config)
        with caplog.at_level(logging.WARNING, "lightning_samrefine"):
            out = refiner(image, probs, labels)
            refiner(image, probs, labels)
        assert len(out.regions) == config.max_regions == 500
        assert out.regions.left_out > 5000
        assert [record.message.count("max_regions") for record in caplog.records] == [1]
        kept = out.regions.extents.tolist()
        assert [0, 0, 300, 300] in kept
        assert [100, 100, 110, 110] in kept
        assert [200, 200, 205, 205] in kept
        everything = begin_split(labels, probs, 0.0, stride=1, min_region_area=1).finish()
        assert len(everything) == len(out.regions) + out.regions.left_out
        assert everything.left_out == 0
        assert RefineConfig().max_regions is None


class TestTensors:
    def test_memory_layout_means_nothing(self, random_sam):
        images, probs = (torch.stack(parts) for parts in zip(noisy(), noisy(seed=1), strict=True))
        refiner = Refiner(random_sam, RefineConfig())
        expected = refiner.refine_batch(images, probs)
        last = torch.channels_last
        sliced = torch.zeros(2, 6, 80, 96, dtype=torch.uint8)[:, ::2, ::2, ::2].copy_(images)
        transposed = probs.transpose(2, 3).contiguous().transpose(2, 3)
        for given in (
            (images.to(memory_format=last), probs.to(memory_format=last)),
            (sliced, transposed),
            (images.expand(2, 3, -1, -1), probs.double()),
        ):
            for out, one in zip(refiner.refine_batch(*given), expected, strict=True):
                assert torch.equal(out.labels, one.labels)
                assert torch.equal(out.probs, one.probs)

    def test_uint16_labels_are_integers_like_others(self, random_sam):
        image, probs = noisy()
        labels = probs.argmax(dim=0)
        labels[:4] = 60_000  # unknown
        refiner = Refiner(random_sam, RefineConfig())
        out = refiner(image, probs, labels.to(torch.uint16))
        assert torch.equal(out.labels, refiner(image, probs, labels).labels)
        stored, read = to_probs(labels.to(torch.uint16)[None], "auto", 3, labels.shape)
        assert torch.equal(read[0], labels)
        assert stored.isfinite().all()

    def test_uint16_targets_and_predictions(self, random_sam):
        class Wide(Blobs):
            def __getitem__(self, index):
                image, target = super().__getitem__(index)
                return image, target.to(torch.uint16)

        class Maps(Segmenter):
            def validation_step(self, batch, batch_idx):
                return {"preds": self(batch[0]).argmax(dim=1).to(torch.uint16)}

        callback = SAMRefineCallback(random_sam, num_classes=NUM_CLASSES, refine=REFINE)
        logged = validate(callback, Maps(), DataLoader(Wide(4), batch_size=2))
        other = SAMRefineCallback(random_sam, num_classes=NUM_CLASSES, refine=REFINE)
        plain = validate(other, Segmenter("labels"))
        assert logged["val/miou_refined"] == plain["val/miou_refined"]

    @pytest.mark.parametrize("ignore", [0, 2, IGNORE, 1000, -1, None])
    def test_ignore_index_inside_and_outside_the_classes(self, random_sam, ignore):
        dataset = Blobs(3)
        dataset.targets[dataset.targets == IGNORE] = 0 if ignore is None else ignore
        callback = SAMRefineCallback(
            random_sam, num_classes=NUM_CLASSES, ignore_index=ignore, refine=REFINE, log="all"
        )
        module = Segmenter("logits").eval()
        module.loss = lambda logits, target: logits.mean()
        logged = validate(callback, module, DataLoader(dataset))
        with torch.no_grad():
            raw = module.network(dataset.images / 255 - 0.5).argmax(dim=1)
        counted = dataset.targets != (NUM_CLASSES if ignore is None else ignore)
        assert f"val/iou_raw/{ignore}" not in logged
        for c in {0, 1, 2} - {ignore}:
            mine, truth = (raw == c) & counted, (dataset.targets == c) & counted
            iou = float((mine & truth).sum() / (mine | truth).sum())
            assert logged[f"val/iou_raw/{c}"] == pytest.approx(iou, abs=1e-6)

    @pytest.mark.parametrize("scale", [1, 0.1])
    def test_sigmoids_of_several_classes_are_not_taken_for_logits(self, scale):
        image = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
        sigmoids = torch.rand(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * scale
        batch = {"image": image, "mask": torch.zeros(2, 8, 8, dtype=torch.long)}

        def probs(scores, kind="auto"):
            return BatchAdapter(num_classes=4, scores_kind=kind)(batch, {"preds": scores}).probs

        for scores in (sigmoids, list(sigmoids)):
            with pytest.raises(ValueError, match=r"scores_kind must be 'logits', 'probs' or 'mult"):
                probs(scores)
        assert torch.equal(probs(sigmoids, "probs"), sigmoids)
        assert torch.equal(probs(sigmoids, "logits"), sigmoids.softmax(dim=1))
        untrained = (sigmoids / scale - 0.5) / 1000
        for logits in (torch.zeros(2, 4, 8, 8), sigmoids / scale * 5 - 2, untrained):
            assert torch.equal(probs(logits), logits.softmax(dim=1))
        # A damaged image does not change the kind of the others.
        probabilities = torch.stack([sigmoids[0], sigmoids[1].softmax(dim=0)])
        assert torch.equal(probs(probabilities)[1], probabilities[1])


class TestRuns:
    def callback(self, random_sam, **kwargs):
        return SAMRefineCallback(random_sam, num_classes=NUM_CLASSES, refine=REFINE, **kwargs)

    def test_a_target_larger_than_the_image_stops_before_sam(self, random_sam, monkeypatch):
        class Larger(Blobs):
            def __getitem__(self, index):
                image, target = super().__getitem__(index)
                return image, target.repeat(2, 2)

        class Step(Segmenter):
            def validation_step(self, batch, batch_idx):
                return self(batch[0])

        monkeypatch.setattr(random_sam, "encode_images", lambda images: pytest.fail("SAM ran"))
        with pytest.raises(
            ValueError, match=r"target must .* shape \(1, 64, 80\).*need an adapter"
        ):
            validate(self.callback(random_sam), Step(), DataLoader(Larger(2)))

    def test_an_empty_loader_logs_nothing(self, random_sam):
        assert validate(self.callback(random_sam), loaders=DataLoader([])) == {}
        logged = validate(self.callback(random_sam), loaders=[loader(2), DataLoader([])])
        assert "val/miou_gain/dataloader_idx_0" in logged

    def test_a_module_that_changes_its_output_shape_is_counted(self, random_sam):
        class Changing(Segmenter):
            def validation_step(self, batch, batch_idx):
                scores = self.network(batch[0] / 255 - 0.5)
                return torch.cat([scores] * 2, dim=3) if batch_idx == 1 else scores

        with pytest.warns(RuntimeWarning, match=r"could not be read.*must not exceed the image's"):
            logged = validate(self.callback(random_sam), Changing(), loader(5, batch_size=2))
        assert logged["val/refine_failed_images"] == 2
        kept = torch.utils.data.Subset(Blobs(5), [0, 1, 4])
        alone = validate(
            self.callback(random_sam), Segmenter("logits"), DataLoader(kept, batch_size=2)
        )
        assert logged["val/miou_refined"] == alone["val/miou_refined"]

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    def test_an_exception_of_the_callback_itself_frees_sam(self, error, monkeypatch):
        from lightning_samrefine.callbacks import run_state as run_state_module

        loaded = []

        def load(name, checkpoint, device):
            sam = SamPromptable(build_random_sam(), name)
            loaded.append(weakref.ref(sam.module))
            return sam

        def adapter(batch, outputs, captured):
            raise error("from within")

        monkeypatch.setattr(run_state_module, "load_sam", load)
        callback = SAMRefineCallback("vit_t", "x.pt", NUM_CLASSES, adapter=adapter)
        module = Segmenter()
        with pytest.raises(SystemExit if error is KeyboardInterrupt else error):
            validate(callback, module)
        gc.collect()
        assert [reference() for reference in loaded] == [None]
        assert not any(m._forward_hooks for m in module.modules())

    def test_resuming_ends_where_a_run_in_one_piece_ends(self, random_sam, tmp_path):
        def fit(epochs, path=None):
            callback = self.callback(random_sam)
            trainer = Trainer(**SILENT, max_epochs=epochs, callbacks=[callback])
            trainer.fit(Segmenter(), loader(4), loader(2, seed=9), ckpt_path=path)
            return trainer, callback

        torch.manual_seed(0)
        first, _ = fit(1)
        first.save_checkpoint(tmp_path / "half.ckpt")
        second, callback = fit(3, tmp_path / "half.ckpt")
        assert [figures["epoch"] for figures in callback.history] == [0, 1, 2]
        assert float(second.callback_metrics["val/miou_refined"]) == pytest.approx(
            callback.history[-1]["miou_refined"]
        )

    def test_barebones_measures_and_logs_nothing(self, random_sam):
        callback = self.callback(random_sam)
        trainer = Trainer(barebones=True, accelerator="cpu", callbacks=[callback])
        with pytest.warns(UserWarning, match=r"barebones=True\) logs nothing.*history") as caught:
            trainer.validate(Segmenter("logits"), loader(), verbose=False)
        assert not any("self.log" in str(one.message) for one in caught)
        assert not trainer.callback_metrics
        expected = validate(self.callback(random_sam), Segmenter("logits"))
        refined = callback.history[0]["miou_refined"]
        assert refined == pytest.approx(expected["val/miou_refined"], abs=1e-6)

    @pytest.mark.parametrize("limit", [1, 0.5])
    def test_limits(self, random_sam, limit):
        logged = validate(self.callback(random_sam), limit_val_batches=limit)
        half = torch.utils.data.Subset(Blobs(4), [0, 1])
        alone = validate(self.callback(random_sam), loaders=DataLoader(half, batch_size=2))
        assert logged["val/miou_refined"] == alone["val/miou_refined"]

    def test_the_next_run_works_after_an_exception(self, random_sam):
        class Failing(Callback):
            def on_validation_batch_end(self, *args, **kwargs):
                raise KeyError("once")

        callback = self.callback(random_sam)
        with pytest.raises(KeyError):
            Trainer(**SILENT, callbacks=[callback, Failing()]).validate(Segmenter(), loader())
        assert "val/miou_gain" in validate(callback)
