"""What the regions of an image ask SAM, and what becomes of its answers (steps 5 to 7)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_samrefine.answers import Answers
from lightning_samrefine.config import RefineConfig
from lightning_samrefine.decoding import Decoded
from lightning_samrefine.image_masks import ImageMasks, pack_masks
from lightning_samrefine.models.protocol import Promptable, Prompts
from lightning_samrefine.prompt_memory import KnownMasks, PromptMemory
from lightning_samrefine.prompts import build_prompts, lattice_prompts, prompts_at
from lightning_samrefine.regions import GridRegions


@dataclass(frozen=True)
class Question:
    """What the regions of one image ask, on the lattice and otherwise.

    Attributes:
        open: Whether the model has to answer some of it.
        embedding: Of the image, where the model has to.
        wanted: (N, 6) int32 of `lattice_prompts`, one prompt a region; None off the lattice and
            without a memory.
        known: What was asked about the image before; None likewise.
        missing: (M, 6) int32, those of ``wanted`` that it does not hold, each once; without a
            memory all N. None off the lattice.
    """

    open: bool
    embedding: Any = None
    wanted: np.ndarray | None = None
    known: KnownMasks | None = None
    missing: np.ndarray | None = None


class RegionPrompts:
    """Puts the questions of regions, and takes the answers down.

    Args:
        sam: The model.
        config: Says whether regions are prompted, and how.
        memory: Of answers to prompts on the lattice; None without a cache.
    """

    def __init__(self, sam: Promptable, config: RefineConfig, memory: PromptMemory | None) -> None:
        self._sam, self._config, self._memory = sam, config, memory

    def question(self, image: Tensor, regions: GridRegions) -> Question:
        """Find out what N ≥ 1 regions ask, and what of it is known already."""
        if not self._config.prompt_regions:
            return Question(open=False)
        if not self._config.on_lattice:
            return Question(open=True)
        wanted = lattice_prompts(regions)
        if self._memory is None:  # nothing has to come to the CPU
            return Question(open=True, missing=wanted)
        known = self._memory.recall(image, wanted)
        missing = known.missing(wanted)
        return Question(len(missing) > 0, wanted=wanted, known=known, missing=missing)

    def prompts(self, answers: Answers, question: Question) -> Prompts:
        """Return what the model has to answer, at least one prompt."""
        config, regions = self._config, answers.regions
        if question.missing is not None:
            grid_hw, device = regions.components.shape, regions.probs.device
            return prompts_at(question.missing, grid_hw, self._sam, answers.image_hw, device)
        return build_prompts(
            regions,
            self._sam,
            answers.image_hw,
            config.score_thresh,
            config.mask_prompt_scale,
            config.mask_prompts,
        )

    def take_down(
        self, answers: Answers, question: Question | None, decoded: Decoded | None
    ) -> Answers:
        """Add what the model said to what is known about an image.

        Args:
            answers: Those about the image, without its regions' masks; they are not changed.
            question: None where the image has no region.
            decoded: The model's answers to `prompts`; None where nothing was open.
        """
        if question is None or not self._config.prompt_regions:
            return answers
        rows, columns = self._sam.mask_hw(answers.image_hw)
        if self._config.soft_floor:
            masks = self._packed(answers, question, decoded, (rows, columns))
            return replace(answers, pred_iou=masks.pred_iou.cpu(), region_masks=masks)
        masks = torch.stack([logits[:rows, :columns] > 0 for logits in decoded.low_res_logits])
        return replace(answers, masks=masks, **vars(decoded))

    def _packed(
        self,
        answers: Answers,
        question: Question,
        decoded: Decoded | None,
        mask_hw: tuple[int, int],
    ) -> ImageMasks:
        """Return the masks of all regions, those that were known and those that are new."""
        new = None if decoded is None else _pack(decoded.low_res_logits, decoded.pred_iou, mask_hw)
        if question.known is None:
            return new
        known = question.known
        if new is not None:
            known = known.extended(question.missing, new)
            self._memory.keep(answers.image, known.used_last(question.wanted))
        masks = known.masks(question.wanted, mask_hw)
        return replace(masks, packed=masks.packed.to(answers.probs.device))


def _pack(logits: Sequence[Tensor], pred_iou: Tensor, mask_hw: tuple[int, int]) -> ImageMasks:
    rows, columns = mask_hw
    maps = torch.stack([one[:rows, :columns] for one in logits])
    return ImageMasks(pack_masks(maps), pred_iou, mask_hw)
