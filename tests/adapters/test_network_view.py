"""A network that was given another view of the batch's image: its scores are of other pixels."""

from __future__ import annotations

import math

import pytest
import torch
from lightning.pytorch import Trainer
from lightning_stubs import HW, IGNORE, NUM_CLASSES, REFINE, SILENT, DictBlobs, Segmenter
from torch import Tensor, nn
from torch.nn import functional as nnf
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassJaccardIndex

from lightning_samrefine import SAMRefineCallback
from lightning_samrefine.adapters import network_view
from lightning_samrefine.adapters.forward_hooks import ScoresCapture
from lightning_samrefine.adapters.nested import Samples
from lightning_samrefine.adapters.network_view import difference, images_in, recolors, turned_back


class Step(Segmenter):
    """Changes its batch before the network, and what comes out of it afterwards."""

    def __init__(self, change, after=None, call: str = "child", returns: str = "loss") -> None:
        super().__init__(returns, call)
        self.change, self.after = change, after
        self.metric = MulticlassJaccardIndex(NUM_CLASSES, ignore_index=IGNORE)

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        image, target = self.change(batch["image"].float(), batch["mask"])
        logits = self(image) if self.call == "self" else self.network(image / 255 - 0.5)
        logits = logits if self.after is None else self.after(logits)
        if logits.shape[-2:] == target.shape[-2:]:
            self.metric.update(logits, target)
        return self.OUTPUTS[self.returns](logits, logits.mean())


def validate(random_sam, module, **kwargs) -> dict[str, float]:
    callback = SAMRefineCallback(random_sam, num_classes=NUM_CLASSES, refine=REFINE, **kwargs)
    trainer = Trainer(**SILENT, callbacks=[callback])
    return trainer.validate(module, DataLoader(DictBlobs(4), 2), verbose=False)[0]


OTHER_VIEWS = {
    "half": lambda x, t: (x[..., :16, :20], t[..., :16, :20]),
    "lower half": lambda x, t: (x[..., 16:, 20:], t[..., 16:, 20:]),
    "flip": lambda x, t: (x.flip(-1), t.flip(-1)),
    "flip of the image alone": lambda x, t: (x.flip(-2), t),
    "turn": lambda x, t: (x.flip(-1, -2), t.flip(-1, -2)),
    "zoom": lambda x, t: (nnf.interpolate(x[..., 4:20, 4:24], HW, mode="bilinear"), t),
    "one sample": lambda x, t: (torch.cat([x[:1], x[1:].flip(-1)]), t),
    "order": lambda x, t: (x.flip(0), t),
}
SAME_VIEWS = {
    "normalized": lambda x, t: ((x - 120) / 60, t),
    "inverted": lambda x, t: (255 - x, t),
    "BGR": lambda x, t: (x.flip(1), t),
    "gray": lambda x, t: (x.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1), t),
    "noisy": lambda x, t: (x + 10 * torch.randn_like(x), t),
    "brighter": lambda x, t: ((1.5 * x).clamp(0, 255), t),
    "gamma": lambda x, t: (255 * (x / 255) ** 0.5, t),
    "by image": lambda x, t: (x / x.amax(dim=(1, 2, 3), keepdim=True) * 255, t),
    "blurred": lambda x, t: (nnf.avg_pool2d(x, 3, 1, 1), t),
}


@pytest.mark.parametrize(
    ("view", "call", "returns"),
    [
        *((view, "child", "loss") for view in OTHER_VIEWS),
        *(("half", "child", returns) for returns in ("dict", "probs", "labels", "logits")),
        *(("flip", "child", returns) for returns in ("dict", "probs", "labels", "logits")),
        ("half", "self", "loss"),
        ("flip", "self", "dict"),
    ],
)
def test_scores_of_another_view_are_refused(random_sam, view, call, returns):
    module = Step(OTHER_VIEWS[view], call=call, returns=returns)
    with pytest.raises(ValueError, match=r"scores must be of batch\['image'\].*scores_key"):
        validate(random_sam, module)


@pytest.mark.parametrize("view", SAME_VIEWS)
def test_the_same_view_in_other_colors_is_measured(random_sam, view):
    torch.manual_seed(0)
    module = Step(SAME_VIEWS[view])
    logged = validate(random_sam, module)
    assert logged["val/miou_raw"] == pytest.approx(float(module.metric.compute()), abs=1e-6)


