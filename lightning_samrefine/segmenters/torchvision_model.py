"""Any segmentation network of torchvision as a LightningModule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.nn import functional as nnf
from torchvision.models import get_model, list_models, segmentation

from lightning_samrefine.adapters.target_values import IgnoreIndex, settle_ignore_index
from lightning_samrefine.utils.state_dicts import differing_keys, read_state_dict

# torchvision's segmentation weights were all trained with these.
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)

# The weight of the auxiliary head in torchvision's own training recipe.
AUX_LOSS_WEIGHT = 0.5


class TorchvisionSegmenter(LightningModule):
    """A segmentation network of torchvision that takes uint8 images and normalizes them itself.

    Steps read the batches of `lightning_samrefine.data`, log ``train/loss``, ``val/loss`` and
    ``test/loss``, and return ``"logits"`` (B, C, H, W) and ``"loss"``.

    Args:
        num_classes: C.
        architecture: Name in ``torchvision.models.segmentation``. DeepLabV3 needs at least 2
            images per batch in training.
        weights: torchvision's name of trained weights, such as ``"DEFAULT"`` (downloaded into
            torch's cache), or ``None`` for random ones. Their classes must be yours.
        checkpoint: State dict of the network, a ``.pth`` or ``.safetensors`` file (alone, or under
            the key ``"model"`` as in torchvision's reference scripts), or ``None``. Pass a
            Lightning checkpoint as the Trainer's ``ckpt_path`` instead.
        ignore_index: Label value without a loss, or ``None``; ``"auto"`` is 255, and an error if
            255 is a class.
        lr: Learning rate of AdamW.

    Raises:
        ValueError: An unknown architecture, weights of another number of classes, or a checkpoint
            of another network.
        FileNotFoundError: ``checkpoint`` does not exist.
    """

    def __init__(
        self,
        num_classes: int,
        architecture: str = "deeplabv3_mobilenet_v3_large",
        weights: str | None = None,
        checkpoint: str | Path | None = None,
        ignore_index: IgnoreIndex = "auto",
        lr: float = 1e-3,
    ) -> None:
        super().__init__()
        known = list_models(module=segmentation)
        if architecture not in known:
            raise ValueError(
                f"architecture must be one of {', '.join(known)}, got {architecture!r}"
            )
        what = f"a state dict of {architecture}"
        state = None if checkpoint is None else read_state_dict(Path(checkpoint), what)
        has_aux = any(key.startswith("aux_classifier.") for key in state or ())
        self.network = get_model(
            architecture,
            weights=weights,
            weights_backbone=None,
            num_classes=num_classes,
            **({"aux_loss": True} if has_aux else {}),
        )
        if state is not None:
            if details := differing_keys(state, self.network):
                raise ValueError(
                    f"checkpoint must be {what} for num_classes={num_classes}, got "
                    f"{str(checkpoint)!r}, which does not fit: {details}"
                )
            self.network.load_state_dict(state)
        self.ignore_index = settle_ignore_index(ignore_index, num_classes)
        self.lr = lr
        self._mean: Tensor
        self._std: Tensor
        self.register_buffer("_mean", torch.tensor(IMAGE_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("_std", torch.tensor(IMAGE_STD).view(3, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """Segment images.

        Args:
            image: (B, 3, H, W) uint8 RGB.

        Returns:
            (B, C, H, W) float logits.
        """
        return self._outputs(image)["out"]

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Return the cross-entropy, plus that of an auxiliary head if there is one."""
        outputs = self._outputs(batch["image"])
        loss = self._loss(outputs["out"], batch["mask"])
        if "aux" in outputs:
            loss = loss + AUX_LOSS_WEIGHT * self._loss(outputs["aux"], batch["mask"])
        self.log("train/loss", loss, batch_size=len(batch["image"]))
        return loss

    def validation_step(
        self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0
    ) -> dict[str, Tensor]:
        """Return ``"logits"`` and ``"loss"``, and log ``val/loss``."""
        return self._evaluate(batch, "val")

    def test_step(
        self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0
    ) -> dict[str, Tensor]:
        """Return ``"logits"`` and ``"loss"``, and log ``test/loss``."""
        return self._evaluate(batch, "test")

    def predict_step(
        self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0
    ) -> dict[str, Tensor]:
        """Return ``"logits"``; no target is needed."""
        return {"logits": self(batch["image"])}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW over all parameters."""
        return torch.optim.AdamW(self.parameters(), lr=self.lr)

    def _outputs(self, image: Tensor) -> dict[str, Tensor]:
        return self.network((image / 255 - self._mean) / self._std)

    def _evaluate(self, batch: dict[str, Any], stage: str) -> dict[str, Tensor]:
        logits = self(batch["image"])
        loss = self._loss(logits, batch["mask"])
        self.log(f"{stage}/loss", loss, batch_size=len(logits))
        return {"logits": logits, "loss": loss}

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        # The default of cross_entropy, a value outside all labels.
        ignore_index = -100 if self.ignore_index is None else self.ignore_index
        total = nnf.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="sum")
        # An image without any annotation has a loss of 0, not of 0 / 0.
        return total / (labels != ignore_index).sum().clamp(min=1)
