"""Conformance checks of the `Promptable` protocol, to run on your model in your own tests.

Example::

    from lightning_samrefine.testing import check_promptable

    def test_my_model():
        check_promptable(MyPromptable())

or one test for each of `CHECKS`::

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    def test_my_model(check):
        check(MyPromptable())

No check needs trained weights, but a model whose output ignores the prompt fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from lightning_samrefine.models.base import (
    Embedding,
    JointPromptable,
    Promptable,
    Prompts,
    accepts_masks,
    can_skip_padding,
    has_multimask_output,
)
from lightning_samrefine.utils.precision import autocast

# Square, wide, tall, and one that a padding model resizes to a single row.
_IMAGE_SIZES = ((48, 48), (40, 60), (70, 30), (2, 700))
_MEMBERS = (
    *("name", "module", "image_size", "mask_size", "device"),
    *("input_hw", "mask_hw", "encode_images", "predict_masks", "postprocess_masks"),
)


def check_promptable(sam: Promptable) -> None:
    """Run all of `CHECKS` on a model.

    Raises:
        AssertionError: At least one failed; the message lists every failed check.
    """
    failures = []
    for check in CHECKS:
        try:
            check(sam)
        except Exception as error:  # a crash inside the model is a failed check as well
            failures.append(f"{check.__name__}: {type(error).__name__}: {error}")
    _require(not failures, "\n".join([f"{len(failures)} checks failed", *failures]))


def check_members(sam: Promptable) -> None:
    """It has the protocol's members, with values of the right type."""
    missing = [name for name in _MEMBERS if not hasattr(sam, name)]
    _require(not missing, f"{type(sam).__name__} lacks {', '.join(missing)}")
    _require(
        isinstance(sam.name, str) and sam.name != "",
        f"name must be a non-empty string, got {sam.name!r}",
    )
    for name in ("image_size", "mask_size"):
        value = getattr(sam, name)
        _require(type(value) is int and value > 0, f"{name} must be a positive int, got {value!r}")
    _require(isinstance(sam.module, torch.nn.Module), "module must be a torch.nn.Module")
    devices = {parameter.device for parameter in sam.module.parameters()}
    _require(devices <= {sam.device}, f"device is {sam.device}, the weights are on {devices}")
    for name in ("accepts_masks", "accepts_points", "has_multimask_output"):
        declared = getattr(sam, name, True)
        _require(isinstance(declared, bool), f"{name} must be a bool, got {declared!r}")


def check_frozen(sam: Promptable) -> None:
    """It is in eval mode and no parameter requires a gradient."""
    training = [name or "module" for name, part in sam.module.named_modules() if part.training]
    _require(not training, f"in training mode: {_few(training)}; call module.eval()")
    wanting = [name for name, value in sam.module.named_parameters() if value.requires_grad]
    _require(not wanting, f"want gradients: {_few(wanting)}; call module.requires_grad_(False)")


def check_frames(sam: Promptable) -> None:
    """Images and mask prompts fit into their squares, whatever the image's shape."""
    for image_hw in _IMAGE_SIZES:
        for name, side in (("input_hw", sam.image_size), ("mask_hw", sam.mask_size)):
            size = tuple(getattr(sam, name)(image_hw))
            fits = len(size) == 2 and all(type(s) is int and 1 <= s <= side for s in size)
            _require(fits, f"{name}({image_hw}) is {size}, not two ints in [1, {side}]")


def check_encode_images(sam: Promptable) -> None:
    """Images of several sizes get the same embeddings together and alone, and are not changed."""
    images = [_image(sam, hw) for hw in _IMAGE_SIZES]
    copies = [image.clone() for image in images]
    together = _embed(sam, images)
    _require(len(together) == len(images), f"{len(together)} embeddings of {len(images)} images")
    unchanged = all(torch.equal(*pair) for pair in zip(images, copies, strict=True))
    _require(unchanged, "encode_images writes into its images")
    for image, image_hw, embedding in zip(images, _IMAGE_SIZES, together, strict=True):
        prompts = _prompts(sam, image_hw)
        of_batch, _ = _decode(sam, embedding, prompts)
        alone, _ = _decode(sam, _embed(sam, [image])[0], prompts)
        _close(of_batch, alone, f"embeddings of {image_hw} with other images and alone")
    nothing = _embed(sam, [])
    _require(len(nothing) == 0, "embeddings of no image")


