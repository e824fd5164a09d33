"""The conformance suite: every backend passes, and every kind of mistake is found."""

import pytest
import torch
from lightning.pytorch import Trainer
from lightning_stubs import NUM_CLASSES, REFINE, SILENT, Segmenter, loader
from tiny_hf import FAMILIES, build_tiny_hf
from tiny_random_sam import build_random_sam

from lightning_samrefine import RefineConfig, Refiner, SAMRefineCallback, load_sam
from lightning_samrefine.callbacks import run_state
from lightning_samrefine.models.base import Prompts
from lightning_samrefine.models.sam import SamPromptable
from lightning_samrefine.models.transforms import SquashedFrame
from lightning_samrefine.testing import CHECKS, check_promptable


class BoxesOnly(SamPromptable):
    """A model that takes no masks and would crash on one."""

    accepts_masks = False

    def predict_masks(self, embedding, prompts, multimask_output=False):
        assert prompts.masks is None
        assert prompts.mask_index is None
        return super().predict_masks(embedding, prompts, multimask_output)


def small(cls=SamPromptable):
    return cls(build_random_sam(), "small")


@pytest.fixture(scope="module", params=["random", "tiny", "boxes only", *FAMILIES])
def backend(request):
    if request.param in FAMILIES:
        pytest.importorskip("transformers")
        return build_tiny_hf(request.param)
    if request.param == "tiny":
        return load_sam("tiny")
    return small(BoxesOnly if request.param == "boxes only" else SamPromptable)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_every_backend_conforms(backend, check):
    check(backend)


class Training(SamPromptable):
    def __init__(self, module, name):
        super().__init__(module, name)
        self.module.train()


class Learning(SamPromptable):
    def __init__(self, module, name):
        super().__init__(module, name)
        self.module.mask_decoder.requires_grad_(True)


class Nameless(SamPromptable):
    def __init__(self, module, name):
        super().__init__(module, "")


class WrongFrame(SamPromptable):
    """Pads images and declares that it squashes its masks."""

    def mask_hw(self, image_hw):
        return SquashedFrame(self.image_size, self.mask_size).mask_hw(image_hw)


class TooLarge(SamPromptable):
    def input_hw(self, image_hw):
        return tuple(2 * side for side in super().input_hw(image_hw))

    def encode_images(self, images):
        return [torch.zeros(1, 32, 8, 8) for _ in images]


class Mixing(SamPromptable):
    """Centers embeddings over the batch."""

    def encode_images(self, images):
        embeddings = super().encode_images(images)
        return [e - torch.stack(embeddings).mean(dim=0) for e in embeddings]


class Painting(SamPromptable):
    def encode_images(self, images):
        for image in images:
            image.fill_(0)
        return super().encode_images(images)


class MaskBlind(SamPromptable):
    def predict_masks(self, embedding, prompts, multimask_output=False):
        without = Prompts(prompts.boxes, prompts.points)
        return super().predict_masks(embedding, without, multimask_output)


class NoPoints(SamPromptable):
    def predict_masks(self, embedding, prompts, multimask_output=False):
        boxes = prompts.boxes.clone()  # raises without boxes
        without = Prompts(boxes, None, prompts.masks, prompts.mask_index)
        return super().predict_masks(embedding, without, multimask_output)


class FirstPrompt(SamPromptable):
    """MaskPredictions all prompts of a batch as the first."""

    def predict_masks(self, embedding, prompts, multimask_output=False):
        logits, iou = super().predict_masks(embedding, prompts.chunk(0, 1), multimask_output)
        count = len(prompts)
        return logits.expand(count, *logits.shape[1:]), iou.expand(count, *iou.shape[1:])


class KeepsChannel(SamPromptable):
    def predict_masks(self, embedding, prompts, multimask_output=False):
        logits, iou = super().predict_masks(embedding, prompts, multimask_output)
        return logits[:, None], iou


