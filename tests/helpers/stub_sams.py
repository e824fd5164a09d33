"""Promptable models for tests: without weights and with known masks, or random with limits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import cc3d
import numpy as np
import torch
from tiny_random_sam import build_random_sam
from torch import Tensor, nn

from lightning_samrefine.models.base import Prompts
from lightning_samrefine.models.sam import SamPromptable

INSIDE = 6.0


class StubSam:
    """Works in the image's own frame; its low-resolution logits hold only the index of a mask.

    Subclasses implement `predict`, which returns a prompt's mask and predicted IoU.
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
        predicted = [
            self.predict(embedding, box, point)
            for box, point in zip(prompts.boxes, prompts.points, strict=True)
        ]
        start = len(self._masks)
        self._masks += [mask for mask, _ in predicted]
        numbers = torch.arange(start, len(self._masks)) + 1.0
        logits = numbers[:, None, None].expand(-1, self.mask_size, self.mask_size)
        return logits.clone(), torch.tensor([iou for _, iou in predicted])

    def postprocess_masks(self, low_res_logits: Tensor, image_hw: tuple[int, int]) -> Tensor:
        return torch.stack([self._masks[int(one[0, 0]) - 1] for one in low_res_logits])

    def predict(self, image: Tensor, box: Tensor, point: Tensor) -> tuple[Tensor, float]:
        raise NotImplementedError


class PerfectSam(StubSam):
    """Predicts the connected component of the label map that contains the point."""

    def __init__(self, labels: Tensor, stride: int) -> None:
        super().__init__()
        self.components = cc3d.connected_components(
            (labels + 1).numpy().astype(np.int32), connectivity=8
        )
        self.grid_hw = tuple(max(1, side // stride) for side in labels.shape)

    def predict(self, image, box, point):
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
    """Predicts the bright pixels around the box: the same for an image and its mirror."""

    margin = 3

    def predict(self, image, box, point):
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
    """Predicts one mask for every prompt: `shape` makes it from the image's size."""

    def __init__(self, shape: Callable[[tuple[int, int]], Tensor], pred_iou: float = 0.9) -> None:
        super().__init__()
        self.shape, self.pred_iou = shape, pred_iou

    def predict(self, image, box, point):
        return self.shape(tuple(image.shape[1:])), self.pred_iou


class SmallSam(SamPromptable):
    """A random SAM that runs out of memory above a number of prompts or images at once.

    Attributes:
        prompt_counts: Number of prompts in each call of `predict_masks`.
        image_counts: Number of images in each call of `encode_images`.
    """

    def __init__(self, error: BaseException, prompts: int = 99, images: int = 99) -> None:
        super().__init__(build_random_sam(), "small")
        self.error, self.prompts, self.images = error, prompts, images
        self.prompt_counts: list[int] = []
        self.image_counts: list[int] = []

    def encode_images(self, images):
        self.image_counts.append(len(images))
        if len(images) > self.images:
            raise self.error
        return super().encode_images(images)

    def predict_masks(self, embedding, prompts, multimask_output=False):
        self.prompt_counts.append(len(prompts))
        if len(prompts) > self.prompts:
            raise self.error
        return super().predict_masks(embedding, prompts, multimask_output)


class CountingSam(SamPromptable):
    """A random SAM that counts encoded images.

    Attributes:
        calls: Number of images in each call of `encode_images`.
        embedded: Their sum.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__(build_random_sam(seed), "random")
        self.calls: list[int] = []
        self.embedded = 0

    def encode_images(self, images):
        self.calls.append(len(images))
        self.embedded += len(images)
        return super().encode_images(images)


class FailingSam(SamPromptable):
    """A random SAM that cannot encode some images.

    Args:
        fails: Whether it fails at these images.
    """

    def __init__(self, fails: Callable[[Sequence[Tensor]], bool]) -> None:
        super().__init__(build_random_sam(), "random")
        self._fails = fails

    def encode_images(self, images):
        if self._fails(images):
            raise RuntimeError("this image fails")
        return super().encode_images(images)
