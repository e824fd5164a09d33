"""Thresholds from validation frames alone: one small grid, one setting for both resolutions."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from benchmarks.camvid.data import ESPNET_WEIGHTS, RESOLUTIONS, VOID, camvid
from benchmarks.camvid.espnet import ESPNetSegmenter
from lightning_samrefine import RefineConfig, Refiner
from lightning_samrefine.comparison import ConfusionMatrix, class_iou
from lightning_samrefine.models import Promptable, Prompts

PRESET = "algorithm4"
SCORE_THRESH = (0.0, 0.3, 0.5)
PRED_IOU_THRESH = (0.3, 0.5, 0.7, 0.8)
MIN_REGION_AREA = (16, 64)
EVERY_NTH_FRAME = 5  # neighbouring frames look alike


class RememberingSAM:
    """A `Promptable` that answers what it was asked before on the same image from memory.

    The settings of a grid share most of their prompts. Remembers one image at a time.
    """

    def __init__(self, sam: Promptable) -> None:
        self._sam = sam
        self._image: Tensor | None = None
        self._embedding: Tensor | None = None
        self._answers: dict[tuple[bytes, bytes, bytes], tuple[Tensor, Tensor]] = {}
        self.name, self.module = sam.name, sam.module
        self.image_size, self.mask_size = sam.image_size, sam.mask_size
        self.input_hw, self.mask_hw, self.upscale = sam.input_hw, sam.mask_hw, sam.upscale

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self._sam.device

    def embed(self, images: Sequence[Tensor]) -> list[Tensor]:
        """Embed one image; a new one empties the memory.

        Raises:
            ValueError: more than one image.
        """
        if len(images) != 1:
            raise ValueError(f"images: got {len(images)}, accepted is one at a time")
        if self._image is None or not torch.equal(images[0], self._image):
            self._embedding = self._sam.embed(images)[0]
            self._image = images[0]
            self._answers.clear()
        return [self._embedding]

    def decode(self, embedding: Tensor, prompts: Prompts) -> tuple[Tensor, Tensor]:
        """Decode N prompts, new ones by the model."""
        masks = [_bytes(mask) for mask in prompts.masks]
        keys = [
            (_bytes(box), _bytes(point), masks[index])
            for box, point, index in zip(
                prompts.boxes, prompts.points, prompts.mask_index.tolist(), strict=True
            )
        ]
        new = [position for position, key in enumerate(keys) if key not in self._answers]
        if new:
            asked = Prompts(
                prompts.boxes[new], prompts.points[new], prompts.masks, prompts.mask_index[new]
            )
            for position, *answer in zip(new, *self._sam.decode(embedding, asked), strict=True):
                self._answers[keys[position]] = (answer[0], answer[1])
        logits, ious = zip(*(self._answers[key] for key in keys), strict=True)
        return torch.stack(logits), torch.stack(ious)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.cpu().numpy().tobytes()


@dataclass(frozen=True)
class Trial:
    """One setting of the grid on the validation frames.

    Attributes:
        config: the setting.
        raw: mIoU of the raw prediction, by resolution.
        refined: mIoU after refinement, by resolution.
    """

    config: RefineConfig
    raw: dict[str, float]
    refined: dict[str, float]

    @property
    def mean_gain(self) -> float:
        """Mean gain in mIoU over the resolutions."""
        return sum(self.refined[key] - self.raw[key] for key in self.raw) / len(self.raw)


def grid() -> Iterator[RefineConfig]:
    """Yield the settings that are tried."""
    for score, iou, area in product(SCORE_THRESH, PRED_IOU_THRESH, MIN_REGION_AREA):
        yield RefineConfig.preset(
            PRESET, score_thresh=score, pred_iou_thresh=iou, min_region_area=area
        )


@torch.inference_mode()
def try_grid(root: Path, sam: Promptable, every: int = EVERY_NTH_FRAME) -> list[Trial]:
    """Refine every n-th validation frame with every setting at every resolution.

    Args:
        root: the data folder.
        sam: the promptable model.
        every: n; 1 takes all frames.

    Returns:
        One trial a setting, in the order of `grid`.
    """
    configs = list(grid())
    remembering = RememberingSAM(sam)
    refiners = [Refiner(remembering, config) for config in configs]
    models: dict[str, nn.Module] = {
        key: ESPNetSegmenter(root / ESPNET_WEIGHTS, resolution=key).eval() for key in RESOLUTIONS
    }
    raw = {key: _confusion() for key in RESOLUTIONS}
    refined = {key: [_confusion() for _ in configs] for key in RESOLUTIONS}

    data = camvid(root)
    data.setup("validate")
    frames = data.val_dataloader().dataset
    loader = DataLoader(Subset(frames, range(0, len(frames), every)), batch_size=1)
    for batch in track(loader, description="val frames"):
        for key, model in models.items():
            probs = model(batch["image"])[0].softmax(dim=0)
            raw[key].update(probs.argmax(dim=0), batch["mask"][0])
            for refiner, confusion in zip(refiners, refined[key], strict=True):
                confusion.update(refiner(batch["image"][0], probs).labels, batch["mask"][0])
    return [
        Trial(
            config,
            {key: _miou(raw[key]) for key in RESOLUTIONS},
            {key: _miou(refined[key][index]) for key in RESOLUTIONS},
        )
        for index, config in enumerate(configs)
    ]


def _confusion() -> ConfusionMatrix:
    return ConfusionMatrix(num_classes=VOID, ignore_index=VOID)


def _miou(confusion: ConfusionMatrix) -> float:
    return class_iou(confusion.compute()).nanmean().item()


def best(trials: Sequence[Trial]) -> Trial:
    """Return the trial with the largest mean gain, the first of equals."""
    return max(trials, key=lambda trial: trial.mean_gain)


def write_grid(trials: Sequence[Trial], path: Path) -> None:
    """Write every trial as a row of a CSV file, mIoU in [0, 1]."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        columns = [f"{what}_{key}" for key in RESOLUTIONS for what in ("raw", "refined")]
        writer.writerow(
            ["score_thresh", "pred_iou_thresh", "min_region_area", *columns, "mean_gain"]
        )
        for trial in trials:
            config = trial.config
            values = [v for key in RESOLUTIONS for v in (trial.raw[key], trial.refined[key])]
            writer.writerow(
                [config.score_thresh, config.pred_iou_thresh, config.min_region_area]
                + [f"{value:.4f}" for value in [*values, trial.mean_gain]]
            )


def write_choice(trial: Trial, every: int, path: Path) -> None:
    """Write the thresholds of a trial as a member of the command's config group ``refine``."""
    gains = ", ".join(
        f"{key} {100 * (trial.refined[key] - trial.raw[key]):+.2f}" for key in RESOLUTIONS
    )
    config = trial.config
    path.write_text(
        f"# Chosen on every {every}th frame of val (gain in points there: {gains}) by\n"
        "# python -m benchmarks.camvid.run --choose-on-val; the whole grid is in val_grid.csv.\n"
        "defaults:\n"
        f"  - {PRESET}\n"
        "  - _self_\n"
        "\n"
        f"score_thresh: {config.score_thresh}\n"
        f"pred_iou_thresh: {config.pred_iou_thresh}\n"
        f"min_region_area: {config.min_region_area}\n",
        encoding="utf-8",
    )