def check_padding(sam: Promptable) -> None:
    """If it can skip the padding, masks keep their frame, and a square image's stay the same."""
    if not can_skip_padding(sam):
        return
    for image_hw in _IMAGE_SIZES:
        image, prompts = _image(sam, image_hw), _prompts(sam, image_hw)
        with torch.no_grad(), autocast(None, sam.device):
            (embedding,) = sam.encode_images([image], padding=False)
        logits, pred_iou = _decode(sam, embedding, prompts)
        what = f"without the padding of {image_hw}"
        _shaped(logits, (len(prompts), sam.mask_size, sam.mask_size), f"logits {what}")
        _shaped(pred_iou, (len(prompts),), f"predicted IoU {what}")
        height, width = sam.input_hw(image_hw)
        if height == width:
            expected, _ = _decode(sam, _embed(sam, [image])[0], prompts)
            _close(logits, expected, f"logits with and {what}, which has none")


def check_predict_masks(sam: Promptable) -> None:
    """Masks have the right shape and type, are finite, and do not depend on the batch."""
    image_hw = _IMAGE_SIZES[1]
    (embedding,) = _embed(sam, [_image(sam, image_hw)])
    prompts = _prompts(sam, image_hw)
    for what, given in _kinds(prompts):
        logits, pred_iou = _decode(sam, embedding, given)
        _shaped(logits, (len(given), sam.mask_size, sam.mask_size), f"logits of {what}")
        _shaped(pred_iou, (len(given),), f"predicted IoU of {what}")
        again, _ = _decode(sam, embedding, given)
        _close(again, logits, f"logits of {what} in a second call")
        for index in range(len(given)):
            alone, iou_alone = _decode(sam, embedding, given.chunk(index, index + 1))
            _close(alone[0], logits[index], f"logits of prompt {index} of {what} alone")
            _close(iou_alone[0], pred_iou[index], f"predicted IoU of prompt {index} of {what}")


def check_prompts_matter(sam: Promptable) -> None:
    """Another box, another point, and another mask, if accepted, change the output."""
    image_hw = _IMAGE_SIZES[0]
    (embedding,) = _embed(sam, [_image(sam, image_hw)])
    prompts = _prompts(sam, image_hw)
    for what, given in _kinds(prompts):
        logits, _ = _decode(sam, embedding, given)
        _require(not torch.equal(logits[0], logits[1]), f"two {what} have one output")
    if prompts.masks is not None:
        with_masks, _ = _decode(sam, embedding, prompts)
        others = Prompts(prompts.boxes, prompts.points, prompts.masks.flip(0), prompts.mask_index)
        with_others, _ = _decode(sam, embedding, others)
        _require(not torch.equal(with_masks, with_others), "mask prompts change nothing")


def check_multimask_output(sam: Promptable) -> None:
    """Multimask output, unless declared missing, has three masks per prompt."""
    if not has_multimask_output(sam):
        return
    image_hw = _IMAGE_SIZES[1]
    (embedding,) = _embed(sam, [_image(sam, image_hw)])
    for what, given in _kinds(_prompts(sam, image_hw)):
        with torch.no_grad(), autocast(None, sam.device):
            logits, pred_iou = sam.predict_masks(embedding, given, multimask_output=True)
        size = (len(given), 3, sam.mask_size, sam.mask_size)
        _shaped(logits, size, f"three logits of {what}")
        _shaped(pred_iou, (len(given), 3), f"three predicted IoUs of {what}")


def check_predict_masks_jointly(sam: Promptable) -> None:
    """`predict_masks_jointly`, if present, equals `predict_masks` of each image."""
    if not isinstance(sam, JointPromptable):
        return
    sizes = _IMAGE_SIZES[:2]
    embeddings = _embed(sam, [_image(sam, image_hw) for image_hw in sizes])
    kinds = (_kinds(_prompts(sam, image_hw)) for image_hw in sizes)
    for (what, first), (_, second) in zip(*kinds, strict=True):
        given = [first, second.chunk(0, 1)]
        with torch.no_grad(), autocast(None, sam.device):
            together = sam.predict_masks_jointly(embeddings, given)
        apart = [_decode(sam, *pair) for pair in zip(embeddings, given, strict=True)]
        names = ("logits", "predicted IoU")
        for name, found, *expected in zip(names, together, *apart, strict=True):
            wanted = torch.cat(expected)
            _shaped(found, tuple(wanted.shape), f"predict_masks_jointly' {name} of {what}")
            _close(
                found, wanted, f"predict_masks_jointly' {name} of {what} and those of each image"
            )


def check_postprocess_masks(sam: Promptable) -> None:
    """Masks at full resolution lie in the part of the frame that `mask_hw` returns."""
    for image_hw in _IMAGE_SIZES[:3]:
        height, width = sam.mask_hw(image_hw)
        ramps = torch.zeros(2, sam.mask_size, sam.mask_size, device=sam.device)
        ramps[0] = _centered(sam.mask_size, height, sam.device)[:, None]
        ramps[1] = _centered(sam.mask_size, width, sam.device)
        upscaled = sam.postprocess_masks(ramps, image_hw)
        _shaped(upscaled, (2, *image_hw), f"postprocess_masks to {image_hw}")
        expected = torch.zeros(2, *image_hw, device=sam.device)
        expected[0] = _centered(image_hw[0], image_hw[0], sam.device)[:, None]
        expected[1] = _centered(image_hw[1], image_hw[1], sam.device)
        off = (upscaled - expected).abs().amax().item()
        # One pixel of the mask may cover several of the image, and bilinear edges are flat.
        allowed = 1.5 / min(height, width)
        message = f"postprocess_masks moves a mask by {off:.3f} of an image of size {image_hw}"
        _require(off <= allowed, f"{message}, which mask_hw {(height, width)} does not explain")