def test_a_step_may_work_at_another_size(random_sam):
    for mode, factor in (("bilinear", 0.5), ("nearest", 0.5), ("area", 0.25)):
        module = Step(
            lambda x, t, m=mode, f=factor: (nnf.interpolate(x, scale_factor=f, mode=m), t)
        )
        logged = validate(random_sam, module)
        expected = MulticlassJaccardIndex(NUM_CLASSES, ignore_index=IGNORE)
        images, targets = DictBlobs(4).images.float(), DictBlobs(4).targets
        small = nnf.interpolate(images, scale_factor=factor, mode=mode)
        with torch.no_grad():
            logits = nnf.interpolate(module.network(small / 255 - 0.5), HW, mode="bilinear")
        assert logged["val/miou_raw"] == pytest.approx(float(expected(logits, targets)), abs=1e-6)


@pytest.mark.parametrize("returns", ["dict", "probs"])
def test_scores_that_are_turned_back_are_measured(random_sam, returns):
    module = Step(lambda x, t: (x.flip(-1), t), lambda logits: logits.flip(-1), returns=returns)
    logged = validate(random_sam, module)
    assert logged["val/miou_raw"] == pytest.approx(float(module.metric.compute()), abs=1e-6)


@pytest.mark.parametrize("returns", ["dict", "probs", "labels"])
@pytest.mark.parametrize("weight", [0.0, 1e-3])
def test_scores_of_an_untrained_network_that_are_turned_back_are_measured(
    random_sam, returns, weight
):
    """One class everywhere looks alike from both sides."""
    module = Step(lambda x, t: (x.flip(-1), t), lambda logits: logits.flip(-1), returns=returns)
    with torch.no_grad():
        module.network.weight.mul_(weight)
        module.network.bias.copy_(torch.arange(NUM_CLASSES) - 1.0)
    logged = validate(random_sam, module)
    assert logged["val/miou_raw"] == pytest.approx(float(module.metric.compute()), abs=1e-6)
    if returns == "dict" and weight:
        module.after = None
        with pytest.raises(ValueError, match=r"scores must be of batch\['image'\]"):
            validate(random_sam, module)


@pytest.mark.parametrize("view", ["flip", "turn", "half", "zoom"])
@pytest.mark.parametrize("returns", ["dict", "probs", "labels"])
def test_scores_of_another_view_are_refused_whatever_the_step_does_to_them(
    random_sam, view, returns
):
    def smoothed(logits):
        shifted = logits + torch.tensor([0.05, 0.0, 0.0]).view(-1, 1, 1)
        return nnf.avg_pool2d(shifted, 3, 1, 1, count_include_pad=False)

    with pytest.raises(ValueError, match=r"scores must be of batch\['image'\].*scores_key"):
        validate(random_sam, Step(OTHER_VIEWS[view], smoothed, returns=returns))


@pytest.mark.parametrize("returns", ["dict", "probs", "labels"])
def test_scores_that_are_turned_back_and_changed_are_measured(random_sam, returns):
    def back(logits):
        return nnf.avg_pool2d(logits.rot90(-1, (-2, -1)), 3, 1, 1)

    def quarter(x, t):
        return x[..., :32].rot90(1, (-2, -1)), t

    class Square(DictBlobs):
        def __getitem__(self, index):
            return {name: one[..., :32] for name, one in super().__getitem__(index).items()}

    module = Step(quarter, back, returns=returns)
    callback = SAMRefineCallback(random_sam, num_classes=NUM_CLASSES, refine=REFINE)
    trainer = Trainer(**SILENT, callbacks=[callback])
    logged = trainer.validate(module, DataLoader(Square(4), 2), verbose=False)[0]
    assert logged["val/miou_raw"] == pytest.approx(float(module.metric.compute()), abs=1e-6)


class Several(Segmenter):
    """Flips its batch or not, and returns the mean of several views that are turned back."""

    def __init__(self, flips: bool, axes: list[tuple[int, ...]]) -> None:
        super().__init__()
        self.flips, self.axes = flips, axes
        self.metric = MulticlassJaccardIndex(NUM_CLASSES, ignore_index=IGNORE)

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        image, target = (
            one.flip(-1) if self.flips else one for one in (batch["image"].float(), batch["mask"])
        )
        logits = torch.stack([self(image.flip(a)).flip(a) for a in self.axes]).mean(dim=0)
        self.metric.update(logits, target)
        return {"preds": logits.argmax(dim=1)}


