"""A segmenter and its refinement as one module, for deployment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import Self, override

from lightning_samrefine.adapters.batch_adapter import BatchAdapter
from lightning_samrefine.adapters.denormalize import Denormalize
from lightning_samrefine.adapters.scores import ScoresKind
from lightning_samrefine.refine.refiner import Refiner


class RefinedSegmenter(nn.Module):
    """Runs a segmenter and refines what it predicts.

    SAM's module is a child: `to` moves it, and ``state_dict`` holds its weights. It stays in
    evaluation mode. Gradients do not flow.

    Args:
        module: Takes (B, 3, H, W) images. Returns scores of shape (B, C, h, w), or a mapping of
            which one value is scores; other than the image's size is interpolated.
        refiner: Refines, for example with ``refine`` of a fitted.yaml.
        returns: ``"labels"`` or ``"probs"``.
        num_classes: C; None takes the number of channels of a tensor (1 means 2 classes).
        scores_key: The key of the scores in a mapping; None searches the usual names.
        scores_kind: ``"logits"``, ``"probs"``, ``"labels"``, or ``"auto"`` to decide by the values.
        image_mean: The mean of your Normalize transform, undone for SAM.
        image_std: Its deviation.
        image_range: ``"0-1"`` or ``"0-255"``, the range in which the two are given; None infers it.

    Raises:
        ValueError: An argument outside its range.

    Example:
        >>> deployed = RefinedSegmenter(network, Refiner(load_sam("vit_t")))  # doctest: +SKIP
        >>> labels = deployed(images)  # (B, H, W) int64  # doctest: +SKIP
    """

    def __init__(
        self,
        module: nn.Module,
        refiner: Refiner,
        returns: Literal["labels", "probs"] = "labels",
        num_classes: int | None = None,
        scores_key: str | None = None,
        scores_kind: ScoresKind = "auto",
        image_mean: Sequence[float] | float | None = None,
        image_std: Sequence[float] | float | None = None,
        image_range: Literal["0-255", "0-1"] | None = None,
    ) -> None:
        super().__init__()
        if returns not in ("labels", "probs"):
            raise ValueError(f"returns must be 'labels' or 'probs', got {returns!r}")
        self.module, self.refiner, self.returns = module, refiner, returns
        self.sam = refiner.sam.module
        self._adapter = BatchAdapter(
            num_classes=num_classes,
            image_key="image",
            scores_key=scores_key,
            scores_kind=scores_kind,
            rgb=Denormalize(image_mean, image_std, image_range),
            needs_target=False,
        )
        self.train(self.training)

    @override
    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.sam.eval()
        return self

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Predict and refine.

        Args:
            images: (B, 3, H, W), as ``module`` takes them.

        Returns:
            (B, H, W) int64 labels, or (B, C, H, W) float32 probabilities.

        Raises:
            ValueError: No scores in what ``module`` returns, or an unknown number of classes.
        """
        outputs = self.module(images)
        adapter = replace(
            self._adapter, num_classes=self._classes(outputs), device=self.refiner.sam.device
        )
        inputs = adapter({"image": images}, outputs)
        refined = self.refiner.refine_batch(inputs.images, inputs.probs, inputs.labels)
        return torch.stack([getattr(one, self.returns) for one in refined])

    def _classes(self, outputs: Any) -> int | None:
        if self._adapter.num_classes is not None or not isinstance(outputs, Tensor):
            return self._adapter.num_classes
        if outputs.ndim != 4 or not outputs.is_floating_point():
            return None
        return max(outputs.shape[1], 2)