def check_autocast(sam: Promptable) -> None:
    """Under bfloat16 autocast outputs are still float32 and finite."""
    image_hw = _IMAGE_SIZES[1]
    prompts = _prompts(sam, image_hw)
    with torch.no_grad(), autocast(torch.bfloat16, sam.device):
        (embedding,) = sam.encode_images([_image(sam, image_hw)])
        logits, pred_iou = sam.predict_masks(embedding, prompts)
    _shaped(logits, (len(prompts), sam.mask_size, sam.mask_size), "logits under autocast")
    _shaped(pred_iou, (len(prompts),), "predicted IoU under autocast")


CHECKS: tuple[Callable[[Promptable], None], ...] = (
    check_members,
    check_frozen,
    check_frames,
    check_encode_images,
    check_padding,
    check_predict_masks,
    check_prompts_matter,
    check_multimask_output,
    check_predict_masks_jointly,
    check_postprocess_masks,
    check_autocast,
)


def _image(sam: Promptable, image_hw: tuple[int, int]) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, *image_hw), dtype=torch.uint8, generator=generator)
    return image.to(sam.device)


def _prompts(sam: Promptable, image_hw: tuple[int, int]) -> Prompts:
    """Return three prompts of two classes inside the image's part of the input."""
    height, width = sam.input_hw(image_hw)
    size = torch.tensor([width, height], dtype=torch.float32)
    low = torch.tensor([[0.1, 0.1], [0.5, 0.4], [0.0, 0.0]]) * size
    high = torch.tensor([[0.4, 0.6], [0.9, 0.9], [1.0, 1.0]]) * size
    masks = None
    if accepts_masks(sam):
        generator = torch.Generator().manual_seed(1)
        masks = 8 * torch.rand(2, sam.mask_size, sam.mask_size, generator=generator)
        masks[0, sam.mask_size // 2 :] = 0
    return Prompts(
        boxes=torch.cat([low, high], dim=1).to(sam.device),
        points=((low + high) / 2).to(sam.device),
        masks=None if masks is None else masks.to(sam.device),
        mask_index=None if masks is None else torch.tensor([0, 1, 1], device=sam.device),
    )


def _kinds(prompts: Prompts) -> Iterable[tuple[str, Prompts]]:
    """Yield every combination of prompt types that the refiner uses."""
    boxes, points, masks, index = prompts.boxes, prompts.points, prompts.masks, prompts.mask_index
    if masks is not None:
        yield "boxes, points and masks", prompts
        yield "boxes and masks", Prompts(boxes, None, masks, index)
        yield "points and masks", Prompts(None, points, masks, index)
    yield "boxes and points", Prompts(boxes, points, None, None)
    yield "boxes", Prompts(boxes, None, None, None)
    yield "points", Prompts(None, points, None, None)


@torch.no_grad()
def _embed(sam: Promptable, images: list[Tensor]) -> list[Embedding]:
    with autocast(None, sam.device):
        return sam.encode_images(images)


@torch.no_grad()
def _decode(sam: Promptable, embedding: object, prompts: Prompts) -> tuple[Tensor, Tensor]:
    with autocast(None, sam.device):
        return sam.predict_masks(embedding, prompts)


def _centered(length: int, extent: int, device: torch.device) -> Tensor:
    """Return (length,) positions of pixel centers, from 0 to 1 over the first ``extent``."""
    return (torch.arange(length, device=device) + 0.5) / extent


def _shaped(value: Tensor, shape: tuple[int, ...], what: str) -> None:
    right = isinstance(value, Tensor) and tuple(value.shape) == shape
    got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
    _require(right, f"{what} must be a tensor of shape {shape}, got {got}")
    _require(value.dtype == torch.float32, f"{what} must be float32, got {value.dtype}")
    _require(bool(value.isfinite().all()), f"{what} must be finite, got NaN or infinity")


def _close(found: Tensor, expected: Tensor, what: str) -> None:
    off = (found - expected).abs().max().item()
    allowed = 1e-3 * max(1.0, expected.abs().max().item())
    _require(off <= allowed, f"{what}: {off:.2g} apart")


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _require(holds: bool, message: str) -> None:
    # Not `assert`, which python -O removes and which pytest rewrites in test modules only.
    if not holds:
        raise AssertionError(message)
