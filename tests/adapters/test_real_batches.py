"""Networks, batches and sizes that users bring; raw mIoU from torchmetrics."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning_stubs import IGNORE, NUM_CLASSES, REFINE, SILENT, Blobs
from torch import Tensor, nn
from torch.nn import functional as nnf
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassJaccardIndex

from lightning_samrefine import RefineConfig, Refiner, SAMRefineCallback

MEAN, STD = 0.5, 0.25


class Samples(Blobs):
    """Batches in a form of the user's: `make(image, target)`, the image uint8."""

    def __init__(self, make: Any, length: int = 4, **kwargs: Any) -> None:
        super().__init__(length, **kwargs)
        self.make = make

    def __getitem__(self, index: int) -> Any:
        return self.make(self.images[index], self.targets[index])


class User(LightningModule):
    """A network, and a step that takes batch and module.

    Args:
        network: From images in [0, 1] to logits.
        step: `(module, batch)` to what the step returns.
    """

    def __init__(self, network: nn.Module, step: Any) -> None:
        super().__init__()
        self.network = network
        self.step = step

    def forward(self, image: Tensor) -> Tensor:
        return self.network(image)

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        return self.step(self, batch)


def conv(channels: int = NUM_CLASSES, stride: int = 1) -> nn.Conv2d:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Conv2d(3, channels, 3, padding=1, stride=stride)


def validate(random_sam, module, dataset, batch_size=2, precision="32-true", **kwargs):
    arguments = {"num_classes": NUM_CLASSES, "refine": REFINE, "log": "all", **kwargs}
    callback = SAMRefineCallback(random_sam, **arguments)
    trainer = Trainer(**SILENT, precision=precision, callbacks=[callback])
    (logged,) = trainer.validate(module, DataLoader(dataset, batch_size), verbose=False)
    return logged


def miou(logits: Tensor, targets: Tensor, ignore: int = IGNORE) -> float:
    """Return torchmetrics' mIoU of logits, enlarged to the targets' size."""
    full = nnf.interpolate(logits.float(), targets.shape[-2:], mode="bilinear", align_corners=False)
    binary = full.shape[1] == 1
    labels = (full[:, 0] > 0).long() if binary else full.argmax(dim=1)
    metric = MulticlassJaccardIndex(2 if binary else NUM_CLASSES, ignore_index=ignore)
    return float(metric(labels, targets))


@torch.no_grad()
def expected(module: User, dataset: Blobs, ignore: int = IGNORE) -> float:
    return miou(module.eval().network(dataset.images / 255), dataset.targets, ignore)


@pytest.mark.parametrize("returns", ["loss", "output", "dict", "tuple"])
def test_segformers_quarter_logits(random_sam, returns):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.SegformerConfig(
        num_labels=NUM_CLASSES,
        depths=[1, 1, 1, 1],
        hidden_sizes=[8, 8, 16, 16],
        num_attention_heads=[1, 1, 1, 1],
        decoder_hidden_size=16,
    )
    network = transformers.SegformerForSemanticSegmentation(config)

    def step(module, batch):
        output = module.network(**batch)
        return {
            "loss": output.loss,
            "output": output,
            "dict": {"loss": output.loss, "outputs": output.logits},
            "tuple": (output.loss, output.logits),
        }[returns]

    def sample(image, target):
        return {"pixel_values": (image / 255 - MEAN) / STD, "labels": target}

    module, dataset = User(network, step), Samples(sample)
    logged = validate(random_sam, module, dataset, image_mean=MEAN, image_std=STD)
    with torch.no_grad():
        logits = network.eval()((dataset.images / 255 - MEAN) / STD).logits
    assert logits.shape[-2:] == (8, 10)
    assert logged["val/miou_raw"] == pytest.approx(miou(logits, dataset.targets), abs=1e-6)


@pytest.mark.parametrize("kind", [dict, tuple])
@pytest.mark.parametrize("channels", [1, NUM_CLASSES])
def test_steps_that_return_statistics(random_sam, kind, channels):
    """As those of segmentation_models_pytorch's examples."""

    def sample(image, target):
        target = (target % IGNORE > 0).float()[None] if channels == 1 else target
        return {"image": image / 255, "mask": target} if kind is dict else (image / 255, target)

    def step(module, batch):
        logits = module(batch["image"] if kind is dict else batch[0])
        counts = torch.zeros(len(logits), channels, dtype=torch.long)
        return {"loss": logits.mean(), "tp": counts, "fp": counts, "fn": counts, "tn": counts}

    dataset, module = Samples(sample), User(conv(channels), step)
    logged = validate(random_sam, module, dataset, num_classes=max(channels, 2))
    if channels == 1:
        dataset.targets = (dataset.targets % IGNORE > 0).long()
    assert logged["val/miou_raw"] == pytest.approx(expected(module, dataset), abs=1e-6)


