"""Promptable models without weights, whose answers are known: for invariants and huge images."""

from __future__ import annotations

from collections.abc import Callable

import cc3d
import numpy as np
import torch
from torch import Tensor, nn

from lightning_samrefine.models.base import Prompts

INSIDE = 6.0


class StubSam:
    """Works in the image's own frame; its low-resolution logits hold nothing but a number.

    A subclass says in `answer` which mask and predicted IoU a prompt gets.
    """

    name = "stub"
    mask_size = 4
    has_multimask_output = False

    def __init__(self) -> None:
        self.module = nn.Module()
        self.image_size = 0
        self.chunks: list[int] = []
        self._masks: list[Tensor] = []

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def input_hw(self, image_hw: tuple[int, int]) -> tuple[int, int]:
        return image_hw

    def mask_hw(self, image_hw: tuple[int, int]) -> tuple[int, int]:
        return (self.mask_size, self.mask_size)

    def encode_images(self, images) -> list[Tensor]:
        return list(images)

    def predict_masks(
        self, embedding: Tensor, prompts: Prompts, multimask_output: bool = False
    ) -> tuple[Tensor, Tensor]:
        self.chunks.append(len(prompts))
        answers = [
            self.answer(embedding, box, point)
            for box, point in zip(prompts.boxes, prompts.points, strict=True)
        ]
        start = len(self._masks)
        self._masks += [mask for mask, _ in answers]
        numbers = torch.arange(start, len(self._masks)) + 1.0
        logits = numbers[:, None, None].expand(-1, self.mask_size, self.mask_size)
        return logits.clone(), torch.tensor([iou for _, iou in answers])

    def postprocess_masks(self, low_res_logits: Tensor, image_hw: tuple[int, int]) -> Tensor:
        return torch.stack([self._masks[int(one[0, 0]) - 1] for one in low_res_logits])

    def answer(self, image: Tensor, box: Tensor, point: Tensor) -> tuple[Tensor, float]:
        raise NotImplementedError


class PerfectSam(StubSam):
    """Answers with the connected component of the label map that the point was taken from."""

    def __init__(self, labels: Tensor, stride: int) -> None:
        super().__init__()
        self.components = cc3d.connected_components(
            (labels + 1).numpy().astype(np.int32), connectivity=8
        )
        self.grid_hw = tuple(max(1, side // stride) for side in labels.shape)

    def answer(self, image, box, point):
        position = []
        for at, side, cells in zip(
            point.tolist()[::-1], self.components.shape, self.grid_hw, strict=True
        ):
            # The pixel that nearest-neighbor resizing took for this cell of the grid.
            cell = round(at * cells / side)
            source = torch.arange(side, dtype=torch.float32)[None, None]
            position.append(int(nn.functional.interpolate(source, cells)[0, 0, cell]))
        component = self.components == self.components[tuple(position)]
        return torch.where(torch.from_numpy(component), INSIDE, -INSIDE), 0.9


class BrightSam(StubSam):
    """Answers with the bright pixels around the box: the same for an image and its mirror."""

    margin = 3

    def answer(self, image, box, point):
        gray = image.sum(dim=0, dtype=torch.int64)
        height, width = gray.shape
        x0, y0, x1, y1 = (round(value) for value in box.tolist())
        inside = torch.zeros(height, width, dtype=torch.bool)
        top, left = max(0, y0 - self.margin), max(0, x0 - self.margin)
        inside[top : y1 + 1 + self.margin, left : x1 + 1 + self.margin] = True
        bright = gray > 380
        logits = torch.where(inside & bright, (gray - 380) / 100, -1.0)
        # Whole numbers, so that the order of a sum cannot matter.
        total = int(gray[y0 : y1 + 1, x0 : x1 + 1].sum())
        return logits, (total % 1009) / 1009


class FixedSam(StubSam):
    """MaskPredictions every prompt with one mask: `shape` makes it from the image's size."""

    def __init__(self, shape: Callable[[tuple[int, int]], Tensor], pred_iou: float = 0.9) -> None:
        super().__init__()
        self.shape, self.pred_iou = shape, pred_iou

    def answer(self, image, box, point):
        return self.shape(tuple(image.shape[1:])), self.pred_iou