class Half(SamPromptable):
    def predict_masks(self, embedding, prompts, multimask_output=False):
        logits, iou = super().predict_masks(embedding, prompts, multimask_output)
        return logits.to(torch.get_autocast_dtype("cpu")) if _autocasting() else logits, iou


def _autocasting():
    return torch.is_autocast_enabled("cpu")


class TwoMasks(SamPromptable):
    def predict_masks(self, embedding, prompts, multimask_output=False):
        logits, iou = super().predict_masks(embedding, prompts, multimask_output)
        return (logits[:, :2], iou[:, :2]) if multimask_output else (logits, iou)


class WrongImage(SamPromptable):
    def predict_masks_jointly(self, embeddings, prompts):
        return super().predict_masks_jointly(embeddings[::-1], prompts)


@pytest.mark.parametrize(
    ("cls", "check", "message"),
    [
        (Nameless, "check_members", "name must be a non-empty string, got ''"),
        (Training, "check_frozen", r"in training mode: module, .* call module\.eval\(\)"),
        (Learning, "check_frozen", "want gradients: mask_decoder"),
        (TooLarge, "check_frames", r"input_hw\(\(48, 48\)\) is \(128, 128\), not two ints in"),
        (Mixing, "check_encode_images", "with other images and alone"),
        (Painting, "check_encode_images", "encode_images writes into its images"),
        (NoPoints, "check_predict_masks", "'NoneType' object has no attribute 'clone'"),
        (FirstPrompt, "check_prompts_matter", "two boxes, points and masks have one output"),
        (FirstPrompt, "check_predict_masks", "logits of prompt 1 of .* alone: .* apart"),
        (KeepsChannel, "check_predict_masks", r"logits of .* must be .*, got \(3, 1, 32, 32\)"),
        (MaskBlind, "check_prompts_matter", "mask prompts change nothing"),
        (TwoMasks, "check_multimask_output", r"got \(3, 2, 32, 32\)"),
        (
            WrongImage,
            "check_predict_masks_jointly",
            "logits of .* and those of each image: .* apart",
        ),
        (WrongFrame, "check_postprocess_masks", r"which mask_hw \(32, 32\) does not explain"),
        (Half, "check_autocast", r"must be float32, got torch\.bfloat16"),
    ],
)
def test_every_mistake_is_found_and_named(cls, check, message):
    with pytest.raises(AssertionError, match=rf"(?s)checks? failed\n.*{check}: .*{message}"):
        check_promptable(small(cls))


def test_an_object_without_the_members_of_the_protocol_is_refused():
    with pytest.raises(AssertionError, match=r"check_members: .*object lacks name, module, "):
        check_promptable(object())


def test_a_model_without_masks_refines_by_boxes_and_points():
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, 40, 56), dtype=torch.uint8, generator=generator)
    probs = torch.rand(3, 5, 7, generator=generator).repeat_interleave(8, 1).repeat_interleave(8, 2)
    config = RefineConfig()
    refined = Refiner(small(BoxesOnly), config, precision="32")(image, probs)
    assert refined.covered.any()
    with_masks = Refiner(small(), config, precision="32")(image, probs)
    assert not torch.equal(refined.regions.pred_iou, with_masks.regions.pred_iou)


@pytest.mark.parametrize("cls", [SamPromptable, BoxesOnly])
def test_the_log_has_one_line_about_prompts_that_a_model_does_not_take(cls, monkeypatch):
    logged = []
    monkeypatch.setattr(run_state, "rank_zero_info", logged.append)
    callback = SAMRefineCallback(small(cls), num_classes=NUM_CLASSES, refine=REFINE)
    Trainer(**SILENT, callbacks=[callback]).validate(Segmenter(), loader(), verbose=False)
    assert callback.history[0]["refine_failed_images"] == 0
    (line,) = (line for line in logged if " refines " in line)  # beside what was read
    assert ("SAM small, which takes no mask prompts, on cpu" in line) == (cls is BoxesOnly)