@pytest.mark.parametrize("axes", [[(), (-2,)], [(-1,), (-2,)], [(), ()]])
def test_several_calls_of_another_view_are_refused(random_sam, axes):
    if (-1,) not in axes:  # which turns the flipped batch back
        with pytest.raises(ValueError, match=r"scores must be of batch\['image'\].*scores_key"):
            validate(random_sam, Several(True, axes))
    module = Several(False, axes)
    logged = validate(random_sam, module)
    assert logged["val/miou_raw"] == pytest.approx(float(module.metric.compute()), abs=1e-6)


@pytest.mark.parametrize("bands", [5, 12])
def test_bands_of_another_view_are_refused(random_sam, bands):
    class Bands(DictBlobs):
        def __getitem__(self, index):
            sample = super().__getitem__(index)
            repeated = sample["image"].repeat(4, 1, 1)[:bands].float() / 255
            return {**sample, "image": repeated + torch.linspace(0, 0.1, bands).view(-1, 1, 1) / 2}

    loader = DataLoader(Bands(4), 2)
    for view in ("flip", "half", None):
        change = OTHER_VIEWS.get(view, lambda x, t: (x, t))
        module = Step(lambda x, t, f=change: f(255 * x, t))
        module.network = nn.Conv2d(bands, NUM_CLASSES, 3, padding=1)
        callback = SAMRefineCallback(
            random_sam,
            num_classes=NUM_CLASSES,
            refine=REFINE,
            image_channels=(0, 1, 2),
            image_stretch=(0, 100),
        )
        trainer = Trainer(**SILENT, callbacks=[callback])
        if view is None:
            logged = trainer.validate(module, loader, verbose=False)[0]
            expected = float(module.metric.compute())
            assert logged["val/miou_raw"] == pytest.approx(expected, abs=1e-6)
        else:
            with pytest.raises(ValueError, match=r"scores must be of batch\['image'\]"):
                trainer.validate(module, loader, verbose=False)


def test_a_key_takes_them_as_they_are(random_sam):
    validate(random_sam, Step(OTHER_VIEWS["flip"], returns="dict"), scores_key="logits")
    validate(random_sam, Step(OTHER_VIEWS["flip"]), scores_key="forward")


class Flip(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flip(-1)


class Children(nn.Module):
    """Children that a step calls one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.augment = Flip()
        self.stem = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.InstanceNorm2d(3))
        self.body = nn.Conv2d(3, 8, 1)
        self.head = nn.Conv2d(8, 5, 1)
        self.up = nn.Upsample(scale_factor=2)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (lambda m, x: m.head(m.body(x)), None),
        (lambda m, x: m.up(m.head(m.body(x))), None),
        (lambda m, x: m.head(m.body(m.stem(x))), None),
        (lambda m, x: m.head(m.body(m.augment(x))), "flipped left to right"),
        (lambda m, x: m.up(m.head(m.body(x.flip(-2)))), "flipped upside down"),
    ],
)
def test_what_children_were_given(step, expected):
    torch.manual_seed(0)
    module = Children()
    capture = ScoresCapture(module, 5)
    for batch in range(5):
        capture.arm(None, 0)
        step(module, IMAGE)
        scores, _ = capture.take()
        assert scores is not None
        noted = batch < 3  # in the first batches of a loader alone
        given = [call.given for call in capture.calls]
        assert [difference(one, IMAGE) for one in given] == ([expected] if noted else [])
        assert bool(given) == noted
    capture.arm(None, 1)
    step(module, IMAGE)
    capture.take()
    assert capture.calls[0].given


def picture(hw: tuple[int, int], seed: int = 0) -> Tensor:
    """A smooth picture with edges and texture, (2, 3, H, W) in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse, fine = (torch.rand(2, 3, n, n, generator=generator) for n in (5, 40))
    sky = torch.linspace(1, 0, hw[0]).view(-1, 1)
    return (
        0.5 * nnf.interpolate(coarse, hw, mode="bicubic")
        + 0.1 * nnf.interpolate(fine, hw, mode="nearest")
        + 0.4 * sky
    ).clamp(0, 1)


IMAGE = picture((108, 130))


def padded(x: Tensor, *pad: int) -> Tensor:
    return nnf.pad(x, pad)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (IMAGE, None),
        ((IMAGE - 0.45) / 0.22, None),
        (IMAGE[:, [2, 1, 0]], None),
        (IMAGE.half(), None),
        (IMAGE.mean(dim=1, keepdim=True), None),
        (torch.cat([IMAGE, torch.rand(2, 3, 108, 130)], dim=1), None),
        (torch.cat([IMAGE, torch.rand(2, 1, 108, 130)], dim=1), None),
        (nnf.interpolate(IMAGE, (64, 64), mode="bilinear"), None),
        (nnf.interpolate(IMAGE, (64, 64), mode="bilinear", antialias=True), None),
        (nnf.interpolate(IMAGE, (112, 144), mode="bilinear"), None),
        (nnf.interpolate(IMAGE, (112, 144), mode="nearest"), None),
        (nnf.interpolate(IMAGE, (112, 144), mode="bicubic", align_corners=True), None),
        (list(IMAGE), None),
        (IMAGE[:1], None),  # the sample is unknown
        (IMAGE * math.nan, None),
        (IMAGE.flip(-1), "flipped left to right"),
        (IMAGE.flip(-2) * 2 - 1, "flipped upside down"),
        (nnf.interpolate(IMAGE.flip(-1), (64, 64), mode="bilinear"), "flipped left to right"),
        (IMAGE.rot90(1, (-2, -1)), "turned by 90°"),
        (padded(IMAGE, 0, 14, 0, 4), "padded or cropped"),
        (padded(IMAGE, 7, 7, 2, 2), "padded or cropped"),
        (padded(IMAGE, 0, 0, 4, 0), "padded or cropped"),
        ((padded(IMAGE, 0, 2, 0, 4) - 0.4) / 0.2, "padded or cropped"),
        (IMAGE[..., 4:, 2:], "padded or cropped"),
        (IMAGE[..., :104, :128], "padded or cropped"),
        (padded(IMAGE[..., :104, :], 0, 6, 0, 0), "padded or cropped"),
        (IMAGE[..., 31:85, 11:76], "cropped, or of other content"),
        (picture((108, 130), 7), "cropped, or of other content"),
        (list(IMAGE.flip(-1)), "flipped left to right"),
    ],
)
def test_what_a_network_was_given(given: Samples, expected: str | None):
    assert difference([[given]], IMAGE) == expected
    assert difference([[given]], list(IMAGE)) == expected
    assert difference([[given]], (IMAGE * 255).to(torch.uint8)) == expected


