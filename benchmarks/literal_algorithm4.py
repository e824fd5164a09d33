"""Baselines of `benchmarks.speed`: Algorithm 4 as one would write it, and SAMRefiner.

The first is the usual way to refine a label map with segment-anything: `SamPredictor` in float32,
one class after the other, every mask at full resolution.
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from segment_anything import SamPredictor
from segment_anything.modeling import Sam
from torch import Tensor

SAMREFINER_DIR = "SAMREFINER_DIR"

_EIGHT_CONNECTED = np.ones((3, 3), dtype=int)


def refine_by_class(
    predictor: SamPredictor,
    labels: Tensor,
    probs: Tensor,
    pred_iou_thresh: float,
    min_region_area: int,
    stride: int = 2,
    mask_prompt_scale: float = 8.0,
) -> Tensor:
    """Refine an image that the predictor holds already (steps 1 to 11 of Algorithm 4).

    Args:
        predictor: After ``set_image``.
        labels: (H, W) int64.
        probs: (C, H, W) float32 on the model's device.
        pred_iou_thresh: τ_iou.
        min_region_area: In pixels of the grid.
        stride: r.
        mask_prompt_scale: τ_m.

    Returns:
        (H, W) int64 refined labels.
    """
    height, width = labels.shape
    grid = F.interpolate(
        labels[None, None].float(), (height // stride, width // stride), mode="nearest"
    )
    grid = grid[0, 0].cpu().numpy()
    grid_probs = F.interpolate(probs[None], grid.shape, mode="bilinear")[0].cpu().numpy()
    mapped = torch.zeros_like(probs)
    for c in range(len(probs)):
        regions = _regions(grid == c, min_region_area)
        if not regions:
            continue
        boxes, points = _prompts(regions, grid_probs[c], predictor)
        logits, ious, _ = predictor.predict_torch(
            point_coords=points[:, None],
            point_labels=torch.ones(len(points), 1, device=predictor.device),
            boxes=boxes,
            mask_input=_mask_prompt(probs[c], predictor, mask_prompt_scale).expand(
                len(boxes), -1, -1, -1
            ),
            multimask_output=False,
            return_logits=True,
        )
        logits, ious = logits[:, 0], ious[:, 0]
        accepted = ious > pred_iou_thresh
        if accepted.any():
            kept = logits[accepted]
            mapped[c] = (kept.sigmoid() * (kept > 0) * probs[c]).amax(dim=0)
    covered = mapped.sum(dim=0) > 0
    return torch.where(covered, mapped.argmax(dim=0), labels)


def _regions(mask: NDArray[np.bool_], min_region_area: int) -> list[NDArray[np.bool_]]:
    numbered, count = ndimage.label(mask, structure=_EIGHT_CONNECTED)
    masks = [numbered == number for number in range(1, count + 1)]
    return [mask for mask in masks if mask.sum() >= min_region_area]


def _prompts(
    regions: list[NDArray[np.bool_]], probs: NDArray[np.float32], predictor: SamPredictor
) -> tuple[Tensor, Tensor]:
    boxes, points = [], []
    for mask in regions:
        rows, columns = np.nonzero(mask)
        boxes.append((columns.min(), rows.min(), columns.max(), rows.max()))
        row, column = np.unravel_index(np.where(mask, probs, -1).argmax(), mask.shape)
        points.append((column, row))
    device, transform = predictor.device, predictor.transform
    return (
        transform.apply_boxes_torch(torch.tensor(boxes, device=device), probs.shape).float(),
        transform.apply_coords_torch(torch.tensor(points, device=device)[:, None], probs.shape)[
            :, 0
        ].float(),
    )


def _mask_prompt(probs: Tensor, predictor: SamPredictor, scale: float) -> Tensor:
    side = predictor.model.prompt_encoder.mask_input_size[0]
    height, width = predictor.transform.get_preprocess_shape(*probs.shape, side)
    small = F.interpolate(probs[None, None], (height, width), mode="bilinear") * scale
    return F.pad(small, (0, side - width, 0, side - height))


class SamRefiner:
    """SAMRefiner (arXiv 2502.06756) with its defaults, from a checkout that the user gives.

    Its ``sam_refiner`` reads an image file and calls a method that its patched segment-anything
    adds to `Sam`; here the method stands on the official model.

    Args:
        sam: The model.

    Raises:
        FileNotFoundError: ``SAMREFINER_DIR`` does not name a checkout.
    """

    def __init__(self, sam: Sam) -> None:
        folder = Path(os.environ[SAMREFINER_DIR])
        if not (folder / "sam_refiner.py").is_file():
            raise FileNotFoundError(f"{SAMREFINER_DIR}: no sam_refiner.py in {folder}")
        sys.path.insert(0, str(folder))
        self._refine = importlib.import_module("sam_refiner").sam_refiner
        sam.forward_with_image_embeddings = types.MethodType(_with_embeddings, sam)
        self._sam = sam

    def __call__(self, image: Tensor, masks: NDArray[np.bool_]) -> NDArray[np.uint8]:
        """Refine (N, H, W) binary masks of a (3, H, W) uint8 image, encoder included."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "image.png"
            Image.fromarray(image.permute(1, 2, 0).cpu().numpy()).save(path)
            return self._refine(str(path), masks.astype(np.uint8), self._sam)[0]


@torch.no_grad()
def _with_embeddings(
    sam: Sam, embeddings: Tensor, records: list[dict[str, Any]], multimask_output: bool
) -> list[dict[str, Tensor]]:
    """Decode as `Sam.forward` does, with the image encoded already."""
    outputs = []
    for record in records:
        points = None
        if "point_coords" in record:
            points = (record["point_coords"], record["point_labels"])
        sparse, dense = sam.prompt_encoder(
            points=points, boxes=record.get("boxes"), masks=record.get("mask_inputs")
        )
        low_res, iou = sam.mask_decoder(
            image_embeddings=embeddings,
            image_pe=sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=multimask_output,
        )
        input_hw = tuple(record["image"].shape[-2:])
        masks = sam.postprocess_masks(low_res, input_hw, record["original_size"])
        outputs.append({"masks": masks, "iou_predictions": iou, "low_res_logits": low_res})
    return outputs