class MetaTensor(Tensor):
    """Carries what it was read from, as MONAI's tensors do."""

    meta: dict[str, Any]

    @classmethod
    def of(cls, tensor: Tensor, name: str) -> MetaTensor:
        made = tensor.as_subclass(cls)
        made.meta = {"filename_or_obj": name}
        return made

    def new_empty(self, size, dtype=None, device=None, requires_grad=False):
        return super().new_empty(size, dtype=dtype, device=device, requires_grad=requires_grad)


@pytest.mark.parametrize("refine", [REFINE, "auto"], ids=["fixed", "auto"])
@pytest.mark.parametrize("returns", ["dict", "bare"])
def test_sliding_windows_over_tensors_with_meta_data(random_sam, returns, refine):
    def sample(image, target):
        return {"image": MetaTensor.of(image / 255, "a.nii"), "label": MetaTensor.of(target, "b")}

    def step(module, batch):
        image = batch["image"]
        halves = [module(image[..., :20]), module(image[..., 20:])]
        logits = torch.cat(halves, dim=-1)
        return {"loss": logits.mean(), "pred": logits} if returns == "dict" else logits

    network = nn.Conv2d(3, NUM_CLASSES, 1)
    torch.manual_seed(4)
    nn.init.normal_(network.weight)
    module, dataset = User(network, step), Samples(sample)
    logged = validate(random_sam, module, dataset, refine=refine)
    assert logged["val/miou_raw"] == pytest.approx(expected(module, dataset), abs=1e-6)


def test_a_refiner_given_tensors_with_meta_data(random_sam):
    data = Samples(lambda image, target: (image, target))
    image, probs = data.images[0], torch.rand(NUM_CLASSES, *data.images.shape[-2:]).softmax(dim=0)
    config = RefineConfig.preset("fast")
    expected = Refiner(random_sam, config)(image, probs)
    given = (MetaTensor.of(each, "a.nii") for each in (image, probs, probs.argmax(dim=0)))
    refined = Refiner(random_sam, config)(*given)
    assert type(refined.labels) is type(refined.probs) is Tensor
    assert torch.equal(refined.probs, expected.probs)


@pytest.mark.parametrize("hw", [(1, 1), (1, 9), (8, 900), (33, 62)])
@pytest.mark.parametrize("stride", [1, 4])
def test_sizes(random_sam, hw, stride):
    dataset = Samples(lambda image, target: (image, target), length=2, hw=hw)
    dataset.targets[dataset.targets == IGNORE] = 0
    module = User(conv(stride=stride), lambda module, batch: {"logits": module(batch[0] / 255)})
    logged = validate(random_sam, module, dataset)
    assert logged["val/miou_raw"] == pytest.approx(expected(module, dataset), abs=1e-6)


def test_sizes_that_differ(random_sam):
    sizes = [(32, 40), (24, 56), (9, 300)]
    parts = [Samples(None, 1, seed=index, hw=hw) for index, hw in enumerate(sizes)]

    class Mixed(torch.utils.data.Dataset):
        def __len__(self):
            return len(parts)

        def __getitem__(self, index):
            return parts[index].images[0], parts[index].targets[0]

    def step(module, batch):
        return {"logits": [module(image[None] / 255)[0] for image in batch["image"]]}

    def collate(samples):
        images, targets = zip(*samples, strict=True)
        return {"image": list(images), "mask": list(targets)}

    module = User(conv(), step)
    callback = SAMRefineCallback(random_sam, num_classes=NUM_CLASSES, refine=REFINE)
    loader = DataLoader(Mixed(), 3, collate_fn=collate)
    trainer = Trainer(**SILENT, callbacks=[callback])
    (logged,) = trainer.validate(module, loader, verbose=False)
    metric = MulticlassJaccardIndex(NUM_CLASSES, ignore_index=IGNORE)
    with torch.no_grad():
        for part in parts:
            metric.update(module.network(part.images / 255).argmax(dim=1), part.targets)
    assert logged["val/miou_raw"] == pytest.approx(float(metric.compute()), abs=1e-6)


@pytest.mark.parametrize("ignore", [-100, 0])
def test_ignored_values(random_sam, ignore):
    dataset = Samples(lambda image, target: (image, target))
    dataset.targets[dataset.targets == IGNORE] = ignore
    module = User(conv(), lambda module, batch: {"logits": module(batch[0] / 255)})
    logged = validate(random_sam, module, dataset, ignore_index=ignore)
    with torch.no_grad():
        labels = module.network(dataset.images / 255).argmax(dim=1)
    metric = MulticlassJaccardIndex(NUM_CLASSES, ignore_index=ignore, average="none")
    for index, iou in enumerate(metric(labels, dataset.targets).tolist()):
        if index != ignore:
            assert logged[f"val/iou_raw/{index}"] == pytest.approx(iou, abs=1e-6)


def test_double_precision(random_sam):
    def step(module, batch):
        logits = module(batch[0])
        assert logits.dtype == torch.float64
        return {"logits": logits}

    dataset = Samples(lambda image, target: (image / 255.0, target))
    module = User(conv(), step)
    logged = validate(random_sam, module, dataset, precision="64-true")
    assert logged["val/miou_raw"] == pytest.approx(expected(module.float(), dataset), abs=1e-6)