def test_constant_and_symmetric_images_have_one_view():
    flat = torch.full((2, 3, 40, 50), 0.3) + 1e-3 * torch.rand(2, 3, 40, 50)
    gradient = torch.linspace(0, 1, 50).expand(2, 3, 40, 50)
    symmetric = (IMAGE + IMAGE.flip(-1)) / 2
    for image in (flat, gradient, symmetric, torch.zeros(2, 3, 40, 50)):
        assert difference([[image]], image) is None
        assert difference([[(image.half() - 0.5) * 3]], image) is None
        for size in ((64, 64), (41, 53), (20, 25)):
            resized = nnf.interpolate(image, size, mode="bilinear")
            assert difference([[resized]], image) is None
    assert difference([[symmetric.flip(-1)]], symmetric) is None


def test_one_input_of_several_and_features_before_it_are_enough():
    features = torch.rand(2, 3, 108, 130)
    assert difference([[features, IMAGE]], IMAGE) is None
    assert difference([[features], [IMAGE]], IMAGE) is None
    assert difference([[IMAGE.flip(-1)], [IMAGE]], IMAGE) == "flipped left to right"
    assert difference([[features], [IMAGE.flip(-1)]], IMAGE) == "flipped left to right"
    assert difference([[features]], IMAGE) is not None
    assert difference([], IMAGE) is None


@pytest.mark.parametrize("view", network_view.TURNS)
def test_every_turn_is_undone(view):
    assert torch.equal(turned_back(network_view.TURNS[view](IMAGE), view), IMAGE)
    assert turned_back(IMAGE, network_view.CROPPED) is None


def test_recolored_images_are_linear_maps_of_the_colors():
    assert recolors((IMAGE - 0.4) / 0.2, IMAGE)
    assert recolors(IMAGE.flip(1), IMAGE)
    assert not recolors(nnf.avg_pool2d(IMAGE, 3, 1, 1), IMAGE)
    assert not recolors(IMAGE.square(), IMAGE)
    assert not recolors(IMAGE * math.nan, IMAGE)
    assert not recolors(IMAGE[:, :2], IMAGE)


def test_what_may_be_images_among_arguments():
    features, mask = torch.rand(2, 64, 8, 8), torch.rand(2, 8, 8)
    assert images_in([features, mask, "a", 3, None, {"pixel_values": IMAGE}]) == [IMAGE]
    assert [len(one) for one in images_in([list(IMAGE)])] == [2]
