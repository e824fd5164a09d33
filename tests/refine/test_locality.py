"""A region's verdict matters where its mask is, and nowhere else."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from random_predictions import blobs

from lightning_samrefine import RefineConfig, Refiner
from lightning_samrefine.refine.mask_predictions import MaskPredictions
from lightning_samrefine.refine.mask_proposals import MaskProposals, pack_masks
from lightning_samrefine.refine.raw_prediction import RawPrediction
from lightning_samrefine.refine.regions import begin_split

pytestmark = pytest.mark.numerical

HW, GRID, CLASSES = (96, 128), (24, 32), 4
# A cell of the masks' grid, by which resizing spreads, one of the working grid, and the smoothing.
REACH = 4 + 2 + 3

CONFIGS = {
    "fast": RefineConfig.preset("fast", min_region_area=4),
    "default": RefineConfig.preset("default", min_region_area=4),
    "fast without smoothing": RefineConfig.preset("fast", min_region_area=4, crf_weight=0),
}


def scene(seed: int, config: RefineConfig) -> MaskPredictions:
    """Return a prediction, masks that nearly are its regions, and a few masks of the image."""
    image, probs = blobs(CLASSES, HW, seed)
    regions = begin_split(
        probs.argmax(0), probs, config.score_thresh, config.stride, config.min_region_area
    ).finish()
    generator = torch.Generator().manual_seed(seed)
    logits = []
    for index in range(len(regions)):
        own = regions.mask_of(np.arange(len(regions)) == index)[None, None].float()
        own = torch.nn.functional.interpolate(own, GRID, mode="nearest")[0, 0]
        shift = torch.randint(-2, 3, (2,), generator=generator).tolist()
        moved = torch.nn.functional.pad(own, (2, 2, 2, 2))[
            2 + shift[0] : 2 + shift[0] + GRID[0], 2 + shift[1] : 2 + shift[1] + GRID[1]
        ]
        logits.append(8 * moved - 4)
    ious = torch.rand(len(logits), generator=generator)
    region_masks = MaskProposals(pack_masks(torch.stack(logits)), ious, GRID)
    mask_proposals = None
    if config.points_per_side:
        rough = torch.randn(6, 1, 3, 4, generator=generator) * 8 - 6
        rough = torch.nn.functional.interpolate(rough, GRID, mode="bilinear")[:, 0]
        mask_proposals = MaskProposals(pack_masks(rough), torch.linspace(0.95, 0.75, 6), GRID)
    return MaskPredictions(
        RawPrediction(image, probs),
        regions,
        pred_iou=ious,
        region_masks=region_masks,
        mask_proposals=mask_proposals,
    )


def reach(predictions: MaskPredictions, index: int) -> torch.Tensor:
    """Return (H, W) bool, the pixels of a region's mask, and those close by."""
    mask = (predictions.region_masks[index : index + 1].probs() > 0)[None].float()
    near = torch.nn.functional.interpolate(mask, HW)
    return torch.nn.functional.max_pool2d(near, 2 * REACH + 1, 1, REACH)[0, 0] > 0


@pytest.mark.parametrize("others", ["rejected", "mixed", "accepted"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_verdict_changes_nothing_out_of_its_reach(random_sam, name, others):
    config = CONFIGS[name]
    refiner = Refiner(random_sam, config, "32")
    compared = changed = 0
    for seed in range(3):
        predictions = scene(seed, config)
        count = len(predictions.regions)
        assert count > 3
        verdicts = {
            "rejected": torch.zeros(count),
            "mixed": (predictions.pred_iou > 0.5).float(),
            "accepted": torch.ones(count),
        }[others]
        outs = []
        for index in range(count):
            flipped = verdicts.clone()
            flipped[index] = 1 - flipped[index]
            outs = [
                refiner.fuse(replace(predictions, pred_iou=verdict))
                for verdict in (verdicts, flipped)
            ]
            first, second = outs
            assert int((first.regions.accepted != second.regions.accepted).sum()) == 1
            outside = ~reach(predictions, index)
            for field in ("labels", "probs", "covered"):
                one, other = (getattr(out, field)[..., outside] for out in outs)
                assert torch.equal(one, other), (seed, index, field)
            compared += int(outside.sum())
            changed += int((first.labels != second.labels).sum())
    assert compared > 10_000
    assert changed > 100


@pytest.mark.parametrize("name", CONFIGS)
def test_what_no_mask_reaches_is_raw(random_sam, name):
    config = CONFIGS[name]
    refiner = Refiner(random_sam, config, "32")
    raw = 0
    for seed in range(3):
        predictions = scene(seed, config)
        verdicts = torch.zeros(len(predictions.regions))
        largest = int(predictions.region_masks.probs().sum(dim=(1, 2)).argmax())
        for accepted in (None, largest):
            if accepted is not None:
                verdicts[accepted] = 1
            out = refiner.fuse(replace(predictions, pred_iou=verdicts))
            touched = torch.zeros(HW, dtype=torch.bool)
            if accepted is not None:
                touched |= reach(predictions, accepted)
            if predictions.mask_proposals is not None:
                inside = (predictions.mask_proposals.probs().amax(0) > 0)[None, None].float()
                near = torch.nn.functional.interpolate(inside, HW)
                touched |= torch.nn.functional.max_pool2d(near, 2 * REACH + 1, 1, REACH)[0, 0] > 0
            assert torch.equal(out.probs[:, ~touched], predictions.raw.probs[:, ~touched])
            assert torch.equal(out.labels[~touched], predictions.raw.labels[~touched])
            raw += int((~touched).sum())
            if accepted is not None:
                assert (out.labels != predictions.raw.labels).any()
    assert raw > 300
